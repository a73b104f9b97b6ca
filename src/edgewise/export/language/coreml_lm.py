"""Core ML for language models: a stateful .mlpackage with two functions, `main` for one token and `prefill` for many.

Both take `input_ids` and `position`, int32 [1, n], and give `logits` of the token behind the last; keys and values are
states, of the same names in both. An application makes one state and gives it to whichever function it calls. It reads
a prompt by `prefill`, filled up with position -1 at the end, then calls `main` a token at a time.

No Linux machine runs Core ML. What is proven is the file: its states, its weights against the source's, and what its
program computes by our own reading of it (targets/coreml/mil.py).
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.language.passages import Logits, Passage, passages_of
from edgewise.export.targets.coreml.compare import Apart, apart
from edgewise.export.targets.coreml.mil import Interpreter, State, unknown_ops
from edgewise.export.targets.coreml.weights import Function, Package, Weight, read_package
from edgewise.export.work.job import (
    Check,
    Converted,
    Coverage,
    Fallback,
    Job,
    Precision,
    Proved,
    read_array,
    write_arrays,
)

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "int8", "int8-dynamic", "int4")  # int8: of the weights
PARAMETER: Final = "p_"  # how coremltools begins the names of a program's parameters
PREFILL: Final = 64  # tokens that `prefill` reads at once
CACHE: Final = 1024  # positions
BLOCK: Final = 32  # weights that share a scale in int4
GROUP: Final = 16  # channels that share a table of 16 values, where int4 is a palette
LEAST_WEIGHTS: Final = 2048  # of a matrix that is worth fewer bits
TABLES: Final = ("p_model_embed_tokens", "p_lm_head")  # of the vocabulary
SUFFIXES: Final = r"(_to_fp16|_quantized|_palettized)*"  # what coremltools appends to a parameter's name
SPEC: Final = 9  # iOS 18, the first with states
STORED: Final[Mapping[Precision, tuple[str, ...]]] = {
    "fp32": ("float32",),
    "fp16": ("float16",),
    "int8": ("int8",),
    "int8-dynamic": ("int8",),
    "int4": ("int4", "uint4"),
}
MOST: Final = 4
SLACK: Final = 1.05  # times what storage explains: scales were rounded to half precision before they were used
NAMED: Final = 3  # tensors that a check names
COMPARED: Final = 8  # steps of the float32 network before it is converted
CLOSE: Final = 2e-3  # of the largest logit: other kernels add in another order


def convert(job: Job) -> Converted:
    """Options: `card`, the model's card; `passages`, of which the first is tried; `prefill`, `cache`; `palettize`,
    true for int4 weights as indices into tables of 16 values (k-means, slow) in place of blocks with a scale."""
    if job.precision not in PRECISIONS:
        raise UsageError(f"a language model in Core ML has no {job.precision}", hint=f"take one of {PRECISIONS}")
    lengths = {"main": 1, "prefill": int(job.options.get("prefill", PREFILL))}
    cache = min(int(job.options.get("cache", CACHE)), int(job.options["card"]["context"]))
    weights = _weights(Path(job.source.ref))
    networks = {name: _network(job, length, cache, weights) for name, length in lengths.items()}
    check = _compared(job, networks)
    artifact, work = Path(f"{job.artifact}.mlpackage"), Path(job.work)
    parts = {}
    for name, network in networks.items():
        parts[name] = work / f"{name}.mlpackage"
        _written(job, network, parts[name])
    _joined(parts, artifact)
    files = sorted(str(file) for file in artifact.rglob("*") if file.is_file())
    return Converted(str(artifact), tuple(files), (check,))


def _weights(directory: Path) -> Mapping[str, Any]:
    """By transformers' names; torch tensors, float32."""
    load_file = importlib.import_module("safetensors.torch").load_file
    return {
        name: value.float()
        for shard in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(shard).items()
    }


