"""Every fault of the cloud, at every moment, against every kind of request: one outcome each, in time, of one tier."""

from dataclasses import dataclass

import pytest
from clock import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import CLOUD_TEXT, EDGE_TEXT, SURE, UNSURE, Outcome, ask, cloud, edge, see

from edgewise.engines.fake import FakeGenerator
from edgewise.errors import (
    DeadlineExceeded,
    EngineError,
    RemoteBroken,
    RemoteError,
    RemoteRefused,
    RemoteTimeout,
    Unreachable,
)
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade

CLOUD_TOKENS = len(CLOUD_TEXT.split())
DEADLINE_S = 2.0


@dataclass(frozen=True)
class Fault:
    reason: str
    script: dict[str, object]
    breaks_at: int | None = 0  # the token that does not come; None: all come, late


ERRORS = {
    "unreachable": ("cloud_unreachable", Unreachable("no route")),
    "4xx": ("cloud_refused", RemoteRefused("no", status=400)),
    "5xx": ("cloud_broken", RemoteBroken("500")),
    "timeout": ("cloud_timeout", RemoteTimeout("silent")),
    "foreign": ("cloud_broken", KeyError("choices")),
}
FAULTS = {
    **{
        f"{name} after {k}": Fault(reason, {"error": error, "breaks_at": k}, k)
        for name, (reason, error) in ERRORS.items()
        for k in range(CLOUD_TOKENS + 1)
    },
    **{f"hangs after {k}": Fault("cloud_timeout", {"hangs": True, "breaks_at": k}, k) for k in range(CLOUD_TOKENS + 1)},
    "slow drip": Fault("cloud_timeout", {"delay_s": 1.0}, None),
    "late start": Fault("cloud_timeout", {"start_delay_s": 5.0}, None),
}


@pytest.mark.parametrize("deadline_ms", [None, DEADLINE_S * 1000])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_fault(fault, stream, deadline_ms):
    near, far = edge(UNSURE), cloud(**fault.script)
    cascade = Cascade(near, far, breaker=Breaker(clock=lambda: 0.0))
    seen = run(see(cascade, ask(stream=stream, deadline_ms=deadline_ms)))

    survives = fault.breaks_at is None and deadline_ms is None
    begun = stream and (fault.breaks_at or (fault.breaks_at is None and fault.script.get("start_delay_s", 0) < 1))
    if survives:
        assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "unsure"))
    elif begun:  # its text was shown: an error is all that is left
        assert isinstance(seen.error, RemoteError)
        assert f"after {len(seen.text)} characters" in str(seen.error)
        assert seen.way == ("cloud", "unsure")
        assert CLOUD_TEXT.startswith(seen.text)
        assert fault.breaks_at is None or len(seen.text.split()) == fault.breaks_at
    else:
        assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", fault.reason))
    if deadline_ms is not None:
        assert seen.total_s <= DEADLINE_S
    assert (near.active, far.active) == (0, 0)


@pytest.mark.parametrize("deadline_ms", [None, DEADLINE_S * 1000])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_fault_reaches_a_confident_answer(fault, stream, deadline_ms):
    far = cloud(**fault.script)
    seen = run(see(Cascade(edge(SURE), far), ask(stream=stream, deadline_ms=deadline_ms)))
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge", "confident"))
    assert far.requests == []


seconds = st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 1.0, 9.0])
scripts = st.fixed_dictionaries(
    {
        "start_delay_s": seconds,
        "delay_s": seconds,
        "breaks_at": st.integers(0, 42),
        "hangs": st.booleans(),
        "error": st.sampled_from([None, EngineError("e"), Unreachable("u"), RemoteBroken("b"), OSError("o")]),
    }
)


@settings(max_examples=250, deadline=None)
@given(
    near=scripts,
    far=st.none() | scripts,
    logprob=st.sampled_from([SURE, UNSURE, [None]]),
    route=st.sampled_from(["auto", "edge", "cloud"]),
    stream=st.booleans(),
    deadline_ms=st.none() | st.sampled_from([1.0, 40.0, 200.0, 1000.0, 5000.0]),
)
def test_whatever_both_tiers_do_there_is_one_outcome_in_time(near, far, logprob, route, stream, deadline_ms):
    near, far = edge(logprob, **near), None if far is None else cloud(**far)
    endless = deadline_ms is None and near.answer.hangs  # nobody may ever answer: then the caller has to leave
    request = ask(route=route, stream=stream, deadline_ms=1e6 if endless else deadline_ms)
    check(run(see(Cascade(near, far), request)), near, far, request.deadline_ms)


def check(seen: Outcome, near: FakeGenerator, far: FakeGenerator | None, deadline_ms: float | None) -> None:
    assert any(text.startswith(seen.text) for text in (EDGE_TEXT, CLOUD_TEXT)), "one tier's text, from its beginning"
    if seen.chunks:
        whole = CLOUD_TEXT if seen.decision.route == "cloud" else EDGE_TEXT
        assert (seen.text == whole) if seen.error is None else whole.startswith(seen.text)
    else:
        assert seen.error is not None
    if isinstance(seen.error, DeadlineExceeded):
        assert (
            seen.total_s >= deadline_ms / 1000 - 0.05 - 1e-9
        )  # the margin: the cloud's own deadline comes so much earlier
    if deadline_ms is not None:
        assert seen.total_s <= deadline_ms / 1000 + 1e-9
    for side in filter(None, (near, far)):
        assert side.active == 0
        assert len(side.requests) <= 1
