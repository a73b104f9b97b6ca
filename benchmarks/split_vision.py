"""Splitting networks over photos: what a boundary costs in accuracy, and what the planner's choice of a cut is worth.

    pip install pillow
    python benchmarks/split_vision.py accuracy PHOTOS MODELS WORK [--net NAME]
    python benchmarks/split_vision.py profile PHOTOS MODELS WORK [--net NAME] [--again]
    python benchmarks/split_vision.py planner PHOTOS MODELS WORK

PHOTOS holds JPEGs and labels.json, MODELS the files of benchmarks/vision_models.py and benchmarks/split_models.py, WORK
what one step leaves for the next. `accuracy` sends all photos through every boundary of one tensor of
EfficientNet-Lite0 and Lite2, each under the finest codec that makes it eight times smaller than float32, and writes a
Measurement file (measured). `profile` measures every cut of a network; with `--again` a second time, for others to be
judged by. `planner` chooses by the first profile, for each network, link and slowness of the edge, once with the input
as an image file for the cloud alone and once without, judges that by the second one against all cuts, and writes a
Measurement file (simulated: links and slow edges are arithmetic over measured times and bytes).
benchmarks/split_relay.py runs such cells over sockets.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image
from vision import Labelled, middle, opened, prepared

from edgewise.bench.measure import Measurement, typed
from edgewise.devices.links import LINKS, LinkProfile
from edgewise.evaluate.interval import bootstrap
from edgewise.models.graph import Graph
from edgewise.split.halves import Halves
from edgewise.split.profile import Coding, Plan, Plans, Profile
from edgewise.split.profiling import SLACK, profiled
from edgewise.wire.feature import decode, encode

Array = npt.NDArray[Any]

RESULTS = Path(__file__).parent / "results"
JUDGED: Final = ("efficientnet-lite0", "efficientnet-lite2")
NETS: Final = (*JUDGED, "resnet18", "mobilenet-v2", "mobilenet-v3", "densenet121", "unet", "vit-tiny")
FINER: Final = ("int8", "int7", "int6", "int5", "int4", "int3")
SMALLER: Final = 8  # times, than float32
TOGETHER: Final = 25  # photos that a half sees at once, where it is not timed
TRIED: Final = 20  # photos that choose a codec
SLOWNESS: Final = (3.0, 10.0, 30.0)  # of the edges, as multiples of this machine's times; the cloud is this machine
MANY: Final = 200  # units: networks of more are not cut everywhere
PROFILED: Final = 8  # photos that a profile is made with
UPLOADS: Final[Mapping[str, tuple[str, int]]] = {
    f"{kind} {quality}": (kind, quality) for kind in ("JPEG", "WEBP") for quality in (75, 85, 90, 95)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("accuracy", "profile", "planner"))
    parser.add_argument("photos", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--net", choices=NETS, help="only this one")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    STEPS[options.step](options)


# Accuracy


def accuracy(options: argparse.Namespace) -> None:
    photos = opened(options.photos)
    for net in [options.net] if options.net else JUDGED:
        if net in JUDGED:
            found = judge(options.models / f"{net}.onnx", photos, options.work / f"{net}.accuracy.json")
            print(net, found["accuracy"])
    done = {net: options.work / f"{net}.accuracy.json" for net in JUDGED}
    if all(path.exists() for path in done.values()):
        nets = {net: msgspec.json.decode(path.read_bytes()) for net, path in done.items()}
        for net, found in nets.items():
            print(table(net, found))
        taken = Measurement.taken(
            "split_accuracy",
            command=typed(__file__),
            results={"nets": nets},
            libraries=["edgewise", "numpy", "onnxruntime", "pillow"],
            settings={"photos": len(photos), "smaller": SMALLER},
        )
        taken.save(RESULTS)


def judge(path: Path, photos: Sequence[Labelled], kept: Path) -> dict[str, Any]:
    """All single-tensor cuts of a network; what was judged before is taken from `kept`."""
    graph = Graph.open(path)
    shape = graph.tensors["input"].shape
    assert shape is not None
    images = prepared([photo.pixels for photo in photos], shape[-1])
    gold = np.array([photo.gold for photo in photos])
    found: dict[str, Any] = msgspec.json.decode(kept.read_bytes()) if kept.exists() else {"cuts": {}}
    if "right" not in found:
        right = chosen(Halves(graph, frozenset()), images) == gold
        found |= {"accuracy": float(right.mean()), "right": right.tolist(), "uploads": {}}
    for name in UPLOADS.keys() - found["uploads"].keys():
        found["uploads"][name] = uploaded(graph, photos, gold, np.array(found["right"]), UPLOADS[name])
    for edge, crossing in graph.chain(widest=1):
        if edge and crossing and crossing[0] not in found["cuts"]:
            halves = Halves(graph, edge)
            found["cuts"][crossing[0]] = boundary(halves, images, gold, np.array(found["right"]))
            print(path.stem, crossing[0], found["cuts"][crossing[0]], flush=True)
            halves.close()
            kept.write_bytes(msgspec.json.encode(found))
    kept.write_bytes(msgspec.json.encode(found))
    return found


def boundary(halves: Halves, images: Array, gold: Array, right: Array) -> dict[str, Any]:
    """One cut under the finest codec that makes the photos' features so much smaller."""
    tensor = halves.graph.tensors[halves.crossing[0]]
    raw = tensor.raw_bytes
    assert raw is not None
    some, _ = halves.front({"input": images[:: len(images) // TRIED]})
    codec = next(one for one in FINER if np.mean([len(sent(row, one)) for row in rows(some)]) * SMALLER <= raw)
    answers, sizes = [], []
    for start in range(0, len(images), TOGETHER):
        crossing, _ = halves.front({"input": images[start : start + TOGETHER]})
        payloads = [sent(row, codec) for row in rows(crossing)]
        received = np.concatenate([decode(payload)[tensor.name] for payload in payloads])
        answers.append(halves.back({tensor.name: received})["logits"].argmax(1))
        sizes += [len(payload) for payload in payloads]
    still = np.concatenate(answers) == gold
    drop = bootstrap((right.astype(float) - still) * 100)
    return {
        "units": len(halves.edge),
        "shape": list(tensor.shape or ()),
        "raw_bytes": raw,
        "codec": codec,
        "bytes": float(np.mean(sizes)),
        "smaller": raw / float(np.mean(sizes)),
        "accuracy": float(still.mean()),
        "drop_points": {"point": drop.value, "low": drop.low, "high": drop.high},
    }


def rows(tensors: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Each photo's by itself, as a request would have them."""
    count = len(next(iter(tensors.values())))
    return [{name: value[row : row + 1] for name, value in tensors.items()} for row in range(count)]


def sent(tensors: Mapping[str, Array], codec: str) -> bytes:
    return encode(tensors, codec)


def chosen(halves: Halves, images: Array) -> Array:
    starts = range(0, len(images), TOGETHER)
    return np.concatenate([halves.back({"input": images[s : s + TOGETHER]})["logits"].argmax(1) for s in starts])


def uploaded(
    graph: Graph, photos: Sequence[Labelled], gold: Array, right: Array, how: tuple[str, int]
) -> dict[str, Any]:
    """What the cloud alone is sent: the crop as a JPEG or a WebP, and what that costs in accuracy."""
    shape = graph.tensors["input"].shape
    assert shape is not None
    files = [packed(photo, shape[-1], how) for photo in photos]
    still = chosen(Halves(graph, frozenset()), np.concatenate([unpacked(file) for file in files])) == gold
    drop = bootstrap((right.astype(float) - still) * 100)
    return {
        "bytes": float(np.mean([len(file) for file in files])),
        "accuracy": float(still.mean()),
        "drop_points": {"point": drop.value, "low": drop.low, "high": drop.high},
    }


def packed(photo: Labelled, side: int, how: tuple[str, int]) -> bytes:
    kind, quality = how
    file = io.BytesIO()
    middle(Image.fromarray(photo.pixels), side).save(file, kind, quality=quality)
    return file.getvalue()


def unpacked(file: bytes) -> npt.NDArray[np.float32]:
    """The network's input of an uploaded file, float32 [1, 3, side, side]."""
    with Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    return np.ascontiguousarray((pixels.transpose(2, 0, 1)[None] - 127) / 128)


def table(net: str, found: Mapping[str, Any]) -> str:
    lines = [f"{net}: {found['accuracy']:.3f} without a cut"]
    for name, one in found["uploads"].items():
        lines.append(f"  upload {name:14}{one['bytes']:9.0f} B  {one['accuracy']:.3f}  {drop(one)}")
    for name, one in found["cuts"].items():
        shape = "x".join(map(str, one["shape"][1:]))
        lines.append(
            f"  {one['units']:3} {name:14}{shape:12}{one['codec']:6}{one['bytes']:9.0f} B  {one['smaller']:5.1f}x  "
            f"{one['accuracy']:.3f}  {drop(one)}"
        )
    return "\n".join(lines)


def drop(one: Mapping[str, Any]) -> str:
    return "{point:+.1f} points ({low:+.1f} to {high:+.1f})".format(**one["drop_points"])


# Profiles


def profile(options: argparse.Namespace) -> None:
    photos = opened(options.photos)
    for net in [options.net] if options.net else NETS:
        path = options.work / f"{net}.profile{'.again' if options.again else ''}.json"
        if not path.exists():
            graph = Graph.open(options.models / f"{net}.onnx")
            shape = graph.tensors["input"].shape
            assert shape is not None
            some = photos[:: len(photos) // PROFILED][:PROFILED]
            inputs = [{"input": one[None]} for one in prepared([photo.pixels for photo in some], shape[-1])]
            upload = {"input": coding(photos, shape[-1], *best_upload(options.work))}
            began = time.perf_counter()
            slack = None if len(graph.units) <= MANY else SLACK
            found = profiled(graph, inputs, upload=upload, slack=slack, tell=print)
            found.save(path)
            print(f"{net}: {len(found.cuts)} cuts in {time.perf_counter() - began:.0f} s")


def best_upload(work: Path) -> tuple[str, int]:
    """The one of fewest bytes that costs neither network more than 0.4 points: as much as a cut may."""
    nets = [msgspec.json.decode((work / f"{net}.accuracy.json").read_bytes())["uploads"] for net in JUDGED]
    good = [name for name in UPLOADS if all(net[name]["drop_points"]["point"] <= 0.4 for net in nets)]
    return UPLOADS[min(good, key=lambda name: sum(net[name]["bytes"] for net in nets))]


def coding(photos: Sequence[Labelled], side: int, kind: str, quality: int) -> Coding:
    """What an upload takes; cropping is done before, as it is for the edge alone."""
    images = [middle(Image.fromarray(photo.pixels), side) for photo in photos[::10]]
    encode_s, decode_s, sizes = [], [], []
    for image in images:
        file = io.BytesIO()
        encode_s.append(seconds(lambda image=image, file=file: image.save(file, kind, quality=quality)))
        decode_s.append(seconds(lambda file=file: unpacked(file.getvalue())))
        sizes.append(len(file.getvalue()))
    return Coding(float(np.mean(sizes)), float(np.median(encode_s)), float(np.median(decode_s)))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# The planner


def planner(options: argparse.Namespace) -> None:
    """Of two profiles one chooses and the other judges. A machine with neighbours is not as fast a quarter of an hour
    later, to both sides alike: the second profile is brought to the speed of the first by the whole network's time,
    so that it is the shares of cuts and codecs that judge."""
    cells, replans_us, drifts = [], [], {}
    for net in NETS:
        first, again = (Profile.read(options.work / f"{net}.profile{part}.json") for part in ("", ".again"))
        drift = drifts[net] = whole_s(first) / whole_s(again)
        for image in (True, False):
            pair = (first, again) if image else (without_upload(first), without_upload(again))
            for slow in SLOWNESS:
                chooser = pair[0].plans(edge=slow)
                judges = pair[1].plans(edge=slow * drift, cloud=drift, margin=0)
                for link in LINKS.values():
                    began = time.perf_counter()
                    plan = chooser.at(link)
                    replans_us.append((time.perf_counter() - began) * 1e6)
                    cell = {"net": net, "input": "image" if image else "tensor", "link": link.name, "slow": slow}
                    cells.append(cell | judged(plan, judges, link))
    summary = summed(cells, replans_us) | {
        "drift": drifts,
        "cuts": {net: len(Profile.read(options.work / f"{net}.profile.json").cuts) for net in NETS},
        "inputs": {kind: summed([c for c in cells if c["input"] == kind], replans_us) for kind in ("image", "tensor")},
    }
    print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    taken = Measurement.taken(
        "split_planner",
        command=typed(__file__),
        kind="simulated",
        results={"summary": summary, "cells": cells},
        libraries=["edgewise", "numpy", "onnxruntime", "pillow"],
        settings={"slowness": list(SLOWNESS), "upload": " ".join(map(str, best_upload(options.work)))},
    )
    taken.save(RESULTS)


def whole_s(profile: Profile) -> float:
    return next(cut.back_s for cut in profile.cuts if not cut.edge)


def without_upload(profile: Profile) -> Profile:
    """As if the input were no image, as a radar's or a microscope's is not: the cloud alone gets it as features."""
    return msgspec.structs.replace(profile, upload={})


def judged(plan: Plan, judges: Plans, link: LinkProfile) -> dict[str, Any]:
    """What a plan takes by another profile's times, beside the best of all cuts and the baselines by the same."""
    every = {way: way.seconds(link) for way in judges.table.ways}
    wanted = frozenset(map(str, plan.units))
    same = [way for way in every if way.edge == wanted and plan.codec in (None, judges.codecs[way])]
    took_s = min(every[way] for way in same or [way for way in every if way.edge == wanted])
    alone_s = {place: min(s for way, s in every.items() if way.place == place) for place in ("edge", "cloud")}
    least_s = min(every.values())
    return {
        "place": plan.place,
        "units": len(plan.units),
        "codec": plan.codec,
        "up_bytes": plan.up_bytes,
        "predicted_ms": plan.seconds * 1e3,
        "took_ms": took_s * 1e3,
        "best_ms": least_s * 1e3,
        "edge_only_ms": alone_s["edge"] * 1e3,
        "cloud_only_ms": alone_s["cloud"] * 1e3,
        "regret": took_s / least_s - 1,
        "against_baseline": took_s / min(alone_s.values()),
    }


def summed(cells: Sequence[Mapping[str, Any]], replans_us: Sequence[float]) -> dict[str, Any]:
    regrets = [cell["regret"] for cell in cells]
    against = np.array([cell["against_baseline"] for cell in cells])
    off = [abs(cell["predicted_ms"] / cell["took_ms"] - 1) for cell in cells]
    return {
        "cells": len(cells),
        "places": {place: sum(cell["place"] == place for cell in cells) for place in ("edge", "split", "cloud")},
        "regret": spread(regrets),
        "against_baseline": {"max": float(against.max()), "above_1.02": int((against > 1.02).sum())},
        "faster_than_both_by_1.3": int((against < 1 / 1.3).sum()),
        "fastest_against_baseline": float(against.min()),
        "prediction_error": spread(off),
        "replan_us": {"median": float(np.median(replans_us)), "max": max(replans_us)},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "p95": float(np.quantile(values, 0.95)), "max": max(values)}


STEPS: Final[Mapping[str, Callable[[argparse.Namespace], None]]] = {
    "accuracy": accuracy,
    "profile": profile,
    "planner": planner,
}


if __name__ == "__main__":
    main()
