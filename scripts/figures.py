"""Fill the tables of the pages below from the Measurement files; nobody retypes a number."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / "docs" / name
    for name in (
        *("performance.md", "planner.md", "joint.md", "split.md", "split_vision.md"),
        *("distillation.md", "distillation_intents.md", "quantization.md", "export.md"),
    )
)
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Measurement = dict[str, Any]
Rows = Iterator[list[str]]


def filled(page: Path) -> str:
    return MARKED.sub(lambda m: m[1] + section(m[2]) + m[3], page.read_text(encoding="utf-8"))


def section(name: str) -> str:
    file, made = TABLES[name]
    measurement = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    head, *rows = made(measurement)
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n{table}\n\n{provenance(measurement)}\n\n"


def provenance(measurement: Measurement) -> str:
    machine, versions = measurement["machine"], measurement["versions"]
    return (
        f"{measurement['kind'].capitalize()} {measurement['date'][:10]} by `{measurement['command']}` on "
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['simd'])}); "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"[{measurement['name']}.json](../benchmarks/results/{measurement['name']}.json)"
    )


def engines(measurement: Measurement) -> Rows:
    """All cells; the ratio is that of `edgewise fast` to the engine, or why there is none."""
    columns = {"prefill_tok_s": 1, "decode_tok_s": 1, "ttft_ms": 1, "cold_start_s": 1, "peak_rss_bytes": 1e-6}
    yield [
        *("prompt", "engine", "KL, nats", "prefill tok/s", "decode tok/s", "first token ms", "cold start s", "peak MB"),
        *("prefill ratio", "decode ratio"),
    ]
    for cell in measurement["results"]["cells"]:
        for name, row in cell["engines"].items():
            kl = "unknown" if row["kl"] is None else f"{row['kl']:.2g}"
            medians = [short(row[key]["median"] * scale) if row[key] else "" for key, scale in columns.items()]
            yield [str(cell["prompt_tokens"]), name, kl, *medians, *ratios(cell, name)]


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratios(cell: dict[str, Any], name: str) -> list[str]:
    ratio = cell["ratio_to"].get(name)
    if ratio is None:
        return [cell["engines"][name]["left_out"] or "", ""]
    return [interval(ratio["prefill_tok_s"]), interval(ratio["decode_tok_s"])]


def interval(figure: dict[str, Any]) -> str:
    return f"{figure['median']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


TARGETS = (  # figure, whose ratios, name of the ratio, least or most, and how much
    ("prefill", "ratio_to_best", "prefill_tok_s", ">=", 1.5),
    ("decode, fast", "ratio_to_best", "decode_tok_s", ">=", 1.2),
    ("decode, stable", "ratio_to_best_stable", "decode_tok_s", ">=", 1.05),
    ("cold start, fast", "llamacpp", "cold_start_s", "<=", 0.85),
    ("peak memory, fast", "llamacpp", "peak_rss_bytes", "<=", 1.3),
)
GEMMA_TARGETS = (
    ("prefill", "ratio_to_best", "prefill_tok_s", ">=", 1.0),
    ("decode", "ratio_to_best", "decode_tok_s", ">=", 1.0),
)
NODE_TARGETS = (  # of tokens that come one by one: figure, its name, and the most that it may be, in microseconds
    ("CPU time a token", "cpu_us", 150),
    ("added latency, p50", "added_us", 80),
)


def targets(measurement: Measurement, wanted: tuple[Any, ...] = TARGETS) -> Rows:
    yield ["figure", "compared with", "ratio", "wanted", ""]
    cell = next(cell for cell in measurement["results"]["cells"] if cell["prompt_tokens"] == 512)
    for name, whose, key, bound, much in wanted:
        ratio = cell[whose][key] if whose in cell else to_the_best(cell, whose, key)
        yield [name, ratio["best"], interval(ratio), f"{bound} {much}", verdict(ratio, bound, much)]


def to_the_best(cell: dict[str, Any], peer: str, key: str) -> dict[str, Any]:
    """The ratio to the variant of that peer that is least in the figure."""
    variants = [name for name in cell["ratio_to"] if name.split()[0] == peer]
    best = min(variants, key=lambda name: cell["engines"][name][key]["median"])
    return {**cell["ratio_to"][best][key], "best": best}


def verdict(figure: dict[str, Any], bound: str, much: float) -> str:
    low, median, high = (figure[key] if bound == ">=" else -figure[key] for key in ("low", "median", "high"))
    least = much if bound == ">=" else -much
    if median < least:
        return "missed"
    return "met" if min(low, high) >= least else "met, not in every round"


LIMITS = {
    "decode_read": "decode: bytes read",
    "decode_int8": "decode: int8 products",
    "prefill_int8": "prefill: int8 products",
    "prefill_fp32": "prefill: fp32 products",
}


def limits(measurement: Measurement) -> Rows:
    """What the machine's read bandwidth and arithmetic allow one stream, and who reaches how much of it."""
    yield ["prompt", "limit", "tok/s", "edgewise fast", "the best peer"]
    for cell in measurement["results"]["cells"]:
        found, peers = cell["limits"], cell["ratio_to"]
        for key, name in LIMITS.items():
            best = max(peers, key=lambda peer: found["share"][peer][key])
            ours, theirs = found["share"]["edgewise fast"][key], found["share"][best][key]
            yield [
                str(cell["prompt_tokens"]),
                name,
                short(found[f"{key}_tok_s"]),
                f"{ours:.0%}",
                f"{best}, {theirs:.0%}",
            ]


