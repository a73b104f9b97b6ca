"""Where text comes from: plain files, JSONL, a dataset of the Hub, and what the teacher wrote itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Final, TypeGuard

from edgewise.errors import SourceError, Unreachable, UsageError
from edgewise.models.bundle import sha256
from edgewise.models.tokenizer import Tokenizer
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.types import Message

PROMPT, ANSWER, CUT = "prompt", "answer", "cut"  # fields of a file of answers.py
HUB_FILES: Final = ("*.txt", "*.jsonl", "*.txt.gz", "*.jsonl.gz")


@dataclass(frozen=True)
class Document:
    """A text, or with a `prompt` the answer to it, which is `cut` where it did not come to its end."""

    text: str
    prompt: str | None = None
    cut: bool = False

    @cached_property
    def digest(self) -> bytes:
        """Of the text as it stands, 16 bytes."""
        return _hash(f"{self.prompt}\0{self.text}" if self.prompt is not None else self.text)

    @cached_property
    def likeness(self) -> bytes:
        """16 bytes that are equal for texts which differ in case, spaces, punctuation or the form of a letter only."""
        return _hash(f"{_plain(self.prompt or '')}\0{_plain(self.text)}")

    @cached_property
    def family(self) -> bytes:
        """What decides whether it is learnt from or held out: answers to one prompt stay together."""
        return self.likeness if self.prompt is None else _hash(f"\0prompt\0{_plain(self.prompt)}")


@dataclass(frozen=True, slots=True)
class Encoder:
    """Documents to ids. `end` is to stand behind each, `turn_end` ends an answer."""

    tokenizer: Tokenizer
    end: int
    turn_end: int
    around: tuple[int, int]  # how many ids the model has before and after a text
    digest: str  # of the tokenizer

    @staticmethod
    def of(files: TokenizerFiles) -> Encoder:
        config, end = files.config, files.end
        turn_end = end if config.eos is None else config.eos
        around = (int(config.add_bos), int(config.add_eos))
        content = json.dumps([files.core, repr(config), files.template])
        return Encoder(files.opened(), end, turn_end, around, hashlib.sha256(content.encode()).hexdigest())

    def __call__(self, document: Document) -> list[int]:
        """An answer stands in the model's form of a conversation, if it has one."""
        if document.prompt is None:
            return self.tokenizer.encode(document.text)
        if not self.tokenizer.chats:
            return self.tokenizer.encode(f"{document.prompt}\n{document.text}")
        before, after = self.around
        answer = self.tokenizer.encode(document.text)
        answer = answer[before : len(answer) - after]
        turn_end = [] if document.cut else [self.turn_end]
        return [*self.tokenizer.chat((Message("user", document.prompt),)), *answer, *turn_end]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Documents by what each source is called, and a digest of all that decides what they are."""

    sources: dict[str, Iterator[Document]]
    digest: str


def gathered(
    *,
    text: Sequence[str | Path] = (),
    jsonl: Sequence[str | Path] = (),
    fields: Sequence[str] = ("text",),
    hub: str | None = None,
    answers: Path | None = None,
) -> Gathered:
    """The documents of all that is given: text files, JSONL files with these fields, a dataset of the Hub (whose JSONL
    has them too), and a file of answers.py. SourceError or Unreachable for what is not there."""
    files = [Path(file) for file in (*text, *jsonl)] + ([] if hub is None else of_hub(hub))
    found: list[tuple[Path, Iterator[Document]]] = []
    for file in files:
        by_line = str(file) in map(str, jsonl) or ".jsonl" in file.suffixes
        found.append((file, of_jsonl(file, fields) if by_line else of_text(file)))
    if answers is not None:
        found.append((answers, of_jsonl(answers, (PROMPT, ANSWER))))
    sources: dict[str, Iterator[Document]] = {}
    for file, documents in found:
        same = sum(name.partition(" #")[0] == file.name for name in sources)
        sources[f"{file.name} #{same + 1}" if same else file.name] = documents
    content = json.dumps([list(fields), [(file.name, _content(file)) for file, _ in found]])
    return Gathered(sources, hashlib.sha256(content.encode()).hexdigest())


def _content(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as e:
        raise SourceError(f"{file} cannot be read: {e.strerror or e}", hint="name a file of text or JSONL") from e


def of_text(file: Path) -> Iterator[Document]:
    """What stands between empty lines, each a document. SourceError if the file cannot be read."""
    lines: list[str] = []
    for line in _lines(file):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Document("".join(lines).strip("\n"))
            lines = []
    if lines:
        yield Document("".join(lines).strip("\n"))


def of_jsonl(file: Path, fields: Sequence[str]) -> Iterator[Document]:
    """One document a line: the text of its one field, or the prompt and the answer of its two. SourceError naming the
    line that is no such object; UsageError for more fields."""
    if not 1 <= len(fields) <= 2:
        raise UsageError(
            f"{len(fields)} fields are named, {', '.join(fields)}", hint="name that of a text, or prompt and answer"
        )
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [row[field] for field in fields]
        except (ValueError, RecursionError, TypeError, KeyError) as e:
            raise SourceError(
                f"line {number} of {file} is no JSON object with {' and '.join(fields)}: {e!r}",
                hint="name the fields that it has, or mend the line",
            ) from e
        if wrong := [value for value in values if not is_text(value)]:
            raise SourceError(f"line {number} of {file} has {str(wrong[0])[:40]!r} where a text is needed")
        yield Document(values[-1], values[0] if len(values) == 2 else None, row.get(CUT) is True)


def is_text(value: object) -> TypeGuard[str]:
    """A string that is one in UTF-8 too: JSON can spell halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def of_hub(dataset: str) -> list[Path]:
    """The text and JSONL files of a dataset repository (`owner/name`), downloaded once. SourceError, Unreachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        directory = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=[*HUB_FILES]))
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise SourceError(f"the Hub has no dataset {dataset!r} (or it is private)", hint="check owner/name") from e
    except OSError as e:  # its HTTP errors are some
        raise Unreachable(
            f"{dataset} could not be downloaded: {str(e).splitlines()[0]}",
            hint="check the network, or HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from e
    found = sorted({file for pattern in HUB_FILES for file in directory.rglob(pattern)})
    if not found:
        raise SourceError(f"{dataset} has no file of the kind {', '.join(HUB_FILES)}", hint="others are not read")
    return found


def _lines(file: Path) -> Iterator[str]:
    number = 0
    try:
        with _opened(file) as lines:
            for line in lines:
                number += 1
                yield line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise SourceError(
            f"{file} cannot be read behind line {number}: {e}", hint="UTF-8 is needed, plain or compressed as .gz"
        ) from e


def _opened(file: Path) -> IO[Any]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _plain(text: str) -> str:
    """Its words alone; where there are none, what else there is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded).split()
    return " ".join(words or folded.split())


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
