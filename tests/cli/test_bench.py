"""`edgewise bench engines` on a tiny model, against the llama.cpp of the test environment."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calling import Cli

from edgewise.bench.engines import UNITS
from edgewise.bench.measure import Measurement
from edgewise.bench.peers import base

SMALL = ("--rounds", "1", "--prompts", "12", "--new", "4", "--threads", "1")


def test_a_report_a_measurement_and_a_drawing(cli: Cli, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out = tmp_path / "out"
    done = cli("bench", "engines", "--model", model, "--against", "llamacpp", *SMALL, "-o", out, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (cell,) = report["cells"]
    assert (cell["prompt_tokens"], cell["streams"]) == (12, 1)
    assert list(cell["engines"]) == [c.name for c in (*base.OURS, *base.PEERS["llamacpp"])]
    for name, row in cell["engines"].items():
        assert {key: len(row[key]) for key in UNITS} == dict.fromkeys(UNITS, 1), name
        assert all(row[key][0] > 0 for key in UNITS)
        assert 0 <= row["kl"] < 0.02, name
        assert row["version"]
        assert row["failed"] is None
    assert report["model"] == "tiny.gguf"
    assert set(cell["ratio_to_best"]) == set(UNITS)
    assert cell["ratio_to_best"]["decode_tok_s"]["best"].startswith("llamacpp")  # which variant is a matter of luck
    assert set(cell["limits"]["share"]) == set(cell["engines"])

    measured = Measurement.read(out / "engines.json")
    assert measured.results["cells"][0]["engines"]["llamacpp"]["ttft_ms"]["unit"] == "ms"
    assert measured.command.startswith("edgewise bench engines --model tiny.gguf --against llamacpp --rounds 1")
    assert str(tmp_path) not in (out / "engines.json").read_text()
    assert ElementTree.parse(out / "engines.svg").getroot().tag.endswith("svg")


def test_peers_that_are_not_there_are_named_with_their_pip_line(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = base.Contestant("absent", "llamacpp", "no-such-runtime", install="no-such-runtime")
    monkeypatch.setitem(base.PEERS, "absent", (absent,))
    done = cli("bench", "engines", "--model", model, "--against", "absent", *SMALL, "-o", tmp_path / "out")
    assert done.code == 3
    assert "pip install no-such-runtime" in done.err
    assert "pip install no-such-runtime" in " ".join(done.out.split())
    assert "edgewise stable" in done.out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--against", "nobody"), "there is no peer 'nobody'"),
        (("--prompts", "12,x"), "--prompts is '12,x'"),
        (("--prompts", "300"), "up to 304 tokens, the model's context 256"),
        (("--peer-model", "openvino=/no/such/place"), "PEER=PATH is needed"),
    ],
)
def test_wrong_use_is_refused_before_any_turn(
    cli: Cli, model: Path, tmp_path: Path, wrong: tuple[str, str], words: str
) -> None:
    done = cli("bench", "engines", "--model", model, *SMALL, *wrong, "-o", tmp_path / "out")
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "out").exists()
