"""Lines as SVG: what is drawn where."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

from edgewise.evaluate.chart import HEIGHT, LEFT, TOP, WIDTH, Axis, Band, Line, chart

AXIS = Axis(10.0, [(0.0, "0"), (10.0, "10 k")])
LINE = Line(np.array([0.0, 5.0, 10.0]), np.array([1.0, 3.0, 2.0]))


def places(svg: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'<{kind} [^>]*points="([^"]*)"', svg)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_line_spans_the_axis_and_higher_is_further_up() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(chart("title", {"one": LINE}, AXIS, "caption"), "polyline")
    assert (x0, x1, x2) == (LEFT, LEFT + WIDTH / 2, LEFT + WIDTH)
    assert TOP < y1 < y2 < y0 < TOP + HEIGHT


def test_it_is_xml_whatever_things_are_called() -> None:
    svg = chart("a < b & c", {"<one>": LINE}, Axis(10.0, [(5.0, "<5>")]), "x & y")
    words = {text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"a < b & c", "<one>", "<5>", "x & y"} < words


def test_a_band_goes_there_and_back() -> None:
    shaded = Band(LINE.across, LINE.up - 0.5, LINE.up + 0.5)
    svg = chart("title", {"one": LINE}, AXIS, "caption", shaded=shaded, mark=2.5)
    around = places(svg, "polygon")
    assert [x for x, _ in around] == [LEFT, LEFT + WIDTH / 2, LEFT + WIDTH, LEFT + WIDTH, LEFT + WIDTH / 2, LEFT]
    assert f'd="M{LEFT + WIDTH / 4:.1f} {TOP}v{HEIGHT}"' in svg


def test_a_flat_line_is_drawn_too() -> None:
    flat = Line(LINE.across, np.zeros(3))
    assert len({y for _, y in places(chart("title", {"one": flat}, AXIS, "caption"), "polyline")}) == 1
