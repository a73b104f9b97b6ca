"""The error that is stated: its figures, that a device left out is not seen, and its chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from edgewise.devices.catalogue import shipped as catalogue
from edgewise.plan.evaluate import GROUPS, TARGETS, Judged, evaluate, figures, report
from edgewise.plan.fit import Estimate, Target
from edgewise.plan.plot import plot
from edgewise.plan.rows import Row, by
from edgewise.plan.speeds import shipped

MACHINES = by(catalogue())
ROWS = [
    Row(device, unit, model, "llama.cpp", "Q4_K_M", basis=basis, decode_tok_s=decode, prefill_tok_s=20 * decode)
    for device, unit, speeds in (
        ("Apple M4", "GPU", (70.0, 20.0)),  # the shipped speeds have seen it
        ("RTX 3090", "GPU", (400.0, 130.0)),  # likewise
        ("Raspberry Pi 4", "CPU", (6.0, 1.5)),
        ("A phone that nobody knows", "CPU", (25.0, 7.0)),
        ("GeForce 9999", "GPU", (500.0, 150.0)),
    )
    for model, decode, basis in (("Llama-3.2-1B", speeds[0], "estimated"), ("Llama-3.1-8B", speeds[1], "published"))
]


def judged(errors: Sequence[float]) -> list[Judged]:
    row = replace(ROWS[0], basis="published")
    return [Judged(row, Estimate(10 * (1 + error), 9.0, 11.0), 10.0) for error in errors]


def test_figures_are_what_they_are_called() -> None:
    found = figures(judged([0.0, 0.05, -0.1, 0.3]))
    assert found["n"] == 4
    assert found["median_ape"] == pytest.approx(0.075)
    assert found["mean_ape"] == pytest.approx(0.1125)
    assert found["p90_ape"] == pytest.approx(0.24)
    assert found["coverage80"] == 1.0
    outside = [
        Judged(one.row, Estimate(1.0, low, high), 10.0)
        for low, high in ((1, 9), (11, 20), (1, 10))
        for one in judged([0])
    ]
    assert figures(outside)["coverage80"] == pytest.approx(1 / 3)
    assert figures([]) == {"n": 0, "median_ape": None, "mean_ape": None, "p90_ape": None, "coverage80": None}


@pytest.mark.parametrize("leave_one_device_out", [True, False])
def test_a_report_has_every_figure_of_every_group(leave_one_device_out: bool) -> None:
    found = report(evaluate(ROWS, MACHINES, shipped(), leave_one_device_out=leave_one_device_out))
    for target in ("decode", "prefill"):
        groups = found[target]  # type: ignore[index]
        assert tuple(groups) == GROUPS == ("all", "published", "estimated")
        assert [groups[name]["n"] for name in GROUPS] == [10, 5, 5]
        for of in groups.values():
            assert set(of) == {"n", "median_ape", "mean_ape", "p90_ape", "coverage80"}
            assert all(value is not None and math.isfinite(value) for value in of.values())


@cache
def left_out(tenfold: str) -> dict[Target, list[Judged]]:
    """With the rows of that device ten times as fast."""
    rows = [
        replace(row, decode_tok_s=10 * (row.decode_tok_s or 0), prefill_tok_s=10 * (row.prefill_tok_s or 0))
        if row.device == tenfold
        else row
        for row in ROWS
    ]
    return evaluate(rows, MACHINES, shipped(), leave_one_device_out=True)


@pytest.mark.parametrize("device", ["Apple M4", "A phone that nobody knows"])
@pytest.mark.parametrize("target", TARGETS)
def test_leaving_a_device_out_does_not_see_it(device: str, target: Target) -> None:
    """Neither one that the shipped speeds have seen, nor another; the others see it."""

    def predicted(tenfold: str, of_device: bool) -> list[float]:
        found = left_out(tenfold)[target]
        return [x for one in found if (one.row.device == device) is of_device for x in one.predicted]

    assert predicted(device, True) == pytest.approx(predicted("", True), rel=1e-9)
    assert predicted(device, False) != predicted("", False)


def test_every_row_is_judged_in_its_order() -> None:
    for leave_one_device_out in (True, False):
        mixed = [*ROWS, replace(ROWS[0], decode_tok_s=None), replace(ROWS[1], note="these do not fit")]
        found = evaluate(mixed, MACHINES, shipped(), leave_one_device_out=leave_one_device_out)
        assert [one.row for one in found["decode"]] == [row for row in mixed if row.decode_tok_s is not None]
        assert [one.measured for one in found["prefill"]] == [row.prefill_tok_s for row in mixed]
        assert evaluate([], MACHINES, shipped(), leave_one_device_out=leave_one_device_out) == {
            "decode": [],
            "prefill": [],
        }


def test_one_device_alone_can_be_left_out() -> None:
    for row in (ROWS[0], ROWS[4]):
        (one,) = evaluate([row], MACHINES, shipped(), leave_one_device_out=True)["decode"]
        assert 0 < one.predicted.low < one.predicted.value < one.predicted.high


def test_a_chart_is_xml_with_a_circle_for_each_row() -> None:
    rows = [*ROWS, replace(ROWS[0], device='<"M4"> & Söhne', basis="", decode_tok_s=1e-5, prefill_tok_s=None)]
    found = evaluate(rows, MACHINES, shipped(), leave_one_device_out=False)
    drawing = ElementTree.fromstring(plot(found, "<rows> & 'more'"))
    circles = drawing.findall(".//{*}circle")
    assert len(circles) == len(found["decode"]) + len(found["prefill"]) == 21
    assert [circle.get("class") for circle in circles].count("unsaid") == 1
    assert any('<"M4"> & Söhne' in (circle.findtext("{*}title") or "") for circle in circles)
    width, height = (float(drawing.get(name) or 0) for name in ("width", "height"))
    for circle in circles:
        assert 0 <= float(circle.get("cx") or -1) <= width
        assert 0 <= float(circle.get("cy") or -1) <= height


def test_a_chart_of_one_row_and_of_none_is_a_chart() -> None:
    one = evaluate(ROWS[:1], MACHINES, shipped(), leave_one_device_out=False)
    for given, circles in ((one, 2), ({"decode": one["decode"]}, 1), ({"decode": []}, 0)):
        assert len(ElementTree.fromstring(plot(given, "x")).findall(".//{*}circle")) == circles  # type: ignore[arg-type]
