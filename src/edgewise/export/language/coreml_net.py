"""A decoder of the llama kind as Core ML wants one: every shape fixed, keys and values in buffers, which become states.

It is built from a model's card (models/card.py, as JSON) and takes weights under transformers' names. Whether it
computes what the model does is a matter of numbers: `coreml_lm.py` compares them before anything is converted. torch is
used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgewise.errors import UnsupportedModel

HIDDEN: Final = -1e4  # what a hidden position adds to its score: no probability, and half precision holds it
LEAST: Final = 1e-3  # of the largest number of a row, so that a row of zeros can be divided by it


class Decoder(nn.Module):
    """`input_ids` int32 [1, length] standing at `position` int32 [1, length] give `logits` float32 [1, vocab] of the
    token behind the last of them. Where ids are fewer than `length`, the rest stands at position -1: nothing is stored
    for those. `cache` is the most positions of a text."""

    cos: Tensor
    sin: Tensor
    places: Tensor

    def __init__(self, card: Mapping[str, Any], length: int, cache: int) -> None:
        super().__init__()
        check(card)
        self.card, self.length, self.cache = card, length, cache
        self.model = _Body(card, cache)
        if not card["tied"]:
            self.lm_head = nn.Linear(card["hidden"], card["vocab"], bias=False)
        shape = (1, card["kv_heads"], cache, card["head_dim"])
        for layer in range(card["layers"]):
            self.register_buffer(f"key_{layer}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"value_{layer}", torch.zeros(shape), persistent=False)
        cos, sin = _turns(card, cache)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("places", torch.arange(cache, dtype=torch.int32), persistent=False)

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        at = position[0][:, None]
        here = torch.eq(self.places, at).to(self.cos.dtype)  # [length, cache]: exact, whatever the precision
        x = _scaled(self.model.embed_tokens(input_ids)[0], self.card.get("embedding_scale", 1.0))
        turn = (here @ self.cos, here @ self.sin)
        for n, layer in enumerate(self.model.layers):
            mask = self._mask(at, n)
            x = layer(x, turn if n not in self.card.get("unrotated", ()) else None, here, mask, *self._states(n))
        if self.length > 1:
            x = (position == position.max()).to(x.dtype) @ x
        x = self.model.norm(x)
        head = self.model.embed_tokens.weight if self.card["tied"] else self.lm_head.weight
        logits = _scaled(F.linear(x, head), self.card.get("logit_scale", 1.0))
        cap = self.card.get("logit_cap", 0.0)
        return torch.tanh(logits / cap) * cap if cap else logits

    def reset(self) -> None:
        for name, buffer in self.named_buffers():
            if name.startswith(("key_", "value_")):
                buffer.zero_()

    def _states(self, layer: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"key_{layer}"), getattr(self, f"value_{layer}")

    def _mask(self, at: Tensor, layer: int) -> Tensor:
        """[length, cache]: 0 where a row may look, HIDDEN elsewhere."""
        seen = self.places <= at
        windows = self.card.get("windows", ())
        if windows and windows[layer]:
            seen = torch.logical_and(seen, self.places > at - windows[layer])
        return (1.0 - seen.to(self.cos.dtype)) * HIDDEN


class _Body(nn.Module):
    def __init__(self, card: Mapping[str, Any], cache: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(card["vocab"], card["hidden"])
        self.layers = nn.ModuleList(_Layer(card) for _ in range(card["layers"]))
        self.norm = Norm(card["hidden"], card["norm_eps"])


class _Layer(nn.Module):
    def __init__(self, card: Mapping[str, Any]) -> None:
        super().__init__()
        self.scale = card.get("residual_scale", 1.0)
        self.input_layernorm = Norm(card["hidden"], card["norm_eps"])
        self.self_attn = _Attention(card)
        self.post_attention_layernorm = Norm(card["hidden"], card["norm_eps"])
        self.mlp = _FeedForward(card)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, here: Tensor, mask: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        x = x + _scaled(self.self_attn(self.input_layernorm(x), turn, here, mask, keys, values), self.scale)
        return x + _scaled(self.mlp(self.post_attention_layernorm(x)), self.scale)


class _Attention(nn.Module):
    def __init__(self, card: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, self.kv_heads, self.size = (
            card[name] for name in ("hidden", "heads", "kv_heads", "head_dim")
        )
        its = card.get("attention_scale")
        self.scale = 1.0 if its is None else its * math.sqrt(self.size)  # on top of the operator's own
        biased = card.get("qkv_bias", False)
        self.q_proj = nn.Linear(hidden, self.heads * self.size, bias=biased)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=biased)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=biased)
        self.o_proj = nn.Linear(self.heads * self.size, hidden, bias=card.get("attention_out_bias", False))
        self.norms = card.get("qk_norm", "none")
        if self.norms != "none":
            whole = self.norms == "whole"
            self.q_norm = Norm(self.size * (self.heads if whole else 1), card["norm_eps"])
            self.k_norm = Norm(self.size * (self.kv_heads if whole else 1), card["norm_eps"])

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, here: Tensor, mask: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        length, group = x.shape[0], self.heads // self.kv_heads
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norms == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (one.view(length, -1, self.size).transpose(0, 1) for one in (q, k, v))  # [heads, length, size]
        if self.norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = _turned(q, *turn), _turned(k, *turn)
        _store(keys, k, here)
        _store(values, v, here)
        q = _scaled(q, self.scale).reshape(1, self.kv_heads, group * length, self.size)  # by the key that they share
        rows = mask.repeat(group, 1)[None, None] if length > 1 else mask[None, None]
        seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=rows)
        seen = seen.reshape(self.heads, length, self.size).transpose(0, 1)
        found: Tensor = self.o_proj(seen.reshape(length, self.heads * self.size))
        return found


class _FeedForward(nn.Module):
    def __init__(self, card: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, ffn, biased = card["hidden"], card["ffn"], card.get("ffn_bias", False)
        self.gate_proj = nn.Linear(hidden, ffn, bias=biased)
        self.up_proj = nn.Linear(hidden, ffn, bias=biased)
        self.down_proj = nn.Linear(ffn, hidden, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Norm(nn.Module):
    """RMS norm whose squares cannot overflow in half precision: a row is divided by its largest number first."""

    root: Tensor

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("root", torch.tensor([math.sqrt(epsilon)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
        y, root = x / largest, self.root / largest
        return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + root * root) * self.weight


def check(card: Mapping[str, Any]) -> None:
    """UnsupportedModel if the model has ways that this network has not."""
    odd = {
        "activation": card.get("activation", "silu") != "silu",
        "norms behind its layers": card.get("post_norm", False) or not card.get("pre_norm", True),
        "capped attention scores": bool(card.get("attention_cap")),
        "two kinds of rotary embedding": card.get("local_rope") is not None,
    }
    if found := [name for name, there in odd.items() if there]:
        raise UnsupportedModel(
            f"a model of the family {card['family']!r} cannot go to Core ML: it has {', '.join(found)}",
            hint="llama, mistral, qwen2, qwen3 and models like them can; --to litert takes more",
        )


def _turns(card: Mapping[str, Any], cache: int) -> tuple[Tensor, Tensor]:
    """cos and sin of both halves, float32 [cache, turned]."""
    rope = card["rope"]
    angles = np.outer(np.arange(cache, dtype=np.float32), np.array(rope["inverse_frequencies"], np.float32))
    both = np.concatenate([angles, angles], 1)
    factor = np.float32(rope["attention_factor"])
    return torch.from_numpy(np.cos(both) * factor), torch.from_numpy(np.sin(both) * factor)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, size = cos.shape[-1], x.shape[-1]
    if turned < size:
        return torch.cat([_turned(x[..., :turned], cos, sin), x[..., turned:]], -1)
    half = size // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _scaled(x: Tensor, by: float) -> Tensor:
    return x if by == 1 else x * by


def _store(state: Tensor, rows: Tensor, here: Tensor) -> None:
    """The rows [heads, length, size] at their places of the state [1, heads, cache, size]."""
    if here.shape[0] == 1:
        written, placed = here[0][:, None] > 0, rows * here[0][:, None]
    else:
        written, placed = here.sum(0)[:, None] > 0, here.transpose(0, 1) @ rows
    state.copy_(torch.where(written, placed[None], state))
