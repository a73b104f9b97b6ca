"""The cascade of a student of benchmarks/intents.py and its teacher.

    python benchmarks/intents_cascade.py DATA WORK minilm [--seed 0]

Makes a file of one distilled student, writes the replays of validation and test texts to WORK, makes two policies of
the first (one with `edgewise calibrate`), and judges both on the second with `edgewise replay`. Then student and
teacher answer all test texts as a cascade, one by one. Writes a Measurement file.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from intents import JUDGED, RESULTS, TAUGHT, Work, accuracy, answers, loaded, settings
from intents_teacher import Teacher, padded

from edgewise.bench.measure import Measurement, typed
from edgewise.compress.classify.text_graph import as_bytes
from edgewise.engines.onnx_net import OnnxNet
from edgewise.evaluate.interval import bootstrap
from edgewise.joint.judge import SignalsJudge
from edgewise.joint.policy import Policy, Whole
from edgewise.joint.predictors import PredictorCascade
from edgewise.joint.replay import Replay

BUDGET = 0.14  # of the validation texts go to the cloud: 0.15 is wanted, and other texts are other ones
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)  # what `log_margin` may weigh beside `energy`
SIGNALS = {"max_softmax": 1, "log_margin": 1, "entropy": -1, "energy": 1}  # which way is surer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work.opened(options.data, options.work)
    taken = Measurement.taken(
        "intents_cascade",
        command=typed(__file__),
        results=asyncio.run(cascaded(work, options.minilm, options.seed)),
        libraries=["edgewise", "numpy", "onnxruntime", "scikit-learn", "torch", "transformers"],
        settings={"seed": options.seed, "budget": BUDGET, **settings(work)},
    )
    print(taken.save(RESULTS).read_text())


class Cloud:
    """The teacher as a Predictor of the same bytes that the student's file takes."""

    name = "MiniLM"

    def __init__(self, minilm: Path, work: Work) -> None:
        self.model = Teacher(minilm, len(work.intents.classes))
        self.model.load_state_dict(torch.load(work.directory / "teacher.pt", weights_only=True)["teacher"])
        self.model.eval()

    async def predict(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Mapping[str, npt.NDArray[Any]]:
        texts = [bytes(row).rstrip(b"\0").decode() for row in inputs["text"]]
        with torch.inference_mode():
            return {"logits": self.model(*padded(self.model.tokens(texts))).numpy()}

    async def close(self) -> None:
        del self.model


async def cascaded(work: Work, minilm: Path, seed: int) -> dict[str, Any]:
    path = work.directory / "student.onnx"
    size = loaded(work, TAUGHT, seed).save(path)
    edge, took = OnnxNet(path), list[float]()
    near = {part: await one_by_one(edge, work.intents.parts[part].texts, took) for part in JUDGED}
    replays = {name: work.directory / f"intents-{name}.jsonl.gz" for name in ("val", "test")}
    for name, file in replays.items():
        write_replay(file, work, near, (name, f"oos_{name}"))
    policies = {name: work.directory / f"policy-{name}.json" for name in ("fitted", "scope")}
    fitted = called("calibrate", replays["val"], "-o", policies["fitted"], "--budget", BUDGET)
    weights = scope_policy(policies["scope"], work, replays["val"], near)
    judged = {name: called("replay", replays["test"], "--policy", path) for name, path in policies.items()}
    results = {
        "bytes": size,
        "parameters": sum(one.numel() for one in work.student(0).parameters()),
        "predict_us": {"median": 1e6 * float(np.median(took)), "p99": 1e6 * float(np.quantile(took, 0.99))},
        "edge": {part: accuracy(work, near[part], part) for part in JUDGED},
        "cloud": {part: accuracy(work, work.taught[part], part) for part in JUDGED},
        "file_against_module": worst(work, near, seed),
        "calibrate": {key: fitted[key] for key in ("feasible", "threshold", "expected_escalation", "rows")},
        "scope": weights,
        "replay": judged,
        "policies": {
            name: split(work, "test", kept_by(Policy.open(path), replays["test"]), near)
            for name, path in policies.items()
        },
        "signals": by_signal(work, replays, near),
    }
    policy = Policy.open(policies["scope"])
    results["cascade"] = await decided(work, PredictorCascade(edge, Cloud(minilm, work), policy))
    return results


async def one_by_one(net: OnnxNet, texts: Sequence[str], took: list[float]) -> npt.NDArray[np.float32]:
    found = []
    for text in texts:
        started = time.perf_counter()
        found.append((await net.predict({"text": as_bytes([text])}))["logits"])
        took.append(time.perf_counter() - started)
    return np.concatenate(found).astype(np.float32)


def worst(work: Work, near: Mapping[str, npt.NDArray[np.float32]], seed: int) -> dict[str, float]:
    """The file beside the module that it was made of, over the test texts."""
    model = loaded(work, TAUGHT, seed)
    wanted = np.concatenate([answers(work, model, part) for part in ("test", "oos_test")])
    found = np.concatenate([near[part] for part in ("test", "oos_test")])
    return {
        "greatest_difference": float(np.abs(found - wanted).max()),
        "same_answer": float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    }


def write_replay(path: Path, work: Work, near: Mapping[str, npt.NDArray[np.float32]], parts: Sequence[str]) -> None:
    """docs/formats/replay.md. What is out of scope is answered rightly by `oos`, or if it is sent on, whatever the
    teacher makes of it. The same logits make the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as file:
        for part in parts:
            rows = zip(work.intents.parts[part].labels, near[part], work.taught[part], strict=True)
            for number, (gold, edge, cloud) in enumerate(rows):
                row = {
                    "id": f"{part}-{number}",
                    "gold": work.intents.classes[gold],
                    "edge": {
                        "correct": bool(edge.argmax() == gold),
                        "logits": np.round(edge.astype(float), 4).tolist(),
                    },
                    "cloud": {"correct": bool(cloud.argmax() == gold or gold == work.intents.out)},
                }
                file.write(msgspec.json.encode(row) + b"\n")


def called(verb: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgewise.cli.main", verb, *map(str, arguments), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def kept_by(policy: Policy, path: Path) -> npt.NDArray[np.bool_]:
    judged = [policy.whole.judge.judge(row.evidence()) for row in Replay.open(path)]
    return np.array([one is not None and one.worth > policy.whole.threshold for one in judged])


def scope_policy(path: Path, work: Work, replay: Path, near: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, float]:
    """A policy of two signals, made for what is out of scope: a threshold on energy + weight · log_margin that sends
    BUDGET of the validation texts in scope to the cloud. The weight is the one that catches most of those out of scope,
    and then the one with the most right answers."""
    signals = [row.evidence().all(("energy", "log_margin")) for row in Replay.open(replay)]
    values = np.array(signals, np.float64)
    found = []
    for weight in MARGINS:
        score = values @ np.array([1.0, weight])
        threshold = float(np.quantile(score[: len(work.intents.parts["val"])], BUDGET))
        figures = split(work, "val", score > threshold, near)
        found.append((figures["out_of_scope_caught"], figures["in_scope_accuracy"], weight, threshold))
    *_, weight, threshold = max(found)
    judge = SignalsJudge({"energy": 1.0, "log_margin": weight}, -threshold, "logistic")
    policy = msgspec.structs.replace(Policy.default(), whole=Whole(0.5, judge), early=None)
    path.write_bytes(policy.to_json())
    return {"energy": 1.0, "log_margin": weight, "threshold": threshold}


def split(
    work: Work, part: str, kept: npt.NDArray[np.bool_], near: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, float]:
    """What a decision about the texts of a part, in scope and then out of it, comes to, each kind by itself."""
    inside = len(work.intents.parts[part])
    gold, out = work.intents.parts[part].labels, work.intents.out
    edge, cloud = near[part].argmax(axis=1), work.taught[part].argmax(axis=1)
    served = np.where(kept[:inside], edge, cloud) == gold
    strange = near[f"oos_{part}"].argmax(axis=1)
    escalated, refused = ~kept[inside:], strange == out
    told = np.where(escalated, work.taught[f"oos_{part}"].argmax(axis=1), strange) == out
    found = bootstrap(
        np.stack([served, cloud == gold], axis=1), lambda rows: float(rows[:, 0].mean() / rows[:, 1].mean())
    )
    caught = bootstrap(escalated | refused)
    return {
        "in_scope_escalated": float(1 - kept[:inside].mean()),
        "in_scope_accuracy": float(served.mean()),
        "of_the_clouds": found.value,
        "of_the_clouds_low": found.low,
        "of_the_clouds_high": found.high,
        "out_of_scope_escalated": float(escalated.mean()),
        "out_of_scope_refused": float((~escalated & refused).mean()),
        "out_of_scope_caught": caught.value,
        "out_of_scope_caught_low": caught.low,
        "out_of_scope_caught_high": caught.high,
        "out_of_scope_told": float(told.mean()),
        "all_escalated": float(1 - kept.mean()),
    }


def by_signal(
    work: Work, replays: Mapping[str, Path], near: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, dict[str, float]]:
    """One signal alone, its threshold where the least sure BUDGET of the validation texts in scope is sent away."""
    inside = len(work.intents.parts["val"])
    found = {}
    for name, sign in SIGNALS.items():
        values = {
            key: np.array([sign * (row.evidence().get(name) or 0.0) for row in Replay.open(path)])
            for key, path in replays.items()
        }
        found[name] = split(work, "test", values["test"] > np.quantile(values["val"][:inside], BUDGET), near)
    return found


async def decided(work: Work, cascade: PredictorCascade) -> dict[str, Any]:
    """All test texts through student and teacher, one by one."""
    found: dict[str, Any] = {}
    for part in ("test", "oos_test"):
        right, cloud = 0, 0
        texts = work.intents.parts[part]
        for text, gold in zip(texts.texts, texts.labels, strict=True):
            outputs, (decision,) = await cascade.decide({"text": as_bytes([text])})
            right += int(outputs["logits"].argmax() == gold)
            cloud += decision.route == "cloud"
        found[part] = {"accuracy": right / len(texts), "escalated": cloud / len(texts)}
    await cascade.close()
    return found


if __name__ == "__main__":
    main()
