"""Rules that forbid a request to leave the device. docs/formats/privacy.md is the format.

Whatever cannot be decided counts as forbidden.
"""

from __future__ import annotations

import logging
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import regex

from edgewise.errors import ConfigError
from edgewise.types import Request

log = logging.getLogger(__name__)

FORMAT: Final = 1
SIZE_LIMIT: Final = 1 << 20  # bytes of the file
SEARCH_S: Final = 0.05  # for one pattern and one text
FLAGS: Final = regex.IGNORECASE | regex.VERSION1
_SEE: Final = "docs/formats/privacy.md says what rules look like"
KINDS: Final = ("pattern", "header", "route", "model")


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    pattern: str | None = None
    header: str | None = None
    value: str | None = None
    route: str | None = None
    model: str | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    rule: list[_Rule]


@dataclass(frozen=True)
class Rules:
    """Compiled rules. `of_request` and `of_call` give the name of a rule that is met, or None."""

    patterns: Mapping[str, Any]
    headers: Mapping[str, tuple[str, Any]]  # by rule: the header in lower case, and what its value must match or None
    routes: Mapping[str, str]
    models: Mapping[str, str]

    def of_request(self, request: Request) -> str | None:
        """By what the request says."""
        if not self.patterns:
            return None
        if request.prompt_ids is not None:
            return next(iter(self.patterns))
        try:
            texts = list(_texts(request))
        except Exception as error:  # what cannot be read is not shown to be harmless
            return self._closed(next(iter(self.patterns)), error)
        return next((name for name, pattern in self.patterns.items() if self._found(name, pattern, texts)), None)

    def of_call(self, route: str, model: str, headers: Mapping[str, str]) -> str | None:
        """By how it came: the API's path, the model that it names, its headers (names in lower case)."""
        for name, path in self.routes.items():
            if path == route:
                return name
        for name, wanted in self.models.items():
            if wanted == model:
                return name
        for name, (header, pattern) in self.headers.items():
            value = headers.get(header)
            if value is not None and (pattern is None or self._matches(name, pattern, value)):
                return name
        return None

    def _found(self, name: str, pattern: Any, texts: Iterable[str]) -> bool:
        try:
            return any(pattern.search(text, timeout=SEARCH_S) for text in texts)
        except Exception as error:
            return self._closed(name, error) is not None

    def _matches(self, name: str, pattern: Any, value: str) -> bool:
        try:
            return pattern.fullmatch(value, timeout=SEARCH_S) is not None
        except Exception as error:
            return self._closed(name, error) is not None

    def _closed(self, name: str, error: Exception) -> str:
        """Say that a rule could not be looked at, without what it was looking at."""
        log.warning("privacy rule %r could not be looked at (%s): it counts as met", name, type(error).__name__)
        return name

    @staticmethod
    def open(path: Path) -> Rules:
        """Read a rules file. ConfigError if it cannot be read, or for anything in it that is not a rule."""
        try:
            with path.open("rb") as file:
                raw = file.read(SIZE_LIMIT + 1)
            if len(raw) > SIZE_LIMIT:
                raise ConfigError(f"{path} has more than {SIZE_LIMIT} bytes, which no rules have", hint=_SEE)
            found = msgspec.convert(tomllib.loads(raw.decode()), _File)
        except OSError as error:
            raise ConfigError(f"the rules {path} cannot be read: {error.strerror or error}", hint=_SEE) from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
            raise ConfigError(f"{path} holds no rules: {error}", hint=_SEE) from error
        if found.format != FORMAT:
            raise ConfigError(f"{path} has format {found.format}; this version reads {FORMAT}", hint=_SEE)
        if not found.rule:
            raise ConfigError(f"{path} holds no rule", hint=_SEE)
        return _compiled(found.rule, str(path))


def _compiled(rules: Iterable[_Rule], origin: str) -> Rules:
    patterns: dict[str, Any] = {}
    headers: dict[str, tuple[str, Any]] = {}
    routes: dict[str, str] = {}
    models: dict[str, str] = {}
    names: set[str] = set()
    for rule in rules:
        place = f"{origin}, rule {rule.name[:100]!r}"
        if not 1 <= len(rule.name) <= 100 or not rule.name.isprintable() or rule.name in names:
            raise ConfigError(f"{place}: names are 1 to 100 printable characters, each once", hint=_SEE)
        names.add(rule.name)
        kinds = [kind for kind in KINDS if getattr(rule, kind) is not None]
        if len(kinds) != 1 or (rule.value is not None and rule.header is None) or not getattr(rule, kinds[0]):
            raise ConfigError(
                f"{place} has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}; exactly one is allowed, "
                "not empty, and `value` beside `header` alone",
                hint=_SEE,
            )
        if rule.pattern is not None:
            patterns[rule.name] = _pattern(rule.pattern, place)
        elif rule.header is not None:
            headers[rule.name] = (rule.header.lower(), None if rule.value is None else _pattern(rule.value, place))
        elif rule.route is not None:
            routes[rule.name] = rule.route
        elif rule.model is not None:
            models[rule.name] = rule.model
    return Rules(patterns, headers, routes, models)


def _pattern(text: str, place: str) -> Any:
    try:
        return regex.compile(text, FLAGS)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{place}: not a regular expression: {error}", hint=_SEE) from error


def _texts(request: Request) -> Iterator[str]:
    """All that the request says, in every reading in which a rule must find it."""
    said = [message.content for message in request.messages]
    said += [request.prompt] if request.prompt is not None else []
    for text in dict.fromkeys([*said, *request.stop, "\n".join(said)]):
        plain = unicodedata.normalize("NFKC", text)
        shown = "".join(char for char in plain if unicodedata.category(char) != "Cf")
        yield from dict.fromkeys((text, plain, shown))
