"""One answer on two machines: the link is cut in the middle of a sentence, and the sentence ends as if it were not.

    python demo/cut.py [PROMPT]

A worker runs the last layers of the model, `edgewise ask --split` the first; a relay between them imitates a mobile
link.
Exit code 0 if the answer with the cut is the one without.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from nodes import CLOUD_MODEL, edgewise, environment, node, pull_bundles
from prompts import DemoError

from edgewise.bench.relay import Relay
from edgewise.devices.links import LINKS

PROMPT = "Explain in detail how rain forms, from the sea to the roof."
CUT_AFTER, BACK_AFTER = 90, 150  # characters of the answer
TOKENS = 240


def main() -> int:
    try:
        pull_bundles()
    except DemoError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    with node("worker", "split", "serve", "--model", CLOUD_MODEL) as (_, url), Relay(url, LINKS["5g"]) as relay:
        print(f"> {prompt}\n")
        whole, _ = answer(prompt, relay.url, {})
        events = {CUT_AFTER: ("link cut", relay.cut), BACK_AFTER: ("link back", relay.restore)}
        disturbed, told = answer(prompt, relay.url, events, show=True)
    print(f"\n\n{told}")
    print("the same words as without the cut" if disturbed == whole else f"other words: {whole}")
    return 0 if disturbed == whole else 1


def answer(
    prompt: str, url: str, events: dict[int, tuple[str, Callable[[], object]]], *, show: bool = False
) -> tuple[str, str]:
    """The text, and what `edgewise ask` told of it. `events` happen once so many characters have come."""
    command = edgewise("ask", prompt, "--split", url, "--edge", CLOUD_MODEL, "--max-tokens", str(TOKENS))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        text = ""
        while piece := process.stdout.read(1):
            text += piece
            if show:
                print(piece.rstrip("\n"), end="", flush=True)
            if len(text) in events:
                name, happen = events[len(text)]
                happen()
                print(f" [{name}] ", end="", flush=True)
        told = process.stderr.read().strip().splitlines()
    return text, told[-1] if told else ""


if __name__ == "__main__":
    sys.exit(main())
