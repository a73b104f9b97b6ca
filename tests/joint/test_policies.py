"""Policy files of a running node."""

import os

import msgspec
import pytest
from clock import run
from tiers import SURE, ask, cloud, edge, see

from edgewise.errors import ConfigError
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade
from edgewise.joint.pair import Model, Pair, identity, mismatch
from edgewise.joint.policies import Policies
from edgewise.joint.policy import Policy

HERE = Pair(Model("small", "a" * 64), Model("big", None))


@pytest.fixture
def now():
    return [0.0]


def policy(threshold: float, pair: Pair | None = None) -> Policy:
    return msgspec.structs.replace(Policy.threshold(threshold), pair=pair)


def write(path, found: Policy | bytes, age: int = 0):
    path.write_bytes(found if isinstance(found, bytes) else found.to_json())
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def fitted_on(edge_name: str, sha256: str | None = None, cloud_name: str | None = None) -> Pair:
    return Pair(Model(edge_name, sha256), None if cloud_name is None else Model(cloud_name, None))


def test_a_changed_file_is_in_force_a_second_later(tmp_path, now, caplog):
    path = write(tmp_path / "p.json", policy(0.1))
    policies = Policies(path, HERE, clock=lambda: now[0])
    assert policies.current().whole.threshold == 0.1
    write(path, policy(0.2), age=5)
    assert policies.current().whole.threshold == 0.1
    now[0] = 1.0
    assert policies.current().whole.threshold == 0.2
    write(path, b"{}", age=3)
    now[0] = 2.0
    assert policies.current().whole.threshold == 0.2
    assert "p.json does not take effect" in caplog.text
    path.unlink()
    now[0] = 3.0
    assert policies.current().whole.threshold == 0.2
    write(path, policy(0.3))
    now[0] = 4.0
    assert policies.current().whole.threshold == 0.3


def test_of_a_directory_the_newest_for_these_models_counts(tmp_path, now, caplog):
    write(tmp_path / "old.json", policy(0.1, fitted_on("small", "a" * 64)), age=20)
    write(tmp_path / "new.json", policy(0.2, fitted_on("small", "a" * 64, "big")), age=10)
    write(tmp_path / "foreign.json", policy(0.3, fitted_on("small", "b" * 64)))
    write(tmp_path / "broken.json", b"no")
    policies = Policies(tmp_path, HERE, clock=lambda: now[0])
    assert policies.current().whole.threshold == 0.2
    write(tmp_path / "newest.json", policy(0.4, fitted_on("small")), age=-5)
    now[0] = 1.0
    assert policies.current().whole.threshold == 0.4


@pytest.mark.parametrize("stream", [False, True])
def test_a_stranger_sends_everything_to_the_cloud(tmp_path, caplog, stream):
    path = write(tmp_path / "p.json", policy(0.0, fitted_on("small", "b" * 64)))
    policies = Policies(path, HERE)
    assert "fitted on another edge model" in caplog.text
    seen = run(see(Cascade(edge(SURE), cloud(), policies, Breaker(clock=lambda: 0.0)), ask(stream=stream)))
    assert seen.way == ("cloud", "unsure")
    assert Policies(tmp_path / "..", HERE).current().whole.threshold == 1.0  # no policy at all


def test_requests_under_way_keep_their_policy(tmp_path, now):
    path = write(tmp_path / "p.json", policy(0.0))
    cascade = Cascade(edge(SURE), cloud(), Policies(path, None, clock=lambda: now[0]), Breaker(clock=lambda: 0.0))
    assert cascade.policy.whole.threshold == 0.0
    assert run(see(cascade, ask())).way == ("edge", "confident")
    write(path, policy(1.0), age=5)
    now[0] = 5.0
    assert run(see(cascade, ask())).way == ("cloud", "unsure")


def test_a_single_file_must_be_a_policy_at_the_start(tmp_path):
    for path in (tmp_path / "none.json", write(tmp_path / "p.json", b"{}")):
        with pytest.raises(ConfigError):
            Policies(path, HERE)


@pytest.mark.parametrize(
    ("fitted", "differs"),
    [
        (None, False),
        (fitted_on("small", "a" * 64), False),
        (fitted_on("renamed", "a" * 64), False),
        (fitted_on("small", "b" * 64), True),
        (fitted_on("small"), False),
        (fitted_on("other"), True),
        (fitted_on("small", "a" * 64, "big"), False),
        (fitted_on("small", "a" * 64, "bigger"), True),
    ],
)
def test_models_are_compared_by_hash_where_it_is_known(fitted, differs):
    assert (mismatch(fitted, HERE) is not None) == differs
    assert mismatch(fitted_on("small", "a" * 64, "bigger"), Pair(HERE.edge, None)) is None


def test_a_bundle_is_known_by_its_manifest(tmp_path):
    (tmp_path / "edgewise.json").write_text("{}")
    one = identity("m", tmp_path / "edgewise.json")
    (tmp_path / "edgewise.json").write_text("{ }")
    assert one.sha256 != identity("m", tmp_path / "edgewise.json").sha256
    assert identity("m", None) == Model("m", None)
