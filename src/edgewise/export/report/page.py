"""`report.json` for people: one HTML file that needs nothing else, in light and in dark.

Every word out of the facts is escaped, as names come from files that a stranger may have made. A fact that is missing
is shown as a dash; the page never fails over one, since a report of a failure matters most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from edgewise.export.report.bars import Bar, bars

Facts = Mapping[str, Any]
Value = Callable[[Facts], object]
Words = Callable[[object], str]

NONE: Final = "–"
LEVELS: Final = {
    "executed": "The artifact itself was run on this host, by the runtime that devices use. Its figures are its own; "
    "its speed is this host's.",
    "emulated": "The artifact was run by the vendor's emulator of the processor it is for. Its numbers are what the "
    "device computes; its speed says nothing.",
    "built": "The vendor's compiler accepted it and wrote the engine, which nothing here could run. Figures beside it "
    "are those of the graph it was built of, run in another runtime.",
    "spec-checked": "It was read back from the disk: its operators, its types and its weights, these against the "
    "source's. Its own runtime has not run it. Outputs, where there are some, are of our interpreter of its operators.",
    "unverified": "It was written, and nothing of it was checked; or it could not be made.",
}
VERDICTS: Final = {"ok": "✓ passed", "refused": "✗ refused", "failed": "! failed"}
STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --quiet: #59636e; --line: #d1d9e0;
  --shade: #f6f8fa; --bar: #0969da; --bad: #cf222e; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #9198a1; --line: #3d444d;
  --shade: #151b23; --bar: #4493f8; --bad: #f85149; --good: #3fb950; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1100px; padding: 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } .quiet, caption { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; } caption { text-align: left; padding-bottom: .4rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; text-align: left; }
th, td { vertical-align: top; overflow-wrap: break-word; }
thead th { border-bottom-width: 2px; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.ok { color: var(--good); } .refused, .failed, .no { color: var(--bad); }
.verdict { font-weight: 600; white-space: nowrap; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; } code { font: .85em ui-monospace, monospace; }
.box { background: var(--shade); border-left: 4px solid var(--bad); padding: .5rem .9rem; margin: .6rem 0; }
.plot { width: 100%; max-width: 740px; height: auto; font: 13px system-ui, sans-serif; }
.plot text { fill: var(--ink); }
.plot .quiet { fill: var(--quiet); } .bar { fill: var(--bar); } .bar.bad { fill: var(--bad); }
.axis { stroke: var(--line); } .interval { stroke: var(--ink); fill: none; stroke-width: 1.5; }
.mark { stroke: var(--ink); stroke-dasharray: 4 3; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole HTML document of a report's facts."""
    model, targets = _of(report, "model"), _targets(report)
    name = _word(model.get("name", "a model"))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{name}: export report</title><style>{STYLE}</style></head>",
            f"<body><header><h1>{name}: export report</h1>{_verdict(targets)}</header><main>",
            _summary(targets),
            _levels(targets),
            _troubles(targets),
            _plots(targets, _of(report, "gate")),
            _coverage(targets),
            _background(report),
            *(_details(key, facts) for key, facts in targets.items()),
            "</main></body></html>",
            "",
        ]
    )


def _word(value: object) -> str:
    """Safe in text and in attributes, whatever it holds: also half a character, or one that ends a line."""
    if value is None:
        return NONE
    text = str(value).encode("utf-8", "replace").decode()
    return escape("".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text))


def _of(facts: Facts, key: str) -> Facts:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def _some(facts: Facts, key: str) -> Sequence[Any]:
    found = facts.get(key)
    return found if isinstance(found, Sequence) and not isinstance(found, str) else ()


def _rows_of(facts: Facts, key: str) -> list[Facts]:
    return [one for one in _some(facts, key) if isinstance(one, Mapping)]


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _figure(value: object, digits: int = 3) -> str:
    number = _number(value)
    if number is None:
        return NONE if value is None else _word(value)
    return f"{number:.{digits}g}" if abs(number) < 1e4 else f"{number:,.0f}"


def _share(value: object, digits: int = 1) -> str:
    number = _number(value)
    return NONE if number is None else f"{100 * number:.{digits}f} %"


