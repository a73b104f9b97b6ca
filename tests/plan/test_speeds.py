"""Fitted speeds: the file they are kept in, and what a user's own rows change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.devices.catalogue import shipped as catalogue
from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.plan.precision import PRECISIONS
from edgewise.plan.rows import Row, by
from edgewise.plan.speed import Situation, situation
from edgewise.plan.speeds import EFFECTS_LIMIT, SHIPPED, SIZE_LIMIT, Speeds, shipped

MACHINES = by(catalogue())
GOOD: dict[str, Any] = json.loads(SHIPPED.read_bytes())


def asked(device: str, unit: str, model: str = "Llama-3.2-3B", runtime: str = "llama.cpp") -> Situation:
    row = Row(device, unit, model, runtime)
    return situation(of_words(model), PRECISIONS["q4_k_m"], MACHINES(row), runtime)


def test_they_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    shipped().save(path)
    again = Speeds.read(path)
    assert again.devices == shipped().devices
    for target in ("decode", "prefill"):
        old, new = shipped().of(target), again.of(target)  # type: ignore[arg-type]
        assert new.posterior.names == old.posterior.names
        assert new.posterior.mean == pytest.approx(old.posterior.mean, rel=1e-6)
        assert new.posterior.precision == pytest.approx(old.posterior.precision, rel=1e-6)
        assert new.scores == old.scores
        assert new.spread.of_runtime == pytest.approx(old.spread.of_runtime, rel=1e-6)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_those_of_one_target_alone_come_back_too(tmp_path: Path) -> None:
    rows = [
        Row(device, "CPU", model, "llama.cpp", quantization="Q4_0", decode_tok_s=speed)
        for device, speed in (("Raspberry Pi 5", 9.0), ("RK3588", 8.0))
        for model in ("Qwen2.5-1.5B", "TinyLlama-1.1B")
    ]
    Speeds.fitted(rows, MACHINES).save(tmp_path / "speeds.json")
    again = Speeds.read(tmp_path / "speeds.json")
    assert again.prefill.scores == ()
    (estimate,) = again.prefill.predict([asked("Raspberry Pi 5", "CPU")])
    assert 0 < estimate.low < estimate.value < estimate.high


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads(json.dumps(GOOD))
    change(data)
    return json.dumps(data).encode()


FIRST = next(iter(GOOD["decode"]["effects"]))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is no file of speeds"),
        (b"\xff\xfe\x00", "is no file of speeds"),
        (b"null", "is no file of speeds"),
        (b"[]", "is no file of speeds"),
        (b"{}", "has format None"),
        (b'{"format": 2, "surprise": 1}', "has format 2; this version reads 1"),
        (b'{"format": true}', "is no file of speeds"),
        (b"[" * 100_000, "is no file of speeds"),
        (SHIPPED.read_bytes()[:-9], "is no file of speeds"),
        (changed(lambda d: d.pop("devices")), "devices"),
        (changed(lambda d: d.update(surprise=1)), "surprise"),
        (changed(lambda d: d["decode"]["effects"].update({"bandwidth/unit/abacus": "1"})), "effects"),
        (changed(lambda d: d["decode"]["effects"].update({"magic/unit/cpu": 0.0})), "unknown effect 'magic/unit/cpu'"),
        (changed(lambda d: d["decode"]["effects"].update({FIRST: 1e9})), "effects"),
        (changed(lambda d: d["decode"]["effects"].clear()), "has a precision of effect"),
        (changed(lambda d: d["decode"]["effects"].update({f"whole/device/{n}": 0 for n in range(3000)})), "effects"),
        (changed(lambda d: d["decode"].update(precision=[])), "that no rows can have left"),
        (changed(lambda d: d["decode"]["precision"].append([0, 1, 1e9])), "that no rows can have left"),
        (changed(lambda d: d["decode"]["precision"].append([EFFECTS_LIMIT - 1, 0, 1.0])), "has a precision of effect"),
        (changed(lambda d: d["decode"]["precision"].append([-1, 0, 1.0])), "precision"),
        (changed(lambda d: d["decode"]["precision"].append([0, 0])), "precision"),
        (changed(lambda d: d["prefill"]["scores"].append(["a", "b", -1.0])), "scores"),
        (changed(lambda d: d["prefill"]["scores"].append(["a", "b", None])), "scores"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "speeds.json"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        Speeds.read(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_no_file_and_far_too_much(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(UsageError, match="is no file of speeds"):
            Speeds.read(path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(SIZE_LIMIT + 1)
    with pytest.raises(UsageError, match="has at most"):
        Speeds.read(tmp_path / "large.json")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(SHIPPED.read_bytes()) - 1), noise=st.binary(max_size=4), cut=st.integers(0, 4))
def test_whatever_is_read_predicts(tmp_path: Path, at: int, noise: bytes, cut: int) -> None:
    path, data = tmp_path / "speeds.json", SHIPPED.read_bytes()
    path.write_bytes(data[:at] + noise + data[at + cut :])
    try:
        found = Speeds.read(path)
    except UsageError:
        return
    for target in ("decode", "prefill"):
        (estimate,) = found.of(target).predict([asked("Apple M4", "GPU")])  # type: ignore[arg-type]
        assert 0 < estimate.low <= estimate.value <= estimate.high
        assert math.isfinite(estimate.high)


def test_many_at_once_are_predicted_as_one_is() -> None:
    situations = [asked(d, u) for d, u in (("Apple M4", "GPU"), ("RK3588", "NPU"), ("A new phone", "CPU"))]
    for target in ("decode", "prefill"):
        fitted = shipped().of(target)  # type: ignore[arg-type]
        together = fitted.predict(situations)
        for estimate, one in zip(together, situations, strict=True):
            assert fitted.predict([one])[0] == pytest.approx(estimate, rel=1e-9)
        assert fitted.predict([]) == []


def test_own_rows_narrow_their_device_and_leave_others_nearly_as_they_were() -> None:
    phone = "A phone that nobody measured"
    mine = [
        Row(phone, "CPU", model, "llama.cpp", quantization="Q4_K_M", decode_tok_s=speed, prefill_tok_s=10 * speed)
        for model, speed in (("Llama-3.2-1B", 28.0), ("Llama-3.2-3B", 12.0))
    ]
    others = [asked(*at) for at in (("Apple M4", "GPU"), ("RTX 3090", "GPU"), ("Raspberry Pi 5", "CPU"))]
    others.append(asked("RK3588", "NPU", runtime="rkllm"))
    refined = shipped().refined(mine, MACHINES)
    assert refined.devices == shipped().devices | {phone}
    for target, measured in (("decode", 12.0), ("prefill", 120.0)):
        before, after = shipped().of(target), refined.of(target)  # type: ignore[arg-type]
        (old,), (new,) = (fitted.predict([asked(phone, "CPU")]) for fitted in (before, after))
        assert new.high / new.low < 0.9 * (old.high / old.low)
        assert new.value == pytest.approx(measured, rel=0.2)
        assert abs(math.log(new.value / measured)) < abs(math.log(old.value / measured))
        for was, is_now in zip(before.predict(others), after.predict(others), strict=True):
            assert is_now.value == pytest.approx(was.value, rel=0.1)
            assert is_now.high / is_now.low <= 1.05 * was.high / was.low


def test_rows_without_that_speed_change_nothing() -> None:
    row = Row("Apple M4", "GPU", "Llama-3.2-3B", "llama.cpp", decode_tok_s=30.0)
    assert shipped().prefill.refined([row], MACHINES) is shipped().prefill
    assert shipped().decode.refined([], MACHINES) is shipped().decode
    moved = shipped().decode.refined([row], MACHINES)
    assert not np.array_equal(moved.posterior.mean[:5], shipped().decode.posterior.mean[:5])
    assert moved.spread == shipped().decode.spread
