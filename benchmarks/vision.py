"""A cascade of two image classifiers, EfficientNet-Lite0 and Lite2 as ONNX files, over photos.

    pip install pillow
    python benchmarks/vision.py PHOTOS MODELS [--splits 20] [--json] [--replay FILE] [-o POLICY]

PHOTOS holds JPEGs and labels.json, MODELS the files that benchmarks/vision_models.py makes. Both networks look at each
photo; the replay of that is fitted on half of its rows and judged on the other half, in many random splits, for two
targets. With -o, a policy is fitted on all rows, and a PredictorCascade decides under it over the photos. Writes a
Measurement file.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from edgewise.bench.measure import Measurement, typed
from edgewise.engines.onnx_net import OnnxNet
from edgewise.evaluate.deferral import Curve
from edgewise.joint.fit.calibrate import calibrate
from edgewise.joint.fit.target import Budget, Cost, Target
from edgewise.joint.judging import judge_replay
from edgewise.joint.pair import Model, Pair
from edgewise.joint.policy import Policy
from edgewise.joint.predictors import PredictorCascade
from edgewise.joint.replay import Replay

EDGE, CLOUD = "efficientnet-lite0", "efficientnet-lite2"
TARGETS: Mapping[str, Target] = {"30 % budget": Budget(0.3), "cost, the default": Cost()}
BORDER = 32  # pixels around the crop, of side + BORDER: what these networks were tested with
TOGETHER = 10  # photos in a batch

Photo = npt.NDArray[np.uint8]  # [height, width, 3]
Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Labelled:
    """A photo and what is on it."""

    name: str
    gold: int
    pixels: Photo


class Sight:
    """A Predictor of photos, uint8 [height, width, 3] as `photo`, over a network that wants its own crop of them: the
    tiers of a cascade get the same inputs, and these two take images of different sizes."""

    def __init__(self, path: Path) -> None:
        self.net = OnnxNet(path)
        self.name = self.net.name
        shape = self.net.inputs[0].shape
        assert shape is not None
        assert shape[-1] is not None
        self.side = shape[-1]

    async def predict(self, inputs: Tensors) -> Tensors:
        return await self.predict_all([inputs["photo"]])

    async def predict_all(self, photos: Sequence[npt.NDArray[Any]]) -> Tensors:
        return await self.net.predict({"input": await asyncio.to_thread(prepared, photos, self.side)})

    async def close(self) -> None:
        await self.net.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--replay", type=Path, help="where the replay is written; MODELS/vision.jsonl.gz")
    parser.add_argument("-o", dest="policy", type=Path, help="fit on all rows, write the policy and run the cascade")
    options = parser.parse_args()
    results = asyncio.run(measured(options))
    taken = Measurement.taken(
        "vision",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "numpy", "onnxruntime", "pillow", "scikit-learn"],
        settings={"splits": options.splits, "photos": results["photos"]},
    )
    path = taken.save(Path(__file__).parent / "results")
    print(path.read_text() if options.json else table(results))


async def measured(options: argparse.Namespace) -> dict[str, Any]:
    photos = opened(options.photos)
    edge, cloud = Sight(options.models / f"{EDGE}.onnx"), Sight(options.models / f"{CLOUD}.onnx")
    logits = {sight.name: await seen(sight, photos) for sight in (edge, cloud)}
    path = options.replay or options.models / "vision.jsonl.gz"
    write_replay(path, photos, logits[EDGE], logits[CLOUD])
    replay = Replay.open(path)
    results: dict[str, Any] = {
        "photos": len(replay),
        "tiers": compared(replay),
        "targets": {name: drawn(replay, target, options.splits) for name, target in TARGETS.items()},
    }
    if options.policy:
        pair = Pair(*(model(options.models / f"{name}.onnx") for name in (EDGE, CLOUD)))
        policy = fitted_on_all(replay, pair, options.policy)
        results["cascade"] = await decided(replay, photos, edge, cloud, policy)
    await edge.close()
    await cloud.close()
    return results


# What the networks see


def opened(directory: Path) -> list[Labelled]:
    labels = msgspec.json.decode((directory / "labels.json").read_bytes())
    return [Labelled(name, label["class"], pixels(directory / name)) for name, label in sorted(labels.items())]


def pixels(path: Path) -> Photo:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def prepared(photos: Sequence[Photo], side: int) -> npt.NDArray[np.float32]:
    """The middle of each, float32 [photos, 3, side, side] with (byte - 127) / 128.

    That is what these weights were trained with. Over 500 photos of a shorter side of 256 it gives accuracies of 0.866
    (Lite0) and 0.870 (Lite2); ImageNet's mean and deviation give 0.752 and 0.778. Whole squares instead of the middle:
    0.860 and 0.862."""
    cropped = np.stack([np.asarray(middle(Image.fromarray(photo), side), np.float32) for photo in photos])
    return np.ascontiguousarray((cropped.transpose(0, 3, 1, 2) - 127) / 128)


def middle(image: Image.Image, side: int) -> Image.Image:
    """side / (side + BORDER) of the shorter side, as a square of `side`."""
    kept = min(image.size) * side / (side + BORDER)
    left, top = (image.width - kept) / 2, (image.height - kept) / 2
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + kept, top + kept))


async def seen(sight: Sight, photos: Sequence[Labelled]) -> npt.NDArray[np.float32]:
    """Logits [photos, classes]."""
    batches = [photos[start : start + TOGETHER] for start in range(0, len(photos), TOGETHER)]
    found = [await sight.predict_all([photo.pixels for photo in batch]) for batch in batches]
    return np.concatenate([one["logits"] for one in found]).astype(np.float32)


def write_replay(path: Path, photos: Sequence[Labelled], edge: npt.ArrayLike, cloud: npt.ArrayLike) -> None:
    """docs/formats/replay.md. The same logits make the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as file:
        for photo, near, far in zip(photos, np.asarray(edge, np.float64), np.asarray(cloud), strict=True):
            row = {
                "id": photo.name,
                "gold": photo.gold,
                "edge": {"correct": bool(near.argmax() == photo.gold), "logits": np.round(near, 4).tolist()},
                "cloud": {"correct": bool(far.argmax() == photo.gold)},
            }
            file.write(msgspec.json.encode(row) + b"\n")


