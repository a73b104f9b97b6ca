"""Smaller vocabularies against `tokenizers`: every text, with every size."""

from __future__ import annotations

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import processors
from transformers import AutoTokenizer

from edgewise.compress.student.vocabulary import Vocabulary, counted, pruned
from edgewise.errors import UnsupportedModel, UsageError
from edgewise.models.from_gguf import GGUFSource
from edgewise.models.gguf import GGUF
from edgewise.models.tokenizer import BYTES
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.models.tokenizer_writer import write_from_gguf, write_from_hf
from edgewise.types import Message
from vocabularies import SPECIALS, byte_level_gguf, sentencepiece_gguf, strings

TEXTS = strings(400, seed=3)
RULES = ("smollm", "llama-bpe")  # the second one takes words whole that no merge leads to


@pytest.fixture(scope="module", params=RULES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    return made(request.param, tmp_path_factory.mktemp("vocabulary"))


def made(rule: str, directory: Path, **options: Any) -> TokenizerFiles:
    write_from_gguf(GGUF.open(byte_level_gguf(directory / "v.gguf", rule, **options)), directory)
    return TokenizerFiles.read(directory)


@cache
def smaller(files: TokenizerFiles, size: int) -> Vocabulary:
    return pruned(files, counted(files, TEXTS), size)


def least(files: TokenizerFiles) -> int:
    return 256 + len(SPECIALS)


def model_of(files: TokenizerFiles) -> dict[str, Any]:
    return dict(json.loads(files.core)["model"])


@pytest.mark.parametrize("size", [259, 300, 600, 1200])
def test_every_text_has_the_bytes_that_it_had(files: TokenizerFiles, size: int) -> None:
    whole, part = files.opened(), smaller(files, size).files.opened()
    for text in strings(600, seed=11):
        assert part.decode(part.encode(text)) == whole.decode(whole.encode(text)) == without_specials(text)


def without_specials(text: str) -> str:
    return re.sub("|".join(map(re.escape, SPECIALS)), "", text)


@settings(max_examples=60)
@given(text=st.text(), size=st.sampled_from([259, 280, 500, 900]))
def test_any_text_whatever(text: str, size: int) -> None:
    vocabulary = smaller(_shared(), size)
    part, core = vocabulary.files.opened(), Core.from_str(vocabulary.files.core)
    ids = part.encode(text)
    assert ids == core.encode(text, add_special_tokens=False).ids
    assert all(0 <= id < size for id in ids)
    raw = b"".join(part.token_bytes(id) for id in ids)
    assert raw.decode() == text or any(special in text for special in SPECIALS)
    assert [_shared_core().id_to_token(int(vocabulary.kept[id])) for id in ids] == [core.id_to_token(id) for id in ids]


@cache
def _shared() -> TokenizerFiles:
    with tempfile.TemporaryDirectory() as place:
        return made("smollm", Path(place))


@cache
def _shared_core() -> Core:
    return Core.from_str(_shared().core)


@pytest.mark.parametrize("size", [259, 400, 1000])
def test_it_is_closed_and_in_order(files: TokenizerFiles, size: int) -> None:
    vocabulary = smaller(files, size)
    old, new = model_of(files), model_of(vocabulary.files)
    assert len(vocabulary.kept) == size
    assert (np.diff(vocabulary.kept) > 0).all()
    by_id = {id: text for text, id in old["vocab"].items()}
    assert [by_id[int(id)] for id in vocabulary.kept] == sorted(new["vocab"], key=new["vocab"].__getitem__)
    assert set(BYTES) | set(SPECIALS) <= new["vocab"].keys()
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in old["merges"]]
    kept = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in new["merges"]]
    assert kept == [merge for merge in merges if "".join(merge) in new["vocab"]], "with a token its parts are there"
    assert vocabulary.files.config.vocabulary == size


def test_with_all_tokens_nothing_changes(files: TokenizerFiles) -> None:
    vocabulary = smaller(files, 10**6)
    assert np.array_equal(vocabulary.kept, np.arange(files.config.vocabulary))
    assert vocabulary.files.config == files.config
    assert json.loads(vocabulary.files.core) == json.loads(files.core)


