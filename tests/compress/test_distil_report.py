"""Curves and card of a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from distil_pieces import config

from edgewise.compress.distil.config import Data, Student
from edgewise.compress.distil.report import Facts, _line, _smooth, agreement_plot, card, loss_plot

STEPS = [{"step": n, "tokens": n * 100, "loss": 10.0 / n, "elapsed_s": float(n)} for n in range(1, 201)]
LOOKS = [
    {"step": n, "tokens": n * 100, "held_out": {"loss": 9.0, "ce": 5.5, "kl": 2.25, "top1_agreement": n / 400}}
    for n in (0, 100, 200)
]
FACTS = Facts(
    teacher="big",
    licence=None,
    teachers_licence=None,
    parameters=1_234_567,
    vocabulary=300,
    documents=70,
    rows=50,
    held_out_rows=6,
    sources={"text.txt": 70},
    command="edgewise distill small.toml",
)


def test_without_steps_there_is_no_curve() -> None:
    assert loss_plot("small", []) is None
    assert loss_plot("small", LOOKS) is None
    assert agreement_plot("small", STEPS) is None
    assert agreement_plot("small", LOOKS[:1]) is None


def test_curves_name_their_axes_in_tokens() -> None:
    drawn = loss_plot("small", [*STEPS, *LOOKS])
    assert drawn is not None
    assert "20 k</text>" in drawn
    assert "held out</text>" in drawn
    assert drawn.count("<polyline") == 2


def test_a_jagged_curve_is_averaged_and_a_smooth_one_stays() -> None:
    jagged = [{"tokens": n, "loss": float(n % 2)} for n in range(1000)]
    smooth = _smooth(_line(jagged, "loss")).up
    assert len(smooth) == 1000
    assert np.abs(smooth[20:-20] - 0.5).max() < 0.05
    flat = [{"tokens": n, "loss": 3.0} for n in range(1000)]
    assert _smooth(_line(flat, "loss")).up == pytest.approx(3.0)


def test_the_card_says_what_was_reached_and_where_nothing_is_known(tmp_path: Path) -> None:
    made = config(tmp_path / "runs/small", loss={"temperature": 3.0, "alpha": 0.25})
    text = card(made, FACTS, [*STEPS, *LOOKS], ["loss.svg"])
    assert text.startswith("---\nbase_model: big\n---\n")
    assert "names no licence" in text
    assert "1,234,567 parameters" in text
    assert "0.25 · 3² · KL" in text
    assert "| top-1 agreement | 0.0000 | 0.5000 |" in text
    assert "![loss](loss.svg)" in text
    assert f"{20_000 / (50 * 12):.2f} epochs" in text


def test_the_card_says_whose_weights_they_are(tmp_path: Path) -> None:
    made = config(tmp_path / "runs/small")
    mine, its = replace(FACTS, licence="mit"), replace(FACTS, licence="mit", teachers_licence="apache-2.0")
    assert "comes under the teacher's licence, mit" in card(made, mine, STEPS, [])
    begun = msgspec.structs.replace(made, student=Student(start="begun"))
    assert "other weights than its teacher's, under mit; its teacher comes under apache-2.0" in card(
        begun, its, STEPS, []
    )
    anew = msgspec.structs.replace(made, student=Student(start="scratch"))
    assert "began at random" in card(anew, its, STEPS, [])


def test_the_card_tells_no_place_of_the_disk(tmp_path: Path) -> None:
    made = config(tmp_path / "runs/small")
    placed = type(made)(
        name="small",
        teacher=str(tmp_path / "big"),
        data=Data(text=(str(tmp_path / "book.txt"),)),
        student=Student(start=str(tmp_path / "begun")),
        train=made.train,
        output=made.output,
    )
    text = card(placed, FACTS, STEPS, [])
    assert str(tmp_path) not in text
    assert all(f'"{name}"' in text for name in ("big", "book.txt", "begun", "small"))