def _network(job: Job, length: int, cache: int, weights: Mapping[str, Any]) -> Any:
    from edgewise.export.language.coreml_net import Decoder

    network = Decoder(job.options["card"], length, cache).eval()
    missing, _ = network.load_state_dict(weights, strict=False, assign=True)
    if missing:
        raise UnsupportedModel(
            f"{job.source.name} has no tensor {missing[0]!r}: its weights are not laid out as llama's are",
            hint="--to litert takes more families",
        )
    return network.requires_grad_(False)


def _compared(job: Job, networks: Mapping[str, Any]) -> Check:
    """The float32 network, before it is converted, against the reference. UnsupportedModel if it is another model."""
    passage = passages_of(job.options["passages"])[0]
    expected = read_array(job.reference, "0")[:COMPARED]
    found = decoded(passage, networks["prefill"].length, torch_calls(networks), COMPARED)
    for network in networks.values():
        network.reset()
    furthest = float(np.abs(found - expected).max()) / float(np.abs(expected).max())
    if not furthest < CLOSE:
        raise UnsupportedModel(
            f"the network that Core ML would get is not {job.source.name}: its logits are up to {furthest:.2g} of the "
            "largest away",
            hint="its family does something that llama's does not; --to litert takes more",
        )
    return Check("conversion", True, f"float32 network within {furthest:.1e} of the largest logit, {COMPARED} steps")


def torch_calls(networks: Mapping[str, Any]) -> Any:
    """Runs a function of the network by name, both over the same states."""
    torch = importlib.import_module("torch")
    names = [name for name, _ in networks["main"].named_buffers() if name.startswith(("key_", "value_"))]
    for name in names:
        setattr(networks["prefill"], name, getattr(networks["main"], name))

    def call(function: str, ids: Any, positions: Any) -> Any:
        with torch.inference_mode():
            return networks[function](torch.from_numpy(ids), torch.from_numpy(positions)).numpy()

    return call


def decoded(passage: Passage, length: int, call: Any, steps: int) -> Logits:
    """float32 [steps, vocab]: the prompt through `prefill`, `length` tokens at once, then a token at a time."""
    prompt = passage.ids[: passage.start - 1]
    for at in range(0, len(prompt), length):
        part = prompt[at : at + length]
        ids, positions = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
        ids[0, : len(part)] = part
        positions[0, : len(part)] = range(at, at + len(part))
        call("prefill", ids, positions)
    rows = []
    for step in range(min(steps, passage.steps)):
        one = np.array([[passage.read(step)]], np.int32)
        rows.append(np.asarray(call("main", one, np.array([[passage.start - 1 + step]], np.int32)), np.float32))
    return np.stack([row.reshape(-1) for row in rows])


def _written(job: Job, network: Any, file: Path) -> None:
    """One function as a package of its own."""
    torch, ct = importlib.import_module("torch"), importlib.import_module("coremltools")
    example = (
        torch.zeros((1, network.length), dtype=torch.int32),
        torch.arange(network.length, dtype=torch.int32)[None],
    )
    wanted = ct.precision.FLOAT32 if job.precision == "fp32" else ct.precision.FLOAT16
    try:
        with torch.no_grad():
            program = torch.export.export(network, example).run_decompositions({})
        model = ct.convert(
            program,
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=wanted,
            skip_model_load=True,
        )
    except (NotImplementedError, ValueError, RuntimeError, TypeError, KeyError) as e:
        raise UnsupportedModel(f"coremltools cannot convert {job.source.name}: {_short(e)}") from e
    model = _smaller(job, ct, model)
    model.short_description = f"{job.source.name}, exported by Edgewise"
    model.save(str(file))


