"""The hardware catalogue: catalogue.toml beside this file, or one of the same format (docs/formats/catalogue.md).

A figure has its source and how far to trust it; what nobody published is None, never zero.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec

from edgewise.errors import UsageError

FORMAT: Final = 1
CATALOGUE: Final = Path(__file__).parent / "catalogue.toml"
SIZE_LIMIT: Final = 4 << 20  # bytes
FORM: Final = "docs/formats/catalogue.md says what is allowed"

Status = Literal["vendor", "measured", "third party", "unverified"]
Kind = Literal["phone soc", "laptop soc", "desktop", "edge gpu", "single board", "accelerator", "server gpu"]
UnitKind = Literal["cpu", "gpu", "npu", "dla"]
Group = Literal["chips", "jetson", "benchmarks"]
Verdict = Literal["right", "wrong", "unsourced"]
KINDS: Final = get_args(Kind)

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
Id = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Date = Annotated[str, msgspec.Meta(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a table of the file may hold; other keys are refused."""


class Source(_Record, frozen=True):
    """Where figures come from. With `read`, the date is when it was read and not when it was published."""

    title: Text
    publisher: Text
    date: Date
    url: Annotated[str, msgspec.Meta(pattern=r"^https?://\S+$", max_length=400)] | None = None
    read: bool = False


class Figure(_Record, frozen=True):
    """A number as published: one `value`, or a range `low`..`high` where models of the device differ."""

    source: Id
    status: Status
    value: Positive | None = None
    low: Positive | None = None
    high: Positive | None = None
    note: Text | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.low is None) or (self.low is None) != (self.high is None):
            raise ValueError("a figure has either a value, or low and high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high, {self.high:g}")

    @property
    def least(self) -> float:
        return self._one(self.low)

    @property
    def most(self) -> float:
        return self._one(self.high)

    def _one(self, end: float | None) -> float:
        number = self.value if end is None else end
        assert number is not None  # __post_init__
        return number


class PowerMode(_Record, frozen=True):
    """A mode of the device with its own limits; what it does not name is as in the device itself."""

    name: Text
    power_w: Positive
    source: Id
    status: Status
    int8_tops_dense: Positive | None = None
    int8_tops_sparse: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    note: Text | None = None


class OSLimit(_Record, frozen=True):
    """What the operating system leaves: `share` of the memory for one program, if that is known."""

    what: Text
    source: Id
    status: Status
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None


class Clusters(_Record, frozen=True):
    """The cores of a CPU by kind: how many, their highest clock, and how many vectors of 128 bits each of them
    multiplies and adds in a cycle; a fraction where that takes several instructions."""

    cores: tuple[Annotated[int, msgspec.Meta(ge=1, le=4096)], ...]
    ghz: tuple[Positive, ...]
    pipes: tuple[Positive, ...]
    source: Id
    status: Status
    note: Text | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.cores) == len(self.ghz) == len(self.pipes):
            raise ValueError("cores, ghz and pipes need one number for each kind of core")

    def vectors_per_ns(self, most: int | None = None) -> float:
        """Vectors of 128 bits that the `most` fastest cores (None: all) multiply and add in a nanosecond."""
        each = [ghz * pipes for n, ghz, pipes in zip(self.cores, self.ghz, self.pipes, strict=True) for _ in range(n)]
        return sum(sorted(each, reverse=True)[:most])


class Unit(_Record, frozen=True):
    """A part that computes. Rates are of the whole unit: TOPS = 10¹² operations a second, two to a multiply-add; `tops`
    is a figure whose precision its source does not say."""

    unit: UnitKind
    name: Text
    cores: Figure | None = None
    clusters: Clusters | None = None
    tops: Figure | None = None
    int8_tops_dense: Figure | None = None
    int8_tops_sparse: Figure | None = None
    int4_tops_dense: Figure | None = None
    int4_tops_sparse: Figure | None = None
    fp4_tflops_dense: Figure | None = None
    fp4_tflops_sparse: Figure | None = None
    fp16_tflops_dense: Figure | None = None
    fp16_tflops_sparse: Figure | None = None
    fp32_tflops: Figure | None = None
    power_w: Figure | None = None
    read_gb_s: Figure | None = None
    runtimes: tuple[Text, ...] = ()
    limits: tuple[Text, ...] = ()


