"""int8 as ONNX files with some products left floating. The file's metadata says which, so that whoever reads it can
tell a choice from a quantizer that skipped them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from edgewise.export.sources.onnx_file import save
from edgewise.export.targets.mixed import MAY_LOSE, fewest
from edgewise.export.targets.onnx import graph as graphs
from edgewise.export.work.job import Array, Job

ROWS: Final = 8  # of the calibration's, spread over all
KEY: Final = "edgewise.floating"  # in the metadata: a list of names
BY_CHOICE: Final = "stays floating in int8, as rounding it costs most of what the outputs would lose"

Pair = Callable[[Sequence[str]], onnx.ModelProto]


def mixed(
    model: onnx.ModelProto, products: Sequence[str], pair: Pair, rows: Mapping[str, Array], job: Job, work: Path
) -> tuple[onnx.ModelProto, list[str]]:
    """`pair(floating)` rounds all of `products` but those; the model with the fewest of them floating whose outputs
    stay near the float32 ones, and a note on it."""
    some = _spread(rows)
    plain = _outputs(model, some, job, work)

    def off(made: onnx.ModelProto) -> float:
        """Relative L2 of the output that is furthest off; all of it for one without numbers."""
        found = graphs.difference(_outputs(made, some, job, work), plain).relative
        return found if np.isfinite(found) else 1.0

    whole, most = pair(()), MAY_LOSE[job.source.task]
    before = off(whole)
    floating = fewest(products, lambda kept: off(pair(kept)), most) if before > most else []
    if not floating:
        return whole, []
    found = pair(floating)
    found.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value=json.dumps(floating)))
    return found, [
        f"{len(floating)} of {len(products)} products stay floating, as rounding those costs most: relative L2 of the "
        f"outputs on {len(next(iter(some.values())))} calibration rows {off(found):.3f}, {before:.3f} without"
    ]


def floating_by_choice(model: onnx.ModelProto) -> frozenset[str]:
    """The names that the file says were left so; none for a file that says nothing, or nonsense."""
    said = next((one.value for one in model.metadata_props if one.key == KEY), "[]")
    try:
        names = json.loads(said)
    except ValueError:
        return frozenset()
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def _spread(rows: Mapping[str, Array]) -> dict[str, Array]:
    count = len(next(iter(rows.values())))
    places = np.unique(np.linspace(0, count - 1, min(ROWS, count)).round().astype(int))
    return {name: value[places] for name, value in rows.items()}


def _outputs(model: onnx.ModelProto, rows: Mapping[str, Array], job: Job, work: Path) -> list[Array]:
    save(model, work / "mixed.onnx")
    return graphs.answers(graphs.opened(work / "mixed.onnx", job.threads), rows, 1)