def _size(value: object) -> str:
    number = _number(value)
    if number is None:
        return NONE
    scale, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if abs(number) >= s), (1.0, "bytes"))
    return f"{number / scale:.{0 if scale == 1 else 2}f} {unit}"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML. The first one of a row names it."""
    body = [list(row) for row in rows]
    if not body:
        return ""
    kinds = ['class="number"' if at in numbers else "" for at in range(len(heads))]
    top = "".join(f'<th scope="col" {kind}>{head}</th>' for head, kind in zip(heads, kinds, strict=True))
    lines = [
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td {kind}>{cell}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in body
    ]
    head = f"<caption>{caption}</caption><thead><tr>{top}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _targets(report: Facts) -> dict[str, Facts]:
    return {str(key): facts for key, facts in _of(report, "targets").items() if isinstance(facts, Mapping)}


def _verdict(targets: Mapping[str, Facts]) -> str:
    counts = {status: sum(facts.get("status") == status for facts in targets.values()) for status in VERDICTS}
    words = ", ".join(f"{count} {status if status != 'ok' else 'passed'}" for status, count in counts.items() if count)
    return f"<p>{len(targets)} artifacts: {words or 'none'}.</p>"


def _status(facts: Facts) -> str:
    status = str(facts.get("status"))
    kind = status if status in VERDICTS else "no"
    return f'<span class="verdict {kind}">{VERDICTS.get(status, _word(status))}</span>'


def _summary(targets: Mapping[str, Facts]) -> str:
    heads = ["Target", "Verdict", "Precision", "Verified", "Size", "Drop, with 95 % interval", "Cosine", "Same top-1"]
    heads += ["KL, mean", "Accelerated", "Latency on this host, not the device"]
    rows = [
        [
            _word(key),
            _status(facts),
            _word(facts.get("precision")),
            _word(facts.get("level")),
            _size(facts.get("bytes")),
            _drop(_of(facts, "drop")),
            _figure(_figures(facts).get("cosine"), 6),
            _share(_figures(facts).get("top1_agreement")),
            _figure(_figures(facts).get("kl_mean")),
            _accelerated(_of(facts, "coverage")),
            _latency(_of(facts, "latency_ms")),
        ]
        for key, facts in targets.items()
    ]
    return "<h2>Artifacts</h2>" + _table("One row for each artifact.", heads, rows, (4, 6, 7, 8))


def _figures(facts: Facts) -> Facts:
    """Of the artifact's own run, or of our reading of it."""
    return _of(facts, "parity") or _of(facts, "interpreted")


def _drop(drop: Facts) -> str:
    if _number(drop.get("point")) is None:
        return NONE
    low, high = (_share(drop.get(end), 2) for end in ("low", "high"))
    rows = f" of {_figure(drop.get('n'))} rows" if drop.get("n") is not None else ""
    return (
        f"{_share(drop.get('point'), 2)} ({low} to {high}) <span class=quiet>{_word(drop.get('metric'))}{rows}</span>"
    )


def _accelerated(coverage: Facts) -> str:
    share = _covered(coverage)
    if share is None:
        return NONE
    counts = f"{_figure(coverage.get('accelerated'))} of {_figure(coverage.get('nodes'))}"
    return f"{_share(share, 0)} <span class=quiet>{counts}, {_word(coverage.get('accelerator'))}</span>"


def _covered(coverage: Facts) -> float | None:
    nodes, accelerated = _number(coverage.get("nodes")), _number(coverage.get("accelerated"))
    return accelerated / nodes if nodes and accelerated is not None else None


def _latency(latency: Facts) -> str:
    if _number(latency.get("median")) is None:
        return NONE
    low, high = (_figure(latency.get(a, latency.get(b))) for a, b in (("low", "p10"), ("high", "p90")))
    return f"{_figure(latency['median'])} ms ({low} to {high}, n = {_figure(latency.get('n'))})"


def _levels(targets: Mapping[str, Facts]) -> str:
    present = {str(facts.get("level")) for facts in targets.values()}
    lines = [f"<dt><b>{level}</b></dt><dd>{words}</dd>" for level, words in LEVELS.items() if level in present]
    return f"<h2>What “verified” means here</h2><dl>{''.join(lines)}</dl>" if lines else ""


def _troubles(targets: Mapping[str, Facts]) -> str:
    boxes = [_trouble(key, facts) for key, facts in targets.items() if facts.get("status") != "ok"]
    return f"<h2>What went wrong</h2>{''.join(boxes)}" if boxes else ""


