"""`edgewise evaluate`: a model beside the one that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgewise.cli.options import Config, Debug, Json, flags
from edgewise.cli.output import columns, megabytes, progress, result
from edgewise.errors import UsageError
from edgewise.settings import load

TOKENS = 16384
NETWORK = ".onnx"
LABELS = "labels"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a bundle's name or directory, or an .onnx file", show_default=False)
    ],
    against: Annotated[
        str, typer.Option(metavar="TEACHER", help="the same of the model that it is held against", show_default=False)
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what both foretell; unset: some prose of 2,000 tokens")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=2, help=f"of the text, at most; unset: {TOKENS:,}")
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="tokens of a window; unset: 256, fewer for a short text")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL with a `prompt` a line, or plain lines, to answer; unset: some 16"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="longest answer, in tokens; unset: 48")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL of questions with `gold`, and with `choices` or without")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="prompts go in as they are, without the models' chat templates")
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="of .onnx files, .npz: an array by each input's name, one sample a row"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="the array of that file with the right classes  [default: labels]"),
    ] = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """How far a model is from its teacher: KL, top-1 agreement, perplexity, how long greedy answers agree, accuracy.

    Both run on our own engine, on the same tokens. Intervals are of 95 %. Downloads nothing."""
    languages = {
        "--text": text,
        "--tokens": tokens,
        "--window": window,
        "--prompts": prompts,
        "--max-tokens": max_tokens,
        "--tasks": tasks,
        "--plain": plain or None,
    }
    networks = {"--inputs": inputs, "--labels": labels}
    is_network = model.lower().endswith(NETWORK)
    wrong = [flag for flag, value in (languages if is_network else networks).items() if value is not None]
    if wrong or is_network != against.lower().endswith(NETWORK):
        what = "an .onnx file" if is_network else "a bundle"
        raise UsageError(
            f"{model} is {what}, and {wrong[0] if wrong else against} is not for one",
            hint="two bundles have texts and prompts, two .onnx files have --inputs and --labels",
        )
    if is_network:
        _networks(Path(model), Path(against), inputs, labels, json)
        return
    home = load(flags(), config=config).settings.home
    facts = _bundles(model, against, home, text, tokens, window, prompts, max_tokens, tasks, plain)
    result(facts, _text(facts), as_json=json)


def _bundles(
    model: str,
    against: str,
    home: Path,
    text: Path | None,
    tokens: int | None,
    window: int | None,
    prompts: Path | None,
    max_tokens: int | None,
    tasks: Path | None,
    plain: bool,
) -> dict[str, Any]:
    from edgewise.compress.judge import texts
    from edgewise.compress.judge.bundles import ANSWER, PROMPTS, TEXT, judged, windows
    from edgewise.compress.judge.kept import kept_ids
    from edgewise.compress.judge.tasks import accuracy, read
    from edgewise.models.store import find
    from edgewise.models.tokenizer import Tokenizer

    student, teacher = find(model, home, check=False), find(against, home, check=False)
    questions = None if tasks is None else read(tasks)
    tokenizer = Tokenizer.open(student.path)
    ids = windows(tokenizer, texts.text(text or TEXT), tokens=tokens or TOKENS, length=window)
    kept = kept_ids(tokenizer, Tokenizer.open(teacher.path))
    asked, longest = texts.prompts(prompts or PROMPTS), max_tokens or ANSWER
    with progress() as show:
        found = judged(student, teacher, ids, kept=kept, prompts=asked, plain=plain, max_tokens=longest, show=show)
        solved = (
            None
            if questions is None
            else accuracy(student, teacher, questions, plain=plain, max_tokens=longest, show=show)
        )
    return {
        "model": student.name,
        "against": teacher.name,
        "bytes": student.bytes,
        "bytes_source": teacher.bytes,
        **found.facts(),
        "tasks": None if solved is None else solved.facts(),
        "text": (text or TEXT).name,
        "window": int(ids.shape[1]),
        "prompts": len(asked),
    }


def _networks(model: Path, against: Path, inputs: Path | None, labels: str | None, as_json: bool) -> None:
    from edgewise.compress.judge.nets import judged_nets, read_inputs, size

    if inputs is None:
        raise UsageError("two networks are held against each other on inputs", hint="name them: --inputs FILE.npz")
    arrays = read_inputs(inputs)
    if labels is not None and labels not in arrays:
        raise UsageError(f"{inputs} has no array {labels!r}", hint=f"it has {', '.join(arrays)}")
    right = arrays.pop(labels or LABELS, None)
    with progress() as show:
        found = judged_nets(model, against, arrays, right, show=show)
    facts = {
        "model": model.name,
        "against": against.name,
        "bytes": size(model),
        "bytes_source": size(against),
        **found.facts(),
        "perplexity": None,
        "perplexity_source": None,
        "inputs": inputs.name,
    }
    result(facts, _text(facts), as_json=as_json)


FIGURES = (
    ("kl_mean", "KL to the teacher, mean, nats", "{:.4f}"),
    ("kl_p99", "KL to the teacher, 99th percentile", "{:.3f}"),
    ("top1_agreement", "same most probable token", "{:.1%}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("perplexity_source", "the teacher's", "{:.2f}"),
    ("bits_per_byte", "bits per byte of text", "{:.3f}"),
    ("bits_per_byte_source", "the teacher's", "{:.3f}"),
    ("agreement_length", "tokens until greedy answers part", "{:.1f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("accuracy_source", "the teacher's", "{:.1%}"),
    ("gain", "more than the teacher", "{:+.1%}"),
)


def _text(facts: dict[str, Any]) -> str:
    over = f"{facts['rows']} rows" if "rows" in facts else f"{facts['tokens']} tokens in {facts['windows']} windows"
    rows = [("", "value", "95 % interval"), *_rows(facts)]
    if facts.get("tasks"):
        rows += _rows(facts["tasks"])
        over += f", {facts['tasks']['n']} tasks"
    lines = [
        f"{facts['model']} ({megabytes(facts['bytes'])}) against {facts['against']} "
        f"({megabytes(facts['bytes_source'])}), over {over}",
        columns(rows),
    ]
    if facts.get("outside"):
        lines.append(
            f"the teacher gives {facts['outside']:.1%} to tokens that the student has not; KL and agreement are of the "
            "rest"
        )
    return "\n".join(lines)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for name, title, form in FIGURES:
        if facts.get(name) is not None:
            low, high = facts["intervals"][name]
            found.append((title, form.format(facts[name]), f"{form.format(low)} to {form.format(high)}"))
    return found
