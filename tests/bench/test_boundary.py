"""Perplexity through coded boundaries of a tiny model, against the whole model run by itself."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest

from edgewise.bench.boundary import measure
from edgewise.bench.journal import Journal
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.errors import UsageError
from edgewise.evaluate.perplexity import nll
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.wire.codec import codec

IDS = np.random.default_rng(0).integers(0, 256, 330)


def test_an_exact_boundary_costs_nothing_and_coded_ones_little(tiny_bundle: Bundle) -> None:
    rows = measure(tiny_bundle, [2, 1], ["exact", "int8", "int4"], IDS, window=64)
    assert [(row["cut"], row["codec"]) for row in rows] == [(n, c) for n in (1, 2) for c in ("exact", "int8", "int4")]
    for row in rows:
        assert row["bytes"] == codec(row["codec"]).row_bytes(64)
        assert row["tokens"] == 5 * 63
        assert row["weights"] == tiny_bundle.weights
        assert row["refused"] is None
        assert row["interval"][0] <= row["ppl_rise"] <= row["interval"][1]
    exact, eight, four = rows[:3]
    assert (exact["ppl_rise"], exact["interval"]) == (0, [0, 0])
    assert 0 < abs(eight["ppl_rise"]) < 0.03
    assert 0 < abs(four["ppl_rise"]) < 0.03
    assert eight["ppl_rise"] != four["ppl_rise"]


def test_the_whole_model_is_judged_as_by_itself(tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = Journal(tmp_path / "done.jsonl", {})
    measure(tiny_bundle, [1], ["int8"], IDS, window=150, done=done)
    first = Tokenizer.open(tiny_bundle.path).encode("")[:1]
    ids = np.array([*first, *IDS])[:150]

    async def alone() -> float:
        model = local_model(tiny_bundle, slots=1)
        await model.open("s", 150)
        (logits,) = await model.forward([Row("s", 0, ids, 149 + 1)])
        found = float(nll(logits[:-1], ids[1:]).sum())
        await model.shutdown()
        return found

    piece = done.get("window 0")
    assert piece is not None
    assert piece["whole"] == pytest.approx(asyncio.run(alone()), rel=1e-6)
    assert math.isfinite(piece["1 int8"])


def test_what_is_done_is_not_done_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    done, seen = Journal(tmp_path / "done.jsonl", {}), []

    def show(what: str, n: int, total: int) -> None:
        seen.append((n, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_bundle, [1], ["int8"], IDS, window=64, done=done, show=show)
    assert done.get("window 1") is not None
    assert done.get("window 2") is None
    again = Journal(tmp_path / "done.jsonl", {})
    assert again.get("window 1") == done.get("window 1")
    rows = measure(tiny_bundle, [1], ["int8"], IDS, window=64, done=again)
    assert rows == measure(tiny_bundle, [1], ["int8"], IDS, window=64)


def test_what_cannot_be_measured_is_said(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="cannot be cut at 3"):
        measure(tiny_bundle, [1, 3], ["int8"], IDS, window=64)
    with pytest.raises(UsageError, match="one window has"):
        measure(tiny_bundle, [1], ["int8"], IDS[:20], window=64)
