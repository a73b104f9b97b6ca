"""A network's second half behind HTTP, and the way to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from edgewise.errors import RemoteBroken, RemoteRefused, Unreachable
from edgewise.models.graph import Graph
from edgewise.serve.app import create_worker_app
from edgewise.serve.exchange import Limits
from edgewise.serve.halves import Half
from edgewise.serve.run import listen
from edgewise.split.halves import BackHalf, Halves, read_answer
from edgewise.split.post import PATH, Post
from edgewise.wire.feature import encode
from served import eventually
from split.nets import images, residual

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph.open(residual(tmp_path_factory.mktemp("net") / "net.onnx"))


@pytest.fixture(scope="module")
def url(graph: Graph) -> Iterator[str]:
    half = Half(BackHalf(graph), Limits(body_bytes=1 << 20, in_flight=4))
    app = create_worker_app(half, keys=[KEY])
    listener = listen("127.0.0.1", 0, send_s=10)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def features(graph: Graph) -> bytes:
    halves = Halves(graph, graph.before(["p1"]))
    crossing, _ = halves.front({"image": images()})
    return encode(crossing, "exact", label=halves.label)


async def test_features_are_answered(graph: Graph, url: str) -> None:
    expected = Halves(graph, frozenset()).back({"image": images()})["logits"]
    post = Post(url, key=KEY)
    for _ in range(3):
        outputs, label, computed_s = read_answer(await post(features(graph)))
        assert np.abs(outputs["logits"] - expected).max() < 1e-4
        assert label.startswith(graph.digest[:16])
        assert computed_s > 0
    await post.close()


@pytest.mark.parametrize("address", ["/v1", "/", PATH])
async def test_addresses_may_be_written_in_several_ways(graph: Graph, url: str, address: str) -> None:
    post = Post(url + address, key=KEY)
    assert post.url == url + PATH
    assert await post(features(graph))
    await post.close()


@pytest.mark.parametrize("key", [None, "another-key"])
async def test_nobody_computes_without_the_key(graph: Graph, url: str, key: str | None) -> None:
    post = Post(url, key=key)
    with pytest.raises(RemoteRefused, match="answered 401") as refused:
        await post(features(graph))
    assert refused.value.status == 401
    await post.close()


async def test_what_are_no_features_is_the_client_s_fault(graph: Graph, url: str, tmp_path: Path) -> None:
    other = Graph.open(residual(tmp_path / "other.onnx", seed=4))
    post = Post(url, key=KEY)
    for body, said in ((b"", "0 bytes are no features"), (features(other), "give both sides the same file")):
        with pytest.raises(RemoteRefused, match=said) as refused:
            await post(body)
        assert refused.value.status == 400
    with pytest.raises((RemoteRefused, Unreachable)):  # the server says so and hangs up, be it in mid-sentence
        await post(bytes(1 << 21))
    assert await post(features(graph))
    await post.close()


async def test_nobody_there(url: str) -> None:
    post = Post("http://127.0.0.1:1", key=KEY)
    with pytest.raises(Unreachable, match="check that a worker runs there"):
        await post(b"")
    await post.close()


async def test_an_endless_answer_is_cut_short(monkeypatch: pytest.MonkeyPatch, graph: Graph, url: str) -> None:
    monkeypatch.setattr("edgewise.split.post.MOST_BYTES", 10)
    post = Post(url, key=KEY)
    with pytest.raises(RemoteBroken, match="longer than 10 bytes"):
        await post(features(graph))
    await post.close()
