"""Write docs/cli.md from the command line's own help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from edgewise.cli.main import app
from edgewise.settings import CONFIG_VARIABLE, LEAVES

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100

HEAD = """# The command line

Written by `make docs` from `edgewise --help` and the settings; a test keeps it so.

Results go to stdout, everything else to stderr. With `--json` a verb prints one JSON object on stdout and nothing else.
`serve` and `cloud` print `{"url": …}` as their first line once they are ready.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the answer is no: terms not accepted, a check of `doctor` failed |
| 2 | wrong use: one line on stderr says what was seen and what is allowed |
| 3 | something outside failed or is missing: a file, a bundle, an address, an optional library |
| 70 | a fault of Edgewise's own; `--debug` shows where |
| 130 | interrupted |
"""


def page() -> str:
    helps = "\n".join(f"## `{path}`\n```\n{text}\n```\n" for path, text in _helps("edgewise", get_command(app)))
    return f"{HEAD}\n{helps}\n{_settings()}"


def _helps(path: str, command: Any, parent: Any = None) -> Iterator[tuple[str, str]]:
    """The help of a command and of all below it."""
    settings = command.context_settings | {"info_name": path.split()[-1], "parent": parent, "terminal_width": WIDTH}
    context = command.context_class(command, **settings)
    yield path, command.get_help(context).rstrip()
    for name, below in getattr(command, "commands", {}).items():
        yield from _helps(f"{path} {name}", below, context)


def _settings() -> str:
    rows = [
        f"| `{leaf.key}` | `{leaf.variable}` | {' '.join(f'`{flag}`' for flag in leaf.flags)} | "
        f"{'' if leaf.default is None else f'`{leaf.default}`'} | {leaf.about} |"
        for leaf in LEAVES.values()
    ]
    return "\n".join(
        [
            "## Settings",
            "Flags go before environment variables, these before `edgewise.toml`, that before defaults; "
            f"`edgewise config show` says which won. `{CONFIG_VARIABLE}` names the file.",
            "",
            "| key | variable | flag | default | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
