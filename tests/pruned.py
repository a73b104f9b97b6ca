"""A tiny model, and the same one with a part of its vocabulary, as directories of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tiny import SPECIAL, VOCAB, save_hf, tiny

LEFT_OUT = 20  # merged tokens that the part has not


def whole_and_part(directory: Path) -> tuple[Path, Path]:
    """In float32. The part has its tokens in another order, and gives each what the whole gives it, renormalised."""
    model = tiny("llama")
    whole = save_hf(model, directory / "whole")
    kept = [*reversed(range(256)), *range(256, VOCAB - len(SPECIAL) - LEFT_OUT), *range(VOCAB - len(SPECIAL), VOCAB)]
    small = tiny("llama", vocab_size=len(kept))
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][torch.tensor(kept)]
    small.load_state_dict(state)
    part = save_hf(small, directory / "part")
    file = part / "tokenizer.json"
    file.write_text(json.dumps(_renumbered(json.loads(file.read_text()), kept)))
    return whole, part


def _renumbered(tokenizer: dict, kept: list[int]) -> dict:
    model = tokenizer["model"]
    names = {id: name for name, id in model["vocab"].items()}
    model["vocab"] = {names[old]: new for new, old in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for token in tokenizer["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    return tokenizer
