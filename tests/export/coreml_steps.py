"""Run by test_coreml.py in the environment that has coremltools: all steps that need it, in one process.

`python coreml_steps.py DIRECTORY` writes `answers.json` there: what each step gave or raised."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgewise.errors import EdgewiseError
from edgewise.export.sources import torch_source
from edgewise.export.targets.coreml import from_torch
from edgewise.export.targets.coreml import target as coreml
from edgewise.export.targets.coreml.mil import Interpreter
from edgewise.export.targets.coreml.weights import read_package
from edgewise.export.work.job import Job, Source

SHAPES = {
    "cnn": {"image": (1, 3, 32, 32)},
    "convs": {"image": (1, 3, 32, 32)},
    "mlp": {"x": (1, 24)},
    "overflowing": {"x": (1, 24)},
    "eigen": {"x": (1, 4, 4)},
    "deciding": {"x": (1, 4)},
    "encoder": {},
}
SOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn fp32": ("cnn", {"precision": "fp32"}),
    "cnn fp16": ("cnn", {"precision": "fp16"}),
    "cnn int8": ("cnn", {"precision": "int8"}),
    "cnn blocks": ("cnn", {"precision": "int4", "options": {"block": 8}}),
    "cnn palette": ("cnn", {"precision": "int4", "options": {"palettize": 4}}),
    "cnn groups": ("cnn", {"precision": "int4", "options": {"palettize": 4, "group": 8}}),
    "encoder palette": ("encoder", {"precision": "int8", "options": {"palettize": 6}}),
    "encoder fp16": ("encoder", {"precision": "fp16"}),
    "mlp free": ("mlp", {"precision": "fp16", "options": {"dynamic_batch": True}}),
    "convs fp16": ("convs", {"precision": "fp16"}),
    "overflowing fp16": ("overflowing", {"precision": "fp16"}),
}


class Wild(nn.Module):
    """Operators that nets.py has not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.prelu, self.line, self.deep = nn.PReLU(4), nn.Conv1d(4, 3, 3), nn.Conv3d(1, 2, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        top, _ = x.flatten(1).topk(5)
        return (
            self.group(x),
            self.instance(x),
            self.prelu(x),
            self.line(x[:, :, 0]),
            self.deep(x[:, None]),
            F.adaptive_avg_pool2d(x, 2),
            F.avg_pool2d(x, 3, 2, 1),
            F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
            F.interpolate(x, size=(11, 13), mode="bilinear", align_corners=True),
            F.pixel_shuffle(x, 2),
            F.pad(x, (1, 2, 2, 1), mode="reflect"),
            F.conv_transpose2d(x, torch.ones(4, 2, 3, 3), stride=2, padding=1, output_padding=1),
            x.cumsum(2),
            top,
            torch.where(x > 0, x, x.exp()).sqrt(),
            torch.einsum("nchw,ncwk->nhk", x, x),
            x.index_select(1, torch.tensor([2, 0])),
            x.gather(3, torch.tensor([0, 3]).expand(1, 4, 8, 2)),
            F.elu(x) + F.softplus(x) + F.gelu(x, approximate="tanh") + F.hardswish(x) + F.mish(x) + F.celu(x),
            x.logsumexp(1),
            x.std(1, unbiased=False),
            x.roll(2, 3),
            torch.stack(x.unbind(1), 2),
            x.clamp(-0.5, 0.5).masked_fill(x < 0, 3.0),
            x.argmax(1).float(),
            torch.floor(x) + torch.round(x) + x.abs() + x.sign() + x.erf(),
            F.scaled_dot_product_attention(x, x * 2, x - 1),
            x.remainder(0.7) + torch.maximum(x, x.flip(2)) + torch.rsqrt(x.square() + 1) + x.pow(3),
            x.norm(dim=1) + x.amin(1),
            torch.where((x > 0) & (x < 1) | (x < -1), x.new_ones(1, 4, 1, 1) * x, 2.5),
            x.tril() + x.mT.triu(1).mT,
        )


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    _once_each()
    jobs = {name: _begun(directory, name) for name in SHAPES}
    answers: dict[str, Any] = {}
    made: dict[str, tuple[Job, Path]] = {}
    for name, (net, change) in SOUND.items():
        job = _job(directory, jobs[net], name, **change)
        answers[name] = {"converted": (converted := _said(coreml.convert, job))}
        made[name] = (job, Path(converted["artifact"]))
        answers[name] |= _proved(*made[name])
    plain = made["cnn fp32"][1]
    answers["tables"] = {name: _tables(made[f"cnn {name}"][1], plain) for name in ("palette", "groups")}
    answers["faults"] = _faults(directory, made)
    answers["layers"] = _layers(*made["cnn fp16"])
    answers["refused"] = _refused(directory, jobs)
    answers["wild"] = _wild()
    answers["foreign"] = _foreign(directory, *made["cnn fp16"])
    answers["traced"] = _traced(directory, made["cnn fp16"][0])
    (directory / "answers.json").write_text(json.dumps(answers))


def _once_each() -> None:
    """Most steps here follow and convert the same few networks anew, to float32, as each would in its own process."""
    programs: dict[Any, Any] = {}
    models: dict[Any, Any] = {}
    exported, converted = from_torch.exported, from_torch.converted

    def followed(loaded: Any, *, dynamic_batch: bool = False) -> Any:
        key = (type(loaded.module), dynamic_batch)
        if key not in programs:
            programs[key] = exported(loaded, dynamic_batch=dynamic_batch)
        return programs[key]

    def made(program: Any, loaded: Any, outputs: Any, *, half: bool, target: str) -> Any:
        key = (id(program), tuple(outputs), target)
        if half or program is None:
            return converted(program, loaded, outputs, half=half, target=target)
        if key not in models:
            models[key] = converted(program, loaded, outputs, half=half, target=target)
        return models[key]

    from_torch.exported, from_torch.converted = followed, made


def _begun(directory: Path, name: str) -> Job:
    work = directory / f"begin-{name}"
    work.mkdir()
    source = Source("torch", f"nets:{name}", name, "classify", shapes=SHAPES[name])
    data = ""
    if name == "encoder":
        draw, mask = np.random.default_rng(0), np.ones((20, 12), np.int64)
        mask[:, 9:] = 0
        data = str(work / "tokens.npz")
        np.savez(data, input_ids=draw.integers(0, 100, (20, 12)), attention_mask=mask)
    begin = Job("begin", source, str(work), data=data, threads=1)
    if name in ("eigen", "deciding"):
        return begin
    found = torch_source.begin(begin)
    rows, reference = str(work / "rows"), str(work / "reference")
    return replace(begin, inputs=found.inputs, outputs=found.outputs, rows=rows, reference=reference)


def _job(directory: Path, job: Job, name: str, **change: Any) -> Job:
    work = directory / f"convert-{name}"
    work.mkdir(parents=True, exist_ok=True)
    return replace(job, step="convert", work=str(work), target="coreml", artifact=str(directory / name), **change)


def _said(step: Callable[[Job], Any], job: Job) -> Any:
    try:
        return asdict(step(job))
    except EdgewiseError as e:
        return {"kind": type(e).__name__, "message": e.message, "hint": e.hint}


def _proved(job: Job, artifact: Path, **change: Any) -> dict[str, Any]:
    """And how far its outputs are from the reference's."""
    work = Path(job.work) / f"prove-{artifact.stem}-{len(change)}"
    work.mkdir(exist_ok=True)
    found = _said(coreml.prove, replace(job, step="prove", artifact=str(artifact), work=str(work), **change))
    if not found.get("ran"):
        return {"proved": found}
    ours, theirs = (np.load(Path(at) / "0.npy") for at in (work / "outputs", job.reference))
    return {"proved": found, "away": float(np.abs(ours - theirs).max()), "shapes": [ours.shape, theirs.shape]}


def _tables(artifact: Path, plain: Path) -> dict[str, Any]:
    """How many each matrix has, and how far all weights are from those of the float32 program."""
    ours, theirs = ([one for one in _weights(path) if one.value.ndim > 1] for path in (artifact, plain))
    away = sum(float(np.square(a.value - b.value).sum()) for a, b in zip(ours, theirs, strict=True))
    return {"tables": [len(one.palette) for one in ours], "away": away}


def _weights(artifact: Path) -> list[Any]:
    function = read_package(artifact).main
    return [function.weight(op.inputs["weight"][0]) for op in function.ops if op.type in ("conv", "linear")]


# Faults in a package that was sound


def _faults(directory: Path, made: dict[str, tuple[Job, Path]]) -> dict[str, Any]:
    job, sound = made["cnn fp16"]
    function = read_package(sound).main
    first = next(op for op in function.ops if op.type == "conv")
    filters, bias = (np.array(function.weight(first.inputs[name][0]).value) for name in ("weight", "bias"))
    nudged = bias.copy()
    nudged[3] *= np.float16(1.01)
    palette = read_package(made["cnn palette"][1]).main
    table = next(const.value for const in palette.consts.values() if const.kind.shape == (16,) and const.bytes)
    groups = read_package(made["cnn groups"][1]).main
    pair = next(const.value for const in groups.consts.values() if const.kind.shape == (2, 1, 1, 1, 16, 1))
    scales = read_package(made["cnn int8"][1]).main
    scale = next(const.value for const in scales.consts.values() if const.kind == type(const.kind)("float16", (10,)))
    edits: dict[str, tuple[str, Callable[[Path], None]]] = {
        "swapped": ("cnn fp16", lambda at: _replaced(at, filters, filters[:, ::-1])),
        "nudged": ("cnn fp16", lambda at: _replaced(at, bias, nudged)),
        "table": ("cnn palette", lambda at: _replaced(at, table, table + np.float16(0.02))),
        "tables": ("cnn groups", lambda at: _replaced(at, pair, pair[::-1])),
        "scale": ("cnn int8", lambda at: _replaced(at, scale, scale * np.float16(1.1))),
        "short weights": ("cnn fp16", lambda at: _cut(next(at.rglob("weight.bin")))),
        "short program": ("cnn fp16", lambda at: _cut(next(at.rglob("*.mlmodel")))),
        "no manifest": ("cnn fp16", lambda at: (at / "Manifest.json").unlink()),
        "padding": ("cnn fp16", lambda at: _of_spec(at, _other_padding)),
        "unknown": ("cnn fp16", lambda at: _of_spec(at, _unknown)),
    }
    found = {}
    for name, (kind, edit) in edits.items():
        broken = directory / f"{name}.mlpackage"
        shutil.copytree(made[kind][1], broken)
        edit(broken)
        found[name] = _proved(made[kind][0], broken)
    found["skipped"] = _proved(job, sound, precision="int8")
    found["too new"] = _proved(job, made["cnn blocks"][1])
    return found


def _replaced(package: Path, old: Any, new: Any) -> None:
    file = next(package.rglob("weight.bin"))
    data = file.read_bytes()
    assert data.count(old.tobytes()) == 1
    file.write_bytes(data.replace(old.tobytes(), np.ascontiguousarray(new).astype(old.dtype).tobytes()))


def _cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _of_spec(package: Path, edit: Callable[[Any], None]) -> None:
    from coremltools.proto import Model_pb2

    file = next(package.rglob("*.mlmodel"))
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    edit(function.block_specializations[function.opset].operations)
    file.write_bytes(spec.SerializeToString())


def _other_padding(operations: Any) -> None:
    """Of the depthwise convolution: the shapes stay."""
    named = {op.outputs[0].name: op for op in operations}
    conv = [op for op in operations if op.type == "conv"][1]
    pad = named[conv.inputs["pad"].arguments[0].name]
    pad.attributes["val"].immediateValue.tensor.ints.values[:] = [0, 2, 0, 2]


def _unknown(operations: Any) -> None:
    next(op for op in operations if op.type == "relu6").type = "mystery"


def _layers(job: Job, artifact: Path) -> dict[str, Any]:
    work = Path(job.work) / "layers-step"
    work.mkdir()
    found = coreml.layers(replace(job, step="layers", artifact=str(artifact), work=str(work), only=(3, 5)))
    shapes = [np.load(work / "layers" / f"{n}.npy").shape for n in range(len(found.names))]
    last = np.load(work / "layers" / f"{len(found.names) - 1}.npy")
    away = float(np.abs(last - np.load(Path(job.reference) / "0.npy")[[3, 5]]).max())
    return {"names": found.names, "shapes": shapes, "away": away}


def _refused(directory: Path, jobs: dict[str, Job]) -> dict[str, Any]:
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "eigen": ("eigen", {"precision": "fp16"}),
        "deciding": ("deciding", {"precision": "fp16"}),
        "blocks on iOS17": ("mlp", {"precision": "int4", "options": {"target": "iOS17"}}),
        "groups on iOS17": ("mlp", {"precision": "int8", "options": {"palettize": 6, "group": 8, "target": "iOS17"}}),
        "groups alone": ("mlp", {"precision": "int8", "options": {"group": 8}}),
        "tables in blocks": ("mlp", {"precision": "int4", "options": {"palettize": 4, "block": 16}}),
    }
    found = {}
    for name, (net, change) in wanted.items():
        loaded = jobs[net]
        if not loaded.inputs:
            loaded = replace(loaded, inputs=torch_source.load(loaded.source).inputs)
        found[name] = _said(coreml.convert, _job(directory, loaded, f"refused-{name}", **change))
    return found


