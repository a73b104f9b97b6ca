"""The report of `bench engines` as one SVG: speeds as bars with their intervals, the KL beside each name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

from edgewise.bench.measure import figure
from edgewise.bench.peers.base import OUR_NAMES

PANELS = {"prefill_tok_s": "prefill, tok/s", "decode_tok_s": "decode, tok/s"}
NAMES, BAR, GAP = 250, 270, 90  # widths: of the names, of the longest bar, of the numbers behind it
LINE, HEAD, MARGIN = 24, 54, 16  # heights of a bar and of a cell's heading
STYLE = """
svg { font: 13px system-ui, sans-serif; fill: #1f2328; background: #ffffff; }
.quiet { fill: #636c76; } .title { font-weight: 600; }
.ours { fill: #0969da; } .peer { fill: #8c959f; } .out { fill: #d0d7de; }
.span { stroke: #1f2328; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
svg { fill: #e6edf3; background: #0d1117; }
.quiet { fill: #8d96a0; }
.ours { fill: #4493f8; } .peer { fill: #7d8590; } .out { fill: #3d444d; }
.span { stroke: #e6edf3; }
}
"""

Engines = Mapping[str, Mapping[str, Any]]


def chart(report: Mapping[str, Any]) -> str:
    """An SVG document. Engines without a finished round are not drawn."""
    parts, y = [], MARGIN
    for cell in report["cells"]:
        engines = {name: row for name, row in cell["engines"].items() if row["decode_tok_s"]}
        title = f"{report['model']}, {cell['prompt_tokens']} prompt tokens, {cell['streams']} at once"
        parts += [_text(MARGIN, y + 14, title, "title"), *_cell(engines, y + HEAD)]
        y += HEAD + LINE * len(engines) + MARGIN
    width = MARGIN + NAMES + len(PANELS) * (BAR + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _cell(engines: Engines, top: int) -> Iterator[str]:
    for n, (name, row) in enumerate(engines.items()):
        kl = "KL unknown" if row["kl"] is None else f"KL {row['kl']:.2g}"
        yield _text(MARGIN, top + n * LINE + 13, name)
        yield _text(MARGIN + NAMES - 12, top + n * LINE + 13, kl, "quiet", anchor="end")
    for n, (key, title) in enumerate(PANELS.items()):
        left = MARGIN + NAMES + n * (BAR + GAP)
        yield _text(left, top - 10, title, "quiet")
        yield from _bars(engines, key, left, top)


def _bars(engines: Engines, key: str, left: int, top: int) -> Iterator[str]:
    figures = {name: figure(row[key], "tok/s") for name, row in engines.items()}
    scale = BAR / max((found["high"] for found in figures.values()), default=1.0)
    for n, (name, found) in enumerate(figures.items()):
        y, middle = top + n * LINE, top + n * LINE + 9
        kind = "ours" if name in OUR_NAMES else "out" if engines[name]["left_out"] else "peer"
        low, high = left + found["low"] * scale, left + found["high"] * scale
        yield f'<rect class="{kind}" x="{left}" y="{y}" width="{found["median"] * scale:.1f}" height="18" rx="2"/>'
        yield f'<line class="span" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>'
        yield _text(high + 8, y + 13, f"{found['median']:.0f}")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
