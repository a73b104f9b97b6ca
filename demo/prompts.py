"""The prompts that the demo plays: a file with one per line, or with one {"id", "prompt"} object per line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FEWEST, MOST, FILE_LIMIT = 4, 1000, 1 << 20


class DemoError(Exception):
    """The demo cannot go on; the message is for the person who typed it."""


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order. DemoError says which line is wrong."""
    try:
        raw = path.read_bytes()
        if len(raw) > FILE_LIMIT:
            raise DemoError(f"{path} has {len(raw)} bytes; at most {FILE_LIMIT} are read")
        lines = raw.decode("utf-8-sig").splitlines()
    except OSError as e:
        raise DemoError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DemoError(f"{path} is not UTF-8 text: {e}") from e
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt(path, number, line) for number, line in numbered]
    if not FEWEST <= len(prompts) <= MOST:
        raise DemoError(f"{path} holds {len(prompts)} prompts; {FEWEST} to {MOST} are needed")
    repeated = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if repeated:
        raise DemoError(f"{path}: the id {repeated[0]!r} stands on more than one line")
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    if not line.startswith("{"):
        return Prompt(f"line-{number}", line)
    try:
        entry = json.loads(line)
        name, text = entry.get("id", f"line-{number}"), entry["prompt"]
    except (json.JSONDecodeError, KeyError, RecursionError) as e:
        raise DemoError(f'{path}, line {number}: not an object like {{"id": "a", "prompt": "Hello"}}: {e}') from e
    if not (isinstance(name, str) and isinstance(text, str) and name.strip() and text.strip()):
        raise DemoError(f"{path}, line {number}: id and prompt must be texts that are not empty")
    return Prompt(name, text)
