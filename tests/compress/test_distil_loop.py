"""The loop of a distillation: its steps, its checkpoints, and what stops it."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from distil_pieces import HELD_OUT, LENGTH, ROWS, VOCABULARY, Small, config, lessons, run
from torch import nn

from edgewise.compress.distil import checkpoint
from edgewise.compress.distil.config import Train
from edgewise.compress.distil.loop import adamw, learning_rate, rows_of_step
from edgewise.compress.distil.loss import TopTokens, distillation_loss
from edgewise.errors import CheckpointError, Diverged, UsageError

STEPS = 20
TIMES = ("elapsed_s",)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in log]


def steps_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if "loss" in line]


def assert_same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(curve(one), curve(other), strict=True):
        flat_a, flat_b = ({**line, "held_out": 0, **line.get("held_out", {})} for line in (a, b))
        assert flat_a == pytest.approx(flat_b, abs=1e-6, rel=0)


# Which rows, and how fast


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    drawn = np.concatenate([rows_of_step(step, 4, 10, seed=5) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])
    assert list(rows_of_step(1, 4, 10, seed=5)) == list(drawn[4:8])
    assert list(rows_of_step(1, 4, 10, seed=6)) != list(drawn[4:8])


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, Train(tokens=1, lr=0.1, warmup=0.1)) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == 0.1
    assert np.diff(rates[:11]) == pytest.approx([0.1 / 11] * 10)
    assert rates[55] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-4


def test_only_matrices_decay() -> None:
    groups = adamw(Small(), Train(tokens=1, weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.3, {2}), (0.0, {1})]


# A run


def test_a_run_learns_from_teacher_and_text(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert (found.steps, found.tokens, found.resumed_from) == (STEPS, STEPS * 8 * LENGTH, None)
    steps = steps_of(found.log)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(line["loss"] == pytest.approx(0.5 * 4 * line["kl"] + 0.5 * line["ce"], rel=1e-5) for line in steps)
    looks = [line for line in found.log if "held_out" in line]
    assert [line["step"] for line in looks] == [0, 5, 10, 15, 20]
    assert looks[-1]["held_out"]["kl"] < looks[0]["held_out"]["kl"]
    on_disk = [msgspec.json.decode(line) for line in (tmp_path / "training.jsonl").read_bytes().splitlines()]
    assert on_disk == found.log
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020.safetensors"]


def test_a_step_is_a_plain_step_of_torch(tmp_path: Path) -> None:
    """The same rows in one batch, with torch's own AdamW: gradients are those of all real tokens, each with one weight,
    though the two parts of the step have different numbers of them."""
    given, model = lessons(padded=True), Small()
    model.dropout.p = 0.0
    settings = {"tokens": 3 * 8 * LENGTH, "clip": 1e9, "warmup": 0.0}
    run(tmp_path, model=model, lessons=given, **settings)
    plain = Small()
    plain.dropout.p = 0.0
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 0.1},
         {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0}],
        betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    for step in range(3):
        at = rows_of_step(step, 8, ROWS, 0)
        labels = torch.from_numpy(given.train[at]).long()
        assert given.taught is not None
        told = given.taught.rows(at)
        top = TopTokens(*(torch.from_numpy(array) for array in (told.ids, told.logprobs, told.rest)))
        optimizer.zero_grad()
        logits = plain(labels.clamp(min=0))
        labels[labels < 0] = -100
        distillation_loss(logits, top, labels, temperature=2.0, alpha=0.5, causal=True).total.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3, Train(tokens=1, lr=0.01, warmup=0.0))
        optimizer.step()
    for mine, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_nothing_but_memory(tmp_path: Path) -> None:
    logs = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = Small()
        model.dropout.p = 0.0
        found = run(
            tmp_path / str(batch), model=model, lessons=lessons(padded=True), batch=batch, accumulate=accumulate
        )
        logs.append([line["loss"] for line in steps_of(found.log)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_two_processes_go_the_way_of_one(tmp_path: Path) -> None:
    """Each takes half of the rows; the weights that come out are those of one process with all of them."""
    settings = {"tokens": 4 * 8 * LENGTH, "dropout": 0.0}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, Path(__file__).with_name("distil_pieces.py"), tmp_path / "two"]
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **place, "ACCELERATE_USE_CPU": "true"}
        half = msgspec.json.encode(settings | {"batch": 2}).decode()
        processes.append(subprocess.Popen([*program, half], env=environment))
    assert [process.wait(120) for process in processes] == [0, 0]
    alone = Small()
    alone.dropout.p = 0.0
    found = run(tmp_path / "one", model=alone, tokens=settings["tokens"])
    two = [msgspec.json.decode(line) for line in lines_of(tmp_path / "two")]
    assert len(two) == len(found.log)
    assert [line["loss"] for line in steps_of(two)] == pytest.approx([line["loss"] for line in steps_of(found.log)])
    together, model = checkpoint.latest(tmp_path / "two/checkpoints"), Small(seed=1)
    assert together is not None
    assert checkpoint.read_state(together).facts["processes"] == 2
    checkpoint.load(together, model, adamw(model, Train(tokens=1)))
    for mine, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_without_alpha_the_text_alone_teaches(tmp_path: Path) -> None:
    """The teacher is still what the held-out rows are compared with."""
    found = run(tmp_path, loss={"alpha": 0.0})
    assert all("kl" not in line and line["loss"] == line["ce"] for line in steps_of(found.log))
    assert {"kl", "top1_agreement"} < set(found.log[-1]["held_out"])


def test_held_out_figures_are_of_the_whole_held_out_rows(tmp_path: Path) -> None:
    given, model = lessons(), Small().eval()
    found = run(tmp_path, lessons=given)
    with torch.no_grad():
        logits = model(torch.from_numpy(given.held_out).long())[:, :-1]
    assert given.held_out_taught is not None
    best = given.held_out_taught.rows(np.arange(HELD_OUT)).ids[:, :-1, 0]
    agreed = float((logits.argmax(-1).numpy() == best).mean())
    ce = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), torch.from_numpy(given.held_out[:, 1:]).long().reshape(-1)
    )
    assert found.log[0]["held_out"]["top1_agreement"] == pytest.approx(agreed)
    assert found.log[0]["held_out"]["ce"] == pytest.approx(float(ce), rel=1e-5)


def test_bf16_keeps_weights_and_loss_in_float32(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()
    model = Small()
    model.register_forward_hook(lambda part, inputs, logits: seen.add(logits.dtype))
    found = run(tmp_path, model=model, precision="bf16", evaluations=0)
    assert seen == {torch.bfloat16, torch.float32}  # what is learnt from, and what is looked at before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert steps_of(found.log)[-1]["loss"] < 0.9 * steps_of(found.log)[0]["loss"]


# Killed and resumed


def test_a_run_that_is_killed_again_and_again_has_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    settings = {"tokens": 60 * 8 * LENGTH, "checkpoint_s": 0.02}
    whole = run(tmp_path / "whole", tokens=settings["tokens"])
    directory = tmp_path / "killed"
    killed_at = []
    for until in np.random.default_rng(0).integers(3, 20, 2).cumsum():
        program = [sys.executable, Path(__file__).with_name("distil_pieces.py"), directory]
        process = subprocess.Popen([*program, msgspec.json.encode(settings).decode()])
        while process.poll() is None and len(lines_of(directory)) < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        killed_at.append(len(lines_of(directory)))
    assert checkpoint.latest(directory / "checkpoints") is not None
    found = run(directory, resume=True, **settings)
    assert found.resumed_from is not None
    assert 0 < int(found.resumed_from.stem.split("-")[1]) < 60
    assert_same_curve(found.log, whole.log)
    assert lines_of(directory) == [msgspec.json.encode(line) for line in found.log]


def lines_of(directory: Path) -> list[bytes]:
    log = directory / "training.jsonl"
    return log.read_bytes().splitlines() if log.exists() else []


def test_parameters_of_a_resumed_run_are_those_of_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped, resumed = Small(), Small(), Small(seed=1)
    run(tmp_path / "whole", model=whole)
    _stop_after(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", model=stopped, checkpoint_s=1e-9)
    monkeypatch.undo()
    run(tmp_path / "stopped", model=resumed, resume=True)
    for mine, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-7)


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends after so many checkpoints, as by Ctrl-C."""
    count, save = iter(range(1, 1000)), checkpoint.save

    def stopping(*args: Any) -> Path:
        path = save(*args)
        if next(count) == steps:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", stopping)


