"""Replays of which the truth is known: every outcome is drawn from a probability that the rows' evidence gives away."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def classified(count: int, seed: int = 0) -> list[Row]:
    """A classifier of four classes. The edge is right as its greatest softmax says, but a class that it likes too much
    is right half as often; there the cloud is right nine times in ten, elsewhere as often as the edge."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        logits = random.normal(size=4) * 2
        shares = np.exp(logits) / np.exp(logits).sum()
        weak = shares.argmax() == 3
        edge = shares.max() * (0.5 if weak else 1.0)
        cloud = 0.9 if weak else edge
        rows.append(
            {
                "id": f"c{number}",
                "prompt": f"row {number}",
                "edge": {"logits": [round(float(one), 4) for one in logits], "correct": bool(random.random() < edge)},
                "cloud": {"correct": bool(random.random() < cloud)},
            }
        )
    return rows


def written(count: int, seed: int = 0) -> list[Row]:
    """Generations with log-probabilities: the edge fails where its tokens are unsure and on questions of one group."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        group = ("law", "art")[number % 2]
        mean = float(-random.exponential(0.5))
        logprobs = [round(min(mean * 2 * random.random(), 0.0), 4) for _ in range(20)]
        edge = 1 / (1 + math.exp(-(2 + 3 * mean - (1.5 if group == "law" else 0))))
        rows.append(
            {
                "id": f"w{number}",
                "group": group,
                "prompt": f"Tell me about {group} number {number}, please.",
                "edge": {
                    "text": "An answer of some words.",
                    "token_logprobs": logprobs,
                    "correct": bool(random.random() < edge),
                },
                "cloud": {"correct": bool(random.random() < 0.9)},
            }
        )
    return rows


def saved(rows: list[Row], path: Path) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
