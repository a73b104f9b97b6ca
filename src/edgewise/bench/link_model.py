"""When bytes arrive over a link that is not there: arithmetic alone, no sockets and no clock.

A `Line` is one direction of a link, shared by everything that goes that way. Its model:

- **Rate.** Packets of at most 1,448 bytes leave one after the other, first come first served. Only payload is counted:
  `rate` is what a program gets through, without the 52 bytes of TCP and IP headers around each packet.
- **Delay.** A packet arrives half a round trip after its last byte has left.
- **Loss** is Gilbert's, drawn packet by packet in the order in which packets enter, so the n-th packet's fate depends
  on the seed alone. A lost packet holds back what its flow sends after it, as TCP delivers in order. It is sent again
  one round trip after the first packet behind it that gets through has left (the selective acknowledgement of that
  one says what is missing), or when its timer fires, 200 ms + the round trip after it left, whichever is first. The
  burst is over by then: what is sent again is lost as often as packets are in the long run, and its timer doubles each
  time. Every transmission takes its time on the link.

There is no congestion window and no slow start: a loss costs time, but does not throttle the sender. Acknowledgements,
openings and endings of a flow are neither lost nor take room.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

PACKET_BYTES: Final = 1448  # of Ethernet's 1,500 after IPv4, TCP and its time stamps
TIMER_S: Final = 0.2  # Linux's least retransmission time-out, on top of the round trip
TRAIN_S: Final = 0.000_25  # packets of a fast link travel together if they leave within this time
MOST_FAILURES: Final = 8  # a packet gets through at the latest then: its timer is 256 times the first


class Sign(Enum):
    """What a packet means to its flow."""

    DATA = auto()
    OPEN = auto()
    END = auto()
    RESET = auto()


@dataclass(slots=True)
class Packet:
    """A packet, or a train of them that leave together. Times are seconds of one clock; the line fills them in."""

    data: memoryview
    arrival_s: float
    sign: Sign = Sign.DATA
    failures: int = 0  # transmissions that the link loses
    size: int = 0
    begun_s: float = 0.0
    sent_s: float = 0.0  # the last byte of the first transmission has left
    free_s: float = 0.0  # the line is free again
    due_s: float = 0.0  # the last byte arrives, unless an earlier packet of the flow is still missing

    def __post_init__(self) -> None:
        self.size = len(self.data)


@dataclass(slots=True, eq=False)
class Flow:
    """What one sender has on a line, in the order in which it arrives."""

    packets: deque[Packet] = field(default_factory=deque)
    missing: list[Packet] = field(default_factory=list)  # lost, and no packet behind them has got through yet
    queued_bytes: int = 0


class Gilbert:
    """Losses in bursts: a packet behind a delivered one is lost with probability `enter`, behind a lost one with
    `1 - leave`."""

    def __init__(self, enter: float, leave: float, seed: str) -> None:
        self.enter, self.leave = enter, leave
        self._random = random.Random(seed)
        self._losing = False

    def lost(self) -> bool:
        """Whether the next packet is lost."""
        likely = 1 - self.leave if self._losing else self.enter
        self._losing = likely > 0 and self._random.random() < likely
        return self._losing

    def passing(self, count: int) -> int:
        """How many of the next `count` packets pass before one is lost; that one is drawn as well."""
        if self.enter == 0 and not self._losing:
            return count
        return next((passed for passed in range(count) if self.lost()), count)

    def failures(self) -> int:
        """How many transmissions of a packet fail whose first one has failed."""
        share = self.enter / (self.enter + self.leave)
        return next((n for n in range(1, MOST_FAILURES) if self._random.random() >= share), MOST_FAILURES)


class Line:
    """One direction of a link."""

    def __init__(self, rate_bytes_per_s: float, rtt_s: float, loss: Gilbert) -> None:
        self.rate_bytes_per_s, self.rtt_s, self.loss = rate_bytes_per_s, rtt_s, loss
        self.free_s = 0.0

    def packets(self, data: memoryview, arrival_s: float) -> Iterator[Packet]:
        """The data cut into packets, their fate drawn."""
        train = max(1, int(self.rate_bytes_per_s * TRAIN_S / PACKET_BYTES))
        while data:
            count = min(train, -(-len(data) // PACKET_BYTES))
            passing = self.loss.passing(count)
            if passing:
                yield Packet(data[: passing * PACKET_BYTES], arrival_s)
                data = data[passing * PACKET_BYTES :]
            if passing < count:
                yield Packet(data[:PACKET_BYTES], arrival_s, failures=self.loss.failures())
                data = data[PACKET_BYTES:]

    def enter(self, flow: Flow, packet: Packet) -> None:
        """Take the packet behind all that entered before it."""
        flow.packets.append(packet)
        flow.queued_bytes += packet.size
        self._time(flow, packet)

    def enter_again(self, flows: Iterable[Flow], now_s: float, *, all_of_it: bool = False) -> None:
        """Time those packets anew that had not begun to leave: the line has changed, or a flow is gone from it. With
        `all_of_it` everything that has not arrived leaves now once more."""
        held = [(packet, flow) for flow in flows for packet in flow.packets]
        again = [(p, flow) for p, flow in held if all_of_it or p.begun_s > now_s]
        entered = {id(packet) for packet, _ in again}
        self.free_s = max((p.free_s for p, _ in held if id(p) not in entered), default=now_s)
        for flow in {id(flow): flow for _, flow in again}.values():
            flow.missing = [packet for packet in flow.missing if id(packet) not in entered]
        for packet, flow in sorted(again, key=lambda pair: pair[0].begun_s):
            if all_of_it:
                packet.arrival_s = max(packet.arrival_s, now_s)
            self._time(flow, packet)

    def _time(self, flow: Flow, packet: Packet) -> None:
        takes_s = packet.size / self.rate_bytes_per_s
        packet.begun_s = max(packet.arrival_s, self.free_s)
        packet.sent_s = packet.begun_s + takes_s
        packet.free_s = packet.sent_s + packet.failures * takes_s
        packet.due_s = packet.sent_s + self._timers_s(packet.failures) + self.rtt_s / 2
        self.free_s = packet.free_s
        if packet.failures:
            flow.missing.append(packet)
        elif flow.missing:
            self._tell_missing(flow, heard_s=packet.sent_s + self.rtt_s)

    def _tell_missing(self, flow: Flow, heard_s: float) -> None:
        for lost in flow.missing:
            if heard_s < lost.sent_s + self._timers_s(1):
                lost.due_s = heard_s + self._timers_s(lost.failures - 1) + self.rtt_s / 2
        flow.missing.clear()

    def _timers_s(self, count: int) -> float:
        """So long run `count` timers one after the other, each twice as long as the one before."""
        return float((self.rtt_s + TIMER_S) * (2**count - 1))
