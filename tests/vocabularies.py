"""Strings that tokenizers disagree about, small trained vocabularies as GGUF files, and llama.cpp as the judge."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SCALE = 32  # rows and columns of the weights that llama.cpp wants beside a vocabulary

_TEXT = (
    "the of and to in is that it was for on are as with his they at be this have from or one had by word but not what "
    "all were we when your can said there use an each which she do how their if will up other about out many then them "
    "Straße naïve Ünïcödé déjà façade ΑΒΓ λόγος Привет мир добрый שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี "
    "你好世界 今日は良い天気 안녕하세요 🙂 👩‍👩‍👧 🇩🇪 e\u0301 don't I'LL we've It's x'S HTTPServer camelCase snake_case "
    "i++ def main(): return {'a': [1, 2.5, -3e10]} #include <stdio.h> https://example.org/?q=1&r=2 C:\\\\dir \\n "
    "\\t ① Ⅷ ½ ٣٤٥ ʼn"
)
_WORDS = _TEXT.split(" ")
_RANGES = (
    (0x01, 0x20),
    (0x20, 0x7F),
    (0x7F, 0x250),
    (0x300, 0x370),  # combining marks, alone or stacked
    (0x370, 0x590),
    (0x590, 0x700),
    (0x900, 0xE80),
    (0x1E00, 0x2100),
    (0x2000, 0x2070),  # spaces, joiners, directions
    (0x2150, 0x2800),
    (0x3000, 0x3130),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0xE000, 0xE010),
    (0xFE00, 0xFFFE),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x20100),
    (0xE0000, 0xE0080),
)


def strings(count: int, seed: int = 7, specials: Sequence[str] = SPECIALS) -> list[str]:
    """Texts of 1..12 parts each: words in many scripts, runs, code, controls, marks and special tokens."""
    rng = random.Random(seed)
    return ["".join(_part(rng, specials) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def _part(rng: random.Random, specials: Sequence[str]) -> str:
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(("", " ", " ", "  ", "\n")) + rng.choice(_WORDS)
    if kind < 6:
        low, high = rng.choice(_RANGES)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 5)))
    if kind == 6:
        return rng.choice(" \n\t\r\u00a0\u3000\u2003\x0b\u0085") * rng.choice((1, 2, 3, 4, 7, 16, 33, 100))
    if kind == 7:
        return "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 4, 5, 9, 40))))
    if kind == 8:
        return rng.choice(specials)
    if kind == 9:
        return rng.choice(specials)[: rng.randint(1, 8)]
    if kind == 10:
        return "".join(rng.choice("'!?.,;:-_=+*/\\|<>[](){}@#$%^&~`\"") for _ in range(rng.randint(1, 9)))
    return chr(rng.choice((rng.randrange(0x1, 0xD800), rng.randrange(0xE000, 0x30000))))


class LlamaTokenizer:
    """llama.cpp's tokenizer of a GGUF file: `/tokenize` of its server, on a loopback port."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.warmup, params.verbosity = 64, 1, 0, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(params)

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens parsed, nothing added around it."""
        mixed: list[str | int] = [""]  # the server treats the first text on its own: it may get BOS
        for text in texts:
            mixed += [-1, text]  # ids in the list are handed through, so -1 separates
        found: list[list[int]] = []
        for id in self._ask(content=mixed, add_special=False):
            if id == -1:
                found.append([])
            else:
                found[-1].append(id)
        return found

    def one(self, text: str) -> list[int]:
        """Ids of a text with what the model adds around it."""
        return self._ask(content=text, add_special=True)

    def pieces(self, text: str) -> bytes:
        """The bytes of the text's tokens, one after the other."""
        pieces = [token["piece"] for token in self._ask(content=text, add_special=False, with_pieces=True)]
        return b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces)

    def _ask(self, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            data=json.dumps(body | {"parse_special": True}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["tokens"]


def byte_level_gguf(path: Path, pre: str, *, size: int = 1500, leave_out: str = "", **fields: Any) -> Path:
    """A vocabulary for the rule `pre`; `leave_out` are byte characters without a token. It is trained on text that no
    rule has cut, so its tokens lie across the cuts of every rule and show where a rule cuts otherwise; and every
    seventh token cannot be merged, only be a whole word."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    tokens, merges = _train(trained, size, alphabet)
    merges = [pair for n, pair in enumerate(merges) if n % 7 and not set(leave_out) & set("".join(pair))]
    kept = [token for token in tokens if not set(leave_out) & set(token)]
    return _write(path, "gpt2", [*kept, *SPECIALS], [1] * len(kept) + [3] * len(SPECIALS), merges, None, pre, fields)


def sentencepiece_gguf(path: Path, *, size: int = 900, **fields: Any) -> Path:
    """A vocabulary of SentencePiece's kind: unknown, BOS, EOS, bytes, then pieces with falling scores."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens, _ = _train(trained, size, [])
    kept = [token for token in tokens if len(token.encode()) > 1 or token.isprintable()]
    first = ["<unk>", "<s>", "</s>", *BYTES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(kept) + [3, 3, 4]
    scores = [0.0] * len(first) + [-float(n) for n in range(len(kept))] + [0.0] * 3
    return _write(path, "llama", [*first, *kept, *SPECIALS], types, [], scores, "default", fields)


def _train(tokenizer: Tokenizer, size: int, alphabet: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    text = [*strings(300, seed=1, specials=("x",)), *(" ".join(_WORDS) for _ in range(20))]
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [(left, right) for left, right in model["merges"]]


def _write(
    path: Path,
    kind: str,
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, str]],
    scores: list[float] | None,
    pre: str,
    fields: dict[str, Any],
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(SCALE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(SCALE)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    if scores is not None:
        writer.add_token_scores(scores)
    defaults = {"bos": tokens.index(SPECIALS[0]), "eos": tokens.index(SPECIALS[1])}
    for name, value in (defaults | fields).items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((SCALE, SCALE), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(SCALE, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), SCALE), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
