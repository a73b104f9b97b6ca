"""`edgewise doctor`: what works on this machine."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgewise.cli.options import Cloud, CloudKeyEnv, Config, Debug, Json, flags
from edgewise.cli.output import columns, note, result
from edgewise.errors import EdgewiseError, RemoteError, UsageError
from edgewise.settings import load, secret

if TYPE_CHECKING:
    from edgewise.export.work.environments import Environment
    from edgewise.settings import Settings

DISK_NEEDED = 1 << 30  # bytes; a pull of the default model holds its source and its bundle
CLOUD_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `absent` is a choice (an extra that is not installed), `failed` is a fault to mend."""

    name: str
    status: Literal["ok", "absent", "failed"]
    detail: str
    hint: str | None = None


def doctor(
    install: Annotated[
        str | None, typer.Option(metavar="TARGET", help="install what an extra or a target of export needs")
    ] = None,
    cloud: Cloud = None,
    cloud_key_env: CloudKeyEnv = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check what works on this machine. Exit code 1 if something that is needed does not."""
    settings = load(flags(cloud=cloud, cloud_key_env=cloud_key_env), config=config).settings
    if install is not None:
        _install(install, settings.home, as_json=json)
        return
    checks = list(_checks(settings))
    ok = all(check.status != "failed" for check in checks)
    rows = [(c.status, c.name, f"{c.detail} ({c.hint})" if c.hint else c.detail) for c in checks]
    result({"ok": ok, "checks": [asdict(check) for check in checks]}, columns(rows), as_json=json)
    if not ok:
        raise typer.Exit(1)


def _checks(settings: Settings) -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Check("platform", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield from _machine()
    yield _native()
    yield _onnxruntime()
    yield from map(_extra, sorted(_extras()))
    yield from _environments(settings.home)
    yield from _bundles(settings.home)
    yield _disk(settings.home)
    yield _port(settings.serve.host, settings.serve.port)
    if settings.cloud.url is not None:
        yield _cloud(settings.cloud.url, secret(settings.cloud.key_env, "--cloud-key-env"))


def _machine() -> Iterator[Check]:
    from edgewise.devices.machine import this_machine

    machine = this_machine()
    yield Check("cores", "ok", f"{machine.cores} in all, {machine.usable_cores} for this process")
    yield Check("simd", "ok", " ".join(machine.simd) or "none that we know")
    memory = [f"{_gib(machine.memory_bytes)} in all", f"{_gib(machine.available_bytes)} to be had"]
    if machine.memory_limit_bytes is not None:
        memory.append(f"the cgroup grants {_gib(machine.memory_limit_bytes)}")
    yield Check("memory", "ok", ", ".join(memory))


def _gib(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 2**30:.1f} GiB"


def _native() -> Check:
    from edgewise.engines.native_lm import probe

    kernels = probe()
    if kernels is None:
        hint = "models run on onnxruntime; for x86-64 with AVX2, reinstall edgewise with a C compiler at hand"
        return Check("native kernels", "absent", "not built, or not for this processor", hint=hint)
    return Check("native kernels", "ok", kernels)


def _onnxruntime() -> Check:
    try:
        from edgewise.engines.onnx_process import probe
    except (ImportError, OSError) as e:  # OSError: the library is there and its loader refuses it
        return Check("onnxruntime", "failed", str(e), hint="pip install --force-reinstall onnxruntime")
    version, providers = probe()
    return Check("onnxruntime", "ok", f"{version}: {', '.join(providers)}")


def _extras() -> dict[str, list[str]]:
    """The optional parts and what each needs, as our own package declares them."""
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires("edgewise") or []:
        needs, _, marker = requirement.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named:
            extras.setdefault(named[1], []).append(needs.strip())
    return extras


def _extra(extra: str) -> Check:
    names = [re.match(r"[\w.-]+", need) for need in _extras()[extra]]
    try:
        return Check(extra, "ok", ", ".join(f"{n[0]} {metadata.version(n[0])}" for n in names if n))
    except metadata.PackageNotFoundError as e:
        return Check(extra, "absent", f"{e.name} is not installed", hint=f"edgewise doctor --install {extra}")


def _environments(home: Path) -> Iterator[Check]:
    from edgewise.export.work.environments import ENVIRONMENTS, missing_here, pins, stamp, unsupported

    for environment in ENVIRONMENTS.values():
        name = f"environment {environment.name}"
        versions = {one: pins(environment.lock)[one] for one in environment.asked}
        holds = f"{', '.join(environment.serves)}: {', '.join(f'{one} {version}' for one, version in versions.items())}"
        if not missing_here(environment, environment.asked):
            yield Check(name, "ok", f"{holds}, in this Python")
        elif stamp(environment, home) is not None:
            yield Check(name, "ok", holds)
        elif why := unsupported(environment):
            yield Check(name, "absent", f"{', '.join(environment.serves)}: not on this machine, as {why}")
        else:
            hint = f"edgewise doctor --install {environment.name}"
            yield Check(name, "absent", f"{', '.join(environment.serves)}: not installed", hint=hint)


def _bundles(home: Path) -> Iterator[Check]:
    from edgewise.models.store import bundles_dir, find

    paths = sorted(p for p in bundles_dir(home).glob("*") if p.is_dir() and not p.name.startswith("."))
    if not paths:
        yield Check("bundles", "absent", f"none in {home}", hint="edgewise pull")
    for path in paths:
        try:
            find(path.name, home)
            yield Check("bundle", "ok", f"{path.name}: every file is what its manifest says")
        except EdgewiseError as e:
            yield Check("bundle", "failed", f"{path.name}: {e.message}", hint=e.hint)


def _disk(home: Path) -> Check:
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    enough = free >= DISK_NEEDED and os.access(there, os.W_OK)
    hint = (
        None if enough else f"needed: {DISK_NEEDED / 1e9:.1f} GB that you may write to; EDGEWISE_HOME chooses the place"
    )
    return Check("disk", "ok" if enough else "failed", f"{free / 1e9:.1f} GB free at {there}", hint)


def _port(host: str, port: int) -> Check:
    place = f"{host}:{port or 'any'}"
    try:
        with socket.create_server((host, port)):
            return Check("port", "ok", f"{place} is free")
    except OSError as e:
        return Check("port", "failed", f"{place}: {e.strerror or e}", hint="serve with --port 0, or choose another")


def _cloud(url: str, key: str | None) -> Check:
    from edgewise.engines.openai import OpenAI

    async def models() -> list[str]:
        tier = OpenAI(url, key=key)
        try:
            return await tier.probe(timeout_s=CLOUD_TIMEOUT_S)
        finally:
            await tier.close()

    try:
        return Check("cloud", "ok", f"{url} has {', '.join(asyncio.run(models())) or 'no models'}")
    except RemoteError as e:
        return Check("cloud", "failed", e.message, e.hint or "check the address, the network and --cloud-key-env")


def _install(target: str, home: Path, *, as_json: bool) -> None:
    from edgewise.export.work.environments import ENVIRONMENTS, TARGETS, environment_for

    if environment := environment_for(target):
        _install_environment(target, environment, home, as_json=as_json)
    elif target in _extras():
        _install_extra(target, as_json=as_json)
    else:
        known = sorted({*_extras(), *TARGETS, *ENVIRONMENTS})
        raise UsageError(f"there is no optional part {target!r}", hint=f"known: {', '.join(known)}")


def _install_environment(target: str, environment: Environment, home: Path, *, as_json: bool) -> None:
    from edgewise.export.work.environments import install

    done = install(environment, home, note)
    how = f"made in {done.seconds:.0f} s" if done.made else "was there"
    facts = {"target": target, "installed": True, **asdict(done), "python": str(done.python)}
    text = f"{target}: the environment {done.environment} {how}, {done.bytes / 1e6:.0f} MB: {done.python}"
    result(facts, text, as_json=as_json)


def _install_extra(extra: str, *, as_json: bool) -> None:
    """Install an extra's own requirements; naming ourselves to pip could fetch a stranger of the same name."""
    command = [sys.executable, "-m", "pip", "install", *_extras()[extra]]
    note(shlex.join(command))
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    outcome = "installed" if code == 0 else f"pip failed with exit code {code}"
    result({"target": extra, "command": command, "installed": code == 0}, f"{extra}: {outcome}", as_json=as_json)
    if code:
        raise typer.Exit(3)
