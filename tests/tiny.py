"""Tiny random models of each family, made with transformers, as directories and as GGUF files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from oracle import NAMES, halves_to_neighbours

CONFIGS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
VOCAB = 320  # 256 bytes, some merges, and special tokens
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A float32 model whose logits are far from uniform, the same for the same arguments."""
    config_class, model_class = CONFIGS[family]
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,  # above, transformers itself is 1e-4 off its own float64
    } | changes
    torch.manual_seed(7)
    model = model_class(config_class(**settings))
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a swapped one
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * (0.1 if "norm" in name else 0.3))
    return model.eval()


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE vocabulary of VOCAB tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "abcdefgh" for b in "aeiou"] + [("Ġ", c) for c in "abcdefghijklmnopqrstu"]
    merges = merges[: VOCAB - 256 - len(SPECIAL)]
    tokens = alphabet + [a + b for a, b in merges] + SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def save_hf(model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a Hugging Face directory; with a narrow dtype the model itself is rounded to it."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype).to(torch.float32))
    copy.deepcopy(model).to(dtype).save_pretrained(directory)  # a model cast in place would round its rope as well
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def save_gguf(
    model: PreTrainedModel, path: Path, kind: gguf.GGMLQuantizationType, yarn_attn_factor: float | None = None
) -> Path:
    """The model as a GGUF file of that type. The model's own matrices are replaced by the dequantized ones."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_rope_scaling(writer, model)
    if yarn_attn_factor is not None:
        writer.add_rope_scaling_attn_factors(yarn_attn_factor)
    _add_tokenizer(writer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _add_tensor(writer, _gguf_name(name), weight, kind, config, permute=arch == "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope_scaling(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """As llama.cpp's converter does: llama3 as a tensor of divisors, other kinds as fields."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.numpy()
        plain = rope["rope_theta"] ** -(np.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies)))
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).astype(np.float32))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = byte_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(VOCAB)]
    merges = [f"{a} {b}" for a in "abcdefgh" for b in "aeiou"] + [f"Ġ {c}" for c in "abcdefghijklmnopqrstu"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges(merges[: VOCAB - 256 - len(SPECIAL)])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    weight: torch.Tensor,
    kind: gguf.GGMLQuantizationType,
    config: Any,
    *,
    permute: bool,
) -> None:
    values = weight.detach().numpy()
    if values.ndim == 1:
        flat = values.reshape(-1, 1)
        writer.add_tensor(name, _permuted(name, flat, config)[:, 0].copy() if permute else values)
        return
    packed = gguf.quantize(_permuted(name, values, config) if permute else values, kind)
    exact = gguf.dequantize(gguf.quantize(values, kind), kind)
    weight.copy_(torch.from_numpy(np.array(exact).reshape(values.shape)))
    writer.add_tensor(name, packed, raw_dtype=kind)


def _permuted(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "attn_q." in name:
        return halves_to_neighbours(values, config.num_attention_heads)
    if "attn_k." in name:
        return halves_to_neighbours(values, config.num_key_value_heads)
    return values


def _gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    ours = {hf: ours for ours, hf in NAMES.items()}[part]
    return f"blk.{layer}.{ours}.{kind}"
