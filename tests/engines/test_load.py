from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from edgewise import registry
from edgewise.engines.decode import Decoder
from edgewise.engines.llamacpp import LlamaCpp
from edgewise.engines.load import open_generator
from edgewise.engines.openai import OpenAI
from edgewise.errors import SourceError, UnknownModel, UsageError
from edgewise.models.source import pull
from edgewise.types import Request


async def test_a_bundle_by_name_and_by_directory(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = pull(str(smollm2_gguf), home=tmp_path, name="mine").path
    texts = []
    for spec in ("mine", str(path)):
        made = open_generator(spec, home=tmp_path, mode="stable", slots=1, context=128)
        assert isinstance(made, Decoder)
        assert (made.name, made.can.context) == ("mine", 128)
        request = Request(prompt_ids=(1, 2, 3), max_tokens=4, ignore_eos=True)
        texts.append("".join([chunk.text async for chunk in made.generate(request)]))
        await made.close()
    assert texts[0] == texts[1] != ""


def test_a_gguf_file_is_run_by_llamacpp(smollm2_gguf: Path, tmp_path: Path) -> None:
    link = tmp_path / "Model.GGUF"
    link.symlink_to(smollm2_gguf.resolve())
    made = open_generator(str(link), home=tmp_path, slots=2, context=256)
    assert isinstance(made, LlamaCpp)
    assert (made.name, made.can.context) == ("Model", 256)
    asyncio.run(made.close())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "HTTPS://example.com/v1"])
async def test_an_address_is_an_openai_server(url: str, tmp_path: Path) -> None:
    made = open_generator(url, home=tmp_path)
    assert isinstance(made, OpenAI)
    await made.close()


@pytest.mark.parametrize(("spec", "error"), [("nothing", UnknownModel), ("no/such.gguf", SourceError)])
def test_what_is_not_here_is_an_error_that_says_what_to_do(spec: str, error: type, tmp_path: Path) -> None:
    with pytest.raises(error, match=spec) as caught:
        open_generator(spec, home=tmp_path)
    assert caught.value.hint


def test_the_registry_knows_its_engines_and_no_others() -> None:
    for name in registry.ENGINES:
        made = registry.engine(name)
        assert callable(made.forward if name in ("native", "onnx") else made.generate)
    with pytest.raises(UsageError, match="known are native, onnx"):
        registry.engine("oracle")


def test_loading_the_loader_loads_no_runtime() -> None:
    code = (
        "import sys, edgewise.engines.load; "
        "print([m for m in ('onnxruntime', 'xllamacpp', 'httpx2', 'torch', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"
