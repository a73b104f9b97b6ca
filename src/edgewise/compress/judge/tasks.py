"""Questions with a right answer, and how often two models give it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.compress.judge.reader import SLOTS
from edgewise.engines.decode import Decoder
from edgewise.engines.load import local_model
from edgewise.engines.score import Scorer
from edgewise.engines.together import answers, prompt_ids
from edgewise.errors import UsageError
from edgewise.evaluate.answers import matches
from edgewise.evaluate.interval import Interval, bootstrap
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import Request

Doubles = npt.NDArray[np.float64]
Show = Callable[[str, int, int], None]

ROOM: Final = 2048  # positions of a question with its answer, where the model has so many
_SEE: Final = "docs/evaluation.md says what a file of tasks holds"


class Task(msgspec.Struct, frozen=True):
    """`gold` is the answer, or of several `choices` the right one or its number from 0; other keys are for people."""

    prompt: str
    gold: str | int
    choices: tuple[str, ...] = ()

    @property
    def right(self) -> int:
        """The number of the right choice."""
        return self.gold if isinstance(self.gold, int) else self.choices.index(self.gold)

    def flaw(self) -> str | None:
        """What is wrong with it, if anything is."""
        if not self.prompt.strip():
            return "`prompt` is empty"
        if not self.choices:
            return None if isinstance(self.gold, str) else "`gold` is a number, and there are no `choices`"
        known = self.gold in self.choices if isinstance(self.gold, str) else 0 <= self.gold < len(self.choices)
        if len(self.choices) < 2 or not all(self.choices):
            return "`choices` are two texts or more"
        return None if known else f"`gold` is {self.gold!r}, which is none of its {len(self.choices)} choices"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of `n` tasks, with intervals of 95 % over the tasks; `gain` is the student's less the teacher's."""

    n: int
    student: Interval
    teacher: Interval
    gain: Interval

    def facts(self) -> dict[str, Any]:
        """As --json prints it."""
        return {
            "n": self.n,
            "accuracy": self.student.value,
            "accuracy_source": self.teacher.value,
            "gain": self.gain.value,
            "intervals": {
                "accuracy": [self.student.low, self.student.high],
                "accuracy_source": [self.teacher.low, self.teacher.high],
                "gain": [self.gain.low, self.gain.high],
            },
        }


def read(path: Path) -> list[Task]:
    """A task a line, JSONL. UsageError names the line."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", hint=_SEE) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                task = msgspec.json.decode(line, type=Task)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise UsageError(f"{path}, line {number}: {error}", hint=_SEE) from error
            if flaw := task.flaw():
                raise UsageError(f"{path}, line {number}: {flaw}", hint=_SEE)
            found.append(task)
    if not found:
        raise UsageError(f"{path} holds no task", hint=_SEE)
    return found


def accuracy(
    student: Bundle,
    teacher: Bundle,
    tasks: Sequence[Task],
    *,
    plain: bool = False,
    max_tokens: int,
    show: Show = lambda what, done, total: None,
) -> Accuracy:
    """An answer is right if it, or its first line, is the gold one (evaluate/answers.py); of choices the model takes
    that which is the most probable behind the prompt, in a chat with its end. ContextFull for a prompt too long for one
    of them."""
    right = []
    for n, bundle in enumerate((student, teacher)):
        show("tasks", n, 2)
        right.append(asyncio.run(_solved(bundle, tasks, plain, max_tokens)))
    show("tasks", 2, 2)
    mine, its = right
    return Accuracy(len(tasks), bootstrap(mine), bootstrap(its), bootstrap(mine - its))


async def _solved(bundle: Bundle, tasks: Sequence[Task], plain: bool, max_tokens: int) -> Doubles:
    """1 or 0 for each task."""
    tokenizer = Tokenizer.open(bundle.path)
    model = local_model(bundle, slots=SLOTS, context=min(ROOM, bundle.card.context))
    right = np.zeros(len(tasks))
    asked = {n: prompt_ids(tokenizer, task.prompt, plain=plain) for n, task in enumerate(tasks)}
    try:
        scorer = Scorer(model, tokenizer.stop_ids)
        for n, task in enumerate(tasks):
            if task.choices:
                apart = plain or not tokenizer.chats
                found = await scorer.score(asked[n], [_behind(tokenizer, task, one, apart) for one in task.choices])
                sums = [one.tokens.sum() + (0.0 if apart else one.end) for one in found]
                right[n] = int(np.argmax(sums)) == task.right
        free = [n for n, task in enumerate(tasks) if not task.choices]
        decoder = Decoder(model, tokenizer)
        try:
            requests = [Request(prompt_ids=asked[n], max_tokens=max_tokens) for n in free]
            for n, answer in zip(free, await answers(decoder, requests, at_once=SLOTS), strict=True):
                right[n] = matches(answer.text, str(tasks[n].gold))
        finally:
            await decoder.close()
    finally:
        await model.shutdown()
    return right


def _behind(tokenizer: Tokenizer, task: Task, choice: str, apart: bool) -> list[int]:
    """The choice's tokens; with a space before it where the text simply goes on and has none yet."""
    gap = apart and not task.prompt[-1:].isspace() and not choice[:1].isspace()
    return tokenizer.continued(f" {choice}" if gap else choice)
