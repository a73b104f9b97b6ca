"""Cells of benchmarks/split_vision.py end to end: an edge, a relay that stands in for the link, a worker behind HTTP.

    python benchmarks/split_relay.py MODELS WORK PHOTOS [--net NAME] [--slow 10]

For each of four networks of WORK's profiles and each link, with the input as an image file for the cloud alone and
without: the plan for that link and an edge so many times slower is carried out by a SplitPredictor over a relay process
(python -m edgewise.bench.relay) and a worker process (this script, with --serve), photo by photo; where the plan is to
ask nobody, the best plan that asks is carried out as well, unless it takes more than 15 s. The edge is as slow as it
should be because it sleeps until its part of the plan has passed. Reports the plan's seconds beside those that passed.
Writes a Measurement file (emulated) once all are done.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image
from split_vision import RESULTS, best_upload, middle, unpacked, without_upload
from vision import opened

from edgewise.bench.measure import Measurement, typed
from edgewise.devices.links import LINKS, LinkProfile
from edgewise.models.graph import Graph
from edgewise.serve.app import create_worker_app
from edgewise.serve.halves import Half
from edgewise.serve.run import run
from edgewise.split.halves import BackHalf
from edgewise.split.post import Post
from edgewise.split.predictor import Patience, SplitPredictor
from edgewise.split.profile import Plan, Profile

Array = npt.NDArray[Any]

CARRIED_OUT: Final = ("efficientnet-lite0", "efficientnet-lite2", "resnet18", "mobilenet-v2")
SLOW: Final = 10.0
PHOTOS: Final = 8
RUNS_S: Final = 1.5  # of a plan: as many photos as fit, at least three and at most nine
MOST_S: Final = 15.0  # plans that take longer are not carried out
PATIENT: Final = Patience(least_s=60, most_s=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--net", choices=CARRIED_OUT)
    parser.add_argument("--slow", type=float, default=SLOW)
    parser.add_argument("--serve", action="store_true", help="be the worker of --net")
    options = parser.parse_args()
    if options.serve:
        serve(options.models / f"{options.net}.onnx")
        return
    for net in [options.net] if options.net else CARRIED_OUT:
        kept = options.work / f"{net}.relay.json"
        if not kept.exists():
            kept.write_bytes(msgspec.json.encode(asyncio.run(measured(net, options))))
    done = [options.work / f"{net}.relay.json" for net in CARRIED_OUT]
    if all(path.exists() for path in done):
        cells = [cell for path in done for cell in msgspec.json.decode(path.read_bytes())]
        report(cells, options)


def serve(path: Path) -> None:
    """The worker; its address is its first line."""
    run(create_worker_app(Half(BackHalf(Graph.open(path), unpacked=received))), port=0, send_s=60)


def received(sent: Mapping[str, Array]) -> Mapping[str, Array]:
    """The network's input of what was sent for the cloud alone."""
    return {"input": unpacked(sent["file"].tobytes())} if "file" in sent else sent


