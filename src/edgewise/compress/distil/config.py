"""The config of a distillation: what teaches whom, on which text, how, for how long. docs/formats/distill.md is the
format."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from edgewise.errors import ConfigError

SIZE_LIMIT: Final = 1 << 20  # bytes; a config is a page
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # as of bundles
SEE: Final = "docs/formats/distill.md has an example"

Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
InnerShare = Annotated[float, Meta(gt=0.0, lt=1.0)]
Temperature = Annotated[float, Meta(gt=0.0, le=1000.0)]
SomeText = Annotated[str, Meta(min_length=1)]
Precision = Literal["auto", "fp32", "bf16"]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every table of the config: frozen, and no key that we do not know."""


class Generate(Part, frozen=True):
    """Answers that the teacher writes: `count` of them, to the prompts of a file, one a line, in turn."""

    prompts: SomeText
    count: Count
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 128
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    seed: Seed = 0


class Data(Part, frozen=True):
    """The text: every source that is given, one after the other."""

    text: tuple[SomeText, ...] = ()
    jsonl: tuple[SomeText, ...] = ()
    field: SomeText | Annotated[tuple[SomeText, ...], Meta(min_length=1, max_length=2)] = "text"
    hub: SomeText | None = None
    generate: Generate | None = None
    length: Annotated[int, Meta(ge=2, le=1 << 16)] = 256
    held_out: InnerShare = 0.01
    limit_tokens: Count | None = None


class Student(Part, frozen=True):
    """What learns: a part of the teacher, a network of random weights, or one that lies in a directory."""

    start: SomeText = "teacher"
    layers: Count | tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    vocabulary: Count | None = None
    hidden: Count | None = None
    ffn: Count | None = None


class Loss(Part, frozen=True):
    """alpha · T² · KL(teacher‖student at T) + (1 - alpha) · cross-entropy; the teacher is known by so many tokens."""

    temperature: Temperature = 4.0
    alpha: Share = 0.5
    top_k: Annotated[int, Meta(ge=1, le=1 << 16)] = 64


class Train(Part, frozen=True):
    """How long and how. A step takes batch · accumulate rows in every process."""

    tokens: Count
    batch: Count = 8
    accumulate: Count = 1
    lr: Annotated[float, Meta(gt=0.0, le=1.0)] = 5e-4
    warmup: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.05
    weight_decay: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    clip: Annotated[float, Meta(gt=0.0)] = 1.0
    precision: Precision = "auto"
    seed: Seed = 0
    checkpoint_s: Annotated[float, Meta(gt=0.0, le=300.0)] = 300.0
    evaluations: Annotated[int, Meta(ge=1, le=1000)] = 10
    evaluation_rows: Count = 32


class Config(Part, frozen=True, kw_only=True):
    """One distillation. Of `open`, all paths are absolute."""

    name: Annotated[str, Meta(pattern=NAME)]
    teacher: SomeText
    data: Data
    student: Student = Student()
    loss: Loss = Loss()
    train: Train
    output: SomeText

    @staticmethod
    def parse(text: str, *, origin: str = "the config") -> Config:
        """Read TOML; the paths stay as they are written. ConfigError naming the key, the value and what is allowed."""
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{origin} is not TOML: {error}", hint=SEE) from error
        for key, near in _unknown(document, Config):
            raise ConfigError(f"{origin} has an unknown key {key!r}", hint=near)
        try:
            return msgspec.convert(document, Config)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{origin}: {_explained(str(error), document)}", hint=SEE) from error

    @staticmethod
    def open(path: Path) -> Config:
        """Read a file and find its paths from where it lies. ConfigError if it cannot be read, is none, or names a
        file that is not there."""
        try:
            with path.open("rb") as file:
                data = file.read(SIZE_LIMIT + 1)
            if len(data) > SIZE_LIMIT:
                raise ConfigError(f"{path} has more than {SIZE_LIMIT} bytes, which no config has", hint=SEE)
            text = data.decode()
        except OSError as error:
            raise ConfigError(f"the config {path} cannot be read: {error.strerror or error}", hint=SEE) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the config {path} is not UTF-8: {error}", hint=SEE) from error
        found = _placed(Config.parse(text, origin=str(path)), path.absolute().parent)
        _check_files(found)
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the course of the training, beside the data, the teacher and the student's first weights."""
        start = self.student.start
        facts: dict[str, Any] = {
            "data.length": self.data.length,
            "student.start": start if start in STARTS else "a directory",
        }
        for table, left_out in (("student", {"start"}), ("loss", set()), ("train", WATCHING)):
            for key, value in msgspec.to_builtins(getattr(self, table)).items():
                if key not in left_out:
                    facts[f"{table}.{key}"] = value
        return facts


