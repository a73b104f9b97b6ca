"""Files of other tools as Measurements. docs/formats/importers.md names each format and its source."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from edgewise.bench.importers import litert, llama_bench, onnxruntime, perfetto, xctrace
from edgewise.bench.importers.result import printable
from edgewise.bench.measure import Measurement
from edgewise.errors import UsageError

SIZE_LIMIT: Final = 512 << 20  # bytes; a trace of minutes
HEAD: Final = 1 << 16  # bytes that tell a format

READERS: Final[dict[str, Callable[[bytes], Measurement]]] = {
    "llama-bench": llama_bench.read,
    "onnxruntime": onnxruntime.read,
    "litert": litert.read,
    "xctrace": xctrace.read,
    "perfetto": perfetto.read,
}
# The first that is found is it. Spaces are taken whole (*+): given back one by one they would cost their square.
SIGNS: Final = (
    ("xctrace", re.compile(rb"\A\s*+(?:<\?xml[^>]*+>\s*+)?+<trace-query-result")),
    ("llama-bench", re.compile(rb'\A\s*+\[?+\s*+\{[^}]*"(?:build_commit|n_prompt)"')),
    ("onnxruntime", re.compile(rb'\A\s*+\[\s*+\{[^}]*"cat"\s*+:\s*+"(?:Session|Node)"')),
    ("litert", re.compile(rb"\bcount=[0-9]{1,18} (?:first|curr)=|nference timings in us: ")),
    ("perfetto", re.compile(rb"\A\n")),  # field 1 of a Trace: a packet
)


def read(path: Path, tool: str | None = None) -> Measurement:
    """The results in a file that `tool` wrote; None tells it from the content. The measurement says what the file says
    and nothing else: what it does not tell is null or "unknown". UsageError, whatever the bytes are, if they are not
    of that format; OSError if they cannot be read; MissingExtra for a Perfetto trace without the perfetto package."""
    if tool is not None and tool not in READERS:
        raise UsageError(
            f"there is no importer for {tool!r}; there are {', '.join(READERS)}", hint="docs/formats/importers.md"
        )
    data = _content(path)
    try:
        found = READERS[tool or _tool(data)](data)
    except UsageError as error:
        raise UsageError(printable(f"{path}: {error.message}"), hint=error.hint) from error
    return msgspec.structs.replace(
        found,
        command=f"edgewise bench import {path.name}",
        settings=found.settings | {"file_sha256": sha256(data).hexdigest()},
    )


def _content(path: Path) -> bytes:
    """A device or a pipe has no size, may never end and may never begin: only regular files are opened."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"{path} is not a regular file", hint="write what the tool prints to a file first")
    if about.st_size > SIZE_LIMIT:
        raise _too_large(path, f"{about.st_size} bytes")
    with path.open("rb") as file:
        data = file.read(SIZE_LIMIT + 1)  # some files of /proc have more than they say
    if len(data) > SIZE_LIMIT:
        raise _too_large(path, "more bytes than it says")
    return data


def _too_large(path: Path, size: str) -> UsageError:
    return UsageError(f"{path} has {size}; at most {SIZE_LIMIT} are read", hint="export a part of it")


def _tool(data: bytes) -> str:
    for tool, sign in SIGNS:
        if sign.search(data, 0, HEAD):
            return tool
    raise UsageError(
        f"this is no file of {', '.join(READERS)}", hint="--from names the tool; docs/formats/importers.md"
    )
