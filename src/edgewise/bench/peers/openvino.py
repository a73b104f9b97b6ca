"""OpenVINO GenAI's LLMPipeline on the CPU plugin.

Its GGUF reader takes the file `as-is`, but rounds the minima of 4-bit blocks to whole zero points; `int8` is the same
model rewritten with 8-bit blocks (Q8_0), which it keeps. What it reads is saved once as OpenVINO IR, which loads
faster; every turn starts from that. Paged attention, the own choice of the pipeline on a CPU, the latency hint, and its
defaults for KV precision (u8) and dynamic quantization (groups of 32), its fast ones. Prefix caching is off, as every
answer is to be computed. Its telemetry is a library of its own, which this process pretends not to have.

Distributions come from the same IR compiled by the plugin with the same properties. The pipeline shows none, and the
plain model has the plugin's stateful attention instead of the paged one.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.peers.base import Answer, Room, Source
from edgewise.bench.peers.gguf_int8 import to_int8
from edgewise.errors import UnsupportedModel
from edgewise.types import FloatArray, IdArray

MODEL = "openvino_model.xml"


def prepare(source: Source, work: Path, variant: str) -> Path:
    if (work / MODEL).is_file():
        return work
    if source.path.suffix != ".gguf":
        raise UnsupportedModel(
            f"OpenVINO GenAI reads GGUF files, {source.path.name} is none",
            hint="convert it with optimum-intel and give --peer-model openvino=DIRECTORY",
        )
    copy = work / "model.gguf"  # the reader writes beside the file that it reads
    if variant == "int8":
        to_int8(source.path, copy)
    else:
        shutil.copyfile(source.path, copy)
    _genai().LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
    copy.unlink()
    return work


def load(model: Path, room: Room, variant: str) -> OpenVINO:
    return OpenVINO(model, {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": room.threads}, room)


class OpenVINO:
    def __init__(self, model: Path, properties: dict[str, Any], room: Room) -> None:
        self._genai = _genai()
        self._core = importlib.import_module("openvino")
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = room.streams
        self._model, self._properties = model, properties
        self._pipeline = self._genai.LLMPipeline(str(model), "CPU", scheduler_config=scheduler, **properties)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        start = time.perf_counter()
        result = self._ask(prompts, new)
        last = time.perf_counter() - start
        first = result.perf_metrics.get_ttft().mean / 1e3
        return [Answer(len(tokens), first, last) for tokens in result.tokens]

    def greedy(self, prompt: Sequence[int], new: int) -> list[int]:
        return [int(token) for token in self._ask([prompt], new).tokens[0]]

    def logits(self, ids: Sequence[int]) -> FloatArray:
        compiled = self._core.Core().compile_model(str(self._model / MODEL), "CPU", self._properties)
        request = compiled.create_infer_request()
        rows = [request.infer(_step(token, at))["logits"][0, -1].copy() for at, token in enumerate(ids)]
        return np.stack(rows).astype(np.float32, copy=False)

    def _ask(self, prompts: Sequence[Sequence[int]], new: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        ids = np.array(prompts, np.int64)
        inputs = self._genai.TokenizedInputs(self._core.Tensor(ids), self._core.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, config)


def _step(token: int, at: int) -> dict[str, IdArray | np.ndarray[Any, np.dtype[np.int32]]]:
    """The inputs of the stateful model for one more token."""
    return {
        "input_ids": np.array([[token]], np.int64),
        "attention_mask": np.ones((1, at + 1), np.int64),
        "position_ids": np.array([[at]], np.int64),
        "beam_idx": np.zeros(1, np.int32),
    }


def _genai() -> Any:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # openvino does without, and sends nothing
    return importlib.import_module("openvino_genai")
