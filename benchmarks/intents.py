"""A classifier of 150 intents for the smallest devices, with a teacher and without.

    python benchmarks/intents_teacher.py DATA minilm WORK
    python benchmarks/intents.py DATA WORK [--seeds 5]

Trains one student for each way of ARMS and each seed, all on the same n-grams, in batches of the same size and as many
of them, and writes a Measurement file. Students that are in WORK already are not trained again. The cascade of
student and teacher is benchmarks/intents_cascade.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from intents_teacher import INVENTED
from intents_texts import Intents, Part, opened

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.compress.classify.text_classifier import TextClassifier
from edgewise.compress.classify.text_graph import NGrams
from edgewise.compress.distil.trainer import DistillationTrainer
from edgewise.evaluate.interval import bootstrap

RESULTS = Path(__file__).parent / "results"
ROWS = 10_000  # n-grams with a vector
WIDTH, HIDDEN = 128, 512
STEPS, BATCH = 6000, 256
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 4e-3, 0.02, 0.05
TEMPERATURE = 2.0
LABELLED_SHARE = 0.5  # of a batch, where the rest has no labels
WAYS = ("all", "intents")
JUDGED = ("val", "test", "oos_val", "oos_test")


@dataclass(frozen=True)
class Arm:
    """`alpha` is the teacher's share of the loss. With `invented`, texts that nobody labelled are learned from too: the
    teacher's answer stands for their label, and those that it takes for none of the intents are left out. The noise of
    TextClassifier is what the validation texts liked best: labels want much of it, a teacher little."""

    alpha: float
    invented: bool
    left_out: float
    dropout: float


ARMS = {
    "labels": Arm(0.0, invented=False, left_out=0.5, dropout=0.3),
    "teacher": Arm(0.5, invented=False, left_out=0.5, dropout=0.3),
    "teacher, more texts": Arm(0.5, invented=True, left_out=0.1, dropout=0.15),
}
TOLD, TAUGHT = "labels", "teacher, more texts"


@dataclass(frozen=True)
class Work:
    """What all students learn from and are judged on: rows of n-grams and the teacher's logits, by part."""

    directory: Path
    intents: Intents
    ngrams: NGrams
    ids: Mapping[str, npt.NDArray[np.int32]]
    taught: Mapping[str, npt.NDArray[np.float32]]

    @staticmethod
    def opened(data: Path, directory: Path) -> Work:
        intents = opened(data, INVENTED, directory)
        labelled = told(intents)
        cached = directory / "ngrams.npz"
        if not cached.is_file():
            ngrams = NGrams.chosen(labelled.texts, labelled.labels, ROWS)
            np.savez(cached, rows=ngrams.rows, **{name: ngrams.of(part.texts) for name, part in intents.parts.items()})
        ids = dict(np.load(cached))
        return Work(directory, intents, NGrams(ids.pop("rows")), ids, dict(np.load(directory / "teacher.npz")))

    def path(self, arm: str, seed: int) -> Path:
        return self.directory / f"student-{list(ARMS).index(arm)}-{seed}.pt"

    def student(self, seed: int, **noise: float) -> TextClassifier:
        return TextClassifier(self.ngrams, len(self.intents.classes), width=WIDTH, hidden=HIDDEN, seed=seed, **noise)