async def measured(net: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both plans of every link."""
    graph = Graph.open(options.models / f"{net}.onnx")
    profile = Profile.read(options.work / f"{net}.profile.json")
    shape = graph.tensors["input"].shape
    assert shape is not None
    some = opened(options.photos)[:: 500 // PHOTOS][:PHOTOS]
    crops = [middle(Image.fromarray(photo.pixels), shape[-1]) for photo in some]
    cells = []
    with process(
        [sys.executable, __file__, *map(str, (options.models, options.work, options.photos)), "--net", net, "--serve"]
    ) as worker:
        for link in LINKS.values():
            with process([sys.executable, "-m", "edgewise.bench.relay", worker, "--link", link.name]) as url:
                for kind, one in (("image", profile), ("tensor", without_upload(profile))):
                    plans = one.plans(edge=options.slow)
                    chosen, asking = plans.at(link), plans.nearest(link)
                    assert asking is not None
                    for plan in dict.fromkeys((chosen, asking)):
                        if plan.seconds > MOST_S:
                            continue
                        upload = best_upload(options.work) if kind == "image" else None
                        edge = Edge(graph, plan, link, url, options.slow * edge_s(one, plan), upload)
                        found = await edge.carried_out(crops)
                        await edge.close()
                        cell = {"net": net, "input": kind, "link": link.name, "slow": options.slow}
                        cells.append(cell | {"chosen": plan == chosen} | found)
                        print(*(f"{key} {value}" for key, value in cells[-1].items() if key != "seconds"), flush=True)
    return cells


class Edge:
    """A SplitPredictor over the relay that keeps to one plan, and whose own part takes `edge_s` at least."""

    def __init__(
        self, graph: Graph, plan: Plan, link: LinkProfile, url: str, edge_s: float, upload: tuple[str, int] | None
    ) -> None:
        self._link, self._edge_s, self._upload, self._plan = link, edge_s, upload, plan
        self._post = Post(url)
        self._crop: Image.Image | None = None
        self._began = 0.0
        self._split = SplitPredictor(
            graph, Always(plan), self._there, link, packed=self._packed if upload else None, patience=PATIENT
        )

    async def carried_out(self, crops: list[Image.Image]) -> dict[str, Any]:
        """The seconds of each photo but the first, for which sessions are loaded and a connection is made."""
        plan = self._plan
        seconds, routes = [], set()
        while len(seconds) < 4 or (len(seconds) < 10 and sum(seconds) < RUNS_S):
            self._crop = crops[len(seconds) % len(crops)]
            inputs = {"input": pixels(self._crop)}
            self._split.link = self._link
            self._began = time.perf_counter()
            await self._split.predict(inputs)
            if plan.place == "edge":
                await self._linger()
            seconds.append(time.perf_counter() - self._began)
            assert self._split.last is not None
            routes.add(self._split.last.route)
        assert routes == {plan.place}, routes
        took_ms = float(np.median(seconds[1:]) * 1e3)
        return {
            "place": plan.place,
            "units": len(plan.units),
            "codec": plan.codec,
            "up_bytes": plan.up_bytes,
            "predicted_ms": plan.seconds * 1e3,
            "took_ms": took_ms,
            "error": plan.seconds * 1e3 / took_ms - 1,
            "seconds": seconds[1:],
        }

    async def _there(self, payload: bytes) -> bytes:
        await self._linger()
        return await self._post(payload)

    async def _linger(self) -> None:
        await asyncio.sleep(max(0.0, self._began + self._edge_s - time.perf_counter()))

    def _packed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        file = io.BytesIO()
        assert self._crop is not None
        assert self._upload is not None
        self._crop.save(file, self._upload[0], quality=self._upload[1])
        return {"file": np.frombuffer(file.getvalue(), np.uint8)}

    async def close(self) -> None:
        await self._split.close()
        await self._post.close()


def edge_s(profile: Profile, plan: Plan) -> float:
    """What this machine needs for the edge's part of a plan: the front half, and coding what crosses."""
    front_s = next(cut.front_s for cut in profile.cuts if cut.edge == plan.units)
    coded = {tensor.name: tensor.coded for tensor in profile.tensors}
    crossing = [profile.upload.get(name) or coded[name][str(plan.codec)] for name in plan.crossing]
    return front_s + sum(coding.encode_s for coding in crossing)


class Always:
    """The same plan for every link."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def at(self, link: LinkProfile) -> Plan:
        return self.plan

    def nearest(self, link: LinkProfile) -> None:
        return None


def pixels(crop: Image.Image) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray((np.asarray(crop, np.float32).transpose(2, 0, 1)[None] - 127) / 128)


@contextmanager
def process(command: list[str]) -> Iterator[str]:
    """A process that says its address first; the address."""
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        yield json.loads(running.stdout.readline())["url"]
    finally:
        running.terminate()
        running.wait()
        running.stdout.close()


def report(cells: list[dict[str, Any]], options: argparse.Namespace) -> None:
    asking = [cell for cell in cells if cell["place"] != "edge"]
    off = np.array([abs(cell["error"]) for cell in asking])
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in sorted(cells, key=lambda cell: cell["took_ms"]):
        best.setdefault((cell["net"], cell["input"], cell["link"]), cell)
    summary = {
        "cells": len(best),
        "carried_out": len(cells),
        "asking": len(asking),
        "error": {
            "mean": float(off.mean()),
            "median": float(np.median(off)),
            "p95": float(np.quantile(off, 0.95)),
            "max": float(off.max()),
        },
        "bias": float(np.mean([cell["error"] for cell in asking])),
        "chosen_was_the_faster": sum(cell["chosen"] for cell in best.values()),
    }
    print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    taken = Measurement.taken(
        "split_relay",
        command=typed(__file__),
        kind="emulated",
        results={"summary": summary, "cells": cells},
        libraries=["edgewise", "numpy", "onnxruntime", "pillow"],
        settings={"slow": options.slow, "upload": " ".join(map(str, best_upload(options.work)))},
    )
    taken.save(RESULTS)


if __name__ == "__main__":
    main()
