"""The guide's table: every figure with what physics allows, what is predicted, and the verdict."""

from __future__ import annotations

import json

import pytest

from edgewise.devices.catalogue import shipped as catalogue
from edgewise.plan.mission import table
from edgewise.plan.speeds import shipped

ROWS = table(catalogue(), shipped())


def test_every_figure_of_the_guide_has_its_row() -> None:
    claims = [c for c in catalogue().claims if c.group == "benchmarks" and c.device is not None]
    assert len(ROWS) == len(claims) > 0
    for row, claim in zip(ROWS, claims, strict=True):
        assert (row["claimed"], row["verdict"], row["why"]) == (claim.value, claim.verdict, claim.why)
        assert row["measured"] == claim.measured
    assert json.loads(json.dumps(ROWS)) == ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']} {row['device']} {row['figure']}")
def test_a_row_is_whole(row: dict[str, object]) -> None:
    assert isinstance(row["claimed"], int | float)
    assert row["measured"] is None or isinstance(row["measured"], int | float)
    assert row["verdict"] in ("right", "wrong", "unsourced")
    assert row["figure"] in ("latency", "throughput")
    assert row["why"]
    predicted, ceiling = row["predicted"], row["ceiling"]
    assert isinstance(predicted, dict)
    assert isinstance(ceiling, dict)
    assert set(predicted) == {"value", "low", "high"}
    assert 0 < predicted["low"] < predicted["value"] < predicted["high"]
    assert set(ceiling) == ({"int4"} if row["figure"] == "latency" else {"int4", "fp16"})
    assert all(value > 0 for value in ceiling.values())
    slower = predicted["value"] > ceiling["int4"]  # than physics allows: a longer time, or fewer tokens
    assert slower is (row["figure"] == "latency")