def test_a_run_that_is_done_stays_done(tmp_path: Path) -> None:
    first = run(tmp_path)
    model = Small(seed=1)
    again = run(tmp_path, resume=True, model=model)
    assert again.log == first.log
    assert again.resumed_from is not None


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    found = run(tmp_path, resume=True, tokens=8 * LENGTH)
    assert found.resumed_from is None
    assert found.steps == 1


def test_two_checkpoints_stay_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    whole = run(tmp_path, checkpoint_s=1e-9)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000019.safetensors", "step-00000020.safetensors"]
    kept[1].write_bytes(kept[1].read_bytes()[:-100])
    left = tmp_path / "checkpoints/.step-00000007.safetensors.partial"  # by a process that was killed
    left.write_bytes(b"half of it")
    found = run(tmp_path, resume=True)
    assert not left.exists()
    assert found.resumed_from == kept[0]
    assert_same_curve(found.log, whole.log)
    for path in kept:
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tmp_path, resume=True)


# What stops a run


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    run(tmp_path, tokens=8 * LENGTH)
    with pytest.raises(UsageError, match=r"holds a run already: step-00000001\.safetensors"):
        run(tmp_path, tokens=8 * LENGTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.02}, "train.lr was 0.01 and is 0.02"),
        ({"loss": {"alpha": 0.25}}, "loss.alpha was 0.5 and is 0.25"),
        ({"lessons": lessons(digest="e")}, "data was 'd' and is 'e'"),
        ({"model": Small(vocabulary=40)}, r"no table.weight of shape \(40, 16\)"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    run(tmp_path, tokens=8 * LENGTH)
    before = sorted((tmp_path / "checkpoints").iterdir())
    with pytest.raises(UsageError, match=words):
        run(tmp_path, resume=True, tokens=8 * LENGTH, **changes)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_when_it_writes_may_change(tmp_path: Path) -> None:
    run(tmp_path, tokens=8 * LENGTH)
    run(tmp_path, resume=True, tokens=8 * LENGTH, checkpoint_s=17, evaluations=7, evaluation_rows=3)


class Failing(Small):
    """Its logits are no numbers from the seventh step on."""

    calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        logits = super().forward(ids)
        return logits * (torch.nan if self.calls > 2 * 6 else 1.0)


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    model = Failing()
    with pytest.raises(Diverged, match=r"step 7 has loss nan.*step-00000006.safetensors"):
        run(tmp_path, model=model, checkpoint_s=1e-9)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert checkpoint.read_state(tmp_path / "checkpoints/step-00000006.safetensors").step == 6


def test_a_gradient_that_is_infinite_stops_too(tmp_path: Path) -> None:
    model = Small()
    model.mix.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"step 1 has gradient_norm (nan|inf); there is no checkpoint yet"):
        run(tmp_path, model=model)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"speaks of token 3\d, the student has 30 tokens"):
        run(tmp_path, model=Small(vocabulary=30), lessons=lessons(vocabulary=30))


