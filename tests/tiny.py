"""Tiny random models of each family, made with transformers, as directories and as GGUF files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ggml_blocks import quantize
from oracle import gguf_name, halves_to_neighbours

WINDOW = 24
FAMILIES: dict[str, dict[str, Any]] = {  # model_type of transformers, and what shows the family's own ways
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
        "num_hidden_layers": 7,  # the sixth sees everything
    },
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "olmo2": {"tie_word_embeddings": False},  # llama.cpp reads no other
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 0},  # the fourth does not turn
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # GGUF's name, where it is another
NEIGHBOURS = {"llama", "granite", "smollm3"}  # whose converters store q and k for rotation of neighbours
VOCAB = 320  # 256 bytes, some merges, and special tokens
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A float32 model whose logits are far from uniform, the same for the same arguments."""
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
    }
    settings |= FAMILIES[family] | changes
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
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
    model: PreTrainedModel,
    path: Path,
    kind: gguf.GGMLQuantizationType | Callable[[str], gguf.GGMLQuantizationType],
    yarn_attn_factor: float | None = None,
) -> Path:
    """The model as a GGUF file of that type, or of one for each name of a matrix. The model's own matrices are replaced
    by the dequantized ones."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    _add_attention(writer, config)
    _add_rope(writer, model)
    if yarn_attn_factor is not None:
        writer.add_rope_scaling_attn_factors(yarn_attn_factor)
    _add_scales(writer, config)
    _add_tokenizer(writer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            offset = 1.0 if arch.startswith("gemma") and "norm" in name else 0.0
            place = gguf_name(arch, config.num_hidden_layers, name)
            _add_tensor(writer, place, weight, kind, config, permute=arch in NEIGHBOURS, offset=offset)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_attention(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _add_scales(writer: gguf.GGUFWriter, config: Any) -> None:
    """What some families multiply or cap."""
    places = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, add in places.items():
        if (value := getattr(config, name, None)) is not None:
            add(value)


def _add_rope(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """As llama.cpp's converter does: llama3 as a tensor of divisors, other kinds as fields; of gemma3's two ropes, that
    of the layers that see everything."""
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
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
    kind: gguf.GGMLQuantizationType | Callable[[str], gguf.GGMLQuantizationType],
    config: Any,
    *,
    permute: bool,
    offset: float,
) -> None:
    values = weight.detach().numpy() + np.float32(offset)
    if values.ndim == 1:
        flat = values.reshape(-1, 1)
        writer.add_tensor(name, _permuted(name, flat, config)[:, 0].copy() if permute else values)
        return
    kind = kind if isinstance(kind, gguf.GGMLQuantizationType) else kind(name)
    packed = quantize(values, kind)
    weight.copy_(torch.from_numpy(np.array(gguf.dequantize(packed, kind)).reshape(values.shape)))
    writer.add_tensor(name, _permuted(name, packed, config) if permute else packed, raw_dtype=kind)


def _permuted(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "attn_q." in name:
        return halves_to_neighbours(values, config.num_attention_heads)
    if "attn_k." in name:
        return halves_to_neighbours(values, config.num_key_value_heads)
    return values
