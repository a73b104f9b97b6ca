"""The student as a torch model, and back to files. torch and transformers are used here, and in what trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgewise.compress.storing import storing_directory
from edgewise.compress.student.surgery import smaller
from edgewise.errors import SourceError, UsageError
from edgewise.models.hf_weights import EMBEDDING, LM_HEAD, HfWeights, of
from edgewise.models.licence import carry
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.types import IdArray

SavedType = Literal["float32", "float16", "bfloat16"]
CONFIG = "config.json"


def made(
    teacher: HfWeights,
    *,
    start: str = "teacher",
    layers: int | Sequence[int] | None = None,
    kept: IdArray | None = None,
    hidden: int | None = None,
    ffn: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A float32 model on the CPU. It starts with the teacher's weights in the form of surgery.py's `smaller`
    ("teacher"), as random as transformers makes a model of that form, by the seed ("scratch"), or as a Hugging Face
    directory that already has the student's vocabulary (`kept` says how large that is), in whichever form. With all
    layers, tokens and widths it computes what the teacher does. UsageError for what the teacher has not."""
    if start in ("teacher", "scratch"):
        wanted = smaller(teacher, layers=layers, kept=kept, hidden=hidden, ffn=ffn)
    else:
        wanted = smaller(_directory(start, kept), layers=layers, hidden=hidden, ffn=ffn)
    with torch.random.fork_rng(devices=[]):  # whoever calls this has random numbers of his own
        torch.manual_seed(seed)
        model = _network(wanted)
    if start != "scratch":
        _fill(model, wanted)
    return model


def saved(
    model: PreTrainedModel,
    tokenizer: TokenizerFiles,
    directory: Path,
    *,
    licence: str | None = None,
    notices: Path | None = None,
    dtype: SavedType = "float32",
) -> Path:
    """The model as a Hugging Face directory, which `edgewise pull` and transformers take, in place of an older one.
    `licence` and `notices` are the teacher's, whose weights the student's come from. `dtype` is how numbers are
    stored. StorageError, and nothing changed, if the disk will not take it."""
    with storing_directory(directory) as work:
        _write(model, work, dtype)
        tokenizer.write_huggingface(work)
        _write_ids(work / CONFIG, tokenizer, dtype)
        carry(licence, notices, work)
    return directory


def _directory(start: str, kept: IdArray | None) -> HfWeights:
    path = Path(start).expanduser()
    if not (path / CONFIG).is_file():
        raise SourceError(
            f"the student cannot start from {start!r}", hint="take teacher, scratch or a Hugging Face directory"
        )
    found = of(path)
    there = int(found.config["vocab_size"])
    if kept is not None and there != len(kept):
        raise UsageError(
            f"{start} has {there} tokens, the student's vocabulary {len(kept)}",
            hint="start from a model of that vocabulary, or leave `vocabulary` out",
        )
    return found


def _network(weights: HfWeights) -> PreTrainedModel:
    settings = {
        key: value for key, value in weights.config.items() if key not in ("model_type", "dtype", "torch_dtype")
    }
    config = AutoConfig.for_model(weights.config["model_type"], **settings)
    makes: Any = AutoModelForCausalLM  # whose functions have no types
    model: PreTrainedModel = makes.from_config(config, dtype=torch.float32)
    return model


def _fill(model: PreTrainedModel, weights: HfWeights) -> None:
    """Every parameter gets its tensor; SourceError if one is left over on either side."""
    parameters = dict(model.named_parameters())
    tied = bool(model.config.tie_word_embeddings)
    names = set(weights.tensors) - ({LM_HEAD} if tied else set())
    if names != parameters.keys():
        odd = sorted(names ^ parameters.keys())
        raise SourceError(f"{weights.name} and a {model.config.model_type} of transformers differ in {odd[0]!r}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            values = torch.from_numpy(weights.tensors[name])
            if values.shape != parameter.shape:
                raise SourceError(
                    f"{name} of {weights.name} has the shape {tuple(values.shape)}, its config.json says "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(values)


def _write(model: PreTrainedModel, directory: Path, dtype: SavedType) -> None:
    kind = getattr(torch, dtype)
    state = {name: values.detach().to("cpu", kind) for name, values in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop(LM_HEAD, None)
        assert EMBEDDING in state
    try:
        model.save_pretrained(directory, state_dict=state)
    except SafetensorError as e:  # as which it tells of a disk that is full
        raise OSError(str(e)) from e


def _write_ids(file: Path, tokenizer: TokenizerFiles, dtype: SavedType) -> None:
    """config.json with the ids of the student's own tokens."""
    config: dict[str, Any] = json.loads(file.read_bytes())
    stop = list(tokenizer.config.stop)
    config |= {"bos_token_id": tokenizer.config.bos, "eos_token_id": stop[0] if len(stop) == 1 else stop or None}
    config |= {"dtype": dtype}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
