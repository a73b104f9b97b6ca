"""A network on two sides: what goes where, what is learnt of the link, and that no request is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgewise.devices.links import LinkProfile
from edgewise.errors import BadFrame, EngineClosed, RemoteBroken, RequestError, Unreachable
from edgewise.models.graph import Graph
from edgewise.split.halves import BackHalf, Halves, read_answer
from edgewise.split.predictor import Patience, SplitPredictor
from edgewise.split.profile import Coding, Profile
from edgewise.split.profiling import profiled
from edgewise.wire.feature import decode, encode
from split.nets import images, residual

FAST = LinkProfile("fast", 1e9, 1e9, 0.1)
SLOW = LinkProfile("slow", 100, 100, 5000)
SURE = Patience(least_s=60, most_s=60)  # a busy machine is no silent cloud


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph.open(residual(tmp_path_factory.mktemp("net") / "net.onnx", early=True))


@pytest.fixture(scope="module")
def profile(graph: Graph) -> Profile:
    """Measured, with times that make the front cheap up to the pooling and dear behind it."""
    found = profiled(graph, [{"image": images()}], upload={"image": Coding(1e6, 1.0, 1.0)}, rounds=1)
    cuts = []
    for cut in found.cuts:
        front_s = 0.001 if len(cut.edge) <= 4 else 1.0
        cuts.append(msgspec.structs.replace(cut, front_s=front_s if cut.edge else 0.0, back_s=0.001))
    return msgspec.structs.replace(found, cuts=tuple(cuts))


class Cloud:
    """A BackHalf that can be made to fail, and remembers what came."""

    def __init__(self, graph: Graph, **how: Any) -> None:
        self.half = BackHalf(graph, **how)
        self.failure: Exception | None = None
        self.silent = False
        self.seen: list[bytes] = []

    async def __call__(self, payload: bytes) -> bytes:
        self.seen.append(payload)
        if self.silent:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return await asyncio.to_thread(self.half.answer, payload)


def whole(graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
    return Halves(graph, frozenset()).back({"image": x})


def close_to(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], share: float = 0.3) -> bool:
    return all(np.abs(found[n] - expected[n]).max() <= share * np.abs(expected[n]).max() for n in expected)


async def test_a_fast_link_is_used(graph: Graph, profile: Profile) -> None:
    cloud = Cloud(graph)
    plans = profile.plans(max_error=1)
    split = SplitPredictor(graph, plans, cloud, FAST, patience=SURE)
    found = await split.predict({"image": images()})
    assert list(found) == ["logits", "flat"]
    assert close_to(found, whole(graph, images()))
    assert split.stats == {"split": 1}
    assert split.last is not None
    assert split.last.up_bytes == len(cloud.seen[0])
    assert split.last.plan == plans.at(FAST)
    assert decode(cloud.seen[0]).keys() == set(split.last.plan.crossing)
    await split.close()


async def test_a_slow_link_is_not(graph: Graph, profile: Profile) -> None:
    cloud = Cloud(graph)
    split = SplitPredictor(graph, profile.plans(), cloud, SLOW)
    found = await split.predict({"image": images()})
    assert close_to(found, whole(graph, images()), 1e-4)
    assert split.stats == {"edge": 1}
    assert cloud.seen == []
    await split.close()


@pytest.mark.parametrize("failure", [Unreachable("gone"), RemoteBroken("no"), BadFrame("what"), None], ids=str)
async def test_no_failure_loses_a_request_or_changes_its_answer(
    graph: Graph, profile: Profile, failure: Exception | None
) -> None:
    cloud = Cloud(graph)
    split = SplitPredictor(graph, profile.plans(max_error=1), cloud, FAST, patience=SURE)
    good = await split.predict({"image": images()})
    await split.close()
    cloud.failure, cloud.silent = failure, failure is None
    patience = Patience(least_s=0.05, most_s=0.05) if failure is None else SURE
    broken = SplitPredictor(graph, profile.plans(max_error=1), cloud, FAST, patience=patience)
    found = await broken.predict({"image": images()})
    assert broken.stats == {"edge_fallback": 1}
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in good.items()}
    await broken.close()


async def test_nonsense_from_the_cloud_is_a_failure(graph: Graph, profile: Profile) -> None:
    for nonsense in (b"", b"EWFT", encode({}), encode({"logits": np.zeros(5)}, label="other 5")):
        cloud = Cloud(graph)

        async def there(payload: bytes, nonsense: bytes = nonsense) -> bytes:
            return nonsense

        split = SplitPredictor(graph, profile.plans(max_error=1), there, FAST, patience=SURE)
        assert close_to(await split.predict({"image": images()}), whole(graph, images()))
        assert split.stats == {"edge_fallback": 1}
        await split.close()
        assert cloud.seen == []


async def test_a_cloud_that_failed_is_left_alone_for_a_while(graph: Graph, profile: Profile) -> None:
    cloud = Cloud(graph)
    cloud.failure = Unreachable("gone")
    patience = Patience(least_s=60, most_s=60, rest_s=3600, longest_rest_s=3600)
    split = SplitPredictor(graph, profile.plans(max_error=1), cloud, FAST, patience=patience)
    for _ in range(5):
        assert close_to(await split.predict({"image": images()}), whole(graph, images()))
    assert split.stats == {"edge_fallback": 5}
    assert len(cloud.seen) == 1
    await split.close()


async def test_it_is_asked_again_after_its_rest(graph: Graph, profile: Profile) -> None:
    cloud = Cloud(graph)
    cloud.failure = Unreachable("gone")
    patience = Patience(least_s=60, most_s=60, rest_s=0, longest_rest_s=0)
    split = SplitPredictor(graph, profile.plans(max_error=1), cloud, FAST, patience=patience)
    await split.predict({"image": images()})
    cloud.failure = None
    await split.predict({"image": images()})
    assert split.stats == {"edge_fallback": 1, "split": 1}
    await split.close()


async def test_silence_makes_the_link_slow_and_a_look_fast_again(graph: Graph, profile: Profile) -> None:
    """A link that died is believed to be slow; once it lives, one input a while finds that out."""
    cloud = Cloud(graph)
    patience = Patience(times=1, least_s=0.03, most_s=0.03, rest_s=0, longest_rest_s=0, look_s=3600)
    plans = profile.plans(max_error=1)
    split = SplitPredictor(graph, plans, cloud, LinkProfile("made", 1e7, 1e7, 0.1), patience=patience)
    cloud.silent = True
    before = split.link
    for _ in range(60):
        await split.predict({"image": images()})
        if plans.at(split.link).place == "edge":
            break
    assert split.link.up_bytes_per_s < before.up_bytes_per_s / 20
    cloud.silent = False
    split._patience = Patience(look_s=0, least_s=60, most_s=60)
    split._rest_until_s = 0
    split.link = SLOW
    for _ in range(200):
        await split.predict({"image": images()})
        if split._looking is not None:
            await split._looking
        if plans.at(split.link).place != "edge":
            break
    assert plans.at(split.link).place == "split"
    await split.close()


async def test_what_is_learnt_of_a_link(graph: Graph, profile: Profile) -> None:
    """Bytes that take another time change the rate, a round trip without many bytes changes itself."""
    split = SplitPredictor(graph, profile.plans(), Cloud(graph), LinkProfile("made", 1e6, 1e6, 10))
    for _ in range(40):
        split._learn(100_000, 0, 1.010)
    assert split.link.up_bytes_per_s == pytest.approx(1e5, rel=0.02)
    assert split.link.rtt_ms == pytest.approx(10, rel=0.02)
    split.link = LinkProfile("made", 1e6, 1e6, 10)
    for _ in range(40):
        split._learn(100, 100, 0.1002)
    assert split.link.rtt_ms == pytest.approx(100, rel=0.02)
    assert split.link.up_bytes_per_s == 1e6
    await split.close()


async def test_the_cloud_alone_is_sent_what_was_packed(graph: Graph, profile: Profile) -> None:
    """Here: the image as whole numbers."""
    cheap = msgspec.structs.replace(profile, upload={"image": Coding(1.0)})
    cuts = tuple(msgspec.structs.replace(cut, front_s=9.0 if cut.edge else 0.0) for cut in cheap.cuts)
    plans = msgspec.structs.replace(cheap, cuts=cuts).plans(max_error=1)
    cloud = Cloud(graph, unpacked=lambda sent: {"image": sent["bytes"].astype(np.float32) / 64})

    def packed(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"bytes": np.clip(np.rint(inputs["image"] * 64), -128, 127).astype(np.int8)}

    split = SplitPredictor(graph, plans, cloud, FAST, packed=packed, patience=SURE)
    found = await split.predict({"image": images() / 4})
    assert split.stats == {"cloud": 1}
    assert len(cloud.seen[0]) < images().nbytes / 3
    assert close_to(found, whole(graph, images() / 4))
    cloud.failure = Unreachable("gone")
    found = await split.predict({"image": images() / 4})
    assert close_to(found, whole(graph, images() / 4), 1e-4)
    await split.close()


async def test_many_at_once_get_their_own_answers(graph: Graph, profile: Profile) -> None:
    split = SplitPredictor(graph, profile.plans(max_error=1), Cloud(graph), FAST, patience=SURE)
    many = [images(seed=seed) for seed in range(12)]
    found = await asyncio.gather(*(split.predict({"image": x}) for x in many))
    for one, x in zip(found, many, strict=True):
        assert close_to(one, whole(graph, x))
    assert split.stats.total() == 12
    await split.close()


async def test_bad_inputs_and_closing(graph: Graph, profile: Profile) -> None:
    split = SplitPredictor(graph, profile.plans(), Cloud(graph), SLOW)
    with pytest.raises(RequestError, match="the input 'image' is missing"):
        await split.predict({})
    await split.close()
    await split.close()
    with pytest.raises(EngineClosed):
        await split.predict({"image": images()})


# The cloud's side


def test_an_answer_says_what_it_took(graph: Graph) -> None:
    halves = Halves(graph, graph.before(["p1"]))
    crossing, _ = halves.front({"image": images()})
    outputs, label, computed_s = read_answer(BackHalf(graph).answer(encode(crossing, "int8", label=halves.label)))
    assert (label, sorted(outputs)) == (halves.label, ["flat", "logits"])
    assert 0 < computed_s < 60
    assert close_to(outputs, whole(graph, images()))


def test_features_of_any_cut_are_answered_and_others_refused(graph: Graph, tmp_path: Path) -> None:
    half = BackHalf(graph)
    for edge, _ in [*graph.chain(), *graph.chain()]:
        halves = Halves(graph, edge)
        crossing, _ = halves.front({"image": images()})
        half.answer(encode(crossing, "exact", label=halves.label))
    other = Graph.open(residual(tmp_path / "other.onnx", seed=7))
    with pytest.raises(BadFrame, match="give both sides the same file"):
        half.answer(encode({}, label=Halves(other, frozenset()).label))
    digest = graph.digest[:16]
    for label in ("", digest, f"{digest}@", f"{digest}@zz", f"{digest}@-1", f"{digest}@2", f"{digest}@{'f' * 900}"):
        with pytest.raises(BadFrame):
            half.answer(encode({"image": images()}, label=label))
    for wrong in (images().astype(np.float64), images()[0]):
        with pytest.raises(BadFrame, match="'image' came as float"):
            half.answer(encode({"image": wrong}, "exact", label=f"{digest}@0"))
    with pytest.raises(BadFrame, match="the features lack 'image'"):
        half.answer(encode({}, label=f"{digest}@0"))
    half.close()
    half.close()
    with pytest.raises(EngineClosed):
        half.answer(encode({}, label=f"{digest}@0"))
