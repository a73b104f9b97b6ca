"""This machine's own kernels: what their rates make of a model."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.devices.host import Host
from edgewise.devices.machine import Machine
from edgewise.devices.reading import Reading
from edgewise.models.known import of_words
from edgewise.models.outline import Outline, Stored
from edgewise.plan.fit import Estimate
from edgewise.plan.kernels import UNSURE, predict
from edgewise.plan.planner import Wish, make
from edgewise.plan.precision import PRECISIONS
from edgewise.plan.sites import ThisMachine
from edgewise.plan.speeds import shipped

RATES: Mapping[str, float] = {
    "read_bytes_per_s": 40e9,
    "fp32_mac_per_s": 100e9,
    "native_handover_s": 1e-6,
    "native_q4_decode_mac_per_s": 200e9,
    "native_q4_decode_bytes_per_s": 30e9,
    "native_q4_prefill_mac_per_s": 500e9,
    "native_q8_decode_mac_per_s": 150e9,
    "native_q8_decode_bytes_per_s": 35e9,
    "native_q8_prefill_mac_per_s": 450e9,
}
THIS = Machine(
    cpu="made up",
    system="Linux x86_64",
    cores=4,
    physical_cores=2,
    usable_cores=2,
    quota_cores=None,
    simd=("avx2", "avx512f"),
    cache_bytes=1 << 20,
    memory_bytes=16 << 30,
    memory_limit_bytes=None,
    available_bytes=8 << 30,
)
SMALL = of_words("SmolLM2-135M")
Q4, Q8 = PRECISIONS["q4_1"], PRECISIONS["q8_0"]


def host(changes: Mapping[str, float] | None = None, *, sure: float = 0.1, **machine: object) -> Host:
    """Rates times `changes`; readings reach `sure` to both sides. A rate times 0 was not measured."""
    figures = {}
    for name, usual in RATES.items():
        if value := usual * (changes or {}).get(name, 1):
            unit = "s" if name.endswith("handover_s") else "B/s" if "bytes" in name else "MAC/s"
            figures[name] = {2: Reading(unit, (value,), value, value * (1 - sure), value * (1 + sure))}
    at = msgspec.structs.replace(THIS, **machine)
    return Host(key="", date="", took_s=1.0, machine=at, figures=figures, unknown={})


def found(
    at: Host, model: Outline = SMALL, context: int = 512, prompt: int = 256, q: object = Q4
) -> tuple[Estimate, Estimate]:
    both = predict(at, model, q, context, prompt)  # type: ignore[arg-type]
    assert both is not None
    return both


@pytest.mark.parametrize("missing", ["native_handover_s", "native_q4_prefill_mac_per_s"])
def test_without_our_kernels_nothing_is_said(missing: str) -> None:
    assert predict(host({missing: 0}), SMALL, Q4, 512, 512) is None


def test_a_machine_that_is_always_the_same_is_still_not_quite_sure() -> None:
    for estimate in found(host(sure=0)):
        assert estimate.high / estimate.value == pytest.approx(UNSURE)
        assert estimate.value / estimate.low == pytest.approx(UNSURE)
    for loose, tight in zip(found(host(sure=0.3)), found(host(sure=0.1)), strict=True):
        assert loose.low < tight.low < tight.value < tight.high < loose.high
        assert loose.value == pytest.approx(tight.value)


def test_each_part_of_the_time_is_its_own_kernels() -> None:
    decode, prefill = (one.value for one in found(host()))
    moves = {  # twice as good: which of decode and prefill is faster
        "native_q4_decode_bytes_per_s": (True, False),
        "native_q8_decode_bytes_per_s": (False, False),
        "native_q4_decode_mac_per_s": (False, False),
        "native_q4_prefill_mac_per_s": (False, True),
        "native_q8_prefill_mac_per_s": (False, False),
        "read_bytes_per_s": (True, False),
        "fp32_mac_per_s": (False, True),
    }
    head_moves = {"native_q4_decode_bytes_per_s"}  # the head of a prompt's last token
    for name, expected in moves.items():
        faster = [one.value for one in found(host({name: 2}))]
        assert (faster[0] > decode) is expected[0], name
        assert (faster[1] > prefill) is (expected[1] or name in head_moves), name
    assert found(host({"native_handover_s": 2}))[0].value < decode


def test_eight_bits_run_on_the_kernels_of_eight_bits() -> None:
    body_and_head = (SMALL.body + SMALL.head) * 8.5 / 8
    slow, quick = (found(host({"native_q8_decode_bytes_per_s": times}), q=Q8)[0].value for times in (1, 2))
    assert 1 / slow - 1 / quick == pytest.approx(body_and_head / 70e9, rel=1e-6)
    assert found(host({"native_q4_decode_bytes_per_s": 9}), q=Q8) == found(host(), q=Q8)


def test_a_model_that_the_caches_hold_is_not_streamed() -> None:
    at = host(cache_bytes=1 << 30)
    assert found(at)[0].value > found(host())[0].value
    assert found(host({"native_q4_decode_bytes_per_s": 0.1}, cache_bytes=1 << 30))[0].value == found(at)[0].value


def test_a_file_is_taken_as_it_is_stored() -> None:
    fields = {name: getattr(SMALL, name) for name in SMALL.__slots__}
    stored = Outline(**{**fields, "stored": Stored(round(SMALL.body * 5 / 8), round(SMALL.head * 6.56 / 8), 0)})
    assert found(host(), stored, q=None)[0].value == pytest.approx(found(host())[0].value, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    model=st.sampled_from(["SmolLM2-135M", "Qwen2.5-1.5B", "Gemma-3-1B", "Qwen3-30B-A3B", "Gemma-3n-E2B", "7B"]),
    name=st.sampled_from(["q4_1", "q8_0", "int4"]),
    context=st.integers(1, 1 << 20),
    prompt=st.integers(1, 1 << 20),
    more=st.integers(1, 1 << 20),
    rate=st.sampled_from(sorted(RATES)),
    times=st.floats(1, 100),
)
def test_intervals_hold_their_value_and_better_is_never_slower(
    model: str, name: str, context: int, prompt: int, more: int, rate: str, times: float
) -> None:
    outline, q = of_words(model), PRECISIONS[name]
    plain = found(host(), outline, context, prompt, q)
    for estimate in plain:
        assert 0 < estimate.low < estimate.value < estimate.high
    better = found(host({rate: 1 / times if rate == "native_handover_s" else times}), outline, context, prompt, q)
    assert all(new.value >= old.value * (1 - 1e-9) for new, old in zip(better, plain, strict=True))
    longer = found(host(), outline, context + more, prompt, q)
    assert longer[0].value <= plain[0].value * (1 + 1e-9)
    assert longer[1] == plain[1]


def test_a_plan_for_this_machine_says_that_it_was_measured() -> None:
    plan = make(SMALL, ThisMachine(host()), shipped(), Wish(precision=Q4, context=512, prompt=256))
    assert (plan.device, plan.unit, plan.runtime, plan.fits) == ("host", "cpu", "edgewise", True)
    assert (plan.decode_tok_s, plan.prefill_tok_s) == found(host())
    assert plan.memory_bytes["available"] == 8 << 30
    assert any("our own kernels" in reason for reason in plan.reasons)
    other = make(SMALL, ThisMachine(host()), shipped(), Wish(precision=Q4, runtime="llama.cpp", context=512))
    assert other.runtime == "llama.cpp"
    assert not any("our own kernels" in reason for reason in other.reasons)
    assert other.assumed == ()
