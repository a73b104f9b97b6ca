"""What a model's tokenizer is, whichever format its model came in: the files of a bundle, in memory."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer as Core

from edgewise.errors import BundleError, UsageError
from edgewise.models.model_source import ModelSource
from edgewise.models.tokenizer import CONFIG, TEMPLATE, TOKENIZER, Config, Tokenizer

TEXT_ENDS: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`core` is the text of tokenizer.json, `template` the chat template; docs/formats/tokenizer.md has the rest."""

    core: str
    config: Config
    template: str | None

    @staticmethod
    def read(directory: Path) -> TokenizerFiles:
        """Of a bundle's directory. BundleError if they are not whole."""
        Tokenizer.open(directory)  # says what is wrong with them
        try:
            core = (directory / TOKENIZER).read_bytes().decode()
            config = msgspec.json.decode((directory / CONFIG).read_bytes(), type=Config)
            template = directory / TEMPLATE
            return TokenizerFiles(core, config, template.read_bytes().decode() if template.is_file() else None)
        except (OSError, ValueError) as e:
            raise BundleError(f"the tokenizer in {directory} cannot be read: {e}", hint="pull the model again") from e

    @staticmethod
    def of_source(source: ModelSource) -> TokenizerFiles:
        """Of a model in somebody's file format."""
        with tempfile.TemporaryDirectory(prefix="edgewise-") as place:
            source.write_tokenizer(Path(place))
            return TokenizerFiles.read(Path(place))

    def opened(self) -> Tokenizer:
        core = Core.from_str(self.core)
        core.no_padding()
        core.no_truncation()
        return Tokenizer(core, self.config, self.template)

    @property
    def end(self) -> int:
        """The id that stands between two texts: of the tokens that stop an answer the one that ends a text, where there
        is one, else the end of a turn. UsageError if no token stops an answer."""
        core = Core.from_str(self.core)
        ends = [core.token_to_id(text) for text in TEXT_ENDS]
        stops = [*(id for id in ends if id in self.config.stop), self.config.eos, *self.config.stop]
        found = next((id for id in stops if id is not None), None)
        if found is None:
            raise UsageError(
                "the tokenizer has no token that ends a text", hint="name one in its tokenizer_config.json"
            )
        return found

    def write_huggingface(self, directory: Path) -> None:
        """Into a Hugging Face directory, as transformers reads it and models/tokenizer_writer.py reads it back."""
        core, config = Core.from_str(self.core), self.config
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": config.add_bos,
            "add_eos_token": config.add_eos,
            "clean_up_tokenization_spaces": False,
        }
        for name, id in (("bos_token", config.bos), ("eos_token", config.eos)):
            if id is not None:
                settings[name] = core.id_to_token(id)
        generation = {"bos_token_id": config.bos, "eos_token_id": list(config.stop)}
        _write_json(directory / CONFIG, settings)
        _write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])})
        (directory / TOKENIZER).write_bytes(self.core.encode())
        if self.template is not None:
            (directory / TEMPLATE).write_bytes(self.template.encode())


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
