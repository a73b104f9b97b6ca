"""What the speed of a model on a device depends on, and the formula.

    decode:   time of a token = (√(memory² + compute²) + launches) · whole
                memory   = bytes read / (share · peak bandwidth)
                compute  = operations / (share · peak rate)
                launches = layers · time to launch one
    prefill:  time of a token = operations / (share · peak rate) · whole

Reading and multiplying overlap as two legs of a triangle do: the longer one decides, and the other still shows. The
shares, the launch time and `whole` are what fit.py learns. The logarithm of each is a sum of effects (of the kind of
unit, of the runtime, …), so that what nobody measured is predicted from what is like it. A `Situation` is all the rest.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal, NamedTuple

import msgspec

from edgewise.devices.catalogue import Device, Figure
from edgewise.devices.catalogue import Unit as CataloguedUnit
from edgewise.models.outline import Outline, Stored
from edgewise.plan.precision import Precision, streamed, weigh

Part = Literal["cpu", "gpu", "npu"]  # of a device, as users name it
Unit = Literal["cpu", "cuda", "metal", "gpu", "npu"]  # parts that are programmed alike; gpu = of phones and laptops
Kind = Literal["phone", "laptop", "mac", "desktop", "board", "edge gpu", "server", "accelerator"]

CONTEXT: Final = 512  # tokens before the one that is timed, and in a prompt: what most published rows have
DECODE_CORES: Final = 4  # the fastest; more wait for each other
VECTOR_TOPS: Final = 0.032  # of a vector of 128 bits each ns: 16 8-bit multiply-adds
READ_SHARE: Final = 0.75  # of the peak bandwidth that a loop of reads measures; our own
WIDE_HEAD: Final = 128  # dimensions; kernels of attention are tuned for that many or fewer


class Runtime(msgspec.Struct, frozen=True):
    """What a runtime does that changes the arithmetic. `words` find it in what people write."""

    name: str
    words: str = ""
    drives: tuple[Unit, ...] = ()  # empty = everything
    matrix_units: bool = True  # its GPU kernels use them, where there are any
    static_cache: int = 0  # positions of a graph of fixed shape, which reads its whole cache; 0 = only what is filled
    kv_bits: int = 16
    table_apart: bool = False  # quantized models keep a table for looking up beside a head that is tied to it
    skips_shared: bool = False  # a prompt passes only the layers that make keys and values
    maps_tables: bool = False  # tables that tokens are looked up in stay in the file, of which a few rows are read
    precisions: tuple[str, ...] = ("int8", "int4")  # that models are had in for it, the finest that pays first


GGUF: Final = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
RUNTIMES: Final = (
    Runtime("fastflowlm", "fastflow", drives=("npu",), precisions=("q4_1",)),
    Runtime("llama.cpp", r"llama\.?cpp|ollama|lm studio", maps_tables=True, precisions=GGUF),
    Runtime("tensorrt", r"tensorrt|\btrt|edge-?llm", precisions=("fp16", "fp8", "int4_g128")),
    Runtime("genie", "genie|qnn|qairt", static_cache=2048, kv_bits=8, precisions=("w4a16",)),
    Runtime("executorch", "executorch", table_apart=True, maps_tables=True, precisions=("bf16", "8da4w")),
    Runtime("litert", "litert|mediapipe", matrix_units=False, skips_shared=True, maps_tables=True),
    Runtime("mlc", r"\bmlc"),
    Runtime("rkllm", "rkllm|rknn", precisions=("w8a8", "w4a16")),
    Runtime("mlx", r"\bmlx"),
    Runtime("vllm", "vllm", precisions=("fp16", "fp8", "int4_g128")),
    Runtime("openvino", "openvino"),
    Runtime("onnxruntime", "onnx ?runtime|ort[- ]?genai"),
    Runtime("edgewise", "edgewise", maps_tables=True, precisions=("q8_0", "q4_1", "int4")),
)


def runtime_of(text: str, unit: Unit) -> Runtime:
    """The runtime that people mean by that text; one that we do not know has no ways of its own."""
    plain = text.lower()
    for runtime in RUNTIMES:
        if re.search(runtime.words, plain) and unit in (runtime.drives or (unit,)):
            return runtime
    return Runtime(re.split(r"[/(]", plain)[0].strip() or "unknown")


def drives(text: str, unit: Unit) -> bool:
    """Whether the runtime that people mean by that text runs on such a unit; one that we do not know may."""
    meant = next((runtime for runtime in RUNTIMES if re.search(runtime.words, text.lower())), None)
    return meant is None or unit in (meant.drives or (unit,))


class Machine(msgspec.Struct, frozen=True):
    """One unit of a device in the numbers that the formula takes: 10⁹ bytes and 10¹² operations a second at their peak.
    `assumed` names those that are only typical of its kind."""

    device: str
    kind: Kind
    unit: Unit
    bandwidth_gb_s: float
    decode_tops: float  # that one token can use; 0 = never the limit
    prefill_tops: float
    assumed: tuple[str, ...] = ()


class Typical(msgspec.Struct, frozen=True):
    """A usual device of a kind, for figures that nobody gave. GPU rates go with the bandwidth, as makers balance the
    two: TFLOPS for each GB/s, in fp32 and in matrix units."""

    bandwidth_gb_s: float
    decode_vectors_per_ns: float
    vectors_per_ns: float
    gpu: float
    matrix: float


TYPICAL: Final[dict[Kind, Typical]] = {
    "phone": Typical(68, 32, 48, 0.042, 0.042),
    "laptop": Typical(120, 75, 140, 0.033, 0.1),
    "mac": Typical(120, 65, 120, 0.036, 0.036),
    "desktop": Typical(360, 75, 180, 0.05, 0.15),
    "board": Typical(34, 19, 26, 0.015, 0.015),
    "edge gpu": Typical(102, 16, 30, 0.02, 0.18),
    "server": Typical(2000, 70, 300, 0.015, 0.25),
    "accelerator": Typical(34, 19, 26, 0.015, 0.015),
}
TYPICAL_NPU_TOPS: Final = 40.0
KINDS: Final[dict[str, Kind]] = {  # of the catalogue
    "phone soc": "phone",
    "laptop soc": "laptop",
    "desktop": "desktop",
    "single board": "board",
    "edge gpu": "edge gpu",
    "server gpu": "server",
    "accelerator": "accelerator",
}


def machine_of(id: str, device: Device, part: Part, runtime: str, *, bandwidth_gb_s: float | None = None) -> Machine:
    """The part of a catalogued device, under that runtime, also one that the catalogue does not know to be there;
    `bandwidth_gb_s` replaces the catalogue's."""
    unit = unit_of(part, nvidia=device.vendor == "NVIDIA", apple=device.vendor == "Apple")
    matrix = runtime_of(runtime, unit).matrix_units
    found = next((u for u in device.units if u.unit == part), None)
    # One memory system from laptop to workstation, and no PC's: Apple's computers are a kind of their own.
    kind: Kind = "mac" if device.vendor == "Apple" and device.kind != "phone soc" else KINDS[device.kind]
    return completed(
        id,
        kind,
        unit,
        bandwidth_gb_s=bandwidth_gb_s or _bandwidth(device),
        decode_tops=None if found is None else _decode_tops(found),
        prefill_tops=None if found is None else _prefill_tops(found, matrix),
        matrix_units=matrix,
    )