class Device(_Record, frozen=True):
    """A machine, or what is built into one. `memory_gib` is GiB, `bandwidth_gb_s` the peak of its memory and
    `read_gb_s` what somebody measured, both 10⁹ bytes a second."""

    name: Text
    vendor: Text
    kind: Kind
    aliases: tuple[Text, ...] = ()
    memory_gib: Figure | None = None
    no_memory: bool = False  # it has none of its own beside SRAM
    bandwidth_gb_s: Figure | None = None
    read_gb_s: Figure | None = None
    power_w: Figure | None = None
    power_modes: tuple[PowerMode, ...] = ()
    os_limits: tuple[OSLimit, ...] = ()
    notes: tuple[Text, ...] = ()
    units: tuple[Unit, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def best(self, figure: str) -> Figure | None:
        """The device's own figure, else the largest that a unit of it has."""
        if hasattr(self, figure):
            own: Figure | None = getattr(self, figure)
            return own
        found = [f for unit in self.units if (f := getattr(unit, figure)) is not None]
        return max(found, key=lambda f: f.most, default=None)


class Claim(_Record, frozen=True):
    """A figure that somebody states, and what the sources say of it."""

    group: Group
    row: Text
    key: Text
    figure: Text
    value: int | float | str | list[str]
    verdict: Verdict
    why: Text
    unit: str = ""
    correct: int | float | str | list[str] | None = None
    measured: Positive | None = None  # the best that somebody published for it, in `unit`
    device: Id | None = None
    source: Id | None = None


class Catalogue(_Record, frozen=True):
    sources: dict[Id, Source]
    devices: dict[Id, Device]
    claims: tuple[Claim, ...] = ()

    def find(self, name: str) -> tuple[str, Device]:
        """By id, name or alias, whatever their case, else by words that one device alone has in its names and those of
        its units ("Orin NX", "Hexagon 8 Gen 3"); of several the one with the shortest id ("Neural Engine M2" is no M2
        Pro). UsageError if there is none, naming those with a common word."""
        wanted = plain(name)
        for id, device in self.devices.items():
            if wanted in map(plain, (id, *device.names)):
                return id, device
        words = set(wanted.split())
        having = sorted((len(id.split("-")), id) for id, device in self.devices.items() if _is_called(device, words))
        if words and having and (len(having) == 1 or having[0][0] < having[1][0]):
            return having[0][1], self.devices[having[0][1]]
        near = [
            id for id, device in self.devices.items() if words & set(" ".join(map(plain, (id, *device.names))).split())
        ]
        raise UsageError(
            f"the catalogue has no device {name[:100]!r}",
            hint=f"near: {', '.join(near[:8])}" if near else "`edgewise devices` lists them",
        )

    def described(self, id: str) -> dict[str, Any]:
        """The device as plain data, None where nothing is known; each figure has its source in full."""
        told: dict[str, Any] = self._with_sources(msgspec.to_builtins(self.devices[id]))
        return {"id": id, **told}

    def _with_sources(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._with_sources(part) for part in value]
        if not isinstance(value, dict):
            return value
        told = {key: self._with_sources(part) for key, part in value.items()}
        return told | {"source": msgspec.to_builtins(self.sources[told["source"]])} if "source" in told else told


def _is_called(device: Device, words: set[str]) -> bool:
    """Whether one of its names, with its vendor's and what its units are called, has all those words."""
    beside = {word for name in (device.vendor, *(u.name for u in device.units)) for word in plain(name).split()}
    beside = {word for word in beside if not any(character.isdigit() for character in word)}
    return any(words <= {*plain(name).split()} | beside for name in device.names)


def plain(name: str) -> str:
    """A name without case and punctuation."""
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


@cache
def shipped() -> Catalogue:
    """The catalogue that comes with Edgewise."""
    return load(CATALOGUE)


def load(path: Path) -> Catalogue:
    """UsageError naming file, line and field for anything that docs/formats/catalogue.md does not allow."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
        if len(data) > SIZE_LIMIT:
            raise UsageError(f"{path} is longer than {SIZE_LIMIT} bytes, so it is no catalogue")
        text = data.decode()
        found = tomllib.loads(text)
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 at byte {e.start}") from e
    except (ValueError, RecursionError) as e:  # tomllib's own error is a ValueError, a number of 5000 digits another
        raise UsageError(f"{path} is not TOML: {e}", hint=FORM) from e
    return _Reader(path, text).catalogue(found)


T = TypeVar("T", bound=_Record)


class _Reader:
    """Checks table by table, so that an error can name the place."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def catalogue(self, found: Mapping[str, Any]) -> Catalogue:
        if found.get("format") != FORMAT:
            raise self._wrong(("format",), f"is {found.get('format')!r}, this version reads {FORMAT}")
        for key in found.keys() - {"format", "sources", "devices", "claims"}:
            raise self._wrong((key,), "is unknown; format, sources, devices and claims are allowed")
        made = Catalogue(
            sources=self._tables(found, "sources", Source),
            devices=self._tables(found, "devices", Device),
            claims=tuple(
                self._record(("claims", n), claim, Claim) for n, claim in enumerate(self._at(found, "claims", list))
            ),
        )
        self._check_references(made)
        return made

    def _tables(self, found: Mapping[str, Any], name: str, kind: type[T]) -> dict[str, T]:
        tables = self._at(found, name, dict)
        for key in tables:
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key):
                raise self._wrong((name, key), "is no id: lower case letters and digits, joined by hyphens")
        return {key: self._record((name, key), table, kind) for key, table in tables.items()}

    def _at(self, found: Mapping[str, Any], name: str, kind: type) -> Any:
        value = found.get(name, kind())
        if not isinstance(value, kind):
            raise self._wrong((name,), "is not a table" if kind is dict else "is not an array of tables")
        return value

    def _record(self, at: tuple[str | int, ...], value: Any, kind: type[T]) -> T:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as e:
            what, _, place = str(e).partition(" - at `$")
            steps = [name or int(n) for name, n in re.findall(r"\.(\w+)|\[(\d+)\]", place)]
            unknown = re.findall(r"unknown field `(.*)`", what)
            raise self._wrong((*at, *steps, *unknown), what) from e

    def _check_references(self, made: Catalogue) -> None:
        for at, source in _sources(made):
            if source not in made.sources:
                raise self._wrong((*at, "source"), f"is {source!r}, which is not among the sources")
        for n, claim in enumerate(made.claims):
            if claim.device is not None and claim.device not in made.devices:
                raise self._wrong(("claims", n, "device"), f"is {claim.device!r}, which is not among the devices")
        names: dict[str, str] = {}
        for id, device in made.devices.items():
            for name in {plain(name) for name in (id, *device.names)}:
                if names.setdefault(name, id) != id:
                    raise self._wrong(("devices", id), f"is called {name!r}, as {names[name]} is")

    def _wrong(self, at: tuple[str | int, ...], what: str) -> UsageError:
        field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")
        return UsageError(f"{self._path}, line {_line(self._text, at)}: {field}: {what}", hint=FORM)


