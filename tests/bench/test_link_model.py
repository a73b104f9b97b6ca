"""The timing model of a link is arithmetic: given times and sizes, it says when what arrives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.bench.link_model import MOST_FAILURES, PACKET_BYTES, TIMER_S, Flow, Gilbert, Line, Packet, Sign

RATE = PACKET_BYTES * 1000  # one packet takes a millisecond
RTT_S = 0.1
NEVER = Gilbert(0.0, 1.0, "")


def packet(size: int = PACKET_BYTES, at: float = 0.0, failures: int = 0) -> Packet:
    return Packet(memoryview(bytes(size)), at, failures=failures)


def entered(*packets: Packet, line: Line | None = None, flow: Flow | None = None) -> list[float]:
    """When each is due on a line of one packet a millisecond and 100 ms of round trip."""
    line, flow = line or Line(RATE, RTT_S, NEVER), flow or Flow()
    for each in packets:
        line.enter(flow, each)
    return [each.due_s for each in packets]


def test_a_packet_takes_its_time_on_the_line_and_half_a_round_trip() -> None:
    assert entered(packet(at=5.0)) == pytest.approx([5.051])
    assert entered(packet(724, at=5.0)) == pytest.approx([5.0505])


def test_packets_leave_one_after_the_other_whatever_their_flow() -> None:
    line, one, other = Line(RATE, RTT_S, NEVER), Flow(), Flow()
    assert entered(packet(), packet(), line=line, flow=one) == pytest.approx([0.051, 0.052])
    assert entered(packet(at=0.001), line=line, flow=other) == pytest.approx([0.053])
    assert entered(packet(at=0.010), line=line, flow=one) == pytest.approx([0.061])  # the line was idle from 3 to 10 ms
    assert one.queued_bytes == 3 * PACKET_BYTES


def test_signs_take_no_room() -> None:
    line, flow = Line(RATE, RTT_S, NEVER), Flow()
    line.enter(flow, Packet(memoryview(b""), 1.0, Sign.OPEN))
    assert entered(packet(at=1.0), line=line, flow=flow) == pytest.approx([1.051])


def test_a_lone_lost_packet_waits_for_its_timer_which_doubles() -> None:
    timer_s = RTT_S + TIMER_S
    assert entered(packet(failures=1)) == pytest.approx([0.051 + timer_s])
    assert entered(packet(failures=3)) == pytest.approx([0.051 + (1 + 2 + 4) * timer_s])


def test_a_packet_that_gets_through_tells_of_those_missing_before_it() -> None:
    lost, also_lost, through = packet(failures=1), packet(failures=1), packet()
    # Each lost one takes a second millisecond, when it is sent again: the third has left at 5 ms.
    due_s = entered(lost, also_lost, through)
    assert due_s == pytest.approx([0.155, 0.155, 0.055])  # heard of at 105 ms, there at 155 ms


def test_what_is_lost_when_sent_again_waits_for_its_timer() -> None:
    lost = packet(failures=2)
    entered(lost, packet())
    assert lost.due_s == pytest.approx(0.004 + RTT_S + 0.3 + RTT_S / 2)


def test_news_later_than_the_timer_change_nothing() -> None:
    lost = packet(failures=1)
    assert entered(lost, packet(at=0.5))[0] == pytest.approx(0.351)


def test_news_are_of_their_own_flow() -> None:
    line, one, other, lost = Line(RATE, RTT_S, NEVER), Flow(), Flow(), packet(failures=1)
    entered(lost, line=line, flow=one)
    entered(packet(), line=line, flow=other)
    assert lost.due_s == pytest.approx(0.351)
    entered(packet(at=0.01), line=line, flow=one)
    assert lost.due_s == pytest.approx(0.161)


def test_another_rate_is_for_what_has_not_begun_to_leave() -> None:
    line, flow = Line(RATE, RTT_S, NEVER), Flow()
    packets = [packet() for _ in range(3)]
    entered(*packets, line=line, flow=flow)
    line.rate_bytes_per_s, line.rtt_s = RATE / 10, 0.2
    line.enter_again([flow], 0.0005)  # in the midst of the first
    assert [p.due_s for p in packets] == pytest.approx([0.051, 0.111, 0.121])
    assert entered(packet(), line=line, flow=flow) == pytest.approx([0.131])


def test_after_a_stall_everything_leaves_once_more() -> None:
    line, flow, other = Line(RATE, RTT_S, NEVER), Flow(), Flow()
    packets = [packet(), packet(failures=1), packet()]
    entered(*packets[:2], line=line, flow=flow)
    entered(packets[2], line=line, flow=other)
    line.enter_again([flow, other], 7.0, all_of_it=True)
    assert [p.due_s for p in packets] == pytest.approx([7.051, 7.352, 7.054])
    assert flow.missing == [packets[1]]


def test_what_is_gone_no_longer_takes_the_line() -> None:
    line, gone, stays, left = Line(RATE, RTT_S, NEVER), Flow(), Flow(), packet()
    entered(*(packet() for _ in range(100)), line=line, flow=gone)
    entered(left, line=line, flow=stays)
    line.enter_again([stays], 0.002)
    assert left.due_s == pytest.approx(0.053)


@given(st.integers(0, 50_000), st.sampled_from([1e4, RATE, 125e6]), st.sampled_from([0.0, 0.2]), st.integers(0, 99))
def test_packets_are_the_data_in_order(size: int, rate: float, enter: float, seed: int) -> None:
    data = random.Random(size).randbytes(size)
    packets = list(Line(rate, RTT_S, Gilbert(enter, 0.5, str(seed))).packets(memoryview(data), 1.0))
    assert b"".join(each.data for each in packets) == data
    assert all(each.size <= PACKET_BYTES for each in packets if each.failures or rate <= RATE)
    assert all(0 < each.size <= max(PACKET_BYTES, rate * 0.00025) for each in packets)


def test_a_fast_line_carries_trains_and_a_slow_one_packets() -> None:
    data = memoryview(bytes(10 * PACKET_BYTES))
    assert [p.size for p in Line(125e6, 0.001, NEVER).packets(data, 0.0)] == [10 * PACKET_BYTES]
    assert [p.size for p in Line(RATE, 0.001, NEVER).packets(data, 0.0)] == [PACKET_BYTES] * 10


@pytest.mark.parametrize("rate", [1e5, 125e6])
def test_the_same_seed_loses_the_same_packets_however_the_data_comes(rate: float) -> None:
    def fates(seed: str, pieces: list[int]) -> list[bool]:
        """Packet by packet, whether its first transmission is lost."""
        line = Line(rate, 0.0, Gilbert(0.1, 0.7, seed))
        found = []
        for piece in pieces:
            for each in line.packets(memoryview(bytes(piece * PACKET_BYTES)), 0.0):
                found += [each.failures > 0] * (each.size // PACKET_BYTES)
        return found

    whole = fates("7 up", [400])
    assert 20 < sum(whole) < 90
    assert fates("7 up", [1, 3, 96, 300]) == whole
    assert fates("8 up", [400]) != whole
    assert fates("7 down", [400]) != whole


def test_losses_are_as_often_and_as_long_as_gilbert_says() -> None:
    loss = Gilbert(0.01, 0.25, "0 up")
    lost = [loss.lost() for _ in range(200_000)]
    begins = sum(now and not before for before, now in zip([False, *lost], lost, strict=False))
    assert sum(lost) / len(lost) == pytest.approx(0.01 / (0.01 + 0.25), rel=0.1)
    assert sum(lost) / begins == pytest.approx(4, rel=0.1)


def test_what_is_sent_again_is_lost_as_often_as_any_packet() -> None:
    loss = Gilbert(0.1, 0.4, "0 up")
    again = [loss.failures() - 1 for _ in range(20_000)]
    assert sum(again) / len(again) == pytest.approx(0.2 / 0.8, rel=0.1)  # the mean of a geometric count of 20 %


def test_a_link_that_loses_everything_still_lets_a_packet_through_in_the_end() -> None:
    (only,) = Line(RATE, RTT_S, Gilbert(1.0, 0.0, "")).packets(memoryview(b"x"), 0.0)
    assert only.failures == MOST_FAILURES
