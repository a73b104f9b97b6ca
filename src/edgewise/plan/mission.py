"""The guide's performance table, figure by figure: what it says, what physics allows, what is predicted, what somebody
measured, and the verdict.

Its figures name a size and a device, and nothing else. Taken here: a model of the usual proportions, one stream, the
unit and runtime that are predicted fastest. A throughput is that of decoding; a latency can only be the time to the
first token, and is taken of a prompt of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from edgewise.devices.catalogue import Catalogue, Claim
from edgewise.models.known import of_words
from edgewise.plan.planner import Plan, Wish, make
from edgewise.plan.precision import PRECISIONS, streamed, weigh
from edgewise.plan.sites import Catalogued
from edgewise.plan.speeds import Speeds

PROMPT: Final = 128
PRECISION: Final = {"fp16": PRECISIONS["fp16"], "int4": PRECISIONS["q4_0"]}
CONTEXT: Final = 512


def table(catalogue: Catalogue, speeds: Speeds) -> list[dict[str, Any]]:
    """A row for each figure of the guide's table. The ceiling of a throughput reads all weights once a token at the
    peak bandwidth; that of a latency multiplies the prompt at the peak rate."""
    return [_row(catalogue, speeds, claim) for claim in _claims(catalogue)]


def _claims(catalogue: Catalogue) -> Iterator[Claim]:
    return (claim for claim in catalogue.claims if claim.group == "benchmarks" and claim.device is not None)


def _row(catalogue: Catalogue, speeds: Speeds, claim: Claim) -> dict[str, Any]:
    assert claim.device is not None
    size = claim.row.removesuffix("_model")
    site = Catalogued(claim.device, catalogue.devices[claim.device])
    outline = of_words(f"{size} llama-like")
    wish = Wish(precision=PRECISION["int4"], context=CONTEXT, prompt=PROMPT)
    plan = make(outline, site, speeds, wish)
    latency = claim.figure == "latency"
    machine = site.machine(plan.unit, plan.runtime)
    if latency:
        peak_ms = 2 * PROMPT * (outline.macs_per_token(PROMPT // 2) - outline.head) / machine.prefill_tops / 1e9
        ceilings = {"int4": peak_ms}
    else:
        ceilings = {name: _ceiling(outline, precision, machine.bandwidth_gb_s) for name, precision in PRECISION.items()}
    predicted = plan.first_token_ms if latency else plan.decode_tok_s
    return {
        "model": size,
        "device": catalogue.devices[claim.device].name,
        "figure": claim.figure,
        "unit": claim.unit,
        "claimed": claim.value,
        "ceiling": ceilings,
        "predicted": predicted._asdict(),
        "predicted_with": _with(plan),
        "measured": claim.measured,
        "verdict": claim.verdict,
        "why": claim.why,
        "source": None if claim.source is None else catalogue.sources[claim.source].title,
    }


def _ceiling(outline: Any, precision: Any, bandwidth_gb_s: float) -> float:
    return bandwidth_gb_s * 1e9 / streamed(outline, weigh(outline, precision))


def _with(plan: Plan) -> str:
    return f"{plan.precision} on the {plan.unit} with {plan.runtime}"
