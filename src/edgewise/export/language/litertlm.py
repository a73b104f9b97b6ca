"""LiteRT-LM: a .litertlm file by litert-torch, and what it says when its own engine and its network run it.

The engine takes and gives texts only. So it answers one prompt, to show that the file as a whole works, and the network
inside the file is run with LiteRT itself, a token at a time over its cache, for the logits.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgewise.errors import ExportError, SourceError, UnsupportedModel, UsageError
from edgewise.export.language import schema_shim
from edgewise.export.language.passages import Logits, Passage, passages_of
from edgewise.export.targets.litert.coverage import coverage
from edgewise.export.targets.litert.file import File, Weight, skipped
from edgewise.export.work.job import Check, Converted, Job, Precision, Proved, write_arrays

RECIPES: Final[Mapping[Precision, str]] = {
    "fp32": "none",
    "int8-dynamic": "dynamic_wi8_afp32",
    "int4": "blocks",  # see _blocks
}
HEAD: Final = ".*(lm_head|logits).*"  # what an operator of the head is called, by module or by what it gives
PREFILL: Final = (128,)  # tokens that are read at once
CACHE: Final = 1024  # positions
NETWORK: Final = "tf_lite_prefill_decode"
START_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json")  # that may name a first token
TOKENS: Final = 64  # that the engine says after each prompt


def convert(job: Job) -> Converted:
    """Options: `prefill`, lengths; `cache`, positions; `recipe`, another of ai-edge-quantizer's; `start`, the ids that
    the tokenizer begins a text with."""
    recipe = job.options.get("recipe") or RECIPES.get(job.precision)
    if recipe is None:
        raise UsageError(f"a language model in LiteRT has no {job.precision}", hint=f"take one of {', '.join(RECIPES)}")
    schema_shim.install()
    exporter = importlib.import_module("litert_torch.generative.export_hf.export")
    work, artifact = Path(job.work) / "made", Path(f"{job.artifact}.litertlm")
    model = Path(job.source.ref)
    if not job.options.get("start"):
        model = _without_start(model, Path(job.work) / "model")
    try:
        exporter.export(
            model=str(model),
            output_dir=str(work),
            prefill_lengths=[int(one) for one in job.options.get("prefill", PREFILL)],
            cache_length=int(job.options.get("cache", CACHE)),
            quantization_recipe=str(_blocks(Path(job.work))) if recipe == "blocks" else recipe,
        )
    except (RuntimeError, ValueError, NotImplementedError, KeyError, AttributeError, TypeError) as e:
        raise UnsupportedModel(
            f"litert-torch cannot convert {job.source.name}: {_short(e)}", hint="--to onnx takes it"
        ) from e
    made = sorted(work.glob("*.litertlm"))
    if not made:
        raise ExportError(f"litert-torch wrote no .litertlm file for {job.source.name}")
    shutil.move(made[0], artifact)
    shutil.rmtree(work)
    return Converted(str(artifact), (str(artifact),))


def _blocks(directory: Path) -> Path:
    """A recipe of ai-edge-quantizer: int4 in blocks of 32 with a scale each, and 8 bits for the vocabulary, whose
    errors reach every logit."""
    recipes = importlib.import_module("ai_edge_quantizer.recipe")
    linear = recipes.TFLOperationName.FULLY_CONNECTED
    found = (
        recipes.dynamic_wi8c_afp32()
        + recipes.dynamic_wi4b32_afp32(operation_name=linear)
        + recipes.dynamic_wi8c_afp32(operation_name=linear, regex=HEAD)
    )
    file = directory / "recipe.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


def _without_start(model: Path, directory: Path) -> Path:
    """The same files, without the name of a token for the start of a text that this model's texts do not begin with.
    LiteRT-LM would put it before them, and before the one that its chat template writes itself. A template that asks
    for it by name keeps it."""
    names = [name for name in START_FILES if (model / name).is_file()]
    templates = [model / "chat_template.jinja", *(model / name for name in names)]
    if any(b"bos_token" in _template(file) for file in templates if file.is_file()):
        return model
    directory.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name in names:
            settings = json.loads(file.read_bytes())
            settings.pop("bos_token", None)
            (directory / file.name).write_text(json.dumps(settings), encoding="utf-8")
        else:
            (directory / file.name).symlink_to(file.resolve())
    return directory


def _template(file: Path) -> bytes:
    if file.suffix == ".jinja":
        return file.read_bytes()
    return json.dumps(json.loads(file.read_bytes()).get("chat_template", "")).encode()


def prove(job: Job) -> Proved:
    """Options: `passages`; `prompts`, those of them that the reference continued, each with `text`, `ids` and `answer`;
    `start`."""
    file, work = Path(job.artifact), Path(job.work)
    passages = passages_of(job.options["passages"])
    inner = network_of(file, work / "network.tflite")
    network = Network(inner, job.threads)
    seconds: list[float] = []
    logits = {str(n): network.logits(passage, seconds) for n, passage in enumerate(passages)}
    write_arrays(work / "logits", logits)
    held = File(inner)
    checks = [
        Check("loads", True, f"{network.signatures}, a cache of {network.cache} positions"),
        _engine_check(job, file),
    ]
    return Proved(
        level="executed",
        ran=True,
        by=f"LiteRT {version('ai-edge-litert')}, CPU with XNNPACK; LiteRT-LM {version('litert-lm-api')}",
        coverage=coverage(inner, held, job.threads),
        weights=held.bytes_by_type,
        skipped=_skipped(held.weights, job),
        checks=tuple(checks),
        latency_ms=tuple(1e3 * one for one in seconds),
    )


def _skipped(weights: Sequence[Weight], job: Job) -> tuple[str, ...]:
    """In int4 the vocabulary's tables may have 8 bits."""
    if job.precision != "int4":
        return skipped(weights, job.precision)
    tables = [one for one in weights if job.options["card"]["vocab"] in one.tensor.shape]
    layers = [one for one in weights if one not in tables]
    return skipped(layers, "int4") + skipped(tables, "int8-dynamic")


