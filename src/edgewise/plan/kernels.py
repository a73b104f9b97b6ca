"""What our own runtime will do on a machine whose kernels were measured (devices/host.py): each part of a token's time
out of the rate that its kernel reached there.

    decode:   weights / streaming rate + keys and values / reading rate + hand-overs + elements
    prefill:  multiply-adds / product rate + attention / float rate + elements

Nothing is fitted on models: the constants below are how the runtime works (how often it hands work to its threads) and
what benchmarks/where.py shows of it (what share of a plain kernel's rate attention reaches).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from edgewise.devices.host import Host
from edgewise.devices.reading import Reading
from edgewise.models.outline import Outline
from edgewise.plan.fit import Estimate
from edgewise.plan.precision import Precision, streamed
from edgewise.plan.speed import RUNTIMES, weights

HANDOVERS: Final = 5  # of a layer in decoding: qkv, attention, o, gate and up, down
KV_BYTES: Final = 2  # bfloat16
FOUR_BITS: Final = 6.6  # bits per weight below which the 4-bit kernels run
ATTENTION_READ: Final = 0.65  # of the reading rate, in decoding
ATTENTION_RATE: Final = {"avx512_bf16": 2.2, "avx512f": 1.0, "": 0.5}  # of numpy's float32 rate; the first there is
ELEMENTS_PER_S: Final = 4e9  # norms, rotations, rounding, to places: of one thread
FIRST_S: Final = 3.5e-3  # from a prompt to its first token besides computing: threads woken, a token chosen
UNSURE: Final = 1.15  # what is not in the formula: the clock under another load, neighbours
EDGEWISE: Final = next(runtime for runtime in RUNTIMES if runtime.name == "edgewise")


def predict(
    host: Host, outline: Outline, precision: Precision | None, context: int, prompt: int
) -> tuple[Estimate, Estimate] | None:
    """tok/s of decoding with so many tokens before, and of a prompt of so many; None where our kernels do not run."""
    if host.rate("native_handover_s") is None or host.rate("native_q4_prefill_mac_per_s") is None:
        return None
    formula = _Formula(host, outline, precision)
    return _between(lambda end: formula.decode_s(context, end)), _between(lambda end: formula.prefill_s(prompt, end))


End = Callable[[Reading], float]  # which number of a reading counts


def _between(seconds: Callable[[End], float]) -> Estimate:
    """The middle; and the slowest and the fastest that the readings allow, widened by what they do not show."""
    value, low, high = (1 / seconds(end) for end in (_middle, _slow, _fast))
    return Estimate(value, min(low, value) / UNSURE, max(high, value) * UNSURE)


def _middle(reading: Reading) -> float:
    return reading.median


def _slow(reading: Reading) -> float:
    return reading.high if reading.unit == "s" else reading.low


def _fast(reading: Reading) -> float:
    return reading.low if reading.unit == "s" else reading.high


class _Formula:
    def __init__(self, host: Host, outline: Outline, precision: Precision | None) -> None:
        self._host, self._outline = host, outline
        self._stored = weights(outline, precision, EDGEWISE)
        self._threads = host.machine.usable_cores
        self._body_bytes = streamed(outline, self._stored) - self._stored.head
        self._body = _bits(self._body_bytes, outline.active_body)
        self._head = _bits(self._stored.head, outline.head)

    def decode_s(self, context: int, end: End) -> float:
        o = self._outline
        read = o.kv_values_read(context) * KV_BYTES / (ATTENTION_READ * self._rate("read_bytes_per_s", end))
        handovers = (HANDOVERS * o.layers + 1) * self._rate("native_handover_s", end)
        elements = self._elements() / ELEMENTS_PER_S  # a lone row is one thread's
        body = self._streamed_s(self._body_bytes, o.active_body, self._body, end)
        return body + self._streamed_s(self._stored.head, o.head, self._head, end) + read + handovers + elements

    def prefill_s(self, prompt: int, end: End) -> float:
        """Of one token, in the middle of the prompt."""
        o = self._outline
        body = o.active_body / self._rate(f"native_q{self._body}_prefill_mac_per_s", end)
        attention = 2 * o.heads * o.head_dim * sum(o.seen(max(1, prompt // 2)))
        share = next(rate for name, rate in ATTENTION_RATE.items() if not name or name in self._host.machine.simd)
        head = self._streamed_s(self._stored.head, o.head, self._head, end) / prompt  # of the last token alone
        elements = self._elements() / ELEMENTS_PER_S / self._threads
        return body + attention / (share * self._rate("fp32_mac_per_s", end)) + head + elements + FIRST_S / prompt

    def _streamed_s(self, count: float, macs: int, bits: int, end: End) -> float:
        """Weights out of memory, or out of the caches that hold the whole model."""
        cache = self._host.machine.cache_bytes or 0
        if self._stored.body + self._stored.head < cache:
            return macs / self._rate(f"native_q{bits}_decode_mac_per_s", end)
        return count / self._rate(f"native_q{bits}_decode_bytes_per_s", end)

    def _elements(self) -> float:
        """Numbers that the steps between the products touch."""
        o = self._outline
        return o.layers * (4.0 * o.hidden + o.head_dim * (o.heads + 4 * o.kv_heads) + o.ffn)

    def _rate(self, name: str, end: End) -> float:
        reading = self._host.rate(name)
        assert reading is not None, name  # own kernels, and those that `predict` asked for
        return end(reading)


def _bits(count: float, parameters: int) -> int:
    return 4 if 8 * count / parameters < FOUR_BITS else 8
