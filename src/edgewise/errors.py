"""Every way Edgewise says no.

    EdgewiseError
    ├── UsageError              the call itself is wrong: flags, settings, arguments
    │   └── ConfigError         a key of edgewise.toml or an environment variable
    ├── RequestError            one request cannot be served as written
    │   ├── UnsupportedField    a field or a value of one that is not served
    │   ├── Forbidden           a privacy rule keeps it on this device, and it asks for the cloud
    │   ├── ContextFull         prompt + answer exceed the model's context
    │   └── UnknownModel        no bundle, engine or route has that name
    ├── ModelError              a model cannot be used
    │   ├── SourceError         the file is not a model, or is damaged
    │   ├── UnsupportedModel    a real model that our block writer cannot carry (yet)
    │   ├── LicenceError        terms must be accepted first
    │   └── BundleError         a bundle is incomplete or not of our format
    │       └── HashMismatch    a file's bytes are not the ones in the manifest
    ├── OverBudget              nothing that was allowed is small enough
    ├── MissingExtra            an optional library is not installed
    ├── MissingEnvironment      what a target or a source needs is not installed, or cannot be here
    ├── ExportError             a converter failed in a way of its own, or took too much
    ├── StorageError            a file could not be written: the disk is full, or closed to us
    ├── EngineError             a running engine could not do the work
    │   ├── GapError            a row starts beyond the end of its session's KV
    │   ├── Overloaded          every slot and the queue are taken
    │   ├── EngineClosed        close() was called
    │   ├── CodecOverflow       a boundary holds a number that its codec cannot carry
    │   └── DeadlineExceeded    the request's time is up
    ├── TrainingError           a training run cannot go on; its last checkpoint stays
    │   ├── Diverged            the loss is no number any more
    │   └── CheckpointError     a checkpoint cannot be written or read
    └── RemoteError             another tier did not deliver
        ├── Unreachable         no connection, or it broke
        ├── RemoteTimeout       connected, but silent for too long
        ├── RemoteRefused       it said no: credentials, quota, a bad request
        ├── RemoteBroken        it answered, but with 5xx or with nonsense
        │   └── BadFrame        bytes that break the rules of a frame
        └── TailLost            a split model's worker is gone, and its layers are not here

A message says what happened, the value seen, what is allowed and what to do (`hint`).
`retryable` says whether the same call may succeed later without any change.
"""

from __future__ import annotations


class EdgewiseError(Exception):
    """Base of all errors that Edgewise raises on purpose."""

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(EdgewiseError):
    """The call itself is wrong."""


class ConfigError(UsageError):
    """A setting has an unknown name or a bad value."""


class RequestError(EdgewiseError):
    """One request cannot be served as written; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class UnsupportedField(RequestError):
    """A field, or a value of one, that would have to be ignored: it is refused instead."""


class Forbidden(RequestError):
    """The request asks for the cloud, and the privacy rule `rule` forbids that it leaves this device."""

    def __init__(self, rule: str) -> None:
        super().__init__(
            f"the privacy rule {rule!r} keeps this request on the device, and it asks for the cloud",
            param="route",
            hint="ask for the route edge or auto",
        )
        self.rule = rule


class ContextFull(RequestError):
    """Prompt and answer do not fit the context; carries the limit and the need, in tokens."""

    def __init__(self, needed: int, limit: int, *, param: str | None = None) -> None:
        super().__init__(
            f"the request needs {needed} tokens of context, the model has {limit}",
            param=param,
            hint="shorten the prompt or choose a model with a longer context",
        )
        self.needed = needed
        self.limit = limit


class UnknownModel(RequestError):
    """No bundle, engine or route has that name."""


class ModelError(EdgewiseError):
    """A model cannot be used."""


class SourceError(ModelError):
    """The file is not a model, or is damaged."""


class UnsupportedModel(ModelError):
    """A model that the block writer cannot carry; the hint names the engine that can."""


class LicenceError(ModelError):
    """The model's terms must be accepted first."""


class BundleError(ModelError):
    """A bundle is incomplete or not of a format that this version reads."""


class HashMismatch(BundleError):
    """A file's bytes are not the ones that the manifest promises."""


class OverBudget(EdgewiseError):
    """Nothing that was allowed is small enough: the answer is no."""


class MissingExtra(EdgewiseError):
    """An optional library is not installed; the hint is its `pip install` line."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"this needs {library}, which is not installed",
            hint=f"pip install 'edgewise[{extra}]'",
        )
        self.extra = extra


class MissingEnvironment(EdgewiseError):
    """No Python here has what a target or a source needs, or none can; the hint says how one is made."""


class ExportError(EdgewiseError):
    """A converter, or the runtime that proves its artifact, failed in a way of its own, or took too much."""


class StorageError(EdgewiseError):
    """A file could not be written; what was there before is as it was."""


class EngineError(EdgewiseError):
    """A running engine could not do the work."""


class GapError(EngineError):
    """A row starts beyond the end of its session's KV."""

    def __init__(self, session: str, position: int, length: int) -> None:
        super().__init__(
            f"session {session!r} holds {length} positions, the row starts at {position}",
            hint=f"send the rows from position {length} on first",
        )
        self.position = position
        self.length = length


class Overloaded(EngineError):
    """Every slot and the whole queue are taken."""

    retryable = True


class EngineClosed(EngineError):
    """The engine was closed."""


class CodecOverflow(EngineError):
    """A boundary holds a number that its codec cannot carry."""


class DeadlineExceeded(EngineError):
    """The request's time is up."""


class TrainingError(EdgewiseError):
    """A training run cannot go on; its last checkpoint stays."""


class Diverged(TrainingError):
    """The loss, or its gradient, is infinite or no number."""


class CheckpointError(TrainingError):
    """A checkpoint, or what stands beside it, cannot be written or read."""


class RemoteError(EdgewiseError):
    """Another tier did not deliver."""


class Unreachable(RemoteError):
    """No connection could be made, or it broke."""

    retryable = True


class RemoteTimeout(RemoteError):
    """The other side was silent for too long."""

    retryable = True


class RemoteRefused(RemoteError):
    """The other side said no; `status` is its HTTP status. With 429 it may agree later, after `retry_after_s` if it
    said so."""

    def __init__(
        self, message: str, *, status: int, retry_after_s: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after_s = retry_after_s
        self.retryable = status == 429


class RemoteBroken(RemoteError):
    """The other side answered with a server error or with nonsense."""

    retryable = True


class BadFrame(RemoteBroken):
    """Bytes that break the rules of docs/formats/frames.md; `code` is the reason as that page names it."""

    retryable = False

    def __init__(self, message: str, *, code: str = "frame") -> None:
        super().__init__(message, hint="is the other side Edgewise, of a version that fits?")
        self.code = code


class TailLost(RemoteError):
    """The worker that holds the rest of a split model's layers is gone, and this device cannot run them itself."""

    retryable = True
