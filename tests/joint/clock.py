"""An event loop whose time jumps: hours pass in no time, and every test sees exact times."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from edgewise.engines import answer

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep, its clock moves instead. Nothing else can wake it: no sockets, no threads."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("every task waits for something that never comes")
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class VirtualTime:
    """Stands in for the module `time` where engines read the clock."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time, and see that no task and no generator is left."""
    real, answer.time = answer.time, VirtualTime
    try:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            result = runner.run(_leaving_nothing(work))
        return result
    finally:
        answer.time = real


async def _leaving_nothing(work: Coroutine[Any, Any, T]) -> T:
    result = await work
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"
    return result