# What a policy makes of it


def compared(replay: Replay) -> dict[str, float]:
    edge, cloud = replay.edge_right, replay.cloud_right
    return {
        "edge_accuracy": float(edge.mean()),
        "cloud_accuracy": float(cloud.mean()),
        "cloud_fixes": float((~edge & cloud).mean()),
        "cloud_breaks": float((edge & ~cloud).mean()),
    }


def drawn(replay: Replay, target: Target, splits: int) -> dict[str, Any]:
    """Means and deviations over the splits; `apgr` over those in which the cloud is better than the edge."""
    rows = [one_split(replay, target, seed) for seed in range(splits)]
    columns = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    return {
        "splits": splits,
        "with_apgr": len(columns["apgr"]),
        "mean": {key: float(np.mean(values)) for key, values in columns.items() if values},
        "deviation": {key: float(np.std(values)) for key, values in columns.items() if values},
    }


def one_split(replay: Replay, target: Target, seed: int) -> dict[str, float | None]:
    """Fitted on half of the rows, judged on the other half, where the greatest softmax probability sends the same share
    to the cloud."""
    started = time.perf_counter()
    policy = calibrate(replay, target, labels=len(replay) // 2, seed=seed).policy
    took = time.perf_counter() - started
    assert policy is not None
    judged = judge_replay(replay, policy)
    assert not judged.in_sample
    softmax, oracle = judged.baselines["max_softmax"], judged.baselines["oracle"]
    better = judged.cloud_accuracy > judged.edge_accuracy
    return {
        "edge_accuracy": judged.edge_accuracy,
        "cloud_accuracy": judged.cloud_accuracy,
        "escalated": judged.escalated,
        "accuracy": judged.accuracy.value,
        "softmax_accuracy": softmax.at(judged.escalated),
        "oracle_accuracy": oracle.at(judged.escalated),
        "area": area(judged.curve),
        "softmax_area": area(softmax),
        "apgr": judged.curve.apgr if better else None,
        "softmax_apgr": softmax.apgr if better else None,
        "auroc": judged.auroc,
        "ece": judged.ece,
        "fit_s": took,
        "policy_bytes": len(policy.to_json()),
    }


def area(curve: Curve) -> float:
    """The mean accuracy over all shares, which has a meaning where both tiers are equally good too."""
    return float(np.trapezoid(curve.accuracy, curve.escalated))


def fitted_on_all(replay: Replay, pair: Pair, path: Path) -> Policy:
    """Of the first target; written, and read again."""
    policy = calibrate(replay, next(iter(TARGETS.values())), pair=pair).policy
    assert policy is not None
    path.write_bytes(policy.to_json())
    return Policy.open(path)


async def decided(
    replay: Replay, photos: Sequence[Labelled], edge: Sight, cloud: Sight, policy: Policy
) -> dict[str, Any]:
    """What a cascade does under the policy, one photo at a time, as a device would; and for how many photos it decides
    as the policy does on the replay."""
    cascade = PredictorCascade(edge, cloud, policy)
    right, same = 0, 0
    for photo, row in zip(photos, replay, strict=True):
        outputs, (decision,) = await cascade.decide({"photo": photo.pixels})
        right += int(outputs["logits"].argmax() == photo.gold)
        judged = policy.whole.judge.judge(row.evidence())
        kept = judged is not None and judged.worth > policy.whole.threshold
        same += int((decision.route == "edge") == kept)
    return {
        "routes": dict(cascade.stats.routes),
        "reasons": {str(reason): count for reason, count in cascade.stats.reasons.items()},
        "accuracy": right / len(photos),
        "same_as_replay": same,
    }


def model(path: Path) -> Model:
    return Model(path.stem, hashlib.sha256(path.read_bytes()).hexdigest())


def table(results: Mapping[str, Any]) -> str:
    lines = [f"{results['photos']} photos: " + shown(results["tiers"])]
    for name, found in results["targets"].items():
        lines.append(f"{name}, {found['splits']} splits ({found['with_apgr']} with an APGR)")
        for key, mean in found["mean"].items():
            lines.append(f"  {key:18}{mean:10.3f} ± {found['deviation'][key]:.3f}")
    if "cascade" in results:
        lines.append(f"cascade: {results['cascade']}")
    return "\n".join(lines)


def shown(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in figures.items())


if __name__ == "__main__":
    main()
