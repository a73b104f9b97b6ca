"""What this machine could do at most: memory read and multiply-adds, each by the fastest kernel at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edgewise import registry
from edgewise.bench.host import kernels
from edgewise.devices.host import own_kernels
from edgewise.devices.machine import this_machine
from edgewise.engines.load import chosen_runtime, kv_bytes_per_token
from edgewise.models.bundle import Bundle
from edgewise.models.card import Card

REPEATS: Final = 9  # the best one counts: a limit is what was reached once
ENDS: Final = {  # of the names of kernels that show a limit
    "read_bytes_per_s": ("read_bytes_per_s", "decode_bytes_per_s"),
    "int8_mac_per_s": ("int8_mac_per_s", "prefill_mac_per_s"),
    "fp32_mac_per_s": ("fp32_mac_per_s",),
}


def probe(bundle: Path, threads: int) -> dict[str, Any]:
    """The machine's limits with so many threads, and the bytes of weights that one token of the bundle reads."""
    limits, reached_by = machine_limits(threads)
    return {**limits, "kernels": reached_by, **read_bytes_per_token(Bundle.open(bundle, check=False))}


def machine_limits(threads: int) -> tuple[dict[str, float], dict[str, str]]:
    """Each limit, and the kernel that reached it."""
    from edgewise.engines import onnx_probe  # heavy

    machine = this_machine()
    all_kernels = own_kernels(machine) | kernels(machine, threads) | onnx_probe.kernels(spinning=True)
    best = dict.fromkeys(all_kernels, 0.0)
    for _ in range(REPEATS):
        for name, kernel in all_kernels.items():
            best[name] = max(best[name], kernel(threads))
    winners = {limit: max((n for n in best if n.endswith(ends)), key=best.__getitem__) for limit, ends in ENDS.items()}
    return {limit: best[winner] for limit, winner in winners.items()}, winners


def read_bytes_per_token(bundle: Bundle) -> dict[str, int]:
    """What decoding a token reads: all weights of blocks and head once, and the keys and values of each position."""
    if chosen_runtime(bundle) == "native":
        weights: int = registry.engine("native")(bundle, slots=1).weight_bytes
    else:
        weights = _stored_weights(bundle)
    return {"weight_bytes_per_token": weights, "kv_bytes_per_position": kv_bytes_per_token(bundle)}


def _stored_weights(bundle: Bundle) -> int:
    import onnx

    stored: dict[tuple[str, int], int] = {}
    for file in bundle.manifest.graphs.layers_and_head:
        for weight in onnx.load_model(bundle.file(file), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in weight.external_data}
            if place:
                stored[place["location"], int(place["offset"])] = int(place["length"])
    return sum(stored.values())


def ceilings(card: Card, probed: Mapping[str, Any], prompt: int, new: int) -> dict[str, float]:
    """Tokens per second that the limits allow, one stream: decoding at the middle of the answer, and the prompt."""
    middle = prompt + new // 2
    read = probed["weight_bytes_per_token"] + probed["kv_bytes_per_position"] * middle
    decode, prefill = _macs(card, middle) + card.vocab * card.hidden, _macs(card, prompt // 2)
    return {
        "bytes_per_token": read,
        "macs_per_token": decode,
        "decode_read_tok_s": probed["read_bytes_per_s"] / read,
        "decode_int8_tok_s": probed["int8_mac_per_s"] / decode,
        "decode_fp32_tok_s": probed["fp32_mac_per_s"] / decode,
        "prefill_int8_tok_s": probed["int8_mac_per_s"] / prefill,
        "prefill_fp32_tok_s": probed["fp32_mac_per_s"] / prefill,
    }


def _macs(card: Card, length: int) -> int:
    """Multiply-adds of all layers for one token that sees `length` positions, the head not among them."""
    queries, keys = card.heads * card.head_dim, card.kv_heads * card.head_dim
    matrices = card.hidden * (2 * queries + 2 * keys + 3 * card.ffn)
    seen = sum(min(length, card.window(layer) or length) for layer in range(card.layers))
    return card.layers * matrices + 2 * queries * seen
