"""A replay of two models that are both here: each answers the same prompts, and it is judged how well.

A prompt with a right answer is judged by it. Of any other, the cloud's model is the judge: the quality of an answer is
the mean log-probability that it gives to the answer's tokens, less that of its own greedy answer, and one that is at
most WITHIN below counts as right. docs/formats/replay.md says what stands in a row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from edgewise.engines.decode import DecodeOptions, Decoder
from edgewise.engines.load import loaded
from edgewise.engines.score import Scorer
from edgewise.engines.together import Answer, answers, prompt_ids
from edgewise.errors import UsageError
from edgewise.evaluate.answers import matches
from edgewise.joint.pair import Pair, identity
from edgewise.joint.record_file import Plan, Recorded, RecordFile
from edgewise.joint.replay import Outcome
from edgewise.joint.signals.answer import TOP_SIGNALS
from edgewise.joint.signals.evidence import Evidence
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.tokenizer import TOKENIZER, Tokenizer
from edgewise.types import Request

Show = Callable[[str, int, int], None]

WITHIN: Final = 0.5  # nats a token
PIECE: Final = 64  # prompts that are written at once
SLOTS: Final = 16  # answers at once
ALTERNATIVES: Final = 5  # to each token of the edge, which signals are read off
GOLD_WORDS: Final = 8  # a completion of more words is one right answer of many
DIGITS: Final = 6  # behind the point, of the numbers in a row
TOO_LONG: Final = "longer than a prompt may be"
_SEE: Final = "docs/formats/replay.md says what a file of prompts holds"


class Question(msgspec.Struct, frozen=True):
    """A line of a file of prompts. `gold` is the right answer, or several; a short `completion` is one too. Other keys
    are for people."""

    prompt: str
    id: str | int | None = None
    gold: str | list[str] | None = None
    completion: str | None = None
    group: str | None = None
    task: str | None = None

    @property
    def right(self) -> str | list[str] | None:
        """What a right answer says, if there is one such."""
        if self.gold is not None:
            return self.gold
        short = self.completion is not None and 0 < len(self.completion.split()) <= GOLD_WORDS
        return self.completion if short else None


@dataclass
class Recording:
    """What came of it: rows written now, those that were there before, prompts left out by why, and who judged all
    rows that are there now."""

    new: int = 0
    before: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    judges: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def questions(path: Path, *, seed: int = 0) -> list[tuple[str, Question]]:
    """The prompts of a JSONL file by the names of their rows (their `id`, else the number of their line), each once and
    in an order that is drawn: the same one whenever it is. UsageError names the line that is none."""
    found: dict[str, Question] = {}
    told = set()
    for number, line in _lines(path):
        question = _question(line, f"{path}, line {number}")
        name = str(number if question.id is None else question.id)
        if name in found:
            raise UsageError(f"{path}, line {number}: the id {name!r} stands there a second time", hint=_SEE)
        if question.prompt.strip() and question.prompt not in told:
            told.add(question.prompt)
            found[name] = question
    if not found:
        raise UsageError(f"{path} holds no prompt", hint=_SEE)
    every = list(found.items())
    return [every[n] for n in np.random.default_rng(seed).permutation(len(every))]


def _question(line: bytes, place: str) -> Question:
    try:
        question = msgspec.json.decode(line, type=Question)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{place}: {error}", hint=_SEE) from error
    gold = [question.gold] if isinstance(question.gold, str) else question.gold
    if gold is not None and not (gold and all(map(str.strip, gold))):
        raise UsageError(
            f"{place}: `gold` is {question.gold!r}, and no answer would be right; allowed are a text that is not blank "
            "and a list of one such or more",
            hint="leave `gold` out where it is not known",
        )
    return question


def _lines(path: Path) -> list[tuple[int, bytes]]:
    import gzip
    import zlib

    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", hint=_SEE) from error


async def record(
    edge: Bundle,
    cloud: Bundle,
    asked: Sequence[tuple[str, Question]],
    output: Path,
    plan: Plan,
    *,
    limit: int | None = None,
    resume: bool = False,
    show: Show = lambda what, done, total: None,
) -> Recording:
    """Write a row for each question, or for the first `limit` of them, into `output` (docs/formats/replay.md), in
    pieces that are on the disk before the next begins. With `resume` a file that is there is gone on from, whose last
    piece may be torn; without, UsageError if there is one. UsageError too if it holds rows of other models, of another
    plan or of prompts that are not among `asked`, and if answers leave no room for a prompt. The file is then as it
    was."""
    longest = _longest(edge, cloud, plan)
    pair = Pair(*(identity(bundle.name, bundle.path / MANIFEST) for bundle in (edge, cloud)))
    file = RecordFile(output, resume=resume)
    done = file.done(pair, plan, {name: question.prompt for name, question in asked})
    wanted = asked[:limit]
    todo = [(name, question) for name, question in wanted if name not in done]
    found, began = Recording(before=len(done), judges=file.judges), time.monotonic()
    show("prompts", len(wanted) - len(todo), len(wanted))
    if not todo:
        file.write([])  # whoever reads the file next does not expect a torn piece
        return found
    tiers = _Tiers(edge, cloud, plan, longest)
    try:
        for at in range(0, len(todo), PIECE):
            rows = await tiers.rows(todo[at : at + PIECE], pair, found.left_out)
            file.write(rows)
            found.new += len(rows)
            found.judges.update(str(row.judge) for row in rows)
            show("prompts", len(wanted) - len(todo) + min(at + PIECE, len(todo)), len(wanted))
    finally:
        await tiers.close()
    found.seconds = time.monotonic() - began
    return found


def _longest(edge: Bundle, cloud: Bundle, plan: Plan) -> int:
    """Tokens of a prompt behind which either model has room for an answer. UsageError if there are none."""
    context = min(bundle.card.context for bundle in (edge, cloud))
    if plan.max_tokens >= context:
        raise UsageError(
            f"answers of {plan.max_tokens} tokens leave no room for a prompt in a context of {context}; allowed are up "
            f"to {context - 1}",
            hint="give a smaller --max-tokens",
        )
    return min(plan.longest, context - plan.max_tokens)


class _Tiers:
    """Both models. They work one after the other, so that each has the machine."""

    def __init__(self, edge: Bundle, cloud: Bundle, plan: Plan, longest: int) -> None:
        self._plan, self._longest = plan, longest
        self._edge, self._here = _decoder(edge, plan)
        self._cloud, self._there = _decoder(cloud, plan)
        self._same = _tokenizer_hash(edge) == _tokenizer_hash(cloud)
        self._judge, _ = loaded(cloud, slots=1, context=_room(cloud, plan))
        self._scorer = Scorer(self._judge, self._there.stop_ids)

    async def close(self) -> None:
        await self._edge.close()
        await self._cloud.close()
        await self._judge.shutdown()

    async def rows(self, asked: Sequence[tuple[str, Question]], pair: Pair, left_out: Counter[str]) -> list[Recorded]:
        """Of the questions that are not left out."""
        ids = {name: self._ids(question.prompt) for name, question in asked}
        kept = [(name, question) for name, question in asked if max(map(len, ids[name])) <= self._longest]
        if len(kept) < len(asked):
            left_out[TOO_LONG] += len(asked) - len(kept)
        near = [self._request(ids[name][0], ALTERNATIVES) for name, _ in kept]
        far = [self._request(ids[name][1], 0) for name, _ in kept]
        edge, cloud = await answers(self._edge, near, at_once=SLOTS), await answers(self._cloud, far, at_once=SLOTS)
        return [
            await self._row(name, question, ids[name][1], its, other, pair)
            for (name, question), its, other in zip(kept, edge, cloud, strict=True)
        ]

    def _ids(self, prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The edge's and the cloud's."""
        here = prompt_ids(self._here, prompt, plain=self._plan.plain)
        return here, prompt_ids(self._there, prompt, plain=self._plan.plain)

    def _request(self, ids: tuple[int, ...], alternatives: int) -> Request:
        return Request(prompt_ids=ids, max_tokens=self._plan.max_tokens, logprobs=True, top_logprobs=alternatives)

    async def _row(
        self, name: str, question: Question, prompt: tuple[int, ...], edge: Answer, cloud: Answer, pair: Pair
    ) -> Recorded:
        right = question.right if self._plan.judge == "auto" else None
        if right is not None:
            near: dict[str, Any] = {"correct": matches(edge.text, right)}
            far: dict[str, Any] = {"correct": matches(cloud.text, right)}
        else:
            quality = await self._quality(prompt, edge, cloud)
            near, far = {"correct": quality >= -WITHIN, "quality": quality}, {"correct": True, "quality": 0.0}
        asked = Evidence(question.prompt, question.group or question.task)
        return Recorded(
            id=name,
            edge=_outcome(edge, _signals(asked, edge), **near),
            cloud=_outcome(cloud, {}, **far),
            prompt=question.prompt,
            group=asked.group,
            gold=right,
            pair=pair,
            judge="teacher" if right is None else "gold",
            plan=self._plan,
        )

    async def _quality(self, prompt: tuple[int, ...], edge: Answer, cloud: Answer) -> float:
        """Of the edge's answer, in nats a token; that of the cloud's is 0."""
        own = [token.id for token in cloud.tokens]
        if edge.text == cloud.text and edge.finish_reason == cloud.finish_reason:
            return 0.0
        its = [token.id for token in edge.tokens] if self._same else self._there.continued(edge.text)
        its = its[: self._judge.context - len(prompt)]
        near, far = await self._scorer.score(prompt, [its, own])
        means = [
            scored.mean(ended=said.finish_reason == "stop" or not len(scored.tokens))
            for scored, said in ((near, edge), (far, cloud))
        ]
        return round(means[0] - means[1], DIGITS)


