"""Files that models are judged on: texts that they foretell, prompts that they answer."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgewise.errors import UsageError


class _Line(msgspec.Struct, frozen=True):
    """Of JSONL; other keys are for people."""

    prompt: str


def text(path: Path) -> str:
    """UsageError for a file that is no text in UTF-8, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}",
            hint="give the path of a plain text",
        ) from error


def prompts(path: Path) -> list[str]:
    """The `prompt` of each line of a .jsonl file, or the lines of another text; empty ones are left out. UsageError
    names the line."""
    lines = text(path).split("\n")  # splitlines would cut at U+2028, too, which JSON has within a string
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=_Line).prompt)
            except (msgspec.MsgspecError, RecursionError) as error:
                raise UsageError(
                    f"{path}, line {number} is no JSON object with a `prompt`: {error}",
                    hint='a line is like {"prompt": "Why is the sky blue?"}',
                ) from error
    return found
