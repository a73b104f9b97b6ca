"""The prompts of a file that a student has not learnt from: what `edgewise record` should ask.

    python benchmarks/student_prompts.py CONFIG PROMPTS.jsonl[.gz] -o FILE.jsonl.gz

CONFIG is that of `edgewise distill`, its output is there. A prompt is left out if any text that was learnt from answers
it, in whichever words.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from edgewise.compress.distil.config import Config
from edgewise.compress.lessons.corpus import Corpus, learnt
from edgewise.compress.lessons.documents import Document, gathered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    config = Config.open(args.config)
    data, output = config.data, Path(config.output)
    fields = (data.field,) if isinstance(data.field, str) else data.field
    answers = output / "answers.jsonl" if data.generate else None
    found = gathered(text=data.text, jsonl=data.jsonl, fields=fields, hub=data.hub, answers=answers)
    known = {document.family for document in learnt(Corpus.open(output / "corpus").facts, found.sources)}
    kept = 0
    with (
        gzip.open(args.prompts, "rt") if args.prompts.suffix == ".gz" else args.prompts.open() as file,
        gzip.GzipFile(args.output, "wb", mtime=0) as out,
    ):
        for line in file:
            if Document("", json.loads(line)["prompt"]).family not in known:
                out.write(line.encode())
                kept += 1
    print(f"{kept} prompts are new to the student")


if __name__ == "__main__":
    main()
