"""The policy: when an edge answer stands, and how long the cloud may take otherwise.

docs/formats/policy.md is the format."""

from __future__ import annotations

import base64
import binascii
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from msgspec import Meta

from edgewise.errors import ConfigError
from edgewise.joint.judge import Judge, Part, SignalsJudge
from edgewise.joint.pair import Pair, Sha256, mismatch
from edgewise.joint.replay import SEEN_BYTES, Share
from edgewise.joint.signals.answer import TOP_SIGNALS

FORMAT: Final = 2
CONFIDENCE: Final = 0.8  # of a network with logits, where nobody fitted a policy
SIZE_LIMIT: Final = 4 << 20  # bytes; one without tables has less than 4096
SHIPPED: Final = Path(__file__).with_name("shipped")  # policies that come with Edgewise
DEFAULT_FILE: Final = SHIPPED / "default.json"

InnerShare = Annotated[float, Meta(gt=0.0, lt=1.0)]
Millis = Annotated[float, Meta(gt=0.0, le=3_600_000.0)]
Risk = Literal["drop", "wrong"]
Count = Annotated[int, Meta(ge=1)]


class Whole(Part, frozen=True):
    """When a whole answer stays on the edge: worth strictly above."""

    threshold: Share
    judge: Judge


class Early(Part, frozen=True):
    """When a streamed answer does, judged by its first tokens; with no judge of its own, by that of whole answers."""

    threshold: Share
    tokens: Annotated[int, Meta(ge=1, le=256)]
    max_wait_ms: Millis
    judge: Judge | None


class EdgePatience(Part, frozen=True):
    """How long the edge may take before the cloud is asked beside it."""

    first_token_ms: Millis
    deadline_share: InnerShare


class CloudPatience(Part, frozen=True):
    """How long the cloud may take before the edge answers alone."""

    first_token_ms: Millis
    stall_ms: Millis
    total_ms: Millis
    margin_ms: Annotated[float, Meta(ge=0.0, le=3_600_000.0)]
    patience_ms: Millis


class Guarantee(Part, frozen=True):
    """With probability 1 - delta over the rows that set the threshold, the risk is at most `target`; `bound` is what
    those `n` rows prove of it."""

    risk: Risk
    target: InnerShare
    delta: InnerShare
    n: Count
    bound: Share


class Forecast(Part, frozen=True):
    """A share of requests, with the interval in which it lies at 95 %."""

    value: Share
    low: Share
    high: Share


class Fitted(Part, frozen=True):
    """What the thresholds were fitted on. `seen` is the base64 of the rows' fingerprints."""

    data_sha256: Sha256
    rows: Count
    escalation: Forecast
    guarantee: Guarantee | None = None
    seen: str = ""

    def __post_init__(self) -> None:
        if len(_bytes(self.seen)) % SEEN_BYTES:
            raise ValueError(f"`seen` must hold {SEEN_BYTES} bytes for each row")

    def saw(self) -> set[bytes]:
        """The fingerprints of the rows."""
        raw = _bytes(self.seen)
        return {raw[start : start + SEEN_BYTES] for start in range(0, len(raw), SEEN_BYTES)}


class Policy(Part, frozen=True):
    """One policy; equal files make equal values."""

    format: int
    pair: Pair | None
    whole: Whole
    early: Early | None
    edge: EdgePatience
    cloud: CloudPatience
    deadline_ms: Millis | None
    fitted: Fitted | None

    @property
    def needs_alternatives(self) -> bool:
        """Whether a judge reads what else each token could have been."""
        judges = [self.whole.judge] + ([self.early.judge] if self.early is not None and self.early.judge else [])
        return any(name in TOP_SIGNALS for judge in judges for name in judge.reads)

    def with_threshold(self, threshold: float) -> Self:
        """The same policy with one threshold for whole answers and early decisions. ConfigError outside 0..1."""
        if not (isinstance(threshold, Real) and 0.0 <= threshold <= 1.0):
            raise ConfigError(
                f"the confidence threshold is {threshold!r}; allowed are numbers from 0 (nearly all stays on the edge) "
                "to 1 (nothing does)",
            )
        early = self.early
        return msgspec.structs.replace(
            self,
            whole=msgspec.structs.replace(self.whole, threshold=float(threshold)),
            early=None if early is None else msgspec.structs.replace(early, threshold=float(threshold)),
            fitted=None,
        )

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @staticmethod
    def parse(data: bytes, *, origin: str = "the policy") -> Policy:
        """Read the format's JSON, this version's or the one before. ConfigError for anything else, naming the key."""
        if len(data) > SIZE_LIMIT:
            raise ConfigError(f"{origin} has more than {SIZE_LIMIT} bytes, which no policy has", hint=_SEE)
        try:
            version = msgspec.json.decode(data, type=_Versioned).format
            if version == FORMAT - 1:
                return msgspec.json.decode(data, type=_Format1).policy()
            if version != FORMAT:
                raise ConfigError(
                    f"{origin} has format {version}; this version reads {FORMAT} and {FORMAT - 1}",
                    hint="`edgewise calibrate` makes a new one",
                )
            return msgspec.json.decode(data, type=Policy)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
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
        """The policy for models that nobody fitted one for. Its threshold suits the model that it was found with
        (`pair.edge`); another edge escalates another share."""
        return _default()

    @staticmethod
    def shipped(here: Pair) -> Policy:
        """The policy that comes with Edgewise for these models, else the default."""
        found = map(Policy.open, sorted(SHIPPED.glob("*.json")))
        return next((policy for policy in found if mismatch(policy.pair, here) is None), _default())

    @staticmethod
    def threshold(threshold: float) -> Policy:
        """The default policy with the user's own threshold."""
        return msgspec.structs.replace(_default().with_threshold(threshold), pair=None)

    @staticmethod
    def softmax(threshold: float) -> Policy:
        """For networks with logits: the confidence is the greatest softmax probability."""
        judge = SignalsJudge(weights={"max_softmax": 1.0}, bias=0.0, link="identity")
        basis = Policy.threshold(threshold)
        return msgspec.structs.replace(basis, whole=msgspec.structs.replace(basis.whole, judge=judge), early=None)


class _Versioned(msgspec.Struct):
    """Read first: a later format may have other keys, and the user must hear about the version, not about them."""

    format: int


class _Cut(Part, frozen=True):
    threshold: Share


class _EarlyCut(Part, frozen=True):
    threshold: Share
    tokens: Annotated[int, Meta(ge=1, le=256)]
    max_wait_ms: Millis


class _Line(Part, frozen=True):
    weights: dict[str, float]
    bias: float
    link: Literal["exp", "logistic", "identity"]


class _Format1(Part, frozen=True):
    """The version before: one judge for both decisions, and `fitted` without what is needed to leave rows out."""

    format: int
    confidence: _Line
    gates: tuple[str, ...]
    whole: _Cut
    early: _EarlyCut
    edge: EdgePatience
    cloud: CloudPatience
    deadline_ms: Millis | None
    fitted: dict[str, Any] | None

    def policy(self) -> Policy:
        line = self.confidence
        judge = SignalsJudge(line.weights, line.bias, line.link, self.gates)
        early = Early(self.early.threshold, self.early.tokens, self.early.max_wait_ms, None)
        whole = Whole(self.whole.threshold, judge)
        return Policy(FORMAT, None, whole, early, self.edge, self.cloud, self.deadline_ms, None)


_SEE = "docs/formats/policy.md says what a policy holds; `--threshold T` needs none"


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"`seen` is not base64: {error}") from error


@cache
def _default() -> Policy:
    return Policy.open(DEFAULT_FILE)
