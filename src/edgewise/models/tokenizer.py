"""Text to token ids and back, for one bundle.

A bundle has `tokenizer.json` (the format of the `tokenizers` library), `tokenizer_config.json` (ours, see
docs/formats/tokenizer.md) and, if the model has one, `chat_template.jinja`. tokenizer_writer.py makes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from tokenizers import Tokenizer as Core

from edgewise.errors import BundleError, RequestError
from edgewise.types import Message

if TYPE_CHECKING:
    from edgewise.models.chat import ChatTemplate

FORMAT: Final = 1
TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"

MAX_ID: Final = 2**31 - 1

SPACE: Final = "▁"  # SentencePiece's mark for a space
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write for bytes: most Latin-1 letters stand for
    themselves, the other bytes follow from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(moved)}


BYTES: Final = _byte_characters()


Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tokenizer_config.json` of a bundle."""

    format: int
    vocabulary: Id  # highest token id + 1
    pieces: Literal["byte_level", "sentencepiece"]  # how the text of a token maps to bytes
    bos: Id | None
    eos: Id | None
    add_bos: bool
    add_eos: bool
    stop: tuple[Id, ...]  # ids that end an answer


class Tokenizer:
    """A bundle's tokenizer (the `Tokenizer` protocol of engines/base.py). Safe for concurrent use."""

    def __init__(self, core: Core, config: Config, template: str | None) -> None:
        self.stop_ids = frozenset(config.stop)
        self.vocab_size = config.vocabulary
        self._core = core
        self._config = config
        self._source = template
        added = core.get_added_tokens_decoder()
        self._added = {id: b"" if token.special else self._plain(token.content) for id, token in added.items()}

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """BundleError if a file is missing, damaged or of another format."""
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
        return cls(core, config, source)

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens written out in it become their ids; BOS and EOS are added if the model
        says so. RequestError for text that is not Unicode (a lone surrogate)."""
        after = [self._config.eos] if self._config.add_eos and self._config.eos is not None else []
        return [*self.start_ids, *self._ids(text), *after]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation in the model's own form, up to where the answer begins, with BOS at most once.
        RequestError if the template refuses the messages or there is none, ModelError
        if it cannot be compiled."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template and no ChatML tokens, so it cannot take messages",
                param="messages",
                hint="use an instruction-tuned model",
            )
        ids = self._ids(self._template.render(messages))
        bos = self._config.bos
        return [bos, *ids] if self._config.add_bos and bos is not None and ids[:1] != [bos] else ids

    def continued(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one: as `encode`, without BOS and EOS."""
        return self._ids(text)

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What `encode` begins every text with: BOS, or nothing."""
        return (self._config.bos,) if self._config.add_bos and self._config.bos is not None else ()

    @property
    def chats(self) -> bool:
        """Whether `chat` has a form for conversations. ModelError if the template cannot be compiled."""
        return self._template is not None

    def piece(self, token_id: int) -> str | None:
        """How the vocabulary writes the token; None for ids without one."""
        return self._core.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a generated token adds to the answer, perhaps a part of a character; b"" for control tokens
        and for ids without a token (models often have more logits than tokens)."""
        if token_id in self._added:
            return self._added[token_id]
        text = self.piece(token_id)
        if text is None:
            return b""
        return _byte_level(text) if self._config.pieces == "byte_level" else self._plain(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the tokens make, as a stream of their bytes; what is no UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The model's own template, else ChatML if the vocabulary has its tokens. Anything else would be a guess.
        Compiled when it is first wanted: jinja takes its time, and plain completions do without."""
        from edgewise.models.chat import CHATML, ChatTemplate

        source, config = self._source, self._config
        if source is None and None not in map(self._core.token_to_id, ("<|im_start|>", "<|im_end|>")):
            source = CHATML
        if source is None:
            return None
        bos, eos = (None if id is None else self._core.id_to_token(id) for id in (config.bos, config.eos))
        return ChatTemplate(source, bos=bos, eos=eos)

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
        return bytes.fromhex(byte[1]) if byte else text.replace(SPACE, " ").encode()


def _byte_level(text: str) -> bytes:
    return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in text)
