"""LayerSplitInference over a bundle: the halves of a language model in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.errors import BadFrame, RequestError, UnknownModel, UsageError
from edgewise.models.bundle import Bundle
from edgewise.split.inference import LayerSplitInference
from edgewise.wire.codec import codec
from edgewise.wire.feature import encode

IDS = np.random.default_rng(3).integers(0, 250, 20)


async def whole(bundle: Bundle) -> np.ndarray:
    model = local_model(bundle, slots=1)
    await model.open("s", len(IDS))
    (logits,) = await model.forward([Row("s", 0, IDS, len(IDS))])
    found = logits.copy()
    await model.shutdown()
    return found


async def test_exact_rows_change_no_bit(bundle: Bundle) -> None:
    expected = await whole(bundle)
    for cut in (1, 15, bundle.card.layers - 1):
        split = LayerSplitInference.of_bundle(bundle, cut=cut, codec="exact")
        assert split.full_inference(IDS).tobytes() == expected.tobytes()
        assert split.full_inference(torch.from_numpy(IDS)[None]).tobytes() == expected.tobytes()
        split.close()


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_rows_travel_in_the_boundary_s_own_codecs(bundle: Bundle, name: str) -> None:
    split = LayerSplitInference.of_bundle(bundle.path, cut=1, codec=name)
    features = split.edge_forward(IDS)
    assert features.shapes == {"rows": (len(IDS), codec(name).row_bytes(bundle.card.hidden))}
    assert split.raw_bytes == 4 * len(IDS) * bundle.card.hidden
    assert split.boundary_bytes == len(features)
    exact = LayerSplitInference.of_bundle(bundle, cut=1, codec="exact").full_inference(IDS)
    off = np.abs(split.cloud_forward(features) - exact).mean()
    assert 0 < off < {"fp16": 0.1, "int8": 0.2, "int4": 0.6}[name] * exact.std()


def test_features_of_another_cut_codec_or_shape_are_refused(bundle: Bundle) -> None:
    split = LayerSplitInference.of_bundle(bundle, cut=1, codec="int8")
    other = LayerSplitInference.of_bundle(bundle, cut=1, codec="exact")
    with pytest.raises(BadFrame, match="this cut is"):
        split.cloud_forward(other.edge_forward(IDS))
    label = split.edge_forward(IDS).label
    for tensor in (np.zeros((3, 2), np.uint8), np.zeros(4), np.zeros((0, 999), np.uint8)):
        with pytest.raises(BadFrame, match="hold no rows"):
            split.cloud_forward(encode({"rows": tensor}, label=label))


def test_what_is_no_cut_or_no_text(bundle: Bundle) -> None:
    for cut in (0, bundle.card.layers, -1):
        with pytest.raises(UsageError, match="cannot be cut at"):
            LayerSplitInference.of_bundle(bundle, cut=cut)
    with pytest.raises(UsageError, match="there is no codec"):
        LayerSplitInference.of_bundle(bundle, cut=1, codec="int6")
    split = LayerSplitInference.of_bundle(bundle, cut=1)
    for ids in (np.zeros(0, int), np.zeros((2, 3), int), np.zeros(3), np.array([-1]), np.array([10**9])):
        with pytest.raises(RequestError, match="token ids"):
            split.edge_forward(ids)


def test_names_are_looked_up_here(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEWISE_HOME", str(bundle.path.parents[1]))
    assert LayerSplitInference.of_bundle("smollm2", cut=1).full_inference(IDS).shape == (len(IDS), bundle.card.vocab)
    monkeypatch.setenv("EDGEWISE_HOME", str(tmp_path))
    with pytest.raises(UnknownModel):
        LayerSplitInference.of_bundle("smollm2", cut=1)
