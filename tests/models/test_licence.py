"""The licence in a model card, in all the ways that the Hub's cards write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.models.licence import HEAD_BYTES, declared, is_permissive


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("language: en\nlicense: 'apache-2.0'  # as the code", "apache-2.0"),
        ("license:\n- mit\ntags:\n- x", "mit"),
        ("license:\n  - mit\n  - cc-by-4.0", "mit and cc-by-4.0"),
        ('license: ["mit", llama3]', "mit and llama3"),
        ("license: other", "other"),
        ("license: other\nlicense_name: some-terms", "some-terms"),
        ("license_link: https://example.org/t\nlicense: other\nlicense_name: a", "a (https://example.org/t)"),
        ("license: mit\nlicense_name: not-of-interest", "mit"),
        ("license:", None),
        ("tags:\n- license: mit", None),
        ("base:\n  license: mit", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_front_matter(front: str, licence: str | None, newline: str, tmp_path: Path) -> None:
    text = f"---\n{front}\n---\nlicense: of the text below\n"
    (tmp_path / "README.md").write_bytes(text.replace("\n", newline).encode())
    assert declared(tmp_path) == licence


@pytest.mark.parametrize("data", [b"", b"# Title\nlicense: mit\n", b"\xff\xfe---\nlicense: mit", b"---" * HEAD_BYTES])
def test_a_card_without_front_matter(data: bytes, tmp_path: Path) -> None:
    assert declared(tmp_path) is None
    (tmp_path / "README.md").write_bytes(data)
    assert declared(tmp_path) is None


def test_all_of_several_licences_must_be_permissive() -> None:
    assert is_permissive("MIT and apache-2.0")
    assert not is_permissive("mit and llama3")