STARTS: Final = ("teacher", "scratch")  # all others are directories
WATCHING: Final = {"checkpoint_s", "evaluations", "evaluation_rows"}  # when something is looked at or written


def _placed(config: Config, base: Path) -> Config:
    """The config with its paths made absolute. A teacher may be a bundle's name as well: it is a path if it lies
    there."""

    def at(path: str) -> str:
        return str(base / Path(path).expanduser())

    data, student, teacher = config.data, config.student, config.teacher
    generate = data.generate and msgspec.structs.replace(data.generate, prompts=at(data.generate.prompts))
    data = msgspec.structs.replace(
        data, text=tuple(map(at, data.text)), jsonl=tuple(map(at, data.jsonl)), generate=generate
    )
    if student.start not in STARTS:
        student = msgspec.structs.replace(student, start=at(student.start))
    teacher = at(teacher) if Path(at(teacher)).exists() else teacher
    return msgspec.structs.replace(config, data=data, student=student, teacher=teacher, output=at(config.output))


def _check_files(config: Config) -> None:
    """Before anything long begins."""
    data, student = config.data, config.student
    if not (data.text or data.jsonl or data.hub or data.generate):
        raise ConfigError("[data] names no text", hint="give one of text, jsonl, hub and generate")
    named = [*((f"data.{key}", file) for key in ("text", "jsonl") for file in getattr(data, key))]
    if data.generate is not None:
        named.append(("data.generate.prompts", data.generate.prompts))
    for key, file in named:
        if not Path(file).is_file():
            raise ConfigError(f"{key} names {file}, which is no file", hint="paths count from where the config lies")
    if student.start not in STARTS and not (Path(student.start) / "config.json").is_file():
        raise ConfigError(
            f"student.start is {student.start}, where there is no config.json",
            hint='allowed are "teacher", "scratch" and a Hugging Face directory',
        )
    if student.start not in STARTS and student.vocabulary is not None:
        raise ConfigError(
            f"student.vocabulary is {student.vocabulary}, and {student.start} has a vocabulary of its own",
            hint="leave student.vocabulary out",
        )
    if isinstance(student.layers, tuple) and list(student.layers) != sorted(set(student.layers)):
        raise ConfigError(f"student.layers is {list(student.layers)}; each layer once, in ascending order, is needed")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ConfigError(f"output is {config.output}, which is a file", hint="name a directory; it is made if need be")


def _unknown(document: Mapping[str, Any], struct: type[msgspec.Struct], place: str = "") -> Iterator[tuple[str, str]]:
    """Each key that no table has, with what to write instead."""
    inner = _tables(struct)
    for key, value in document.items():
        if key not in struct.__struct_fields__:
            near = difflib.get_close_matches(key, struct.__struct_fields__, n=1, cutoff=0.5)
            known = f"allowed here are {', '.join(struct.__struct_fields__)}"
            yield f"{place}{key}", f"did you mean {near[0]!r}? {known}" if near else known
        elif key in inner and isinstance(value, dict):
            yield from _unknown(value, inner[key], f"{place}{key}.")


def _tables(struct: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """The tables within a table, by key."""
    found: dict[str, type[msgspec.Struct]] = {}
    for key, hint in get_type_hints(struct).items():
        options = (hint, *get_args(hint))
        found.update((key, one) for one in options if isinstance(one, type) and issubclass(one, msgspec.Struct))
    return found


def _explained(message: str, document: Mapping[str, Any]) -> str:
    """msgspec's message, which names the place and what is allowed, with the value that stands there."""
    told, _, place = message.partition(" - at `$")
    keys = re.findall(r"\.(\w+)|\[(\d+)\]", place)
    value: Any = document
    for name, number in keys:
        value = value[name] if name else value[int(number)]
    key = "".join(f".{name}" if name else f"[{number}]" for name, number in keys).lstrip(".")
    if isinstance(value, dict):
        return f"[{key}] {told}" if key else told
    return f"{key} is {value!r}: {told}"
