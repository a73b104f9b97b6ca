"""`edgewise split profile`: what each cut of an ONNX file takes on this machine; and plans that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Debug, Json, Shape, shapes_of
from edgewise.cli.output import columns, megabytes, note, result
from edgewise.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgewise.devices.links import LinkProfile
    from edgewise.models.graph import Graph
    from edgewise.split.profile import Plan, Profile

DRAWN = 4  # inputs, where none are given


def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="where it is written", show_default=False)],
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".npz: an array by each input's name, one request a row; unset: drawn ones"),
    ] = None,
    shape: Shape = None,
    upload_bytes: Annotated[
        float | None,
        typer.Option(metavar="BYTES", help="what the cloud alone is sent for a request (a JPEG, say), on average"),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how long the two halves take at each cut of a network, and the bytes between them, for
    `edgewise split plan`. Takes some thirty times as many runs of the network as it has cuts."""
    from edgewise.models.graph import Graph
    from edgewise.split.profile import Coding
    from edgewise.split.profiling import profiled

    graph = Graph.open(model, shapes_of(shape))
    given = _drawn(graph) if inputs is None else _read(graph, inputs)
    if inputs is None:
        note("measured with random inputs: bytes and errors will be others for real ones; give some with --inputs")
    upload = None if upload_bytes is None else {graph.inputs[0]: Coding(upload_bytes)}
    found = profiled(graph, given, upload=upload, tell=note)
    found.save(out)
    whole = next(cut for cut in found.cuts if not cut.edge)
    data = {
        "model": found.model,
        "digest": found.digest,
        "path": str(out),
        "inputs": found.inputs,
        "cuts": len(found.cuts),
        "whole_ms": whole.back_s * 1e3,
    }
    text = f"{found.model}: {len(found.cuts)} cuts, {whole.back_s * 1e3:.3g} ms without one; written to {out}"
    result(data, text, as_json=json)


def show_plan(
    model: Path,
    profile: Path | None,
    link: LinkProfile,
    *,
    home: Path,
    edge: float = 1.0,
    cloud: float = 1.0,
    max_error: float | None = None,
    edge_bytes: int | None = None,
    as_json: bool,
) -> None:
    """What `edgewise split plan MODEL.onnx --profile FILE` says. `edge` and `cloud` are how many times longer than the
    profile's machine they take. Without a profile the file is measured now, with random inputs, and the profile kept
    under `home`. UsageError if the profile is of another file."""
    from edgewise.models.graph import Graph
    from edgewise.split.profile import MAX_ERROR, Profile

    taken = _kept(model, home) if profile is None else Profile.read(profile)
    taken.check(Graph.open(model, taken.shapes).digest)
    error = MAX_ERROR if max_error is None else max_error
    plan = taken.plans(edge=edge, cloud=cloud, max_error=error, edge_bytes=edge_bytes).at(link)
    reasons = _reasons(plan, link, error)
    result(_data(taken.model, plan, link, reasons), _text(taken.model, plan, reasons), as_json=as_json)


def _kept(model: Path, home: Path) -> Profile:
    """Of an earlier plan, or measured now."""
    from edgewise.models.graph import Graph
    from edgewise.split.profile import Profile
    from edgewise.split.profiling import profiled

    graph = Graph.open(model, {})
    kept = home / "profiles" / f"{graph.digest}.json"
    if kept.is_file():
        return Profile.read(kept)
    note("measured with random inputs: bytes and errors are others for real ones; `edgewise split profile` takes some")
    found = profiled(graph, _drawn(graph), upload=None, tell=note)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found.save(kept)
    return found


def _data(model: str, plan: Plan, link: LinkProfile, reasons: list[str]) -> dict[str, Any]:
    return {
        "feasible": True,
        "model": model,
        "link": link.name,
        "place": plan.place,
        "cut": list(plan.crossing),
        "units": len(plan.units),
        "edge_bytes": plan.front_bytes,
        "codec": plan.codec,
        "bytes_per_token_up": plan.up_bytes,  # a request is one token
        "bytes_per_token_down": plan.down_bytes,
        "predicted_ms": plan.seconds * 1e3,
        "baselines": {"edge_only_ms": _ms(plan.edge_only_s), "cloud_only_ms": _ms(plan.cloud_only_s)},
        "reasons": reasons,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _text(model: str, plan: Plan, reasons: list[str]) -> str:
    rows = [("", "ms", "bytes up", "bytes down")]
    rows.append((plan.place, f"{plan.seconds * 1e3:.4g}", str(plan.up_bytes), str(plan.down_bytes)))
    for name, seconds in (("edge alone", plan.edge_only_s), ("cloud alone", plan.cloud_only_s)):
        rows.append((name, "not allowed" if seconds is None else f"{seconds * 1e3:.4g}", "", ""))
    head = f"{model}: {len(plan.units)} units here, with {megabytes(plan.front_bytes)} of weights"
    return "\n".join([head, columns(rows), "why:", *(f"  {reason}" for reason in reasons)])


def _reasons(plan: Plan, link: LinkProfile, max_error: float) -> list[str]:
    if plan.place == "edge":
        return [f"every way through {link.name} takes longer than computing here"]
    if plan.place == "cloud":
        return [f"{link.name} carries the input in less time than computing here saves"]
    alone = [seconds for seconds in (plan.edge_only_s, plan.cloud_only_s) if seconds is not None]
    gain = (
        f"{min(alone) / plan.seconds:.2f} times as fast as the better side alone" if alone else "no side may be alone"
    )
    return [
        f"cut at {', '.join(plan.crossing)}: {gain}",
        f"{plan.codec} is the codec that is soonest there with an error of at most {max_error:g} in the answer",
    ]


def _drawn(graph: Graph) -> list[dict[str, npt.NDArray[Any]]]:
    import numpy as np

    random = np.random.default_rng(0)
    found = []
    for _ in range(DRAWN):
        one = {}
        for name in graph.inputs:
            tensor = graph.tensors[name]
            if tensor.shape is None or tensor.dtype is None or tensor.dtype.kind != "f":
                raise UsageError(
                    f"the input {name!r} of {graph.name} is {tensor.dtype}, for which nothing can be drawn",
                    hint="give real ones: --inputs FILE.npz",
                )
            one[name] = random.normal(size=tensor.shape).astype(tensor.dtype)
        found.append(one)
    return found


def _read(graph: Graph, path: Path) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Row by row. No pickle is opened."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in graph.inputs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} holds no inputs of {graph.name}: {error}",
            hint=f"numpy.savez(FILE, {', '.join(f'{name}=…' for name in graph.inputs)}), one request a row",
        ) from error
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or not max(counts):
        raise UsageError(f"the inputs in {path} have {sorted(counts)} rows; the same number is needed, at least 1")
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(max(counts))]
