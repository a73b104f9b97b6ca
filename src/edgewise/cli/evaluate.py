"""`edgewise evaluate`: a model beside the one that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Config, Debug, Json, flags
from edgewise.cli.output import columns, megabytes, progress, result
from edgewise.errors import UsageError
from edgewise.settings import load

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[np.generic]]

TOKENS = 16384
ANSWER = 48
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
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="of the text, at most")] = TOKENS,
    window: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="tokens of a window; unset: 256, fewer for a short text")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL with a `prompt` a line, or plain lines, to answer; unset: some 16"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="longest answer, in tokens")] = ANSWER,
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
    languages = {"--text": text, "--window": window, "--prompts": prompts, "--tasks": tasks, "--plain": plain or None}
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
    tokens: int,
    window: int | None,
    prompts: Path | None,
    max_tokens: int,
    tasks: Path | None,
    plain: bool,
) -> dict[str, Any]:
    from edgewise.compress.judge.bundles import PROMPTS, TEXT, judged, windows
    from edgewise.compress.judge.kept import kept_ids
    from edgewise.compress.judge.tasks import accuracy, read
    from edgewise.models.store import find
    from edgewise.models.tokenizer import Tokenizer

    student, teacher = find(model, home, check=False), find(against, home, check=False)
    questions = None if tasks is None else read(tasks)
    tokenizer = Tokenizer.open(student.path)
    ids = windows(tokenizer, _read(text or TEXT), tokens=tokens, length=window)
    kept = kept_ids(tokenizer, Tokenizer.open(teacher.path))
    asked = _prompts(prompts or PROMPTS)
    with progress() as show:
        found = judged(student, teacher, ids, kept=kept, prompts=asked, plain=plain, max_tokens=max_tokens, show=show)
        solved = (
            None
            if questions is None
            else accuracy(student, teacher, questions, plain=plain, max_tokens=max_tokens, show=show)
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
    from edgewise.compress.judge.nets import judged_nets, size

    if inputs is None:
        raise UsageError("two networks are held against each other on inputs", hint="name them: --inputs FILE.npz")
    arrays = dict(_arrays(inputs))
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error


def _prompts(path: Path) -> list[str]:
    import msgspec

    lines = [line for line in _read(path).splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [str(msgspec.json.decode(line)["prompt"]) for line in lines]
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: a line is no JSON object with a `prompt`: {error!r}") from error
    return lines


def _arrays(path: Path) -> Arrays:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="an .npz file of arrays by name is needed") from error


FIGURES = (
    ("kl_mean", "KL to the teacher, mean, nats", "{:.4f}"),
    ("kl_p99", "KL to the teacher, 99th percentile", "{:.3f}"),
    ("top1_agreement", "same most probable token", "{:.1%}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("perplexity_source", "the teacher's", "{:.2f}"),
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
    if facts.get("bits_per_byte") is not None:
        lines.append(f"bits per byte of text: {facts['bits_per_byte']:.3f}, the teacher's {_bits(facts)}")
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


def _bits(facts: dict[str, Any]) -> str:
    value = facts["bits_per_byte_source"]
    return "-" if value is None else f"{value:.3f}"
