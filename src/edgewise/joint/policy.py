"""The policy: when an edge answer stands, and how long the cloud may take otherwise.

docs/formats/policy.md is the format."""

from __future__ import annotations

import math
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec
from msgspec import Meta

from edgewise.errors import ConfigError
from edgewise.joint.signals import GATES, LOGITS_SIGNALS, TEXT_SIGNALS, Signals

FORMAT: Final = 1
SIZE_LIMIT: Final = 4096  # bytes
DEFAULT_FILE: Final = Path(__file__).with_name("default_policy.json")

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
InnerShare = Annotated[float, Meta(gt=0.0, lt=1.0)]
Millis = Annotated[float, Meta(gt=0.0, le=3_600_000.0)]
Link = Literal["exp", "logistic", "identity"]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every part of a policy: frozen, and no key that we do not know."""


class Confidence(_Part, frozen=True):
    """Signals in, a number 0..1 out: link(bias + sum of weight · signal)."""

    weights: dict[str, float]
    bias: float
    link: Link

    def __post_init__(self) -> None:
        known = [*TEXT_SIGNALS, *LOGITS_SIGNALS]
        unknown = sorted(set(self.weights) - set(known))
        if unknown or not self.weights:
            raise ValueError(f"`weights` names {unknown or 'no signal'}; allowed are {known}")
        if not all(math.isfinite(number) for number in (self.bias, *self.weights.values())):
            raise ValueError("`weights` and `bias` must be finite numbers")

    def of(self, signals: Signals) -> float | None:
        """None where a signal that counts is missing."""
        score = self.bias
        for name, weight in self.weights.items():
            value = signals.get(name)
            if value is None:
                return None
            score += weight * value
        return None if math.isnan(score) else _cut(self._linked(score))

    def _linked(self, score: float) -> float:
        match self.link:
            case "exp":
                return math.exp(min(score, 0.0))  # above 0 it is cut to 1 anyway, and must not overflow
            case "logistic":
                return 1.0 / (1.0 + math.exp(-score)) if score >= -700.0 else 0.0
            case "identity":
                return score


class Whole(_Part, frozen=True):
    """When a whole answer stays on the edge: confidence strictly above."""

    threshold: Share


class Early(_Part, frozen=True):
    """When a streamed answer does, judged by its first tokens."""

    threshold: Share
    tokens: Annotated[int, Meta(ge=1, le=256)]
    max_wait_ms: Millis


class EdgePatience(_Part, frozen=True):
    """How long the edge may take before the cloud is asked beside it."""

    first_token_ms: Millis
    deadline_share: InnerShare


class CloudPatience(_Part, frozen=True):
    """How long the cloud may take before the edge answers alone."""

    first_token_ms: Millis
    stall_ms: Millis
    total_ms: Millis
    margin_ms: Annotated[float, Meta(ge=0.0, le=3_600_000.0)]
    patience_ms: Millis


class Fitted(_Part, frozen=True):
    """What the thresholds were fitted on."""

    edge: str
    prompts_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    prompts: Annotated[int, Meta(ge=1)]
    escalate_share: Share


class Policy(_Part, frozen=True):
    """One policy; equal files make equal values."""

    format: int
    confidence: Confidence
    gates: tuple[str, ...]
    whole: Whole
    early: Early
    edge: EdgePatience
    cloud: CloudPatience
    deadline_ms: Millis | None
    fitted: Fitted | None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.gates) - set(GATES))
        if unknown:
            raise ValueError(f"`gates` names {unknown}; allowed are {list(GATES)}")

    def judge(self, signals: Signals) -> float | None:
        """Confidence 0..1 of an answer with these signals; None without evidence."""
        return 0.0 if self.fails_gate(signals) else self.confidence.of(signals)

    def fails_gate(self, signals: Signals) -> bool:
        return any(signals.get(gate) == 0.0 for gate in self.gates)

    def with_threshold(self, threshold: float) -> Self:
        """The same policy with one threshold for whole answers and early decisions. ConfigError outside 0..1."""
        if not (isinstance(threshold, Real) and 0.0 <= threshold <= 1.0):
            raise ConfigError(
                f"the confidence threshold is {threshold!r}; allowed are numbers from 0 (nearly all stays on the edge) "
                "to 1 (nothing does)",
            )
        return msgspec.structs.replace(
            self,
            whole=Whole(threshold=float(threshold)),
            early=msgspec.structs.replace(self.early, threshold=float(threshold)),
            fitted=None,
        )

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @staticmethod
    def parse(data: bytes, *, origin: str = "the policy") -> Policy:
        """Read the format's JSON. ConfigError for anything else, naming the key."""
        if len(data) > SIZE_LIMIT:
            raise ConfigError(f"{origin} has {len(data)} bytes; a policy has at most {SIZE_LIMIT}", hint=_SEE)
        try:
            version = msgspec.json.decode(data, type=_Versioned).format
            if version != FORMAT:
                raise ConfigError(f"{origin} has format {version}; this version reads {FORMAT}", hint=_SEE)
            return msgspec.json.decode(data, type=Policy)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{origin} is not a policy: {error}", hint=_SEE) from error

    @staticmethod
    def open(path: Path) -> Policy:
        """Read a policy file. ConfigError if it cannot be read or is none."""
        try:
            with path.open("rb") as file:
                data = file.read(SIZE_LIMIT + 1)
        except OSError as error:
            raise ConfigError(f"the policy {path} cannot be read: {error.strerror or error}", hint=_SEE) from error
        return Policy.parse(data, origin=str(path))

    @staticmethod
    def default() -> Policy:
        """The policy that ships with the package, fitted for the demo's edge model (`fitted.edge`); another
        edge escalates another share."""
        return _default()

    @staticmethod
    def threshold(threshold: float) -> Policy:
        """The default policy with the user's own threshold."""
        return _default().with_threshold(threshold)

    @staticmethod
    def softmax(threshold: float) -> Policy:
        """For networks with logits: the confidence is the greatest softmax probability."""
        confidence = Confidence(weights={"max_softmax": 1.0}, bias=0.0, link="identity")
        return msgspec.structs.replace(_default().with_threshold(threshold), confidence=confidence)


class _Versioned(msgspec.Struct):
    """Read first: a later format may have other keys, and the user must hear about the version, not about them."""

    format: int


_SEE = "docs/formats/policy.md says what a policy holds; `--threshold T` needs none"


@cache
def _default() -> Policy:
    return Policy.open(DEFAULT_FILE)


def _cut(value: float) -> float:
    return min(max(value, 0.0), 1.0)
