"""The seams. Everything that runs a model stands behind one of these protocols.

`Row` in, logits out is a TokenModel; `engines/decode.py` makes any TokenModel a Generator. Wrappers (cascade,
split) implement the seam that they wrap.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgewise.types import Best, Chunk, FloatArray, IdArray, Message, Request, Sampling

ALL_SAMPLING = frozenset(field.name for field in fields(Sampling)) - {"temperature", "top_p", "seed"}


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one session: `ids` int64 [n], n >= 1, standing at `position`, `position + 1`, … (absolute).
    `want` is how many of the last positions need logits, 0..n (0 while a prompt is filled in chunks). `best` > 0 says
    that their so many most probable tokens are all that is needed of them: a model whose logits are elsewhere may give
    `Best` instead."""

    session: str
    position: int
    ids: IdArray
    want: int = 1
    best: int = 0

    @property
    def values(self) -> IdArray:
        """What stands at its positions."""
        return self.ids


@dataclass(frozen=True, slots=True)
class StageRow:
    """Hidden states of one session: `hidden` float32 [n, hidden], n >= 1, standing at `position`, `position + 1`, …
    (absolute). `want` is how many of the last positions are to come out, 0..n."""

    session: str
    position: int
    hidden: FloatArray
    want: int

    @property
    def values(self) -> FloatArray:
        """What stands at its positions."""
        return self.hidden


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a Generator can do: a value to read, never a `hasattr`."""

    logprobs: bool = False
    top_logprobs: int = 0  # most alternatives per token
    seed: bool = False
    sampling: frozenset[str] = frozenset()  # the fields of Sampling that it honours besides temperature, top_p and seed
    prompt_ids: bool = False  # takes exact token ids
    continuation: bool = False  # can go on from a given start of the answer
    context: int | None = None  # tokens, prompt and answer together
    vocab: int | None = None  # token ids are below it


EVERYTHING = Capabilities(logprobs=True, top_logprobs=20, seed=True, sampling=ALL_SAMPLING, prompt_ids=True)


class TokenModel(Protocol):
    """Token ids to logits; owns its KV. Not reentrant: one caller (the scheduler of decode.py) awaits each call.
    A local model blocks inside the call, so it is called from a step thread and never from a server's loop."""

    name: str
    vocab: int
    context: int  # most positions of a session
    slots: int  # most sessions open at once

    async def open(self, session: str, limit: int) -> None:
        """Reserve room for `limit` positions. ContextFull if limit > context, Overloaded if no slot is free,
        ValueError if the session is open already."""
        ...

    async def forward(self, rows: Sequence[Row]) -> Sequence[FloatArray | Best]:
        """Append each row to its session; logits float32 [want, vocab] per row, in order, valid until the next forward,
        or `Best` where a row allows it.

        A row below the session's length rewinds to its position first (repeating a row is idempotent); one above it
        raises GapError; one beyond the limit raises ContextFull. KeyError for a session that is not open. No row has
        been applied if an error is raised. At most one row per session."""
        ...

    async def rewind(self, session: str, position: int) -> None:
        """Forget all positions >= position. GapError if the session is shorter."""
        ...

    async def close(self, session: str) -> None:
        """Free the session's slot; unknown sessions are ignored."""
        ...

    async def shutdown(self) -> None:
        """Free everything. Idempotent."""
        ...


class Stage(Protocol):
    """Hidden states through decoder layers; owns their KV. As with TokenModel one caller awaits each call, and errors
    are the same. A session has a range of the stage's layers, so that where a model is cut is the session's affair."""

    name: str
    layers: range  # those that it holds
    hidden: int  # numbers of a position
    context: int
    slots: int

    async def open(self, session: str, limit: int, layers: range) -> None:
        """As TokenModel's; UsageError if these layers are not here, or cannot be cut there."""
        ...

    async def forward(self, rows: Sequence[StageRow]) -> list[FloatArray]:
        """Append each row to its session; what the last layer gives, float32 [want, hidden] per row, in order. A row
        below the session's length rewinds to its position first, one above it raises GapError with the length."""
        ...

    async def rewind(self, session: str, position: int) -> None: ...

    async def close(self, session: str) -> None: ...

    async def shutdown(self) -> None: ...


class Generator(Protocol):
    """A request in, chunks out. Safe for many concurrent calls on one event loop; whoever built it closes it.

    Errors are raised from the iterator: RequestError (and ContextFull) before the first chunk, EngineError and
    RemoteError at any time. Closing the iterator (`aclose`, or cancelling the task that reads it) stops the work.
    """

    name: str
    can: Capabilities

    def generate(self, request: Request) -> AsyncIterator[Chunk]: ...

    async def close(self) -> None:
        """Stop all work and free the model. Idempotent."""
        ...


class Predictor(Protocol):
    """Tensors in, tensors out (`logits` float32 [batch, classes] among them): classifiers and vision networks."""

    name: str

    async def predict(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> Mapping[str, npt.NDArray[np.generic]]: ...

    async def close(self) -> None: ...


class Tokenizer(Protocol):
    """What decode.py needs of a tokenizer; models/tokenizer.py is the real one."""

    stop_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def chat(self, messages: Sequence[Message]) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...
