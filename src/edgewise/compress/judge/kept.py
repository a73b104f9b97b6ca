"""Which of a teacher's tokens a student's are, where its vocabulary is a part of the teacher's."""

from __future__ import annotations

import numpy as np

from edgewise.errors import UsageError
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import IdArray


def kept_ids(student: Tokenizer, teacher: Tokenizer) -> IdArray | None:
    """The teacher's id of each of the student's tokens, int64 [the student's vocabulary], -1 for ids without a token;
    None if both vocabularies are the same, id by id. Tokens are the same that are written the same or, in vocabularies
    of two kinds, stand for the same bytes. UsageError if the student has a token that the teacher has not."""
    size = student.vocab_size
    if size == teacher.vocab_size and all(student.piece(id) == teacher.piece(id) for id in range(size)):
        return None
    by_piece, by_bytes = _places(teacher)
    kept = np.full(size, -1, np.int64)
    strange = []
    for id in range(size):
        piece = student.piece(id)
        if piece is None:
            continue
        place = by_piece.get(piece, by_bytes.get(student.token_bytes(id)))
        if place is None:
            strange.append(piece)
        else:
            kept[id] = place
    if strange:
        raise UsageError(
            f"{len(strange)} of the student's {size} tokens are not in the teacher's vocabulary, among them "
            f"{strange[0]!r}",
            hint="their distributions cannot be compared; name the teacher that it was made from",
        )
    return kept


def _places(tokenizer: Tokenizer) -> tuple[dict[str, int], dict[bytes, int]]:
    """The ids of pieces, and of their bytes where they have any, the first of those that have the same."""
    by_piece: dict[str, int] = {}
    by_bytes: dict[bytes, int] = {}
    for id in range(tokenizer.vocab_size):
        if (piece := tokenizer.piece(id)) is not None:
            by_piece[piece] = id
            if raw := tokenizer.token_bytes(id):
                by_bytes.setdefault(raw, id)
    return by_piece, by_bytes
