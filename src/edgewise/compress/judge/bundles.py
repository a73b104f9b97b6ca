"""How far a student is from its teacher: two bundles that foretell the same windows of tokens, both on our own engine.

Windows are alike in length, so a mean over windows is one over tokens, and intervals come of windows drawn again. The
distributions of a few positions are in memory at a time, as float32 (engines/score.py says how true they are).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.compress.judge.reader import SLOTS, Reader, few
from edgewise.engines.decode import Decoder
from edgewise.engines.slots import CHUNK
from edgewise.engines.together import Answer, answers, prompt_ids
from edgewise.errors import UsageError
from edgewise.evaluate.divergence import agreement_length
from edgewise.evaluate.interval import Interval, bootstrap
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FloatArray, IdArray, Request

Doubles = npt.NDArray[np.float64]
Show = Callable[[str, int, int], None]

TEXT: Final = Path(__file__).with_name("judging.txt")  # prose of our own, in no training set
PROMPTS: Final = Path(__file__).with_name("judging_prompts.txt")  # one a line
WINDOW: Final = 256  # tokens
LEAST_WINDOWS: Final = 16  # that a shorter text is cut into, where they do not become shorter than
SHORTEST: Final = 32
ANSWER: Final = 48  # tokens
P99: Final = 0.99
P99_RESAMPLES: Final = 400  # each looks at every token


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of `windows` windows, in which each model foretold `tokens` tokens in all.

    KL(teacher || student) in nats, top-1 agreement and perplexities are over the student's tokens. Where its vocabulary
    is a part of the teacher's, KL and agreement are of the teacher's distribution over that part alone, and `outside`
    is the mass that it gives to the rest, on average. `bits_per_byte` compares models that cut texts differently, as
    each foretells the text in its own tokens; None where the tokens have no bytes. `agreement_length` is how many
    tokens of the student's greedy answers come before the first that the teacher does not say, on average over prompts;
    None without prompts. `intervals` are of 95 %, by the names of these figures, and of `perplexity_rise`: student over
    teacher, less 1, both in the same windows."""

    windows: int
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_source: float
    bits_per_byte: float | None
    bits_per_byte_source: float | None
    outside: float
    agreement_length: float | None
    intervals: dict[str, Interval]

    def facts(self) -> dict[str, Any]:
        """As --json prints it."""
        return {**asdict(self), "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()}}


def judged(
    student: Bundle,
    teacher: Bundle,
    ids: IdArray,
    *,
    kept: IdArray | None = None,
    prompts: Sequence[str] = (),
    plain: bool = False,
    max_tokens: int = ANSWER,
    show: Show = lambda what, done, total: None,
) -> Judgement:
    """`ids` int64 [n, length] are windows in the student's tokens. `kept` int64 [the student's vocabulary] gives the
    teacher's id of each of them, -1 for one that is no token (kept.py finds it); None where both have the same.
    Prompts are put as each model's chat template has them, unless `plain`, and answered greedily in at most
    `max_tokens` tokens.

    UsageError for windows of fewer than two tokens, ids that are not of the vocabulary, or vocabularies that do not
    fit; EngineError for a model that gives NaN. Not for a running event loop."""
    ids = np.ascontiguousarray(ids, np.int64)
    _check(student, teacher, ids, kept)
    return asyncio.run(_Judge(student, teacher, kept, ids.shape[1]).judge(ids, prompts, plain, max_tokens, show))


def windows(tokenizer: Tokenizer, text: str, *, tokens: int | None = None, length: int | None = None) -> IdArray:
    """int64 [n, length]: whole windows of the text's first `tokens` tokens, each beginning with the token that the
    model begins its texts with, if it has one. Without a length they are of WINDOW tokens, of fewer for a short text.
    UsageError if there is not one."""
    first, body = tokenizer.start_ids, tokenizer.continued(text)[:tokens]
    length = length or min(WINDOW, max(len(body) // LEAST_WINDOWS, SHORTEST))
    step = length - len(first)
    if step < 1 or len(body) < step:
        raise UsageError(f"the text has {len(body)} tokens; a window has {length}", hint="take a longer text")
    return np.array([[*first, *body[at : at + step]] for at in range(0, len(body) - step + 1, step)], np.int64)


def _check(student: Bundle, teacher: Bundle, ids: IdArray, kept: IdArray | None) -> None:
    vocab, source = student.card.vocab, teacher.card.vocab
    most = min(student.card.context, teacher.card.context)
    if ids.ndim != 2 or not len(ids) or not 2 <= ids.shape[1] <= most:
        raise UsageError(f"windows of the shape {ids.shape} were given; [n, 2 to {most}] is allowed")
    if kept is None and vocab != source:
        raise UsageError(
            f"{student.name} has {vocab} tokens and {teacher.name} {source}",
            hint="say which of the teacher's tokens the student's are: `kept`",
        )
    if kept is not None:
        _check_kept(kept, vocab, source)
    known = np.ones(vocab, np.bool_) if kept is None else kept >= 0
    if ids.min() < 0 or ids.max() >= len(known) or not known[ids].all():
        raise UsageError(f"the windows hold ids from {ids.min()} to {ids.max()}, not all of which are {student.name}'s")


def _check_kept(kept: IdArray, vocab: int, source: int) -> None:
    places = kept[kept >= 0]
    fit = kept.ndim == 1 and len(kept) <= vocab and places.max(initial=0) < source
    if not fit or len(np.unique(places)) < len(places):
        raise UsageError(
            f"`kept` has the shape {kept.shape} and ids up to {places.max(initial=0)}",
            hint=f"each of the student's {vocab} tokens needs one of the teacher's {source} of its own, or -1",
        )


@dataclass(frozen=True, slots=True)
class _Foretold:
    """Of each token but a window's first, [n, length - 1]: the KL, whether both models would have said the same,
    negative log-likelihoods in nats, and the mass that the teacher gives to what is no token of the student's."""

    kl: Doubles
    agreed: Doubles
    nll: Doubles
    nll_source: Doubles
    outside: Doubles

    @classmethod
    def empty(cls, n: int, length: int) -> _Foretold:
        return cls(*np.empty((5, n, length - 1)))

    def rows(self, windows: slice) -> tuple[Doubles, ...]:
        """Views of these windows, token by token."""
        parts = (self.kl, self.agreed, self.nll, self.nll_source, self.outside)
        return tuple(part[windows].reshape(-1) for part in parts)


class _Judge:
    """Both models, for one judgement."""

    def __init__(self, student: Bundle, teacher: Bundle, kept: IdArray | None, length: int) -> None:
        self._tokenizers = Tokenizer.open(student.path), Tokenizer.open(teacher.path)
        self._student, self._teacher = Reader(student, length), Reader(teacher, length)
        self._kept = kept
        self._places = None if kept is None else np.flatnonzero(kept >= 0)
        self._together = min(max(CHUNK // length, 1), SLOTS)

    async def judge(self, ids: IdArray, prompts: Sequence[str], plain: bool, max_tokens: int, show: Show) -> Judgement:
        try:
            found = await self._foretell(ids, show)
            said = self._said(ids, found.nll)
            source = self._said(ids, found.nll_source) if self._kept is None else await self._said_alone(ids, show)
            lengths = await self._agreement(prompts, plain, max_tokens, show) if prompts else None
        finally:
            await self._student.shutdown()
            await self._teacher.shutdown()
        return _judgement(found, said, source, lengths)

    async def _foretell(self, ids: IdArray, show: Show) -> _Foretold:
        found = _Foretold.empty(*ids.shape)
        for at in range(0, len(ids), self._together):
            show("windows", at, len(ids))
            some = ids[at : at + self._together]
            here = np.concatenate(await self._student.hidden([*some]))
            there = np.concatenate(await self._teacher.hidden([*(some if self._kept is None else self._kept[some])]))
            parts, targets = found.rows(slice(at, at + len(some))), some[:, 1:].reshape(-1)
            for rows in few(len(here)):
                figures: tuple[npt.NDArray[Any], ...] = self._compared(here[rows], there[rows], targets[rows])
                for part, figure in zip(parts, figures, strict=True):
                    part[rows] = figure
        show("windows", len(ids), len(ids))
        return found

    def _compared(
        self, here: FloatArray, there: FloatArray, ids: IdArray
    ) -> tuple[Doubles, npt.NDArray[np.bool_], FloatArray, FloatArray, Doubles]:
        """What `_Foretold` keeps of positions with these hidden states, before the tokens `ids`."""
        log_q, log_p = self._student.log_probs(here), self._teacher.log_probs(there)
        each, outside = np.arange(len(ids)), np.zeros(len(ids))
        nll, nll_source = -log_q[each, ids], -log_p[each, ids if self._kept is None else self._kept[ids]]
        if self._kept is not None:
            log_p, log_q = log_p[:, self._kept[self._places]], log_q[:, self._places]
            inside = np.log(np.exp(log_p).sum(axis=1, dtype=np.float64))
            log_p -= inside.astype(np.float32)[:, None]
            outside = -np.expm1(np.minimum(inside, 0.0))
        return _kl(log_p, log_q), log_p.argmax(axis=1) == log_q.argmax(axis=1), nll, nll_source, outside

    def _said(self, ids: IdArray, nll: Doubles) -> Doubles:
        """Of each window the negative log-likelihood of the tokens that were foretold, and their bytes, [n, 2]."""
        return np.stack([nll.sum(axis=1), _sizes(self._tokenizers[0], ids[:, 1:])], axis=1)

    async def _said_alone(self, ids: IdArray, show: Show) -> Doubles:
        """The same of the teacher, where it reads the windows' text in its own tokens."""
        here, own = self._tokenizers
        found = np.zeros((len(ids), 2))
        for n, window in enumerate(ids):
            show("windows in the teacher's own tokens", n + 1, len(ids))
            raw = b"".join(here.token_bytes(int(id)) for id in window)
            its = np.array(own.encode(raw.decode("utf-8", "ignore")), np.int64)[: self._teacher.context]
            if len(its) > 1:
                (hidden,) = await self._teacher.hidden([its])
                for rows in few(len(hidden)):
                    log_p, targets = self._teacher.log_probs(hidden[rows]), its[1:][rows]
                    found[n, 0] -= log_p[np.arange(len(targets)), targets].sum(dtype=np.float64)
                found[n, 1] = _sizes(own, its[None, 1:])[0]
        return found

    async def _agreement(self, prompts: Sequence[str], plain: bool, max_tokens: int, show: Show) -> Doubles:
        """Tokens that both models' answers to each prompt have in common."""
        said = []
        for n, (reader, tokenizer) in enumerate(zip((self._student, self._teacher), self._tokenizers, strict=True)):
            show("answers", n, 2)
            said.append(await _answers(reader, tokenizer, prompts, plain, max_tokens))
        show("answers", 2, 2)
        alike = _same_ids if self._kept is None else _same_bytes
        return np.array([alike(one, other) for one, other in zip(*said, strict=True)], np.float64)


def _kl(log_p: FloatArray, log_q: FloatArray) -> Doubles:
    """KL(p || q) of each row, [n]."""
    terms = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # what p rules out adds nothing, whatever q thinks of it
        terms *= np.where(terms > 0, log_p - log_q, 0.0)
    return np.asarray(np.maximum(terms.sum(axis=1, dtype=np.float64), 0.0))


async def _answers(
    reader: Reader, tokenizer: Tokenizer, prompts: Sequence[str], plain: bool, max_tokens: int
) -> list[Answer]:
    decoder = Decoder(reader.model, tokenizer)
    requests = [
        Request(prompt_ids=prompt_ids(tokenizer, prompt, plain=plain), max_tokens=max_tokens) for prompt in prompts
    ]
    try:
        return await answers(decoder, requests, at_once=SLOTS)
    finally:
        await decoder.close()


def _same_ids(one: Answer, other: Answer) -> int:
    return agreement_length([token.id for token in one.tokens], [token.id for token in other.tokens])


def _same_bytes(one: Answer, other: Answer) -> int:
    """Tokens of the first answer that lie in what both texts have in common."""
    common, size = agreement_length(*(b"".join(token.raw for token in said.tokens) for said in (one, other))), 0
    for count, token in enumerate(one.tokens):
        size += len(token.raw)
        if size > common:
            return count
    return len(one.tokens)


def _sizes(tokenizer: Tokenizer, ids: IdArray) -> Doubles:
    """Bytes of the tokens of each window [n, tokens]."""
    values, places = np.unique(ids, return_inverse=True)
    sizes = np.array([len(tokenizer.token_bytes(int(id))) for id in values], np.float64)
    return np.asarray(sizes[places].reshape(ids.shape).sum(axis=1))


def _judgement(found: _Foretold, said: Doubles, said_source: Doubles, lengths: Doubles | None) -> Judgement:
    """`said` [n, 2] are nats and bytes of each window, as each model reads it."""
    intervals = {
        "kl_mean": bootstrap(found.kl.mean(axis=1)),
        "kl_p99": bootstrap(found.kl, _p99, resamples=P99_RESAMPLES),
        "top1_agreement": bootstrap(found.agreed.mean(axis=1)),
        "perplexity": bootstrap(found.nll.mean(axis=1), _perplexity),
        "perplexity_source": bootstrap(found.nll_source.mean(axis=1), _perplexity),
        "perplexity_rise": bootstrap((found.nll - found.nll_source).mean(axis=1), lambda rise: _perplexity(rise) - 1),
        "outside": bootstrap(found.outside.mean(axis=1)),
    }
    bits = {"bits_per_byte": said, "bits_per_byte_source": said_source}
    intervals |= {name: bootstrap(one, _per_byte) for name, one in bits.items() if one[:, 1].any()}
    if lengths is not None:
        intervals["agreement_length"] = bootstrap(lengths)
    values = {name: one.value for name, one in intervals.items()}
    return Judgement(
        windows=len(found.kl),
        tokens=found.kl.size,
        kl_mean=values["kl_mean"],
        kl_p99=values["kl_p99"],
        top1_agreement=values["top1_agreement"],
        perplexity=values["perplexity"],
        perplexity_source=values["perplexity_source"],
        bits_per_byte=values.get("bits_per_byte"),
        bits_per_byte_source=values.get("bits_per_byte_source"),
        outside=values["outside"],
        agreement_length=values.get("agreement_length"),
        intervals=intervals,
    )


def _p99(kl: Doubles) -> float:
    return float(np.quantile(kl, P99, method="higher"))


def _per_byte(said: Doubles) -> float:
    nats, size = said.sum(axis=0)
    return float(nats / math.log(2) / max(size, 1.0))  # a few windows drawn again may have no byte at all


def _perplexity(nll: Doubles) -> float:
    return math.exp(min(float(nll.mean()), 700.0))  # beyond, exp overflows; it is nonsense long before