def gemma_targets(measurement: Measurement) -> Rows:
    return targets(measurement, GEMMA_TARGETS)


def node_targets(measurement: Measurement) -> Rows:
    yield ["figure", "node", "us", "wanted", ""]
    for name, key, most in NODE_TARGETS:
        for kind in ("cloud", "serve"):
            found = measurement["results"]["paced"][kind][key]
            yield [name, kind, interval(found), f"<= {most}", verdict(found, "<=", most)]


def fidelity(measurement: Measurement) -> Rows:
    yield ["bundle", "mean KL, nats", "p99 KL", "top-1 agreement", "perplexity"]
    for name, row in measurement["results"].items():
        compared = [f"{row[key]:.2g}" for key in ("kl_mean", "kl_p99")] if "kl_mean" in row else ["", ""]
        agreed = f"{row['top1_agreement']:.1%}" if "top1_agreement" in row else ""
        yield [name, *compared, agreed, f"{row['perplexity']:.2f}"]


def where(measurement: Measurement) -> Rows:
    """Shares of the operators, the dearest first, and the steps of a cold start."""
    yield ["of", "what", "median"]
    for part in ("prefill", "decode"):
        found = measurement["results"][part].items()
        for name, share in sorted(found, key=lambda item: -item[1]["median"]):
            yield [part, name, f"{share['median']:.1%}"]
    for step, took in measurement["results"]["cold_start"].items():
        yield ["cold start", step, f"{took['median']:.0f} ms"]


def host_prediction(measurement: Measurement) -> Rows:
    yield ["model and prompt", "figure", "predicted tok/s", "measured tok/s", "error"]
    for name, found in measurement["results"].items():
        for target in ("decode", "prefill"):
            one = found[f"{target}_tok_s"]
            yield [name, target, interval(one["predicted"]), interval(one["measured"]), f"{one['error']:+.1%}"]


ERRORS = ("n", "median_ape", "mean_ape", "p90_ape", "coverage80")


def errors(figures: dict[str, Any]) -> list[str]:
    count, *shares = (figures[key] for key in ERRORS)
    return [str(count), *(f"{share:.1%}" for share in shares)]


