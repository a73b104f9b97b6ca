import pytest

from edgewise.evaluate.answers import matches, normalised


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Answer, is: NO!", "answer is no"),
        ("an apple a day", "apple day"),
        ("3.5 and 1,000.", "3.5 and 1,000"),
        ("well-known (thing)", "well known thing"),
        ("ﬁve", "five"),
        ("snake_case", "snake case"),
        ("thereof", "thereof"),
        ("", ""),
    ],
)
def test_normalised(text: str, plain: str) -> None:
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("Yes.", "yes", True),
        ("Yes.\n\nBecause it is so.", "yes", True),
        ("\n\nParis\nParis is the capital.", "paris", True),
        ("Paris is the capital.", "paris", False),
        ("no", ["yes", "No!"], True),
        ("3.5", "35", False),
        ("", "yes", False),
        ("", "", True),
        ("+", "+", True),
        ("-", "+", False),
        ("the", "a", False),
    ],
)
def test_matches(answer: str, gold: str | list[str], right: bool) -> None:
    assert matches(answer, gold) is right
