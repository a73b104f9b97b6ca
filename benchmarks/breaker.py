"""What a dead cloud costs: the first hard request, and every one after it.

    python benchmarks/breaker.py [--requests 2000] [--tokens 32] [--deadline-ms 1000]

The cloud is a black hole: a listener on loopback that takes connections and never answers. The edge is a fake engine
that says its tokens without a pause, so that what is measured is the cascade alone: each request is made of the bare
edge and of the cascade with the breaker open, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.engines.base import Generator
from edgewise.engines.fake import FakeGenerator, Script
from edgewise.engines.openai import OpenAI
from edgewise.joint.breaker import Breaker, BreakerSettings
from edgewise.joint.cascade import Cascade
from edgewise.types import Chunk, Message, Request

WARM_UP = 50  # requests of each kind before the first that counts
UNSURE = math.log(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    options = parser.parse_args()
    results = asyncio.run(measure(options.requests, options.tokens, options.deadline_ms))
    taken = Measurement.taken(
        "breaker",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "httpx2"],
        settings=vars(options),
    )
    path = taken.save(Path(__file__).parent / "results")
    first = results["first_request"]
    print(
        f"first hard request: {first['route']}, {first['reason']}, {first['took_ms']:.0f} of {first['deadline_ms']} ms"
    )
    for kind in ("whole", "streamed"):
        added = results[kind]["added_ms"]
        print(f"{kind:9} added with the breaker open: p50 {added['p50']:.3f} ms, p99 {added['p99']:.3f} ms")
    print(path)


async def measure(requests: int, tokens: int, deadline_ms: float) -> dict[str, object]:
    edge = FakeGenerator(Script.of(" ".join(f"word{n}" for n in range(tokens)), UNSURE))
    async with black_hole() as url:
        breaker = Breaker(BreakerSettings(base_s=3600.0, longest_s=3600.0))  # open for as long as we measure
        cascade = Cascade(edge, OpenAI(url), breaker=breaker)
        first = await first_request(cascade, deadline_ms)
        assert breaker.state == "open", "the black hole did not open the breaker"
        whole = await added(edge, cascade, requests, stream=False)
        streamed = await added(edge, cascade, requests, stream=True)
        assert cascade.stats.reasons["breaker_open"] == 2 * (requests + WARM_UP), "the cloud was asked"
        await cascade.close()
    return {"first_request": first, "whole": whole, "streamed": streamed}


@asynccontextmanager
async def black_hole():
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def first_request(cascade: Cascade, deadline_ms: float) -> dict[str, object]:
    started = time.perf_counter()
    chunks = await answer(cascade, replace(request(stream=False), deadline_ms=deadline_ms))
    took_ms = (time.perf_counter() - started) * 1000
    decision = chunks[-1].decision
    return {"deadline_ms": deadline_ms, "took_ms": took_ms, "route": decision.route, "reason": str(decision.reason)}


async def added(edge: Generator, cascade: Cascade, requests: int, *, stream: bool) -> dict[str, object]:
    """The two in turns; `added_ms` compares their quantiles."""
    times: dict[str, list[float]] = {"edge": [], "cascade": []}
    for number in range(WARM_UP + requests):
        for name, generator in (("edge", edge), ("cascade", cascade)):
            started = time.perf_counter()
            await answer(generator, request(stream=stream))
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - started) * 1000)
    quantiles = {name: np.percentile(values, [50, 99]) for name, values in times.items()}
    difference = quantiles["cascade"] - quantiles["edge"]
    return {
        "added_ms": {"p50": float(difference[0]), "p99": float(difference[1])},
        "p99_ms": {name: float(values[1]) for name, values in quantiles.items()},
        **{f"{name}_ms": figure(values, "ms") for name, values in times.items()},
    }


def request(*, stream: bool) -> Request:
    return Request((Message("user", "A hard question."),), stream=stream)


async def answer(generator: Generator, request: Request) -> list[Chunk]:
    return [chunk async for chunk in generator.generate(request)]


if __name__ == "__main__":
    main()
