"""The native kernels on bundles of any card, written here of random numbers: against onnxruntime, bit for bit against
themselves, refused where tensors and card disagree, and with numbers that overflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgewise.engines import native_lm, packed
from edgewise.engines.base import Row
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import BundleError, EngineError
from edgewise.models.blocks import BlockWriter, Layer
from edgewise.models.bundle import MANIFEST, BlockEntry, Bundle, Graphs, write_manifest
from edgewise.models.card import Card, Rope
from edgewise.models.weights import Dense, Matrix, Quantized, pack4

KERNELS = ("avx2", "avxvnni", "avx512", "avx512bf16")
KINDS = [(bits, block, minima) for bits in (4, 8) for block in (16, 32) for minima in (False, True)]
GRAPHS = Graphs("blocks/embed.onnx", (BlockEntry("blocks/block-00.onnx", 0, 1),), "blocks/head.onnx")
CARD = Card(
    family="any",
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=96,
    vocab=75,  # no multiple of what a register holds
    context=64,
    norm_eps=1e-5,
    rope=Rope(tuple(0.5**n for n in range(16))),
    tied=True,
)

if native_lm.probe() is None:
    pytest.skip("the native kernels are not built for this machine", allow_module_level=True)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if native_lm.start(request.param) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native_lm.start()


class Numbers:
    """Random weights for a card, always the same for a seed."""

    def __init__(self, card: Card, seed: int) -> None:
        self.card, self.random = card, np.random.default_rng(seed)

    def vector(self, size: int, mean: float = 1.0) -> np.ndarray:
        return (mean + self.random.normal(size=size) * 0.2).astype(np.float32)

    def matrix(self, outputs: int, inputs: int, kind: tuple[int, int, bool], spread: float = 0.15) -> Quantized:
        bits, block, with_minima = kind
        codes = self.random.integers(0, 1 << bits, (outputs, inputs // block, block), dtype=np.uint8)
        scales = (self.random.normal(size=codes.shape[:2]) * spread / (1 << (bits - 1))).astype(np.float32)
        minima = (self.random.normal(size=scales.shape) * spread / 4).astype(np.float32) if with_minima else None
        if self.random.random() < 0.5:  # as a float16 holds them
            scales = scales.astype(np.float16).astype(np.float32)
        return Quantized(bits, codes if bits == 8 else pack4(codes), scales, minima, block)

    def layer(self) -> Layer:
        card, hidden, ffn = self.card, self.card.hidden, self.card.ffn
        heads, kept = card.heads * card.head_dim, card.kv_heads * card.head_dim
        kinds = [KINDS[i] for i in self.random.integers(len(KINDS), size=7)]
        if self.random.random() < 0.5:  # alike, and then fused
            kinds[1:3], kinds[5] = [kinds[0]] * 2, kinds[4]
        outputs = (heads, kept, kept, hidden, ffn, ffn, hidden)
        inputs = (hidden, hidden, hidden, heads, hidden, hidden, ffn)
        q, k, v, o, gate, up, down = map(self.matrix, outputs, inputs, kinds)

        def norm(there: bool) -> np.ndarray | None:
            return self.vector(hidden) if there else None

        def bias(there: bool, *sizes: int) -> Any:
            return tuple(self.vector(size, 0) for size in sizes) if there else None

        return Layer(
            *(norm(card.pre_norm), q, k, v, o, norm(card.pre_norm), gate, up, down),
            qkv_bias=bias(card.qkv_bias, heads, kept, kept),
            o_bias=(bias(card.attention_out_bias, hidden) or [None])[0],
            gate_up_bias=bias(card.ffn_bias, ffn, ffn),
            down_bias=(bias(card.ffn_bias, hidden) or [None])[0],
            qk_norm=None if card.qk_norm_sizes is None else tuple(map(self.vector, card.qk_norm_sizes)),  # type: ignore[arg-type]
            attention_out_norm=norm(card.post_norm),
            ffn_out_norm=norm(card.post_norm),
        )


def write(card: Card, directory: Path, layers: Sequence[Layer], embed: Matrix, head: Matrix | None = None) -> Bundle:
    (directory / "blocks").mkdir(parents=True)
    writer = BlockWriter(card, directory / "blocks", int8_activations=True)
    writer.vocabulary(embed, np.ones(card.hidden, np.float32), head)
    writer.block(0, 0, layers)
    list_files(directory, card.to_json(), graphs_of(card.layers))
    return Bundle.open(directory)


def graphs_of(layers: int) -> Graphs:
    return msgspec.structs.replace(GRAPHS, blocks=(BlockEntry("blocks/block-00.onnx", 0, layers - 1),))


def list_files(directory: Path, card: dict[str, Any], graphs: Graphs) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)
    facts: dict[str, Any] = {key: {} for key in ("source", "licence", "parity", "tools")}
    write_manifest(directory, name="any", card=card, graphs=graphs, quantization={"activations": "int8"}, **facts)


def made(card: Card, directory: Path, seed: int = 0) -> Bundle:
    numbers = Numbers(card, seed)
    kinds = [KINDS[i] for i in numbers.random.integers(len(KINDS), size=2)]
    embed = numbers.matrix(card.vocab, card.hidden, kinds[0], spread=1)
    head = None if card.tied else numbers.matrix(card.vocab, card.hidden, kinds[1])
    return write(card, directory, [numbers.layer() for _ in range(card.layers)], embed, head)


async def fed(lm: NativeLM | OnnxLM, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    await lm.open("s", len(ids))
    ends = np.cumsum(sizes).tolist()
    rows = [Row("s", end - size, ids[end - size : end], size) for size, end in zip(sizes, ends, strict=True)]
    logits = np.concatenate([(await lm.forward([row]))[0].copy() for row in rows])
    await lm.close("s")
    return logits


# ---- any card ----


def any_card(seed: int) -> Card:
    """Sizes at which tiles, vectors, spans and groups end unevenly, and everything else that a card may say."""
    random = np.random.default_rng(seed)

    def one(*values: Any) -> Any:
        return values[random.integers(len(values))]

    head_dim, kv_heads, layers = one(16, 48, 64, 80, 96, 128, 176, 256), one(1, 2, 3, 5), one(1, 2)
    heads = kv_heads * one(1, 2, 3, 4, 7)
    heads *= 1 if heads * head_dim % 32 == 0 else 2

    def rope() -> Rope:
        return Rope(tuple(0.7**n for n in range(8 * random.integers(1, head_dim // 16 + 1))), one(1.0, 1.1))

    return Card(
        family="any",
        **{"hidden": 32 * one(1, 3, 7), "ffn": 32 * one(1, 5), "vocab": one(7, 33, 250), "context": one(20, 300, 540)},
        **{"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "norm_eps": 1e-5},
        **{"rope": rope(), "local_rope": one(None, rope()), "tied": one(True, False)},
        **{"qkv_bias": one(True, False), "attention_out_bias": one(True, False), "ffn_bias": one(True, False)},
        **{
            "activation": one("silu", "gelu_tanh"),
            "post_norm": one(True, False),
            "qk_norm": one("none", "head", "whole"),
        },
        windows=one((), tuple(one(0, 1, 15, 16, 17, 270) for _ in range(layers))),
        unrotated=one((), (0,)),
        attention_cap=one(0.0, 20.0),
        logit_cap=one(0.0, 5.0),
        residual_scale=one(1.0, 0.7),
    )


@pytest.mark.parametrize("seed", range(12))
async def test_any_card(seed: int, kernels: str, tmp_path: Path) -> None:
    card, random = any_card(seed), np.random.default_rng(seed)
    bundle = made(card, tmp_path / "b", seed)
    ids = random.integers(0, card.vocab, card.context)  # to the last position
    lm = NativeLM(bundle, slots=1)
    got = await fed(lm, ids, [len(ids)])
    cuts = np.sort(random.choice(np.arange(1, len(ids)), 9, replace=False))
    assert np.array_equal(got, await fed(lm, ids, np.diff([0, *cuts, len(ids)]).tolist()))
    want = await fed(OnnxLM(bundle, slots=1), ids, [len(ids)])
    assert np.median(np.abs(got - want)) <= (6e-2 if kernels == "avx512bf16" else 3e-2) * want.std()


async def test_rotations_are_made_as_positions_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made(replace(CARD, local_rope=Rope((1.0,) * 8), windows=(0, 20)), tmp_path / "b")
    ids = np.arange(60)
    all_at_once = await fed(NativeLM(bundle, slots=1), ids, [60])
    monkeypatch.setattr(native_lm, "FIRST_TURNS", 4)
    assert np.array_equal(all_at_once, await fed(NativeLM(bundle, slots=1), ids, [1] * 10 + [13, 37]))
    tables = Rope.tables
    asked: list[int] = []
    monkeypatch.setattr(Rope, "tables", lambda rope, positions: asked.append(positions) or tables(rope, positions))
    await fed(NativeLM(bundle, slots=1), ids[:5], [5])
    assert max(asked) == 5


async def test_ids_of_another_width(tmp_path: Path) -> None:
    lm = NativeLM(made(CARD, tmp_path / "b"), slots=1)
    ids = np.arange(40)
    assert np.array_equal(await fed(lm, ids, [40]), await fed(lm, ids.astype(np.int32), [40]))


# ---- tensors that are not those of the card ----


def with_card(bundle: Bundle, **changes: Any) -> None:
    card = json.loads((bundle.path / MANIFEST).read_text())["card"] | changes
    list_files(bundle.path, card, graphs_of(card["layers"]))


def with_tensor(bundle: Bundle, graph: str, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    path = bundle.path / "blocks" / f"{graph}.onnx"
    model = onnx.load(path)
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    changed = change(numpy_helper.to_array(tensor))
    if changed is None:
        model.graph.initializer.remove(tensor)
    else:
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), name))
    onnx.save(model, path)
    with_card(bundle)


WRONG_CARDS = {
    "more heads": {"heads": 8},
    "fewer kv heads": {"kv_heads": 1},
    "a larger head": {"head_dim": 64},
    "a larger hidden state": {"hidden": 128},
    "a smaller hidden state": {"hidden": 32},
    "a larger feed-forward": {"ffn": 128},
    "more tokens": {"vocab": 1000},
    "fewer tokens": {"vocab": 64},
    "more layers": {"layers": 3},
    "no norms": {"pre_norm": False},
    "more norms": {"post_norm": True},
    "norms of heads": {"qk_norm": "head"},
    "biases": {"qkv_bias": True},
}
Change = Callable[[np.ndarray], np.ndarray | None]
LESS: Change = lambda values: values[:-1]
WRONG_TENSORS: dict[str, tuple[str, str, Change]] = {
    "no product": ("block-00", "layer0.o.weight", lambda values: None),
    "no norm": ("block-00", "layer1.ffn_norm.scale", lambda values: None),
    "no last norm": ("head", "normed.scale", lambda values: None),
    "a short norm": ("block-00", "layer0.attention_norm.scale", LESS),
    "a short bias": ("block-00", "layer0.down.bias", LESS),
    "fewer codes": ("block-00", "layer0.down.q.weight", LESS),
    "shorter blocks": ("block-00", "layer0.down.q.weight", lambda values: values[..., :-1]),
    "flat codes": ("block-00", "layer0.down.q.weight", lambda values: values.reshape(-1)),
    "codes of floats": ("block-00", "layer0.down.q.weight", lambda values: values.astype(np.float32)),
    "fewer scales": ("block-00", "layer0.down.q.scales", LESS),
    "no scales in a row": ("block-00", "layer0.down.q.scales", lambda values: values[:, :0]),
    "scales of float16": ("block-00", "layer0.down.q.scales", lambda values: values.astype(np.float16)),
    "fewer minima": ("block-00", "layer0.down.minima_t", LESS),
    "a table of fewer tokens": ("head", "embed.weight", LESS),
}


@pytest.fixture
def biased(tmp_path: Path) -> Bundle:
    """With every tensor that the tests name."""
    card = replace(CARD, ffn_bias=True)
    numbers = Numbers(card, 0)
    embed = numbers.matrix(card.vocab, card.hidden, KINDS[0])
    layers = [replace(numbers.layer(), down=numbers.matrix(card.hidden, card.ffn, (4, 32, True))) for _ in range(2)]
    layers = [replace(layer, o=numbers.matrix(card.hidden, 128, (4, 32, False))) for layer in layers]
    return write(card, tmp_path / "b", layers, embed)


@pytest.mark.parametrize("wrong", WRONG_CARDS)
def test_a_card_of_other_tensors_is_refused(wrong: str, biased: Bundle) -> None:
    with_card(biased, **WRONG_CARDS[wrong])
    with pytest.raises(BundleError, match="are not those of its card"):
        NativeLM(Bundle.open(biased.path), slots=1)


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tensors_of_another_card_are_refused(wrong: str, biased: Bundle) -> None:
    with_tensor(biased, *WRONG_TENSORS[wrong])
    with pytest.raises(BundleError, match="are not those of its card"):
        NativeLM(Bundle.open(biased.path), slots=1)


@pytest.mark.parametrize("dense", [True, False])
def test_a_table_of_fewer_tokens_than_the_card_has(dense: bool, tmp_path: Path) -> None:
    card, numbers = replace(CARD, tied=False), Numbers(CARD, 0)
    table, head = (numbers.matrix(rows, card.hidden, KINDS[0]) for rows in (card.vocab - 1, card.vocab))
    layers = [numbers.layer() for _ in range(card.layers)]
    bundle = write(card, tmp_path / "b", layers, Dense(table.dense()) if dense else table, head)
    with pytest.raises(BundleError, match="are not those of its card"):
        NativeLM(bundle, slots=1)


def test_sizes_that_no_memory_holds(tmp_path: Path) -> None:
    bundle = made(CARD, tmp_path / "b")
    with_card(bundle, context=1 << 30)
    lm = NativeLM(Bundle.open(bundle.path), slots=1, context=64)
    assert lm.context == 64
    with_card(bundle, context=(1 << 31) - 1)
    assert "beyond all models" in str(NativeLM.why_not(Bundle.open(bundle.path)))


async def test_no_memory_is_an_engines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    bundle = made(CARD, tmp_path / "b")
    lm = NativeLM(bundle, slots=1)
    monkeypatch.setattr(native_lm, "untouched", none)
    with pytest.raises(EngineError, match="not enough memory"):
        await lm.open("s", 64)
    with pytest.raises(EngineError, match="not enough memory"):
        NativeLM(bundle, slots=1)


# ---- numbers ----


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "o", "gate", "up", "down"])
async def test_what_overflows_comes_out_as_such(wrong: float, place: str, kernels: str, tmp_path: Path) -> None:
    """One weight of one output: it must not become a code of int8, or a bfloat16, that looks like any other."""
    numbers = Numbers(CARD, 0)
    layer = numbers.layer()
    matrix: Quantized = getattr(layer, place)
    matrix.scales[3, 0] = wrong
    bundle = write(
        replace(CARD, layers=1), tmp_path / "b", [layer], numbers.matrix(CARD.vocab, CARD.hidden, (8, 32, False), 1)
    )
    logits = await fed(NativeLM(bundle, slots=1), np.arange(40), [20, 20])
    assert not np.isfinite(logits).any()


async def test_a_row_of_zeros_or_of_next_to_nothing(kernels: str, tmp_path: Path) -> None:
    card = replace(CARD, layers=1, pre_norm=False)
    numbers = Numbers(card, 0)
    embed = numbers.matrix(card.vocab, card.hidden, (8, 32, False), 1)
    embed.scales[0], embed.scales[1] = 0, 1e-43
    lm = NativeLM(write(card, tmp_path / "b", [numbers.layer()], embed), slots=1)
    ids = np.array([0, 1, 0, 5])
    logits = await fed(lm, ids, [4])
    assert np.isfinite(logits).all()
    assert np.array_equal(logits[:1], logits[1:2])
    assert np.array_equal(logits, await fed(lm, ids, [1, 1, 1, 1]))


# ---- the index of packed weights ----


def places(index: dict[str, Any]) -> dict[str, Any]:
    return index["matrices"]


def swap(entries: dict[str, Any], one: str, other: str) -> None:
    entries[one], entries[other] = entries[other], entries[one]


WRONG_INDICES: dict[str, Callable[[dict[str, Any]], object]] = {
    "beyond the data": lambda index: places(index)["head"].update(codes=1 << 40),
    "before the data": lambda index: places(index)["head"].update(scales=-64),
    "elsewhere in the data": lambda index: places(index)["layer1.o"].update(codes=64),
    "minima that are none": lambda index: places(index)["head"].update(minima=0),
    "more outputs": lambda index: places(index)["layer0.o"].update(outputs=128),
    "other blocks": lambda index: places(index)["layer0.o"].update(block=16),
    "no blocks": lambda index: places(index)["layer0.o"].update(block=0),
    "other codes": lambda index: places(index)["layer0.o"].update(bits=8),
    "other factors": lambda index: places(index)["layer0.o"].update(factor_bytes=3),
    "a matrix less": lambda index: places(index).pop("layer1.o"),
    "a matrix more": lambda index: places(index).update({"layer2.o": places(index)["layer1.o"]}),
    "matrices exchanged": lambda index: swap(places(index), "layer0.o", "layer0.down"),
    "a vector elsewhere": lambda index: index["vectors"]["norm"].update(at=1 << 40),
    "a shorter vector": lambda index: index["vectors"]["norm"].update(count=60),
    "a vector less": lambda index: index["vectors"].pop("norm"),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES)
async def test_an_index_that_was_not_planned_is_made_anew(wrong: str, biased: Bundle) -> None:
    ids = np.arange(40)
    first = await fed(NativeLM(biased, slots=1), ids, [40])
    path = biased.path / packed.INDEX
    before = path.read_bytes()
    index = json.loads(before)
    WRONG_INDICES[wrong](index)
    path.write_text(json.dumps(index))
    assert np.array_equal(first, await fed(NativeLM(Bundle.open(biased.path), slots=1), ids, [40]))
    assert path.read_bytes() == before
