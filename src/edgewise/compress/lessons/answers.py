"""Text that the teacher writes itself: its answers to prompts, by our own engine, kept as they come."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from edgewise.compress.lessons.documents import ANSWER, CUT, PROMPT, is_text
from edgewise.compress.storing import no_room, storing
from edgewise.engines.base import Generator
from edgewise.engines.together import answers
from edgewise.errors import SourceError, UsageError
from edgewise.types import Message, Request, Sampling

FORMAT: Final = 1
TOGETHER: Final = 32  # answers between two writes
SEED_STEP: Final = 1_000_003  # so that answers of neighbouring seeds are not the same ones
Tell = Callable[[str, int, int], None]


def prompts_of(file: Path) -> list[str]:
    """The lines of a text file, or the `prompt`s of JSONL, each once. SourceError if there is none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise SourceError(
            f"the prompts of {file} cannot be read: {e!r}", hint='lines of text, or JSONL with {"prompt": …}'
        ) from e
    if wrong := [prompt for prompt in found if not is_text(prompt)]:
        raise SourceError(f"a prompt of {file} is {wrong[0]!r}, a text is needed")
    if not found:
        raise SourceError(f"{file} has no prompts", hint="write one a line")
    return list(dict.fromkeys(found))


def written(
    generator: Generator,
    prompts: Sequence[str],
    file: Path,
    *,
    count: int,
    at_once: int,
    chats: bool = True,
    max_tokens: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
    tell: Tell = lambda what, done, total: None,
) -> Path:
    """`file` with `count` answers to the prompts in turn, one a line (docs/formats/corpus.md): those that are there
    already stay, and the others follow. Each is drawn with a seed of its own, so it does not matter when or beside
    which it is written. `chats` says whether the generator takes conversations. UsageError if the file holds answers of
    another call or more of them, StorageError if the disk is full."""
    call = {
        "format": FORMAT,
        "generator": generator.name,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    done = _resumed(file, call)
    if done > count:
        raise UsageError(
            f"{file} holds {done} answers already, {count} are wanted", hint="ask for as many, or name another place"
        )
    for start in range(done, count, TOGETHER):
        tell("writing answers", start, count)
        numbers = range(start, min(start + TOGETHER, count))
        asked = [prompts[n % len(prompts)] for n in numbers]
        samplings = [Sampling(temperature=temperature, seed=seed * SEED_STEP + n) for n in numbers]
        requests = [
            _request(prompt, sampling, max_tokens, chats) for prompt, sampling in zip(asked, samplings, strict=True)
        ]
        found = asyncio.run(answers(generator, requests, at_once=at_once))
        lines = [
            {PROMPT: prompt, ANSWER: answer.text, CUT: answer.finish_reason == "length"}
            for prompt, answer in zip(asked, found, strict=True)
        ]
        _append(file, lines)
    tell("writing answers", count, count)
    return file


def _request(prompt: str, sampling: Sampling, max_tokens: int, chats: bool) -> Request:
    if chats:
        return Request(messages=(Message("user", prompt),), sampling=sampling, max_tokens=max_tokens)
    return Request(prompt=f"{prompt}\n", sampling=sampling, max_tokens=max_tokens)


def _resumed(file: Path, call: dict[str, Any]) -> int:
    """How many answers are there. What a killed process left of a line is cut off."""
    beside = file.with_name(f"{file.name}.call.json")
    if not (beside.is_file() and file.is_file()):
        with storing(file) as work:
            work.touch()
        with storing(beside) as work:
            work.write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")
        return 0
    if json.loads(beside.read_bytes()) != call:
        raise UsageError(
            f"{file} holds answers that were asked for otherwise, as {beside.name} says",
            hint="remove both, or name another place",
        )
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    return content.count(b"\n")


def _append(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as e:
        raise no_room(file, e) from e