def _decoder(bundle: Bundle, plan: Plan) -> tuple[Decoder, Tokenizer]:
    model, tokenizer = loaded(bundle, slots=SLOTS, context=_room(bundle, plan))
    return Decoder(model, tokenizer, name=bundle.name, options=DecodeOptions(queue=PIECE)), tokenizer


def _room(bundle: Bundle, plan: Plan) -> int:
    """Positions of a session. An answer that is cut into other tokens may have more of them."""
    return min(plan.longest + 2 * plan.max_tokens, bundle.card.context)


def _tokenizer_hash(bundle: Bundle) -> str:
    return bundle.manifest.files[TOKENIZER].sha256


def _signals(asked: Evidence, answer: Answer) -> dict[str, float | None]:
    """Of the alternatives to each token; all others can be read off the row."""
    evidence = asked.answered(answer.text, [token.logprob for token in answer.tokens], answer.tokens)
    found = {name: evidence.get(name) for name in TOP_SIGNALS}
    return {name: round(value, DIGITS) for name, value in found.items() if value is not None}


def _outcome(answer: Answer, signals: dict[str, float | None], **judged: Any) -> Outcome:
    logprobs = tuple(None if token.logprob is None else round(token.logprob, DIGITS) for token in answer.tokens)
    return Outcome(
        text=answer.text,
        finish_reason=answer.finish_reason,
        token_logprobs=logprobs or None,
        signals=signals,
        **judged,
    )
