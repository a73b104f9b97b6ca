"""What planning needs to know of a decoder: sizes, and where its bytes are. It covers more than a Card, which holds
what our own runtime can run: mixtures of experts, tables that are only looked up, models of which only the size is
known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgewise.errors import SourceError

if TYPE_CHECKING:
    from edgewise.models.card import Card

SIZE_LIMIT: Final = 1 << 40  # of any count: far beyond every model, and sums of products stay exact
LAYERS_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a model's weights as a file or a bundle holds them."""

    body: int
    head: int
    embedding: int  # the table that tokens are looked up in; 0 where the head is that table
    looked_up: int = 0

    @property
    def total(self) -> int:
        return self.body + self.head + self.embedding + self.looked_up


@dataclass(frozen=True, slots=True)
class Outline:
    """A decoder-only transformer by its sizes. With experts, `ffn` is one expert's.

    A layer is attention (queries, keys, values, output) and a gated feed-forward of three matrices; `extra` corrects
    where a family has more or less than that. Norms and biases are left out: they are a thousandth.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tied: bool
    experts: int = 0
    experts_used: int = 0  # by one token
    shared_ffn: int = 0  # width of a feed-forward that every token passes beside its experts
    dense_layers: int = 0  # layers with a plain feed-forward of `dense_ffn` instead of experts
    dense_ffn: int = 0
    windows: tuple[int, ...] = ()  # per layer, positions it sees; 0 = all. Empty: all layers all
    kv_shared_layers: int = 0  # layers that read another layer's keys and values
    looked_up: int = 0  # parameters of tables of which a token reads a few rows (per-layer embeddings)
    extra: int = 0  # parameters of the layers beyond that pattern (below 0: short of it), passed by every token
    stored: Stored | None = None  # None: only sizes are known
    guessed: bool = False  # made from a number of parameters alone

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.vocab, self.context)
        if min(sizes) < 1 or max(sizes) > SIZE_LIMIT or self.layers > LAYERS_LIMIT:
            raise SourceError(f"{self.name} has the sizes {sizes}, which make no model", hint="sizes are above 0")
        if not 0 <= self.experts_used <= self.experts or self.ffn < 0:
            raise SourceError(f"{self.name} uses {self.experts_used} of {self.experts} experts of width {self.ffn}")
        if self.windows and len(self.windows) != self.layers:
            raise SourceError(f"{self.name} has windows for {len(self.windows)} of {self.layers} layers")
        if not (0 <= self.kv_shared_layers < self.layers and 0 <= self.dense_layers <= self.layers):
            raise SourceError(f"{self.name} has {self.kv_shared_layers} shared and {self.dense_layers} dense layers")
        if self.body <= 0:
            raise SourceError(f"{self.name} has {self.body} parameters in its layers")

    @property
    def attention(self) -> int:
        """Parameters of the attention of all layers; one that reads another's keys and values has none for its own."""
        own = self.layers - self.kv_shared_layers
        return 2 * self.hidden * self.head_dim * (self.layers * self.heads + own * self.kv_heads)

    @property
    def body(self) -> int:
        """Parameters of all layers, every expert included."""
        return self._body(self.experts)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the table that tokens are looked up in; 0 where the head is that table."""
        return 0 if self.tied else self.head

    @property
    def total(self) -> int:
        return self.body + self.head + self.embedding + self.looked_up

    @property
    def active_body(self) -> int:
        """Parameters of the layers that one token passes."""
        return self._body(self.experts_used)

    @property
    def active(self) -> int:
        """Parameters that one token multiplies with: its share of the layers, and the head."""
        return self.active_body + self.head

    def _body(self, experts: int) -> int:
        mixed = self.layers - self.dense_layers
        width = mixed * (self.ffn * experts + self.shared_ffn) if self.experts else mixed * self.ffn
        router = mixed * self.experts * self.hidden
        return self.attention + 3 * self.hidden * (width + self.dense_layers * self.dense_ffn) + router + self.extra

    def seen(self, length: int) -> list[int]:
        """How many positions each layer sees at that length of the context."""
        windows = self.windows or (0,) * self.layers
        return [min(window, length) if window else length for window in windows]

    def kv_values(self, length: int) -> int:
        """Numbers that keys and values of a context of that length are, as they are kept."""
        own = self.seen(length)[: self.layers - self.kv_shared_layers]
        return 2 * self.kv_heads * self.head_dim * sum(own)

    def kv_values_read(self, length: int) -> int:
        """Numbers of keys and values that computing one token reads: a shared layer reads what another keeps."""
        return 2 * self.kv_heads * self.head_dim * sum(self.seen(length))

    def macs_per_token(self, length: int) -> int:
        """Multiply-adds of one token after `length` others: all matrices, and attention over what it sees."""
        return self.active + 2 * self.heads * self.head_dim * sum(self.seen(length))


def of_card(card: Card, stored: Stored | None = None, name: str = "") -> Outline:
    return Outline(
        name=name or card.family,
        layers=card.layers,
        hidden=card.hidden,
        heads=card.heads,
        kv_heads=card.kv_heads,
        head_dim=card.head_dim,
        ffn=card.ffn,
        vocab=card.vocab,
        context=card.context,
        tied=card.tied,
        windows=card.windows,
        stored=stored,
    )
