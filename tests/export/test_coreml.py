"""Core ML packages of every family of networks: what is in them, what they compute, and faults in them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from edgewise.export.targets.coreml import palettes as coreml_palettes

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1] / "src"

Answers = Mapping[str, Any]


@pytest.fixture(scope="module")
def answers(export_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of coreml_steps.py: one process for all, as its libraries take seconds to load."""
    directory = tmp_path_factory.mktemp("coreml")
    environment = {"PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(export_python), str(HERE / "coreml_steps.py"), str(directory)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "", "the converter's chatter"
    found: Answers = json.loads((directory / "answers.json").read_text())
    return found


def refused(answer: Answers) -> dict[str, str]:
    return {one["name"]: one["detail"] for one in answer["proved"]["checks"] if not one["ok"]}


SOUND: Final = {  # how far outputs may be from the source's, and the weights' bytes
    "cnn fp32": (1e-6, {"float32": 3968}),
    "cnn fp16": (1e-3, {"float16": 1984}),
    "cnn int8": (1e-2, {"int8": 1166}),
    "cnn blocks": (0.1, {"int8": 640, "int4": 312}),
    "cnn palette": (0.1, {"uint4": 624}),
    "cnn groups": (0.1, {"uint4": 752}),
    "encoder fp16": (2e-3, {"float16": 31744}),
    "mlp free": (2e-3, {"float16": 4352}),
    "convs fp16": (3e-3, {"float16": 1264}),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_package_passes_every_check_and_computes_what_the_source_does(name: str, answers: Answers) -> None:
    close, weights = SOUND[name]
    found, proved = answers[name], answers[name]["proved"]
    assert refused(found) == {}
    assert (proved["level"], proved["ran"], proved["skipped"]) == ("spec-checked", True, [])
    assert "not Core ML" in proved["by"]
    assert {one["name"] for one in proved["checks"]} >= {
        "target",
        "signature",
        "weights",
        "source",
        "precision",
        "finite",
    }
    assert [(one["name"], one["ok"]) for one in found["converted"]["checks"]] == [("conversion", True)]
    assert found["away"] < close
    assert found["shapes"][0] == found["shapes"][1]
    assert proved["weights"] == weights


def test_each_precision_loses_more(answers: Answers) -> None:
    away = [answers[f"cnn {precision}"]["away"] for precision in ("fp32", "fp16", "int8", "blocks")]
    assert away == sorted(away)
    assert len(set(away)) == len(away)


def test_the_package_holds_only_what_belongs_to_it(answers: Answers) -> None:
    files = {Path(file).name for file in answers["cnn fp16"]["converted"]["files"]}
    assert files == {"Manifest.json", "model.mlmodel", "weight.bin"}


def test_coverage_is_predicted_by_rules(answers: Answers) -> None:
    half, single, blocks, free = (
        answers[name]["proved"]["coverage"] for name in ("cnn fp16", "cnn fp32", "cnn blocks", "mlp free")
    )
    assert "predicted" in half["accelerator"]
    assert half["accelerated"] == half["nodes"]
    assert {one["why"] for one in single["fallback"]} == {"it computes in float32, and Neural Engines in float16"}
    assert any("in blocks" in one["why"] for one in blocks["fallback"])
    assert all("only while it runs" in one["why"] for one in free["fallback"])


def test_layers_whose_channels_blocks_do_not_divide_are_int8_and_that_is_said(answers: Answers) -> None:
    assert "int8" in answers["cnn blocks"]["converted"]["notes"][0]


def test_channels_share_tables_in_groups_that_divide_them(answers: Answers) -> None:
    one, several = answers["tables"]["palette"], answers["tables"]["groups"]
    assert one["tables"] == [1, 1, 1, 1]
    assert several["tables"] == [2, 2, 2, 2]  # of 16 channels, and 10
    assert several["away"] < 0.95 * one["away"]


def test_the_smallest_matrices_are_spared(answers: Answers) -> None:
    found = answers["encoder palette"]
    assert refused(found) == {}
    kept = 12 * 32 * 2  # the places of 12 tokens, which are added and multiply nothing
    assert found["proved"]["weights"] == {"float16": kept, "int8": 1024 + 32 * 3, "uint6": 14464 * 6 // 8 + 4 * 64 * 2}
    assert "of the smallest 1 are int8" in found["converted"]["notes"][0]


@pytest.mark.parametrize(
    ("channels", "group", "shared"), [(96, 32, 32), (24, 16, 12), (13, 4, 13), (8, 32, 8), (9, 0, 9)]
)
def test_as_many_channels_share_a_table_as_divide_all(channels: int, group: int, shared: int) -> None:
    assert coreml_palettes.sharing(channels, group) == shared


def test_what_is_spared_follows_from_sizes_alone() -> None:
    spared = coreml_palettes.spared([9, 1, 80, 10, 900])
    assert (spared.floating, spared.bytes) == (9, 80)
    assert spared.takes(9, "float16")
    assert spared.takes(80, "int8")
    assert not spared.takes(10, "float16")
    assert not spared.takes(900, "int8")


def test_a_table_is_at_rest_and_better_than_even_steps() -> None:
    weights = np.random.default_rng(2).standard_t(4, (40, 50))
    table, at = coreml_palettes.tables(4)(weights)
    flat = weights.reshape(-1)
    assert np.array_equal(at, np.abs(flat[:, None] - table).argmin(1))
    means = np.array([flat[at == n].mean() for n in range(16)])
    assert np.abs(means - table).max() < 0.02
    even = np.linspace(flat.min(), flat.max(), 16)
    assert (
        np.square(flat - table[at]).sum() < 0.5 * np.square(flat - even[np.abs(flat[:, None] - even).argmin(1)]).sum()
    )


def test_few_values_are_kept_as_they_are() -> None:
    weights = np.array([[0.5, -1, 0.5], [2, 2, -1]], np.float16)
    table, at = coreml_palettes.tables(4)(weights)
    assert table.shape == (16,)
    assert np.array_equal(table[at].reshape(2, 3), weights)


def test_several_rows_at_once_are_tried_where_the_first_axis_is_free(answers: Answers) -> None:
    assert [one["ok"] for one in answers["mlp free"]["proved"]["checks"] if one["name"] == "batch"] == [True]


def test_an_overflow_of_half_precision_is_found_and_traced_to_its_operator(answers: Answers) -> None:
    found = refused(answers["overflowing fp16"])
    assert list(found) == ["finite"]
    assert "begins with mul" in found["finite"]


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        ("swapped", "weights", "const"),
        ("swapped", "source", "c1.weight"),
        ("nudged", "weights", "1 differ"),
        ("table", "weights", "palettized"),
        ("tables", "weights", "palettized"),
        ("scale", "weights", "p_fc_weight"),
        ("padding", "weights", "pad of"),
        ("skipped", "precision", "not int8: "),
        ("too new", "target", "specification 9"),
    ],
)
def test_a_fault_is_found_by_the_check_for_it(fault: str, check: str, says: str, answers: Answers) -> None:
    assert says in refused(answers["faults"][fault])[check]


def test_skipped_quantization_names_every_weight(answers: Answers) -> None:
    assert len(answers["faults"]["skipped"]["proved"]["skipped"]) == 4


def test_another_padding_is_seen_in_the_outputs_too(answers: Answers) -> None:
    assert answers["faults"]["padding"]["away"] > 10 * answers["cnn fp16"]["away"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("short weights", "ends after"), ("short program", "cannot be read"), ("no manifest", "is no .mlpackage")],
)
def test_a_damaged_package_is_an_error(fault: str, says: str, answers: Answers) -> None:
    error = answers["faults"][fault]["proved"]
    assert error["kind"] == "SourceError"
    assert says in error["message"]
    assert error["hint"]