def test_what_is_used_stays(files: TokenizerFiles) -> None:
    counts = counted(files, TEXTS)
    lengths = [sum(counted(smaller(files, size).files, TEXTS)) for size in (259, 400, 700, 1100, 10**6)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 1.2 * lengths[-1]
    kept = set(smaller(files, 700).kept.tolist())
    by_chance = np.random.default_rng(0).permutation(counts)  # worth something else
    assert sum(counted(pruned(files, by_chance, 700).files, TEXTS)) > lengths[2]
    used = set(np.flatnonzero(counts).tolist())
    assert len(used & kept) > 0.9 * min(len(used), len(kept) - 258)


def test_a_token_costs_its_count(tmp_path: Path) -> None:
    """By hand: ab, abc and cd with counts 5, 1 and 3. abc goes first and gives its count to ab; then cd (3 < 6)."""
    files = made("smollm", tmp_path, size=256)
    content = json.loads(files.core)
    there = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {"ab": there, "abc": there + 1, "cd": there + 2}
    content["model"]["merges"] = ["a b", "ab c", "c d"]
    files = TokenizerFiles(json.dumps(content), msgspec.structs.replace(files.config, vocabulary=there + 3), None)
    counts = np.zeros(there + 3, np.int64)
    counts[there:] = 5, 1, 3
    tokens = [set(model_of(pruned(files, counts, size).files)["vocab"]) for size in (there + 2, there + 1, there)]
    assert [kept & {"ab", "abc", "cd"} for kept in tokens] == [{"ab", "cd"}, {"ab"}, set()]
    assert counts.tolist()[there:] == [5, 1, 3], "the counts given are not changed"


def test_bytes_that_the_model_lacks_stay_away(tmp_path: Path) -> None:
    files = made("smollm", tmp_path, leave_out="ÿþ")
    part, whole = pruned(files, counted(files, TEXTS), 500).files.opened(), files.opened()
    texts = ["x\u07ffy", *strings(200, seed=5)]
    assert [part.decode(part.encode(text)) for text in texts] == [whole.decode(whole.encode(text)) for text in texts]


def test_ids_of_special_tokens_follow(tmp_path: Path) -> None:
    files = made("smollm", tmp_path)
    core = Core.from_str(files.core)
    end = SPECIALS[2]
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, core.token_to_id(end))]),
        ]
    )
    config = msgspec.structs.replace(files.config, bos=core.token_to_id(end), add_bos=True)
    files = TokenizerFiles(
        core.to_str(), config, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    vocabulary = pruned(files, counted(files, TEXTS), 300)
    new = Core.from_str(vocabulary.files.core)
    assert new.encode("a").ids == [new.token_to_id(end), new.token_to_id("a")]
    tokenizer = vocabulary.files.opened()
    assert tokenizer.encode("a") == new.encode("a").ids
    assert tokenizer.chat((Message("user", "a"),)) == new.encode("a").ids
    assert tokenizer.stop_ids == {new.token_to_id(text) for text in SPECIALS[1:]}
    assert vocabulary.files.template == files.template
    (tmp_path / "hf").mkdir()
    vocabulary.files.write_huggingface(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("ab") == tokenizer.encode("ab")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    write_from_hf(tmp_path / "hf", tmp_path / "back")
    assert TokenizerFiles.read(tmp_path / "back").config == vocabulary.files.config


def test_too_few_and_other_kinds_are_refused(files: TokenizerFiles, tmp_path: Path) -> None:
    counts = counted(files, TEXTS)
    with pytest.raises(UsageError, match=rf"bytes and special tokens alone are {least(files)}"):
        pruned(files, counts, least(files) - 1)
    with pytest.raises(UsageError, match="another vocabulary"):
        pruned(files, counts[:-1], 500)
    pieces = TokenizerFiles.of_source(GGUFSource(sentencepiece_gguf(tmp_path / "s.gguf")))
    with pytest.raises(UnsupportedModel, match="byte-level BPE can"):
        pruned(pieces, counted(pieces, TEXTS), 500)
    content = json.loads(files.core)
    content["post_processor"] = {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}
    odd = TokenizerFiles(json.dumps(content), files.config, None)
    with pytest.raises(UnsupportedModel, match="BertProcessing"):
        pruned(odd, counts, 500)


def test_the_real_one(smollm2_gguf: Path) -> None:
    files = TokenizerFiles.of_source(GGUFSource(smollm2_gguf))
    texts = TEXTS[:100]
    part = pruned(files, counted(files, texts), 4000).files.opened()
    whole = files.opened()
    assert [part.decode(part.encode(text)) for text in texts] == [whole.decode(whole.encode(text)) for text in texts]
    assert part.chat((Message("user", "the word"),))[0] == whole.chat((Message("user", "the word"),))[0] == 1
