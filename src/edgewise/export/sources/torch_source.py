"""Models that torch can run: modules and exported programs of the user's code, Hugging Face directories,
EfficientNet-Lite, and ONNX files by onnx_torch.py. Loaded in a worker, in evaluation mode and float32.

`load` gives every target the same thing, so a source is understood in one place. Nothing is unpickled: weights come
from safetensors, from `torch.export` archives or with `weights_only`; code of a Hugging Face directory is never run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgewise.errors import EdgewiseError, SourceError, UnsupportedModel, UsageError
from edgewise.export.sources import data
from edgewise.export.sources.loaded import Loaded
from edgewise.export.sources.pieces import task_of
from edgewise.export.work.job import Begun, Job, Layers, Source, Task, Tensor, read_arrays, write_arrays

Array = npt.NDArray[Any]

BATCH: Final = 16  # rows of the reference that run at once
LITE_NORM: Final = {
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
}  # (byte - 127) / 128, as these weights were trained
LITE_BORDER: Final = 32  # pixels around the crop
ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")


def load(source: Source, inputs: Sequence[Tensor] = ()) -> Loaded:
    """SourceError or UnsupportedModel for what cannot be loaded; UsageError where the shapes of inputs are not known.
    `inputs` are those that `begin` found, if it ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _LOADERS[source.kind](source, tuple(inputs))
    found.module.requires_grad_(False)
    return found


# The steps


def begin(job: Job) -> Begun:
    """See job.py. The reference's numbers are float32, computed `BATCH` rows at a time."""
    torch.manual_seed(0)
    torch.set_num_threads(job.threads)
    loaded = load(job.source, _of_data(job))
    preprocessing = {**loaded.preprocessing, **job.options.get("preprocessing", {})}
    rows = data.rows(job, loaded.inputs, preprocessing, loaded.tokenize)
    work = Path(job.work)
    rows.write(work)
    found = [_run(loaded, {k: v[at : at + BATCH] for k, v in rows.arrays.items()}) for at in range(0, len(rows), BATCH)]
    reference = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    write_arrays(work / "reference", {str(n): value for n, value in enumerate(reference)})
    names = _named(loaded.outputs, len(reference))
    outputs = tuple(
        Tensor(name, (1, *value.shape[1:]), str(value.dtype)) for name, value in zip(names, reference, strict=True)
    )
    return Begun(
        inputs=loaded.inputs,
        outputs=outputs,
        rows=len(rows),
        calibration_rows=rows.calibration_rows,
        labelled=rows.labels is not None,
        random=rows.random,
        shared=rows.shared,
        parameters=sum(one.numel() for one in loaded.module.parameters()),
        task=task_of(loaded.task, reference),
        preprocessing=preprocessing,
    )


def layers(job: Job) -> Layers:
    """Every floating tensor of the source's graph for the rows `job.only`, each named by the module it belongs to."""
    loaded = load(job.source, job.inputs)
    found = _seen(loaded, read_arrays(job.rows, job.inputs), job.only)
    write_arrays(Path(job.work) / "layers", {str(n): value for n, (_, value) in enumerate(found)})
    return Layers(tuple(name for name, _ in found))


def _seen(loaded: Loaded, rows: Mapping[str, Array], only: Sequence[int]) -> list[tuple[str, Array]]:
    """Tensors of the module's graph, each for all those rows, which run one by one."""
    program = torch.export.export(loaded.module, loaded.one_row)
    runs = []
    for row in only:
        watch = _Watch(program.module())
        watch.run(*(torch.from_numpy(np.array(rows[one.name][row : row + 1])) for one in loaded.inputs))
        runs.append(watch.seen)
    return [(name, np.concatenate([run[name] for run in runs])) for name in runs[0]]


def _run(loaded: Loaded, feeds: Mapping[str, Array]) -> list[Array]:
    given = [torch.from_numpy(np.array(feeds[one.name])) for one in loaded.inputs]
    try:
        with torch.inference_mode():
            found = loaded.module(*given)
    except EdgewiseError:
        raise
    except Exception as e:  # whatever the user's code raises
        shapes = {one.name: list(value.shape) for one, value in zip(loaded.inputs, given, strict=True)}
        raise UsageError(
            f"the source fails on inputs {shapes}: {type(e).__name__}: {str(e)[:400]}",
            hint="check the shapes and types of its inputs: --shape NAME=1,3,224,224",
        ) from e
    return [value.detach().cpu().numpy() for value in tensors(found)]


