"""Settings: where values come from, and what is said about bad ones."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgewise.errors import ConfigError
from edgewise.settings import BY_FLAG, LEAVES, load, secret, strays

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "edgewise.toml"
    path.write_text("threads = 3\n[serve]\nport = 1001\nhost = '0.0.0.0'\n[model]\nname = 'mine'\n")
    return path


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"EDGEWISE_HOME": str(tmp_path), **more}


def test_flags_go_before_environment_before_file_before_default(tmp_path: Path, file: Path) -> None:
    loaded = load({"--port": "1003"}, environ=environ(tmp_path, EDGEWISE_SERVE_HOST="::1", EDGEWISE_SERVE_PORT="1002"))
    assert loaded.file == file
    assert loaded.settings.serve.port == 1003
    assert loaded.settings.serve.host == "::1"
    assert loaded.settings.threads == 3
    assert loaded.settings.model.mode == "stable"
    sources = {key: found.source for key, found in loaded.found.items()}
    assert sources["serve.port"] == "flag --port"
    assert sources["serve.host"] == "environment EDGEWISE_SERVE_HOST"
    assert sources["threads"] == f"file {file}"
    assert sources["model.mode"] == "default"


def test_home_in_the_file_that_lies_in_home(tmp_path: Path, file: Path) -> None:
    config = tmp_path / "other.toml"
    config.write_text("home = '/srv/edgewise'\n")
    assert load(config=config, environ={}).settings.home == Path("/srv/edgewise")
    assert load(config=config, environ=environ(tmp_path)).settings.home == tmp_path


def test_the_working_directory_is_not_searched(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load(environ={"EDGEWISE_HOME": str(tmp_path / "elsewhere")}).file is None


def test_the_file_that_a_variable_names(tmp_path: Path, file: Path) -> None:
    elsewhere = {"EDGEWISE_HOME": str(tmp_path / "elsewhere"), "EDGEWISE_CONFIG": str(file)}
    assert load(environ=elsewhere).settings.model.name == "mine"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings file .*No such file"):
        load(config=tmp_path / "none.toml", environ={})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[serve]\nprot = 1\n", r"unknown key 'serve.prot' \(did you mean 'serve.port'\?\)"),
        ("[sevre]\nport = 1\n", r"unknown key 'sevre.port' \(did you mean 'serve.port'\?\)"),
        ("[zzz]\n", r"unknown key 'zzz' \(known keys: home, threads, .*serve.port"),
        ("serve = 1\n", "unknown key 'serve'"),
        ("[serve]\nport = 'x'\n", r"serve.port is 'x': a whole number from 0 to 65535 is needed"),
        ("[serve]\nport = 65536\n", "serve.port is 65536: a whole number from 0 to 65535"),
        ("[serve]\nport = true\n", "serve.port is True"),
        ("[serve]\nport = [1]\n", "a single value is needed"),
        ("[serve.port]\nx = 1\n", "a single value is needed"),
        ("[route]\nthreshold = nan\n", "a number from 0 to 1 is needed"),
        ("[route]\nthreshold = 1.5\n", "threshold is 1.5: a number from 0 to 1 is needed"),
        ("[cloud]\nurl = 'host:80'\n", "an address like http"),
        ("[cloud]\nurl = 'http://h:99999'\n", "an address like http"),
        ("[model]\nmode = 'slow'\n", "one of fast, stable is needed"),
        ("[model]\nname = ' '\n", "some text is needed"),
        ("port =", "is not valid TOML"),
        ("\x00", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "edgewise.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(environ=environ(tmp_path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "edgewise.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(environ=environ(tmp_path))


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "edgewise.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="is larger than 1048576 bytes"):
        load(environ=environ(tmp_path))


def test_a_malformed_variable_stops_us_and_an_empty_one_is_unset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="EDGEWISE_THREADS is 'two': a whole number from 1 to 1024"):
        load(environ=environ(tmp_path, EDGEWISE_THREADS="two"))
    assert load(environ=environ(tmp_path, EDGEWISE_THREADS="")).settings.threads is None


def test_threshold_and_policy_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"route.threshold and route.policy exclude each other.*--threshold.*--policy"
    ):
        load({"--threshold": "0.5", "--policy": "p.json"}, environ=environ(tmp_path))


def test_the_nearer_of_threshold_and_policy_wins(tmp_path: Path) -> None:
    loaded = load({"--threshold": "0.5"}, environ=environ(tmp_path, EDGEWISE_ROUTE_POLICY="p.json"))
    assert (loaded.settings.route.threshold, loaded.settings.route.policy) == (0.5, None)
    assert loaded.found["route.policy"].source == "overruled by flag --threshold"


def test_a_secret_is_given_by_its_variables_name_and_never_repeated(tmp_path: Path) -> None:
    for wrong in ("sk-12345", "hf_AbCd", "a b"):
        with pytest.raises(ConfigError) as caught:
            load({"--cloud-key-env": wrong}, environ=environ(tmp_path))
        assert wrong not in str(caught.value)
        assert "never the secret itself" in str(caught.value)


def test_secret() -> None:
    assert secret(None, "--cloud-key-env", {}) is None
    assert secret("KEY", "--cloud-key-env", {"KEY": " abc\n"}) == "abc"
    with pytest.raises(ConfigError, match=r"--cloud-key-env names the environment variable KEY, which is not set"):
        secret("KEY", "--cloud-key-env", {"KEY": " "})


def test_strays_are_variables_of_ours_that_mean_nothing(tmp_path: Path) -> None:
    given = environ(
        tmp_path, EDGEWISE_PROT="1", EDGEWISE_MY_KEY="s", EDGEWISE_CLOUD_KEY_ENV="EDGEWISE_MY_KEY", PATH="/"
    )
    assert strays(load(environ=given), given) == ["EDGEWISE_PROT"]


def test_every_flag_has_one_setting_and_every_default_passes_its_own_check() -> None:
    assert len(BY_FLAG) == sum(len(leaf.flags) for leaf in LEAVES.values())
    for leaf in LEAVES.values():
        assert leaf.default is None or leaf.parse(str(leaf.default)) is not None


def test_the_example_names_every_key_and_holds_the_defaults() -> None:
    example = ROOT / "edgewise.example.toml"
    for key, found in load(config=example, environ={}).found.items():
        assert key == "home" or found.value == LEAVES[key].default, key
    lines = [line for line in example.read_text().splitlines() if " = " in line or line.startswith("[")]
    tables = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines))
    keys = {f"{table}.{name}" for table, values in tables.items() if isinstance(values, dict) for name in values}
    assert keys | {name for name, value in tables.items() if not isinstance(value, dict)} == set(LEAVES)
