"""A distillation from its config to a bundle that answers, with tiny models and every piece real."""

from __future__ import annotations

import errno
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgewise.cli.main import run
from edgewise.compress.distil import checkpoint
from edgewise.models.licence import declared
from edgewise.models.source import pull
from tiny import VOCAB, save_hf, tiny

CONFIG = """
name = "tiny-student"
teacher = "teacher"
output = "out"
[data]
text = ["text.txt"]
jsonl = ["pairs.jsonl"]
field = ["prompt", "completion"]
length = 32
held_out = 0.2
[data.generate]
prompts = "prompts.txt"
count = 12
max_tokens = 8
[student]
layers = 2
vocabulary = 300
[loss]
temperature = 2.0
top_k = 16
[train]
tokens = 1024
batch = 2
accumulate = 2
lr = 0.003
evaluations = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distil")
    save_hf(tiny("llama"), place / "teacher")
    (place / "teacher/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (place / "teacher/LICENSE").write_text("the terms")
    paragraphs = (f"the cab {n} of a bed is a fee in the age of a gig, had be {n * n} a code bad" for n in range(60))
    (place / "text.txt").write_text("\n\n".join(paragraphs))
    pairs = ({"prompt": f"how big is cab {n}", "completion": f"as big as a bed of {n + 3}"} for n in range(20))
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (place / "prompts.txt").write_text("a big cab\nbe a good bee\nhe had a deed\n")
    (place / "distil.toml").write_text(CONFIG)
    return place


def distilled(config: Path, *flags: str) -> dict[str, Any]:
    """The verb's JSON. Refused with the exit code and what was said."""
    said, told = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(told):
        code = run(["distill", str(config), "--json", *flags])
    if code:
        assert not said.getvalue()
        raise Refused(code, told.getvalue())
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


class Refused(Exception):
    """Exit code and words."""


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    return distilled(place / "distil.toml")


def test_a_config_becomes_a_student(place: Path, first: dict[str, Any]) -> None:
    assert (first["name"], first["steps"], first["tokens"], first["resumed_from"]) == ("tiny-student", 8, 1024, None)
    assert first["held_out"]["loss"] < first["held_out_before"]["loss"]
    student = AutoModelForCausalLM.from_pretrained(place / "out/student")
    assert (student.config.num_hidden_layers, student.config.vocab_size) == (2, 300)
    assert student.config.use_cache
    assert first["parameters"] == sum(parameter.numel() for parameter in student.parameters())


