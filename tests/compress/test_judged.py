"""A student beside its teacher: figures against what other code says of the same logits, and a student that is known
to differ in its vocabulary alone."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edgewise.compress.judge.bundles import PROMPTS as PROMPTS_HERE
from edgewise.compress.judge.bundles import TEXT, judged, windows
from edgewise.compress.judge.kept import kept_ids
from edgewise.compress.judge.texts import prompts
from edgewise.engines.base import Row
from edgewise.engines.decode import Decoder
from edgewise.engines.load import local_model
from edgewise.errors import EngineError, UsageError
from edgewise.evaluate.divergence import Divergence, agreement_length
from edgewise.evaluate.interval import Interval
from edgewise.evaluate.perplexity import Perplexity
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FloatArray, IdArray, Message, Request
from pruned import LEFT_OUT, whole_and_part
from tiny import VOCAB, save_gguf, save_hf, tiny

TEXT_HERE = "The cat sat on a mat, and the dog did what dogs do: it barked at a bird. " * 12
FIGURES = "kl_mean kl_p99 top1_agreement perplexity perplexity_source bits_per_byte bits_per_byte_source"
PROMPTS = ["Why does bread rise?", "What is 17 plus 26?", "abc"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def teacher(home: Path) -> Bundle:
    path = save_gguf(tiny("llama"), home / "teacher.gguf", gguf.GGMLQuantizationType.Q4_0)
    return pull(str(path), home=home, name="teacher")


@pytest.fixture(scope="module")
def student(home: Path) -> Bundle:
    """Another model with the same tokens."""
    path = save_gguf(tiny("llama", num_hidden_layers=2), home / "student.gguf", gguf.GGMLQuantizationType.Q8_0)
    return pull(str(path), home=home, name="student")


@pytest.fixture(scope="module")
def pair(home: Path) -> tuple[Bundle, Bundle]:
    """A part of a model's vocabulary, and the model."""
    whole, part = whole_and_part(home)
    return pull(str(part), home=home, name="part"), pull(str(whole), home=home, name="whole")


def ids_of(bundle: Bundle, length: int = 40, tokens: int = 400) -> IdArray:
    return windows(Tokenizer.open(bundle.path), TEXT_HERE, tokens=tokens, length=length)


def logits(bundle: Bundle, ids: IdArray) -> list[FloatArray]:
    """Of each window, [length - 1, vocab], through the seam that answers come through."""

    async def run() -> list[FloatArray]:
        model = local_model(bundle, slots=1, context=256)
        await model.open("s", 256)
        found = []
        for its in ids:
            (rows,) = await model.forward([Row("s", 0, its, len(its))])
            found.append(np.array(rows[:-1]))
        await model.shutdown()
        return found

    return asyncio.run(run())


def answers(bundle: Bundle, max_tokens: int) -> list[Sequence[int]]:
    async def run() -> list[Sequence[int]]:
        decoder = Decoder(local_model(bundle, slots=1, context=256), Tokenizer.open(bundle.path))
        found = []
        for prompt in PROMPTS:
            request = Request((Message("user", prompt),), max_tokens=max_tokens)
            found.append([token.id async for chunk in decoder.generate(request) for token in chunk.tokens])
        await decoder.close()
        return found

    return asyncio.run(run())


def test_figures_are_those_of_the_logits(student: Bundle, teacher: Bundle) -> None:
    ids = ids_of(student)
    found = judged(student, teacher, ids)
    far, near, source = Divergence(), Perplexity(), Perplexity()
    for mine, its, window in zip(logits(student, ids), logits(teacher, ids), ids, strict=True):
        far.add(its, mine)
        near.add(mine, window[1:])
        source.add(its, window[1:])
    expected = far.result()
    assert (found.windows, found.tokens) == (10, 390)
    assert found.kl_mean == pytest.approx(expected.kl_mean, abs=1e-5)
    assert found.kl_p99 == pytest.approx(expected.kl_p99, abs=1e-4)
    assert found.top1_agreement == expected.top1_agreement
    assert found.perplexity == pytest.approx(near.result(), rel=1e-5)
    assert found.perplexity_source == pytest.approx(source.result(), rel=1e-5)
    assert found.outside == 0.0
    assert found.agreement_length is None
    assert found.kl_mean > 0.1


