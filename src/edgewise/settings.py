"""Every setting, its default and where its value came from: flags > environment > edgewise.toml > default.

A default stands once, here. A key `table.name` is `name` in `[table]` of edgewise.toml and EDGEWISE_TABLE_NAME in the
environment; no other file reads the environment. A secret is given by the name of the variable that holds it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from edgewise.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
CONFIG_VARIABLE = "EDGEWISE_CONFIG"
CONFIG_NAME = "edgewise.toml"
CONFIG_LIMIT = 1 << 20  # bytes
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

Parse = Callable[[str], object]  # ValueError says what is allowed


def _text(raw: str) -> str:
    if not raw.strip():
        raise ValueError("some text is needed")
    return raw


def _path(raw: str) -> Path:
    try:
        return Path(_text(raw)).expanduser()
    except RuntimeError as e:
        raise ValueError("a path without ~ is needed, as the home directory is not known") from e


def _url(raw: str) -> str:
    try:
        parts = urlsplit(raw)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("an address like http://host:8000 is needed")
    return raw.rstrip("/")


def _urls(raw: str) -> str:
    return ",".join(_url(part.strip()) for part in raw.split(","))


def _variable(raw: str) -> str:
    if not VARIABLE.fullmatch(raw):
        raise ValueError("the name of an environment variable is needed (A-Z, 0-9, _), never the secret itself")
    return raw


def _whole(low: int, high: int) -> Parse:
    def parse(raw: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", raw.strip()) or not low <= int(raw) <= high:
            raise ValueError(f"a whole number from {low} to {high} is needed")
        return int(raw)

    return parse


def _number(low: float, high: float) -> Parse:
    def parse(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g} is needed")
        return value

    return parse


def _choice(*allowed: str) -> Parse:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(f"one of {', '.join(allowed)} is needed")
        return raw

    return parse


def _flag(raw: str) -> bool:
    if raw.lower() not in ("true", "false"):
        raise ValueError("true or false is needed")
    return raw.lower() == "true"


def _setting(default: object, parse: Parse, about: str, *flags: str) -> Any:
    return field(default=default, metadata={"parse": parse, "about": about, "flags": flags})


Runtime = Literal["auto", "native", "onnxruntime"]
Mode = Literal["fast", "stable"]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The model that runs on this machine: the edge of `ask` and `serve`, the whole of `cloud`."""

    name: str = _setting(DEFAULT_MODEL, _text, "bundle name, bundle directory or .gguf file", "--edge", "--model")
    runtime: Runtime = _setting(
        "auto",
        _choice(*get_args(Runtime)),
        "what computes a bundle: our own kernels, onnxruntime, or the first of them that can",
        "--runtime",
    )
    mode: Mode = _setting(
        "stable",
        _choice(*get_args(Mode)),
        "numerics on onnxruntime: stable (the same request gives the same answer) or fast (quicker, without that "
        "promise); our own kernels are stable always",
        "--mode",
    )
    slots: int = _setting(4, _whole(1, 256), "requests that run at once; each holds a KV cache")
    context: int | None = _setting(None, _whole(1, 1 << 24), "tokens of context; unset: the model's own")


