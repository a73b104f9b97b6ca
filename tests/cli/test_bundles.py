"""pull, list, show, rm: a bundle's life."""

from __future__ import annotations

from pathlib import Path

import pytest
from calling import Cli


def test_a_bundle_comes_is_shown_and_goes(cli: Cli, home: Path, model: Path) -> None:
    assert cli("list", "--json").json == {"home": str(home), "bundles": []}
    assert cli("list").out == f"no bundles in {home}\n"
    pulled = cli("pull", model, "--requantize", "int8", "--json")
    assert pulled.code == 0
    facts = pulled.json
    assert facts["name"] == "tiny-int8"
    assert facts["weights"] == "int8"
    assert facts["bytes"] == sum(
        f.stat().st_size for f in Path(facts["path"]).rglob("*") if f.name != "edgewise.json" and f.is_file()
    )
    assert "writing blocks" in pulled.err
    assert "names no licence" in pulled.err
    assert cli("list", "--json").json["bundles"] == [facts]
    header, row = cli("list").out.splitlines()
    assert header.split() == ["NAME", "SIZE", "FAMILY", "WEIGHTS", "LICENCE"]
    assert row.startswith("tiny-int8 ")
    shown = cli("show", "tiny-int8", "--json").json
    assert shown["intact"] is True
    assert shown["card"]["layers"] == 3
    assert "card.layers" in cli("show", "tiny-int8").out
    gone = cli("rm", "tiny-int8", "--json")
    assert gone.json["removed"] == "tiny-int8"
    assert gone.json["freed_bytes"] > facts["bytes"]
    assert cli("list", "--json").json["bundles"] == []


def test_pull_names_the_bundle_as_asked(cli: Cli, model: Path) -> None:
    assert cli("pull", model, "--name", "mine", "--json").json["name"] == "mine"
    assert "name: other" in cli("pull", model, "--name", "other").out


def test_a_licence_that_must_be_accepted_is_a_no(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.models.from_gguf.GGUFSource.licence_id", "some-terms")
    refused = cli("pull", model)
    assert refused.code == 1
    assert "--accept-licence" in refused.err
    assert cli("pull", model, "--accept-licence", "--json").json["licence"] == "some-terms"


@pytest.mark.parametrize(
    "arguments", [["show", "nothing"], ["rm", "nothing"], ["rm", "../bundles"], ["ask", "hi", "--edge", "nothing"]]
)
def test_what_is_not_here_exits_3(cli: Cli, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 3
    assert outcome.err.count("\n") == 1
    assert "there is no bundle" in outcome.err


def test_files_that_are_no_models(cli: Cli, tmp_path: Path, model: Path) -> None:
    text = tmp_path / "readme.gguf"
    text.write_text("hello")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:5000])
    for source in (text, cut, tmp_path / "absent.gguf"):
        outcome = cli("pull", source)
        assert outcome.code == 3, outcome.err
        assert outcome.err.splitlines()[-1].startswith("edgewise: ")
    assert cli("list", "--json").json["bundles"] == []


def test_a_damaged_bundle_is_named_by_show_doctor_and_ask(cli: Cli, model: Path) -> None:
    path = Path(cli("pull", model, "--json").json["path"])
    file = path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    for arguments in (["show", "tiny"], ["ask", "hi", "--edge", "tiny"]):
        outcome = cli(*arguments)
        assert outcome.code == 3
        assert "SHA-256" in outcome.err
        assert "pull the model again" in outcome.err
    found = cli("doctor", "--json")
    assert found.code == 1
    failed = [check for check in found.json["checks"] if check["status"] == "failed"]
    assert [check["name"] for check in failed] == ["bundle"]