def _sources(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Each place that names a source."""
    if isinstance(value, _Record):
        if not isinstance(value, Source) and getattr(value, "source", None) is not None:
            yield at, value.source  # type: ignore[attr-defined]
        for name in value.__struct_fields__:
            yield from _sources(getattr(value, name), (*at, name))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _sources(part, (*at, key))
    elif isinstance(value, tuple):
        for n, part in enumerate(value):
            yield from _sources(part, (*at, n))


_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*(?:\"([^\"]+)\"|([\w-]+))\s*=")


def _line(text: str, at: tuple[str | int, ...]) -> int:
    """The line of the place, or of the nearest table around it that has one (tomllib keeps no lines)."""
    best, line = 0, 1
    seen: dict[tuple[str | int, ...], int] = {}  # arrays of tables: how many elements so far
    table: tuple[str | int, ...] = ()
    for number, content in enumerate(text.splitlines(), 1):
        here = None
        if header := _HEADER.match(content):
            table = ()
            names = [name.strip().strip('"') for name in header[2].split(".")]
            for n, name in enumerate(names):
                table = (*table, name)
                last = n == len(names) - 1
                if header[1] == "[[" and last:
                    seen[table] = seen.get(table, -1) + 1
                if table in seen:
                    table = (*table, seen[table])
            here = table
        elif key := _KEY.match(content):
            here = (*table, key[1] or key[2])
        if here is not None and at[: len(here)] == here and len(here) > best:
            best, line = len(here), number
    return line
