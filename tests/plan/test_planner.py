"""Plans: what they tell is so. Figures of single devices are in test_roofline.py."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.devices.catalogue import Device, Figure, Unit, shipped
from edgewise.errors import UsageError
from edgewise.models.known import family, of_size, of_words
from edgewise.models.outline import Outline, Stored
from edgewise.plan.memory import GIB, needed
from edgewise.plan.planner import Plan, Wish, make
from edgewise.plan.precision import PRECISIONS
from edgewise.plan.sites import Catalogued
from edgewise.plan.speed import RUNTIMES, runtime_of
from edgewise.plan.speeds import shipped as speeds

Q4 = PRECISIONS["q4_k_m"]
DEVICES = sorted(shipped().devices)
RICH = ["apple-m4", "snapdragon-8-elite", "rk3588", "jetson-orin-nano-8gb", "rtx-4060", "intel-lunar-lake-258v"]
MODELS = ["Llama-3.1-8B", "Gemma-2-9B", "Qwen3-30B-A3B", "Gemma-3n-E2B", "SmolLM2-360M", "Phi-3-mini", "2B"]
LADDER = ["fp32", "fp16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
quick = settings(deadline=None, max_examples=15)


def figure(value: float) -> Figure:
    return Figure(source="me", status="vendor", value=value)


def box(
    memory: float | None = 8, *, bandwidth: float | None = 100, tflops: float | None = 2, **more: Any
) -> Catalogued:
    """A made-up board with a CPU and a GPU, whose figures may be unknown."""
    rate = None if tflops is None else figure(tflops)
    device = Device(
        name="Box",
        vendor="Maker",
        kind="single board",
        memory_gib=None if memory is None else figure(memory),
        bandwidth_gb_s=None if bandwidth is None else figure(bandwidth),
        units=(
            Unit(unit="cpu", name="CPU", int8_tops_dense=None if tflops is None else figure(tflops / 4)),
            Unit(unit="gpu", name="GPU", fp32_tflops=rate, fp16_tflops_dense=rate),
        ),
        **more,
    )
    return Catalogued("box", device)


def known(name: str, **changes: Any) -> Catalogued:
    return Catalogued(*shipped().find(name), **changes)


def plan(model: str | Outline, at: Catalogued, **wishes: Any) -> Plan:
    return make(of_words(model) if isinstance(model, str) else model, at, speeds(), Wish(**wishes))


def test_as_json_has_the_keys_that_programs_read() -> None:
    told = json.loads(json.dumps(plan("7B", box(), context=512).as_json()))
    assert {"fits", "memory_bytes", "decode_tok_s", "prefill_tok_s", "first_token_ms", "reasons"} <= set(told)
    for name in ("decode_tok_s", "prefill_tok_s", "first_token_ms"):
        assert set(told[name]) == {"value", "low", "high"}
        assert told[name]["low"] < told[name]["value"] < told[name]["high"]
    parts = ("weights", "kv", "activations", "runtime")
    assert set(told["memory_bytes"]) == {*parts, "tables", "need", "available"}
    assert told["memory_bytes"]["need"] == sum(told["memory_bytes"][part] for part in parts)
    assert all(isinstance(reason, str) and reason for reason in told["reasons"])


@pytest.mark.parametrize(
    ("model", "device", "precision", "context", "fits"),
    [
        ("7B", "raspberry-pi-5-8gb", "q4_k_m", 2048, True),
        ("7B", "raspberry-pi-4-8gb", "q4_k_m", 2048, True),
        ("7B", "raspberry-pi-5-8gb", "q8_0", 2048, False),
        ("7B", "jetson-orin-nano-8gb", "q4_k_m", 2048, True),
        ("13B", "jetson-orin-nano-8gb", "q4_k_m", 2048, False),
        ("Llama-2-7B", "rtx-4060", "q4_0", 4096, True),
        ("Llama-2-7B", "rtx-4060", "fp16", 512, False),
        ("Llama-3.1-8B", "apple-a16", "q4_0", 512, False),
        ("Llama-3.1-70B", "rtx-4090", "q4_0", 512, False),
        ("Llama-3.1-70B", "jetson-agx-orin-64gb", "q4_0", 512, True),
        ("SmolLM2-135M", "hailo-8", "int4", 16, False),  # no memory of its own
        ("SmolLM2-135M", "coral-edge-tpu", "int8", 16, False),
        ("SmolLM2-135M", "snapdragon-8-gen-1", "q4_0", 16, None),  # nobody published its memory
        ("Llama-3.1-70B", "desktop-ddr5-5600", "fp16", 512, None),
    ],
)
def test_what_fits_the_catalogued(model: str, device: str, precision: str, context: int, fits: bool | None) -> None:
    made = plan(model, known(device), precision=PRECISIONS[precision], context=context)
    assert made.fits is fits
    assert (made.memory_bytes["available"] is None) is (fits is None)


def test_seven_billion_of_four_bits_fit_eight_gigabytes_and_not_four() -> None:
    for part in ("cpu", "gpu"):
        assert plan("7B", box(8), precision=Q4, part=part).fits is True
        assert plan("7B", box(4), precision=Q4, part=part).fits is False


def test_what_is_not_known_is_assumed_aloud() -> None:
    blind = plan("7B", box(None, bandwidth=None, tflops=None), part="gpu")
    assert blind.fits is None
    assert blind.largest is None
    assert blind.joules_per_token is None
    words = " ".join(blind.assumed)
    assert all(what in words for what in ("bandwidth", "rate of one token", "rate of a prompt", "usual proportions"))
    assert plan("Llama-3.1-8B", box(), part="gpu").assumed == ()


@pytest.mark.parametrize("id", DEVICES)
def test_every_catalogued_device_has_an_answer(id: str) -> None:
    at = Catalogued(id, shipped().devices[id])
    if not at.parts():
        with pytest.raises(UsageError, match="offers nothing for language models"):
            plan("1B", at)
        return
    made = plan("1B", at)
    assert (made.unit, made.runtime) in at.parts()
    assert made.best_precision is None or PRECISIONS[made.best_precision].body >= 4
    for one in (made.decode_tok_s, made.prefill_tok_s, made.first_token_ms):
        assert 0 < one.low < one.value < one.high
        assert math.isfinite(one.high)
    bound = at.machine(made.unit, made.runtime).bandwidth_gb_s * 1e9 / made.streamed_bytes_per_token
    assert made.decode_tok_s.value < bound


def test_wishes_are_honoured() -> None:
    made = plan("Llama-3.2-3B", box(), part="cpu", runtime="mlc", precision=PRECISIONS["q6_k"], context=77, prompt=99)
    assert (made.unit, made.runtime, made.precision, made.context) == ("cpu", "mlc", "q6_k", 77)
    assert made.first_token_ms.value == pytest.approx(99e3 / made.prefill_tok_s.value)
    assert made.first_token_ms.high == pytest.approx(99e3 / made.prefill_tok_s.low)
    own = plan("Llama-3.2-3B", box(), part="gpu", runtime="A runtime of my own (v2)", precision=Q4)
    assert own.runtime == "A runtime of my own (v2)"
    for part, runtime in (("npu", None), ("cpu", "fastflowlm")):
        with pytest.raises(UsageError, match=r"Box offers nothing.*it has: cpu \(llama\.cpp\), gpu \(llama\.cpp\)"):
            plan("1B", box(), part=part, runtime=runtime)


@pytest.mark.parametrize("wrong", [{"context": 1 << 25}, {"prompt": -5}, {"tok_s": math.inf}, {"tok_s": -1.0}])
def test_wishes_beyond_reason_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="allowed"):
        Wish(**wrong)  # type: ignore[arg-type]


def test_a_file_is_planned_as_stored_unless_a_precision_is_wished() -> None:
    stored = replace(of_words("Llama-3.2-3B"), stored=Stored(1_500_000_000, 300_000_000, 0))
    made = plan(stored, box())
    assert (made.precision, made.memory_bytes["weights"], made.best_precision) == ("as stored", 1_800_000_000, "q8_0")
    wished = plan(stored, box(), precision=PRECISIONS["q8_0"])
    assert wished.precision == "q8_0"
    assert wished.memory_bytes["weights"] == pytest.approx(stored.total * 8.5 / 8, rel=1e-6)
    assert wished.as_json() == plan(replace(stored, stored=None), box(), precision=PRECISIONS["q8_0"]).as_json()


def test_a_graph_of_fixed_shape_reads_all_of_its_cache() -> None:
    at = known("snapdragon-8-elite")
    short, full, long = (plan("Llama-3.2-3B", at, part="npu", runtime="genie", context=n) for n in (16, 2048, 8192))
    assert short.decode_tok_s == full.decode_tok_s
    assert short.memory_bytes == full.memory_bytes
    assert long.decode_tok_s.value < full.decode_tok_s.value
    assert long.memory_bytes["kv"] == 4 * (full.memory_bytes["kv"] or 0)
    cache = of_words("Llama-3.2-3B").kv_values_read(2048)
    assert long.streamed_bytes_per_token - full.streamed_bytes_per_token == 3 * cache


@pytest.mark.parametrize(("model", "memory"), [("Gemma-2-9B", 9.0), ("Llama-3.1-8B", 7.5)])
def test_a_shorter_context_that_is_named_is_the_longest_that_fits(model: str, memory: float) -> None:
    """Also where windows make a late token cheaper than an early one."""
    made = plan(model, box(memory), precision=Q4, part="gpu", context=30_000)
    (told,) = (found[1] for c in made.changes if (found := re.fullmatch(r"a context of (\d+) tokens", c)))
    fits = [plan(model, box(memory), precision=Q4, part="gpu", context=int(told) + n).fits for n in (0, 1)]
    assert fits == [True, False]


@quick
@given(model=st.sampled_from(MODELS), memory=st.floats(0.5, 40), context=st.integers(16, 1 << 17))
def test_what_would_have_to_change_is_enough(model: str, memory: float, context: int) -> None:
    at = box(memory)
    made = plan(model, at, precision=PRECISIONS["q8_0"], context=context, part="gpu")
    need, available = (made.memory_bytes[name] or 0 for name in ("need", "available"))
    assert made.fits is (need <= available)
    assert any("more memory" in change for change in made.changes) is not made.fits
    for change in made.changes:
        if fewer := re.fullmatch(r"a context of (\d+) tokens", change):
            n = int(fewer[1])
            assert plan(model, at, precision=PRECISIONS["q8_0"], context=n, part="gpu").fits
            assert not plan(model, at, precision=PRECISIONS["q8_0"], context=n + 1, part="gpu").fits
        if coarser := re.fullmatch(r"the precision (\w+)", change):
            assert plan(model, at, precision=PRECISIONS[coarser[1]], context=context, part="gpu").fits
    for suggestion in made.suggestions:
        if split := re.match(r"split: the first (\d+) of (\d+) layers", suggestion):
            assert not made.fits
            assert 0 < int(split[1]) < int(split[2]) == of_words(model).layers


@quick
@given(
    model=st.sampled_from(MODELS),
    name=st.sampled_from(RICH),
    memory=st.floats(0.2, 100),
    more=st.floats(0.01, 100),
    context=st.integers(1, 1 << 15),
)
def test_more_memory_never_makes_it_not_fit_whatever_is_chosen(
    model: str, name: str, memory: float, more: float, context: int
) -> None:
    less, enough = (plan(model, known(name, memory_gib=gib), context=context) for gib in (memory, memory + more))
    assert not (less.fits and not enough.fits)
    if less.fits:
        assert less.precision == less.best_precision
        assert less.memory_bytes["need"] <= less.memory_bytes["available"]  # type: ignore[operator]
    totals = [0 if one.largest is None else of_words(one.largest["model"]).total for one in (less, enough)]
    if (less.unit, less.runtime) == (enough.unit, enough.runtime):
        assert totals[0] <= totals[1]


@quick
@given(
    model=st.sampled_from(MODELS),
    bandwidth=st.floats(1, 3000),
    tflops=st.floats(0.1, 300),
    more=st.floats(1, 100),
    part=st.sampled_from(["cpu", "gpu"]),
    precision=st.sampled_from(LADDER),
)
def test_a_better_machine_is_never_slower(
    model: str, bandwidth: float, tflops: float, more: float, part: str, precision: str
) -> None:
    wish: dict[str, Any] = {"part": part, "precision": PRECISIONS[precision]}
    plain = plan(model, box(bandwidth=bandwidth, tflops=tflops), **wish)
    for better in (box(bandwidth=bandwidth * more, tflops=tflops), box(bandwidth=bandwidth, tflops=tflops * more)):
        made = plan(model, better, **wish)
        assert made.decode_tok_s.value >= plain.decode_tok_s.value * (1 - 1e-9)
        assert made.prefill_tok_s.value >= plain.prefill_tok_s.value * (1 - 1e-9)


@quick
@given(
    model=st.sampled_from(MODELS),
    name=st.sampled_from(RICH),
    context=st.integers(1, 1 << 18),
    more=st.integers(1, 1 << 18),
    index=st.integers(0, 2),
)
def test_more_context_never_takes_less_and_is_never_faster(
    model: str, name: str, context: int, more: int, index: int
) -> None:
    at = known(name)
    part, runtime = at.parts()[index % len(at.parts())]
    wish: dict[str, Any] = {"part": part, "runtime": runtime, "precision": Q4}
    short, long = (plan(model, at, context=n, **wish) for n in (context, context + more))
    assert long.memory_bytes["need"] >= short.memory_bytes["need"]  # type: ignore[operator]
    assert long.decode_tok_s.value <= short.decode_tok_s.value * (1 + 1e-9)
    assert long.streamed_bytes_per_token >= short.streamed_bytes_per_token
    assert not (long.fits and not short.fits)


@quick
@given(
    model=st.sampled_from(MODELS),
    runtime=st.sampled_from([runtime.name for runtime in RUNTIMES]),
    names=st.lists(st.sampled_from(LADDER), min_size=2, max_size=2, unique=True).map(
        lambda two: sorted(two, key=LADDER.index)
    ),
    context=st.integers(1, 1 << 18),
)
def test_finer_weights_never_take_less_memory(model: str, runtime: str, names: list[str], context: int) -> None:
    ways, outline = runtime_of(runtime, "npu"), of_words(model)
    fine, coarse = (needed(outline, PRECISIONS[name], ways, "npu", context) for name in names)
    assert fine.need >= coarse.need
    assert fine.tables >= coarse.tables or ways.table_apart  # floating weights share the table there


@quick
@given(model=st.sampled_from(["Qwen2.5-7B", "Llama-3.1-8B", "Gemma-2-2B", "3B"]), memory=st.floats(0.3, 80))
def test_the_largest_that_fits_really_fits_and_the_next_does_not(model: str, memory: float) -> None:
    at = box(memory)
    made = plan(model, at, part="gpu")
    larger = [one for one in family(of_words(model)) if one.context >= made.context]
    if made.largest is not None:
        coarsest = PRECISIONS[made.largest["precision"]]
        (found,) = (one for one in larger if one.name == made.largest["model"])  # type: ignore[index]
        assert plan(found, at, part="gpu", precision=coarsest).fits
        larger = [one for one in larger if one.total > found.total]
    assert not any(plan(one, at, part="gpu", precision=Q4).fits for one in larger)


def test_the_more_is_wanted_the_coarser_the_best_precision() -> None:
    best = [plan("3B", box(16), part="gpu", tok_s=want).best_precision for want in (0.1, 20, 25, 30, 1000)]
    bodies = [PRECISIONS[name].body for name in best if name]
    assert bodies == sorted(bodies, reverse=True)
    assert (best[0], best[-1]) == ("q8_0", "q4_k_m")
    assert any("times the speed for the wanted 1000 tok/s" in c for c in plan("3B", box(16), tok_s=1000.0).changes)


def test_what_is_too_slow_has_a_smaller_relative_to_begin_with() -> None:
    made = plan("Qwen2.5-32B", box(8), precision=Q4)
    assert made.largest is not None
    assert of_words(made.largest["model"]).total < of_words("Qwen2.5-32B").total
    assert any(
        s.startswith(f"cascade: {made.largest['model']} ({made.largest['precision']})") for s in made.suggestions
    )
    assert plan("Qwen2.5-0.5B", box(8), precision=Q4).suggestions == ()


def test_energy_is_power_for_the_time_of_a_token() -> None:
    made = plan("1B", box(power_w=figure(20)))
    assert made.joules_per_token is not None
    assert made.joules_per_token.value == pytest.approx(20 / made.decode_tok_s.value)
    assert made.joules_per_token.low == pytest.approx(20 / made.decode_tok_s.high)


def test_a_context_beyond_the_models_own_is_said() -> None:
    assert any("was made for 4096" in r for r in plan("Llama-2-7B", box(), context=8192).reasons)
    assert not any("was made for" in r for r in plan("Llama-2-7B", box(), context=4096).reasons)


def test_the_memory_to_be_had_is_what_the_system_leaves() -> None:
    whole = known("apple-m4", memory_gib=16)
    assert (whole.room("gpu").available or 0) < 16 * GIB
    assert box(None).room("cpu").available is None
    assert known("hailo-8").room("npu").available == 0
    assert (known("hailo-8", memory_gib=8).room("npu").available or 0) > 7 * GIB


def test_guessed_shapes_have_guessed_relatives() -> None:
    made = plan(of_size("mine", 2e9), box(8), part="gpu")
    assert made.largest is not None
    assert re.fullmatch(r"[\d.]+B", made.largest["model"])


def test_planning_loads_no_runtime() -> None:
    code = (
        "import sys, edgewise.plan.planner, edgewise.plan.sites, edgewise.plan.speeds, edgewise.models.described;"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"onnxruntime", "torch", "xllamacpp", "tokenizers", "transformers", "onnx"} & set(out.split())