def tensors(found: Any) -> list[torch.Tensor]:
    """What a module gave, as a list; UnsupportedModel for what no file format holds."""
    values = list(found) if isinstance(found, tuple | list) else [found]
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(
                f"the source gives a {type(value).__name__}", hint="let it return a tensor or a tuple of tensors"
            )
    return values


def _named(names: Sequence[str], count: int) -> Sequence[str]:
    """`names` where they fit, else numbered ones."""
    return names if len(names) == count else ["output"] if count == 1 else [f"output_{n}" for n in range(count)]


class _Watch(torch.fx.Interpreter):
    """Keeps what each node of a graph gives."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function" and value.dtype.is_floating_point and value.ndim:
            self.seen[_layer(n)] = value.detach().numpy()
        return value


def _layer(node: torch.fx.Node) -> str:
    """`blocks.3.conv (conv2d)`: where in the user's module a node was, and what it does."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(place[0]) for place in reversed(stack.values())), "")
    path = re.sub(r"^L\['self'\]\.?", "", path).replace("_modules['", "").replace("']", "").strip(".")
    return f"{path} ({node.name})" if path else node.name


# Loading


def _of_data(job: Job) -> tuple[Tensor, ...]:
    """The inputs as the arrays of an .npz show them, for sources that do not say their own."""
    path = Path(job.data)
    if job.source.shapes or path.suffix.lower() != ".npz" or not path.is_file():
        return ()
    arrays = data.npz(path)
    return tuple(
        Tensor(name, (1, *value.shape[1:]), str(value.dtype)) for name, value in arrays.items() if name != data.LABELS
    )


def _of_module(source: Source, inputs: tuple[Tensor, ...]) -> Loaded:
    """`module:attr`: an nn.Module, something that makes one, or an exported program."""
    place, _, attribute = source.ref.partition(":")
    try:
        found = getattr(importlib.import_module(place), attribute)
        if not isinstance(found, nn.Module | torch.export.ExportedProgram) and callable(found):
            found = found()
    except Exception as e:  # the user's code
        raise SourceError(
            f"{source.ref} cannot be loaded: {type(e).__name__}: {e}",
            hint="name it as module:attribute, from the directory in which Python finds the module",
        ) from e
    if isinstance(found, torch.export.ExportedProgram):
        return _of_program(found)
    if not isinstance(found, nn.Module):
        raise SourceError(
            f"{source.ref} is a {type(found).__name__}", hint="a torch.nn.Module is needed, or a function"
        )
    return Loaded(found.eval().float(), _inputs_of(found, source, inputs), (), source.task)


def _of_archive(source: Source, inputs: tuple[Tensor, ...]) -> Loaded:
    try:
        return _of_program(torch.export.load(source.ref))
    except Exception as e:  # torch's own, of many kinds
        raise SourceError(
            f"{source.ref} is no archive of torch.export: {str(e)[:300]}", hint="torch.export.save writes one"
        ) from e


def _of_program(program: torch.export.ExportedProgram) -> Loaded:
    """Its inputs are in its graph; a first axis that it left free is one row here."""
    named = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for name in program.graph_signature.user_inputs:
        value = named[str(name)].meta["val"]
        axes = [axis if isinstance(axis, int) else None for axis in value.shape]
        found.append(Tensor(str(name), (1, *axes[1:]), str(value.dtype).removeprefix("torch.")))
    module: Any = program.module()
    module.eval = module.train = lambda mode=False: module  # it is as it was traced; converters ask, and it would raise
    return Loaded(module, tuple(found), (), "classify")