def plan_errors(measurement: Measurement) -> Rows:
    yield ["left out", "figure", "weights", "rows", "median error", "mean error", "p90 error", "in 80 % interval"]
    for key, what in (("left_out", "each device"), ("left_out_by_chip", "all devices of a chip")):
        for target, groups in measurement["results"][key].items():
            for group, figures in groups.items():
                yield [what, target, group, *errors(figures)]


def plan_sensitivity(measurement: Measurement) -> Rows:
    yield ["changed", "published: median", "mean", "all: median", "mean", "in 80 % interval"]
    for name, groups in measurement["results"]["sensitivity"].items():
        shown = [groups[group][key] for group in ("published", "all") for key in ("median_ape", "mean_ape")]
        yield [name, *(f"{share:.1%}" for share in shown), f"{groups['all']['coverage80']:.1%}"]


def block_size(measurement: Measurement) -> Rows:
    yield ["layers a block", "prefill tok/s", "decode tok/s"]
    for layers, row in measurement["results"].items():
        yield [layers, *(interval(row[key]) for key in ("prefill_tok_s", "decode_tok_s"))]


def node(measurement: Measurement) -> Rows:
    yield ["tokens come", "node", "CPU time a token, us", "added latency p50, us", "of the first token"]
    for name, found in measurement["results"].items():
        for kind in ("cloud", "serve"):
            yield [name, kind, *(interval(found[kind][key]) for key in ("cpu_us", "added_us", "first_us"))]


def breaker(measurement: Measurement) -> Rows:
    results = measurement["results"]
    yield ["figure", "ms"]
    for kind in ("whole", "streamed"):
        for share, added in results[kind]["added_ms"].items():
            yield [f"added to a {kind} answer, {share}", f"{added:.2f}"]
    first = results["first_request"]
    yield [f"first hard request, deadline {first['deadline_ms']:g} ms: {first['route']}", f"{first['took_ms']:.0f}"]


JOINT_TARGETS = {  # what was aimed at, by line
    "mmlu, prompt": "APGR .70, CPT 25 and 58 %",
    "gsm8k, prompt": "APGR .64",
    "gsm8k, answer": "APGR .75",
    "emotion, Qwen 1.8B to Mistral 7B": "APGR .93, better than the cloud alone",
    "emotion, Llama 7B to 13B": "APGR .82",
    "math500, 30 % budget": "cloud - 1 point at 30 %",
}


def joint(measurement: Measurement) -> Rows:
    yield [
        *("replay", "labels", "APGR", "baseline", "CPT 50", "CPT 80", "AUROC, over best signal"),
        *("calibration error over its floor", "escalated", "accuracy over the cloud's", "CPU of a decision, p50, p99"),
        "aimed at",
    ]
    for name, row in measurement["results"].items():
        mean, spread = row["mean"], row["deviation"]
        apgr = "-" if mean["apgr"] is None else f"{mean['apgr']:.3f} ± {spread['apgr']:.3f}"
        shares = ["-" if mean[key] is None else f"{mean[key]:.1%}" for key in ("cpt50", "cpt80")]
        yield [
            *(name, str(row["labels"]), apgr, "-" if mean["baseline_apgr"] is None else f"{mean['baseline_apgr']:.3f}"),
            *(*shares, f"{mean['auroc']:.3f}, {mean['auroc_over_best_signal']:+.3f}"),
            *(f"{mean['ece_over_floor']:+.3f}", f"{mean['escalated']:.1%}", f"{mean['accuracy_over_cloud']:+.3f}"),
            f"{mean['decision_p50_us']:.0f}, {mean['decision_p99_us']:.0f} us",
            JOINT_TARGETS[name],
        ]


