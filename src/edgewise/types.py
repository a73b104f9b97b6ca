"""The frozen values that travel between rooms. A type that one room alone uses lives in that room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Route = Literal["edge", "cloud", "edge_fallback"]
Wish = Literal["auto", "edge", "cloud"]
FinishReason = Literal["stop", "length"]

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the defaults change nothing. Temperature 0 is greedy. `top_k` keeps that many of
    the most probable tokens (0: all), `top_p` the smallest set whose probability reaches it, `min_p` those that have at
    least this share of the best one's probability. `presence_penalty` and `frequency_penalty` are taken off the logits
    of tokens generated so far, once and once for each time; `repetition_penalty` divides the positive and multiplies
    the negative logits of all tokens seen, the prompt's included. `logit_bias` holds (token id, number added to its
    logit). The same seed on the same engine gives the same text. engines/sampling.py has the order of the steps."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


RANGES: Final[Mapping[str, tuple[float, float]]] = {  # of Sampling's, but top_p; both ends are allowed
    "temperature": (0.0, 2.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-100.0, 100.0),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One wish for text. One of `messages`, `prompt` (a text to go on from, no template) and `prompt_ids` (exact token
    ids, no template) is given."""

    messages: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0  # alternatives per token, 0..20
    stream: bool = False  # the caller shows text as it comes, so a cascade must decide early
    route: Wish = "auto"
    deadline_ms: float | None = None  # counted from the call of generate()
    ignore_eos: bool = False  # benchmarks need an exact number of tokens
    group: str | None = None  # what kind of request it is, to a policy that knows kinds
    stay: str | None = None  # the privacy rule by which it must not leave this device
    hops: int = 0  # nodes that it came through; tiers that ask each other in a circle are found by it

    @property
    def prompt_field(self) -> Literal["messages", "prompt", "prompt_ids"]:
        """In which of the three the prompt stands."""
        if self.prompt_ids is not None:
            return "prompt_ids"
        return "messages" if self.prompt is None else "prompt"

    @property
    def asked(self) -> str | None:
        """What the user said last, or the text to go on from; None for token ids."""
        if self.prompt_field == "messages":
            return next((message.content for message in reversed(self.messages) if message.role == "user"), None)
        return self.prompt


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have stood at a position; `raw` may be a part of a UTF-8 character."""

    id: int
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `logprob` is the natural log of its probability under the model's own softmax, before all
    that Sampling does to it, None where the engine cannot say."""

    id: int
    raw: bytes
    logprob: float | None
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Best:
    """The most probable tokens of n positions, best first: `ids` int64 [n, k] and natural log-probabilities under the
    model's own softmax, float32 [n, k]. All that is known of logits which are elsewhere."""

    ids: IdArray
    logprobs: FloatArray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted; `cached_tokens` of the prompt were reused from an earlier request's KV."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went. A cascade counts from the request's arrival, waiting for the other tier included; only the
    first token of a whole answer is when the tier that answered had it."""

    first_token_ms: float
    total_ms: float
    decode_tok_s: float | None  # None where no time passed between two tokens that could be measured


@dataclass(frozen=True, slots=True)
class Decision:
    """Which tier answered, how sure the edge was (0..1, None if unknown) and why."""

    route: Route
    confidence: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `text` is always whole characters; texts of all chunks make the answer.
    `tokens` are those that became final since the last chunk (with a stop string they may outrun the text).
    `finish_reason`, `usage` and `timings` stand on the last chunk and nowhere else. `decision` stands on the first
    and on the last chunk of a cascade."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    decision: Decision | None = None
    model: str | None = None
