"""`edgewise devices`: the hardware catalogue, this machine, and the way to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import CloudKeyEnv, Config, Debug, Json, flags
from edgewise.cli.output import columns, result
from edgewise.errors import UsageError
from edgewise.settings import load, secret

if TYPE_CHECKING:
    from edgewise.devices.catalogue import Catalogue, Device, Figure
    from edgewise.devices.host import Host
    from edgewise.devices.link import Link

HOST = "host"
SORTS = {  # name: what it is of a device; the largest first
    "tops": "int8 TOPS, dense",
    "tops/w": "int8 TOPS, dense, per watt",
    "gb/s": "memory bandwidth",
    "memory": "memory",
}


def devices(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME …]", help="one: all that is known of it; several: compared; host: this machine"),
    ] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help='e.g. "phone soc", "edge gpu"')] = None,
    vendor: Annotated[str | None, typer.Option(metavar="NAME", help="e.g. NVIDIA")] = None,
    runtime: Annotated[str | None, typer.Option(metavar="NAME", help="devices that it runs on")] = None,
    sort: Annotated[str | None, typer.Option(metavar="BY", help=f"{', '.join(SORTS)}; the unknown come last")] = None,
    verdicts: Annotated[bool, typer.Option("--verdicts", help="instead: the guide's own figures, each judged")] = False,
    link: Annotated[str | None, typer.Option(metavar="URL", help="instead: measure the way to a cloud")] = None,
    cloud_key_env: CloudKeyEnv = None,
    catalogue: Annotated[Path | None, typer.Option(metavar="FILE", help="another catalogue of devices")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure this machine again")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List, filter, compare and sort what is known of edge hardware; measure this machine and its way to a cloud."""
    from edgewise.devices import catalogue as catalogues

    settings = load(flags(cloud_key_env=cloud_key_env), config=config).settings
    if link is not None:
        _link(link, secret(settings.cloud.key_env, "--cloud-key-env"), as_json=json)
        return
    if names == [HOST]:
        from edgewise.bench.host import measured_host

        _host(measured_host(settings.home, fresh=fresh), as_json=json)
        return
    known = catalogues.shipped() if catalogue is None else catalogues.load(catalogue)
    if verdicts:
        _verdicts(known, as_json=json)
        return
    chosen = [known.find(name) for name in names or []] or list(known.devices.items())
    found = [(id, device) for id, device in chosen if _wanted(device, kind, vendor, runtime)]
    if not found:
        raise UsageError("no device is like that", hint=f"kinds: {', '.join(_kinds(known))}")
    if sort is not None:
        found = _sorted(found, sort)
    if names and len(names) == 1:
        described = known.described(found[0][0])
        result(described, _page(described), as_json=json)
    else:
        result({"devices": [known.described(id) for id, _ in found]}, _table(found), as_json=json)


def _kinds(known: Catalogue) -> list[str]:
    return sorted({device.kind for device in known.devices.values()})


def _wanted(device: Device, kind: str | None, vendor: str | None, runtime: str | None) -> bool:
    from edgewise.devices.catalogue import plain

    runtimes = {plain(name) for unit in device.units for name in unit.runtimes}
    return (
        (kind is None or plain(kind) in plain(device.kind))
        and (vendor is None or plain(vendor) in plain(device.vendor))
        and (runtime is None or any(plain(runtime) in name for name in runtimes))
    )


def _sorted(found: Sequence[tuple[str, Device]], by: str) -> list[tuple[str, Device]]:
    if by.lower() not in SORTS:
        raise UsageError(f"--sort is {by!r}", hint=f"known: {', '.join(SORTS)}")
    return sorted(found, key=lambda pair: -(_sort_value(pair[1], by.lower()) or -math.inf))


def _sort_value(device: Device, by: str) -> float | None:
    """None is not known, which is not 0."""
    if by == "tops/w":
        return _tops_per_w(device)
    name = {"tops": "int8_tops_dense", "gb/s": "bandwidth_gb_s", "memory": "memory_gib"}[by]
    figure = device.best(name)
    return None if figure is None else figure.most


def _tops_per_w(device: Device) -> float | None:
    """Of a unit where its power is known, else of the device at its power or its largest mode."""
    units = [
        unit.int8_tops_dense.most / unit.power_w.most for unit in device.units if unit.int8_tops_dense and unit.power_w
    ]
    if units:
        return max(units)
    tops, modes = device.best("int8_tops_dense"), [mode.power_w for mode in device.power_modes]
    power = device.power_w.most if device.power_w else max(modes, default=None)
    return None if tops is None or power is None else tops.most / power


