"""The recipe: what becomes of each of a model's matrices, as docs/formats/recipe.md describes it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec

from edgewise.compress.quantize.gptq import Settings
from edgewise.errors import ConfigError, UsageError
from edgewise.models.source import Activations
from edgewise.models.tensors import EMBED, HEAD

FORMAT: Final = 1
SIZE_LIMIT: Final = 1 << 20  # bytes of a file

DEFAULTS: Final = Settings()

Precision = Literal["exact", "int8", "int4-minima", "int4"]
BITS: Final[Mapping[Precision, int]] = {"int8": 8, "int4-minima": 4, "int4": 4}


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts that matrices are rounded for: so many windows of so many tokens."""

    windows: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 64
    length: Annotated[int, msgspec.Meta(ge=8, le=1 << 16)] = 256


class Gptq(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """gptq.py's Settings."""

    damping: Annotated[float, msgspec.Meta(gt=0, le=1)] = DEFAULTS.damping
    sorted: bool = DEFAULTS.sorted
    sweeps: Annotated[int, msgspec.Meta(ge=0, le=100)] = DEFAULTS.sweeps

    @property
    def settings(self) -> Settings:
        return Settings(self.damping, self.sorted, self.sweeps)


class Mixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Precisions to choose among under a budget, for matrices that `matrices` says nothing of: what each costs in KL is
    measured over so many windows of so many tokens."""

    choices: tuple[Precision, ...] = ("int8", "int4-minima", "int4")
    budget_bytes: Annotated[int, msgspec.Meta(ge=1)] | None = None  # of the whole bundle; --budget goes before it
    windows: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 4
    length: Annotated[int, msgspec.Meta(ge=8, le=1 << 16)] = 128


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`matrices` gives precisions by pattern of a name (`embed`, `head`, `layer3.qkv`, `layer3.o`, `layer3.gate_up`,
    `layer3.down`); the last one that fits holds."""

    format: int
    method: Literal["nearest", "gptq"] = "nearest"
    activations: Activations = "int8"
    matrices: dict[str, Precision] = {}
    mixed: Mixed | None = None
    calibration: Calibration = Calibration()
    gptq: Gptq = Gptq()

    def precisions(self, names: Iterable[str]) -> dict[str, Precision | None]:
        """Of each name; None for those that are chosen under a budget. UsageError for a name without a precision, and
        for a pattern that fits none."""
        names = list(names)
        idle = [pattern for pattern in self.matrices if not any(fnmatchcase(name, pattern) for name in names)]
        if any(pattern != HEAD for pattern in idle):
            raise UsageError(
                f"the recipe names {idle[0]!r}, and the model has no such matrix",
                hint=f"it has {', '.join(names[:5])}, …",
            )
        found = {name: self._precision(name) for name in names}
        if idle and self.matrices[HEAD] != found[EMBED]:
            raise UsageError(
                f"the recipe has {self.matrices[HEAD]} for the head and {found[EMBED]} for the embedding",
                hint="the model has one table for both: give both the same precision, or name embed alone",
            )
        open_ = [name for name, precision in found.items() if precision is None]
        if open_ and self.mixed is None:
            raise UsageError(
                f"the recipe says nothing of {open_[0]}", hint='give "*" a precision under [matrices], or add [mixed]'
            )
        return found

    def _precision(self, name: str) -> Precision | None:
        fitting = [precision for pattern, precision in self.matrices.items() if fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else None


BUILT_IN: Final[Mapping[str, Recipe]] = {
    "int8": Recipe(FORMAT, matrices={"*": "int8"}),
    "int4": Recipe(FORMAT, matrices={"*": "int4", "embed": "int8", "head": "int8"}),
    "int4-gptq": Recipe(FORMAT, "gptq", matrices={"*": "int4", "embed": "int8", "head": "int8"}),
    "mixed": Recipe(FORMAT, "gptq", mixed=Mixed()),
}


def of(name_or_file: str) -> Recipe:
    """A built-in recipe, or that of a TOML file. ConfigError for a file that is none."""
    if name_or_file in BUILT_IN:
        return BUILT_IN[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"there is no recipe {name_or_file!r}", hint=f"take {', '.join(BUILT_IN)}, or a .toml file")
    if path.stat().st_size > SIZE_LIMIT:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {SIZE_LIMIT}")
    return read(path.read_bytes(), path.name)


def read(text: bytes, where: str) -> Recipe:
    """A recipe's TOML. ConfigError."""
    try:
        data = tomllib.loads(text.decode())
        if data.get("format") != FORMAT:
            raise ConfigError(f"{where} has format {data.get('format')!r}; this version reads {FORMAT}")
        recipe = msgspec.convert(data, Recipe)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, RecursionError) as e:
        raise ConfigError(f"{where} is no recipe: {e}", hint="docs/formats/recipe.md has all keys") from e
    if recipe.mixed is not None:
        _check(recipe.mixed, recipe.calibration, where)
    return recipe


def _check(mixed: Mixed, calibration: Calibration, where: str) -> None:
    if not mixed.choices:
        raise ConfigError(
            f"{where} has no choices under [mixed]", hint=f"take some of {', '.join(get_args(Precision))}"
        )
    for name in ("windows", "length"):
        asked, there = getattr(mixed, name), getattr(calibration, name)
        if asked > there:
            raise ConfigError(
                f"{where} has mixed.{name} {asked} and calibration.{name} {there}",
                hint="costs are measured over a part of the calibration's windows: lower the first or raise the second",
            )
