"""OpenVINO GenAI's LLMPipeline on the CPU plugin.

Its GGUF reader takes the file `as-is`, but rounds the minima of 4-bit blocks to whole zero points; `int8` is the same
model rewritten with 8-bit blocks (Q8_0), which it keeps. What it reads is saved once as OpenVINO IR, which loads
faster; every turn starts from that. Paged attention, the own choice of the pipeline on a CPU, the latency hint, and its
defaults for KV precision (u8) and dynamic quantization (groups of 32), its fast ones. Prefix caching is off, as every
answer is to be computed. Several streams go through its continuous batching, as LLMPipeline tells the time of the first
token only of its first step. Its telemetry is a library of its own, which this process pretends not to have.

Distributions come from the same IR compiled by the plugin with the same properties. The pipeline shows none, and the
plain model has the plugin's stateful attention instead of the paged one.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from abc import ABC, abstractmethod
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
    return OneStream(model, room) if room.streams == 1 else Streams(model, room)


class OpenVINO(ABC):
    """What is alike for one stream and for several."""

    def __init__(self, model: Path, room: Room) -> None:
        self._genai, self._core, self._model = _genai(), importlib.import_module("openvino"), model
        self._properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": room.threads}
        self._scheduler = self._genai.SchedulerConfig()
        self._scheduler.enable_prefix_caching = False
        self._scheduler.max_num_seqs = room.streams

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]: ...

    def greedy(self, prompt: Sequence[int], new: int) -> list[int] | None:
        return None

    def logits(self, ids: Sequence[int]) -> FloatArray:
        compiled = self._core.Core().compile_model(str(self._model / MODEL), "CPU", self._properties)
        request = compiled.create_infer_request()
        rows = [request.infer(_step(token, at))["logits"][0, -1].copy() for at, token in enumerate(ids)]
        return np.stack(rows).astype(np.float32, copy=False)

    def _config(self, new: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        return config

    def _ids(self, prompt: Sequence[int]) -> Any:
        return self._core.Tensor(np.array([prompt], np.int64))


class OneStream(OpenVINO):
    def __init__(self, model: Path, room: Room) -> None:
        super().__init__(model, room)
        pipeline = self._genai.LLMPipeline
        self._pipeline = pipeline(str(model), "CPU", scheduler_config=self._scheduler, **self._properties)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        start = time.perf_counter()
        result = self._ask(prompts[0], new)
        last = time.perf_counter() - start
        return [Answer(len(result.tokens[0]), result.perf_metrics.get_ttft().mean / 1e3, last)]

    def greedy(self, prompt: Sequence[int], new: int) -> list[int]:
        return [int(token) for token in self._ask(prompt, new).tokens[0]]

    def _ask(self, prompt: Sequence[int], new: int) -> Any:
        ones = self._core.Tensor(np.ones((1, len(prompt)), np.int64))
        return self._pipeline.generate(self._genai.TokenizedInputs(self._ids(prompt), ones), self._config(new))


class Streams(OpenVINO):
    def __init__(self, model: Path, room: Room) -> None:
        super().__init__(model, room)
        pipeline = self._genai.ContinuousBatchingPipeline
        self._pipeline = pipeline(str(model), self._scheduler, "CPU", self._properties)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        """Each step of the pipeline gives some streams their next token."""
        start, config = time.perf_counter(), self._config(new)
        handles = [self._pipeline.add_request(n, self._ids(ids), config) for n, ids in enumerate(prompts)]
        came: list[list[float]] = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - start
            for handle, times in zip(handles, came, strict=True):
                if handle.can_read():
                    times += [now] * sum(len(out.generated_ids) for out in handle.read().values())
        return [Answer(len(times), times[0], times[-1]) for times in came]


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