def unit_of(part: Part, *, nvidia: bool, apple: bool) -> Unit:
    if part != "gpu":
        return part
    return "cuda" if nvidia else "metal" if apple else "gpu"


def completed(
    device: str,
    kind: Kind,
    unit: Unit,
    *,
    bandwidth_gb_s: float | None = None,
    decode_tops: float | None = None,
    prefill_tops: float | None = None,
    matrix_units: bool = True,
) -> Machine:
    """A machine of which some figures are not known: those of a typical one of its kind stand in."""
    bandwidth = bandwidth_gb_s or TYPICAL[kind].bandwidth_gb_s
    decode, prefill = _typical_tops(TYPICAL[kind], unit, bandwidth, matrix_units)
    unknown = {
        "bandwidth": bandwidth_gb_s is None,
        "rate of one token": decode_tops is None and decode > 0,
        "rate of a prompt": prefill_tops is None,
    }
    return Machine(
        device=device,
        kind=kind,
        unit=unit,
        bandwidth_gb_s=bandwidth,
        decode_tops=decode_tops or decode,
        prefill_tops=prefill_tops or prefill,
        assumed=tuple(name for name, is_unknown in unknown.items() if is_unknown),
    )


def _typical_tops(typical: Typical, unit: Unit, bandwidth_gb_s: float, matrix_units: bool) -> tuple[float, float]:
    """Of one token and of a prompt. An NPU multiplies whole matrices at once: one token never waits for that."""
    if unit == "cpu":
        return typical.decode_vectors_per_ns * VECTOR_TOPS, typical.vectors_per_ns * VECTOR_TOPS
    if unit == "npu":
        return 0.0, TYPICAL_NPU_TOPS
    matrix = typical.matrix if matrix_units else typical.gpu
    return typical.gpu * bandwidth_gb_s, matrix * bandwidth_gb_s


def _bandwidth(device: Device) -> float | None:
    if device.bandwidth_gb_s is not None:
        return device.bandwidth_gb_s.least
    return None if device.read_gb_s is None else device.read_gb_s.least / READ_SHARE


def _decode_tops(unit: CataloguedUnit) -> float | None:
    if unit.unit == "cpu":
        return _cpu_tops(unit, DECODE_CORES)
    return None if unit.unit == "npu" else _least(unit.fp32_tflops)


def _prefill_tops(unit: CataloguedUnit, matrix_units: bool) -> float | None:
    if unit.unit == "cpu":
        return _cpu_tops(unit, None)
    if unit.unit == "npu":
        return _least(unit.int8_tops_dense or unit.tops)
    return _least(unit.fp16_tflops_dense if matrix_units and unit.fp16_tflops_dense else unit.fp32_tflops)


