"""What a distillation leaves for people: its curves and the student's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from edgewise.compress.distil.config import Config
from edgewise.evaluate.chart import Axis, Floats, Line, chart

Log = Sequence[Mapping[str, Any]]

SMOOTHED: Final = 0.02  # share of the steps over which the jagged loss of steps is averaged
LOSS, AGREEMENT = "loss.svg", "agreement.svg"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card tells, beside the config and the log: where text and teacher came from, and how large it all is."""

    teacher: str
    licence: str | None  # of what the student's weights began with
    teachers_licence: str | None
    parameters: int
    vocabulary: int
    documents: int
    rows: int
    held_out_rows: int
    sources: Mapping[str, int]
    command: str


def held_out(log: Log) -> list[Mapping[str, Any]]:
    """The looks at held-out rows, from before the first step to behind the last."""
    return [line for line in log if "held_out" in line]


def loss_plot(name: str, log: Log) -> str | None:
    """The loss of steps and of held-out rows over tokens, as SVG; None if there was no step."""
    steps = [line for line in log if "loss" in line]
    if not steps:
        return None
    lines = {"training, averaged": _smooth(_line(steps, "loss"))}
    if looks := held_out(log):
        lines["held out"] = _line([{**line, **line["held_out"]} for line in looks], "loss")
    return chart(f"{name}: loss", lines, _tokens(steps), "loss (up) by tokens seen (across)")


def agreement_plot(name: str, log: Log) -> str | None:
    """How often the student's first choice is the teacher's, on held-out rows, as SVG; None if nobody looked."""
    looks = [{**line, **line["held_out"]} for line in held_out(log)]
    if len(looks) < 2 or "top1_agreement" not in looks[0]:
        return None
    lines = {"top-1 agreement": _line(looks, "top1_agreement")}
    caption = "share of held-out tokens (up) by tokens seen (across)"
    return chart(f"{name}: agreement with its teacher", lines, _tokens(looks), caption)


def card(config: Config, facts: Facts, log: Log, plots: Sequence[str]) -> str:
    """README.md of the student, with the front matter that `edgewise pull` and the Hub read."""
    front = ["---", *([] if facts.licence is None else [f"license: {facts.licence}"]), f"base_model: {facts.teacher}"]
    steps = [line for line in log if "loss" in line]
    seconds = steps[-1]["elapsed_s"] if steps else 0.0
    tokens = steps[-1]["tokens"] if steps else 0
    epochs = tokens / (facts.rows * config.data.length)
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {config.name}",
            "",
            f"A student of {facts.teacher}: {facts.parameters:,} parameters, {facts.vocabulary:,} tokens. "
            f"Its loss was {_formula(config)}.",
            "",
            _licence(config.student.start, facts),
            "",
            "## Data",
            "",
            f"{facts.documents:,} documents in {facts.rows:,} rows of {config.data.length} tokens, and "
            f"{facts.held_out_rows:,} rows of other documents held out. They are out of what was read: "
            + ", ".join(f"{name} {count:,}" for name, count in facts.sources.items())
            + ".",
            "",
            "## Training",
            "",
            f"{tokens:,} tokens seen ({epochs:.2f} epochs) in {len(steps):,} steps and {seconds / 3600:.2f} hours, by "
            f"`{facts.command}`. Every step is in `training.jsonl`.",
            "",
            *_figures(log),
            *(f"![{plot.removesuffix('.svg')}]({plot})\n" for plot in plots),
            "## Config",
            "",
            "```json",
            msgspec.json.format(msgspec.json.encode(_without_places(config)), indent=1).decode(),
            "```",
            "",
        ]
    )


def _formula(config: Config) -> str:
    loss = config.loss
    if loss.alpha == 0:
        return "cross-entropy with the text alone"
    soft = f"{loss.alpha:g} · {loss.temperature:g}² · KL to the teacher's {loss.top_k} most probable tokens at T = "
    return f"{soft}{loss.temperature:g}, and {1 - loss.alpha:g} · cross-entropy with the text"


def _licence(start: str, facts: Facts) -> str:
    theirs = facts.teachers_licence or "a licence that its source does not name"
    if start == "scratch":
        return f"Its weights began at random. What taught it comes under {theirs}."
    if start != "teacher":
        own = facts.licence or "a licence that their source does not name"
        return f"It began with other weights than its teacher's, under {own}; its teacher comes under {theirs}."
    if facts.licence is None:
        return "The teacher's source names no licence; whether you may use it is for you to find out."
    return f"It is made of the teacher's weights and comes under the teacher's licence, {facts.licence}."


def _figures(log: Log) -> list[str]:
    """What was reached on held-out rows, with torch; a bundle's own figures are those of `edgewise evaluate`."""
    looks = held_out(log)
    if not looks:
        return []
    names = {
        "loss": "loss",
        "ce": "cross-entropy, nats a token",
        "kl": "KL to the teacher, nats",
        "top1_agreement": "top-1 agreement",
    }
    first, last = looks[0]["held_out"], looks[-1]["held_out"]
    rows = [f"| {words} | {first[key]:.4f} | {last[key]:.4f} |" for key, words in names.items() if key in last]
    return ["| held-out rows, float32 | before | after |", "|---|---|---|", *rows, ""]


def _without_places(config: Config) -> dict[str, Any]:
    """The config without where things lay on the disk of whoever ran it."""

    def name(path: str) -> str:
        return path.replace("\\", "/").rstrip("/").rpartition("/")[2]

    plain: dict[str, Any] = msgspec.to_builtins(config)
    data, student = plain["data"], plain["student"]
    plain |= {"teacher": name(plain["teacher"]), "output": name(plain["output"])}
    data |= {key: [name(path) for path in data[key]] for key in ("text", "jsonl")}
    if data["generate"] is not None:
        data["generate"]["prompts"] = name(data["generate"]["prompts"])
    student["start"] = name(student["start"])
    return plain


def _line(rows: Log, key: str) -> Line:
    return Line(*(np.array([row[name] for row in rows], np.float64) for name in ("tokens", key)))


def _smooth(line: Line) -> Line:
    """Each point is the mean of those around it."""
    half = int(len(line.up) * SMOOTHED / 2)
    sums = np.concatenate([[0.0], np.cumsum(line.up)])
    at = np.arange(len(line.up))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(line.up))
    up: Floats = (sums[high] - sums[low]) / (high - low)
    return Line(line.across, up)


def _tokens(rows: Log) -> Axis:
    end = max(float(rows[-1]["tokens"]), 1.0)
    return Axis(end, [(end * fifth / 5, _short(end * fifth / 5)) for fifth in range(6)])


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"