def told(intents: Intents) -> Part:
    """The texts with labels."""
    return intents.parts["train"] + intents.parts["oos_train"] + intents.parts["outliers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work.opened(options.data, options.work)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("fork")) as pool:
        wanted = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
        under_way = [pool.submit(train, work, *one) for one in wanted if not work.path(*one).is_file()]
        for student in under_way:
            student.result()
    taken = Measurement.taken(
        "intents",
        command=typed(__file__),
        results=compared(work, options.seeds),
        libraries=["edgewise", "numpy", "torch", "transformers"],
        settings={"seeds": options.seeds, **settings(work)},
    )
    print(taken.save(RESULTS).read_text())


def settings(work: Work) -> dict[str, Any]:
    """What is the same for all students."""
    return {
        **{"ngrams": ROWS, "width": WIDTH, "hidden": HIDDEN, "steps": STEPS, "batch": BATCH},
        **{"temperature": TEMPERATURE, "invented": INVENTED, "labelled": len(told(work.intents))},
    }


# Students


def train(work: Work, arm: str, seed: int) -> None:
    """One student, to its file."""
    torch.manual_seed(seed)
    how = ARMS[arm]
    model = work.student(seed, left_out=how.left_out, dropout=how.dropout)
    labelled = told(work.intents)
    parts = ("train", "oos_train", "outliers", "invented")
    ids = torch.from_numpy(stacked([work.ids[part] for part in parts]))
    logits = torch.from_numpy(np.concatenate([work.taught[part] for part in parts]))
    labels = logits.argmax(dim=1)
    labels[: len(labelled)] = torch.from_numpy(labelled.labels)
    longest = (ids > 0).sum(dim=1)
    pool = len(labelled) + np.flatnonzero(labels[len(labelled) :].numpy() != work.intents.out)
    trainer = DistillationTrainer(
        lambda rows: logits[rows], lambda rows: model(ids[rows, : longest[rows].max()]), TEMPERATURE, how.alpha
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    lot, started = np.random.default_rng(seed), time.monotonic()
    share = round(BATCH * LABELLED_SHARE) if how.invented else BATCH
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / (WARM_UP * STEPS)) * (1 - step / STEPS)
        known = lot.integers(len(labelled), size=share)
        others = pool[lot.integers(len(pool), size=BATCH - share)]
        rows = torch.from_numpy(np.concatenate([known, others]))
        optimizer.zero_grad()
        trainer.train_step(rows, labels[rows]).backward()
        optimizer.step()
    model.eval()
    unfinished = work.path(arm, seed).with_suffix(".part")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(work.path(arm, seed))
    right = accuracy(work, answers(work, model, "val"), "val")
    print(f"{arm}, seed {seed}: {right:.4f} of val in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def stacked(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    widest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts])


@torch.inference_mode()
def answers(work: Work, model: TextClassifier, part: str) -> npt.NDArray[np.float32]:
    """Logits [texts, classes]."""
    found: npt.NDArray[np.float32] = model(torch.from_numpy(work.ids[part])).numpy()
    return found


def accuracy(work: Work, logits: npt.NDArray[np.float32], part: str) -> float:
    return float((logits.argmax(axis=1) == work.intents.parts[part].labels).mean())


def loaded(work: Work, arm: str, seed: int) -> TextClassifier:
    model = work.student(seed)
    model.load_state_dict(torch.load(work.path(arm, seed), weights_only=True))
    return model.eval()


def compared(work: Work, seeds: int) -> dict[str, Any]:
    """Each way's figures on the test texts, seed by seed, and what it gains over labels alone."""
    logits = {
        arm: {part: [answers(work, loaded(work, arm, seed), part) for seed in range(seeds)] for part in JUDGED}
        for arm in ARMS
    }
    right = {arm: {way: hits(work, found["test"], way) for way in WAYS} for arm, found in logits.items()}
    return {
        "teacher": {
            **{part: accuracy(work, work.taught[part], part) for part in JUDGED},
            **{way: float(hits(work, [work.taught["test"]], way).mean()) for way in WAYS},
        },
        "arms": {
            arm: {
                **{
                    way: {**figure(found.mean(axis=1), "share"), "mean": float(found.mean())}
                    for way, found in of.items()
                },
                "gain": {way: gained(found, right[TOLD][way]) for way, found in of.items()} if arm != TOLD else None,
                "refused": float(np.mean([one.argmax(axis=1) == work.intents.out for one in logits[arm]["test"]])),
                "refused_out_of_scope": float(
                    np.mean([one.argmax(axis=1) == work.intents.out for one in logits[arm]["oos_test"]])
                ),
                "validation": float(np.mean([accuracy(work, one, "val") for one in logits[arm]["val"]])),
            }
            for arm, of in right.items()
        },
    }


def hits(work: Work, logits: Sequence[npt.NDArray[np.float32]], way: str) -> npt.NDArray[np.bool_]:
    """Which of the test texts in scope are answered rightly [seeds, texts]: `all` answers allowed, or `intents` alone,
    `oos` left out."""
    allowed = work.intents.out + (way == "all")
    return np.array([one[:, :allowed].argmax(axis=1) == work.intents.parts["test"].labels for one in logits])


def gained(found: npt.NDArray[np.bool_], told: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """In points: the mean over seeds, with its 95 % interval over seeds and over texts."""
    by_seed = 100 * (found.mean(axis=1) - told.mean(axis=1))
    by_text = 100 * (found.mean(axis=0) - told.mean(axis=0))
    seeds, texts = bootstrap(by_seed), bootstrap(by_text)
    return {
        "points": seeds.value,
        "samples": by_seed.tolist(),
        "over_seeds": [seeds.low, seeds.high],
        "over_texts": [texts.low, texts.high],
    }


if __name__ == "__main__":
    main()
