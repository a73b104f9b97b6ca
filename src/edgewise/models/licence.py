"""What a model card says about the licence: the front matter of README.md, as the Hub reads it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

HEAD_BYTES = 1 << 16  # front matter is a page at most
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense", "isc"}
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")  # files that travel with the weights

_FIELD = re.compile(r"(\w+):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"[ \t]*-[ \t]+(.*)")


def declared(directory: Path) -> str | None:
    """The licence's identifier, several joined by " and "; for `other` its own name, with the link to its text if there
    is one. None if README.md is missing or declares none."""
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        fields = _front_matter(file.read(HEAD_BYTES).decode(errors="replace"))
    licences = fields.get("license", [])
    if [name.lower() for name in licences] == ["other"]:
        licences = fields.get("license_name") or licences
        link = fields.get("license_link", [""])[0]
        return f"{licences[0]} ({link})" if link else licences[0]
    return " and ".join(licences) or None


def carry(licence: str | None, notices: Path | None, directory: Path) -> None:
    """What travels with weights into a Hugging Face directory: the licence's identifier in README.md, and the files of
    the directory `notices`."""
    if licence is not None:
        (directory / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    if notices is not None:
        for file in (file for pattern in NOTICES for file in notices.glob(pattern)):
            shutil.copyfile(file, directory / file.name)


def is_permissive(licence: str) -> bool:
    """Whether all of these ask for no more than attribution."""
    return set(licence.lower().split(" and ")) <= PERMISSIVE


def _front_matter(text: str) -> dict[str, list[str]]:
    """The plain values and lists of plain values at the top level; deeper ones do not matter here."""
    first, *lines = text.splitlines() or [""]
    fields: dict[str, list[str]] = {}
    values: list[str] = []
    for line in lines if first.rstrip() == "---" else ():
        if line.rstrip() == "---":
            break
        if field := _FIELD.fullmatch(line):
            values = fields[field[1]] = _values(field[2] or "")
        elif item := _ITEM.fullmatch(line):
            values += _values(item[1])
    return fields


def _values(text: str) -> list[str]:
    """`x`, `"x"` or `[x, y]`, each perhaps with a comment behind it."""
    plain = re.sub(r"(^|[ \t])#.*", "", text).strip()
    parts = plain[1:-1].split(",") if plain.startswith("[") and plain.endswith("]") else [plain]
    return [value for part in parts if (value := part.strip().strip("\"'"))]
