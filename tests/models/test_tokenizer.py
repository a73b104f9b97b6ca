from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer

from edgewise.errors import BundleError, ModelError, RequestError, SourceError, UnsupportedModel
from edgewise.models.gguf import GGUF
from edgewise.models.pretokenize import PRE_TOKENIZERS
from edgewise.models.tokenizer import CONFIG, TEMPLATE, TOKENIZER, Tokenizer
from edgewise.models.tokenizer_writer import _quick, write_from_gguf, write_from_hf
from edgewise.types import Message
from vocabularies import SPECIALS, LlamaTokenizer, byte_level_gguf, sentencepiece_gguf, strings

HELLO = (Message("user", "Hello"),)


def carried(gguf: Path, directory: Path) -> Tokenizer:
    write_from_gguf(GGUF.open(gguf), directory)
    return Tokenizer.open(directory)


def differing(tokenizer: Tokenizer, judge: LlamaTokenizer, texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """Texts whose ids are not llama.cpp's; BOS and EOS aside."""
    ours = [tokenizer._ids(text) for text in texts]
    return [(text, own, want) for text, own, want in zip(texts, ours, judge.many(texts), strict=True) if own != want]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return carried(smollm2_gguf, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def smollm2_judge(smollm2_gguf: Path) -> LlamaTokenizer:
    return LlamaTokenizer(smollm2_gguf)


def test_ten_thousand_strings_have_llama_cpps_ids(smollm2: Tokenizer, smollm2_judge: LlamaTokenizer) -> None:
    texts = strings(10_000, specials=(*SPECIALS, "<repo_name>", "<empty_output>"))
    assert len(set(texts)) > 9_500
    assert sum(any(special in text for special in SPECIALS) for text in texts) > 1_000
    assert differing(smollm2, smollm2_judge, texts) == []


def test_tokens_of_a_text_have_its_bytes(smollm2: Tokenizer, smollm2_judge: LlamaTokenizer) -> None:
    text = "Grüße 👩‍👩‍👧 你好\n\tpass  # नमस्ते"
    assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2_judge.pieces(text) == text.encode()
    assert b"".join(smollm2.token_bytes(id) for id in smollm2.encode(text)) == text.encode()
    assert all(smollm2.decode([id]) == "�" for id in smollm2.encode("👩")[1:]), "a part of a character"


def test_smollm2s_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.stop_ids == {0, 2}
    assert smollm2.encode("<|im_start|>user<|im_end|>")[:1] == [1]
    assert smollm2.token_bytes(2) == smollm2.token_bytes(49152) == smollm2.token_bytes(-1) == b""
    assert smollm2.decode(smollm2.chat(HELLO)).endswith("user\nHello\nassistant\n")


@pytest.mark.parametrize("pre", sorted({rule: name for name, rule in PRE_TOKENIZERS.items()}.values()))
def test_every_rule_cuts_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    gguf = byte_level_gguf(tmp_path / "v.gguf", pre)
    judge = LlamaTokenizer(gguf)
    tokenizer = carried(gguf, tmp_path / "out")
    assert differing(tokenizer, judge, strings(1_500)) == []
    assert tokenizer.encode("Hello") == judge.one("Hello"), "BOS"


def test_every_name_of_a_rule_is_llama_cpps(tmp_path: Path) -> None:
    texts = strings(40, seed=3)
    for pre in PRE_TOKENIZERS:
        gguf = byte_level_gguf(tmp_path / f"{pre}.gguf", pre, size=280)
        judge, tokenizer = LlamaTokenizer(gguf), carried(gguf, tmp_path / pre)
        assert differing(tokenizer, judge, texts) == [], pre
        assert tokenizer.encode("a") == judge.one("a"), pre


def test_merges_are_strings_where_those_are_clear(tmp_path: Path) -> None:
    carried(byte_level_gguf(tmp_path / "v.gguf", "gpt-2"), tmp_path / "bytes")
    merges = json.loads((tmp_path / "bytes" / "tokenizer.json").read_bytes())["model"]["merges"]
    assert merges
    assert all(isinstance(merge, str) for merge in merges)
    unclear = Core(models.BPE(vocab={"a": 0, " b": 1, "a b": 2}, merges=[("a", " b")])).to_str()
    assert _quick(unclear) == unclear
    comment = Core(models.BPE(vocab={"#version": 0, "a": 1, "#versiona": 2}, merges=[("#version", "a")])).to_str()
    assert _quick(comment) == comment


def test_bytes_without_a_token_part_their_neighbours(tmp_path: Path) -> None:
    missing = "".join(c for c in "ĀāĂă!-]\\^")
    gguf = byte_level_gguf(tmp_path / "v.gguf", "gpt-2", leave_out=missing)
    texts = [*strings(1_500, seed=5), "=\x00\x01="[2:] + "=\x02=", "\x03a\x03\x03b", "?!?-?]?^?\\?"]
    assert differing(carried(gguf, tmp_path / "out"), LlamaTokenizer(gguf), texts) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}],
    ids=["plain", "no space prefix", "EOS only"],
)
def test_sentencepiece_has_llama_cpps_ids(fields: dict[str, Any], tmp_path: Path) -> None:
    gguf = sentencepiece_gguf(tmp_path / "v.gguf", **fields)
    judge = LlamaTokenizer(gguf)
    tokenizer = carried(gguf, tmp_path / "out")
    assert differing(tokenizer, judge, strings(3_000, specials=(*SPECIALS, "</s>", "<unk>", "▁"))) == []
    for text in ("Hello", " Hello", "<|im_start|>a", ""):
        assert tokenizer.encode(text) == judge.one(text)