def _table(found: Sequence[tuple[str, Device]]) -> str:
    rows: list[tuple[str, ...]] = [("id", "kind", "GiB", "GB/s", "int8 TOPS", "sparse", "fp16 TFLOPS", "W", "TOPS/W")]
    for id, device in found:
        per_watt = _tops_per_w(device)
        figures = ("memory_gib", "bandwidth_gb_s", "int8_tops_dense", "int8_tops_sparse", "fp16_tflops_dense")
        watts = _range(device.power_w) if device.power_w else "/".join(f"{m.power_w:g}" for m in device.power_modes)
        shown = (_range(device.best(figure)) for figure in figures)
        rows.append((id, device.kind, *shown, watts or "?", "?" if per_watt is None else f"{per_watt:.3g}"))
    return columns(rows)


def _range(figure: Figure | None) -> str:
    """A figure; ? for what nobody published, ~ before what no document backs."""
    if figure is None:
        return "?"
    mark = "~" if figure.status == "unverified" else ""
    return mark + (f"{figure.least:g}" if figure.least == figure.most else f"{figure.least:g}-{figure.most:g}")


def _page(described: dict[str, Any]) -> str:
    """Everything that is known of a device, with the source of each figure."""
    lines = [f"{described['name']} ({described['id']}): {described['kind']} of {described['vendor']}"]
    lines += _facts(described, "  ")
    for mode in described["power_modes"]:
        lines.append(f"  mode {mode['name']}: {mode['power_w']:g} W, {mode['status']}: {mode['source']['title']}")
    for limit in described["os_limits"]:
        lines.append(f"  system: {limit['what']}, {limit['status']}: {limit['source']['title']}")
    lines += [f"  note: {note}" for note in described["notes"]]
    for unit in described["units"]:
        lines.append(f"  {unit['unit']}: {unit['name']}")
        lines += _facts(unit, "    ")
        lines += [f"    runtimes: {', '.join(unit['runtimes'])}"] if unit["runtimes"] else []
        lines += [f"    limit: {limit}" for limit in unit["limits"]]
    return "\n".join(lines)


def _facts(values: dict[str, Any], indent: str) -> list[str]:
    found = []
    for name, figure in values.items():
        if isinstance(figure, dict) and "status" in figure and ("value" in figure or "low" in figure):
            value = figure.get("value")
            shown = f"{value:g}" if value is not None else f"{figure['low']:g} to {figure['high']:g}"
            source = figure["source"]
            note = f"; {figure['note']}" if figure.get("note") else ""
            found.append(f"{indent}{name}: {shown} ({figure['status']}: {source['title']}, {source['date']}{note})")
    return found


def _verdicts(known: Catalogue, *, as_json: bool) -> None:
    import msgspec

    rows: list[tuple[str, ...]] = [("verdict", "row", "figure", "stated", "right", "why")]
    for claim in known.claims:
        right = "" if claim.correct is None else _plain(claim.correct)
        rows.append((claim.verdict, claim.key, claim.figure, f"{_plain(claim.value)} {claim.unit}", right, claim.why))
    result({"claims": msgspec.to_builtins(known.claims)}, columns(rows), as_json=as_json)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _host(host: Host, *, as_json: bool) -> None:
    import msgspec

    machine = host.machine
    rows = [
        ("processor", machine.cpu),
        ("cores", f"{machine.cores}, {machine.usable_cores} usable"),
        ("simd", " ".join(machine.simd) or "none that we know"),
        ("memory", f"{_gib(machine.memory_bytes)}, {_gib(machine.available_bytes)} to be had"),
    ]
    for name, by_threads in host.figures.items():
        for threads, reading in by_threads.items():
            shown = f"{reading.median:.4g} {reading.unit} [{reading.low:.4g}, {reading.high:.4g}]"
            rows.append((f"{name}, {threads} threads", shown))
    rows += [(name, f"unknown: {why}") for name, why in host.unknown.items()]
    text = f"{columns(rows)}\nmeasured {host.date} in {host.took_s:.1f} s"
    result(msgspec.to_builtins(host, str_keys=True), text, as_json=as_json)


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _link(url: str, key: str | None, *, as_json: bool) -> None:
    import msgspec

    from edgewise.devices.link import measure

    found: Link = measure(url, key)
    told = msgspec.to_builtins(found)
    rows = []
    for name, value in told.items():
        if isinstance(value, dict) and "median" in value:
            rows.append((name, f"{value['median']:.4g} {value['unit']} [{value['low']:.4g}, {value['high']:.4g}]"))
        elif isinstance(value, int | float):
            rows.append((name, f"{value:.4g}"))
    rows += [(name, f"unknown: {why}") for name, why in found.unknown.items()]
    result(told, columns([("url", found.url), *rows]), as_json=as_json)
