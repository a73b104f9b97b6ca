"""The smallest cut between two vertices of a network, by Dinic's algorithm (E. A. Dinic, 1970).

Capacities are integers, so that it ends and is exact. Networks of long chains would take it one round for each length
of a path; a first round over all arcs that lead on in a known order fills those at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

UNBOUNDED: Final = 1 << 200


class Network:
    """`vertices` of them, 0 is the source and 1 the sink."""

    def __init__(self, vertices: int) -> None:
        self._arcs: list[list[int]] = [
            [] for _ in range(vertices)
        ]  # by the vertex they leave; an arc's back is arc ^ 1
        self._to: list[int] = []
        self._room: list[int] = []

    def connect(self, start: int, end: int, capacity: int, back: int = 0) -> None:
        """An arc of that capacity, and one of `back` the other way."""
        for a, b, room in ((start, end, capacity), (end, start, back)):
            self._arcs[a].append(len(self._to))
            self._to.append(b)
            self._room.append(room)

    def source_side(self, order: Sequence[int]) -> list[bool]:
        """For each vertex whether it is on the source's side of the smallest cut, of several the one with the fewest
        vertices there. `order` gives each vertex a number that rises along most arcs. Works once: it fills the arcs."""
        self._fill(order, stride=0)
        while True:
            levels = self._levels()
            if levels[1] < 0:
                return [level >= 0 for level in levels]
            self._fill(levels, stride=1)

    def _levels(self) -> list[int]:
        """Arcs from the source; -1 where none leads. The search ends at the sink."""
        arcs, to, room = self._arcs, self._to, self._room
        levels = [-1] * len(arcs)
        levels[0] = 0
        queue = deque([0])
        while queue and levels[1] < 0:
            vertex = queue.popleft()
            for arc in arcs[vertex]:
                if room[arc] and levels[to[arc]] < 0:
                    levels[to[arc]] = levels[vertex] + 1
                    queue.append(to[arc])
        return levels

    def _fill(self, levels: Sequence[int], stride: int) -> None:
        """Flow along arcs to a higher level (by `stride`, if that is above 0) until no path of such arcs has room.

        A walk in depth that carries how much may still come (`wanted`) and what has gone on (`sent`) from each vertex
        on its path, so that a path is walked once for all that branches off it.
        """
        arcs, to, room = self._arcs, self._to, self._room
        next_arc = [0] * len(arcs)
        path: list[int] = []
        wanted, sent = [UNBOUNDED], [0]
        vertex = 0
        while True:
            taken = -1
            if vertex == 1:
                sent[-1] = wanted[-1]
            elif sent[-1] < wanted[-1]:
                here, level, i = arcs[vertex], levels[vertex], next_arc[vertex]
                while i < len(here):
                    arc = here[i]
                    step = levels[to[arc]] - level
                    if room[arc] and (step == stride if stride else step > 0):
                        taken = arc
                        break
                    i += 1
                next_arc[vertex] = i
            if taken >= 0:
                wanted.append(min(room[taken], wanted[-1] - sent[-1]))
                sent.append(0)
                path.append(taken)
                vertex = to[taken]
                continue
            if not path:
                return
            wanted.pop()
            gone, arc = sent.pop(), path.pop()
            room[arc] -= gone
            room[arc ^ 1] += gone
            sent[-1] += gone
            vertex = to[arc ^ 1]
            if sent[-1] < wanted[-1]:  # that arc is full, or nothing more goes on behind it
                next_arc[vertex] += 1
