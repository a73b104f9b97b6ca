"""onnxruntime-genai, with models of its own builder for the CPU provider.

The builder takes no quantized GGUF, so the file is dequantized to a Hugging Face directory first and rounded again:
`int8` holds our fidelity, `int4` is what it is mostly used with. Builder options: logits of the last position only, one
table for embedding and head, gate and up projections as one. Blocks of 32 and int8 activations are its defaults.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.peers.base import Answer, Room, Source
from edgewise.errors import UnsupportedModel
from edgewise.types import FloatArray

BUILD = ("-e", "cpu", "--extra_options", "hf_token=false", "prune_lm_head=true", "fuse_mlp_gate_up=true")


def prepare(source: Source, work: Path, variant: str) -> Path:
    built = work / "built"
    if (built / "genai_config.json").is_file():
        return built
    plain = source.path if source.path.is_dir() else _dequantized(source.path, work / "plain")
    part = work / "part"
    shutil.rmtree(part, ignore_errors=True)
    tied = json.loads((plain / "config.json").read_text())["tie_word_embeddings"]
    options = [*BUILD, f"shared_embeddings={str(tied).lower()}"]
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(plain), "-o", str(part), "-p", variant]
    done = subprocess.run(
        [sys.executable, *command, "-c", str(work / "cache"), *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnsupportedModel(f"its builder failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    part.rename(built)
    return built


def _dequantized(gguf: Path, directory: Path) -> Path:
    """The file as float32 safetensors, by transformers' own reader."""
    transformers = importlib.import_module("transformers")
    folder, file = str(gguf.parent), gguf.name
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(directory)
    exact = transformers.GgufConfig(dequantize=True)
    options = {"gguf_file": file, "dtype": "float32", "quantization_config": exact}
    transformers.AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(directory)
    return directory


def load(model: Path, room: Room, variant: str) -> OrtGenAI:
    genai = importlib.import_module("onnxruntime_genai")
    config = genai.Config(str(model))
    options = {"intra_op_num_threads": room.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return OrtGenAI(genai, genai.Model(config))


class OrtGenAI:
    def __init__(self, genai: Any, model: Any) -> None:
        self._genai, self._model = genai, model

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        start = time.perf_counter()
        generator = self._generator(prompts, new)
        generator.generate_next_token()
        first = time.perf_counter() - start
        for _ in range(new - 1):
            generator.generate_next_token()
        last = time.perf_counter() - start
        return [Answer(len(generator.get_sequence(n)) - len(prompt), first, last) for n, prompt in enumerate(prompts)]

    def greedy(self, prompt: Sequence[int], new: int) -> list[int]:
        generator = self._generator([prompt], new)
        for _ in range(new):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    def logits(self, ids: Sequence[int]) -> FloatArray:
        generator = self._generator([ids[:1]], len(ids))
        rows = [generator.get_logits().reshape(-1).copy()]
        for token in ids[1:]:
            generator.append_tokens(np.array([[token]], np.int32))
            rows.append(generator.get_logits().reshape(-1).copy())
        return np.stack(rows).astype(np.float32, copy=False)

    def _generator(self, prompts: Sequence[Sequence[int]], new: int) -> Any:
        """With the prompts computed. `min_length` keeps the end of a sequence from being chosen."""
        length = len(prompts[0]) + new
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=len(prompts), min_length=length, max_length=length)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        return generator