def test_sentencepiece_tokens_give_bytes(tmp_path: Path) -> None:
    tokenizer = carried(sentencepiece_gguf(tmp_path / "v.gguf", add_space_prefix=False), tmp_path / "out")
    text = " to \U00012345 the"
    ids = tokenizer._ids(text)
    assert tokenizer.decode(ids) == text
    assert {tokenizer.token_bytes(id) for id in ids} >= {b"\xf0", b"\x85"}, "byte tokens"
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(2) == b""
    assert tokenizer.decode(tokenizer._ids("<|endoftext|>")) == "", "names that end a turn are control tokens"


def test_stop_ids_and_bos_of_a_chat(tmp_path: Path) -> None:
    gguf = byte_level_gguf(tmp_path / "v.gguf", "gpt-2", add_bos_token=True)
    tokenizer = carried(gguf, tmp_path / "out")
    start, end, text = tokenizer._ids("".join(SPECIALS))
    assert tokenizer.stop_ids == {end, text}
    assert tokenizer.encode("a")[0] == start
    assert tokenizer.chat(HELLO)[:2] != [start, start], "the template wrote BOS itself"
    assert tokenizer.chat(HELLO)[0] == start


def test_lone_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at 2"):
        smollm2.encode("ab\ud800")


def fields_of(**changes: Any) -> Any:
    """A GGUF that has a tokenizer's fields and nothing else."""
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | changes
    given = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
    return SimpleNamespace(path=Path("v.gguf"), fields=MappingProxyType(given))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "t5"}, UnsupportedModel, "'t5'"),
        ({"model": None}, UnsupportedModel, "None"),
        ({"pre": "kimi-k2"}, UnsupportedModel, "'kimi-k2'.*llamacpp"),
        ({"pre": 7}, UnsupportedModel, "rule 7"),
        ({"tokens": None}, SourceError, "0 tokens"),
        ({"tokens": [1, 2]}, SourceError, "no list of texts"),
        ({"tokens": ["a", "a"]}, SourceError, "2 tokens, of which only 1"),
        ({"tokens": ["a" * 2000]}, SourceError, "2000 characters"),
        ({"merges": ["a c"]}, SourceError, "'a' and 'c'"),
        ({"merges": ["ab"]}, SourceError, "'ab' and ''"),
        ({"token_type": [1]}, SourceError, "no token_type"),
        ({"model": "llama"}, SourceError, "no scores"),
        ({"add_bos_token": True}, SourceError, "BOS"),
        ({"add_bos_token": True, "bos_token_id": 3}, SourceError, "BOS"),
    ],
)
def test_bad_vocabularies_are_refused(
    changes: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        write_from_gguf(fields_of(**changes), tmp_path)


def test_an_empty_token_keeps_its_place(tmp_path: Path) -> None:
    write_from_gguf(fields_of(tokens=["a", "", "b", "ab"], pre=None), tmp_path)
    assert Tokenizer.open(tmp_path).encode("ab") == [3]


def test_a_model_without_template_takes_no_messages(tmp_path: Path) -> None:
    write_from_gguf(fields_of(), tmp_path)
    with pytest.raises(RequestError, match="no chat template") as refused:
        Tokenizer.open(tmp_path).chat(HELLO)
    assert refused.value.param == "messages"


def test_a_broken_template_stops_the_import(tmp_path: Path) -> None:
    gguf = fields_of()
    gguf.fields = gguf.fields | {"tokenizer.chat_template": "{% for %}"}
    with pytest.raises(ModelError, match="not valid"):
        write_from_gguf(gguf, tmp_path)


@pytest.mark.parametrize("file", [TOKENIZER, CONFIG])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": "x"}', b"\xff", None])
def test_damaged_bundles_are_refused(file: str, content: bytes | None, tmp_path: Path) -> None:
    write_from_gguf(fields_of(), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(BundleError):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"bos": -1}, "bos"),
        ({"stop": [2**40]}, "stop"),
        ({"pieces": "words"}, "pieces"),
        ({"more": 1}, "more"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_from_gguf(fields_of(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(BundleError, match=words):
        Tokenizer.open(tmp_path)


# Hugging Face directories


def hugging_face(directory: Path, *, bos: bool = True, **files: Any) -> Path:
    """A directory as `save_pretrained` leaves it, with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={c: id for id, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(text, special=text != "<think>") for text in ("<s>", "<e>", "<|eot_id|>", "<think>")])
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    directory.mkdir()
    core.enable_truncation(8)
    core.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        name = name.replace("_json", ".json").replace("_jinja", ".jinja")
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def from_hf(source: Path, out: Path) -> Tokenizer:
    write_from_hf(source, out)
    return Tokenizer.open(out)


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    source = hugging_face(
        tmp_path / "hf",
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<e>",
            "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}"}],
        },
        generation_config_json={"eos_token_id": [257, 258, 9999, -1, 2**40, None, "x"]},
    )
    tokenizer = from_hf(source, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(source)
    text = "a text that is longer than eight tokens, <e> and <think> too"
    assert tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.encode("")[0] == 256
    assert tokenizer.stop_ids == {257, 258}
    assert tokenizer.vocab_size == 260
    assert tokenizer.token_bytes(259) == b"<think>"
    assert tokenizer.token_bytes(257) == b""
    assert (tmp_path / "out" / TEMPLATE).read_text() == "{{ eos_token }}"
    assert tokenizer.chat(HELLO) == [256, 257], "BOS once"


def test_settings_of_a_hugging_face_directory(tmp_path: Path) -> None:
    source = hugging_face(
        tmp_path / "hf",
        tokenizer_config_json={"add_bos_token": False, "chat_template": "old"},
        special_tokens_map_json={"bos_token": "<s>", "eos_token": {"content": "<e>"}},
        config_json={"eos_token_id": 5},
        chat_template_jinja="new",
    )
    tokenizer = from_hf(source, tmp_path / "out")
    assert tokenizer.encode("a")[0] != 256
    assert tokenizer.stop_ids == {5, 257, 258}
    assert (tmp_path / "out" / TEMPLATE).read_text() == "new"


def test_ids_of_the_models_configuration_are_the_last_resort(tmp_path: Path) -> None:
    tokenizer = from_hf(
        hugging_face(tmp_path / "hf", bos=False, config_json={"bos_token_id": 256, "eos_token_id": 257}),
        tmp_path / "out",
    )
    assert tokenizer.stop_ids == {257, 258}
    assert tokenizer.encode("!") == [0], "a known BOS is not added unless something asks for it"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token": "\\ud800"}', '{"a":' + "[" * 100_000])
def test_damaged_hugging_face_files_are_refused(name: str, content: str, tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "hf")
    (source / name).write_text(content)
    with pytest.raises(SourceError, match=name):
        write_from_hf(source, tmp_path / "out")


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "hf")
    (source / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(SourceError, match="UTF-8"):
        write_from_hf(source, tmp_path / "out")


def test_other_kinds_of_hugging_face_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UnsupportedModel, match=r"has no tokenizer\.json"):
        write_from_hf(tmp_path / "none", tmp_path / "out")
    core = Core(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    core.save(str(tmp_path / "none" / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        write_from_hf(tmp_path / "none", tmp_path / "out")