def fixed_threshold(measurement: Measurement) -> Rows:
    yield [
        *("pair", "edge alone", "cloud alone", "kept at 0.8", "right of those", "their mean confidence"),
        *("cascade at 0.8", "threshold that loses 5 %"),
    ]
    for name, row in measurement["results"].items():
        yield [
            *(name, f"{row['edge_accuracy']:.3f}", f"{row['cloud_accuracy']:.3f}", f"{row['kept']:.1%}"),
            *(f"{row['right_of_kept']:.1%}", f"{row['mean_confidence_of_kept']:.1%}", f"{row['accuracy']:.3f}"),
            f"{row['threshold_for_drop']:.2f}",
        ]


def joint_audit(measurement: Measurement) -> Rows:
    yield ["fitted on", "drop", "promised", "broken (allowed)", "kept on the edge", "of the oracle's"]
    for name, drops in measurement["results"].items():
        for drop, row in drops.items():
            kept = "-" if row["promised"] == 0 else f"{row['kept']:.1%}"
            yield [
                *(name, drop, f"{row['promised']:.1%}", f"{row['violations']:.3f} ({row['allowed']:.3f})", kept),
                "-" if row["promised"] == 0 else f"{row['kept_of_oracle']:.1%}",
            ]


def vision(measurement: Measurement) -> Rows:
    yield ["target", "to the cloud", "accuracy", "max softmax at that share", "oracle at that share"]
    for name, row in measurement["results"]["targets"].items():
        mean, spread = row["mean"], row["deviation"]
        yield [
            *(name, f"{mean['escalated']:.1%}", f"{mean['accuracy']:.3f} ± {spread['accuracy']:.3f}"),
            *(f"{mean['softmax_accuracy']:.3f}", f"{mean['oracle_accuracy']:.3f}"),
        ]


def split_accuracy(measurement: Measurement) -> Rows:
    """Uploads of the image first, then the cuts in their order."""
    yield ["network", "sent", "numbers", "codec", "bytes", "smaller than float32", "top-1", "drop in points"]
    for net, found in measurement["results"]["nets"].items():
        yield [net, "nothing: one side", "", "", "", "", f"{found['accuracy']:.3f}", ""]
        for name, row in sorted(found["uploads"].items()):
            yield [net, f"the image, {name}", "", "", *kept(row, "")]
        for name, row in sorted(found["cuts"].items(), key=lambda item: item[1]["units"]):
            shape = " x ".join(map(str, row["shape"][1:]))
            yield [
                net,
                f"`{name}`, after {row['units']} units",
                shape,
                row["codec"],
                *kept(row, f"{row['smaller']:.1f}"),
            ]


def kept(row: dict[str, Any], smaller: str) -> list[str]:
    drop = row["drop_points"]
    interval = f"{drop['point']:+.1f} [{drop['low']:+.1f}, {drop['high']:+.1f}]"
    return [f"{row['bytes']:,.0f}", smaller, f"{row['accuracy']:.3f}", interval]


def split_planner(measurement: Measurement) -> Rows:
    """By network and by what the cloud alone is sent; all links and edges together."""
    yield [
        *("network", "cuts", "the cloud alone gets", "cells: edge, split, cloud", "regret mean", "p95", "max"),
        *("worst against the better baseline", "best"),
    ]
    cells, cuts = measurement["results"]["cells"], measurement["results"]["summary"]["cuts"]
    names = {"image": "an image file", "tensor": "features"}
    groups = [(net, kind) for net in cuts for kind in names] + [("all", kind) for kind in names]
    for net, kind in groups:
        some = [cell for cell in cells if net in (cell["net"], "all") and cell["input"] == kind]
        regrets = sorted(cell["regret"] for cell in some)
        against = [cell["against_baseline"] for cell in some]
        places = ", ".join(str(sum(cell["place"] == place for cell in some)) for place in ("edge", "split", "cloud"))
        yield [
            *(net, str(cuts.get(net, sum(cuts.values()))), names[kind], places),
            *(f"{sum(regrets) / len(regrets):.2%}", f"{regrets[round(0.95 * (len(regrets) - 1))]:.2%}"),
            *(f"{regrets[-1]:.2%}", f"{max(against):.3f}", f"{min(against):.3f}"),
        ]


