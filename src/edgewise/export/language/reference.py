"""The model as transformers runs it, in float32: what every artifact is held against. torch is used here.

The cache is used as an artifact has to use it: the passage's prompt at once, then a token at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.export.language.passages import LEAST_PROMPT, MOST_PROMPT, STEPS, Heard, Logits, Passage
from edgewise.export.work.job import Job, write_arrays


def begin(job: Job) -> Heard:
    """Options: `texts`, a list of token ids each; `steps`, how many to decode."""
    torch.set_num_threads(job.threads)
    model = opened(job.source.ref)
    steps = int(job.options.get("steps", STEPS))
    found = [_heard(model, [int(id) for id in ids], steps) for ids in job.options["texts"]]
    write_arrays(Path(job.work) / "reference", {str(n): logits for n, (_, logits) in enumerate(found)})
    return Heard(
        passages=tuple(passage for passage, _ in found),
        vocab=int(model.config.vocab_size),
        parameters=sum(one.numel() for one in model.parameters()),
    )


def opened(directory: str) -> Any:
    """The model of a Hugging Face directory. UnsupportedModel if transformers does not know it."""
    makes: Any = AutoModelForCausalLM
    try:
        model = makes.from_pretrained(directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    except (KeyError, ValueError, ImportError) as e:
        raise UnsupportedModel(f"transformers cannot load {directory}: {' '.join(str(e).split())[:300]}") from e
    except OSError as e:
        raise SourceError(f"{directory} cannot be read: {' '.join(str(e).split())[:300]}") from e
    return model.eval()


@torch.inference_mode()
def _heard(model: Any, ids: list[int], steps: int) -> tuple[Passage, Logits]:
    greedy = len(ids) < LEAST_PROMPT + steps
    ids = ids if greedy else ids[: MOST_PROMPT + steps]
    start = len(ids) if greedy else len(ids) - steps
    cache, rows = None, []
    if start > 1:
        cache = model(torch.tensor([ids[: start - 1]]), use_cache=True, logits_to_keep=1).past_key_values
    for step in range(steps):
        read = torch.tensor([[ids[start - 1 + step]]])
        said = model(read, past_key_values=cache, use_cache=True)
        cache, row = said.past_key_values, said.logits[0, -1]
        rows.append(row.numpy().astype(np.float32))
        if greedy:
            ids.append(int(row.argmax()))
    logits = np.stack(rows)
    if not np.isfinite(logits).all():
        raise SourceError("the model's own logits are infinite or no numbers", hint="its weights are damaged")
    return Passage(tuple(ids), start, greedy), logits
