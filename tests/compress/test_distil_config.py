"""The config of a distillation: docs/formats/distill.md read literally, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgewise.compress.distil.config import Config, Data, Generate, Loss, Part, Student, Train
from edgewise.errors import ConfigError

DOCUMENT = (Path(__file__).parents[2] / "docs/formats/distill.md").read_text()
LEAST = """
name = "small"
teacher = "smollm2-135m"
output = "out"
[data]
text = ["a.txt"]
[train]
tokens = 1000
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text")
    return tmp_path / "distil.toml"


def opened(place: Path, text: str) -> Config:
    place.write_text(text)
    return Config.open(place)


def refusal(place: Path, text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        opened(place, text)
    return str(refused.value)


def with_line(table: str, line: str) -> str:
    head = f"[{table}]\n"
    return LEAST.replace(head, f"{head}{line}\n") if head in LEAST else f"{LEAST}{head}{line}\n"


def test_the_example_of_the_document_is_read() -> None:
    example = re.search(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert example is not None
    config = Config.parse(example[1])
    assert config.name == "edgewise-small"
    assert config.data.field == ("prompt", "completion")


@pytest.mark.parametrize("part", [Config, Data, Generate, Student, Loss, Train])
def test_the_document_names_every_key_with_its_default(part: type[Part]) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", DOCUMENT, re.MULTILINE))
    table = {Config: "", Generate: "data.generate."}.get(part, f"{part.__name__.lower()}.")
    for key, default in zip(reversed(part.__struct_fields__), reversed(part.__struct_defaults__), strict=False):
        if f"{table}{key}" in ("data", "student", "loss", "train", "data.generate"):
            continue  # a table
        shown = rows[f"{table}{key}"]
        if isinstance(default, bool | int | float | str):
            assert type(default)(shown.strip("`")) == default, key


def test_the_least_config_is_all_defaults(place: Path) -> None:
    config = opened(place, LEAST)
    assert (config.loss.temperature, config.loss.alpha, config.train.checkpoint_s) == (4.0, 0.5, 300.0)
    assert config.student == Student()
    assert config.teacher == "smollm2-135m"


def test_paths_count_from_where_the_config_lies(place: Path) -> None:
    (place.parent / "teacher").mkdir()
    config = opened(place, LEAST.replace("smollm2-135m", "teacher"))
    assert config.data.text == (str(place.parent / "a.txt"),)
    assert config.output == str(place.parent / "out")
    assert config.teacher == str(place.parent / "teacher")


def test_facts_hold_what_makes_the_curve_and_no_path(place: Path) -> None:
    facts = opened(place, with_line("student", 'start = "scratch"\nlayers = [0, 3]')).facts
    assert facts["student.layers"] == [0, 3] or facts["student.layers"] == (0, 3)
    assert facts["train.tokens"] == 1000
    assert "train.checkpoint_s" not in facts
    assert not any(str(place.parent) in str(value) for value in facts.values())


@pytest.mark.parametrize(
    ("table", "line", "words"),
    [
        ("train", "lrate = 1", ["'train.lrate'", "did you mean 'lr'", "warmup"]),
        ("train", "lr = 2.0", ["train.lr is 2.0", "<= 1.0"]),
        ("train", 'lr = "fast"', ["train.lr is 'fast'", "float"]),
        ("train", "batch = 0", ["train.batch is 0", ">= 1"]),
        ("train", "checkpoint_s = 600", ["train.checkpoint_s is 600", "<= 300"]),
        ("train", 'precision = "fp8"', ["train.precision is 'fp8'"]),
        ("loss", "alpha = 1.1", ["loss.alpha is 1.1", "<= 1.0"]),
        ("loss", "temperature = 0", ["loss.temperature is 0", "> 0"]),
        ("loss", "temperature = nan", ["loss.temperature is nan"]),
        ("student", "layers = [3, 0]", ["[3, 0]", "ascending"]),
        ("student", 'start = "nowhere"', ["nowhere", "config.json", '"scratch"']),
        ("data", "held_out = 0.0", ["data.held_out is 0.0", "> 0.0"]),
        ("data", 'jsonl = ["b.jsonl"]', ["data.jsonl", "b.jsonl", "no file"]),
        ("data.generate", "count = 5", ["[data.generate]", "`prompts`"]),
        ("data.generate", 'prompts = "p.txt"\ncount = 5', ["data.generate.prompts", "p.txt"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(place: Path, table: str, line: str, words: list[str]) -> None:
    said = refusal(place, with_line(table, line))
    assert all(word in said for word in words), said


def test_a_config_without_text_is_refused(place: Path) -> None:
    assert "[data] names no text" in refusal(place, LEAST.replace('text = ["a.txt"]', ""))


def test_an_output_that_is_a_file_is_refused(place: Path) -> None:
    assert "which is a file" in refusal(place, LEAST.replace('"out"', '"a.txt"'))


def test_what_is_no_config_is_refused(place: Path) -> None:
    assert "is not TOML" in refusal(place, "name = ")
    assert "required field" in refusal(place, "")
    place.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Config.open(place)
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.open(place.parent / "none.toml")
    assert "name is '.hidden'" in refusal(place, LEAST.replace('"small"', '".hidden"'))
