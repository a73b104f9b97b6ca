"""Rows of tokens on disk: what is in them, on which side, whatever the order, the compression and the accidents."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.compress.lessons import answers, corpus
from edgewise.compress.lessons.answers import prompts_of, written
from edgewise.compress.lessons.corpus import Corpus, build, learnt
from edgewise.compress.lessons.documents import Document, Encoder, gathered
from edgewise.engines.decode import Decoder
from edgewise.engines.fake import FakeGenerator, FakeTokenizer, FakeTokenModel
from edgewise.errors import SourceError, StorageError, Unreachable, UsageError
from edgewise.models.tokenizer import Config
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.types import Message, Request
from tiny import SPECIAL, TEMPLATE, VOCAB, byte_tokenizer

LENGTH = 16
END = VOCAB - len(SPECIAL)
TURN_END = VOCAB - 1
FILES = TokenizerFiles(
    byte_tokenizer().to_str(),
    Config(1, VOCAB, "byte_level", END, TURN_END, add_bos=False, add_eos=False, stop=(END, TURN_END)),
    TEMPLATE,
)
ENCODER = Encoder.of(FILES)


def texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefghij ") for _ in range(rng.randint(5, 60))) + str(n) for n in range(count)]


def made(documents: Iterable[Document], directory: Path, **options: Any) -> Corpus:
    return build({"here": documents}, ENCODER, directory, **{"end": END, "length": LENGTH, "held_out": 0.2} | options)


def documents_in(rows: np.ndarray) -> list[str]:
    """What stands between the end tokens of rows that follow each other; the last one is cut."""
    found: list[list[int]] = [[]]
    for id in rows.ravel().tolist():
        if id == END:
            found.append([])
        else:
            found[-1].append(id)
    return [FILES.opened().decode(ids) for ids in found]


def test_rows_are_the_documents_with_the_end_between(tmp_path: Path) -> None:
    given_texts = texts(100)
    found = made(map(Document, given_texts), tmp_path / "c")
    assert (found.train.dtype, found.held_out.dtype, found.train.shape[1]) == (np.int32, np.int32, LENGTH)
    assert isinstance(found.train, np.memmap)
    assert not found.train.flags.writeable
    trained, held = documents_in(found.train), documents_in(found.held_out)
    assert set(trained[:-1]) | set(held[:-1]) <= set(given_texts)
    assert len(trained) + len(held) >= 97, "what is lost is the rest of a row at either end"
    facts = found.facts
    assert (facts.documents + facts.held_out_documents, facts.alike) == (100, 0)
    assert facts.tokens == found.train.size
    assert 8 < facts.held_out_documents < 35
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == ["corpus.json", "held_out.i32", "train.i32"]


def test_what_was_learnt_from_can_be_told(tmp_path: Path) -> None:
    given_texts = texts(100)
    documents = [Document(text) for text in [*given_texts, given_texts[0].upper()]]
    found = made(documents, tmp_path / "c", limit_tokens=40 * LENGTH)
    said = [document.text for document in learnt(found.facts, {"here": documents})]
    assert 0 < len(said) == found.facts.documents < 80
    assert said[:-1] == documents_in(found.train)[: len(said) - 1]


@settings(max_examples=12)
@given(st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(rng: random.Random) -> None:
    documents = [Document(text) for text in [*texts(60), *(text.upper() for text in texts(20))]]
    shuffled = rng.sample(documents, len(documents))
    with tempfile.TemporaryDirectory() as place:
        first, second = made(documents, Path(place) / "a"), made(shuffled, Path(place) / "b")
        assert first.digest == second.digest
        assert first.facts.alike == 20


def test_alike_texts_are_one_and_never_on_both_sides(tmp_path: Path) -> None:
    rng = random.Random(3)
    originals = texts(80)
    changes: list[Callable[[str], str]] = [
        str.upper,
        lambda text: f"  {text.replace(' ', '   ')}\n",
        lambda text: f"{text}!",
        lambda text: text.replace("a", "ａ"),
        lambda text: text.replace(" ", ", "),
    ]
    copies = [rng.choice(changes)(text) for text in originals for _ in range(4)]
    everything = rng.sample([*originals, *copies], 400)
    found = made(map(Document, everything), tmp_path / "c", held_out=0.4)
    assert found.facts.alike == 320
    sides = [{Document(text).likeness for text in documents_in(rows)[:-1]} for rows in (found.train, found.held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) + len(sides[1]) >= 77


def test_a_text_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    few, many = (made(map(Document, texts(count)), tmp_path / str(count)) for count in (60, 300))
    sides = [(set(documents_in(rows)[:-1]) for rows in (found.train, found.held_out)) for found in (few, many)]
    (few_learnt, few_held), (many_learnt, many_held) = sides
    assert len(few_learnt & many_learnt) > 30
    assert len(few_held & many_held) > 5
    assert not few_learnt & many_held
    assert not few_held & many_learnt


def test_answers_to_one_prompt_are_on_one_side(tmp_path: Path) -> None:
    documents = [Document(f"{answer}", f"Prompt {n}?") for n in range(40) for answer in ("yes", "no", "maybe so")]
    found = made(documents, tmp_path / "c", held_out=0.3)
    assert found.facts.alike == 0
    prompts = [
        {text.split("user\n")[1].split("assistant\n")[0] for text in documents_in(rows)[1:-1] if "assistant\n" in text}
        for rows in (found.train, found.held_out)
    ]
    assert prompts[0]
    assert prompts[1]
    assert prompts[0].isdisjoint(prompts[1])


def test_a_conversation_is_as_the_teacher_has_it() -> None:
    tokenizer = FILES.opened()
    chat = tokenizer.chat((Message("user", "Hi"),))
    assert ENCODER(Document("yo", "Hi")) == [*chat, *tokenizer.encode("yo"), TURN_END]
    assert ENCODER(Document("yo", "Hi", cut=True)) == [*chat, *tokenizer.encode("yo")]
    assert ENCODER(Document("yo")) == tokenizer.encode("yo")
    assert (ENCODER.end, ENCODER.turn_end) == (END, TURN_END)


def test_a_model_with_bos_has_it_once() -> None:
    config = msgspec.structs.replace(FILES.config, add_bos=True)
    encoder = Encoder.of(TokenizerFiles(FILES.core, config, FILES.template))
    assert encoder(Document("yo"))[0] == END
    assert encoder(Document("yo", "Hi")).count(END) == 1
    assert encoder.digest != ENCODER.digest


def test_the_limit_is_of_what_is_learnt_and_takes_from_all(tmp_path: Path) -> None:
    whole = made(map(Document, texts(400)), tmp_path / "whole")
    part = made(map(Document, texts(400)), tmp_path / "part", limit_tokens=40 * LENGTH)
    assert part.train.shape == (40, LENGTH)
    assert part.held_out.shape == (10, LENGTH), "0.2 / 0.8 of it"
    assert np.array_equal(part.train, whole.train[:40])
    numbers = [int("".join(c for c in text if c.isdigit()) or 0) for text in documents_in(part.train)]
    assert max(numbers) > 300


def test_a_corpus_that_is_there_is_taken(tmp_path: Path) -> None:
    told: list[str] = []

    def documents() -> Iterable[Document]:
        told.append("read")
        yield from map(Document, texts(100))

    first = made(documents(), tmp_path / "c", recipe="r")
    assert made(documents(), tmp_path / "c", recipe="r").digest == first.digest
    assert told == ["read"]
    assert made(documents(), tmp_path / "c", recipe="r", length=8).train.shape[1] == 8
    assert made(documents(), tmp_path / "c", recipe="other").facts.recipe == "other"
    assert told == ["read"] * 3


def test_a_killed_build_begins_again(tmp_path: Path) -> None:
    first = made(map(Document, texts(100)), tmp_path / "c")

    def broken() -> Iterable[Document]:
        yield from map(Document, texts(50))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(broken(), tmp_path / "c", recipe="new")
    assert Corpus.open(tmp_path / "c").digest == first.digest
    (tmp_path / ".c.partial").mkdir()
    (tmp_path / ".c.partial" / "train.i32").write_bytes(b"half")
    assert made(map(Document, texts(50)), tmp_path / "c", recipe="new").facts.recipe == "new"
    (tmp_path / "c").rename(tmp_path / ".c.replaced")  # killed between two renames
    with pytest.raises(KeyboardInterrupt):
        made(broken(), tmp_path / "c", recipe="newer")
    assert Corpus.open(tmp_path / "c").facts.recipe == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_full_disk_leaves_the_old_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(map(Document, texts(100)), tmp_path / "c")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus, "_pack", full)
    with pytest.raises(StorageError, match=r"c could not be written: the disk is full \(make room"):
        made(map(Document, texts(100)), tmp_path / "c", recipe="new")
    assert Corpus.open(tmp_path / "c").digest == first.digest
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_damage_is_found(tmp_path: Path) -> None:
    made(map(Document, texts(100)), tmp_path / "c")
    rows = bytearray((tmp_path / "c" / "train.i32").read_bytes())
    rows[40] ^= 1
    (tmp_path / "c" / "train.i32").write_bytes(rows)
    with pytest.raises(SourceError, match=r"are not those that its corpus\.json is of"):
        Corpus.open(tmp_path / "c")
    (tmp_path / "c" / "train.i32").write_bytes(rows[:-4])
    with pytest.raises(SourceError, match="bytes"):
        Corpus.open(tmp_path / "c")
    facts = json.loads((tmp_path / "c" / "corpus.json").read_bytes())
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(SourceError, match="format 2, this version reads 1"):
        Corpus.open(tmp_path / "c")
    with pytest.raises(SourceError, match="holds no corpus"):
        Corpus.open(tmp_path)
    assert len(made(map(Document, texts(100)), tmp_path / "c").train)


def test_too_little_text_says_how_much(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the text to learn from has 3 tokens, one row has 16"):
        made([Document("ii")], tmp_path / "c", held_out=1e-9)
    with pytest.raises(UsageError, match=r"held out has 0 tokens, one row has 16 \(.*larger held_out"):
        made(map(Document, texts(50)), tmp_path / "c", held_out=1e-9)
    assert list(tmp_path.iterdir()) == []


def write(file: Path, content: str, *, packed: bool = False) -> Path:
    opened = gzip.open if packed else open
    with opened(file, "wt", encoding="utf-8") as out:
        out.write(content)
    return file


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_each_kind(packed: bool, tmp_path: Path) -> None:
    end = ".gz" if packed else ""
    text = write(tmp_path / f"t.txt{end}", "one\nline\n\n \n\ntwo\n", packed=packed)
    rows = [{"prompt": "p", "completion": "c", "n": 1}, {"prompt": "q", "completion": "d", "n": 2}]
    lines = write(tmp_path / f"t.jsonl{end}", "\n".join(map(json.dumps, rows)) + "\n\n", packed=packed)
    pairs = gathered(text=[text], jsonl=[lines], fields=("prompt", "completion"))
    assert {name: list(documents) for name, documents in pairs.sources.items()} == {
        text.name: [Document("one\nline"), Document("two")],
        lines.name: [Document("c", "p"), Document("d", "q")],
    }
    alone = gathered(jsonl=[lines], fields=("completion",))
    assert list(alone.sources[lines.name]) == [Document("c"), Document("d")]
    digests = {pairs.digest, alone.digest, gathered(text=[text]).digest}
    assert len(digests) == 3
    assert gathered(text=[text]).digest in digests


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in "ab":
        (tmp_path / place).mkdir()
        write(tmp_path / place / "t.txt", place)
    found = gathered(text=[tmp_path / "a" / "t.txt", tmp_path / "b" / "t.txt"])
    assert {name: list(documents) for name, documents in found.sources.items()} == {
        "t.txt": [Document("a")],
        "t.txt #2": [Document("b")],
    }


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"text": "a"}\n{"other": "b"}', "line 2 of .* is no JSON object with text: KeyError"),
        ('{"text": 5}', "line 1 of .* has '5' where a text is needed"),
        ('{"text": null}', "line 1 of .* has 'None' where a text is needed"),
        ('{"text": 0}', "line 1 of .* has '0' where a text is needed"),
        ('{"text": "a \\ud800"}', "line 1 of .* where a text is needed"),
        ("[1]", "line 1"),
        ("nonsense", "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_lines_that_are_no_documents_are_named(content: str, why: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", content)
    with pytest.raises(SourceError, match=why):
        list(gathered(jsonl=[file]).sources["t.jsonl"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.txt cannot be read"):
        gathered(text=[tmp_path / "nowhere.txt"])
    (tmp_path / "latin.txt").write_bytes("one\n\nzw\xf6lf".encode("latin-1"))
    with pytest.raises(SourceError, match=r"latin\.txt cannot be read behind line"):
        list(gathered(text=[tmp_path / "latin.txt"]).sources["latin.txt"])
    data = bytearray(gzip.compress(random.Random(0).randbytes(4000).hex().encode()))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "t.txt.gz").write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.txt\.gz cannot be read behind line"):
        list(gathered(text=[tmp_path / "t.txt.gz"]).sources["t.txt.gz"])
    whole = write(tmp_path / "t.txt.gz", "x\n" * 9999, packed=True).read_bytes()
    (tmp_path / "t.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(SourceError, match="plain or compressed"):
        list(gathered(text=[tmp_path / "t.txt.gz"]).sources["t.txt.gz"])
    with pytest.raises(UsageError, match="3 fields are named, a, b, c"):
        list(gathered(jsonl=[write(tmp_path / "t.jsonl", "{}")], fields=("a", "b", "c")).sources["t.jsonl"])


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, dict[str, Any]]] = []
    place = tmp_path / "snapshot"
    (place / "data").mkdir(parents=True)

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SourceError, match=r"owner/set has no file of the kind \*\.txt"):
        gathered(hub="owner/set")
    write(place / "data" / "b.jsonl.gz", '{"text": "b"}', packed=True)
    write(place / "a.txt", "a")
    found = gathered(hub="owner/set")
    assert [list(documents) for documents in found.sources.values()] == [[Document("a")], [Document("b")]]
    assert asked[0] == (
        "owner/set",
        {"repo_type": "dataset", "allow_patterns": ["*.txt", "*.jsonl", "*.txt.gz", "*.jsonl.gz"]},
    )

    def offline(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network, and nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Unreachable, match="owner/set could not be downloaded: no network"):
        gathered(hub="owner/set")


def test_answers_go_on_where_they_were_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Decoder(FakeTokenModel(), FakeTokenizer())
    asked: list[Request] = []
    real = answers.answers

    async def watched(its: Any, requests: Sequence[Request], **options: Any) -> Any:
        asked.extend(requests)
        return await real(its, requests, **options)

    monkeypatch.setattr(answers, "answers", watched)
    monkeypatch.setattr(answers, "TOGETHER", 4)
    prompts = ["What is a bad egg?", "And a cab?", "Who?"]
    call: dict[str, Any] = {"at_once": 2, "max_tokens": 5, "temperature": 0.7, "seed": 9}
    whole = written(generator, prompts, tmp_path / "whole.jsonl", count=10, **call)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompts[n % 3] for n in range(10)]
    seeds = [request.sampling.seed for request in asked]
    assert len(set(seeds)) == 10
    assert {(request.sampling.temperature, request.max_tokens) for request in asked} == {(0.7, 5)}
    file = written(generator, prompts, tmp_path / "part.jsonl", count=6, **call)
    with file.open("a") as out:
        out.write('{"prompt": "What is a b')  # killed while it wrote
    asked.clear()
    written(generator, prompts, file, count=10, **call)
    assert file.read_bytes() == whole.read_bytes()
    assert len(asked) == 4
    with pytest.raises(UsageError, match="asked for otherwise"):
        written(generator, prompts, file, count=10, **call | {"seed": 8})
    documents = list(gathered(answers=file).sources["part.jsonl"])
    assert [document.prompt for document in documents] == [prompts[n % 3] for n in range(10)]
    assert {document.cut for document in documents} == {row["cut"] for row in rows}


def test_fewer_answers_than_there_are_is_a_no(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"prompt": "a", "answer": "b", "cut": false}\n' * 3)
    call = {"format": 1, "generator": "g", "max_tokens": 4, "temperature": 0.0, "seed": 0}
    call["prompts"] = hashlib.sha256(json.dumps(["a"]).encode()).hexdigest()
    write(tmp_path / "a.jsonl.call.json", json.dumps(call))
    with pytest.raises(UsageError, match="holds 3 answers already, 2 are wanted"):
        written(FakeGenerator(name="g"), ["a"], file, count=2, at_once=1, max_tokens=4, temperature=0.0)


def test_prompts_are_lines_or_jsonl(tmp_path: Path) -> None:
    assert prompts_of(write(tmp_path / "p.txt", "one\n\ntwo \none\n")) == ["one", "two"]
    assert prompts_of(write(tmp_path / "p.jsonl", '{"prompt": "a\\nb", "source": 1}\n')) == ["a\nb"]
    assert prompts_of(write(tmp_path / "p.jsonl", '{"prompt": "a\u2028b"}\n')) == ["a\u2028b"]
    wrong = {"": "has no prompts", '{"p": 1}': "cannot be read", '{"prompt": 1}': "is 1", '{"prompt": null}': "is None"}
    for content, why in wrong.items():
        with pytest.raises(SourceError, match=why):
            prompts_of(write(tmp_path / "p.jsonl", content))
