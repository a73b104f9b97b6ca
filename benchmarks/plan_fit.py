"""Fit the speeds that ship with the planner, and say how far they err.

    python benchmarks/plan_fit.py [ROWS.csv] [--ours benchmarks/results/engines.json] [-o src/edgewise/plan/speeds.json]

ROWS.csv has the columns of docs/planner.md; without it, data/devices/llm_benchmarks.csv in EDGEWISE_SHARED is taken, or
in shared/ beside the repository. `--ours` adds our own engine, which no published row has, from a Measurement file of
`edgewise bench engines`. The figures go to benchmarks/results/plan_fit.json, from which `make docs` fills
docs/planner.md: predictions for each device from the others' rows, grouped also by chip, and again with each
hyper-parameter halved and doubled.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edgewise.bench.measure import Measurement, typed
from edgewise.devices.catalogue import shipped as catalogue
from edgewise.plan import measured
from edgewise.plan.evaluate import evaluate, report
from edgewise.plan.fit import BELIEFS, Beliefs, Prior, Target
from edgewise.plan.rows import Machines, Row, by, read
from edgewise.plan.speeds import SHIPPED, Speeds

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("EDGEWISE_SHARED", ROOT.parent / "shared"))
STEPS = {"halved": 0.5, "doubled": 2.0}
SHARE_STEPS = {"halved": 1 / 1.18, "doubled": 1.18}  # a share cannot be doubled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=SHARED / "data" / "devices" / "llm_benchmarks.csv")
    parser.add_argument("--ours", type=Path, help="a Measurement file of `edgewise bench engines`")
    parser.add_argument("-o", "--output", type=Path, default=SHIPPED)
    options = parser.parse_args()
    published, machines = read(options.rows), by(catalogue())
    rows, everywhere = with_ours(published, machines, options.ours)
    Speeds.fitted(rows, everywhere).save(options.output)
    results = {
        "rows": len(published),
        "devices": len({row.device for row in published}),
        "left_out": left_out(published, machines, BELIEFS),
        "left_out_by_chip": left_out(by_chip(published, machines), machines, BELIEFS),
        "left_out_without_distrusted": left_out([row for row in published if row.trusted], machines, BELIEFS),
        "sensitivity": {name: left_out(published, machines, changed)["decode"] for name, changed in changes()},
    }
    show(results)
    taken = Measurement.taken(
        "plan_fit",
        command=typed(__file__),
        kind="predicted",
        results=results,
        settings={"rows": options.rows.name, "ours": options.ours and options.ours.name},
        libraries=["edgewise", "numpy"],
    )
    print(options.output, taken.save(Path(__file__).parent / "results"))


def with_ours(rows: list[Row], machines: Machines, ours: Path | None) -> tuple[list[Row], Machines]:
    """The rows, and those of our own engines on the machine whose limits the same file holds."""
    if ours is None:
        return rows, machines
    cpu = json.loads(ours.read_text())["machine"]["cpu"]
    own = [row for row in measured.read(ours, cpu) if row.runtime.startswith("edgewise")]
    machine = measured.machine(ours, cpu, "server")
    return [*rows, *own], lambda row: machine if row.device == cpu else machines(row)


def left_out(rows: Sequence[Row], machines: Machines, beliefs: Mapping[Target, Beliefs]) -> dict[str, Any]:
    """The report of leaving each device out, when all of them shaped the speeds: nothing shipped is used."""
    fitted = Speeds.fitted(rows, machines, beliefs)
    return dict(report(evaluate(rows, machines, fitted, leave_one_device_out=True)))


def by_chip(rows: Sequence[Row], machines: Machines) -> list[Row]:
    """The rows under the names of their chips, so that phones with one chip leave together."""
    return [replace(row, device=machines(row).device, bandwidth_gb_s=machines(row).bandwidth_gb_s) for row in rows]


def changes() -> Iterator[tuple[str, Mapping[Target, Beliefs]]]:
    """Each hyper-parameter of decode, halved and doubled."""
    decode = BELIEFS["decode"]
    for step, factor in STEPS.items():
        for name in ("noise", "noise_tail", "device_tail"):
            changed = replace(decode, **{name: getattr(decode, name) * factor})
            yield f"{name} {step}", {**BELIEFS, "decode": changed}
        for group in dict.fromkeys("/".join(name.split("/")[:2]) for name in decode.priors):
            yield f"sd of {group} {step}", {**BELIEFS, "decode": moved(decode, group, 1.0, factor)}
        for group in ("bandwidth/unit", "rate/unit", "launch/unit"):
            middle = SHARE_STEPS[step] if group.startswith("bandwidth") else factor
            label = f"{group} {step}" if middle == factor else f"{group} times {middle:.2f}"
            yield label, {**BELIEFS, "decode": moved(decode, group, middle, 1.0)}


def moved(beliefs: Beliefs, group: str, middle: float, sd: float) -> Beliefs:
    priors = {
        name: Prior(prior.middle * middle, prior.sd * sd) if name.startswith(group) else prior
        for name, prior in beliefs.priors.items()
    }
    return replace(beliefs, priors=priors)


def show(results: Mapping[str, Any]) -> None:
    for title in ("left_out", "left_out_by_chip", "left_out_without_distrusted"):
        for target, groups in results[title].items():
            for group, figures in groups.items():
                print(f"{title:28} {target:8} {group:10}", *(f"{name} {value:.3g}" for name, value in figures.items()))
    for name, groups in results["sensitivity"].items():
        line = (f"{g} {f['median_ape']:.3f} {f['mean_ape']:.3f} {f['coverage80']:.2f}" for g, f in groups.items())
        print(f"{name:40}", "  ".join(line))


if __name__ == "__main__":
    main()
