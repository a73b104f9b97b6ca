"""Other runtimes as oracles, none of our code in between: transformers with the weights of a GGUF file, dequantized by
the `gguf` package, and llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {  # key of config.json: field of the GGUF file
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
OWN = {
    "llama": ("llama", {}),
    "gemma3": ("gemma3_text", {"head_dim": "attention.key_length", "sliding_window": "attention.sliding_window"}),
}


def from_gguf(path: Path) -> PreTrainedModel:
    """A float32 model with the dequantized weights of a llama or gemma3 GGUF whose head is its embedding."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    family, own = OWN[arch]
    settings = {key: reader.fields[f"{arch}.{field}"].contents() for key, field in {**COMMON, **own}.items()}
    vocab = int(tensors["token_embd.weight"].shape[1])
    config = AutoConfig.for_model(family, **settings, vocab_size=vocab, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = _dequantized(tensors.pop(gguf_name(arch, config.num_hidden_layers, name)))
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = neighbours_to_halves(values, heads)
            if arch == "gemma3" and "norm" in name:
                values = values - 1
            weight.copy_(torch.from_numpy(values))
    assert not tensors
    return model.eval()


def _dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return values.reshape([int(n) for n in reversed(tensor.shape)])


class LlamaCpp:
    """What llama.cpp expects to follow a prompt, with float32 keys and values."""

    def __init__(self, path: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.warmup, params.verbosity = context, 1, 0, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def following(self, ids: np.ndarray, most: int, letter: int) -> dict[int, float]:
        """Log-probabilities of the `most` likely next tokens, by id. `letter` is a token of whole characters: it is
        made to follow, because for a part of a character the server would report nothing."""
        body = {
            "prompt": ids.tolist(),
            "max_tokens": 1,
            "n_probs": most,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "logit_bias": [[letter, 1000.0]],  # the log-probabilities are those without it
        }
        (token,) = self._server.handle_completions(body)["choices"][0]["logprobs"]["content"]
        return {other["id"]: other["logprob"] for other in token["top_logprobs"]}


def neighbours_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def halves_to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(arch: str, layers: int, name: str) -> str:
    """The name of a parameter of transformers in a GGUF file."""
    kind = next(kind for kind, its in gguf.MODEL_ARCH_NAMES.items() if its == arch)
    found = gguf.get_tensor_name_map(kind, layers).get_name(name, (".weight", ".bias"))
    assert found is not None, f"{arch} has no place for {name}"
    return found
