"""What each cut of a decoder between an edge and a cloud takes: memory on the edge, bytes, time; and the limits on it.

Every boundary of a decoder is as wide as any other, so a token's time is a straight line over the cut:

    cut · edge layer + codec + bytes / bandwidth + round trip + (layers - cut) · cloud layer + head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from edgewise.devices.links import LinkProfile
from edgewise.errors import UsageError
from edgewise.models.outline import Outline
from edgewise.plan.codec_table import Chosen, CodecTable
from edgewise.plan.precision import Precision
from edgewise.plan.sides import Side
from edgewise.plan.speed import weights
from edgewise.wire.frame import HEADER, TOKEN

CONTEXT: Final = 2048
PROMPT: Final = 512
ANSWER: Final = 128  # tokens over which the cloud alone spreads its one round trip
MAX_RISE: Final = 0.01
ID_BYTES: Final = 4  # of a token, in the prompt of the cloud alone and in the log
FRAME_BYTES: Final = HEADER.size + 8  # and the WebSocket's own
ROUND_MS: Final = 0.5  # of a token besides computing and the link: codec, frames and sockets of both sides
SAME: Final = 1e-6  # relative: times that are closer are one

Head = Literal["cloud", "edge"]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a split must keep to; None is no limit. `edge_memory_bytes` is for the model, the process around it not
    counted; `price` is of a layer for a token in the cloud, in any currency; `max_rise` is a share of the perplexity.
    `keep_tail`: what the cloud runs must fit here too, for when it is gone."""

    edge_memory_bytes: int | None = None
    privacy_depth: int = 0
    max_ms: float | None = None
    price: float | None = None
    max_rise: float = MAX_RISE
    head: Head = "cloud"
    keep_tail: bool = False
    context: int = CONTEXT
    prompt: int = PROMPT

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("--edge-memory", self.edge_memory_bytes, 1, 1 << 50),
            ("--privacy-depth", self.privacy_depth, 0, 4096),
            ("--max-ms", self.max_ms, 1e-6, 1e9),
            ("--price", self.price, 0, 1e9),
            ("--max-rise", self.max_rise, 0, 1e3),
            ("--context", self.context, 1, 1 << 24),
            ("--prompt", self.prompt, 1, 1 << 24),
        ):
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value:g}; {least:g} to {most:g} are allowed")


class EdgeMemory(msgspec.Struct, frozen=True):
    """Bytes that the model takes on the edge: the table of tokens, layers, head, keys and values, the log of what was
    sent, activations of a chunk of a prompt. `process` comes on top and is no part of `total`."""

    table: int
    layers: int
    head: int
    kv: int
    log: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return self.table + self.layers + self.head + self.kv + self.log + self.activations


class TokenTime(msgspec.Struct, frozen=True):
    """Milliseconds. `link` is bytes and round trip, `head` is computed where the wish says."""

    edge: float
    link: float
    cloud: float
    head: float
    besides: float = ROUND_MS

    @property
    def total(self) -> float:
        return self.edge + self.link + self.cloud + self.head + self.besides


@dataclass(frozen=True, slots=True)
class Cut:
    """`layers` of them here, with all that follows from it. `first_ms` is of the first token behind a prompt."""

    layers: int
    coding: Chosen
    memory: EdgeMemory
    token: TokenTime
    first_ms: float

    @property
    def ms(self) -> float:
        return self.token.total


class Baselines(msgspec.Struct, frozen=True):
    """Milliseconds of a token and of the first one, whether or not that side alone keeps to the limits. The cloud alone
    is sent token ids and streams its answer: one round trip for `ANSWER` tokens."""

    edge_only_ms: float
    cloud_only_ms: float
    edge_only_first_token_ms: float
    cloud_only_first_token_ms: float


