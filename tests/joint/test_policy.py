import json
import math
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import ConfigError
from edgewise.joint.core import Reason
from edgewise.joint.judge import SignalsJudge
from edgewise.joint.pair import Model, Pair
from edgewise.joint.policy import SHIPPED, Fitted, Forecast, Guarantee, Policy
from edgewise.joint.signals.evidence import NAMES, Evidence
from edgewise.joint.signals.text import LOOK

DOCUMENT = (Path(__file__).parents[2] / "docs/formats/policy.md").read_text()
GOOD = json.loads(Policy.default().to_json())
FORMAT_1 = {
    "format": 1,
    "confidence": {"weights": {"mean_logprob": 1.0}, "bias": 0.5, "link": "exp"},
    "gates": ["parse_ok"],
    "whole": {"threshold": 0.58},
    "early": {"threshold": 0.5, "tokens": 16, "max_wait_ms": 1500},
    "edge": {"first_token_ms": 10000, "deadline_share": 0.5},
    "cloud": {"first_token_ms": 8000, "stall_ms": 8000, "total_ms": 60000, "margin_ms": 50, "patience_ms": 500},
    "deadline_ms": None,
    "fitted": {"edge": "e", "prompts_sha256": "0" * 64, "prompts": 3, "escalate_share": 0.5},
}


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


def test_the_document_shows_a_policy_and_names_every_signal_reason_and_key():
    example = re.search(r"```json\n(.*?)```", DOCUMENT, re.S).group(1)
    Policy.parse(example.encode())
    signals = [name for name in NAMES if not name.startswith(("prompt_", "answer_"))]
    for word in (*signals, *LOOK, *Reason):
        assert f"`{word}`" in DOCUMENT, word
    for part, value in GOOD.items():
        names = [f"{part}.{key}" for key in value] if part in ("whole", "early", "edge", "cloud") else [part]
        for name in names:
            assert f"`{name}`" in DOCUMENT, name


def test_the_policy_that_ships_is_that_of_the_models_here(tmp_path, monkeypatch):
    fitted = [Pair(Model("small", "a" * 64), Model("big", None)), Pair(Model("small", "b" * 64), None)]
    for number, pair in enumerate(fitted):
        policy = msgspec.structs.replace(Policy.threshold(0.1 * (number + 1)), pair=pair)
        (tmp_path / f"{number}.json").write_bytes(policy.to_json())
    monkeypatch.setattr("edgewise.joint.policy.SHIPPED", tmp_path)

    def threshold(edge: Model, cloud: Model | None) -> float:
        return Policy.shipped(Pair(edge, cloud)).whole.threshold

    assert threshold(Model("renamed", "a" * 64), None) == pytest.approx(0.1)
    assert threshold(Model("small", "b" * 64), Model("any", None)) == pytest.approx(0.2)
    default = Policy.default().whole.threshold
    assert threshold(Model("small", "a" * 64), Model("another", None)) == default
    assert threshold(Model("small", "c" * 64), None) == default


def test_what_ships_can_be_read():
    for file in SHIPPED.glob("*.json"):
        assert Policy.open(file).pair is not None, file.name


def test_it_comes_back_from_json_as_it_was():
    policy = Policy.threshold(0.7)
    assert Policy.parse(policy.to_json()) == policy
    assert policy.whole.threshold == policy.early.threshold == 0.7
    assert len(policy.to_json()) < 4096


def test_the_format_before_is_read():
    policy = Policy.parse(json.dumps(FORMAT_1).encode())
    assert policy.format == 2
    assert policy.whole.judge == SignalsJudge({"mean_logprob": 1.0}, 0.5, "exp", ("parse_ok",))
    assert (policy.whole.threshold, policy.early.threshold, policy.early.judge) == (0.58, 0.5, None)
    assert Policy.parse(policy.to_json()) == policy
    with pytest.raises(ConfigError, match="surprise"):
        Policy.parse(json.dumps(FORMAT_1 | {"surprise": 1}).encode())


def test_what_it_was_fitted_on_comes_back():
    guarantee = Guarantee("drop", 0.05, 0.1, 60, 0.04)
    fitted = Fitted("0" * 64, 100, Forecast(0.3, 0.2, 0.4), guarantee, "AAECAwQFBgcICQoL")
    pair = Pair(Model("small", "1" * 64), None)
    policy = msgspec.structs.replace(Policy.default(), fitted=fitted, pair=pair)
    assert Policy.parse(policy.to_json()) == policy
    assert policy.fitted.saw() == {bytes(range(6)), bytes(range(6, 12))}
    assert policy.with_threshold(0.5).fitted is None  # nothing is proven of a threshold that somebody typed


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a policy"),
        (b"[]", "not a policy"),
        (b"\xff\xfe", "not a policy"),
        (b'{"format": 3, "new": 1}', "has format 3; this version reads 2 and 1"),
        (b'{"format": 0}', "has format 0"),
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
        (changed(whole__judge__kind="magic"), "magic"),
        (changed(whole__judge__link="magic"), "whole.judge.link"),
        (changed(whole__judge__weights={"mood": 1}), "mood"),
        (changed(whole__judge__weights={}), "no signal"),
        (changed(whole__judge__bias=None), "whole.judge.bias"),
        (changed(whole__judge__gates=["mean_logprob"]), "mean_logprob"),
        (changed(deadline_ms=-1), "deadline_ms"),
        (changed(fitted__data_sha256="12"), "fitted.data_sha256"),
        (changed(fitted__rows=0), "fitted.rows"),
        (changed(fitted__seen="AAAA"), "6 bytes"),
        (changed(fitted__seen="no base64!"), "base64"),
        (b"[" * 4000, "not a policy"),
        (b" " * ((4 << 20) + 1), "more than 4194304 bytes"),
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
    with pytest.raises(ConfigError, match="more than"):
        Policy.open(path)
    path.write_bytes(Policy.threshold(0.25).to_json())
    assert Policy.open(path).whole.threshold == 0.25


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, math.inf, None, "0.5"])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ConfigError, match="allowed are numbers from 0"):
        Policy.threshold(threshold)


def test_confidence_is_the_geometric_mean_probability():
    evidence = Evidence(text="x", logprobs=[math.log(0.25), 0.0], finish_reason="stop")
    judgement = Policy.default().whole.judge.judge(evidence)
    assert judgement.confidence == judgement.worth == pytest.approx(0.5)


def test_softmax_is_for_networks_that_do_not_stream():
    policy = Policy.softmax(0.8)
    assert policy.early is None
    assert policy.whole.judge.judge(Evidence(logits=np.log([0.9, 0.1]))).worth == pytest.approx(0.9)
