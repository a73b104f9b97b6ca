"""A link that is not there: a relay between an edge and its cloud with the delay, rate and faults of a real one.

    with Relay("http://127.0.0.1:8000", link_named("5g")) as relay:
        …  # the edge talks to relay.url
        relay.cut()

What passes and when is the model of `link_model.py`. For times that are right to some tens of microseconds give it a
process of its own, as below; a thread beside Python that computes gets its turn only every few milliseconds.

    python -m edgewise.bench.relay http://127.0.0.1:8000 --link 5g --cut-after-bytes-down 20000 --restore-after 2
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from edgewise.bench.relay_loop import Address, Loop
from edgewise.bench.relay_sockets import now_s
from edgewise.devices.links import LINKS, LinkProfile, link_named
from edgewise.errors import EdgewiseError, Unreachable, UsageError

PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}

Kind = Literal["stall", "reset", "cut", "profile", "resume", "restore"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to the link once: after so many seconds, or after so many bytes have arrived one way, both
    counted from when it is scheduled. A stall or a cut with `lasts_s` ends by itself; `profile` names the new link of a
    fault of that kind. UsageError if this says nothing or two things at once."""

    kind: Kind
    after_s: float | None = None
    after_bytes_up: int | None = None
    after_bytes_down: int | None = None
    lasts_s: float | None = None
    profile: LinkProfile | None = None

    def __post_init__(self) -> None:
        when = [a for a in (self.after_s, self.after_bytes_up, self.after_bytes_down) if a is not None]
        if len(when) != 1 or when[0] < 0:
            raise UsageError(f"a fault happens after so many seconds or bytes, once: {self} gives {when}")
        if self.kind not in get_args(Kind):
            raise UsageError(f"there is no fault {self.kind!r}; known are {', '.join(get_args(Kind))}")
        if (self.profile is None) == (self.kind == "profile"):
            raise UsageError(f"a profile belongs to a fault of that kind and to no other; this is {self}")
        if self.lasts_s is not None and (self.kind not in ENDS or self.lasts_s < 0):
            raise UsageError(f"only {' and '.join(ENDS)} last, for 0 s or longer; this is {self}")


ENDS: Final[dict[str, Kind]] = {"stall": "resume", "cut": "restore"}


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault that was, `at_s` seconds after the relay began, with the bytes that had arrived by then."""

    fault: Kind
    at_s: float
    bytes_up: int
    bytes_down: int


class Relay:
    """`with` starts and ends it; it runs in a thread of its own and listens on 127.0.0.1 alone.

    `target` is (host, port), or a URL whose path and scheme `url` keeps. The same `seed` loses the same packets,
    counted in each direction. `tell` hears of each fault in the relay's thread, right after it happened.
    Unreachable if the target's name is not known; a target that does not answer resets the connection.
    """

    def __init__(
        self,
        target: tuple[str, int] | str,
        profile: LinkProfile,
        *,
        seed: int = 0,
        port: int = 0,
        faults: Sequence[Fault] = (),
        tell: Callable[[Happened], None] = lambda happened: None,
    ) -> None:
        host, target_port, self._url = _parsed(target)
        self._loop = Loop(_resolved(host, target_port), _checked(profile), port=port, seed=seed)
        self._tell = tell
        self._faults = faults
        self._thread = threading.Thread(target=self._loop.run, name="relay", daemon=True)
        self._began_s = now_s()

    def __enter__(self) -> Relay:
        self._began_s = now_s()
        for fault in self._faults:
            self._schedule(fault)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; connections that are left are reset."""
        if self._thread.is_alive():
            self._loop.call(self._loop.stop)
            self._thread.join()
        elif not self._thread.ident:  # never begun
            self._loop.stop()
            self._loop.run()

    @property
    def port(self) -> int:
        return self._loop.port

    @property
    def url(self) -> str:
        """The target's URL with our address in place of its own."""
        scheme, path, query = self._url
        return urlunsplit((scheme, f"127.0.0.1:{self.port}", path, query, ""))

    @property
    def bytes_up(self) -> int:
        """What has arrived at the target, in bytes of TCP payload."""
        return self._loop.up.passed_bytes

    @property
    def bytes_down(self) -> int:
        """What has arrived at the clients, in bytes of TCP payload."""
        return self._loop.down.passed_bytes

    def stall(self) -> None:
        """Nothing arrives any more, and nothing breaks: a black hole."""
        self._now("stall")

    def resume(self) -> None:
        """After a stall: what had not arrived is sent once more."""
        self._now("resume")

    def reset(self) -> None:
        """Both sides of every connection see it reset; new ones are welcome."""
        self._now("reset")

    def cut(self) -> None:
        """Reset, and new connections are refused."""
        self._now("cut")

    def restore(self) -> None:
        """After a cut: new connections are welcome."""
        self._now("restore")

    def set_profile(self, profile: LinkProfile) -> None:
        """Another link from now on. What has begun to leave still arrives as on the old one."""
        self._loop.call(partial(self._happen, "profile", _checked(profile)))

    def schedule(self, fault: Fault) -> None:
        self._loop.call(partial(self._schedule, fault))

    def _now(self, kind: Kind) -> None:
        self._loop.call(partial(self._happen, kind))

    def _schedule(self, fault: Fault) -> None:
        happen = partial(self._happen, fault.kind, fault.profile and _checked(fault.profile), fault.lasts_s)
        if fault.after_s is not None:
            self._loop.at(now_s() + fault.after_s, happen)
        elif fault.after_bytes_up is not None:
            self._loop.when_passed(self._loop.up, fault.after_bytes_up, happen)
        elif fault.after_bytes_down is not None:
            self._loop.when_passed(self._loop.down, fault.after_bytes_down, happen)

    def _happen(self, kind: Kind, profile: LinkProfile | None = None, lasts_s: float | None = None) -> None:
        if profile is not None:
            self._loop.set_profile(profile)
        else:
            getattr(self._loop, kind)()
        self._tell(Happened(kind, now_s() - self._began_s, self.bytes_up, self.bytes_down))
        if lasts_s is not None:
            self._loop.at(now_s() + lasts_s, partial(self._happen, ENDS[kind]))