def split_relay(measurement: Measurement) -> Rows:
    yield ["link", "carried out", "split, cloud", "error mean", "error p95", "error max", "bias"]
    cells = [cell for cell in measurement["results"]["cells"] if cell["place"] != "edge"]
    for link in (*dict.fromkeys(cell["link"] for cell in cells), "all"):
        some = [cell for cell in cells if link in (cell["link"], "all")]
        off = sorted(abs(cell["error"]) for cell in some)
        places = ", ".join(str(sum(cell["place"] == place for cell in some)) for place in ("split", "cloud"))
        p95 = off[round(0.95 * (len(off) - 1))]
        bias = sum(cell["error"] for cell in some) / len(some)
        yield [
            link,
            str(len(some)),
            places,
            f"{sum(off) / len(off):.1%}",
            f"{p95:.1%}",
            f"{off[-1]:.1%}",
            f"{bias:+.1%}",
        ]


FAULTS = {"reset": "connection reset", "cut": "link cut", "stall": "link silent", "kill": "worker killed"}


def split_cuts(measurement: Measurement) -> Rows:
    cuts = measurement["results"]["cuts"]
    yield [
        *("fault", "answers", "tokens of the worker, of the tail", "lost, twice, others"),
        *("stall ms, median", "p95", "max", "tail alone ms, median", "stall beyond it, p95", "max"),
    ]
    rows = {FAULTS[kind]: found for kind, found in cuts["by_kind"].items()}
    for name, found in {**rows, "all": cuts | {"n": cuts["n"] + cuts["kills"]}}.items():
        stall, tail, over = (found[key] for key in ("stall_ms", "tail_prefill_ms", "stall_over_tail_ms"))
        yield [
            *(name, str(found["n"]), f"{found['tokens']['there']:,}, {found['tokens']['here']:,}"),
            f"{found['lost']}, {found['duplicated']}, {found['different']}",
            *(short(stall[key]) for key in ("median", "p95", "max")),
            *(short(tail["median"]), short(over["p95"]), short(over["max"])),
        ]


def split_speed(measurement: Measurement) -> Rows:
    """An exact boundary beside the whole model."""
    found, same = measurement["results"], measurement["results"]["identical"]
    yield ["figure", "split", "whole", "ratio"]
    pairs = (("tokens/s", "tok_s"), ("first token ms", "first_token_ms"))
    for where, speed in (("a core each", found["speed_apart"]), ("both cores shared", found["speed"])):
        for name, key in pairs:
            ratio = interval(speed["ratio"]) if key == "tok_s" else ""
            yield [f"{name}, {where}", interval(speed[f"split_{key}"]), interval(speed[f"whole_{key}"]), ratio]
    yield [f"tokens that differ, of {same['tokens']:,} in {same['prompts']} answers", str(same["different"]), "", ""]


def boundary(measurement: Measurement) -> Rows:
    """A line a cut; the codecs beside each other."""
    rows = measurement["results"]["rows"]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    yield ["model", "cut", *(text for name in codecs for text in (f"{name}: bytes", "rise of perplexity"))]
    places = list(dict.fromkeys((row["model"], row["cut"]) for row in rows))
    for model, cut in places:
        line = [model, str(cut)]
        for name in codecs:
            row = next(r for r in rows if (r["model"], r["cut"], r["codec"]) == (model, cut, name))
            low, high = row["interval"] or (None, None)
            rise = "overflows" if row["ppl_rise"] is None else f"{row['ppl_rise']:+.2%} [{low:+.2%}, {high:+.2%}]"
            line += [str(row["bytes"]), rise]
        yield line


