import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import ConfigError
from edgewise.joint import signals
from edgewise.joint.core import Reason
from edgewise.joint.policy import Confidence, Policy

DOCUMENT = (Path(__file__).parents[2] / "docs/formats/policy.md").read_text()
GOOD = json.loads(Policy.default().to_json())


def changed(**keys: object) -> bytes:
    """The default policy with some keys replaced: `early__tokens=0` reaches into a part."""
    data = json.loads(json.dumps(GOOD))
    for path, value in keys.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return json.dumps(data).encode()


def test_the_document_shows_a_policy_and_names_every_signal_and_reason():
    example = re.search(r"```json\n(.*?)```", DOCUMENT, re.S).group(1)
    Policy.parse(example.encode())
    for word in (*signals.TEXT_SIGNALS, *signals.LOGITS_SIGNALS, *Reason):
        assert f"`{word}`" in DOCUMENT
    for part, value in GOOD.items():
        names = [f"{part}.{key}" for key in value] if part in ("whole", "early", "edge", "cloud") else [part]
        for name in names:
            assert f"`{name}`" in DOCUMENT


def test_it_comes_back_from_json_as_it_was():
    policy = Policy.threshold(0.7)
    assert Policy.parse(policy.to_json()) == policy
    assert policy.whole.threshold == policy.early.threshold == 0.7
    assert len(policy.to_json()) < 4096


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a policy"),
        (b"[]", "not a policy"),
        (b"\xff\xfe", "not a policy"),
        (b'{"format": 2, "new": 1}', "has format 2; this version reads 1"),
        (b"{}", "format"),
        (changed(surprise=1), "surprise"),
        (changed(early__token=1), "token"),
        (changed(early__tokens=0), "early.tokens"),
        (changed(early__tokens=1.5), "early.tokens"),
        (changed(whole__threshold=1.01), "whole.threshold"),
        (changed(whole__threshold="0.5"), "whole.threshold"),
        (changed(whole__threshold=math.nan), "not a policy"),
        (changed(cloud__total_ms=math.inf), "not a policy"),
        (changed(cloud__stall_ms=0), "cloud.stall_ms"),
        (changed(edge__deadline_share=1), "edge.deadline_share"),
        (changed(confidence__link="magic"), "confidence.link"),
        (changed(confidence__weights={"mood": 1}), "mood"),
        (changed(confidence__weights={}), "no signal"),
        (changed(confidence__bias=None), "confidence.bias"),
        (changed(gates=["mean_logprob"]), "mean_logprob"),
        (changed(deadline_ms=-1), "deadline_ms"),
        (changed(fitted={"edge": "e", "prompts_sha256": "12", "prompts": 3, "escalate_share": 0.5}), "prompts_sha256"),
        (b"[" * 4000, "not a policy"),
        (b" " * 4097, "at most 4096"),
        (b'{"format": 1e999}', "not a policy"),
    ],
)
def test_what_is_no_policy_is_refused_with_its_key(data, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        Policy.parse(data, origin="p.json")
    assert str(caught.value).startswith("p.json")
    assert caught.value.hint


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_are_a_policy_or_a_config_error(data):
    try:
        Policy.parse(data)
    except ConfigError:
        return
    raise AssertionError("noise is no policy")


def test_files(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.open(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.open(tmp_path)
    path.write_bytes(b" " * 10_000_000)
    with pytest.raises(ConfigError, match="at most 4096"):
        Policy.open(path)
    path.write_bytes(Policy.threshold(0.25).to_json())
    assert Policy.open(path).whole.threshold == 0.25


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, math.inf, None, "0.5"])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ConfigError, match="allowed are numbers from 0"):
        Policy.threshold(threshold)


def test_confidence_is_the_geometric_mean_probability():
    read = signals.of_text([], "x", "stop") | {"mean_logprob": math.log(0.5)}
    assert Policy.default().judge(read) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("link", "score", "value"),
    [
        ("exp", 1e308, 1.0),
        ("exp", -1e308, 0.0),
        ("logistic", 0.0, 0.5),
        ("logistic", 2.0, 1 / (1 + math.exp(-2))),
        ("logistic", -1e308, 0.0),
        ("logistic", -math.inf, 0.0),
        ("identity", 0.3, 0.3),
        ("identity", 7.0, 1.0),
        ("identity", -7.0, 0.0),
    ],
)
def test_links(link, score, value):
    confidence = Confidence(weights={"max_softmax": 1.0}, bias=0.0, link=link)
    assert confidence.of({"max_softmax": score}) == pytest.approx(value)


def test_weights_add_up_and_missing_evidence_is_no_confidence():
    confidence = Confidence(weights={"mean_logprob": 2.0, "min_logprob": 0.5}, bias=1.0, link="logistic")
    assert confidence.of({"mean_logprob": -1.0, "min_logprob": -2.0}) == pytest.approx(1 / (1 + math.exp(2)))
    assert confidence.of({"mean_logprob": -1.0, "min_logprob": None}) is None
    assert confidence.of({"mean_logprob": -1.0}) is None
    infinities = Confidence(weights={"mean_logprob": 1.0, "min_logprob": -1.0}, bias=0.0, link="exp")
    assert infinities.of({"mean_logprob": -math.inf, "min_logprob": -math.inf}) is None


def test_a_failed_gate_is_confidence_zero_and_no_evidence_fails_none():
    policy = Policy.default()
    sure = {"mean_logprob": -0.01}
    assert policy.judge(sure | {"parse_ok": 0.0}) == 0.0
    assert policy.judge(sure | {"parse_ok": None}) == pytest.approx(math.exp(-0.01))
