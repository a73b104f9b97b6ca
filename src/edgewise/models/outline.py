"""What planning needs to know of a decoder: sizes, and where its bytes are. It covers more than a Card, which holds
what our own runtime can run: mixtures of experts, tables that are only looked up, models of which only the size is
known.

`outline` takes whatever a user names: a bundle, a .gguf, a Hugging Face directory or config.json, or words such as
"Llama-3.2-1B" and "7B llama-like".
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgewise.errors import SourceError, UsageError

if TYPE_CHECKING:
    from edgewise.models.card import Card

KNOWN: Final = Path(__file__).parent / "known.toml"
SIZE_LIMIT: Final = 1 << 40  # of any count: far beyond every model, and sums of products stay exact
LAYERS_LIMIT: Final = 4096
GUESSED_SIZES: Final = (0.1, 0.25, 0.5, 1, 1.5, 3, 7, 13, 34, 70, 120, 250, 500)  # 10⁹ parameters


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

    def kv_values_per_position(self, length: int) -> float:
        """The same for one position of that context; windows make it less the longer the context is."""
        return self.kv_values(length) / length

    def kv_values_read(self, length: int) -> int:
        """Numbers of keys and values that computing one token reads: a shared layer reads what another keeps."""
        return 2 * self.kv_heads * self.head_dim * sum(self.seen(length))

    def macs_per_token(self, length: int) -> int:
        """Multiply-adds of one token after `length` others: all matrices, and attention over what it sees."""
        return self.active + 2 * self.heads * self.head_dim * sum(self.seen(length))


def outline(source: str, home: Path | None = None) -> Outline:
    """The outline of what the user names: a bundle (its directory, or its name under `home`), a .gguf file, a Hugging
    Face directory or config.json, else words. SourceError or UsageError."""
    path = Path(source)
    if home is not None and path.name == source and (home / "bundles" / source).is_dir():
        path = home / "bundles" / source
    if path.suffix.lower() in {".gguf", ".json"} or path.is_dir():
        from edgewise.models.outline_files import of_path  # its readers take longer to import than a plan to make

        return of_path(path)
    return of_words(source)


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


def of_words(words: str) -> Outline:
    """A public model by its name, else a shape of the usual proportions for the number of parameters that the words
    hold ("7B llama-like", "360m"). UsageError if they hold neither."""
    plain = _words(words)
    found = [name for name in known() if _holds(plain, name)]
    if found:
        return known()[max(found, key=len)]
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])\b", words.lower())
    if not sizes:
        raise UsageError(
            f"{words!r} is no file, no known model, and names no size",
            hint="give a bundle, a .gguf, a Hugging Face directory, a public name, or a size such as 3B",
        )
    number, unit = sizes[-1]
    return of_size(words, float(number) * {"m": 1e6, "b": 1e9}[unit])


def of_size(name: str, parameters: float) -> Outline:
    """The usual proportions of a model with so many parameters; only `guessed`."""
    if not 1e6 <= parameters <= 1e13:
        raise UsageError(f"{name!r} names {parameters:g} parameters; 1M to 10000B are allowed")
    billions = parameters / 1e9
    layers = max(28, round(32 * (billions / 7) ** 0.4))  # below 5B models are as deep as there, only narrower
    head_dim = 64 if billions < 2 else 128
    heads = max(2, round(math.sqrt(parameters / 12 / layers) / head_dim))
    hidden = heads * head_dim
    kv_heads = max(1, heads // 4)
    tied = billions < 4  # small models share the table: it would be most of them
    vocab = min(128_000, int(parameters / (4 if tied else 8) / hidden))
    body = parameters - vocab * hidden * (1 if tied else 2)
    attention = 2 * hidden * head_dim * layers * (heads + kv_heads)
    ffn = max(hidden, round((body - attention) / (3 * hidden * layers)))
    return Outline(name, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, context=8192, tied=tied, guessed=True)


def family(outline: Outline) -> list[Outline]:
    """The public models whose names begin alike ("Qwen2.5-7B": all of Qwen2), smallest first; of a shape that is only
    guessed, such shapes of other sizes."""
    if outline.guessed:
        return [of_size(f"{billions:g}B", billions * 1e9) for billions in GUESSED_SIZES]
    begin = _words(outline.name)[:2]
    found = {one.name: one for words, one in known().items() if words[:2] == begin}
    return sorted(found.values(), key=lambda one: one.total)


@cache
def known() -> Mapping[tuple[str, ...], Outline]:
    """The public models by the words of their names and aliases."""
    found: dict[tuple[str, ...], Outline] = {}
    for name, line in tomllib.loads(KNOWN.read_text(encoding="utf-8"))["models"].items():
        outline = _known(name, line)
        found |= dict.fromkeys(map(_words, (name, *line.get("aliases", ()))), outline)
    return found


def _known(name: str, line: Mapping[str, Any]) -> Outline:
    beside = {"params", "aliases", "window", "full_every"}
    sizes = {key: value for key, value in line.items() if key not in beside}
    windows: tuple[int, ...] = ()
    if "window" in line:
        windows = tuple(line["window"] if (layer + 1) % line["full_every"] else 0 for layer in range(line["layers"]))
    return Outline(name=name, windows=windows, **sizes)


_NOISE: Final = {"meta", "ibm", "instruct", "it", "chat", "base", "hf", "gguf", "v"}


def _words(name: str) -> tuple[str, ...]:
    """What tells one name from another: words and numbers, without an owner and the words that all names share."""
    last = re.sub(r"\(.*?\)", " ", name).split("/")[-1].lower()
    parts = re.findall(r"[a-z]+|\d+[a-z]*", last)
    return tuple(part for part in parts if part not in _NOISE)


def _holds(words: Sequence[str], name: Sequence[str]) -> bool:
    """Whether the name stands in those words, as one run."""
    return any(tuple(words[n : n + len(name)]) == tuple(name) for n in range(len(words) - len(name) + 1))
