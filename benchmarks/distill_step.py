"""What a training step of `edgewise distill` costs beside a bare loop in torch.

    python benchmarks/distill_step.py [--rounds 7] [--batch 2] [--json]

A network of the default student's form with random weights; rows of random tokens, and 64 random tokens a position for
a teacher's. Steps take turns, float32: of our loop (teacher and text), of a bare loop with the same loss written as one
would, and of a bare loop that knows no teacher at all. Beside them the same of DistillationTrainer, whose teacher is a
network of the same form, and of that loop written by hand. And how long a checkpoint takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.compress.distil import checkpoint
from edgewise.compress.distil.config import Config, Data, Loss, Train
from edgewise.compress.distil.loop import Lessons, Loop
from edgewise.compress.distil.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
LENGTH, K, TEMPERATURE, ALPHA, CLIP, THREADS = 256, 64, 2.0, 0.5, 1.0, 2
FORM = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 9,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 16_384,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "use_cache": False,
}
Step = Callable[[int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    lessons = random_lessons(args.batch * (args.rounds + 1))
    with tempfile.TemporaryDirectory() as place:
        loop = our_loop(lessons, args.batch, args.rounds + 1, Path(place))
        ways: dict[str, Step] = {
            "edgewise_distill": loop.step,
            "bare_same_loss": bare(lessons, args.batch, same_loss),
            "bare_text_alone": bare(lessons, args.batch, text_alone),
            "trainer": with_trainer(lessons, args.batch),
            "bare_with_teacher": with_teacher_by_hand(lessons, args.batch),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for round in range(args.rounds + 1):  # the first does not count
            order = list(ways) if round % 2 else list(reversed(ways))
            for name in order:
                start = time.perf_counter()
                ways[name](round)
                taken[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        loop.finish()
        checkpoint_s = time.perf_counter() - start
        size = checkpoint.latest(Path(place) / "checkpoints")
        assert size is not None
        checkpoint_bytes = size.stat().st_size
    seconds = {name: np.array(times[1:]) for name, times in taken.items()}
    tokens = args.batch * LENGTH
    ratios = {
        "to_bare_same_loss": seconds["bare_same_loss"] / seconds["edgewise_distill"],
        "to_bare_text_alone": seconds["bare_text_alone"] / seconds["edgewise_distill"],
        "trainer_to_bare": seconds["bare_with_teacher"] / seconds["trainer"],
    }
    results = {
        "tokens_per_s": {name: figure(tokens / times, "tok/s") for name, times in seconds.items()},
        "throughput_ratio": {name: figure(values, "1") for name, values in ratios.items()},
        "checkpoint": {"seconds": checkpoint_s, "bytes": checkpoint_bytes},
    }
    settings = {
        "form": FORM, "length": LENGTH, "batch": args.batch, "k": K, "threads": THREADS, "rounds": args.rounds,
    }  # fmt: skip
    measured = Measurement.taken(
        "distill_step",
        command=typed(__file__),
        results=results,
        libraries=["torch", "transformers", "accelerate"],
        settings=settings,
    )
    path = measured.save(ROOT / "benchmarks" / "results")
    if args.json:
        print(path.read_text())
    else:
        for name, one in {**results["tokens_per_s"], **results["throughput_ratio"]}.items():
            print(f"{name}: {one['median']:.4g} [{one['low']:.4g}, {one['high']:.4g}] {one['unit']}")
        print(f"checkpoint: {checkpoint_s:.2f} s for {checkpoint_bytes / 1e6:.0f} MB")


class RandomTeacher:
    """K tokens a position that nobody taught: the arithmetic is that of real ones."""

    def __init__(self, rows: int) -> None:
        random = np.random.default_rng(1)
        first = random.integers(0, FORM["vocab_size"] - K, (rows, LENGTH, 1))
        self._ids = (first + np.arange(K)).astype(np.int32)
        logits = random.normal(size=(rows, LENGTH, K + 1))
        known = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        self._logprobs, self._rest = known[..., :K], known[..., K]

    def rows(self, at: Any) -> Any:
        return SimpleNamespace(ids=self._ids[at], logprobs=self._logprobs[at], rest=self._rest[at])


def random_lessons(rows: int) -> Lessons:
    ids = np.random.default_rng(0).integers(0, FORM["vocab_size"], (rows + 1, LENGTH), dtype=np.int32)
    return Lessons(ids[:rows], ids[rows:], RandomTeacher(rows), RandomTeacher(1), "random")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**FORM))
    return model


def our_loop(lessons: Lessons, batch: int, steps: int, directory: Path) -> Loop:
    config = Config(
        name="step",
        teacher="none",
        data=Data(length=LENGTH),
        loss=Loss(temperature=TEMPERATURE, alpha=ALPHA, top_k=K),
        train=Train(tokens=steps * batch * LENGTH, batch=batch, clip=CLIP, precision="fp32", evaluations=1),
        output=str(directory),
    )
    loop = Loop(network(), lessons, config, directory, lambda text: None)
    loop.begin(resume=False)
    return loop


def bare(lessons: Lessons, batch: int, loss_of: Callable[[Tensor, Tensor, Any], Tensor]) -> Step:
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(number: int) -> None:
        at = np.arange(number * batch, (number + 1) * batch)
        ids = torch.from_numpy(lessons.train[at]).long()
        assert lessons.taught is not None
        loss = loss_of(model(ids).logits, ids, lessons.taught.rows(at))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def text_alone(logits: Tensor, ids: Tensor, told: Any) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def same_loss(logits: Tensor, ids: Tensor, told: Any) -> Tensor:
    logits = logits[:, :-1].reshape(-1, logits.shape[-1])
    top = torch.from_numpy(told.ids[:, :-1]).long().reshape(-1, K)
    known = np.concatenate([told.logprobs, told.rest[..., None]], -1)[:, :-1].reshape(-1, K + 1)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    coarse = torch.cat([logits.gather(-1, top), others], -1)
    kl = functional.kl_div(
        functional.log_softmax(coarse / TEMPERATURE, -1),
        functional.log_softmax(torch.from_numpy(known) / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    return ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * functional.cross_entropy(logits, ids[:, 1:].reshape(-1))


def with_trainer(lessons: Lessons, batch: int) -> Step:
    student = network().train()
    trainer = DistillationTrainer(network(seed=1), student, temperature=TEMPERATURE, alpha=ALPHA)
    return _stepping(student, lessons, batch, lambda ids: trainer.train_step(ids, ids))


def with_teacher_by_hand(lessons: Lessons, batch: int) -> Step:
    student, teacher = network().train(), network(seed=1).eval()

    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(ids).logits[:, :-1].reshape(-1, FORM["vocab_size"])
        logits = student(ids).logits[:, :-1].reshape(-1, FORM["vocab_size"])
        kl = functional.kl_div(
            functional.log_softmax(logits / TEMPERATURE, -1),
            functional.log_softmax(taught / TEMPERATURE, -1),
            reduction="batchmean",
            log_target=True,
        )
        return ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * functional.cross_entropy(logits, ids[:, 1:].reshape(-1))

    return _stepping(student, lessons, batch, loss_of)


def _stepping(model: nn.Module, lessons: Lessons, batch: int, loss_of: Callable[[Tensor], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(number: int) -> None:
        ids = torch.from_numpy(lessons.train[number * batch : (number + 1) * batch]).long()
        loss = loss_of(ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