# Beside the steps


def _wild() -> list[float]:
    """How far each output is from torch's, of the largest number in it."""
    module, x = Wild().eval(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    loaded = torch_source.Loaded(module, (coreml.Tensor("x", (1, 4, 8, 8), "float32"),), (), "numbers")
    model = from_torch.converted(from_torch.exported(loaded), loaded, (), half=False, target="iOS18")
    path = Path(sys.argv[1]) / "wild.mlpackage"
    from_torch.saved(model, path)
    ours = Interpreter(read_package(path).main).run({"x": x.numpy()})
    with torch.no_grad():
        theirs = [value.numpy() for value in module(x)]
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)]


def _foreign(directory: Path, job: Job, artifact: Path) -> dict[str, Any]:
    """A package of another hand: torch's older tracer, other names, float16 at the border."""
    import coremltools as ct

    with from_torch.quiet(), torch.no_grad():
        model = ct.convert(
            torch.jit.trace(nets.cnn(), torch.rand(1, 3, 32, 32)),
            inputs=[ct.TensorType(name="photo", shape=(1, 3, 32, 32))],
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    other = directory / "foreign.mlpackage"
    from_torch.saved(model, other)
    return _proved(job, other)


def _traced(directory: Path, job: Job) -> dict[str, Any]:
    """Where an exported program is no way in, as None is none, the older tracer is."""
    loaded = torch_source.load(job.source, job.inputs)
    other = directory / "traced.mlpackage"
    from_torch.saved(from_torch.converted(None, loaded, job.outputs, half=True, target="iOS17"), other)
    return _proved(job, other)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
