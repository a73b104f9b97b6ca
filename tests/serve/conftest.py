from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from edgewise.engines.base import Generator
from edgewise.engines.fake import FakeGenerator
from served import Served

Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(generator, keys=[…], limits=…)` gives a running server; it ends with the test."""
    with ExitStack() as stack:

        def start(generator: Generator | None = None, **options: Any) -> Served:
            return stack.enter_context(Served(generator or FakeGenerator(), **options))

        yield start
