"""Where to cut a decoder between an edge and a cloud, with reasons.

A token's time is a straight line over the cut (cuts.py), so its least lies at an end, where nothing is split: a round
trip for each token is never faster than one for an answer. What a split of a decoder is for are limits: memory here,
layers that must stay here, the price of the cloud. The plan says which of them decided, what would have to change where
no cut keeps to all of them, and which side alone would be faster.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, Final, Literal

import msgspec

from edgewise.devices.links import LinkProfile
from edgewise.models.outline import Outline
from edgewise.plan.codec_table import CodecTable
from edgewise.plan.cuts import ANSWER, Cut, EdgeMemory, Head, Limits, Split, Wish
from edgewise.plan.memory import GIB
from edgewise.plan.precision import PRECISIONS, Precision
from edgewise.plan.sides import side
from edgewise.plan.sites import Site
from edgewise.plan.speeds import Speeds

USUAL: Final = PRECISIONS["q4_1"]  # of a model that is only a name

Place = Literal["edge", "cloud"]


class SplitPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Without a feasible cut all that belongs to one is None. `cut`: so many layers run on the edge. Milliseconds are
    of a token behind `context` others, and of the first token of an answer to a prompt; `predicted_ms` lies within its
    interval four times in five. `better`: the side that alone keeps to all limits and is faster."""

    model: str
    layers: int
    head: Head
    edge: str
    cloud: str
    link: str
    precision: str
    context: int
    edge_limit_bytes: int | None
    edge_bytes_with_tail: int
    baselines: dict[str, float]
    feasible: bool = False
    cut: int | None = None
    decided_by: str | None = None
    edge_bytes: int | None = None
    memory_bytes: dict[str, int] | None = None
    codec: str | None = None
    ppl_rise: float | None = None
    bytes_per_token_up: int | None = None
    bytes_per_token_down: int | None = None
    predicted_ms: float | None = None
    predicted_interval_ms: tuple[float, float] | None = None
    token_ms: dict[str, float] | None = None
    first_token_ms: float | None = None
    price_per_token: float | None = None
    better: Place | None = None
    reasons: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The fields by their names."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        return told


def make(
    outline: Outline,
    edge: Site,
    cloud: Site,
    link: LinkProfile,
    speeds: Speeds,
    codecs: CodecTable,
    wish: Wish | None = None,
    *,
    precision: Precision | None = None,
    weights_hash: str | None = None,
) -> SplitPlan:
    """The plan for these two machines. Without a precision it is that of the model's file, or 4 bits with minima for a
    model that is only a name. `weights_hash` finds the codecs that were measured on these very weights. UsageError for
    a model that cannot be cut."""
    wish = wish or Wish()
    if precision is None and outline.stored is None:
        precision = USUAL
    here, there = (
        side(outline, site, speeds, precision, context=wish.context, prompt=wish.prompt) for site in (edge, cloud)
    )
    split = Split(outline, here, there, link, codecs, wish, precision=precision, weights_hash=weights_hash)
    return _Plan(split, precision).made()