def _cpu_tops(unit: CataloguedUnit, cores: int | None) -> float | None:
    """8-bit operations, from the clusters or as measured."""
    if unit.clusters is None:
        return _least(unit.int8_tops_dense)
    return unit.clusters.vectors_per_ns(cores) * VECTOR_TOPS


def _least(figure: Figure | None) -> float | None:
    return None if figure is None else figure.least


class Situation(msgspec.Struct, frozen=True):
    """All that speed depends on besides what is fitted. Operations are two to a multiply-add."""

    machine: Machine
    runtime: str
    layers: int
    bytes_per_token: float
    ops_per_token: float
    ops_per_prompt_token: float
    floating: bool  # weights of 16 bits or more
    wide_heads: bool
    api: str = ""  # "webgpu", or "" for the unit's own


def situation(
    outline: Outline,
    precision: Precision | None,
    machine: Machine,
    runtime: str,
    *,
    context: int = CONTEXT,
    prompt: int = CONTEXT,
    weight_bytes: float | None = None,
    api: str = "",
) -> Situation:
    """A model at a precision (None: as its file has it) on a machine. `context` is how many tokens stand before the one
    that is timed, `weight_bytes` what it reads of the weights, if that is known better than we can tell."""
    ways = runtime_of(runtime, machine.unit)
    positions = max(context, ways.static_cache)
    if weight_bytes is None:
        weight_bytes = streamed(outline, weights(outline, precision, ways))
    cache = outline.kv_values_read(positions) * ways.kv_bits / 8
    passed = 1 - outline.kv_shared_layers / outline.layers if ways.skips_shared else 1.0
    prompt_macs = outline.macs_per_token(prompt // 2) - outline.head  # only its last token meets the head
    return Situation(
        machine=machine,
        runtime=ways.name,
        layers=outline.layers,
        bytes_per_token=weight_bytes + cache,
        ops_per_token=2.0 * outline.macs_per_token(positions),
        ops_per_prompt_token=2 * passed * prompt_macs,
        floating=precision is not None and precision.floating,
        wide_heads=outline.head_dim > WIDE_HEAD,
        api=api,
    )


def weights(outline: Outline, precision: Precision | None, runtime: Runtime) -> Stored:
    """Bytes of the model as that runtime keeps it."""
    apart = runtime.table_apart and precision is not None and not precision.floating
    return weigh(outline, precision, table_apart=apart)


Effects = tuple[tuple[str, float], ...]  # names of what is fitted, and how often each counts


class Terms(NamedTuple):
    """A situation as the formula takes it: times in ms at the peak, and which effects move what."""

    memory_ms: float
    compute_ms: float
    launches: float
    bandwidth: Effects  # the share of it that is reached
    rate: Effects  # likewise
    launch: Effects  # ms of one
    whole: Effects


def decode_terms(s: Situation) -> Terms:
    """NPUs have no compute term, and their kernels of attention mind no wide heads."""
    m, api = s.machine, f" {s.api}" if s.api else ""
    family = m.unit if m.unit in ("cpu", "npu") else "gpu"
    path = f"{s.runtime} {family}{api}"
    rate = _each(f"rate/unit/{family}", f"rate/runtime/{path}") if m.decode_tops else ()
    wide = _each("whole/wide/heads") if s.wide_heads and family != "npu" else ()
    return Terms(
        memory_ms=s.bytes_per_token / m.bandwidth_gb_s / 1e6,
        compute_ms=s.ops_per_token / m.decode_tops / 1e9 if m.decode_tops else 0.0,
        launches=s.layers,
        bandwidth=_each(f"bandwidth/unit/{m.unit}", f"bandwidth/runtime/{s.runtime}", f"bandwidth/kind/{m.kind}"),
        rate=rate,
        launch=_each(f"launch/unit/{m.unit}", f"launch/runtime/{path}"),
        whole=(*wide, *_each(f"whole/device/{m.device} {m.unit} {s.runtime}")),
    )


REFERENCE_TOPS: Final[dict[Unit, float]] = {"cpu": 2, "cuda": 100, "metal": 8, "gpu": 4, "npu": 20}


def prefill_terms(s: Situation) -> Terms:
    """`rate/size` is how much of a larger unit's rate is lost: a prompt of a few hundred tokens does not fill it."""
    m = s.machine
    size = math.log(m.prefill_tops / REFERENCE_TOPS[m.unit])
    rate = _each(
        f"rate/unit/{m.unit}",
        f"rate/runtime/{s.runtime}",
        f"rate/pair/{s.runtime} {m.unit}",
        f"rate/kind/{m.kind}",
        *(["rate/floating/cpu"] if s.floating and m.unit == "cpu" else []),
        *([f"rate/api/{s.api}"] if s.api else []),
    )
    return Terms(
        memory_ms=0.0,
        compute_ms=s.ops_per_prompt_token / m.prefill_tops / 1e9,
        launches=0.0,
        bandwidth=(),
        rate=(*rate, (f"rate/size/{m.unit}", size)),
        launch=(),
        whole=_each(f"whole/device/{m.device} {m.unit} {s.runtime}"),
    )


def _each(*names: str) -> Effects:
    return tuple((name, 1.0) for name in names)