def _trouble(key: str, facts: Facts) -> str:
    error = _of(facts, "error")
    lines = []
    if error:
        lines.append(f"{_word(error.get('message'))} <span class=quiet>{_word(error.get('kind'))}</span>")
    if error.get("hint"):
        lines.append(f"What to do: {_word(error['hint'])}")
    lines += [f"<b>{_word(one.get('name'))}</b>: {_word(one.get('detail'))}" for one in _failed(facts)]
    lines += [f"Where: {where}"] if (where := _where(_of(facts, "where"))) else []
    return f'<div class="box"><h3>{_word(key)} {_status(facts)}</h3>{_list(lines)}</div>'


def _failed(facts: Facts) -> list[Facts]:
    return [one for one in _rows_of(facts, "checks") if one.get("ok") is False]


def _where(where: Facts) -> str:
    if not where:
        return ""
    if where.get("words"):
        return _word(where["words"])
    if where.get("unknown"):
        return _word(where["unknown"])
    around = [
        f"{_word(_layer(where.get(side)))} {words}"
        for side, words in (("before", "before"), ("after", "behind"))
        if where.get(side)
    ]
    told = f" (error {_figure(where.get('error'))})" if where.get("error") is not None else ""
    return f"{_word(where.get('layer'))}{told}{'; ' + ', '.join(around) if around else ''}"


def _layer(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('layer')} (error {_figure(value.get('error'))})"
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return f"{value[0]} (error {_figure(value[1])})"
    return str(value)


def _plots(targets: Mapping[str, Facts], gate: Facts) -> str:
    parts = [
        _plot("Size", "Bytes of the artifact.", targets, lambda one: one.get("bytes"), _size),
        _plot(
            "Latency on this host, not the device",
            "Median of single runs of one row.",
            targets,
            lambda one: _of(one, "latency_ms").get("median"),
            lambda value: f"{_figure(value)} ms",
        ),
        _plot(
            "Distance from the source",
            "Relative L2 distance of the first output.",
            targets,
            lambda one: _figures(one).get("rel_l2"),
            _figure,
        ),
        _plot(
            "KL divergence from the source",
            "Mean over the rows, in nats.",
            targets,
            lambda one: _figures(one).get("kl_mean"),
            _figure,
        ),
        _drops(targets, gate),
    ]
    there = [part for part in parts if part]
    return f"<h2>Side by side</h2>{''.join(there)}" if there else ""


def _plot(title: str, caption: str, targets: Mapping[str, Facts], value: Value, words: Words) -> str:
    rows = [
        Bar(_plain(key), number, words(number), bad=facts.get("status") != "ok")
        for key, facts in targets.items()
        if (number := _number(value(facts))) is not None
    ]
    return f"<h3>{title}</h3><p class=quiet>{caption}</p>{bars(title, rows)}" if rows else ""


def _plain(key: str) -> str:
    """Without what a page cannot hold; it is escaped where it is drawn."""
    text = key.encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _drops(targets: Mapping[str, Facts], gate: Facts) -> str:
    rows = []
    for key, facts in targets.items():
        drop = _of(facts, "drop")
        if (point := _number(drop.get("point"))) is not None:
            low, high = (_number(drop.get(end)) for end in ("low", "high"))
            words = f"{_share(point, 2)} ({_share(low, 2)} to {_share(high, 2)})"
            rows.append(Bar(_plain(key), point, words, low, high, bad=facts.get("status") != "ok"))
    if not rows:
        return ""
    budget = _number(gate.get("max_drop"))
    held = "the high end of the interval" if gate.get("strict") else "the point"
    caption = f"What a user would lose. {'No budget was given.' if budget is None else f'The budget is for {held}.'}"
    mark = None if budget is None else (budget, f"budget {_share(budget, 2)}")
    return f"<h3>Drop</h3><p class=quiet>{caption}</p>{bars('Drop', rows, mark=mark)}"


def _coverage(targets: Mapping[str, Facts]) -> str:
    rows = [row for key, facts in targets.items() for row in _covering(key, _of(facts, "coverage"))]
    heads = ["Target", "Operators", "Accelerated", "By", "Falls back", "Count", "Why", "What to do"]
    words = "What runs where the target is meant to run it, and what does not."
    table = _table(words, heads, rows, (1, 2, 5))
    return f"<h2>Coverage</h2>{table}" if table else ""