class _Plan:
    def __init__(self, split: Split, precision: Precision | None) -> None:
        self._split, self._wish, self._precision = split, split.wish, precision
        self._limits = Limits(split)
        self._cuts = split.cuts()

    def made(self) -> SplitPlan:
        found = self._limits.chosen(self._cuts)
        if found is None:
            better = self._better(math.inf)
            return msgspec.structs.replace(
                self._without_cut(), better=better, reasons=(*self._why_not(), *self._instead(better))
            )
        cut, decided_by = found
        better = self._better(cut.ms)
        return msgspec.structs.replace(
            self._without_cut(),
            feasible=True,
            cut=cut.layers,
            decided_by=decided_by,
            edge_bytes=cut.memory.total,
            edge_bytes_with_tail=self._split.whole_bytes(cut.coding.row_bytes),
            memory_bytes=msgspec.to_builtins(cut.memory),
            codec=cut.coding.codec,
            ppl_rise=cut.coding.ppl_rise,
            bytes_per_token_up=cut.coding.row_bytes,
            bytes_per_token_down=self._split.down_bytes(cut.coding.row_bytes),
            predicted_ms=cut.ms,
            predicted_interval_ms=self._interval(cut),
            token_ms=msgspec.to_builtins(cut.token),
            first_token_ms=cut.first_ms,
            price_per_token=self._price(cut),
            better=better,
            reasons=(*self._why(cut, decided_by), *self._instead(better)),
        )

    def _without_cut(self) -> SplitPlan:
        split, wish = self._split, self._wish
        return SplitPlan(
            model=split.outline.name,
            layers=split.outline.layers,
            head=wish.head,
            edge=split.edge.name,
            cloud=split.cloud.name,
            link=split.link.name,
            precision="as stored" if self._precision is None else self._precision.name,
            context=wish.context,
            edge_limit_bytes=self._limits.bytes,
            edge_bytes_with_tail=split.whole_bytes(0),
            baselines=msgspec.to_builtins(split.baselines()),
            assumed=self._assumed(),
        )

    def _interval(self, cut: Cut) -> tuple[float, float]:
        """Both sides err alike: they run the same kernels, or one fit predicts them."""
        edge, cloud, t = self._split.edge, self._split.cloud, cut.token
        head = cloud if self._wish.head == "cloud" else edge
        fixed_ms = t.link + t.besides
        return (
            fixed_ms + t.edge / edge.fast + t.cloud / cloud.fast + t.head / head.fast,
            fixed_ms + t.edge * edge.slow + t.cloud * cloud.slow + t.head * head.slow,
        )

    def _price(self, cut: Cut) -> float | None:
        price = self._wish.price
        return None if price is None else price * (self._split.outline.layers - cut.layers)

    def _better(self, most_ms: float) -> Place | None:
        """The cloud alone has no layer here, sees all texts and is paid for every layer."""
        ms: dict[Place, float] = {}
        if self._split.alone_fits():
            ms["edge"] = self._split.baselines().edge_only_ms
        if not self._wish.privacy_depth and not self._wish.price and self._wish.head == "cloud":
            ms["cloud"] = self._split.baselines().cloud_only_ms
        most_ms = min(most_ms, self._wish.max_ms or math.inf)
        return min((place for place in ms if ms[place] <= most_ms), key=ms.__getitem__, default=None)

    # Words

    def _why(self, cut: Cut, decided_by: str) -> list[str]:
        layers, price = self._split.outline.layers, self._price(cut)
        cost = f"{_layers(layers - cut.layers)} in the cloud cost {price:.4g} a token" if price is not None else ""
        reasons = [
            "all boundaries of a decoder are as wide, so a token's time is a straight line over the cut: each layer on "
            f"the edge adds {self._split.layer_gain_ms():+.3g} ms, and only limits can decide",
            self._decision(cut, decided_by),
            self._time(cut),
            f"the edge needs {_bytes(cut.memory.total)} ({_parts(cut.memory)}), and the process itself about "
            f"{_bytes(cut.memory.process)}",
            cut.coding.reason,
            cost,
            "the cloud answers with tokens, so it knows what is said; --head edge keeps that here"
            if self._wish.head == "cloud"
            else "with the head here the cloud sees hidden states alone, and both directions carry them",
            "more layers here make the text harder to guess from what is sent, not impossible: a split is no privacy",
            self._tail(cut),
        ]
        return [reason for reason in reasons if reason]

    def _decision(self, cut: Cut, decided_by: str) -> str:
        why = {
            "memory": f"another would not fit into {_bytes(self._limits.bytes or 0)}",
            "privacy": f"{self._wish.privacy_depth} are to stay here, and more are slower",
            "time": f"with another a token would take more than {self._wish.max_ms or 0:g} ms",
            "price": "the fewer the cloud runs, the less it costs",
            "speed": "no other is faster",
        }
        return f"{cut.layers} of {self._split.outline.layers} layers on the edge: {why[decided_by]}"

    def _time(self, cut: Cut) -> str:
        t, link = cut.token, self._split.link
        head = f"{t.head:.3g} the head in the {self._wish.head}"
        return (
            f"a token takes {cut.ms:.3g} ms: {t.edge:.3g} the layers of the edge, {t.link:.3g} the link {link.name}, "
            f"round trip {link.rtt_ms:g} of it, {t.cloud:.3g} the layers of the cloud, {head}"
        )

    def _tail(self, cut: Cut) -> str:
        whole, limit = self._split.whole_bytes(cut.coding.row_bytes), self._limits.bytes
        if limit is None or whole <= limit:
            return f"the other layers fit here as well, {_bytes(whole)} in all: the edge goes on when the cloud is gone"
        return (
            f"the other layers do not fit here as well, {_bytes(whole)} in all: without the cloud an answer waits, "
            "and then ends with an error"
        )

    def _why_not(self) -> list[str]:
        """The limits that no cut keeps to, and what would make one feasible."""
        last, depth = self._split.outline.layers - 1, max(1, self._wish.privacy_depth)
        if depth > last:
            return [
                f"privacy: {depth} layers are to stay here, and a cut of {last + 1} leaves at most {last}; "
                f"--privacy-depth {last} would do"
            ]
        deep = self._cuts[depth - 1 :]
        fitting = [cut for cut in deep if "memory" not in self._limits.broken_by(cut)]
        return [self._too_slow(fitting)] if fitting else self._too_large(deep[0])

    def _too_large(self, cut: Cut) -> list[str]:
        need, limit = self._limits.needed(cut), self._limits.bytes or 0
        what = "all layers, for when the cloud is gone," if self._wish.keep_tail else f"{_layers(cut.layers)} here"
        reasons = [
            f"memory: {what} need {_bytes(need)} ({_parts(cut.memory)} at cut {cut.layers}), the limit is "
            f"{_bytes(limit)}; --edge-memory {math.ceil(need / 1e6)}MB would do"
        ]
        if context := self._longest_context(cut, limit):
            reasons.append(f"--context {context} would do")
        if self._wish.keep_tail and cut.memory.total <= limit:
            reasons.append("without --keep-tail it would fit")
        if shallower := [c.layers for c in self._cuts if c.layers < cut.layers and self._limits.needed(c) <= limit]:
            reasons.append(f"at most {_layers(shallower[-1])} fit: --privacy-depth {shallower[-1]} would do")
        return reasons

    def _longest_context(self, cut: Cut, limit: int) -> int:
        """Tokens with which it would fit; 0 where not even one does."""
        head = self._wish.head == "edge"

        def need(context: int) -> int:
            return self._split.memory(cut.layers, context, cut.coding.row_bytes, head=head).total

        return 0 if self._wish.keep_tail else bisect_right(range(1, self._wish.context), limit, key=need)

    def _too_slow(self, fitting: list[Cut]) -> str:
        best, most = min(fitting, key=lambda cut: cut.ms), self._wish.max_ms or 0.0
        rtt_ms = self._split.link.rtt_ms - (best.ms - most)
        nearer = f"; a round trip of {rtt_ms:.3g} ms would do, too" if rtt_ms > 0 else ""
        return (
            f"time: the fastest cut of those allowed, {best.layers}, takes {best.ms:.4g} ms a token, "
            f"{best.token.link:.3g} of them on the link, and {most:g} are allowed; "
            f"--max-ms {math.ceil(best.ms)} would do{nearer}"
        )

    def _instead(self, better: Place | None) -> list[str]:
        baselines, reasons = self._split.baselines(), []
        if not self._split.alone_fits():
            reasons.append("the edge alone cannot hold the model")
        if better == "edge":
            reasons.append(f"no split is needed: the whole model fits here, at {baselines.edge_only_ms:.3g} ms a token")
        if better == "cloud":
            reasons.append(
                f"the cloud alone keeps to all limits, at {baselines.cloud_only_ms:.3g} ms a token with one round trip "
                f"for {ANSWER} of them"
            )
        return reasons

    def _assumed(self) -> tuple[str, ...]:
        split, wish = self._split, self._wish
        found = [*split.edge.assumed, *split.cloud.assumed]
        if self._precision is USUAL and split.outline.stored is None:
            found.append(f"the precision {USUAL.name}, as no file says another")
        if split.outline.guessed:
            found.append(f"the usual proportions of a model of {split.outline.total / 1e9:.3g}B parameters")
        if wish.context > split.outline.context:
            found.append(f"a context of {wish.context}, where the model was made for {split.outline.context}")
        if split.link.loss_enter:
            found.append("a link that loses nothing")
        return tuple(dict.fromkeys(found))


def _parts(memory: EdgeMemory) -> str:
    named = {
        "the table of tokens": memory.table,
        "layers": memory.layers,
        "head": memory.head,
        "keys and values": memory.kv,
        "log": memory.log,
        "activations": memory.activations,
    }
    return ", ".join(f"{name} {_bytes(count)}" for name, count in named.items() if count)


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= GIB / 10 else f"{count / 1e6:.3g} MB"
