"""The plan of a model on a device: does it fit, how fast, at which precision, and if not, what then.

Arithmetic alone: an outline, a site and the fitted speeds go in, a Plan comes out. All speeds that a plan compares are
predicted in one call. docs/planner.md says how each figure is made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from edgewise.errors import UsageError
from edgewise.models.known import family
from edgewise.models.outline import Outline
from edgewise.plan.fit import Estimate
from edgewise.plan.memory import GIB, Memory, Room, needed
from edgewise.plan.precision import PRECISIONS, Precision, streamed
from edgewise.plan.sites import Asked, Site
from edgewise.plan.speed import Part, drives, situation, weights
from edgewise.plan.speeds import Speeds

READING_TOK_S: Final = 10.0  # what people read at, and so the least that is wanted unless somebody says more
FINE_BITS: Final = 4.0  # below it answers get visibly worse, so nothing below is recommended
CONTEXT: Final = 2048
PROMPT: Final = 512


class Wish(msgspec.Struct, frozen=True):
    """What the user asks for; None leaves it to the plan."""

    part: Part | None = None
    runtime: str | None = None
    precision: Precision | None = None
    context: int = CONTEXT
    prompt: int = PROMPT
    tok_s: float = READING_TOK_S

    def __post_init__(self) -> None:
        for name, value in (("--context", self.context), ("--prompt", self.prompt)):
            if not 1 <= value <= 1 << 24:
                raise UsageError(f"{name} is {value}; 1 to {1 << 24} are allowed")
        if not 0 < self.tok_s <= 1e6:
            raise UsageError(f"--want is {self.tok_s:g}; above 0 and at most 1000000 is allowed")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`fits` is None where the memory of the device is not known; `precision` "as stored" is that of the model's file.
    Speeds are of one stream, the decode speed behind `context` tokens. `joules_per_token` takes the power of the whole
    device where that of the part is not known."""

    model: str
    device: str
    unit: Part
    runtime: str
    precision: str
    context: int
    fits: bool | None
    memory_bytes: dict[str, int | None]
    streamed_bytes_per_token: float
    decode_tok_s: Estimate
    prefill_tok_s: Estimate
    first_token_ms: Estimate
    joules_per_token: Estimate | None
    best_precision: str | None
    largest: dict[str, str] | None
    suggestions: tuple[str, ...]
    changes: tuple[str, ...]
    reasons: tuple[str, ...]
    assumed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The fields of docs/planner.md; estimates as `{value, low, high}`."""
        told = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value._asdict() if isinstance(value, Estimate) else value for name, value in told.items()}


class Option(NamedTuple):
    """One way to run a model, with its need and its speeds."""

    asked: Asked
    memory: Memory
    decode: Estimate
    prefill: Estimate

    def fits(self, room: Room) -> bool | None:
        return None if room.available is None else self.memory.need <= room.available

    @property
    def precision(self) -> str:
        return "as stored" if self.asked.precision is None else self.asked.precision.name


def make(outline: Outline, site: Site, speeds: Speeds, wish: Wish | None = None) -> Plan:
    """UsageError if the site has no such part, or none that runs language models."""
    return _Planner(outline, site, speeds, wish or Wish()).plan()


class _Planner:
    def __init__(self, outline: Outline, site: Site, speeds: Speeds, wish: Wish) -> None:
        self._outline, self._site, self._speeds, self._wish = outline, site, speeds, wish

    def plan(self) -> Plan:
        wish, outline = self._wish, self._outline
        options = self._options(self._ways(), [outline], self._precisions)
        chosen, best = self._chosen(options), None
        if wish.precision is None and outline.stored is None:
            best = self._best([o for o in options if _way(o) == _way(chosen)])
            chosen = best or chosen
        elif others := self._options([_way(chosen)], [outline], lambda way: _finer(self._named(way))):
            best = self._best(others)
        room = self._site.room(chosen.asked.part)
        largest = self._largest(_way(chosen), room)
        fits = chosen.fits(room)
        quick = chosen.decode.value >= wish.tok_s
        return Plan(
            model=outline.name,
            device=self._site.name,
            unit=chosen.asked.part,
            runtime=chosen.asked.runtime,
            precision=chosen.precision,
            context=wish.context,
            fits=fits,
            memory_bytes=_memory(chosen.memory, room),
            streamed_bytes_per_token=self._streamed(chosen),
            decode_tok_s=chosen.decode,
            prefill_tok_s=chosen.prefill,
            first_token_ms=_first_token(chosen.prefill, wish.prompt),
            joules_per_token=_energy(self._site.power_w(chosen.asked.part), chosen.decode),
            best_precision=best and best.precision,
            largest=largest and {"model": largest.asked.outline.name, "precision": largest.precision},
            suggestions=tuple(self._suggestions(chosen, room, largest, fits=fits, quick=quick)),
            changes=tuple(self._changes(chosen, room, options, fits=fits, quick=quick)),
            reasons=tuple(self._reasons(chosen, room, fits=fits)),
            assumed=tuple(self._assumed(chosen)),
        )

    # Options

    def _ways(self) -> list[tuple[Part, str]]:
        """Parts and runtimes to look at."""
        wish, usual = self._wish, self._site.parts()
        found = [(part, wish.runtime or runtime) for part, runtime in usual if wish.part in (None, part)]
        found = [(part, runtime) for part, runtime in found if self._drives(part, runtime)]
        if not found:
            has = ", ".join(f"{part} ({runtime})" for part, runtime in usual) or "none"
            asked = " with ".join(filter(None, (wish.part and f"the {wish.part}", wish.runtime))) or "language models"
            raise UsageError(f"{self._site.name} offers nothing for {asked}", hint=f"it has: {has}")
        return found

    def _drives(self, part: Part, runtime: str) -> bool:
        return drives(runtime, self._site.machine(part, runtime).unit)

    def _named(self, way: tuple[Part, str]) -> list[Precision | None]:
        """Those that models are had in for the runtime, the finest first."""
        return [PRECISIONS[name] for name in self._site.ways(*way).precisions]

    def _precisions(self, way: tuple[Part, str]) -> Sequence[Precision | None]:
        if self._wish.precision is not None:
            return [self._wish.precision]
        return [None] if self._outline.stored is not None else self._named(way)

    def _options(self, ways: Sequence[tuple[Part, str]], outlines: Sequence[Outline], precisions: Any) -> list[Option]:
        """Every model at every precision on every way; those that the site has measured itself are not fitted."""
        wish = self._wish
        asked = [
            Asked(outline, precision, part, runtime, wish.context, wish.prompt)
            for part, runtime in ways
            for outline in outlines
            for precision in precisions((part, runtime))
        ]
        known = [self._site.measured(one) for one in asked]
        fitted = iter(self._fitted([one for one, speed in zip(asked, known, strict=True) if speed is None]))
        return [
            Option(one, self._memory_of(one), *(speed or next(fitted))) for one, speed in zip(asked, known, strict=True)
        ]

    def _fitted(self, asked: Sequence[Asked]) -> list[tuple[Estimate, Estimate]]:
        situations = [
            situation(
                one.outline,
                one.precision,
                self._site.machine(one.part, one.runtime),
                one.runtime,
                context=one.context,
                prompt=one.prompt,
            )
            for one in asked
        ]
        if not situations:
            return []
        decode, prefill = self._speeds.decode.predict(situations), self._speeds.prefill.predict(situations)
        return list(zip(decode, prefill, strict=True))

    def _memory_of(self, asked: Asked) -> Memory:
        unit = self._site.machine(asked.part, asked.runtime).unit
        ways = self._site.ways(asked.part, asked.runtime)
        return needed(asked.outline, asked.precision, ways, unit, asked.context)

    # Choices

    def _chosen(self, options: Sequence[Option]) -> Option:
        """The fastest that fits; if none does, the fastest of those that need least of their way."""
        able = [o for o in options if o.fits(self._site.room(o.asked.part)) is not False and _fine(o)]
        if able:
            return max(able, key=lambda o: o.decode.value)
        least = {_way(o): o for o in sorted(options, key=lambda o: (_fine(o), -o.memory.need))}
        return max(least.values(), key=lambda o: o.decode.value)

    def _best(self, options: Sequence[Option]) -> Option | None:
        """The finest precision that fits and is quick enough, else the quickest that fits; none where none fits."""
        able = [o for o in options if o.fits(self._site.room(o.asked.part)) is not False and _fine(o)]
        quick = [o for o in able if o.decode.value >= self._wish.tok_s]
        return quick[0] if quick else max(able, key=lambda o: o.decode.value, default=None)

    def _largest(self, way: tuple[Part, str], room: Room) -> Option | None:
        """Of the model's family, the one of most parameters that fits, at the coarsest precision that is recommended.
        None where the memory is not known or none fits."""
        if room.available is None:
            return None
        coarsest = _finer(self._named(way))[-1:]
        relatives = [one for one in family(self._outline) if self._wish.context <= one.context]
        options = self._options([way], relatives, lambda _: coarsest)
        return max((o for o in options if o.fits(room)), key=lambda o: o.asked.outline.total, default=None)

    def _streamed(self, option: Option) -> float:
        asked = option.asked
        ways = self._site.ways(asked.part, asked.runtime)
        cache = asked.outline.kv_values_read(max(asked.context, ways.static_cache)) * ways.kv_bits / 8
        return streamed(asked.outline, weights(asked.outline, asked.precision, ways)) + cache

    # Words

    def _reasons(self, chosen: Option, room: Room, *, fits: bool | None) -> list[str]:
        need, m = chosen.memory.need, chosen.memory
        parts = f"weights {_gib(m.weights)}, keys and values {_gib(m.kv)}, the rest {_gib(m.activations + m.runtime)}"
        if room.available is None:
            first = f"it needs {_gib(need)} ({parts}); {room.why}"
        else:
            first = f"it needs {_gib(need)} of the {_gib(room.available)} to be had ({parts}); to be had: {room.why}"
        asked = chosen.asked
        reasons = [first]
        if asked.context > asked.outline.context:
            reasons.append(f"a context of {asked.context} is asked for, the model was made for {asked.outline.context}")
        machine = self._site.machine(asked.part, asked.runtime)
        bound = machine.bandwidth_gb_s * 1e9 / self._streamed(chosen)
        reasons.append(
            f"a token reads {_gib(self._streamed(chosen))}, at {machine.bandwidth_gb_s:.4g} GB/s no more than "
            f"{bound:.3g} tok/s; {chosen.decode.value / bound:.0%} of that is expected"
        )
        if self._site.measured(asked) is None:
            ways = self._site.ways(asked.part, asked.runtime)
            at = situation(asked.outline, asked.precision, machine, ways.name, context=asked.context)
            t = self._speeds.decode.times(at)
            reasons.append(
                f"of a token's time, reading alone is {t.reading * t.whole:.3g} ms, multiplying "
                f"{t.computing * t.whole:.3g} ms, launching {t.launching * t.whole:.3g} ms"
            )
        else:
            reasons.append("speeds follow from what our own kernels reach on this machine")
        return [*reasons, *self._site.limits(asked.part)]

    def _suggestions(
        self, chosen: Option, room: Room, largest: Option | None, *, fits: bool | None, quick: bool
    ) -> list[str]:
        """A split or a cascade where the model is too large or too slow."""
        found = []
        name = self._outline.name
        if fits is False and room.available is not None:
            layers = self._layers_that_fit(chosen, room.available)
            if layers:
                found.append(
                    f"split: the first {layers} of {self._outline.layers} layers here and the rest on another machine; "
                    "each token then waits for one round trip"
                )
        if (fits is False or not quick) and largest is not None and largest.asked.outline.total < self._outline.total:
            smaller = f"{largest.asked.outline.name} ({largest.precision})"
            found.append(f"cascade: {smaller} here, {name} in the cloud for what it is not sure of")
        return found

    def _layers_that_fit(self, chosen: Option, available: int) -> int:
        m, layers = chosen.memory, self._outline.layers
        head = weights(self._outline, chosen.asked.precision, self._site.ways(*_way(chosen))).head
        each = (m.weights - head + m.kv) / layers
        return max(0, min(layers - 1, int((available - m.activations - m.runtime) / each)))

    def _changes(
        self, chosen: Option, room: Room, options: Sequence[Option], *, fits: bool | None, quick: bool
    ) -> list[str]:
        """What would have to be other for it to fit and to be quick enough."""
        found = []
        if fits is False and room.available is not None:
            short = chosen.memory.need - room.available
            found.append(f"{_gib(short)} more memory for it")
            if context := self._longest_context(chosen, room.available):
                found.append(f"a context of {context} tokens")
            smaller = [p for p in self._named(_way(chosen)) if p is not None and p.body >= FINE_BITS]
            for option in self._options([_way(chosen)], [self._outline], lambda _: smaller):
                if option.fits(room):
                    found.append(f"the precision {option.precision}")
                    break
        if not quick:
            factor = self._wish.tok_s / chosen.decode.value
            found.append(f"{factor:.2g} times the speed for the wanted {self._wish.tok_s:g} tok/s")
        return found

    def _longest_context(self, chosen: Option, available: int) -> int:
        """The most tokens of context that fit; 0 where not even one does."""
        contexts = range(1, self._wish.context)
        return bisect_right(
            contexts, available, key=lambda n: self._memory_of(msgspec.structs.replace(chosen.asked, context=n)).need
        )

    def _assumed(self, chosen: Option) -> list[str]:
        machine = self._site.machine(chosen.asked.part, chosen.asked.runtime)
        found = [f"{what} of a typical {machine.kind}" for what in machine.assumed]
        if self._outline.guessed:
            found.append(f"the usual proportions of a model of {self._outline.total / 1e9:.3g}B parameters")
        return found


def _way(option: Option) -> tuple[Part, str]:
    return option.asked.part, option.asked.runtime


def _fine(option: Option) -> bool:
    return option.asked.precision is None or option.asked.precision.body >= FINE_BITS


def _finer(precisions: Sequence[Precision | None]) -> list[Precision | None]:
    return [one for one in precisions if one is not None and one.body >= FINE_BITS]


def _memory(memory: Memory, room: Room) -> dict[str, int | None]:
    parts = {name: getattr(memory, name) for name in memory.__struct_fields__}
    return {**parts, "need": memory.need, "available": room.available}


def _first_token(prefill: Estimate, prompt: int) -> Estimate:
    return Estimate(*(1e3 * prompt / speed for speed in (prefill.value, prefill.high, prefill.low)))


def _energy(power_w: float | None, decode: Estimate) -> Estimate | None:
    if power_w is None:
        return None
    return Estimate(*(power_w / speed for speed in (decode.value, decode.high, decode.low)))


def _gib(count: float) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.3g} MiB"