@dataclass(frozen=True, slots=True)
class CloudSettings:
    """The tier that hard requests go to."""

    url: str | None = _setting(None, _url, "an OpenAI-compatible address; unset: the edge stands alone", "--cloud")
    model: str = _setting("auto", _text, "the model's name at that address")
    key_env: str | None = _setting(
        None, _variable, "name of the environment variable that holds its key", "--cloud-key-env"
    )
    answer_s: float = _setting(600.0, _number(0.1, 86_400), "seconds that one of its answers may take, to its end")


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """A worker that runs the last layers of the model, and how it is spoken to."""

    url: str | None = _setting(
        None, _urls, "addresses of workers (with commas between them) that run the model's last layers", "--split"
    )
    key_file: Path | None = _setting(None, _path, "a file whose first line is the workers' key", "--split-key-file")
    ca: Path | None = _setting(None, _path, "certificates to trust for them instead of the system's", "--split-ca")
    cut: int | None = _setting(
        None, _whole(1, 4096), "layers that run here; unset: as few as the worker leaves, but a third", "--cut"
    )
    codec: str = _setting(
        "auto",
        _choice("auto", "exact", "fp16", "int8", "int4"),
        "how the boundary is written; auto: the smallest that is known to keep to max_rise",
        "--codec",
    )
    max_rise: float = _setting(0.01, _number(0, 1), "most that the perplexity may rise, for auto", "--max-rise")
    head: str = _setting(
        "cloud", _choice("cloud", "edge"), "where hidden states become tokens; edge takes hidden states back", "--head"
    )
    tail: bool = _setting(True, _flag, "whether the last layers may run here while no worker answers")
    patience_s: float = _setting(
        30.0, _number(0, 86_400), "seconds that a request waits for a worker where they may not"
    )


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """How the tier is chosen; at most one of the two."""

    threshold: float | None = _setting(
        None, _number(0, 1), "edge answers with a confidence below it go to the cloud", "--threshold"
    )
    policy: Path | None = _setting(
        None, _path, "a policy file, or a directory of them; unset: the one that ships for these models", "--policy"
    )


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """What must not leave this machine."""

    rules: Path | None = _setting(None, _path, "a file of rules; requests that meet one stay here", "--privacy")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What `serve` writes down of the requests that it decides on; nothing of those that a privacy rule keeps here."""

    file: Path | None = _setting(None, _path, "a replay to append to, which policies can be fitted on", "--log")
    texts: bool = _setting(False, _flag, "keep prompts and answers in it, and not only numbers", "--log-texts")
    share: float = _setting(
        0.0,
        _number(0, 1),
        "share of these requests that both tiers answer, one of them unseen: 0.05 audits, 1 is shadow mode",
        "--audit",
    )


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Where `serve` and `cloud` listen."""

    host: str = _setting("127.0.0.1", _text, "address to listen on", "--host")
    port: int = _setting(0, _whole(0, 65535), "port to listen on; 0: any free one", "--port")
    key_env: str | None = _setting(
        None, _variable, "name of the environment variable that holds the key which clients must send", "--key-env"
    )
    key_file: Path | None = _setting(
        None, _path, "a file of such keys, one a line, any of which opens; instead of key_env", "--key-file"
    )
    tls_cert: Path | None = _setting(None, _path, "a certificate chain in PEM form: serve https", "--tls-cert")
    tls_key: Path | None = _setting(None, _path, "its private key", "--tls-key")
    choices: int = _setting(8, _whole(1, 128), "most answers to one request: n, times the prompts of a completion")
    send_s: float = _setting(
        120.0, _number(0.1, 86_400), "seconds, all in all, that an answer waits for a client that reads slowly"
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Made by `load`, which expands and checks every value."""

    home: Path = _setting(Path("~/.edgewise"), _path, "where bundles and other state live")
    threads: int | None = _setting(None, _whole(1, 1024), "threads of the runtime; unset: one per core")
    model: ModelSettings = field(default_factory=ModelSettings)
    cloud: CloudSettings = field(default_factory=CloudSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    route: RouteSettings = field(default_factory=RouteSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    log: LogSettings = field(default_factory=LogSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key with all its names."""

    key: str
    default: Any
    parse: Parse
    about: str
    flags: tuple[str, ...]

    @property
    def variable(self) -> str:
        return "EDGEWISE_" + self.key.upper().replace(".", "_")


@dataclass(frozen=True, slots=True)
class Found:
    """A value and the place that it came from; `rank` orders the places, the highest wins."""

    value: Any
    source: str
    rank: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force, with the source of each key and the file that was read."""

    settings: Settings
    found: Mapping[str, Found]
    file: Path | None


def _leaves(table: type, prefix: str = "") -> Iterator[Leaf]:
    for item in fields(table):
        yield from _leaves_of(item, prefix)


def _leaves_of(item: Field[Any], prefix: str) -> Iterator[Leaf]:
    if is_dataclass(item.default_factory):
        yield from _leaves(item.default_factory, f"{item.name}.")
    else:
        meta = item.metadata
        yield Leaf(prefix + item.name, item.default, meta["parse"], meta["about"], meta["flags"])


LEAVES: Mapping[str, Leaf] = {leaf.key: leaf for leaf in _leaves(Settings)}
TABLES = {key.partition(".")[0] for key in LEAVES if "." in key}
EXCLUSIVE = (("route.threshold", "route.policy"), ("serve.key_env", "serve.key_file"), ("cloud.url", "split.url"))
BY_FLAG: Mapping[str, Leaf] = {flag: leaf for leaf in LEAVES.values() for flag in leaf.flags}


def load(
    flags: Mapping[str, str | None] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """The settings in force. `flags` maps a flag such as `--port` to its text (None: not given); `config` is the file
    of `--config`. ConfigError for an unknown key, a bad value, an unreadable file."""
    environ = os.environ if environ is None else environ
    found = {key: _default(leaf) for key, leaf in LEAVES.items()}
    found |= _from_environment(environ)  # first of all for `home`, where the file lies
    file = _config_file(config, environ, found["home"].value)
    if file is not None:
        found |= {key: new for key, new in _from_file(file).items() if new.rank > found[key].rank}
    found |= _from_flags(flags or {})
    for pair in EXCLUSIVE:
        found |= _exclusive(found, *pair)
    return Loaded(_build(Settings, found), found, file)


def secret(variable: str | None, setting: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The secret held by the environment variable of that name; None for no name. ConfigError if it is not set."""
    if variable is None:
        return None
    value = (os.environ if environ is None else environ).get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"{setting} names the environment variable {variable}, which is not set", hint=f"export {variable}=…"
        )
    return value


