"""The tokenizer files of a bundle, from a GGUF file or a Hugging Face directory. From a GGUF the ids are those of
llama.cpp, token for token."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models.chat import ChatTemplate
from edgewise.models.gguf import GGUF
from edgewise.models.pretokenize import PRE_TOKENIZERS
from edgewise.models.tokenizer import BYTES, CONFIG, FORMAT, MAX_ID, SPACE, TEMPLATE, TOKENIZER, Config

# Tokens that end a turn or a text in the published families. Files often name only one of the two as their EOS.
_TURN_ENDS = (
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <end_of_utterance> "
    "</s> <eos> <EOT> [EOT] <｜end▁of▁sentence｜>"
)
TURN_ENDS: Final = frozenset(_TURN_ENDS.split())

MAX_TOKEN_CHARS: Final = 1024  # SentencePiece's merges look at every way to cut a token in two
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type; 5 and 6 are found by merging
_OTHER_ENGINE: Final = "run the GGUF file with the llamacpp engine"


def _write(directory: Path, tokenizer: str, config: Config, template: str | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENIZER).write_bytes(tokenizer.encode())
    (directory / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
    if template is not None:
        ChatTemplate(template)  # a bundle whose template cannot be compiled is not worth making
        (directory / TEMPLATE).write_bytes(template.encode())


def write_from_gguf(gguf: GGUF, directory: Path) -> None:
    """Write the tokenizer files of a bundle. SourceError for damaged vocabularies, UnsupportedModel for kinds that
    llama.cpp has and we have not."""
    kind = gguf.fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        vocabulary: _Vocabulary = _ByteLevel(gguf)
    elif kind == "llama":
        vocabulary = _SentencePiece(gguf)
    else:
        raise UnsupportedModel(
            f"{gguf.path.name} has a tokenizer of the kind {kind!r}, carried are 'gpt2' and 'llama'", hint=_OTHER_ENGINE
        )
    core = vocabulary.core()
    core.add_tokens(vocabulary.added_tokens())
    template = gguf.fields.get("tokenizer.chat_template")
    _write(directory, _quick(core.to_str()), vocabulary.config(), template if isinstance(template, str) else None)


def _quick(tokenizer: str) -> str:
    """The same `tokenizer.json` with its merges as strings, which load in less time than pairs of strings. Only pairs
    are clear if a token has a space in it, and lines that begin with #version are skipped as comments."""
    content = json.loads(tokenizer)
    merges = content["model"]["merges"]
    if any(" " in part or part.startswith("#version") for pair in merges for part in pair):
        return tokenizer
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