class Network:
    """The network of a .litertlm file, with its cache."""

    def __init__(self, file: Path, threads: int) -> None:
        interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter
        try:
            self._interpreter = interpreter(str(file), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as e:
            raise SourceError(f"LiteRT cannot load the network: {_short(e)}") from e
        self.signatures = sorted(self._interpreter.get_signature_list())
        prefills = [name for name in self.signatures if name.startswith("prefill")]
        if "decode" not in self.signatures or not prefills:
            raise UnsupportedModel(f"the file has the signatures {self.signatures}; prefill and decode are needed")
        self._decode = self._interpreter.get_signature_runner("decode")
        self._prefill = self._interpreter.get_signature_runner(prefills[0])
        self._needs = {"decode": self._decode.get_input_details(), "prefill": self._prefill.get_input_details()}
        if "tokens" not in self._needs["decode"]:
            raise UnsupportedModel(f"the network takes {sorted(self._needs['decode'])}, and no tokens")
        self.cache = self._needs["decode"]["mask"]["shape"][-1]

    def logits(self, passage: Passage, seconds: list[float]) -> Logits:
        """float32 [steps, vocab]; adds how long each step took."""
        if len(passage.ids) > self.cache:
            raise UsageError(f"a passage of {len(passage.ids)} tokens exceeds the cache of {self.cache} positions")
        states = {name: _empty(one) for name, one in self._needs["decode"].items() if name.startswith("kv_cache")}
        states = self._filled(passage.ids[: passage.start - 1], states)
        rows = []
        for step in range(passage.steps):
            started = time.perf_counter()
            found = self._decode(**self._given("decode", [passage.read(step)], passage.start - 1 + step), **states)
            seconds.append(time.perf_counter() - started)
            rows.append(np.asarray(found["logits"], np.float32).reshape(-1))
            states = {name: found[name] for name in states}
        return np.stack(rows)

    def _filled(self, ids: tuple[int, ...], states: dict[str, Any]) -> dict[str, Any]:
        """Read at once, as many as the signature takes. What pads the last ones stands at positions that are written
        again before anything looks at them."""
        length = int(self._needs["prefill"]["tokens"]["shape"][1])
        for at in range(0, len(ids), length):
            found = self._prefill(**self._given("prefill", list(ids[at : at + length]), at), **states)
            states = {name: found[name] for name in states}
        return states

    def _given(self, signature: str, ids: list[int], position: int) -> dict[str, Any]:
        needs = self._needs[signature]
        length = int(needs["tokens"]["shape"][1])
        positions = np.minimum(np.arange(position, position + length), self.cache - 1)
        mask = needs["mask"]
        seen = np.arange(self.cache) <= positions[:, None]
        hidden = np.zeros((), mask["dtype"]) if mask["dtype"] is np.bool_ else np.finfo(mask["dtype"]).min
        shown = np.where(seen, np.bool_(True) if mask["dtype"] is np.bool_ else 0, hidden).astype(mask["dtype"])
        return {
            "tokens": np.array([ids + [0] * (length - len(ids))], needs["tokens"]["dtype"]),
            "input_pos": positions.astype(needs["input_pos"]["dtype"]),
            "mask": shown.reshape(mask["shape"]),
        }


def network_of(file: Path, out: Path) -> Path:
    """The network of a .litertlm file, as a file of its own. SourceError if it is damaged."""
    peek = importlib.import_module("litert_lm_builder.litertlm_peek")
    size = file.stat().st_size
    try:
        with Path("/dev/null").open("w") as nowhere:
            header = peek.read_litertlm_header(str(file), nowhere).SectionMetadata()
        sections = [header.Objects(n) for n in range(header.ObjectsLength())]
        ends = [int(one.EndOffset()) for one in sections]
        found = [one for one in sections if peek.get_model_type(one) == NETWORK]
    except Exception as e:  # a damaged header ends in whatever its reader meets
        raise SourceError(f"{file} is no .litertlm file that can be read: {_short(e)}") from e
    if max(ends, default=0) > size:
        raise SourceError(f"{file} is cut short: it has {size} bytes of {max(ends)}", hint="export it again")
    if not found:
        raise SourceError(f"{file} holds no network {NETWORK!r}")
    with file.open("rb") as whole, out.open("wb") as part:
        whole.seek(found[0].BeginOffset())
        left = found[0].EndOffset() - found[0].BeginOffset()
        while left > 0:
            piece = whole.read(min(left, 1 << 24))
            part.write(piece)
            left -= len(piece)
    return out


def _engine_check(job: Job, file: Path) -> Check:
    """Prompts through LiteRT-LM itself, against the words of the reference up to the end that it sets."""
    lm = importlib.import_module("litert_lm")
    lm.set_min_log_severity(lm.LogSeverity.ERROR)
    tokens, expected, common, seconds, other = 0, 0, 0, 0.0, 0
    try:
        backend = lm.Backend.CPU(thread_count=job.threads)
        with lm.Engine(str(file), backend=backend, cache_dir=str(Path(job.work))) as engine:
            for prompt in job.options["prompts"]:
                started = time.perf_counter()
                said = list(engine.tokenize(_said(lm, engine, prompt["text"])))
                seconds += time.perf_counter() - started
                wanted = list(engine.tokenize(prompt["answer"]))[:TOKENS]
                tokens, expected, common = tokens + len(said), expected + len(wanted), common + _common(said, wanted)
                other += list(engine.tokenize(prompt["text"])) != prompt["ids"][len(job.options.get("start", ())) :]
    except RuntimeError as e:
        return Check("engine", False, f"LiteRT-LM cannot run it: {_short(e)}")
    prompts = len(job.options["prompts"])
    ids = f"OTHER token ids than the source's for {other} of them" if other else "the source's token ids for all"
    detail = (
        f"LiteRT-LM says {tokens} tokens after {prompts} prompts in {seconds:.1f} s, with {ids}; up to the first that "
        f"torch would not have said, its answers have {common} of {expected} tokens"
    )
    return Check("engine", tokens > 0 and not other, detail)


def _said(lm: Any, engine: Any, prompt: str) -> str:
    """What it answers greedily, TOKENS tokens at most."""
    greedy = lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    with engine.create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=TOKENS) as session:
        session.run_prefill([prompt])
        return "".join(said.texts[0] for said in session.run_decode_async())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def _empty(detail: Mapping[str, Any]) -> Any:
    return np.zeros(detail["shape"], detail["dtype"])


def _short(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(text.split())[:400] or type(error).__name__