def _parsed(target: tuple[str, int] | str) -> tuple[str, int, tuple[str, str, str]]:
    """Host, port, and what a URL has beside them: scheme, path, query."""
    if not isinstance(target, str):
        return *target, ("http", "", "")
    url = urlsplit(target)
    if url.scheme not in PORTS or not url.hostname:
        raise UsageError(f"{target!r} is no URL of a target", hint=f"{', '.join(PORTS)} with a host, as ws://host:port")
    return url.hostname, url.port or PORTS[url.scheme], (url.scheme, url.path, url.query)


def _resolved(host: str, port: int) -> Address:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise Unreachable(f"the relay's target {host}:{port} is not known: {e.strerror}") from e
    return family, address


def _checked(profile: LinkProfile) -> LinkProfile:
    fits = (
        min(profile.up_bytes_per_s, profile.down_bytes_per_s) > 0
        and 0 <= profile.rtt_ms < float("inf")
        and 0 <= profile.loss_enter <= 1
        and 0 <= profile.loss_leave <= 1
    )
    if not fits:
        raise UsageError(f"{profile} is no link: rates are above 0, the round trip is 0 or more, losses are 0 to 1")
    return profile


def main(arguments: Sequence[str] | None = None) -> int:
    """The process form: `{"url": …}` on stdout, then a JSON line on stderr for each fault; ends after `--seconds`, on
    SIGTERM or SIGINT, or with standard input if it reads faults there."""
    options = _options().parse_args(arguments)
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    try:
        link = replace(link_named(options.link), loss_enter=options.loss_enter, loss_leave=options.loss_leave)
        faults = _faults(options)
        with Relay(options.url, link, seed=options.seed, port=options.port, faults=faults, tell=_print) as relay:
            print(json.dumps({"url": relay.url}), flush=True)
            if options.control:
                threading.Thread(target=_obey, args=(relay, done), daemon=True).start()
            done.wait(options.seconds)
    except EdgewiseError as e:
        print(e, file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 3
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgewise.bench.relay", description="A relay that acts as a link.")
    parser.add_argument("url", help="the target: ws, wss, http or https")
    parser.add_argument("--link", choices=LINKS, required=True)
    parser.add_argument(
        "--loss-enter", type=float, default=0.0, help="a packet behind a delivered one is lost so often"
    )
    parser.add_argument("--loss-leave", type=float, default=1.0, help="a packet behind a lost one arrives so often")
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes any free one")
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after so long")
    parser.add_argument("--control", action="store_true", help="read faults from standard input, and end with it")
    for kind in ("stall", "cut", "reset"):
        parser.add_argument(f"--{kind}-after", type=float, metavar="S")
        parser.add_argument(f"--{kind}-after-bytes-up", type=int, metavar="N")
        parser.add_argument(f"--{kind}-after-bytes-down", type=int, metavar="N")
    parser.add_argument("--restore-after", type=float, metavar="S", help="a stall or a cut ends after so long")
    parser.add_argument("--then", choices=LINKS, help="another link, after --then-after seconds")
    parser.add_argument("--then-after", type=float, metavar="S", default=0.0)
    return parser


def _faults(options: argparse.Namespace) -> list[Fault]:
    faults = []
    kinds: tuple[Kind, ...] = ("stall", "cut", "reset")
    for kind in kinds:
        lasts_s = options.restore_after if kind in ENDS else None
        for trigger in ("after_s", "after_bytes_up", "after_bytes_down"):
            value = getattr(options, f"{kind}_{trigger.removesuffix('_s')}")
            if value is not None:
                faults.append(Fault(kind, **{trigger: value}, lasts_s=lasts_s))
    if options.then:
        faults.append(Fault("profile", after_s=options.then_after, profile=link_named(options.then)))
    return faults


def _obey(relay: Relay, done: threading.Event) -> None:
    """One fault a line: its name, or the name of a link."""
    for line in sys.stdin:
        word = line.strip()
        if word in LINKS:
            relay.set_profile(LINKS[word])
        elif word in get_args(Kind) and word != "profile":
            getattr(relay, word)()
        else:
            print(f"{word!r} is neither a fault nor a link", file=sys.stderr)
    done.set()


def _print(happened: Happened) -> None:
    print(json.dumps(asdict(happened)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