class Split:
    """The arithmetic of one model on two sides over one link. UsageError for a model that cannot be cut."""

    def __init__(
        self,
        outline: Outline,
        edge: Side,
        cloud: Side,
        link: LinkProfile,
        codecs: CodecTable,
        wish: Wish,
        *,
        precision: Precision | None = None,
        weights_hash: str | None = None,
    ) -> None:
        if outline.layers < 2:
            raise UsageError(f"{outline.name} has one layer, which cannot be cut")
        if outline.kv_shared_layers:
            raise UsageError(
                f"the last {outline.kv_shared_layers} layers of {outline.name} use keys and values of layers before "
                "them, which would have to cross as well",
                hint="take a model whose layers keep their own",
            )
        self.outline, self.edge, self.cloud, self.link, self.wish = outline, edge, cloud, link, wish
        self._codecs, self._hash = codecs, weights_hash
        self._stored = weights(outline, precision, edge.ways)

    @property
    def limit_bytes(self) -> int | None:
        """What the model may take on the edge: as wished, else what the device leaves beside the process."""
        if self.wish.edge_memory_bytes is not None:
            return self.wish.edge_memory_bytes
        room = self.edge.room.available
        return None if room is None else max(0, room - self.edge.process_bytes)

    def cuts(self) -> list[Cut]:
        return [self.cut(layers) for layers in range(1, self.outline.layers)]

    def cut(self, layers: int) -> Cut:
        coding = self._codecs.cheapest(self.outline, layers, self.wish.max_rise, self._hash)
        memory = self.memory(layers, self.wish.context, coding.row_bytes, head=self.wish.head == "edge")
        return Cut(layers, coding, memory, self._token(layers, coding), self._first_ms(layers, coding))

    def memory(self, layers: int, context: int, row_bytes: int, *, head: bool) -> EdgeMemory:
        """Of an edge with so many layers, with or without the head. Layers count as equally large."""
        o, stored = self.outline, self._stored
        table = (stored.head if o.tied else stored.embedding) + stored.looked_up
        seen = sum(o.seen(max(context, self.edge.ways.static_cache))[:layers])
        return EdgeMemory(
            table=table,
            layers=round(stored.body * layers / o.layers),
            head=stored.head if head and not o.tied else 0,
            kv=round(2 * o.kv_heads * o.head_dim * seen * self.edge.ways.kv_bits / 8),
            log=context * (row_bytes + ID_BYTES),
            activations=self.edge.activation_bytes - (0 if head else 4 * o.vocab),
            process=self.edge.process_bytes,
        )

    def whole_bytes(self, row_bytes: int) -> int:
        """Of an edge that holds what the cloud runs too."""
        return self.memory(self.outline.layers, self.wish.context, row_bytes, head=True).total

    def alone_fits(self) -> bool:
        """Whether the edge needs no cloud."""
        return self.limit_bytes is None or self.whole_bytes(0) <= self.limit_bytes

    def down_bytes(self, row_bytes: int) -> int:
        """Of a token: itself and its log-probability, or the hidden state that the head here makes it of."""
        return TOKEN.itemsize if self.wish.head == "cloud" else row_bytes

    def baselines(self) -> Baselines:
        layers, prompt = self.outline.layers, self.wish.prompt
        edge, cloud = self.edge, self.cloud
        streamed_ms = max(layers * cloud.layer_ms + cloud.head_ms, self._down_ms(TOKEN.itemsize))
        asked_ms = self.link.rtt_ms + self._up_ms(prompt * ID_BYTES)
        return Baselines(
            edge_only_ms=layers * edge.layer_ms + edge.head_ms,
            cloud_only_ms=streamed_ms + self.link.rtt_ms / ANSWER,
            edge_only_first_token_ms=prompt * layers * edge.prompt_layer_ms + edge.head_ms,
            cloud_only_first_token_ms=asked_ms + prompt * layers * cloud.prompt_layer_ms + cloud.head_ms,
        )

    def layer_gain_ms(self) -> float:
        """What one more layer on the edge adds to a token; below 0 it takes away."""
        return self.edge.layer_ms - self.cloud.layer_ms

    def _token(self, layers: int, coding: Chosen) -> TokenTime:
        head = self.cloud if self.wish.head == "cloud" else self.edge
        carried_ms = self._up_ms(coding.row_bytes) + self._down_ms(self.down_bytes(coding.row_bytes))
        return TokenTime(
            edge=layers * self.edge.layer_ms,
            link=carried_ms + self.link.rtt_ms,
            cloud=(self.outline.layers - layers) * self.cloud.layer_ms,
            head=head.head_ms,
        )

    def _first_ms(self, layers: int, coding: Chosen) -> float:
        """The prompt's rows go up, one answer comes down; sides take turns."""
        prompt, head = self.wish.prompt, self.cloud if self.wish.head == "cloud" else self.edge
        here_ms, there_ms = (
            layers * self.edge.prompt_layer_ms,
            (self.outline.layers - layers) * self.cloud.prompt_layer_ms,
        )
        carried_ms = self._up_ms(prompt * coding.row_bytes) + self._down_ms(self.down_bytes(coding.row_bytes))
        return prompt * (here_ms + there_ms) + carried_ms + self.link.rtt_ms + head.head_ms + ROUND_MS

    def _up_ms(self, payload: int) -> float:
        return 1e3 * (payload + FRAME_BYTES) / self.link.up_bytes_per_s

    def _down_ms(self, payload: int) -> float:
        return 1e3 * (payload + FRAME_BYTES) / self.link.down_bytes_per_s


class Limits:
    """Which cuts keep to a wish. A limit's name is what tells users that it decided."""

    def __init__(self, split: Split) -> None:
        self._split, self._wish = split, split.wish
        self.bytes = split.limit_bytes

    def broken_by(self, cut: Cut) -> list[str]:
        """The names of the limits that a cut does not keep to."""
        checks = {
            "memory": self.bytes is not None and self.needed(cut) > self.bytes,
            "privacy": cut.layers < self._wish.privacy_depth,
            "time": self._wish.max_ms is not None and cut.ms > self._wish.max_ms,
        }
        return [name for name, broken in checks.items() if broken]

    def needed(self, cut: Cut) -> int:
        """Bytes on the edge, with what the cloud runs if that must fit too."""
        return self._split.whole_bytes(cut.coding.row_bytes) if self._wish.keep_tail else cut.memory.total

    def chosen(self, cuts: Sequence[Cut]) -> tuple[Cut, str] | None:
        """The cut and what decided it. Where the model does not fit here or the cloud has a price, as many layers here
        as the limits allow; else the fastest. None if every cut breaks a limit."""
        allowed = [cut for cut in cuts if not self.broken_by(cut)]
        if not allowed:
            return None
        slower_here = self._split.layer_gain_ms() > SAME * self._split.edge.layer_ms
        deep = bool(self._wish.price) or not self._split.alone_fits() or not slower_here
        best = max(allowed, key=lambda cut: cut.layers) if deep else min(allowed, key=lambda cut: cut.ms)
        beyond = best.layers + (1 if deep else -1)
        stopped = [name for cut in cuts if cut.layers == beyond for name in self.broken_by(cut)]
        return best, stopped[0] if stopped else "price" if self._wish.price else "speed"
