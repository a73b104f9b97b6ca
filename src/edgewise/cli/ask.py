"""`edgewise ask`: one answer."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgewise.cli.options import (
    Cloud,
    CloudKeyEnv,
    Codec,
    Config,
    Cut,
    Debug,
    Edge,
    Head,
    Json,
    MaxRise,
    Mode,
    Policy,
    Privacy,
    Runtime,
    Split,
    SplitCa,
    SplitKeyFile,
    Threshold,
    flags,
)
from edgewise.cli.output import note, result
from edgewise.errors import UsageError
from edgewise.settings import load

if TYPE_CHECKING:
    from edgewise.engines.base import Generator
    from edgewise.types import Chunk, Request

STDIN_LIMIT = 16 << 20  # characters


def ask(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="the question; - reads it from stdin", show_default=False)
    ],
    edge: Edge = None,
    cloud: Cloud = None,
    cloud_key_env: CloudKeyEnv = None,
    threshold: Threshold = None,
    policy: Policy = None,
    privacy: Privacy = None,
    runtime: Runtime = None,
    mode: Mode = None,
    route: Annotated[Literal["auto", "edge", "cloud"], typer.Option(help="which tier is to answer")] = "auto",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="instructions that go before the question")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="longest answer, in tokens")] = 512,
    temperature: Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="draw from the likeliest tokens that make up this share")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="draw from this many of the likeliest; 0: all")] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="drop what is less likely than this share of the best")
    ] = 0.0,
    presence_penalty: Annotated[float, typer.Option(metavar="P", help="off the logits of tokens that came")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(metavar="P", help="the same, for each time that they came")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="R", help="divides the logits of tokens that came, the prompt's too; 1: off")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="the same seed draws the same answer")] = None,
    deadline_ms: Annotated[float | None, typer.Option(metavar="MS", help="answer within this time")] = None,
    split: Split = None,
    split_key_file: SplitKeyFile = None,
    split_ca: SplitCa = None,
    cut: Cut = None,
    codec: Codec = None,
    max_rise: MaxRise = None,
    head: Head = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask one question; the text streams to stdout, with --json the whole answer comes at once."""
    settings = load(
        flags(
            edge=edge,
            cloud=cloud,
            cloud_key_env=cloud_key_env,
            threshold=threshold,
            policy=policy,
            privacy=privacy,
            runtime=runtime,
            mode=mode,
            split=split,
            split_key_file=split_key_file,
            split_ca=split_ca,
            cut=cut,
            codec=codec,
            max_rise=max_rise,
            head=head,
        ),
        config=config,
    ).settings

    from edgewise.cli.tiers import open_edge
    from edgewise.engines.answer import check_request
    from edgewise.engines.base import EVERYTHING
    from edgewise.types import Message, Request, Sampling

    if route == "cloud" and settings.cloud.url is None:
        raise UsageError("--route cloud needs a cloud, and none is set", hint="--cloud URL names it")

    messages = [Message("system", system)] if system else []
    request = Request(
        messages=(*messages, Message("user", prompt_text(prompt))),
        sampling=Sampling(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
        ),
        max_tokens=max_tokens,
        stream=not json,
        route=route,
        deadline_ms=deadline_ms,
    )
    check_request(request, EVERYTHING)  # what no engine can do is refused before one is loaded
    chunks = asyncio.run(_answer(open_edge(settings), request, show=not json))
    facts = _facts(chunks)
    if json:
        result(facts, "", as_json=True)
    else:
        confidence = "unknown" if facts["confidence"] is None else f"{facts['confidence']:.2f}"
        note(f"route {facts['route']}, confidence {confidence}: {facts['reason']}")


async def _answer(generator: Generator, request: Request, *, show: bool) -> list[Chunk]:
    chunks = []
    try:
        async for chunk in generator.generate(request):
            chunks.append(chunk)
            if show:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    finally:
        await generator.close()
    if show:
        sys.stdout.write("\n")
    return chunks


def _facts(chunks: list[Chunk]) -> dict[str, Any]:
    last = chunks[-1]
    decision, usage, timings = last.decision, last.usage, last.timings
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "route": decision.route if decision else None,
        "confidence": decision.confidence if decision else None,
        "reason": decision.reason if decision else None,
        "finish_reason": last.finish_reason,
        "usage": asdict(usage) if usage else None,
        "timings": asdict(timings) if timings else None,
        "model": last.model,
    }


def prompt_text(given: str) -> str:
    """The question as given, or from stdin for -; UsageError if it is none."""
    text = sys.stdin.read(STDIN_LIMIT + 1) if given == "-" else given
    if len(text) > STDIN_LIMIT:
        raise UsageError(f"stdin holds more than {STDIN_LIMIT} characters", hint="no model here could read them")
    if not text.strip():
        raise UsageError("the prompt is empty", hint='edgewise ask "What is the capital of France?"')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError("the prompt is not valid UTF-8", hint="check the terminal's encoding") from e
    return text