def relay(measurement: Measurement) -> Rows:
    """Errors of the emulated links."""
    yield ["link", "round trip ms", "its error", "error of bytes a second, up", "down"]
    for name, one in measurement["results"]["links"].items():
        yield [
            name,
            f"{one['profile']['rtt_ms']:g}",
            *(f"{one[key]:+.2%}" for key in ("rtt_error", "up_error", "down_error")),
        ]


def quantize(measurement: Measurement) -> Rows:
    yield [
        "model",
        "recipe",
        "MB",
        "KL, nats",
        "of int4's",
        "KL, p99",
        "same first choice",
        "perplexity",
        "the source's",
    ]
    for name, found in measurement["results"]["models"].items():
        for recipe, row in found.items():
            if row is not None:
                yield [
                    *(name, recipe, f"{row['bytes'] / 1e6:.1f}", f"{row['kl_mean']:.4f}"),
                    f"{row['kl_mean'] / found['int4']['kl_mean']:.2f}",
                    *(f"{row['kl_p99']:.3f}", f"{row['top1_agreement']:.1%}"),
                    *(f"{row['perplexity']:.2f}", f"{row['perplexity_source']:.2f}"),
                ]


def quantize_encoder(measurement: Measurement) -> Rows:
    found = measurement["results"]["encoder"]
    yield ["rounding", "MB of matrices", "KL, nats", "of nearest's", "KL, p99", "same nearest text"]
    for name, row in found.items():
        share = row["kl_mean"] / found["nearest"]["kl_mean"]
        yield [
            *(name, f"{row['bytes'] / 1e6:.1f}", f"{row['kl_mean']:.5f}", f"{share:.2f}"),
            *(f"{row['kl_p99']:.4f}", f"{row['top1_agreement']:.1%}"),
        ]


def student(measurement: Measurement) -> Rows:
    """The default student; agreement is with the teacher, on what was held out."""
    yield ["figure", "reached", "95 % interval"]
    results = measurement["results"]
    decode, agreement, bundle = results["decode"], results["agreement"], results["bundle"]
    for name in ("student", "teacher"):
        yield [f"{name}, decoded tok/s", short(decode[name]["median"]), between(decode[name], short)]
    yield ["student to teacher", f"{decode['ratio']['median']:.2f}", between(decode["ratio"], "{:.2f}".format)]
    words = {"distilled": "top-1 agreement, distilled", "text_alone": "the same, text alone", "gain": "gain"}
    for name, row in agreement.items():
        if name in words:
            yield [words[name], f"{row['value']:.2%}", between(row, "{:.2%}".format)]
    for name, form in {"top1_agreement": "{:.2%}", "kl_mean": "{:.3f}", "kl_p99": "{:.2f}", "perplexity": "{:.1f}",
                       "perplexity_source": "{:.1f}", "agreement_length": "{:.1f}"}.items():  # fmt: skip
        low, high = bundle["intervals"][name]
        yield [f"bundle: {name}", form.format(bundle[name]), f"{form.format(low)} to {form.format(high)}"]
    yield ["bundle, MB", f"{bundle['bytes'] / 1e6:.1f}", ""]
    yield ["the teacher's, MB", f"{bundle['bytes_of_teacher'] / 1e6:.1f}", ""]


def between(figure: dict[str, Any], form: Callable[[float], str]) -> str:
    return f"{form(figure['low'])} to {form(figure['high'])}"


def student_pair(measurement: Measurement) -> Rows:
    """Student and teacher as a cascade with the policy that ships."""
    yield ["prompts", "to the cloud", "right", "95 % interval", "edge alone", "cloud alone", "kept, wrong, cloud right"]
    found = measurement["results"]["pair"]
    yield [
        *(f"{found['rows']:,}", f"{found['escalated']:.1%}", f"{found['accuracy']['value']:.3f}"),
        between(found["accuracy"], "{:.3f}".format),
        *(f"{found['edge_accuracy']:.3f}", f"{found['cloud_accuracy']:.3f}", f"{found['drop']:.1%}"),
    ]