class _Vocabulary(ABC):
    """The `tokenizer.ggml.*` fields of a GGUF file, checked. What is missing is what llama.cpp takes it to be."""

    pieces: Literal["byte_level", "sentencepiece"]
    bos: int | None = None
    eos: int | None = None
    add_bos = False

    def __init__(self, gguf: GGUF) -> None:
        self.fields = gguf.fields
        self.file = gguf.path.name
        self.tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(self.texts("tokens"))]
        self.ids = {text: id for id, text in enumerate(self.tokens)}
        if len(self.ids) < max(len(self.tokens), 1):
            raise self.broken(f"has {len(self.tokens)} tokens, of which only {len(self.ids)} differ")
        longest = max(self.tokens, key=len)
        if len(longest) > MAX_TOKEN_CHARS:
            raise self.broken(f"has a token of {len(longest)} characters, at most {MAX_TOKEN_CHARS} are allowed")
        self.types = self.numbers("token_type") if "tokenizer.ggml.token_type" in self.fields else None

    @abstractmethod
    def core(self) -> Core:
        """The tokenizer of this vocabulary."""

    def broken(self, what: str) -> SourceError:
        return SourceError(f"the tokenizer of {self.file} {what}", hint="the file is damaged: download it again")

    def texts(self, key: str) -> list[str]:
        value = self.fields.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.broken(f"has {key} that are no list of texts")
        return value

    def numbers(self, key: str) -> npt.NDArray[np.generic]:
        """One number per token."""
        value = self.fields.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, np.ndarray) or len(value) < len(self.tokens):
            raise self.broken(f"has no {key} for each of its {len(self.tokens)} tokens")
        return value

    def id(self, name: str, default: int | None = None) -> int | None:
        value = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        candidates = (value, default)
        return next((id for id in candidates if isinstance(id, int) and 0 <= id < len(self.tokens)), None)

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(f"tokenizer.ggml.{name}")
        return value if isinstance(value, bool) else default

    def added_tokens(self) -> list[AddedToken]:
        """Tokens that are found in a text before anything else is. Those that end a turn are control tokens even
        where a file calls them normal."""
        kinds = np.full(len(self.tokens), _NORMAL) if self.types is None else self.types[: len(self.tokens)].copy()
        for text in TURN_ENDS & self.ids.keys():
            kinds[self.ids[text]] = _CONTROL
        return [
            AddedToken(self.tokens[id], special=bool(kinds[id] != _USER_DEFINED), normalized=False)
            for id in np.flatnonzero(np.isin(kinds, (_UNKNOWN, _CONTROL, _USER_DEFINED)))
        ]

    def config(self) -> Config:
        config = Config(
            format=FORMAT,
            vocabulary=len(self.tokens),
            pieces=self.pieces,
            bos=self.id("bos", self.bos),
            eos=self.id("eos", self.eos),
            add_bos=self.flag("add_bos_token", self.add_bos),
            add_eos=self.flag("add_eos_token", False),
            stop=self.stop_ids(),
        )
        if (config.add_bos and config.bos is None) or (config.add_eos and config.eos is None):
            raise self.broken("wants BOS or EOS around a text, but names no such token")
        return config

    def stop_ids(self) -> tuple[int, ...]:
        named = (self.id("eos", self.eos), self.id("eot"), self.id("eom"))
        ends = {self.ids[text] for text in TURN_ENDS & self.ids.keys()}
        return tuple(sorted(ends | {id for id in named if id is not None}))


class _ByteLevel(_Vocabulary):
    """GPT-2's kind: words are cut by patterns, their bytes merged by rank."""

    pieces = "byte_level"

    def __init__(self, gguf: GGUF) -> None:
        super().__init__(gguf)
        name = self.fields.get("tokenizer.ggml.pre", "default")
        if name not in PRE_TOKENIZERS:
            raise UnsupportedModel(
                f"{self.file} cuts words by the rule {name!r}, carried are {', '.join(PRE_TOKENIZERS)}",
                hint=_OTHER_ENGINE,
            )
        self.rule = PRE_TOKENIZERS[str(name)]
        self.add_bos = self.rule.add_bos

    def core(self) -> Core:
        core = Core(models.BPE(vocab=self.ids, merges=self.merges(), ignore_merges=self.rule.whole_words))
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.rule.patterns
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        # A byte without a token makes none, but its neighbours must not merge over it.
        missing = "".join(map(re.escape, BYTES.keys() - self.ids.keys()))
        if missing:
            steps.append(pre_tokenizers.Split(Regex(f"[{missing}]"), "removed"))
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
        core.decoder = decoders.ByteLevel()
        return core

    def merges(self) -> list[tuple[str, str]]:
        pairs = (text.partition(" ") for text in self.texts("merges"))
        merges = dict.fromkeys((left, right) for left, _, right in pairs)  # of equal ones, the first counts
        for left, right in merges:
            if not {left, right, left + right} <= self.ids.keys():
                raise self.broken(f"merges {left!r} and {right!r}, which are not all tokens")
        return list(merges)


class _SentencePiece(_Vocabulary):
    """SentencePiece's BPE: spaces are letters, pieces merge by their score, unknown characters become bytes."""

    pieces = "sentencepiece"
    bos, eos, add_bos = 1, 2, True

    def core(self) -> Core:
        unknown = self.id("unknown", 0)
        core = Core(
            models.BPE(
                vocab=self.ids,
                merges=self.merges(),
                byte_fallback=True,
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
            )
        )
        prefix = [normalizers.Prepend(SPACE)] if self.flag("add_space_prefix", True) else []
        core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        return core

    def merges(self) -> list[tuple[str, str]]:
        """Every way to make a token of two others, the best-scored tokens first."""
        scores = self.numbers("scores")
        order = np.argsort(-scores[: len(self.tokens)].astype(np.float64), kind="stable")
        return [
            (text[:at], text[at:])
            for text in map(self.tokens.__getitem__, order)
            for at in range(1, len(text))
            if text[:at] in self.ids and text[at:] in self.ids
        ]