def _covering(key: str, coverage: Facts) -> Iterator[list[str]]:
    if not coverage:
        return
    nodes, by = _figure(coverage.get("nodes")), _word(coverage.get("accelerator"))
    mine = [_word(key), nodes, _share(_covered(coverage)), by]
    fallbacks = _rows_of(coverage, "fallback")
    if not fallbacks:
        yield [*mine, "nothing", "0", "", ""]
    for one in fallbacks:
        rest = [_word(one.get("op")), _figure(one.get("count")), _word(one.get("why"))]
        yield [*mine, *rest, _word(one["hint"]) if one.get("hint") else ""]


def _background(report: Facts) -> str:
    model, data, gate, host = (_of(report, key) for key in ("model", "data", "gate", "host"))
    budget = _share(gate.get("max_drop"), 2) if _number(gate.get("max_drop")) is not None else "none was given"
    held = ", against the pessimistic end of the interval" if gate.get("strict") else ""
    shared = data.get("shared") or data.get("calibration_shared")
    random = "; they are random, so no figure here says how good the model is" if data.get("random") else ""
    lines = [
        f"Model: {_word(model.get('source', model.get('name')))}, {_figure(model.get('parameters'))} parameters, "
        f"task: {_word(model.get('task'))}",
        f"Preprocessing: {_preprocessing(_of(model, 'preprocessing'))}",
        f"Rows: {_figure(data.get('rows'))}{', labelled' if data.get('labelled') else ''}{random}",
        f"Calibration rows: {_figure(data.get('calibration_rows'))}{', judged on as well' if shared else ''}",
        f"Budget for the drop: {budget}{held}",
        "Host: " + ", ".join(f"{_word(key)} {_plainly(value)}" for key, value in host.items()),
        *map(_word, _some(report, "notes")),
    ]
    return f"<h2>How this was made</h2>{_list(lines)}"


def _preprocessing(facts: Facts) -> str:
    return ", ".join(f"{_word(key)} {_plainly(value)}" for key, value in facts.items()) or "none"


def _plainly(value: object) -> str:
    return _word(" ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def _details(key: str, facts: Facts) -> str:
    figures = _figures(facts)
    read = "" if _of(facts, "parity") else " of our interpreter of its operators, not of its runtime"
    parts = [
        _list(_about(facts)),
        _table(
            "What was looked at.",
            ["Check", "Result", "Seen"],
            (
                [_word(one.get("name")), _yes(one.get("ok")), _word(one.get("detail"))]
                for one in _rows_of(facts, "checks")
            ),
        ),
        _table(
            f"Outputs against the source's{read}.",
            ["Figure", "Value"],
            ([_word(name), _figure(value, 6)] for name, value in figures.items() if name != "outputs"),
            (1,),
        ),
        _table(
            "Weight matrices and filters.",
            ["Number type", "Size"],
            ([_word(name), _size(count)] for name, count in _of(facts, "weights").items()),
            (1,),
        ),
        _table(
            "Versions.",
            ["Library", "Version"],
            ([_word(name), _word(version)] for name, version in _of(facts, "versions").items()),
        ),
        _files(facts),
        _list(map(_word, _some(facts, "notes"))),
    ]
    return f"<details><summary>{_word(key)}: {_status(facts)}</summary>{''.join(parts)}</details>"


def _about(facts: Facts) -> Iterator[str]:
    if facts.get("by"):
        yield f"Verified: {_word(facts.get('level'))}, by {_word(facts['by'])}"
    if facts.get("seconds") is not None:
        yield f"Took {_figure(facts['seconds'])} s"
    if skipped := _some(facts, "skipped"):
        yield f"<span class=no>Not in the precision that was asked for:</span> {', '.join(map(_word, skipped))}"


def _yes(value: object) -> str:
    return '<span class="ok">✓ yes</span>' if value is True else '<span class="no">✗ no</span>'


def _files(facts: Facts) -> str:
    hashes = dict(_of(facts, "files_sha256"))
    if not hashes and facts.get("path"):
        hashes = {str(facts["path"]): facts.get("sha256")}
    rows = [[f"<code>{_word(name)}</code>", f"<code>{_word(value)}</code>"] for name, value in hashes.items()]
    return _table(f"Files of <code>{_word(facts.get('path'))}</code>.", ["File", "sha256"], rows)