def student_runs(measurement: Measurement) -> Rows:
    """The two long runs and the trials, by their last look at what was held out."""
    yield ["run", "alpha", "T", "learning rate", "tokens", "hours", "KL, nats", "top-1 agreement", "cross-entropy"]
    results = measurement["results"]
    for run in [*results["training"].values(), *results["trials"]]:
        config, last = run["config"], run["held_out"][-1]
        yield [
            *(run["run"], f"{config['loss.alpha']:g}", f"{config['loss.temperature']:g}", f"{config['train.lr']:g}"),
            *(f"{run['tokens']:,}", f"{run['hours']:.2f}"),
            *(f"{last['kl']:.3f}", f"{last['top1_agreement']:.1%}", f"{last['ce']:.3f}"),
        ]


def intents(measurement: Measurement) -> Rows:
    """A line for each way of learning; gains are over labels alone, in points."""
    yield [
        *("learned from", "accuracy", "gain", "over seeds, over texts"),
        *("among the intents alone", "gain", "over seeds, over texts", "said oos: in scope", "out of it"),
    ]
    results = measurement["results"]
    for name, arm in results["arms"].items():
        line = [name]
        for way in ("all", "intents"):
            line.append(f"{arm[way]['mean']:.4f}")
            gain = None if arm["gain"] is None else arm["gain"][way]
            spans = [] if gain is None else [gain["over_seeds"], gain["over_texts"]]
            line += ["", ""] if gain is None else [f"{gain['points']:+.2f}", ", ".join(span(*one) for one in spans)]
        yield [*line, f"{arm['refused']:.1%}", f"{arm['refused_out_of_scope']:.1%}"]
    teacher = results["teacher"]
    yield [
        "the teacher itself",
        f"{teacher['all']:.4f}",
        "",
        "",
        f"{teacher['intents']:.4f}",
        "",
        "",
        "",
        f"{teacher['oos_test']:.1%}",
    ]


def span(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}"


def intents_cascade(measurement: Measurement) -> Rows:
    """The policy, and one signal alone at a threshold that sends away as many of the validation texts in scope."""
    yield [
        *("who decides", "in scope: to the teacher", "accuracy", "of the teacher's"),
        *("out of scope: caught", "to the teacher", "refused", "of all: to the teacher"),
    ]
    results = measurement["results"]
    for name, row in {**results["policies"], **results["signals"]}.items():
        yield [
            *(name, f"{row['in_scope_escalated']:.1%}", f"{row['in_scope_accuracy']:.4f}"),
            f"{row['of_the_clouds']:.2%} [{row['of_the_clouds_low']:.2%}, {row['of_the_clouds_high']:.2%}]",
            f"{row['out_of_scope_caught']:.1%} "
            f"[{row['out_of_scope_caught_low']:.1%}, {row['out_of_scope_caught_high']:.1%}]",
            *(f"{row[key]:.1%}" for key in ("out_of_scope_escalated", "out_of_scope_refused", "all_escalated")),
        ]


def export(measurement: Measurement) -> Rows:
    """Networks, a line per artifact; the drop is of the accuracy, in points."""
    yield [
        *("model", "target", "precision", "level", "status", "MB", "drop, points", "top-1 agreement", "cosine"),
        *("on the accelerator", "host ms", "s"),
    ]
    for model, found in measurement["results"]["models"].items():
        for key, one in found["targets"].items():
            if not _spoken(found):
                yield [model, key.partition(":")[0], one["precision"], *_judged(one)]