def _smaller(job: Job, ct: Any, model: Any) -> Any:
    """With weights in fewer bits: those of the model alone, not the tables that turn queries and keys. The vocabulary
    keeps 8 bits in int4, as its rounding errors reach every logit."""
    if job.precision in ("fp32", "fp16"):
        return model
    opt = ct.optimize.coreml
    found = [name for name in opt.get_weights_metadata(model, LEAST_WEIGHTS) if name.startswith(PARAMETER)]
    tables = [name for name in found if name.startswith(TABLES)]
    layers = [name for name in found if name not in tables]
    byte = opt.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_WEIGHTS)
    if job.precision != "int4":
        return _quantized(opt.linear_quantize_weights, opt, model, found, byte)
    if job.options.get("palettize"):
        grouped = {"granularity": "per_grouped_channel", "group_size": GROUP}
        palette = opt.OpPalettizerConfig(mode="kmeans", nbits=4, weight_threshold=LEAST_WEIGHTS, **grouped)
        model = _quantized(opt.palettize_weights, opt, model, layers, palette)
    else:
        blocks = {"dtype": "uint4", "granularity": "per_block", "block_size": BLOCK}
        half = opt.OpLinearQuantizerConfig(mode="linear", weight_threshold=LEAST_WEIGHTS, **blocks)
        model = _quantized(opt.linear_quantize_weights, opt, model, layers, half)
    return _quantized(opt.linear_quantize_weights, opt, model, tables, byte)


def _quantized(make: Any, opt: Any, model: Any, names: Sequence[str], how: Any) -> Any:
    return make(model, opt.OptimizationConfig(op_name_configs=dict.fromkeys(names, how)))


def _joined(parts: Mapping[str, Path], artifact: Path) -> None:
    """One package with all functions, which share their weights."""
    utils = importlib.import_module("coremltools.models.utils")
    joined = utils.MultiFunctionDescriptor()
    for name, file in parts.items():
        joined.add_function(str(file), src_function_name="main", target_function_name=name)
    joined.default_function_name = "main"
    shutil.rmtree(artifact, ignore_errors=True)
    utils.save_multifunction(joined, str(artifact))
    for file in parts.values():
        shutil.rmtree(file)


def prove(job: Job) -> Proved:
    """Options: `card` and `passages`; `most`, how many of them are computed (MOST, if it is not given): a token of a
    model of 135 million parameters takes 0.2 s."""
    package = read_package(Path(job.artifact))
    main = package.functions.get("main")
    if main is None or "prefill" not in package.functions:
        raise SourceError(
            f"{package.path.name} has the functions {sorted(package.functions)}; main and prefill are needed",
            hint="export it again",
        )
    checks = [_spec_check(package, job.options["card"])]
    weights, missing = _weights_by_name(main, Path(job.source.ref))
    checks.append(_weights_check(weights, missing))
    unknown = set().union(*(unknown_ops(one) for one in package.functions.values()))
    if not unknown:
        passages = passages_of(job.options["passages"])[: job.options.get("most") or MOST]
        call = _Call(package)
        logits = {}
        for n, passage in enumerate(passages):
            call.states.clear()
            logits[str(n)] = decoded(passage, call.length, call, passage.steps)
        write_arrays(Path(job.work) / "logits", logits)
    return Proved(
        level="spec-checked",
        ran=not unknown,
        by="Edgewise's reading of the program, on this CPU; never by Core ML",
        coverage=_coverage(main, unknown),
        weights=_sizes(weights),
        skipped=tuple(_skipped(weights, job.precision)),
        checks=tuple(checks),
        notes=(
            f"functions: {', '.join(sorted(package.functions))}; a prompt is read {_length(package)} tokens at once",
        ),
    )


class _Call:
    """Runs a function of the package by name; all share the states."""

    def __init__(self, package: Package) -> None:
        self._runs = {name: Interpreter(one) for name, one in package.functions.items() if name in ("main", "prefill")}
        self.length = _length(package)
        self.states: State = {}

    def __call__(self, function: str, ids: Any, positions: Any) -> Any:
        run = self._runs[function]
        if not self.states:
            self.states.update(run.new_state())
        return run.run({"input_ids": ids, "position": positions}, self.states)[0]


def _length(package: Package) -> int:
    return int(package.functions["prefill"].inputs["input_ids"].shape[1] or 0)


