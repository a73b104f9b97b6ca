"""Plans: a table of what fits what, what holds for all of them, and the arithmetic of this machine's own kernels."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.devices.catalogue import Catalogue, Device, Figure, Unit, shipped
from edgewise.devices.host import Host
from edgewise.devices.machine import this_machine
from edgewise.devices.reading import reading
from edgewise.errors import UsageError
from edgewise.models.known import family, of_size, of_words
from edgewise.models.outline import Outline, Stored
from edgewise.plan import kernels, mission
from edgewise.plan.fit import Estimate
from edgewise.plan.memory import GIB, needed
from edgewise.plan.planner import Plan, Wish, make
from edgewise.plan.precision import PRECISIONS, precision
from edgewise.plan.sites import Catalogued, ThisMachine
from edgewise.plan.speed import RUNTIMES, runtime_of
from edgewise.plan.speeds import shipped as speeds

Q4 = precision("q4_k_m")
SIZES = st.sampled_from([0.3, 1, 3, 7, 13, 34])
CONTEXTS = st.sampled_from([16, 512, 2048, 8192])
NAMES = st.sampled_from(
    ["jetson-orin-nano-8gb", "apple-m4", "raspberry-pi-5-8gb", "snapdragon-8-elite", "rtx-4060", "rk3588"]
)
CPUS = st.sampled_from(["apple-m4", "raspberry-pi-5-8gb", "snapdragon-8-elite", "rk3588", "desktop-ddr5-5600"])


def site(memory_gib: float | None = 8, bandwidth: float = 100.0) -> Catalogued:
    """A made-up GPU board."""

    def figure(value: float) -> Figure:
        return Figure(source="me", status="vendor", value=value)

    device = Device(
        name="Box",
        vendor="NVIDIA",
        kind="edge gpu",
        memory_gib=None if memory_gib is None else figure(memory_gib),
        bandwidth_gb_s=figure(bandwidth),
        power_w=figure(20),
        units=(Unit(unit="gpu", name="GPU", fp32_tflops=figure(2), fp16_tflops_dense=figure(10)),),
    )
    return Catalogued("box", device)


def known(name: str, **given: float) -> Catalogued:
    return Catalogued(*shipped().find(name), **given)  # type: ignore[arg-type]


def plan(model: str | Outline, at: Catalogued, **wishes: object) -> Plan:
    outline = of_words(model) if isinstance(model, str) else model
    return make(outline, at, speeds(), Wish(**wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "memory", "wishes", "fits"),
    [
        ("Llama-3.1-8B", 8, {"precision": Q4}, True),
        ("Llama-3.1-8B", 4, {"precision": Q4}, False),
        ("Llama-3.1-8B", 8, {"precision": precision("fp16")}, False),
        ("Llama-3.1-8B", 32, {"precision": precision("fp16")}, True),
        ("Llama-3.1-8B", 8, {"precision": Q4, "context": 131072}, False),
        ("Llama-3.1-8B", None, {}, None),
        ("SmolLM2-135M", 0.5, {}, False),
        ("SmolLM2-135M", 2, {}, True),
        ("Qwen3-30B-A3B", 16, {"precision": Q4}, False),
        ("Qwen3-30B-A3B", 32, {"precision": Q4}, True),
    ],
)
def test_what_fits_what(model: str, memory: float | None, wishes: dict[str, object], fits: bool | None) -> None:
    made = plan(model, site(memory), **wishes)
    assert made.fits is fits
    assert made.memory_bytes["available"] == (None if memory is None else round(memory * GIB * 0.85))
    assert bool(made.suggestions) or fits is not False or model == "SmolLM2-135M"


def test_an_answer_is_near_what_was_measured() -> None:
    """An 8B of 4 bits on a Jetson AGX Orin 64GB: 35.9 tok/s published; on a Raspberry Pi 5 some 2."""
    orin = plan("Llama-3.1-8B", known("jetson-agx-orin-64gb"), precision=precision("int4"), context=512)
    assert orin.decode_tok_s.low < 35.9 < orin.decode_tok_s.high
    assert 1 < plan("Llama-3.1-8B", known("Raspberry Pi 5"), precision=Q4, context=512).decode_tok_s.value < 3


def test_the_best_precision_is_the_finest_that_is_quick_enough() -> None:
    assert plan("Qwen2.5-3B", site(32), tok_s=1).best_precision == "q8_0"
    quick = plan("Qwen2.5-3B", site(32), tok_s=25).best_precision
    assert quick is not None
    assert PRECISIONS[quick].body < PRECISIONS["q8_0"].body
    assert plan("Qwen2.5-3B", site(32), tok_s=1000).best_precision == "q4_k_m"  # nothing below 4 bits
    assert plan("Llama-3.1-70B", site(8)).best_precision is None


def test_a_file_is_planned_as_it_is_stored() -> None:
    small = of_words("SmolLM2-135M")
    stored = Outline(**{f: getattr(small, f) for f in small.__slots__} | {"stored": Stored(60_000_000, 30_000_000, 0)})
    made = plan(stored, site())
    assert (made.precision, made.memory_bytes["weights"]) == ("as stored", 90_000_000)
    assert made.best_precision == "q8_0"


def test_what_is_offered_and_what_is_not() -> None:
    assert plan("1B", known("snapdragon-8-elite"), part="npu").runtime == "genie"
    assert plan("1B", known("apple-m4"), part="cpu", runtime="mlx").unit == "cpu"
    with pytest.raises(UsageError, match="offers nothing for the npu"):
        plan("1B", known("h100-sxm"), part="npu")
    with pytest.raises(UsageError, match="offers nothing"):
        plan("1B", known("apple-m4"), runtime="fastflowlm")


@pytest.mark.parametrize("wrong", [{"context": 0}, {"prompt": 0}, {"tok_s": 0.0}, {"tok_s": float("nan")}])
def test_wishes_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Wish(**wrong)  # type: ignore[arg-type]


@given(size=SIZES, name=NAMES, context=CONTEXTS)
def test_every_figure_is_finite_and_within_its_interval(size: float, name: str, context: int) -> None:
    made = plan(of_size("x", size * 1e9), known(name), context=context)
    for estimate in (made.decode_tok_s, made.prefill_tok_s, made.first_token_ms, made.joules_per_token):
        assert estimate is None or 0 < estimate.low < estimate.value < estimate.high < 1e9
    assert made.reasons
    assert msgspec.json.encode(made.as_json())


@given(size=SIZES, name=CPUS, factor=st.floats(1.01, 8))
def test_more_bandwidth_is_never_slower(size: float, name: str, factor: float) -> None:
    base = known(name).machine("cpu", "llama.cpp").bandwidth_gb_s
    outline = of_size("x", size * 1e9)
    slow, quick = (
        plan(outline, known(name, bandwidth_gb_s=base * times), part="cpu", precision=Q4) for times in (1, factor)
    )
    assert quick.decode_tok_s.value >= slow.decode_tok_s.value * (1 - 1e-9)


@given(size=SIZES, name=CPUS, context=CONTEXTS, more=st.integers(1, 100_000))
def test_more_context_never_takes_less_memory_and_is_never_faster(
    size: float, name: str, context: int, more: int
) -> None:
    outline = of_size("x", size * 1e9)
    short, long = (plan(outline, known(name), part="cpu", precision=Q4, context=n) for n in (context, context + more))
    assert (long.memory_bytes["need"] or 0) >= (short.memory_bytes["need"] or 0)
    assert long.decode_tok_s.value <= short.decode_tok_s.value * (1 + 1e-9)
    assert not (long.fits and not short.fits)


@given(size=SIZES, name=CPUS, memory=st.floats(0.1, 200), more=st.floats(0.1, 200))
def test_more_memory_never_makes_it_not_fit(size: float, name: str, memory: float, more: float) -> None:
    outline = of_size("x", size * 1e9)
    less, enough = (plan(outline, known(name, memory_gib=g), precision=Q4, part="cpu") for g in (memory, memory + more))
    assert not (less.fits and not enough.fits)


@given(size=SIZES, fine=st.sampled_from(sorted(PRECISIONS)), coarse=st.sampled_from(sorted(PRECISIONS)))
def test_finer_weights_never_take_less_memory(size: float, fine: str, coarse: str) -> None:
    a, b = PRECISIONS[fine], PRECISIONS[coarse]
    if a.body < b.body or a.head < b.head or a.table < b.table:
        return
    outline, ways = of_size("x", size * 1e9), runtime_of("llama.cpp", "cpu")
    assert needed(outline, a, ways, "cpu", 512).need >= needed(outline, b, ways, "cpu", 512).need


@given(memory=st.floats(1, 100))
def test_the_largest_that_fits_fits_and_the_next_does_not(memory: float) -> None:
    outline, at = of_words("Qwen2.5-7B"), site(memory)
    largest = make(outline, at, speeds()).largest
    names = [one.name for one in family(outline)]
    if largest is not None:
        coarsest = precision(largest["precision"])
        assert plan(largest["model"], at, precision=coarsest).fits
        larger = names[names.index(largest["model"]) + 1 :]
        assert not any(plan(name, at, precision=coarsest).fits for name in larger)
    else:
        assert not any(plan(name, at, precision=Q4).fits for name in names)


def test_every_runtime_is_found_by_its_own_name() -> None:
    for runtime in RUNTIMES:
        assert runtime_of(runtime.name, "npu").name == runtime.name
        assert all(name in PRECISIONS for name in runtime.precisions)


# This machine


def host(**rates: float) -> Host:
    machine = msgspec.structs.replace(this_machine(), cache_bytes=1 << 20, usable_cores=2, simd=("avx2", "avx512_bf16"))
    names = {
        "read_bytes_per_s": 40e9,
        "fp32_mac_per_s": 100e9,
        "native_handover_s": 0.5e-6,
        "native_q4_decode_mac_per_s": 250e9,
        "native_q4_decode_bytes_per_s": 30e9,
        "native_q4_prefill_mac_per_s": 500e9,
        "native_q8_decode_mac_per_s": 170e9,
        "native_q8_decode_bytes_per_s": 32e9,
        "native_q8_prefill_mac_per_s": 500e9,
    } | rates
    figures = {name: {2: reading(name, [0.9 * value, value, 1.1 * value])} for name, value in names.items() if value}
    return Host(key="", date="", took_s=1, machine=machine, figures=figures, unknown={})


def decode(found: tuple[Estimate, Estimate] | None) -> float:
    assert found is not None
    return found[0].value


def test_our_own_speed_follows_from_our_kernels_alone() -> None:
    model = of_words("SmolLM2-135M")
    q4 = precision("q4_1")
    plain = kernels.predict(host(), model, q4, 512, 512)
    assert plain is not None
    assert all(one.low < one.value < one.high for one in plain)
    body, head = model.body * q4.body / 8 / 30e9, model.head * q4.head / 8 / 30e9
    assert 1 / plain[0].value == pytest.approx(body + head, rel=0.25)  # and little besides
    assert plain[1].value == pytest.approx(500e9 / model.body, rel=0.35)
    for name in ("native_q4_decode_bytes_per_s", "read_bytes_per_s"):
        assert decode(kernels.predict(host(**{name: 60e9}), model, q4, 512, 512)) > plain[0].value
    assert decode(kernels.predict(host(native_handover_s=5e-6), model, q4, 512, 512)) < plain[0].value
    assert decode(kernels.predict(host(), model, q4, 4096, 512)) < plain[0].value


def test_without_our_kernels_the_fitted_speeds_tell() -> None:
    bare = host(native_handover_s=0, native_q4_prefill_mac_per_s=0)
    assert kernels.predict(bare, of_words("1B"), Q4, 512, 512) is None
    made = make(of_words("1B"), ThisMachine(bare), speeds())
    assert made.runtime == "edgewise"
    assert made.decode_tok_s.value > 0


def test_what_cannot_be_had_on_this_machine_does_not_fit() -> None:
    assert make(of_words("70B"), ThisMachine(host(), memory_gib=8), speeds()).fits is False
    free = msgspec.structs.replace(host().machine, available_bytes=None)
    unknown = msgspec.structs.replace(host(), machine=free)
    assert make(of_words("1B"), ThisMachine(unknown), speeds()).fits is None


def test_the_guides_table_has_a_verdict_on_each_figure() -> None:
    rows = mission.table(shipped(), speeds())
    assert len(rows) == 12
    for row in rows:
        assert row["predicted"]["low"] < row["predicted"]["value"] < row["predicted"]["high"]
        assert row["verdict"] in ("right", "wrong", "unsourced")
        if row["figure"] == "throughput":
            assert row["predicted"]["value"] < row["ceiling"]["int4"]
            assert row["ceiling"]["fp16"] < row["ceiling"]["int4"]
    assert mission.table(Catalogue(sources={}, devices={}), speeds()) == []