def test_bits_per_byte_are_those_of_the_text(student: Bundle, teacher: Bundle) -> None:
    ids = ids_of(student)
    found = judged(student, teacher, ids)
    tokenizer = Tokenizer.open(student.path)
    size = sum(len(tokenizer.token_bytes(int(id))) for id in ids[:, 1:].reshape(-1))
    assert found.bits_per_byte == pytest.approx(390 * math.log2(found.perplexity) / size)
    assert found.bits_per_byte_source == pytest.approx(390 * math.log2(found.perplexity_source) / size)


def test_a_model_is_itself(student: Bundle) -> None:
    found = judged(student, student, ids_of(student), prompts=PROMPTS, max_tokens=12)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_source
    assert found.intervals["perplexity_rise"].high == 0.0
    assert found.agreement_length == np.mean([len(answer) for answer in answers(student, 12)])


def test_greedy_answers_agree_for_so_long(student: Bundle, teacher: Bundle) -> None:
    found = judged(student, teacher, ids_of(student), prompts=PROMPTS, max_tokens=12)
    pairs = zip(answers(student, 12), answers(teacher, 12), strict=True)
    assert found.agreement_length == np.mean([agreement_length(one, other) for one, other in pairs])


def test_intervals_hold_their_figure_and_come_again(student: Bundle, teacher: Bundle) -> None:
    found, again = (judged(student, teacher, ids_of(student)) for _ in range(2))
    assert found == again
    for name in FIGURES.split():
        interval = found.intervals[name]
        assert interval.low < interval.high, name
        assert interval.low <= getattr(found, name) <= interval.high, name
    assert set(found.intervals) == {*FIGURES.split(), "perplexity_rise", "outside"}
    assert found.intervals["outside"] == Interval(0.0, 0.0, 0.0)


def test_windows_come_singly_or_many_at_once(student: Bundle, teacher: Bundle) -> None:
    """A window of 200 is computed alone, six of 40 together; the text is the same, where they begin is not."""
    one, many = ids_of(student, length=200, tokens=400), ids_of(student, length=40, tokens=400)
    assert judged(student, teacher, one[:1]).tokens == 199
    alone = [judged(student, teacher, many[n : n + 1]).kl_mean for n in range(len(many))]
    assert judged(student, teacher, many).kl_mean == pytest.approx(np.mean(alone))


def test_a_part_of_the_vocabulary_costs_nothing_but_the_mass_outside(pair: tuple[Bundle, Bundle]) -> None:
    part, whole = pair
    kept = kept_ids(Tokenizer.open(part.path), Tokenizer.open(whole.path))
    assert kept is not None
    assert kept[:256].tolist() == [*reversed(range(256))]
    assert kept[-1] == VOCAB - 1
    found = judged(part, whole, ids_of(part), kept=kept, prompts=PROMPTS, max_tokens=8)
    assert found.kl_mean == pytest.approx(0.0, abs=1e-5)
    assert found.top1_agreement == 1.0
    assert 0.001 < found.outside < 0.9
    for name in ("outside", "bits_per_byte_source"):
        interval = found.intervals[name]
        assert interval.low < getattr(found, name) < interval.high, name
    assert found.perplexity < found.perplexity_source  # it gives its tokens what the teacher gives to others
    assert found.agreement_length is not None
    assert 0 <= found.agreement_length <= 8


def test_what_the_teacher_gives_to_others(pair: tuple[Bundle, Bundle]) -> None:
    part, whole = pair
    kept = kept_ids(Tokenizer.open(part.path), Tokenizer.open(whole.path))
    assert kept is not None
    ids = ids_of(part, tokens=120)
    shares = [np.exp(rows - rows.max(axis=1, keepdims=True)) for rows in logits(whole, kept[ids])]
    inside = [(rows[:, kept] / rows.sum(axis=1, keepdims=True)).sum(axis=1) for rows in shares]
    assert judged(part, whole, ids, kept=kept).outside == pytest.approx(1 - np.mean(inside), abs=1e-5)


def test_each_model_foretells_bytes_in_its_own_tokens(pair: tuple[Bundle, Bundle]) -> None:
    part, whole = pair
    mine, its = Tokenizer.open(part.path), Tokenizer.open(whole.path)
    ids, kept = ids_of(part, tokens=120), kept_ids(mine, its)
    found = judged(part, whole, ids, kept=kept)
    own = [np.array(its.encode(mine.decode(map(int, window)))) for window in ids]
    assert sum(map(len, own)) < ids.size  # larger vocabularies have longer tokens
    total, size = Perplexity(), 0
    for window in own:
        (rows,) = logits(whole, window[None])
        total.add(rows, window[1:])
        size += sum(len(its.token_bytes(int(id))) for id in window[1:])
    bits = total.tokens * math.log2(total.result()) / size
    assert found.bits_per_byte_source == pytest.approx(bits, rel=1e-5)
    assert found.bits_per_byte != pytest.approx(bits, rel=1e-3)