def test_the_students_directory_tells_its_story(place: Path, first: dict[str, Any]) -> None:
    student = place / "out/student"
    card = (student / "README.md").read_text()
    assert declared(student) == "apache-2.0"
    assert (student / "LICENSE").read_text() == "the terms"
    assert f"{first['held_out']['top1_agreement']:.4f}" in card
    assert "1,024 tokens seen" in card
    assert "0.5 · 2² · KL to the teacher's 16 most probable tokens at T = 2" in card
    assert str(place) not in card
    assert "answers.jsonl" in card
    log = [json.loads(line) for line in (student / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert "<svg" in (student / "loss.svg").read_text()
    assert "agreement with its teacher" in (student / "agreement.svg").read_text()


def test_a_bundle_can_be_made_of_it(place: Path, first: dict[str, Any]) -> None:
    bundle = pull(first["student"], home=place / "home", requantize="int8", name="tiny-student")
    assert bundle.card.vocab == 300
    assert bundle.manifest.licence["id"] == "apache-2.0"


def test_it_is_done_only_once(place: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.compress.distil.run.counted", None)
    with pytest.raises(Refused, match=r"\(2, .*holds a run already"):
        distilled(place / "distil.toml")
    again = distilled(place / "distil.toml", "--resume")
    assert again == first | {"resumed_from": "step-00000008.safetensors"}


def test_other_data_under_a_checkpoint_is_refused(place: Path, first: dict[str, Any]) -> None:
    text = place / "text.txt"
    before = text.read_text()
    text.write_text(before.replace("cab", "cub"))
    try:
        with pytest.raises(Refused, match=r"\(2, .*other rows"):
            distilled(place / "distil.toml", "--resume")
    finally:
        text.write_text(before)
    assert checkpoint.latest(place / "out/checkpoints") is not None


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("layers = 2", "layers = [0, 99]", "layers"),
        ("layers = 2", "layers = 2\nhidden = 30", "hidden"),
        ("top_k = 16", "top_k = 400", "loss.top_k is 400, the student has 300 tokens"),
        ("length = 32", "length = 60000", "rows of 60000 tokens are wanted"),
    ],
)
def test_sizes_that_there_are_not_are_refused_at_once(place: Path, old: str, new: str, why: str) -> None:
    config = place / "sizes.toml"
    config.write_text(CONFIG.replace('"out"', '"sizes"').replace(old, new))
    with pytest.raises(Refused, match=rf"\(2, .*{why}"):
        distilled(config)
    assert not (place / "sizes/answers.jsonl").exists()


def test_a_run_that_is_refused_leaves_the_rows_of_the_one_before(place: Path, first: dict[str, Any]) -> None:
    before = (place / "out/corpus/train.i32").read_bytes()
    config = place / "longer.toml"
    config.write_text(CONFIG.replace("length = 32", "length = 24"))
    for flags in ((), ("--resume",)):
        with pytest.raises(Refused, match=r"\(2, .*(holds a run already|data.length was 32 and is 24)"):
            distilled(config, *flags)
    assert (place / "out/corpus/train.i32").read_bytes() == before


def test_cross_entropy_alone_sees_the_same_tokens(place: Path, first: dict[str, Any]) -> None:
    """The baseline: another alpha and nothing else. No teacher is asked about what is trained on."""
    config = place / "alone.toml"
    config.write_text(CONFIG.replace('"out"', '"alone"').replace("[loss]", "[loss]\nalpha = 0.0"))
    alone = distilled(config)
    assert (alone["tokens"], alone["rows"]) == (first["tokens"], first["rows"])
    assert alone["held_out_before"]["kl"] == pytest.approx(first["held_out_before"]["kl"], rel=1e-6)
    assert not (place / "alone/taught/train").exists()
    assert (place / "alone/taught/held_out").is_dir()
    assert "cross-entropy with the text alone" in (place / "alone/student/README.md").read_text()


def test_a_student_of_another_vocabulary_is_refused(place: Path) -> None:
    save_hf(tiny("llama", vocab_size=VOCAB + 8), place / "strange")
    with pytest.raises(Refused, match=rf"\(2, .*the student has {VOCAB + 8} tokens, its tokenizer {VOCAB}"):
        distilled(started_from(place, "strange"))


def test_a_diverging_run_says_no(place: Path) -> None:
    broken = tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(1e38)
    save_hf(broken, place / "broken")
    with pytest.raises(Refused, match=r"\(1, .*has (loss|gradient_norm) (nan|inf).*no checkpoint yet"):
        distilled(started_from(place, "broken"))
    assert not (place / "of-broken/student").exists()


def started_from(place: Path, start: str) -> Path:
    config = place / f"of-{start}.toml"
    text = CONFIG.replace('"out"', f'"of-{start}"').replace("layers = 2", "")
    config.write_text(text.replace("vocabulary = 300", f'start = "{start}"'))
    return config


def test_a_bad_config_is_refused_before_anything_begins(place: Path) -> None:
    config = place / "bad.toml"
    config.write_text(CONFIG.replace('"out"', '"never"').replace("lr = 0.003", "learning_rate = 0.003"))
    with pytest.raises(Refused, match=r"\(2, .*'train.learning_rate'"):
        distilled(config)
    config.write_text(CONFIG.replace('"out"', '"never"').replace('"text.txt"', '"none.txt"'))
    with pytest.raises(Refused, match=r"\(2, .*none.txt"):
        distilled(config)
    assert not (place / "never").exists()
    config.write_text(CONFIG.replace('"out"', '"never"').replace('"teacher"\noutput', '"nobody"\noutput'))
    with pytest.raises(Refused, match=r"\(3, .*'nobody'"):
        distilled(config)


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = place / "full.toml"
    config.write_text(CONFIG.replace('"out"', '"full"').replace("[train]", "[train]\ncheckpoint_s = 1e-9"))
    flush = os.fsync

    def full(handle: int) -> None:
        if "step-00000005" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match=r"\(3, .*the disk is full.*step-00000004"):
        distilled(config)
    monkeypatch.undo()
    assert distilled(config, "--resume")["resumed_from"] == "step-00000004.safetensors"
