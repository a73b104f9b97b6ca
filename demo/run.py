"""`make demo`: an edge node and a cloud tier answer real prompts; then the cloud is killed, and the edge goes on alone.

    python demo/run.py [PROMPTS]

The policy is the one that ships; no prompt is forced to a tier. Exit code 0 if every prompt was answered and all three
routes were seen, else 1.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from nodes import CLOUD_MODEL, DEMO, EDGE_MODEL, LOGS, node, pull_bundles
from openai import OpenAI, OpenAIError
from prompts import DemoError, Prompt, read_prompts
from screen import Screen

REPORT = DEMO / "report.json"
ROUTES = ("edge", "cloud", "edge_fallback")
MAX_TOKENS = 96
ANSWER_S = 120


@dataclass(frozen=True)
class Answer:
    """One answer as report.json holds it. A failed one has no route, and its error for a text."""

    id: str
    prompt: str
    route: str | None
    confidence: float | None
    reason: str | None
    stream: bool
    first_token_ms: float | None
    decode_tok_s: float | None
    text: str


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    REPORT.unlink(missing_ok=True)
    try:
        prompts = read_prompts(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO / "prompts.jsonl")
        pull_bundles()
        answers, killed_after = play(prompts)
    except DemoError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return conclude(answers, killed_after)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def play(prompts: list[Prompt]) -> tuple[list[Answer], int]:
    """Ask all prompts, every second one streaming; kill the cloud in the middle. Returns the answers and their number
    at that moment."""
    print("starting a cloud tier and an edge node …", file=sys.stderr)
    with (
        node("cloud", "cloud", "--model", CLOUD_MODEL) as (cloud, cloud_url),
        node("edge", "serve", "--edge", EDGE_MODEL, "--cloud", cloud_url) as (_, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S) as client,
        Screen() as screen,
    ):
        answers: list[Answer] = []
        killed_after = 0
        for number, prompt in enumerate(prompts):
            if not killed_after and time_to_kill(answers, len(prompts)):
                killed_after = number
                kill(cloud)
                screen.row("the cloud is killed (SIGKILL)", "", "", "", "", "")
            answers.append(ask(client, prompt, stream=number % 2 == 0))
            screen.row(*cells(answers[-1]))
        return answers, killed_after


def time_to_kill(answers: list[Answer], total: int) -> bool:
    """Half way; later, up to three quarters, if the cloud has not answered yet."""
    seen = any(answer.route == "cloud" for answer in answers)
    return len(answers) >= (total // 2 if seen else total * 3 // 4)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def ask(client: OpenAI, prompt: Prompt, *, stream: bool) -> Answer:
    started = time.perf_counter()
    try:
        facts, text, first_token_ms = (streamed if stream else whole)(client, prompt.text, started)
    except (OpenAIError, httpx2.HTTPError) as e:  # a stream that breaks may raise what the client is built on
        return Answer(prompt.id, prompt.text, None, None, None, stream, None, None, f"{type(e).__name__}: {e}")
    return Answer(
        id=prompt.id,
        prompt=prompt.text,
        route=facts["route"],
        confidence=facts["confidence"],
        reason=facts["reason"],
        stream=stream,
        first_token_ms=round(first_token_ms, 1),
        decode_tok_s=(facts.get("timings") or {}).get("decode_tok_s"),
        text=text,
    )


def whole(client: OpenAI, text: str, started: float) -> tuple[dict[str, Any], str, float]:
    """(what Edgewise says of the answer, the answer, ms to its first token: a whole answer shows it with its last)."""
    answer = client.chat.completions.create(**question(text))
    return facts_of(answer), answer.choices[0].message.content or "", (time.perf_counter() - started) * 1000


def streamed(client: OpenAI, text: str, started: float) -> tuple[dict[str, Any], str, float]:
    """The same of a streamed answer."""
    pieces: list[str] = []
    facts: dict[str, Any] = {}
    first_token_ms = 0.0
    for chunk in client.chat.completions.create(**question(text), stream=True):
        facts |= facts_of(chunk)
        for choice in chunk.choices:
            if choice.delta.content:
                first_token_ms = first_token_ms or (time.perf_counter() - started) * 1000
                pieces.append(choice.delta.content)
    return facts, "".join(pieces), first_token_ms


def question(text: str) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS}


def facts_of(answer: Any) -> dict[str, Any]:
    """What Edgewise adds to an OpenAI answer."""
    return (answer.model_extra or {}).get("x_edgewise") or {}


def cells(answer: Answer) -> tuple[str, ...]:
    """The answer's row of the table."""
    numbers = ((answer.confidence, ".2f"), (answer.first_token_ms, ".0f"), (answer.decode_tok_s, ".0f"))
    shown = ["-" if value is None else format(value, form) for value, form in numbers]
    return (answer.prompt, answer.route or "FAILED", *shown, answer.text)


def conclude(answers: list[Answer], killed_after: int) -> int:
    """Write the report, say how it went; the exit code."""
    counts = {route: sum(answer.route == route for answer in answers) for route in ROUTES}
    report = {"answers": [asdict(a) for a in answers], "counts": counts, "cloud_killed_after": killed_after}
    REPORT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(", ".join(f"{route}: {count}" for route, count in counts.items()), f"(report: {REPORT})")
    failed = [answer.id for answer in answers if answer.route is None]
    unseen = [route for route, count in counts.items() if count == 0]
    for trouble, names in (("not answered", failed), ("routes not seen", unseen)):
        if names:
            print(f"demo: {trouble}: {', '.join(names)}; see {LOGS}", file=sys.stderr)
    return 1 if failed or unseen else 0


if __name__ == "__main__":
    sys.exit(main())
