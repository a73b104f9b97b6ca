"""A decoder's layers in float32 numpy, many rows of tokens at a time: for what has to see what each matrix is given.

Engines are quicker and see nothing inside a layer. Every matrix is asked for when its inputs are there, so that whoever
answers may look at them first, and may answer with another matrix. Tests hold it to the engines, family by family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from edgewise.models.blocks import Layer
from edgewise.models.card import Card
from edgewise.models.weights import Matrix
from edgewise.types import FloatArray, IdArray

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {  # matrices that read the same, in the order in which a layer does
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
Weigh = Callable[[str, FloatArray], FloatArray]  # a group and its inputs [rows, length, inputs]: [outputs, inputs]


def dense(layer: Layer, group: str) -> FloatArray:
    """The matrices of a group, one below the other, float32 [outputs, inputs]."""
    parts: list[Matrix] = [getattr(layer, name) for name in GROUPS[group]]
    return np.concatenate([part.dense() for part in parts])


def embedded(card: Card, table: FloatArray, ids: IdArray) -> FloatArray:
    """Hidden states before the first layer, float32 [rows, length, hidden], of ids [rows, length]."""
    return np.asarray(table[ids] * np.float32(card.embedding_scale))


def head_input(card: Card, norm: FloatArray, hidden: FloatArray) -> FloatArray:
    """What the head multiplies, [..., hidden]."""
    return _normed(hidden, norm, card.norm_eps)


def logits(card: Card, head: FloatArray, x: FloatArray) -> FloatArray:
    """float32 [..., vocab] of `head_input`'s."""
    found = x @ head.T
    found *= np.float32(card.logit_scale)
    return _capped(found, card.logit_cap)


class Layers:
    """The layers of a card over rows of at most `length` tokens, each from its position 0."""

    def __init__(self, card: Card, length: int) -> None:
        self._card = card
        self._turns = {name: rope.tables(length) for name, rope in card.ropes.items()}

    def through(self, n: int, layer: Layer, hidden: FloatArray, weigh: Weigh) -> FloatArray:
        """Hidden states [rows, length, hidden] behind layer `n`, float32. The norms and biases are `layer`'s, the
        matrices what `weigh` gives."""
        card, scale = self._card, np.float32(self._card.residual_scale)
        x = _normed(hidden, layer.attention_norm, card.norm_eps)
        qkv = weigh("qkv", x)
        mixed = np.stack([self._attention(n, layer, row @ qkv.T) for row in x])
        attended = _plus(mixed @ weigh("o", mixed).T, layer.o_bias)
        hidden = hidden + _normed(attended, layer.attention_out_norm, card.norm_eps) * scale
        x = _normed(hidden, layer.ffn_norm, card.norm_eps)
        gate_up = weigh("gate_up", x)
        gated = np.stack([self._gated(layer, row @ gate_up.T) for row in x])
        fed = _plus(gated @ weigh("down", gated).T, layer.down_bias)
        return np.asarray(hidden + _normed(fed, layer.ffn_out_norm, card.norm_eps) * scale)

    def _attention(self, n: int, layer: Layer, qkv: FloatArray) -> FloatArray:
        """What attention makes of one row's queries, keys and values [length, …]: [length, heads * head_dim]."""
        card, length = self._card, len(qkv)
        if layer.qkv_bias is not None:
            qkv = qkv + np.concatenate(layer.qkv_bias)
        queries, keys = card.heads * card.head_dim, card.kv_heads * card.head_dim
        q, k, v = np.split(qkv, [queries, queries + keys], axis=1)
        if layer.qk_norm is not None:
            q, k = (_normed_runs(part, norm, card.norm_eps) for part, norm in zip((q, k), layer.qk_norm, strict=True))
        q, k = (self._turned(n, part.reshape(length, -1, card.head_dim).transpose(1, 0, 2)) for part in (q, k))
        v = v.reshape(length, -1, card.head_dim).transpose(1, 0, 2)
        grouped = q.reshape(card.kv_heads, -1, length, card.head_dim)
        shares = _softmax(self._scores(n, grouped @ k[:, None].swapaxes(-1, -2)))
        mixed = (shares @ v[:, None]).reshape(card.heads, length, card.head_dim)
        return mixed.transpose(1, 0, 2).reshape(length, -1)

    def _turned(self, n: int, x: FloatArray) -> FloatArray:
        """With the layer's rotary embedding, x [heads, length, head_dim]."""
        name = self._card.rope_of(n)
        if name is None:
            return x
        cos, sin = (table[: x.shape[1]] for table in self._turns[name])
        turned = cos.shape[1]
        first, second, rest = x[..., :turned], x[..., turned : 2 * turned], x[..., 2 * turned :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def _scores(self, n: int, products: FloatArray) -> FloatArray:
        """Scaled, capped, and -inf where a position does not see the other, [..., length, length]."""
        card, length = self._card, products.shape[-1]
        scale = card.head_dim**-0.5 if card.attention_scale is None else card.attention_scale
        scores = _capped(products * np.float32(scale), card.attention_cap)
        back = np.arange(length)[:, None] - np.arange(length)
        hidden = (back < 0) | (back >= (card.window(n) or length))
        scores[..., hidden] = -np.inf
        return scores

    def _gated(self, layer: Layer, gate_up: FloatArray) -> FloatArray:
        """activation(gate) * up of one row, [length, ffn]."""
        if layer.gate_up_bias is not None:
            gate_up = gate_up + np.concatenate(layer.gate_up_bias)
        gate, up = np.split(gate_up, 2, axis=1)
        if self._card.activation == "silu":
            with np.errstate(over="ignore"):  # exp of a large number: the share is 0
                return np.asarray(gate / (1 + np.exp(-gate)) * up)
        inner = np.float32((2 / np.pi) ** 0.5) * (gate + np.float32(0.044715) * gate**3)
        return np.asarray(np.float32(0.5) * gate * (1 + np.tanh(inner)) * up)


def _normed(x: FloatArray, scale: FloatArray | None, eps: float) -> FloatArray:
    """The RMS norm over the last axis; x itself if there is none."""
    if scale is None:
        return x
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * scale)


def _normed_runs(x: FloatArray, scale: FloatArray, eps: float) -> FloatArray:
    """The RMS norm over each run of `scale`'s length in the last axis."""
    return _normed(x.reshape(len(x), -1, len(scale)), scale, eps).reshape(x.shape)


def _capped(x: FloatArray, cap: float) -> FloatArray:
    return np.asarray(np.float32(cap) * np.tanh(x / np.float32(cap))) if cap else x


def _plus(x: FloatArray, bias: FloatArray | None) -> FloatArray:
    return x if bias is None else np.asarray(x + bias)


def _softmax(scores: FloatArray) -> FloatArray:
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
