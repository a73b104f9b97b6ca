"""A split model as a Generator that says where its answers came from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from edgewise.engines.base import Tokenizer
from edgewise.engines.decode import Decoder
from edgewise.engines.local import LocalModel
from edgewise.errors import RemoteRefused, RemoteTimeout, Unreachable
from edgewise.models.bundle import Bundle
from edgewise.models.outline import of_card
from edgewise.plan.codec_table import shipped
from edgewise.settings import SplitSettings
from edgewise.split.channel import Way
from edgewise.split.model import SplitModel, SplitOptions, Tally, greeted
from edgewise.types import Chunk, Decision, Request
from edgewise.wire.frame import Welcome

log = logging.getLogger(__name__)


class SplitGenerator:
    """A Decoder over a split model. The last chunk of an answer has the route `cloud` if workers computed all of it,
    else `edge_fallback`, and as its reason how many tokens came from where. Of answers that run at once the counts are
    those of all of them together."""

    def __init__(self, model: SplitModel, tokenizer: Tokenizer, options: SplitOptions) -> None:
        self.name, self.model = model.name, model
        self._decoder = Decoder(model, tokenizer)
        self.can = self._decoder.can
        self._where = f"split at {options.cut}, {options.codec}"

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        before = replace(self.model.tally)
        async for chunk in self._decoder.generate(request):
            if chunk.finish_reason is None:
                yield chunk
            else:
                yield replace(chunk, decision=_decision(self._where, before, self.model.tally))

    async def close(self) -> None:
        await self._decoder.close()


def _decision(where: str, before: Tally, after: Tally) -> Decision:
    there, here = after.there - before.there, after.here - before.here
    told = f"{where}: {there} tokens by the worker"
    if not here:
        return Decision("cloud", None, told)
    return Decision(
        "edge_fallback", None, f"{told}, {here} here" + (f" ({after.last_loss})" if after.last_loss else "")
    )


def open_generator(
    engine: LocalModel[Any], tokenizer: Tokenizer, bundle: Bundle, ways: Sequence[Way], settings: SplitSettings
) -> SplitGenerator:
    """The model split as the settings say. RemoteRefused, with the reason, if a worker will not have us; Unreachable or
    RemoteTimeout if none is there and its layers may not run here."""
    welcome = _welcome(engine, bundle, ways, needed=not settings.tail)
    first = 0 if welcome is None else welcome.layers[0]
    cut = settings.cut or _cut(engine, first)
    options = SplitOptions(
        cut,
        _cheapest(engine, bundle, cut, settings.max_rise) if settings.codec == "auto" else settings.codec,
        "edge" if settings.head == "edge" else "cloud",
        settings.tail,
        settings.patience_s,
    )
    return SplitGenerator(SplitModel(engine, bundle.weights, ways, options), tokenizer, options)


def _welcome(engine: LocalModel[Any], bundle: Bundle, ways: Sequence[Way], *, needed: bool) -> Welcome | None:
    """Of the first worker that is there; None if none is, and none is needed."""
    trouble: Exception | None = None
    for way in ways:
        try:
            return asyncio.run(greeted(way, engine, bundle.weights))
        except (Unreachable, RemoteTimeout) as e:
            trouble = e
        except RemoteRefused as e:
            if not e.retryable and not (500 <= e.status <= 599):
                raise
            trouble = e
    if needed and trouble is not None:
        raise trouble
    log.warning("%s; the layers behind the cut run here until a worker comes", trouble)
    return None


def _cheapest(engine: LocalModel[Any], bundle: Bundle, cut: int, max_rise: float) -> str:
    """The codec of the fewest bytes that is known to keep to the budget at this cut of the model."""
    chosen = shipped().cheapest(of_card(engine.card, name=engine.name), cut, max_rise, bundle.weights)
    log.info("%s", chosen.reason)
    return chosen.codec


def _cut(engine: LocalModel[Any], first: int) -> int:
    """As few layers as the worker leaves, but a third: what the first layers make is close to the text itself."""
    last = engine.card.layers
    return next(n for n in range(max(first, last // 3, 1), last) if engine.cuts_at(n))