def keys_of(file: Path) -> tuple[str, ...]:
    """The keys of a key file: one a line, empty lines and those that begin with # left out. ConfigError if there is
    none, or if it cannot be read; what it holds is never repeated."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the key file {file}: {type(e).__name__}", hint="one key a line, ASCII") from e
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys or any(" " in key for key in keys):
        raise ConfigError(f"the key file {file} holds {len(keys)} keys", hint="one key a line, without spaces")
    return keys


def strays(loaded: Loaded, environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like ours and mean nothing: most likely misspelt."""
    known = {leaf.variable for leaf in LEAVES.values()} | {CONFIG_VARIABLE}
    known |= {found.value for key, found in loaded.found.items() if key.endswith("key_env") and found.value}
    names = os.environ if environ is None else environ
    return sorted(name for name in names if name.startswith("EDGEWISE_") and name not in known)


def _default(leaf: Leaf) -> Found:
    value = None if leaf.default is None else _checked(leaf, leaf.default, "the default")
    return Found(value, "default", 0)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Found]:
    """An empty variable counts as unset."""
    return {
        leaf.key: Found(_checked(leaf, environ[leaf.variable], leaf.variable), f"environment {leaf.variable}", 2)
        for leaf in LEAVES.values()
        if environ.get(leaf.variable)
    }


def _from_flags(flags: Mapping[str, str | None]) -> dict[str, Found]:
    given = {flag: value for flag, value in flags.items() if value is not None}
    return {
        BY_FLAG[flag].key: Found(_checked(BY_FLAG[flag], value, flag), f"flag {flag}", 3)
        for flag, value in given.items()
    }


def _config_file(config: Path | None, environ: Mapping[str, str], home: Path) -> Path | None:
    """The file to read. Only the one under the home directory may be absent. The working directory is not searched: a
    file that came with somebody's checkout could send prompts and keys elsewhere."""
    if config is not None:
        return config
    if environ.get(CONFIG_VARIABLE):
        return _path(environ[CONFIG_VARIABLE])
    usual = home / CONFIG_NAME
    return usual if usual.is_file() else None


def _from_file(file: Path) -> dict[str, Found]:
    values = dict(_flat(_parsed(file)))
    for key in values:
        if key not in LEAVES:
            raise ConfigError(f"{file}: unknown key {key!r}", hint=_nearest(key))
    source = f"file {file}"
    return {key: Found(_checked(LEAVES[key], raw, f"{file}: {key}"), source, 1) for key, raw in values.items()}


def _parsed(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(CONFIG_LIMIT + 1)
        if len(raw) > CONFIG_LIMIT:
            raise ConfigError(f"{file} is larger than {CONFIG_LIMIT} bytes, so it is no settings file")
        return tomllib.loads(raw.decode())
    except OSError as e:
        raise ConfigError(f"cannot read the settings file {file}: {e.strerror}", hint="check --config") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{file} is not valid TOML: {e}", hint="see edgewise.example.toml") from e


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and (value or name in TABLES) and prefix + name not in LEAVES:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, LEAVES, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(LEAVES)}"


def _checked(leaf: Leaf, raw: object, place: str) -> Any:
    """The parsed value. A text that stands where a variable's name belongs may be a secret: it is not repeated."""
    try:
        if not isinstance(raw, str | int | float | Path):
            raise ValueError("a single value is needed")
        return leaf.parse(str(raw))
    except ValueError as e:
        shown = "not a variable's name" if leaf.parse is _variable else repr(raw)
        raise ConfigError(f"{place} is {shown}: {e}") from e


def _exclusive(found: Mapping[str, Found], *keys: str) -> dict[str, Found]:
    """Of settings that exclude each other the one of the highest rank stands; two of one rank are an error."""
    given = sorted((key for key in keys if found[key].value is not None), key=lambda key: found[key].rank)
    if len(given) < 2:
        return {}
    loser, winner = given[-2:]
    if found[loser].rank == found[winner].rank:
        sources = f"{found[loser].source}, {found[winner].source}"
        raise ConfigError(f"{loser} and {winner} exclude each other, and both are set ({sources})", hint="drop one")
    return {loser: Found(None, f"overruled by {found[winner].source}", found[loser].rank)}


def _build(table: type, found: Mapping[str, Found], prefix: str = "") -> Any:
    values = {
        item.name: _build(item.default_factory, found, f"{item.name}.")
        if is_dataclass(item.default_factory)
        else found[prefix + item.name].value
        for item in fields(table)
    }
    return table(**values)
