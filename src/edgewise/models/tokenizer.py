"""Text to token ids and back, for one bundle.

`write_from_gguf` and `write_from_hf` put `tokenizer.json` (the format of the `tokenizers` library),
`tokenizer_config.json` (ours, see docs/formats/tokenizer.md) and, if the model has one, `chat_template.jinja` into a
bundle; `Tokenizer.open` reads them. From a GGUF the ids are those of llama.cpp, token for token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from edgewise.errors import BundleError, ModelError, RequestError, SourceError, UnsupportedModel
from edgewise.models.chat import CHATML, ChatTemplate
from edgewise.models.gguf import GGUF
from edgewise.models.pretokenize import PRE_TOKENIZERS
from edgewise.types import Message

FORMAT: Final = 1
TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"

# Tokens that end a turn or a text in the published families. Files often name only one of the two as their EOS.
TURN_ENDS: Final = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <end_of_utterance> "
    "<|return|> <|call|> </s> <eos> <EOT> [EOT] <｜end▁of▁sentence｜>".split()
)

_SPACE: Final = "▁"  # SentencePiece's mark for a space
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type; 5 is unused, 6 a byte
_OTHER_ENGINE: Final = "run the GGUF file with the llamacpp engine"


def _byte_characters() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write for bytes: most Latin-1 letters stand for
    themselves, the other bytes follow from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(moved)}


_BYTES: Final = _byte_characters()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tokenizer_config.json` of a bundle."""

    format: int
    vocabulary: int  # highest token id + 1
    pieces: Literal["byte_level", "sentencepiece"]  # how the text of a token maps to bytes
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    stop: tuple[int, ...]  # ids that end an answer


class Tokenizer:
    """A bundle's tokenizer (the `Tokenizer` protocol of engines/base.py). Safe for concurrent use."""

    def __init__(self, core: Core, config: Config, template: ChatTemplate | None) -> None:
        self.stop_ids = frozenset(config.stop)
        self.vocab_size = config.vocabulary
        self._core = core
        self._config = config
        self._template = template
        added = core.get_added_tokens_decoder()
        self._added = {id: b"" if token.special else self._plain(token.content) for id, token in added.items()}

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """BundleError if a file is missing, damaged or of another format; ModelError for a bad chat template."""
        try:
            config = msgspec.json.decode((directory / CONFIG).read_bytes(), type=Config)
            core = Core.from_buffer((directory / TOKENIZER).read_bytes())
            template = directory / TEMPLATE
            source = template.read_bytes().decode() if template.is_file() else None
        except Exception as error:  # `tokenizers` raises bare Exception
            raise BundleError(
                f"the tokenizer in {directory} cannot be read: {error}", hint="pull the model again"
            ) from error
        if config.format != FORMAT:
            raise BundleError(f"{CONFIG} has format {config.format}, this version reads {FORMAT}", hint="pull again")
        core.no_padding()
        core.no_truncation()
        return cls(core, config, _template(core, config, source))

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens written out in it become their ids; BOS and EOS are added if the model
        says so. RequestError for text that is not Unicode (a lone surrogate)."""
        before = [self._config.bos] if self._config.add_bos and self._config.bos is not None else []
        after = [self._config.eos] if self._config.add_eos and self._config.eos is not None else []
        return before + self._ids(text) + after

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation in the model's own form, up to where the answer begins, with BOS at most once.
        RequestError if the template refuses the messages or there is none."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template and no ChatML tokens, so it cannot take messages",
                param="messages",
                hint="use an instruction-tuned model",
            )
        ids = self._ids(self._template.render(messages))
        bos = self._config.bos
        return [bos, *ids] if self._config.add_bos and bos is not None and ids[:1] != [bos] else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a generated token adds to the answer, perhaps a part of a character; b"" for control tokens
        and for ids without a token (models often have more logits than tokens)."""
        if token_id in self._added:
            return self._added[token_id]
        text = self._core.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if text is None:
            return b""
        return _byte_level(text) if self._config.pieces == "byte_level" else self._plain(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the tokens make, as a stream of their bytes; what is no UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at {error.start}",
                param="messages",
                hint="send valid Unicode",
            ) from error
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def _plain(self, text: str) -> bytes:
        if self._config.pieces == "byte_level":
            return text.encode()
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.replace(_SPACE, " ").encode()


def _byte_level(text: str) -> bytes:
    return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in text)


def _template(core: Core, config: Config, source: str | None) -> ChatTemplate | None:
    """The model's own template, else ChatML if the vocabulary has its tokens. Anything else would be a guess."""
    if source is None and None not in (core.token_to_id("<|im_start|>"), core.token_to_id("<|im_end|>")):
        source = CHATML
    if source is None:
        return None
    text = lambda id: None if id is None else core.id_to_token(id)
    return ChatTemplate(source, bos=text(config.bos), eos=text(config.eos))


def _write(directory: Path, tokenizer: str, config: Config, template: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENIZER).write_bytes(tokenizer.encode())
    (directory / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
    if template is not None:
        ChatTemplate(template)  # a bundle whose template cannot be compiled is not worth making
        (directory / TEMPLATE).write_bytes(template.encode())


# GGUF


def write_from_gguf(gguf: GGUF, directory: Path) -> None:
    """Write the tokenizer files of a bundle. SourceError for damaged vocabularies, UnsupportedModel for kinds that
    llama.cpp has and we have not."""
    vocabulary = _Vocabulary(gguf)
    kind = gguf.fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        core, add_bos = vocabulary.byte_level()
    elif kind == "llama":
        core, add_bos = vocabulary.sentencepiece()
    else:
        raise UnsupportedModel(
            f"{gguf.path.name} has a tokenizer of the kind {kind!r}, carried are 'gpt2' and 'llama'", hint=_OTHER_ENGINE
        )
    core.add_tokens(vocabulary.added())
    sentencepiece = kind == "llama"
    config = Config(
        format=FORMAT,
        vocabulary=len(vocabulary.tokens),
        pieces="sentencepiece" if sentencepiece else "byte_level",
        bos=vocabulary.id("bos", 1 if sentencepiece else None),
        eos=vocabulary.id("eos", 2 if sentencepiece else None),
        add_bos=vocabulary.flag("add_bos_token", add_bos),
        add_eos=vocabulary.flag("add_eos_token", False),
        stop=vocabulary.stop_ids(),
    )
    if (config.add_bos and config.bos is None) or (config.add_eos and config.eos is None):
        raise vocabulary.broken("asks for BOS or EOS around a text, but names no such token")
    template = gguf.fields.get("tokenizer.chat_template")
    _write(directory, core.to_str(), config, template if isinstance(template, str) else None)