def _judged(one: dict[str, Any]) -> list[str]:
    drop, coverage, figures = one["drop"], one["coverage"], one["parity"] or one["interpreted"] or {}
    agreement, cosine = figures.get("top1_agreement"), figures.get("cosine")
    points = "" if drop is None else f"{drop['point'] * 100:+.2f} [{drop['low'] * 100:+.2f}, {drop['high'] * 100:+.2f}]"
    return [
        *(one["level"], one["status"], "" if one["bytes"] is None else f"{one['bytes'] / 1e6:.1f}", points),
        *("" if value is None else f"{value:.4f}" for value in (agreement, cosine)),
        "" if coverage is None else f"{coverage['accelerated']} of {coverage['nodes']}",
        "" if one["latency_ms"] is None else short(one["latency_ms"]["median"]),
        f"{one['seconds']:.0f}",
    ]


def export_calls(measurement: Measurement) -> Rows:
    """One command each."""
    yield ["model", "artifacts", "rows judged", "rows calibrated", "minutes, all in one command"]
    for model, found in measurement["results"]["models"].items():
        data = found["data"]
        rows = [str(data.get(name, "")) for name in ("rows", "calibration_rows")]
        yield [model, str(len(found["targets"])), *rows, f"{found['seconds'] / 60:.1f}"]


def export_language(measurement: Measurement) -> Rows:
    yield [
        *("model", "target", "precision", "level", "status", "MB", "KL, nats", "KL, p99", "top-1 agreement"),
        *("on the accelerator", "s"),
    ]
    for model, found in measurement["results"]["models"].items():
        for key, one in found["targets"].items():
            if _spoken(found):
                figures, coverage = one["parity"] or one["interpreted"] or {}, one["coverage"]
                distances = [figures.get(name) for name in ("kl_mean", "kl_p99")]
                yield [
                    *(model, key.partition(":")[0], one["precision"], one["level"], one["status"]),
                    "" if one["bytes"] is None else f"{one['bytes'] / 1e6:.1f}",
                    *("" if value is None else f"{value:.4f}" for value in distances),
                    "" if figures.get("top1_agreement") is None else f"{figures['top1_agreement']:.1%}",
                    "" if coverage is None else f"{coverage['accelerated']} of {coverage['nodes']}",
                    f"{one['seconds']:.0f}",
                ]


def _spoken(found: dict[str, Any]) -> bool:
    """Whether it is a language model: those are fed passages, not rows."""
    return "passages" in found["data"]


TABLES: dict[str, tuple[str, Callable[[Measurement], Rows]]] = {
    "engines": ("engines", engines),
    "engines_targets": ("engines", targets),
    "engines_limits": ("engines", limits),
    "engines_gemma": ("engines_gemma", engines),
    "engines_gemma_targets": ("engines_gemma", gemma_targets),
    "node_targets": ("node", node_targets),
    "where": ("where", where),
    "host_prediction": ("host_prediction", host_prediction),
    "plan_errors": ("plan_fit", plan_errors),
    "plan_sensitivity": ("plan_fit", plan_sensitivity),
    "fidelity": ("fidelity", fidelity),
    "block_size": ("block_size", block_size),
    "node": ("node", node),
    "breaker": ("breaker", breaker),
    "joint": ("joint", joint),
    "joint_audit": ("joint_audit", joint_audit),
    "fixed_threshold": ("fixed_threshold", fixed_threshold),
    "vision": ("vision", vision),
    "boundary": ("boundary", boundary),
    "relay": ("relay", relay),
    "split_cuts": ("split_cuts", split_cuts),
    "split_speed": ("split", split_speed),
    "split_accuracy": ("split_accuracy", split_accuracy),
    "split_planner": ("split_planner", split_planner),
    "split_relay": ("split_relay", split_relay),
    "quantize": ("quantize", quantize),
    "quantize_encoder": ("quantize", quantize_encoder),
    "export": ("export", export),
    "export_calls": ("export", export_calls),
    "export_language": ("export", export_language),
    "student": ("student", student),
    "student_runs": ("student", student_runs),
    "student_pair": ("student", student_pair),
    "intents": ("intents", intents),
    "intents_cascade": ("intents_cascade", intents_cascade),
}


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