def test_an_operator_we_cannot_compute_leaves_the_other_checks(answers: Answers) -> None:
    proved = answers["faults"]["unknown"]["proved"]
    assert not proved["ran"]
    assert "mystery" in proved["notes"][0]
    assert {one["name"]: one["ok"] for one in proved["checks"]}["weights"]


def test_layers_come_in_the_order_of_the_program(answers: Answers) -> None:
    found = answers["layers"]
    assert len(found["names"]) == len(set(found["names"])) > 8
    assert found["shapes"][0] == [2, 16, 16, 16]
    assert found["shapes"][-1] == [2, 10]
    assert found["away"] < 1e-3


@pytest.mark.parametrize(
    ("case", "kind", "says", "hint"),
    [
        ("eigen", "UnsupportedModel", "linalg_eigvals", "other operators"),
        ("deciding", "UnsupportedModel", "data-dependent", "torch.where"),
        ("blocks on iOS17", "UsageError", "iOS 18", "palettize"),
        ("groups on iOS17", "UsageError", "iOS 18", "group=0"),
        ("groups alone", "UsageError", "group=8", "palettize"),
        ("tables in blocks", "UsageError", "block=16", "palettize"),
    ],
)
def test_what_cannot_be_converted_says_the_way_out(
    case: str, kind: str, says: str, hint: str, answers: Answers
) -> None:
    error = answers["refused"][case]
    assert error["kind"] == kind
    assert says in error["message"]
    assert hint in error["hint"]


def test_operators_of_many_kinds_compute_what_torch_does(answers: Answers) -> None:
    assert len(answers["wild"]) == 32
    assert max(answers["wild"]) < 1e-4


def test_a_package_of_another_hand_is_matched_by_the_order_of_its_constants(answers: Answers) -> None:
    assert refused(answers["foreign"]) == {}
    assert answers["foreign"]["away"] < 1e-3


def test_the_older_tracer_is_a_second_way_in(answers: Answers) -> None:
    assert answers["traced"]["away"] < 2e-3
    assert not {"signature", "precision", "finite", "source"} & set(refused(answers["traced"]))
