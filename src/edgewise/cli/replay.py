"""`edgewise replay`: how a policy does on past requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Debug, Json, Within
from edgewise.cli.output import columns, note, result

if TYPE_CHECKING:
    from edgewise.joint.judging import Judged

CPTS = {"cpt50": 0.5, "cpt80": 0.8, "cpt100": 1.0}


def replay(
    replay: Annotated[Path, typer.Argument(metavar="REPLAY", help="past requests with both tiers' outcomes")],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="the policy to judge")],
    within: Within = 0.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw it beside its baselines")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge a policy on a replay. Rows that it was fitted on are left out; if there are no others, the answer says
    in-sample."""
    from edgewise.joint.judging import judge_replay
    from edgewise.joint.policy import Policy
    from edgewise.joint.replay import Replay

    rows = Replay.open(replay, within=within)
    for why, count in rows.left_out.items():
        note(f"{count} rows of {replay} are left out: {why}")
    judged = judge_replay(rows, Policy.open(policy))
    if judged.in_sample:
        note(f"every row of {replay} was fitted on: these figures are in-sample and too good")
    if plot is not None:
        from edgewise.joint.plot import plot as drawn

        curves = {"policy": judged.curve, **judged.baselines}
        plot.write_text(drawn(f"{replay.name}, {judged.n} rows", curves, None, judged.escalated), encoding="utf-8")
        note(f"wrote {plot}")
    result(_facts(judged), _text(judged), as_json=json)


def _facts(judged: Judged) -> dict[str, Any]:
    return {
        "n": judged.n,
        "left_out": judged.left_out,
        "in_sample": judged.in_sample,
        "apgr": judged.curve.apgr,
        "apgr_interval": None if judged.apgr is None else [judged.apgr.low, judged.apgr.high],
        **{name: judged.curve.cpt(share) for name, share in CPTS.items()},
        "auroc": judged.auroc,
        "ece": judged.ece,
        "ece_floor": judged.ece_floor,
        "escalated": judged.escalated,
        "no_evidence": judged.no_evidence,
        "accuracy": judged.accuracy.value,
        "accuracy_interval": [judged.accuracy.low, judged.accuracy.high],
        "edge_accuracy": judged.edge_accuracy,
        "cloud_accuracy": judged.cloud_accuracy,
        "drop": judged.drop,
        "baselines": {
            name: {"apgr": curve.apgr, **{cpt: curve.cpt(share) for cpt, share in CPTS.items()}}
            for name, curve in judged.baselines.items()
        },
    }


def _text(judged: Judged) -> str:
    rows: list[tuple[str, ...]] = [("", "APGR", "CPT 50", "CPT 80", "CPT 100")]
    for name, curve in {"policy": judged.curve, **judged.baselines}.items():
        rows.append((name, _share(curve.apgr), *(_percent(curve.cpt(share)) for share in CPTS.values())))
    accuracy = judged.accuracy
    lines = [
        f"{judged.n} rows, {judged.left_out} left out as the fit saw them"
        + (", in-sample" if judged.in_sample else ""),
        columns(rows),
        f"at its threshold {judged.escalated:.1%} go to the cloud, and {accuracy.value:.3f} [{accuracy.low:.3f}, "
        f"{accuracy.high:.3f}] of the answers are right (edge {judged.edge_accuracy:.3f}, cloud "
        f"{judged.cloud_accuracy:.3f}); in {judged.drop:.1%} the edge was kept, wrong, and the cloud right",
        f"confidence: AUROC {_share(judged.auroc)}, calibration error {_share(judged.ece)} "
        f"(at best {_share(judged.ece_floor)})",
    ]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
