"""What a node costs beside its engine: CPU time for each streamed token, and the latency that it adds.

    python benchmarks/node.py [--rounds 9] [--tokens 1500] [--pace-ms 2] [--profile FILE]

The engine says when it made each token (the text is the time) and computes nothing. It is read inside its own process
(bare), behind `edgewise cloud` (the node with one engine) and behind `edgewise serve` (the cascade around it), each a
process of its own, in turns. Paced: one token at a time, as a model makes them, so that nothing can be done together;
burst: as fast as they are taken. CPU time is getrusage's of the process, less that of the bare engine; latency is from
the making of a token to its arrival in the reader, which for the nodes is a streaming HTTP client in another process;
that of the first token stands apart, as a node may hold it back.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import http.client
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.engines.answer import Stopwatch
from edgewise.engines.base import Capabilities
from edgewise.joint.cascade import Cascade
from edgewise.serve.app import create_app
from edgewise.serve.run import run
from edgewise.types import Chunk, Message, Request, Sampling, Token, Usage

KINDS = ("bare", "cloud", "serve")
WARM_UP = 50  # tokens of each answer before the first that counts


class Costs(NamedTuple):
    """Of one answer, in microseconds."""

    cpu: float  # time per token
    latency: float  # median over the tokens
    first: float  # latency of the first token


class Emitter:
    """A Generator whose tokens are the times at which they were made, in nanoseconds. The pace in milliseconds is the
    request's seed: it reaches the engine through every node."""

    name = "emitter"
    can = Capabilities(logprobs=True, seed=True)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        watch, pace_s = Stopwatch(request.deadline_ms), (request.sampling.seed or 0) / 1000
        for _ in range(request.max_tokens):
            await asyncio.sleep(pace_s)
            watch.token()
            text = f"{time.monotonic_ns()} "
            yield Chunk(text, (Token(1, text.encode(), -0.1),), model=self.name)
        usage = Usage(1, request.max_tokens)
        yield Chunk(finish_reason="length", usage=usage, timings=watch.timings(), model=self.name)

    async def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--pace-ms", type=int, default=2)
    parser.add_argument("--profile", type=Path, help="also write what cProfile sees of the cloud node's event loop")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.profile)
        return
    results = measure(options)
    taken = Measurement.taken(
        "node",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "uvicorn", "starlette", "msgspec"],
        settings={"rounds": options.rounds, "tokens": options.tokens, "pace_ms": options.pace_ms},
    )
    path = taken.save(Path(__file__).parent / "results")
    for name, found in results.items():
        for kind in KINDS[1:]:
            cpu, added, first = (found[kind][key]["median"] for key in ("cpu_us", "added_us", "first_us"))
            print(f"{name:6} {kind:6} over the bare engine: CPU {cpu:6.1f} us a token", end="")
            print(f", p50 latency {added:6.1f} us, of the first token {first:6.1f} us")
    print(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    samples = {(name, kind): [] for name in ("paced", "burst") for kind in KINDS}
    with ExitStack() as stack:
        parties = {kind: stack.enter_context(Party(kind, options.profile)) for kind in KINDS}
        for number in range(options.rounds + 1):  # the first warms up
            for (name, kind), found in samples.items():
                taken = parties[kind].ask(options.tokens, options.pace_ms if name == "paced" else 0)
                found += [taken] * (number > 0)
    return {name: summary({kind: samples[name, kind] for kind in KINDS}) for name in ("paced", "burst")}


def summary(samples: dict[str, list[Costs]]) -> dict[str, Any]:
    """Of each round, the differences to the bare engine in the same round."""
    bare = np.array(samples["bare"])
    found = {"bare": _figures(bare, "latency_us")}
    for kind in KINDS[1:]:
        found[kind] = _figures(np.array(samples[kind]) - bare, "added_us")
    return found


def _figures(rounds: np.ndarray, latency: str) -> dict[str, Any]:
    return {key: figure(column, "us") for key, column in zip(("cpu_us", latency, "first_us"), rounds.T, strict=True)}


# --- our side ---------------------------------------------------------------------------------------------------------


class Party:
    """A process that holds the engine, bare or behind a node."""

    def __init__(self, kind: str, profile: Path | None) -> None:
        command = [sys.executable, __file__, "--child", kind]
        if profile and kind == "cloud":
            command += ["--profile", str(profile)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._url = self._line().get("url")

    def __enter__(self) -> Party:
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def ask(self, tokens: int, pace_ms: int) -> Costs:
        before = self._told({})
        made = self._told({"tokens": tokens, "pace_ms": pace_ms})["late_ns"] if self._url is None else None
        late = stream(self._url, tokens, pace_ms) if self._url else made
        after = self._told({})
        cpu_us = (after["cpu_s"] - before["cpu_s"]) * 1e6 / tokens
        return Costs(cpu_us, float(np.median(late[WARM_UP:])) / 1e3, late[0] / 1e3)

    def _told(self, wish: dict[str, int]) -> dict[str, Any]:
        print(json.dumps(wish), file=self._process.stdin, flush=True)
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


def stream(url: str, tokens: int, pace_ms: int) -> list[int]:
    """How late each token came, in nanoseconds."""
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": tokens,
        "seed": pace_ms,
        "stream": True,
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    came = [(time.monotonic_ns(), line) for line in response if line.startswith(b"data: {")]
    connection.close()
    pieces = [(at, json.loads(line[6:])["choices"][0]["delta"].get("content")) for at, line in came]
    return [at - int(made) for at, text in pieces if text for made in text.split()]


# --- the other side ---------------------------------------------------------------------------------------------------


def child(kind: str, profile: Path | None) -> None:
    if kind == "bare":
        print(json.dumps({}), flush=True)
        asyncio.run(bare())
        return
    threading.Thread(target=tell_cpu, daemon=True).start()
    engine = Emitter() if kind == "cloud" else Cascade(Emitter())
    app = create_app(engine, models=("auto", kind), route="cloud" if kind == "cloud" else "edge")
    if profile is None:
        run(app)
        return
    profiler = cProfile.Profile()
    profiler.runcall(run, app)
    profiler.dump_stats(profile)


def tell_cpu() -> None:
    for _ in sys.stdin:
        print(json.dumps({"cpu_s": cpu_s()}), flush=True)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def bare() -> None:
    for line in sys.stdin:
        wish = json.loads(line)
        late = await consumed(wish) if wish else []
        print(json.dumps({"cpu_s": cpu_s(), "late_ns": late}), flush=True)


async def consumed(wish: dict[str, int]) -> list[int]:
    request = Request(
        (Message("user", "Hi"),), max_tokens=wish["tokens"], sampling=Sampling(seed=wish["pace_ms"]), stream=True
    )
    return [time.monotonic_ns() - int(c.text) async for c in Emitter().generate(request) if c.text]


if __name__ == "__main__":
    main()
