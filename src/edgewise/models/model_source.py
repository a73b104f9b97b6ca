"""A model in somebody's file format, as bundles are made from it. from_gguf.py and from_hf.py are the formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from edgewise.errors import UnsupportedModel
from edgewise.models.blocks import Layer
from edgewise.models.card import Card
from edgewise.models.weights import Matrix
from edgewise.types import FloatArray


class ModelSource(ABC):
    """The card is read when it is opened, each weight when it is asked for. SourceError for damage, UnsupportedModel
    for what a bundle cannot carry."""

    kind: str
    otherwise: str  # the hint for a model that no bundle can hold
    path: Path
    card: Card
    types: Counter[str]  # weight types and how many matrices have them

    def __init__(self, path: Path) -> None:
        self.path = path
        self._used: set[str] = set()
        self._rehearsing = False  # shapes of matrices are checked, and their values stay where they are

    @property
    @abstractmethod
    def licence_id(self) -> str | None:
        """SPDX identifier, or what the file says in its place; None if it says nothing."""

    @abstractmethod
    def embed(self) -> Matrix:
        """[vocab, hidden]."""

    @abstractmethod
    def head(self) -> Matrix | None:
        """[vocab, hidden]; None where it is the embedding."""

    @abstractmethod
    def norm(self) -> FloatArray:
        """The scales before the head, float32 [hidden]."""

    @abstractmethod
    def layer(self, n: int) -> Layer:
        """Layer `n`, 0 the first."""

    @abstractmethod
    def write_tokenizer(self, directory: Path) -> None:
        """Our tokenizer files (docs/formats/tokenizer.md) into the directory."""

    @abstractmethod
    def _tensors(self) -> Iterable[str]:
        """The names of all tensors that a bundle has to hold."""

    def check(self) -> None:
        """Every tensor of the card must be there and none besides: one more means a model that is more than its card.
        Reads vectors only; SourceError or UnsupportedModel."""
        self._rehearsing = True
        self.embed()
        self.head()
        self.norm()
        for n in range(self.card.layers):
            self.layer(n)
        self._rehearsing = False
        left = sorted(set(self._tensors()) - self._used)
        if left:
            names = f"{', '.join(left[:4])}{' …' if len(left) > 4 else ''}"
            why = f"{self.path.name} holds {len(left)} tensors that we do not know: {names}"
            raise UnsupportedModel(why, hint=self.otherwise)
