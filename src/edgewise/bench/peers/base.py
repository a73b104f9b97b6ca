"""What a contestant of `bench engines` has to be. One file per library beside this one; the library is imported there
and only in the process of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgewise.types import FloatArray


@dataclass(frozen=True, slots=True)
class Source:
    """The model that all contestants run: a .gguf file or a Hugging Face directory, and our own bundle of it."""

    path: Path
    bundle: Path


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine has for its requests: threads, requests at once, and tokens of context for each of them."""

    threads: int
    streams: int
    context: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream's tokens: how many came, and when the first and the last did, seconds after the call of `generate`."""

    tokens: int
    first_s: float
    last_s: float


class Engine(Protocol):
    """A loaded model. The process ends after its turn, so nothing is closed."""

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        """Greedy answers of `new` tokens to prompts of equal length, at once; the end of a sequence is ignored and no
        earlier prompt's KV is used. Without streaming to the caller where the engine tells the times itself."""
        ...

    def greedy(self, prompt: Sequence[int], new: int) -> list[int] | None:
        """The ids of a greedy answer; None if the engine does not tell them."""
        ...

    def logits(self, ids: Sequence[int]) -> FloatArray | None:
        """Teacher-forced, one token at a time as in decoding: float32 [len(ids), vocab], up to a constant per row. NaN
        for tokens that the engine does not tell of; the others of such a row are log-probabilities. None if the engine
        shows no distribution."""
        ...


class Peer(Protocol):
    """A module of this package."""

    def prepare(self, source: Source, work: Path, variant: str) -> Path:
        """Bring the model into the engine's own form, in `work` (kept between runs, outside every timing); returns what
        `load` takes. UnsupportedModel if the engine cannot have it."""
        ...

    def load(self, model: Path, room: Room, variant: str) -> Engine: ...


@dataclass(frozen=True, slots=True)
class Contestant:
    """A line of the report: a module of this package, in one of its variants."""

    name: str
    module: str
    library: str  # the distribution whose version stands in the report
    variant: str = ""
    install: str = ""  # what `pip install` needs for it

    @property
    def ours(self) -> bool:
        return self.library == "edgewise"


FAST, STABLE = "edgewise fast", "edgewise stable"
OURS = (
    Contestant(FAST, "ours", "edgewise", "fast"),
    Contestant(STABLE, "ours", "edgewise", "stable"),
    Contestant("edgewise on onnxruntime", "ours", "edgewise", "onnxruntime"),
)
OUR_NAMES = frozenset(contestant.name for contestant in OURS)
REFERENCE = Contestant("reference", "ours", "edgewise", "onnxruntime")  # of a bundle with float32 activations

_GENAI = "onnxruntime-genai onnx-ir torch transformers gguf accelerate"  # all but the first for its model builder
PEERS: dict[str, tuple[Contestant, ...]] = {
    "llamacpp": (
        Contestant("llamacpp", "llamacpp", "xllamacpp", "as-is", "xllamacpp"),
        Contestant("llamacpp plain attention", "llamacpp", "xllamacpp", "plain", "xllamacpp"),
        Contestant("llamacpp int8", "llamacpp", "xllamacpp", "int8", "xllamacpp gguf"),
    ),
    "ort-genai": (
        Contestant("ort-genai int8", "ort_genai", "onnxruntime-genai", "int8", _GENAI),
        Contestant("ort-genai int4", "ort_genai", "onnxruntime-genai", "int4", _GENAI),
    ),
    "openvino": (
        Contestant("openvino int8", "openvino", "openvino-genai", "int8", "openvino-genai gguf"),
        Contestant("openvino", "openvino", "openvino-genai", "as-is", "openvino-genai gguf"),
    ),
    "litert-lm": (Contestant("litert-lm", "litert_lm", "litert-lm-api", install="litert-lm-api"),),
}
