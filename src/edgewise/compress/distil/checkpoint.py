"""Checkpoints of a training run, with torch: one safetensors file each, whole or not there at all, of which two stay.

A file holds the parameters (`model.NAME`), what the
optimiser knows of each (`optimizer.NAME.KEY`), the training log up to there as its bytes (`log`), and as metadata
`state`: JSON of `State`. There is no random state to keep: that of a step follows from the seed and the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgewise.compress.storing import storing
from edgewise.errors import CheckpointError, StorageError, UsageError

FORMAT: Final = 1
KEPT: Final = 2


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a run stands: steps done, tokens seen, and `facts`, what it may not be resumed without: another config,
    other data or another model would make another curve."""

    format: int = FORMAT
    step: int
    tokens: int
    facts: dict[str, Any]


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, log: bytes) -> Path:
    """Write the checkpoint of a step and remove all but the last two. CheckpointError if it cannot be written; those
    that were there are then there still."""
    path = directory / f"step-{state.step:08d}.safetensors"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".step-*.partial"):  # by a process that was killed
            left.unlink()
        with storing(path) as work:
            save_file(_tensors(model, optimizer, log), work, {"state": msgspec.json.encode(state).decode()})
        _keep_names(directory)
        for old in _all(directory)[:-KEPT]:
            old.unlink()
    return path


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Whatever keeps the block from writing, a full disk above all, is a CheckpointError that names the checkpoint from
    which the run can go on."""
    try:
        yield
    except (OSError, SafetensorError, StorageError) as error:
        last = _all(directory)[-1:]
        kept = f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        why = error.message if isinstance(error, StorageError) else error
        raise CheckpointError(
            f"the run cannot go on writing: {why}; {kept}",
            hint="make room on the disk, then go on with --resume",
        ) from error


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that can be read, if there is any. A newer one that a disk has damaged is passed over."""
    found = _all(directory)
    for path in reversed(found):
        with suppress(CheckpointError):
            read_state(path)
            return path
    if found:
        read_state(found[-1])  # says what is wrong
    return None


def read_state(path: Path) -> State:
    """CheckpointError if the file is damaged or of another format."""
    with _reading(path) as file:
        raw = (file.metadata() or {}).get("state", "{}")
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("format")
        if version != FORMAT:
            raise CheckpointError(f"{path} has format {version!r}; this version reads {FORMAT}")
        return msgspec.json.decode(raw, type=State)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    """Put the checkpoint's parameters and the optimiser's memory in place; returns the training log up to there.
    CheckpointError if the file is damaged, UsageError if it is of another model."""
    with _reading(path) as file:
        names = set(file.keys())
        with torch.no_grad():
            for name, tensor in _named(model):
                if f"model.{name}" not in names or list(file.get_slice(f"model.{name}").get_shape()) != [*tensor.shape]:
                    raise UsageError(f"{path} is of another model: it has no {name} of shape {tuple(tensor.shape)}")
                tensor.copy_(file.get_tensor(f"model.{name}"))
        groups = optimizer.state_dict()["param_groups"]
        memory = {}
        for number, name in enumerate(_names(model, optimizer)):
            prefix = f"optimizer.{name}."
            memory[number] = {
                key.removeprefix(prefix): file.get_tensor(key) for key in sorted(names) if key.startswith(prefix)
            }
        optimizer.load_state_dict({"state": {n: m for n, m in memory.items() if m}, "param_groups": groups})
        return bytes(file.get_tensor("log").numpy())


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {error}", hint="remove it: the run goes on from the one before"
        ) from error


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, log: bytes) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor.detach().contiguous() for name, tensor in _named(model)}
    memory: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    for number, name in enumerate(_names(model, optimizer)):
        for key, tensor in memory.get(number, {}).items():
            tensors[f"optimizer.{name}.{key}"] = tensor.contiguous()
    tensors["log"] = torch.from_numpy(np.frombuffer(log, np.uint8).copy())
    return tensors


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that belong to the model; of tied ones the first."""
    return [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in model.state_dict())]


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimiser's parameters in its own order."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _all(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.safetensors"))


def _keep_names(directory: Path) -> None:
    """The names in a directory outlive a power cut: the new checkpoint is there before an old one goes."""
    if os.name == "nt":
        return  # Windows cannot open a directory
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
