"""What a fixed threshold of 0.8 on the greatest softmax probability means for each pair of models.

    python benchmarks/fixed_threshold.py REPLAY…

Replays of classifiers. For each threshold: the share of requests that stay on the edge, and of those the ones where the
edge is wrong and the cloud right, as a share of all requests. Writes a Measurement file and docs/fixed-threshold.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.measure import Measurement, typed
from edgewise.joint.plot import lines
from edgewise.joint.replay import Replay

FIXED, DROP = 0.8, 0.05
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("replays", type=Path, nargs="+")
    options = parser.parse_args()
    at = np.linspace(0.0, 1.0, 201)
    drops, results = {}, {}
    for path in options.replays:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        drops[name], results[name] = measured(Replay.open(path), at)
    title = f"Edge kept and wrong, cloud right: share of all requests, by threshold (dashed: {FIXED})"
    (DOCS / "fixed-threshold.svg").write_text(
        lines(title, at, drops, "share of requests lost (up) by threshold on the greatest softmax (across)", mark=FIXED)
    )
    taken = Measurement.taken(
        "fixed_threshold",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "numpy"],
        settings={"threshold": FIXED, "drop": DROP},
    )
    print(taken.save(Path(__file__).parent / "results"))


def measured(replay: Replay, at: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], dict[str, float | int]]:
    """The losses at each threshold, and what 0.8 comes to."""
    found = [row.evidence().get("max_softmax") for row in replay]
    sure = np.array([np.nan if value is None else value for value in found])
    assert not np.isnan(sure).any(), f"{replay.name} is no replay of a classifier"
    bad = ~replay.edge_right & replay.cloud_right
    kept = sure[None, :] > at[:, None]
    losses = (kept & bad).mean(axis=1)
    stays = sure > FIXED
    return losses, {
        "rows": len(replay),
        "edge_accuracy": float(replay.edge_right.mean()),
        "cloud_accuracy": float(replay.cloud_right.mean()),
        "kept": float(stays.mean()),
        "right_of_kept": float(replay.edge_right[stays].mean()) if stays.any() else 0.0,
        "mean_confidence_of_kept": float(sure[stays].mean()) if stays.any() else 0.0,
        "drop": float((stays & bad).mean()),
        "accuracy": float(np.where(stays, replay.edge_right, replay.cloud_right).mean()),
        "threshold_for_drop": float(at[np.flatnonzero(losses <= DROP)[0]]),
    }


if __name__ == "__main__":
    main()