def test_the_same_vocabulary_needs_no_map(student: Bundle, teacher: Bundle) -> None:
    assert kept_ids(Tokenizer.open(student.path), Tokenizer.open(teacher.path)) is None


def test_a_stranger_is_no_teacher(pair: tuple[Bundle, Bundle]) -> None:
    part, whole = pair
    with pytest.raises(UsageError, match=f"{LEFT_OUT} of the student's {VOCAB} tokens are not in the teacher's"):
        kept_ids(Tokenizer.open(whole.path), Tokenizer.open(part.path))


def test_the_bundled_text_gives_enough_windows(student: Bundle) -> None:
    found = windows(Tokenizer.open(student.path), TEXT.read_text())
    assert len(found) >= 16
    assert found.shape[1] == 256
    short = windows(Tokenizer.open(student.path), TEXT.read_text()[:400])
    assert short.shape[1] == 32


def test_windows_begin_as_the_models_texts_do(home: Path) -> None:
    directory = save_hf(tiny("llama"), home / "begins")
    (directory / "tokenizer_config.json").write_text(
        '{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": true}'
    )
    tokenizer = Tokenizer.open(pull(str(directory), home=home, name="begins").path)
    found = windows(tokenizer, TEXT_HERE, length=20, tokens=100)
    assert (found[:, 0] == VOCAB - 3).all()
    assert tokenizer.decode(found[:, 1:].reshape(-1).tolist()) == tokenizer.decode(tokenizer.continued(TEXT_HERE)[:95])


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros((0, 8), np.int64), "windows of the shape"),
        (np.zeros((2, 1), np.int64), "windows of the shape"),
        (np.zeros((1, 1000), np.int64), "2 to 256"),
        (np.full((1, 8), VOCAB), "not all of which are"),
        (np.full((1, 8), -1), "not all of which are"),
    ],
)
def test_windows_that_cannot_be(student: Bundle, teacher: Bundle, ids: IdArray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        judged(student, teacher, ids)


def test_vocabularies_that_do_not_fit(pair: tuple[Bundle, Bundle]) -> None:
    part, whole = pair
    ids = ids_of(part)
    with pytest.raises(UsageError, match=f"has {VOCAB - LEFT_OUT} tokens and whole {VOCAB}"):
        judged(part, whole, ids)
    for kept in (
        np.zeros(VOCAB - LEFT_OUT, np.int64),
        np.arange(VOCAB + 1),
        np.arange(VOCAB - LEFT_OUT) + LEFT_OUT + 1,
    ):
        with pytest.raises(UsageError, match="`kept` has the shape"):
            judged(part, whole, ids, kept=kept)


def test_the_example_of_the_page_runs(student: Bundle, teacher: Bundle) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"student": student, "teacher": teacher, "text": TEXT_HERE}
    names |= {f"{name}_tokenizer": Tokenizer.open(names[name].path) for name in ("student", "teacher")}
    exec(example, names)
    assert names["judgement"] == judged(student, teacher, windows(names["student_tokenizer"], TEXT_HERE))


def test_prompts_are_lines_of_text_or_of_jsonl(tmp_path: Path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("One?\n\n Two\u2028halves? \n")
    assert prompts(plain) == ["One?", " Two\u2028halves? "]
    lines.write_text('{"prompt": "Two\u2028halves\x85?", "by": 1}\r\n\n{"prompt": "abc"}')
    assert prompts(lines) == ["Two\u2028halves\x85?", "abc"]
    assert len(prompts(PROMPTS_HERE)) == 16


@pytest.mark.parametrize("line", ['{"prompt": null}', '{"prompt": 3}', "{}", "[1]", '"prompt"', "{", "[" * 100_000])
def test_prompts_that_are_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UsageError, match=r"line 2 is no JSON object with a `prompt`"):
        prompts(tmp_path / "p.jsonl")


def test_a_text_too_short(student: Bundle) -> None:
    with pytest.raises(UsageError, match="take a longer text"):
        windows(Tokenizer.open(student.path), "Too short.")


def test_weights_that_are_damaged(home: Path, teacher: Bundle) -> None:
    model = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    broken = pull(str(save_hf(model, home / "broken")), home=home, name="broken")
    with pytest.raises(EngineError, match="broken gives logits that are NaN"):
        judged(broken, teacher, ids_of(teacher))