def write_from_hf(source: Path, directory: Path) -> None:
    """Write the tokenizer files of a bundle from a Hugging Face directory. SourceError for damaged files,
    UnsupportedModel if there is no `tokenizer.json` or it is of another kind than BPE over bytes or pieces."""
    if not (source / TOKENIZER).is_file():
        raise UnsupportedModel(
            f"{source} has no {TOKENIZER}",
            hint="save the tokenizer again with a current transformers (a fast tokenizer), or use a GGUF file",
        )
    try:
        text = (source / TOKENIZER).read_bytes().decode()
        core = Core.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise SourceError(f"{source / TOKENIZER} is damaged: {error}", hint="download it again") from error
    settings = _HuggingFace(source, core)
    _write(directory, text, settings.config(), settings.template())


class _HuggingFace:
    """What the files around a `tokenizer.json` say about it."""

    def __init__(self, source: Path, core: Core) -> None:
        self.source = source
        self.core = core
        self.tokenizer = self._read(CONFIG)
        self.special = self._read("special_tokens_map.json")
        self.model = self._read("config.json")
        self.generation = self._read("generation_config.json")

    def config(self) -> Config:
        bos, eos = self._id("bos"), self._id("eos")
        around = self.core.encode("", add_special_tokens=True).ids
        add_bos, add_eos = self.tokenizer.get("add_bos_token"), self.tokenizer.get("add_eos_token")
        return Config(
            format=FORMAT,
            vocabulary=max(self.core.get_vocab().values(), default=-1) + 1,
            pieces=self._pieces(),
            bos=bos,
            eos=eos,
            add_bos=bos is not None and (bos in around[:1] if add_bos is None else add_bos is True),
            add_eos=eos is not None and (eos in around[-1:] if add_eos is None else add_eos is True),
            stop=self._stop_ids(eos),
        )

    def template(self) -> str | None:
        file = self.source / TEMPLATE
        if file.is_file():
            try:
                return file.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise SourceError(f"{file} is not UTF-8: {error}", hint="download it again") from error
        value = self.tokenizer.get("chat_template")
        if isinstance(value, list):
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        return value if isinstance(value, str) else None

    def _read(self, name: str) -> dict[str, Any]:
        file = self.source / name
        if not file.is_file():
            return {}
        try:
            value = json.loads(file.read_bytes())
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no text
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file} is not JSON: {error}", hint="download it again") from error
        if not isinstance(value, dict):
            raise SourceError(f"{file} holds no JSON object", hint="download it again")
        return value

    def _id(self, name: str) -> int | None:
        """The token's id, by its text, else by the model's configuration."""
        for settings in (self.tokenizer, self.special):
            token = settings.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and (id := self.core.token_to_id(text)) is not None:
                return id
        return next(iter(self._listed(self.model, name)), None)

    def _listed(self, settings: Mapping[str, Any], name: str) -> list[int]:
        value = settings.get(f"{name}_token_id")
        listed = value if isinstance(value, list) else [value]
        ids = [id for id in listed if isinstance(id, int) and 0 <= id <= MAX_ID]
        return [id for id in ids if self.core.id_to_token(id) is not None]

    def _stop_ids(self, eos: int | None) -> tuple[int, ...]:
        added = self.core.get_added_tokens_decoder().items()
        ends = {id for id, token in added if token.special and token.content in TURN_ENDS}
        ends |= {*self._listed(self.generation, "eos"), *self._listed(self.model, "eos")}
        return tuple(sorted(ends if eos is None else ends | {eos}))

    def _pieces(self) -> Literal["byte_level", "sentencepiece"]:
        decoder = json.loads(self.core.to_str())["decoder"] or {}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
        if "ByteLevel" in kinds:
            return "byte_level"
        if kinds & {"ByteFallback", "Metaspace"}:
            return "sentencepiece"
        raise UnsupportedModel(
            f"{self.source / TOKENIZER} decodes by {sorted(kinds)}, carried are ByteLevel, ByteFallback, Metaspace",
            hint="use a GGUF file with the llamacpp engine",
        )