def _spec_check(package: Package, card: Mapping[str, Any]) -> Check:
    """States, target, and what goes in and out."""
    wanted = {f"{kind}_{n}" for kind in ("key", "value") for n in range(card["layers"])}
    wrong = []
    for name, one in package.functions.items():
        shapes = {kind.shape for kind in one.states.values()}
        if set(one.states) != wanted or any((s[1], s[3]) != (card["kv_heads"], card["head_dim"]) for s in shapes):
            wrong.append(f"{name} has the states {sorted(one.states)[:NAMED]} … of {shapes}")
        if set(one.inputs) - set(one.states) != {"input_ids", "position"} or len(one.outputs) != 1:
            wrong.append(f"{name} takes {sorted(set(one.inputs) - set(one.states))} and gives {one.outputs}")
    if package.spec_version < SPEC:
        wrong.append(f"specification {package.spec_version} has no states, {SPEC} has")
    if wrong:
        return Check("spec", False, "; ".join(wrong))
    kind = next(iter(package.functions["main"].states.values()))
    return Check("spec", True, f"iOS 18, {len(wanted)} states {kind.dtype} {list(kind.shape)}")


def _weights_by_name(main: Function, directory: Path) -> tuple[dict[str, tuple[Weight, Any]], list[str]]:
    """Of every tensor of the model what the program holds and what the source has; and those that it lacks."""
    names = [*main.consts, *main.made]
    found, missing = {}, []
    for name, value in _weights(directory).items():
        pattern = re.compile(PARAMETER + re.escape(name.replace(".", "_")) + SUFFIXES)
        place = next((one for one in names if pattern.fullmatch(one)), None)
        if place is None:
            missing.append(name)
        else:
            found[name] = (main.weight(place), value.numpy())
    if "lm_head.weight" in missing and "model.embed_tokens.weight" in found:  # stored twice in some checkpoints
        missing.remove("lm_head.weight")
    return found, missing


def _weights_check(weights: Mapping[str, tuple[Weight, Any]], missing: Iterable[str]) -> Check:
    lost = list(missing)
    if lost:
        return Check("weights", False, f"the program lacks {', '.join(lost[:NAMED])} ({len(lost)} in all)")
    wrong: list[Apart] = []
    for name, (weight, source) in weights.items():
        found = apart(name, weight, source.reshape(np.shape(weight.value)) if _flat(weight, source) else source)
        wrong += [found] if found is not None and found.times > SLACK else []
    if wrong:
        wrong.sort(key=lambda one: -one.times)
        said = "; ".join(f"{one.name} by up to {one.difference:.3g}" for one in wrong[:NAMED])
        return Check("weights", False, f"{len(wrong)} of {len(weights)} differ from the source: {said}")
    return Check("weights", True, f"{len(weights)} tensors are the source's, as nearly as their storage allows")


def _flat(weight: Weight, source: Any) -> bool:
    """Whether they differ in axes of one alone."""
    shape = np.shape(weight.value)
    return [axis for axis in shape if axis != 1] == [axis for axis in source.shape if axis != 1]


def _sizes(weights: Mapping[str, tuple[Weight, Any]]) -> dict[str, int]:
    """Bytes of matrices by number type, their scales and tables included."""
    found: dict[str, int] = {}
    for weight, source in weights.values():
        if source.ndim > 1:
            found[weight.stored] = found.get(weight.stored, 0) + (weight.bytes or weight.value.nbytes)
    return found


def _skipped(weights: Mapping[str, tuple[Weight, Any]], precision: Precision) -> Iterable[str]:
    for name, (weight, source) in weights.items():
        table = (PARAMETER + name.replace(".", "_")).startswith(TABLES)
        allowed = STORED["int8" if precision == "int4" and table else precision]
        if source.ndim > 1 and source.size > LEAST_WEIGHTS and weight.stored not in allowed:
            yield f"{name} ({weight.stored})"


def _coverage(main: Function, unknown: Iterable[str]) -> Coverage:
    """Core ML itself places operators when it loads a model: here only those that we cannot compute are named."""
    counts = Counter(op.type for op in main.ops)
    fallback = tuple(
        Fallback(one, counts[one], "Edgewise cannot compute it, so its result was not looked at")
        for one in sorted(unknown)
    )
    return Coverage(len(main.ops), len(main.ops), "Core ML", fallback)


def _short(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:400] or type(error).__name__
