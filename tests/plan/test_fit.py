"""Learning: rows made by the formula give back what they were made with, and one wild row does not undo that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgewise.plan.fit import BELIEFS, DECODE, Observation, Problem, Score, Spread, held_out, predict, times
from edgewise.plan.speed import Machine, Situation, decode_terms, prefill_terms
from plan_rows import machine, situation

SHARE = {"cpu": 0.55, "cuda": 0.9}
RATE = {"cpu": 0.2, "cuda": 0.5}
LAUNCH_MS = {"cpu": 0.03, "cuda": 0.1}
CPUS = [machine(f"board {n}", 10.0 * (n + 1), 0.5 * (n + 1)) for n in range(6)]
GPUS = [machine(f"card {n}", 150.0 * (n + 1), 10.0 * (n + 1), "cuda", "desktop") for n in range(6)]
GIGABYTES = (0.1, 0.4, 1.0, 4.0)


def truth(s: Situation) -> float:
    """The documented formula, in seconds, written again."""
    unit = s.machine.unit
    reading = s.bytes_per_token / (SHARE[unit] * s.machine.bandwidth_gb_s * 1e9)
    multiplying = s.ops_per_token / (RATE[unit] * s.machine.decode_tops * 1e12)
    return 1 / (math.sqrt(reading**2 + multiplying**2) + s.layers * LAUNCH_MS[unit] / 1e3)


def made(machines: Sequence[Machine], seed: int = 0, noise: float = 0.03) -> list[Observation]:
    random = np.random.default_rng(seed)
    asked = [situation(m, size) for m in machines for size in GIGABYTES]
    return [Observation(s, s.machine.device, truth(s) * math.exp(noise * random.standard_normal())) for s in asked]


def errors(problem: Problem, which: np.ndarray | None = None) -> np.ndarray:
    """Of predictions of machines that no row is of."""
    given = problem.solve(problem.everything if which is None else which)
    asked = [
        situation(m, g)
        for m in (machine("new", 33, 1.7), machine("card", 500, 33, "cuda", "desktop"))
        for g in (0.7, 2)
    ]
    values, _ = predict("decode", problem.beliefs, asked, given)
    return np.abs(np.log(values / np.array([truth(s) for s in asked])))


def test_known_effects_are_recovered() -> None:
    problem = Problem("decode", DECODE, made([*CPUS, *GPUS]))
    assert errors(problem).max() < 0.04
    found = problem.solve(problem.everything)
    effects = dict(zip(found.names, found.mean, strict=True))
    for unit, kind in (("cpu", "board"), ("cuda", "desktop")):  # only their sum shows in rows
        share = sum(effects[f"bandwidth/{name}"] for name in (f"unit/{unit}", "runtime/llama.cpp", f"kind/{kind}"))
        assert math.exp(share) == pytest.approx(SHARE[unit], rel=0.1)
        path = "gpu" if unit == "cuda" else unit
        launch = effects[f"launch/unit/{unit}"] + effects[f"launch/runtime/llama.cpp {path}"]
        assert math.exp(launch) == pytest.approx(LAUNCH_MS[unit], rel=0.3)


def test_the_times_of_a_token_are_those_of_the_formula() -> None:
    problem = Problem("decode", DECODE, made(CPUS))
    given = problem.solve(problem.everything)
    for asked in (situation(CPUS[0], 1), situation(machine("new", 20, 1), 0.3)):
        reading, computing, launching, whole = times("decode", DECODE, asked, given)
        (value,), _ = predict("decode", DECODE, [asked], given)
        assert 1e3 / value == pytest.approx((math.hypot(reading, computing) + launching) * whole, rel=1e-9)
        terms = decode_terms(asked)
        assert reading > terms.memory_ms  # nothing reaches its peak
        assert computing > terms.compute_ms


def test_a_wild_row_moves_little_and_a_doubted_one_nothing() -> None:
    rows = made([*CPUS, *GPUS])
    for at in (0, 7, 30):
        wild = [*rows[:at], replace(rows[at], tok_s=50 * rows[at].tok_s), *rows[at + 1 :]]
        assert errors(Problem("decode", DECODE, wild)).max() < 0.06
        doubted = [replace(row, trusted=n != at) for n, row in enumerate(wild)]
        without = [row for n, row in enumerate(rows) if n != at]
        found, expected = (Problem("decode", DECODE, given) for given in (doubted, without))
        asked = [row.situation for row in rows]
        pair = [predict("decode", DECODE, asked, p.solve(p.everything))[0] for p in (found, expected)]
        assert pair[0] == pytest.approx(pair[1], rel=2e-3)


def test_an_odd_device_is_its_own_matter() -> None:
    """All its rows a third as fast: the predictions of others stay."""
    rows = made([*CPUS, *GPUS])
    odd = [replace(row, tok_s=row.tok_s / 3) if row.device == "board 2" else row for row in rows]
    problem = Problem("decode", DECODE, odd)
    assert errors(problem).max() < 0.1


def test_what_was_left_out_was_not_seen() -> None:
    rows = made([*CPUS, *GPUS])
    problems = [
        Problem("decode", DECODE, [replace(o, tok_s=10 * o.tok_s) if o.device == "card 3" else o for o in rows]),
        Problem("decode", DECODE, rows),
    ]
    out = problems[0].devices == "card 3"
    found = [problem.predict(out, problem.solve(~out)) for problem in problems]
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_without_rows_the_beliefs_tell_and_rows_make_surer() -> None:
    rows = made(CPUS)
    problem = Problem("decode", DECODE, rows)
    nothing = problem.solve(~problem.everything)
    effects = dict(zip(nothing.names, nothing.mean, strict=True))
    assert math.exp(effects["bandwidth/unit/cpu"]) == pytest.approx(DECODE.priors["bandwidth/unit/cpu"].middle)
    before, after = (problem.predict(problem.everything, p)[1] for p in (nothing, problem.solve(problem.everything)))
    assert (after < before).all()
    assert after.min() > DECODE.noise  # what rows err by, no fit takes away
    assert held_out(problem, ~problem.everything) == []


def test_held_out_rows_are_scored_once_each() -> None:
    problem = Problem("decode", DECODE, made([*CPUS, *GPUS]))
    scores = held_out(problem, problem.everything)
    assert len(scores) == len(problem.observations)
    assert {score.device for score in scores} == {m.device for m in (*CPUS, *GPUS)}
    assert np.median([score.z for score in scores]) < 1
    some = problem.devices == "board 1"
    assert {score.device for score in held_out(problem, ~some)} == {m.device for m in (*CPUS, *GPUS)} - {"board 1"}


def test_the_more_a_runtime_varies_the_wider_its_interval() -> None:
    random = np.random.default_rng(1)
    calm = [Score(f"d{n % 12}", "calm", abs(z)) for n, z in enumerate(random.standard_normal(60))]
    wild = [Score(f"e{n % 12}", "wild", abs(3 * z)) for n, z in enumerate(random.standard_normal(60))]
    spread = Spread.learned([*calm, *wild], 0.8)
    assert spread.of("calm") < spread.of("nobody measured it") < spread.of("wild")
    held = [score.z <= spread.of(score.runtime) for score in (*calm, *wild)]
    assert 0.75 <= np.mean(held) <= 0.85
    assert Spread.learned((), 0.8).of("any") == pytest.approx(1.2816, rel=1e-3)
    assert math.isfinite(Spread.learned([Score("d", "r", 0.0)] * 3, 0.8).of("r"))
    one_is_off = Spread.learned([*calm, Score("f", "calm", 1000.0)], 0.8)
    assert one_is_off.of("calm") < 1.5 * Spread.learned(calm, 0.8).of("calm")


@settings(deadline=None, max_examples=40)
@given(
    bandwidth=st.floats(5, 4000),
    tops=st.floats(0.1, 500),
    gigabytes=st.floats(0.05, 200),
    more=st.floats(1.001, 100),
    unit=st.sampled_from(["cpu", "cuda", "metal", "gpu", "npu"]),
)
def test_better_machines_are_never_slower_and_larger_models_never_faster(
    bandwidth: float, tops: float, gigabytes: float, more: float, unit: str
) -> None:
    def asked(bandwidth: float, tops: float, gigabytes: float) -> Situation:
        return situation(machine("x", bandwidth, tops, unit, "laptop"), gigabytes)  # type: ignore[arg-type]

    for target, rows in (("decode", made(CPUS)), ("prefill", [])):
        problem = Problem(target, BELIEFS[target], rows)  # type: ignore[arg-type]
        given = problem.solve(problem.everything)
        choices = [
            (bandwidth, tops, gigabytes),
            (bandwidth * more, tops, gigabytes),
            (bandwidth, tops * more, gigabytes),
        ]
        choices.append((bandwidth, tops, gigabytes * more))
        values, sds = predict(target, BELIEFS[target], [asked(*c) for c in choices], given)  # type: ignore[arg-type]
        base, wider, faster, larger = values
        assert (wider >= base * (1 - 1e-9), faster >= base * (1 - 1e-9), larger <= base * (1 + 1e-9)) == (True,) * 3
        assert np.isfinite(sds).all()
        assert (sds >= BELIEFS[target].noise).all()


def test_every_effect_of_every_unit_is_believed_in() -> None:
    for unit in ("cpu", "cuda", "metal", "gpu", "npu"):
        for kind in ("phone", "laptop", "mac", "desktop", "board", "edge gpu", "server", "accelerator"):
            plain = situation(machine("x", 10, 1, unit, kind), 1)  # type: ignore[arg-type]
            for asked in (plain, replace(plain, wide_heads=True, floating=True, api="webgpu")):
                for beliefs, terms in (
                    (BELIEFS["decode"], decode_terms(asked)),
                    (BELIEFS["prefill"], prefill_terms(asked)),
                ):
                    names = [
                        name for part in (terms.bandwidth, terms.rate, terms.launch, terms.whole) for name, _ in part
                    ]
                    assert all(beliefs.knows(name) for name in names)
