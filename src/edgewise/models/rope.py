"""Rotary frequencies from a model's configuration. Every kind ends in a `Rope`: frequencies and one factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgewise.errors import UnsupportedModel
from edgewise.models.card import Rope
from edgewise.types import FloatArray


def plain(theta: float, dims: int) -> FloatArray:
    """float32 [dims / 2]: theta^(-2i/dims) (Su et al. 2021, RoFormer)."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.asarray(1 / np.power(np.float32(theta), exponents), dtype=np.float32)


def from_config(theta: float, dims: int, context: int, scaling: Mapping[str, Any] | None) -> Rope:
    """A Rope from a Hugging Face `rope_scaling` / `rope_parameters` object (None = plain).
    UnsupportedModel for kinds whose frequencies depend on the length of the text."""
    scaling = scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    frequencies = plain(theta, dims)
    if kind == "default":
        return _rope(frequencies)
    try:
        if kind == "linear":
            return _rope(np.asarray(frequencies * (1 / float(scaling["factor"])), dtype=np.float32))
        if kind == "llama3":
            return _rope(_llama3(frequencies, scaling))
        if kind == "yarn":
            return _yarn(frequencies, theta, dims, context, scaling)
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise UnsupportedModel(f"RoPE scaling {dict(scaling)!r} lacks or has a bad value for {e}") from e
    raise UnsupportedModel(
        f"RoPE scaling of kind {kind!r} is not supported (known: default, linear, llama3, yarn)",
        hint="run its GGUF with the llamacpp engine",
    )


def from_factors(theta: float, dims: int, factors: FloatArray) -> Rope:
    """A Rope from a GGUF `rope_freqs.weight` tensor: float32 [dims / 2] divisors of the plain frequencies."""
    return _rope(np.asarray(plain(theta, dims) / factors, dtype=np.float32))


def _rope(frequencies: FloatArray, factor: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), factor)


def _llama3(frequencies: FloatArray, scaling: Mapping[str, Any]) -> FloatArray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, the band between is blended."""
    factor, old = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((old / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies, dtype=np.float32)


def _yarn(frequencies: FloatArray, theta: float, dims: int, context: int, scaling: Mapping[str, Any]) -> Rope:
    """YaRN (Peng et al. 2023): a ramp between interpolated and plain frequencies, and a factor on cos and sin."""
    old = float(scaling.get("original_max_position_embeddings") or context)
    factor = float(scaling.get("factor") or context / old)

    def dimension(rotations: float) -> float:
        return dims * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return _rope(blended.astype(np.float32), _yarn_factor(factor, scaling))


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cos and sin for a context longer by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return yarn_scale(factor, float(scaling["mscale"])) / yarn_scale(factor, float(scaling["mscale_all_dim"]))
    return yarn_scale(factor)
