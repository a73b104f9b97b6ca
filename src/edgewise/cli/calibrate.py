"""`edgewise calibrate`: a policy from a replay."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Debug, Json, Within
from edgewise.cli.output import columns, note, result
from edgewise.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from edgewise.joint.fit.calibrate import Calibrated
    from edgewise.joint.fit.target import Target

DELTA = 0.1


def calibrate(
    replay: Annotated[Path, typer.Argument(metavar="REPLAY", help="past requests with both tiers' outcomes")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="where the policy goes")],
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="P", help="at most this share is kept where the edge is wrong and the cloud right"),
    ] = None,
    target_accuracy: Annotated[
        float | None, typer.Option(metavar="A", help="at least this share of the answers served is right")
    ] = None,
    delta: Annotated[
        float, typer.Option(metavar="D", help="those two hold with probability 1 - D over the rows")
    ] = DELTA,
    budget: Annotated[float | None, typer.Option(metavar="SHARE", help="so many requests go to the cloud")] = None,
    cost: Annotated[
        str | None,
        typer.Option(metavar="EDGE,CLOUD", help="of an answer, in units of what one more right answer is worth"),
    ] = None,
    labels: Annotated[int | None, typer.Option(metavar="N", help="fit on so many rows; unset: on all")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="draws those rows")] = 0,
    edge: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE", help="the edge model that made the replay; unset: as the log of a node says"),
    ] = None,
    cloud: Annotated[str | None, typer.Option(metavar="NAME", help="the cloud's model that did")] = None,
    within: Within = 0.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw the cost-quality curve")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit when the edge's answer stands, for one target; with none, the cloud is asked wherever it is expected to do
    better. Exit code 1 if the target cannot be promised."""
    if find_spec("sklearn") is None or find_spec("scipy") is None:
        raise MissingExtra("scikit-learn", "calibrate")
    from edgewise.joint.fit.calibrate import calibrate as fit
    from edgewise.joint.replay import Replay

    target = _target(max_drop, target_accuracy, delta, budget, cost)
    rows = Replay.open(replay, within=within)
    for why, count in rows.left_out.items():
        note(f"{count} rows of {replay} are left out: {why}")
    found = fit(rows, target, labels=labels, seed=seed, pair=_pair(edge, cloud) or rows.pair)
    if plot is not None:
        from edgewise.joint.plot import plot as drawn

        plot.write_text(drawn(f"{replay.name}: {found.rows} rows fitted on", {"policy": found.curve}, found.band,
                              found.escalation.value), encoding="utf-8")  # fmt: skip
        note(f"wrote {plot}")
    if found.policy is not None:
        output.write_bytes(found.policy.to_json())
        note(f"wrote {output}")
    result(_facts(found), _text(found), as_json=json)
    if found.policy is None:
        note(_refusal(found))
        raise typer.Exit(1)


def _target(
    max_drop: float | None, target_accuracy: float | None, delta: float, budget: float | None, cost: str | None
) -> Target:
    from edgewise.joint.fit.target import Budget, Cost, MaxDrop, TargetAccuracy

    flags = {"--max-drop": max_drop, "--target-accuracy": target_accuracy, "--budget": budget, "--cost": cost}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different targets", hint="give one of them")
    if max_drop is not None:
        return MaxDrop(max_drop, delta)
    if target_accuracy is not None:
        return TargetAccuracy(1 - target_accuracy, delta)
    if budget is not None:
        return Budget(budget)
    return Cost() if cost is None else Cost(*_costs(cost))


def _costs(text: str) -> tuple[float, float]:
    try:
        edge, cloud = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--cost is {text!r}; allowed are two numbers such as 0.01,0.2") from None
    return edge, cloud


def _pair(edge: str | None, cloud: str | None) -> Any:
    from edgewise.cli.tiers import manifest
    from edgewise.joint.pair import Model, Pair, identity
    from edgewise.settings import load

    if edge is None:
        if cloud is not None:
            raise UsageError("--cloud names one of two models", hint="name the edge's too: --edge BUNDLE")
        return None
    return Pair(identity(edge, manifest(edge, load().settings.home)), None if cloud is None else Model(cloud, None))


def _facts(found: Calibrated) -> dict[str, Any]:
    escalation = found.escalation
    return {
        "feasible": found.policy is not None,
        "threshold": found.whole.choice.threshold,
        "expected_escalation": {"value": escalation.value, "low": escalation.low, "high": escalation.high},
        "bound": found.whole.choice.bound,
        "min_escalation": found.whole.choice.min_escalation,
        "rows": found.rows,
        "in_sample": found.figures,
        "curve": [
            {"escalated": float(at), "accuracy": float(value), "low": float(low), "high": float(high)}
            for at, value, low, high in found.points
        ],
        "strengths": found.whole.strengths,
    }


def _text(found: Calibrated) -> str:
    rows = [("to the cloud", "accuracy", "95 % interval")]
    rows += [(f"{at:.0%}", f"{value:.3f}", f"{low:.3f} to {high:.3f}") for at, value, low, high in found.points]
    escalation = found.escalation
    lines = [
        f"fitted on {found.rows} rows; figures below are of rows that the judge did not learn from",
        f"expected to go to the cloud: {escalation.value:.1%} [{escalation.low:.1%}, {escalation.high:.1%}]",
    ]
    if found.whole.choice.bound is not None:
        lines.append(f"proven bound of the risk: {found.whole.choice.bound:.4f}")
    return "\n".join([*lines, "", columns(rows)])


def _refusal(found: Calibrated) -> str:
    least = found.whole.choice.min_escalation
    share = "no share of requests sent to the cloud is enough on these rows" if least is None else (
        f"at least {least:.1%} of the requests would have to go to the cloud on these rows, without any margin"
    )  # fmt: skip
    return f"the target is refused: what can be proven is {found.whole.choice.bound:.4f}; {share}. More rows prove more"