def test_data_without_a_row_is_refused(tmp_path: Path) -> None:
    given = lessons()
    empty = type(given)(given.train[:0], given.held_out, given.taught, given.held_out_taught, "d")
    with pytest.raises(UsageError, match="no row to train on"):
        run(tmp_path, lessons=empty)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    flush = os.fsync

    def full(handle: int) -> None:
        if "step-00000009" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; the last.*step-00000008.*make room") as stopped:
        run(tmp_path / "full", checkpoint_s=1e-9)
    assert not stopped.value.retryable
    left = [path.name for path in sorted((tmp_path / "full/checkpoints").iterdir())]
    assert left == ["step-00000007.safetensors", "step-00000008.safetensors"]
    monkeypatch.undo()
    found = run(tmp_path / "full", resume=True)
    assert_same_curve(found.log, whole.log)


def test_a_write_that_is_cut_short_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A real one: the process may not make files as large as a checkpoint."""
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    state = checkpoint.State(step=1, tokens=1, facts={})
    first = checkpoint.save(tmp_path, model, optimizer, state, b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot go on writing.*step-00000001"):
            checkpoint.save(tmp_path, model, optimizer, msgspec.structs.replace(state, step=2), b"")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [first]
    assert checkpoint.latest(tmp_path) == first


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = checkpoint.State(format=2, step=1, tokens=1, facts={})
    path = checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), state, b"")
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1"):
        checkpoint.read_state(path)


def test_the_config_of_these_tests_is_one(tmp_path: Path) -> None:
    assert config(tmp_path).train.tokens == STEPS * 8 * LENGTH