def _inputs_of(module: nn.Module, source: Source, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By the names of forward's parameters; shapes are the user's, or those of their data."""
    names = [
        one.name
        for one in inspect.signature(module.forward).parameters.values()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    known = {one.name: one for one in inputs} or {
        name: Tensor(name, (1, *shape[1:]), "float32") for name, shape in source.shapes.items()
    }
    if len(known) == 1 and names and next(iter(known)) not in names:  # one input: its name is the user's own
        return tuple(known.values())
    if not known or not set(known) <= set(names):
        raise UsageError(
            f"{source.ref} takes {', '.join(names)}, and shapes are known of {', '.join(known) or 'none'}",
            hint=f"give --inputs an .npz of these names, or --shape {names[0] if names else 'x'}=1,3,224,224",
        )
    return tuple(known[name] for name in names if name in known)


def _efficientnet(source: Source, inputs: tuple[Tensor, ...]) -> Loaded:
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name(source.name)
    module.load_state_dict(torch.load(source.ref, weights_only=True))
    side = int(module.input_image_size)
    image = Tensor("image", (1, 3, side, side), "float32")
    return Loaded(module.eval(), (image,), ("logits",), "classify", {**LITE_NORM, "side": side, "border": LITE_BORDER})


def _onnx(source: Source, inputs: tuple[Tensor, ...]) -> Loaded:
    from edgewise.export.sources.onnx_source import loaded

    found: Loaded = loaded(source)
    return found


# Hugging Face directories


def _huggingface(source: Source, inputs: tuple[Tensor, ...]) -> Loaded:
    directory = Path(source.ref)
    config = _json(directory / "config.json")
    kinds = config.get("architectures") or [""]
    if "ImageClassification" in kinds[0]:
        return _photos_of(directory, kinds[0])
    if "SequenceClassification" in kinds[0]:
        return _texts_of(directory, source, _Logits(_pretrained(directory, "AutoModelForSequenceClassification")))
    if kinds[0].endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise UnsupportedModel(f"{source.name} is a {kinds[0]}", hint="language models go to onnx, litert and coreml")
    modules = directory / "modules.json"
    steps = [one["type"].rsplit(".", 1)[-1] for one in _json(modules)] if modules.is_file() else ["Transformer"]
    model = _pretrained(directory, "AutoModel")
    unknown = set(steps) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UnsupportedModel(f"{source.name} has {', '.join(sorted(unknown))}", hint="export it as a torch module")
    pooling = _json(directory / "1_Pooling" / "config.json") if "Pooling" in steps else {}
    return _texts_of(directory, source, Embedding(model, _pooled_by(pooling), normalize="Normalize" in steps))


def _pooled_by(pooling: Mapping[str, Any]) -> str:
    """`mean`, `cls` or `none`, as sentence-transformers write it."""
    if not pooling or pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean":
        return "mean"
    if pooling.get("pooling_mode_cls_token") or pooling.get("pooling_mode") == "cls":
        return "cls"
    raise UnsupportedModel(f"the model pools by {dict(pooling)}", hint="mean and cls are known; export a torch module")


def _pretrained(directory: Path, kind: str) -> nn.Module:
    import transformers

    try:
        model: nn.Module = getattr(transformers, kind).from_pretrained(
            directory, local_files_only=True, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        )
    except Exception as e:  # of many kinds
        raise SourceError(
            f"{directory.name} cannot be loaded by transformers: {str(e)[:400]}",
            hint="it needs config.json and model.safetensors, and an architecture of transformers itself",
        ) from e
    return model.eval()


def _texts_of(directory: Path, source: Source, module: nn.Module) -> Loaded:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as e:
        raise SourceError(f"{directory.name} has no tokenizer that can be loaded: {str(e)[:300]}") from e

    def tokenize(texts: Sequence[str]) -> Mapping[str, Array]:
        found = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=source.max_tokens, return_tensors="np"
        )
        return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    shape = (1, source.max_tokens)
    inputs = (Tensor("input_ids", shape, "int64"), Tensor("attention_mask", shape, "int64"))
    task: Task = "embed" if isinstance(module, Embedding) else "classify"
    output = "embedding" if task == "embed" else "logits"
    return Loaded(module.eval(), inputs, (output,), task, {"max_tokens": source.max_tokens}, tokenize)


def _photos_of(directory: Path, kind: str) -> Loaded:
    module = _Pixels(_pretrained(directory, "AutoModelForImageClassification"))
    config = _json(directory / "preprocessor_config.json")
    size = config.get("crop_size") or config.get("size") or {}
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge", 224))
    pixels = Tensor("pixel_values", (1, 3, side, side), "float32")
    norm = {"mean": config.get("image_mean", [0.5] * 3), "std": config.get("image_std", [0.5] * 3), "side": side}
    return Loaded(module.eval(), (pixels,), ("logits",), "classify", norm)


class Embedding(nn.Module):
    """Token ids and mask [rows, tokens] to an embedding [rows, width]."""

    def __init__(self, model: nn.Module, pooling: str, *, normalize: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            found = hidden[:, 0]
        else:
            weight = attention_mask[..., None].to(hidden.dtype)
            found = (hidden * weight).sum(1) / weight.sum(1)  # a text has a token at least: the first one is its own
        return nn.functional.normalize(found, dim=1) if self.normalize else found


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return found


class _Pixels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise SourceError(f"{path} cannot be read: {e}", hint="a whole Hugging Face directory is needed") from e


_LOADERS: Final = {
    "torch": _of_module,
    "program": _of_archive,
    "hf": _huggingface,
    "efficientnet": _efficientnet,
    "onnx": _onnx,
}
