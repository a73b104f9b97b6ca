"""Presets: which artifacts a platform gets, as data. Ours lie in `presets/`; a user's own file is one too."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from edgewise.devices.catalogue import Catalogue, Device
from edgewise.errors import UsageError
from edgewise.export.options import LANGUAGE_OPTIONS, OPTIONS, taken, useful
from edgewise.export.wanted import LANGUAGE_PRECISIONS, PRECISIONS_OF, Wanted
from edgewise.export.work.job import Precision

PRESETS: Final = Path(__file__).with_name("presets")
FORMAT: Final = 1
SIZE_LIMIT: Final = 1 << 16

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file. With `devices` it is made for those alone, with the options of each."""

    target: str
    precision: Precision
    backend: Text
    options: dict[str, Any] = {}
    devices: dict[str, dict[str, Any]] | None = None


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`artifacts` in the order of preference: the first that applies is what the preset is about. `backends` are other
    names for it, each with what must be said about it."""

    format: int
    platform: Text
    about: Text
    artifacts: tuple[Artifact, ...]
    accelerators: tuple[Text, ...] = ()
    notes: tuple[Text, ...] = ()
    backends: dict[str, Text] = {}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is made of a preset for one device, or for none in particular. `warnings` are of the backend asked for, and
    of what a language model does not have."""

    preset: Preset
    wanted: tuple[Wanted, ...]
    backends: Mapping[str, str] = field(default_factory=dict)  # by the keys of `wanted`
    warnings: tuple[str, ...] = ()


def names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read(name: str) -> Preset:
    """One of ours by name, or a file. UsageError naming what is wrong with it."""
    path = PRESETS / f"{name}.toml" if name in names() else Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"there is no platform {name!r}", hint=f"known are {', '.join(names())}, or give a .toml file")
    try:
        raw = path.read_bytes()
        if len(raw) > SIZE_LIMIT:
            raise UsageError(f"{path} is longer than {SIZE_LIMIT} bytes, so it is no preset")
        preset = msgspec.convert(tomllib.loads(raw.decode()), Preset)
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}", hint=f"ours are {', '.join(names())}") from e
    except (ValueError, RecursionError) as e:  # msgspec's and tomllib's errors are ValueErrors
        raise UsageError(f"{path} is no preset: {e}", hint="docs/export.md says what is allowed") from e
    _check(path, preset)
    return preset


def chosen(
    preset: Preset, catalogue: Catalogue, device: str | None, backend: str | None, *, language: bool = False
) -> Choice:
    """UsageError for a device that the catalogue does not have, for a backend that the preset does not, and where
    nothing is left to make."""
    id = None if device is None else catalogue.find(device)[0]
    _check_devices(preset, catalogue)
    found = [one for one in preset.artifacts if one.devices is None or id in one.devices]
    if language:
        found = [one for one in found if one.target in LANGUAGE_PRECISIONS]
    known = {one.backend for one in found}
    if backend is not None and backend not in known | set(preset.backends):
        raise UsageError(
            f"{preset.platform} has no backend {backend!r}" + (f" on {id}" if id else ""),
            hint=_backend_hint(preset, backend, sorted(known | set(preset.backends))),
        )
    if not found:
        raise UsageError(
            f"{preset.platform} makes nothing of {'a language' if language else 'this'} model for {id or 'no device'}",
            hint=f"give --device: {', '.join(sorted(_devices(preset)))}" if _devices(preset) else "take another preset",
        )
    if backend in known:
        found = [one for one in found if one.backend == backend]
    elif backend is not None:
        found = found[:1]
    wanted = [_wanted(one, id, language=language) for one in found]
    names = {
        w.key: backend if backend in preset.backends else one.backend for w, one in zip(wanted, found, strict=True)
    }
    said = [preset.backends[backend]] if backend in preset.backends else []
    for one, its in zip(found, wanted, strict=True):
        said += _left_out(one, its, id)
    return Choice(preset, tuple(wanted), names, tuple(said))


def _devices(preset: Preset) -> set[str]:
    return {id for one in preset.artifacts for id in one.devices or ()}


def _check_devices(preset: Preset, catalogue: Catalogue) -> None:
    for id in sorted(_devices(preset)):
        try:
            name = catalogue.find(id)[0]
        except UsageError as e:
            raise UsageError(f"the preset {preset.platform} is for {id!r}: {e.message}", hint=e.hint) from e
        if name != id:
            raise UsageError(f"the preset {preset.platform} is for {id!r}", hint=f"the catalogue calls it {name}")


def _backend_hint(preset: Preset, backend: str, known: list[str]) -> str:
    devices = sorted(id for one in preset.artifacts if one.backend == backend for id in one.devices or ())
    return f"it has {', '.join(known) or 'none'}" + (
        f"; {backend} with --device {', '.join(devices)}" if devices else ""
    )


def memory_note(device: Device, size_bytes: int) -> str | None:
    """Where a file is larger than what a program may take of the device's memory."""
    if device.memory_gib is None:
        return None
    share = device.os_limits[0].share if device.os_limits and device.os_limits[0].share else 1.0
    allowed = device.memory_gib.least * 2**30 * share
    if size_bytes <= allowed:
        return None
    return f"{size_bytes / 1e9:.1f} GB, and a program gets {allowed / 1e9:.1f} GB of {device.name}"


def _wanted(artifact: Artifact, device: str | None, *, language: bool) -> Wanted:
    """With those of the options that this kind of model has."""
    target, precision = artifact.target, artifact.precision
    if language and precision not in LANGUAGE_PRECISIONS[target]:
        precision = LANGUAGE_PRECISIONS[target][0]
    known = (LANGUAGE_OPTIONS if language else OPTIONS)[target]
    return Wanted(target, target, precision, useful(_options(artifact, device), known, precision))


def _options(artifact: Artifact, device: str | None) -> dict[str, Any]:
    return {**artifact.options, **(artifact.devices or {}).get(device or "", {})}


def _left_out(artifact: Artifact, wanted: Wanted, device: str | None) -> list[str]:
    """What the preset asks for and this kind of model does not have."""
    said = []
    if wanted.precision != artifact.precision:
        said.append(f"{wanted.target} has no {artifact.precision} of a language model: it is {wanted.precision}")
    names = [name for name in _options(artifact, device) if name not in wanted.options]
    if names:
        said.append(f"{wanted.target}: {', '.join(names)} of the preset is not for this kind of model")
    return said


def _check(path: Path, preset: Preset) -> None:
    if preset.format != FORMAT:
        raise UsageError(f"{path} has the format {preset.format}", hint=f"this version reads {FORMAT}")
    if not preset.artifacts:
        raise UsageError(f"{path} has no artifacts", hint="give one or more [[artifacts]]")
    targets = [one.target for one in preset.artifacts]
    for one in preset.artifacts:
        if one.target not in PRECISIONS_OF or one.precision not in PRECISIONS_OF[one.target]:
            allowed = "; ".join(f"{name}: {', '.join(some)}" for name, some in PRECISIONS_OF.items())
            raise UsageError(f"{path} asks for {one.target} {one.precision}", hint=f"there are {allowed}")
        known = {**LANGUAGE_OPTIONS.get(one.target, {}), **OPTIONS[one.target]}
        for given in (one.options, *(one.devices or {}).values()):
            try:
                taken([Wanted(one.target, one.target, one.precision)], {one.target: given}, {one.target: known})
            except UsageError as e:
                raise UsageError(f"{path}: {e.message}", hint=e.hint) from e
    if len(set(targets)) != len(targets):
        raise UsageError(f"{path} names a target twice", hint="make two presets of it")
