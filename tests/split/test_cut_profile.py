"""What cuts take, and what a plan makes of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgewise.devices.links import LINKS, LinkProfile
from edgewise.errors import UsageError
from edgewise.models.graph import Graph
from edgewise.split.inference import LayerSplitInference
from edgewise.split.profile import Coding, Profile, Request
from edgewise.split.profiling import profiled
from edgewise.wire.feature import HEADER_BYTES
from split.nets import images, residual

INPUTS = [{"image": images(seed=seed)} for seed in range(3)]
UPLOAD = {"image": Coding(900.0, 0.001, 0.002)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual(tmp_path_factory.mktemp("net") / "net.onnx", early=True)


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return profiled(Graph.open(path), INPUTS, upload=UPLOAD, slack=None, rounds=1)


def test_every_cut_of_the_order_is_measured(path: Path, profile: Profile) -> None:
    graph = Graph.open(path)
    chain = dict(graph.chain())
    found = {cut.edge: cut for cut in profile.cuts}
    assert found.keys() >= chain.keys()
    for edge, crossing in chain.items():
        assert found[edge].crossing == crossing
        assert (found[edge].front_s > 0) == bool(edge)
        assert (found[edge].back_s > 0) == (len(edge) < len(graph.units))
    sizes = [found[edge].front_bytes for edge in chain]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert sizes[-1] == pytest.approx(4 * (216 + 576 + 1152 + 2304 + 80 + 5), rel=0.05)


def test_cuts_that_send_more_than_an_earlier_one_are_left_out(path: Path) -> None:
    """The first convolution makes more of the image, pooling less; the skip around the second is a detour."""
    graph = Graph.open(path)
    found = [cut.crossing for cut in profiled(graph, INPUTS[:1], slack=1.0, rounds=1).cuts]
    assert (found[0], found[-1]) == (("image",), ())
    raw = {name: tensor.raw_bytes or 0 for name, tensor in graph.tensors.items()}
    sizes = [sum(raw[name] for name in crossing) for crossing in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(found) < len(list(graph.chain()))


def test_bytes_are_those_of_a_container(path: Path, profile: Profile) -> None:
    front = LayerSplitInference.of_onnx(path, cut="s1", codec="int4")
    sizes = [
        len(front.edge_forward(one["image"])) - HEADER_BYTES - len(front.edge_forward(one["image"]).label)
        for one in INPUTS
    ]
    (tensor,) = (one for one in profile.tensors if one.name == "s1")
    assert tensor.coded["int4"].bytes == pytest.approx(np.mean(sizes), rel=0.01)
    assert tensor.raw_bytes == 8 * 16 * 16 * 4
    assert (tensor.shape, tensor.dtype, tensor.producer) == ((1, 8, 16, 16), "float32", 2)
    assert profile.results["logits"] == 10 + 2 * 4 + len("logits") + 5 * 4


def test_errors_fall_with_bits(profile: Profile) -> None:
    for cut in profile.cuts:
        if cut.crossing:
            assert 0 <= cut.error["fp16"] < cut.error["int8"] < cut.error["int6"] < cut.error["int4"] < 0.1
        else:
            assert set(cut.error.values()) == {0.0}


def test_what_overflows_has_no_fp16(tmp_path: Path) -> None:
    graph = Graph.open(residual(tmp_path / "net.onnx", scale=1e6))
    profile = profiled(graph, INPUTS[:1], slack=None, rounds=1)
    (tensor,) = (one for one in profile.tensors if one.name == "r0")
    assert set(tensor.coded) == {"int8", "int6", "int4"}
    (cut,) = (one for one in profile.cuts if one.crossing == ("r0",))
    assert set(cut.error) == {"int8", "int6", "int4"}


def test_a_profile_is_read_as_it_was_written(tmp_path: Path, profile: Profile) -> None:
    profile.save(tmp_path / "net.json")
    assert Profile.read(tmp_path / "net.json") == profile


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff", b"[1]", b'{"format": 1, "more": 2}', b"[" * 100_000],
    ids=["empty", "no keys", "no text", "a list", "unknown key", "deep"],
)
def test_what_is_no_profile(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.json").write_bytes(content)
    with pytest.raises(UsageError, match="is not a profile"):
        Profile.read(tmp_path / "net.json")


def test_another_format_is_named(tmp_path: Path, profile: Profile) -> None:
    msgspec.structs.replace(profile, format=2).save(tmp_path / "net.json")
    with pytest.raises(UsageError, match="has format 2; this version reads 1"):
        Profile.read(tmp_path / "net.json")


def test_inputs_are_needed(path: Path) -> None:
    with pytest.raises(UsageError, match="no inputs were given"):
        profiled(Graph.open(path), [])


# Plans


def exact(profile: Profile, front_s: float = 0.010, back_s: float = 0.010) -> Profile:
    """The same with times that are round: a whole run takes `front_s`, spread over the units."""
    count = len(profile.units)
    units = tuple(msgspec.structs.replace(unit, seconds=front_s / count) for unit in profile.units)
    cuts = tuple(
        msgspec.structs.replace(
            cut, front_s=front_s * len(cut.edge) / count, back_s=back_s * (1 - len(cut.edge) / count)
        )
        for cut in profile.cuts
    )
    return msgspec.structs.replace(profile, units=units, cuts=cuts)


def test_a_plan_adds_up(profile: Profile) -> None:
    link = LinkProfile("made", 1e6, 2e6, 10)
    plan = exact(profile).plans(edge=1000, margin=0, request=Request(100, 50, 0.003)).at(link)
    down = sum(profile.results.values()) + 50
    assert plan.place == "cloud"
    assert (plan.units, plan.codec, plan.up_bytes, plan.front_bytes) == (frozenset(), None, 1000, 0)
    computing = 0.010 + 0.001 * 1000 + 0.002 + 0.003
    assert plan.seconds == pytest.approx(computing + 1000 / 1e6 + 0.010 + down / 2e6, abs=1e-6)
    assert plan.edge_only_s == pytest.approx(10.0)
    assert plan.cloud_only_s == plan.seconds


def test_a_slow_link_keeps_everything_here_and_a_fast_one_sends(profile: Profile) -> None:
    plans = exact(profile).plans(edge=3)
    assert plans.at(LINKS["2g"]).place == "edge"
    assert plans.at(LINKS["lan"]).place != "edge"
    assert plans.at(LINKS["lan"]).seconds < plans.at(LINKS["2g"]).seconds == pytest.approx(0.030)


def test_each_plan_is_the_best_of_all_cuts(profile: Profile) -> None:
    """Against the arithmetic done here, cut by cut and codec by codec."""
    made = exact(profile)
    coded = {tensor.name: tensor.coded for tensor in made.tensors} | {
        "image": dict.fromkeys(made.codecs, UPLOAD["image"])
    }
    for slow in (1, 10, 100):
        plans = made.plans(edge=slow, max_error=0.02, margin=0, request=Request(100, 50, 0.003))
        for link in LINKS.values():
            taken = {}
            for cut in made.cuts:
                late = [name for name in ("logits", "flat") if made_by(made, name) not in cut.edge]
                down = sum(round(made.results[name]) for name in late) + 50
                for codec in made.codecs:
                    if cut.edge and cut.error[codec] > 0.02:
                        continue
                    codings = [coded[name][codec] for name in cut.crossing]
                    seconds = cut.front_s * slow + cut.back_s + sum(c.encode_s * slow + c.decode_s for c in codings)
                    if len(cut.edge) < len(made.units):
                        up = sum(round(c.bytes) for c in codings) + 100
                        seconds += up / link.up_bytes_per_s + down / link.down_bytes_per_s + link.rtt_ms / 1e3 + 0.003
                    taken[cut.edge, codec] = seconds
            assert plans.at(link).seconds == pytest.approx(min(taken.values()))


def made_by(profile: Profile, name: str) -> int | None:
    return next(tensor.producer for tensor in profile.tensors if tensor.name == name)


def test_an_error_is_kept_to(profile: Profile) -> None:
    """With none allowed, nothing but the ends is left; with much, the fewest bits are taken."""
    strict = exact(profile).plans(max_error=0)
    assert {way.place for way in strict.table.ways} == {"edge", "cloud"}
    loose = exact(profile).plans(max_error=1)
    splits = [way for way in loose.table.ways if way.place == "split"]
    assert {loose.codecs[way] for way in splits} >= {"int4"}
    smallest = {way.edge: min(other.up_bytes for other in splits if other.edge == way.edge) for way in splits}
    assert len(smallest) == len(profile.units) - 1


def test_without_an_upload_the_input_is_coded_too(profile: Profile) -> None:
    bare = msgspec.structs.replace(exact(profile), upload={})
    plan = bare.plans(edge=1000, max_error=1, margin=0).at(LINKS["lan"])
    assert plan.place == "cloud"
    assert plan.codec in bare.codecs
    (image,) = (tensor for tensor in bare.tensors if tensor.name == "image")
    assert plan.up_bytes == round(image.coded[plan.codec].bytes) + Request().up_bytes
    assert plan.cloud_only_s == plan.seconds  # under whichever codec is soonest
    assert {way.place for way in bare.plans(max_error=0).table.ways} == {"edge"}


def test_the_edge_s_memory_is_kept_to(profile: Profile) -> None:
    plan = exact(profile).plans(edge_bytes=1500).at(LINKS["2g"])
    assert plan.place == "cloud" or plan.front_bytes <= 1500
    assert plan.edge_only_s is None
    bare = msgspec.structs.replace(profile, upload={})
    with pytest.raises(UsageError, match="no cut of net has an error of at most 0 and at most 10 bytes of weights"):
        bare.plans(max_error=0, edge_bytes=10)


def test_a_file_is_split_by_its_profile(tmp_path: Path, path: Path, profile: Profile) -> None:
    made = exact(profile, front_s=0.0001, back_s=10.0)
    made.save(tmp_path / "net.json")
    alone = LayerSplitInference.of_onnx(path, link="lan", profile=tmp_path / "net.json")
    whole = LayerSplitInference.of_onnx(path, cut=0, codec="exact").full_inference(INPUTS[0]["image"])
    found = alone.full_inference(INPUTS[0]["image"])
    assert np.abs(found["logits"] - whole["logits"]).max() < 0.1 * np.abs(whole["logits"]).max()
    other = residual(tmp_path / "other.onnx", seed=5)
    with pytest.raises(UsageError, match="make one of this file"):
        LayerSplitInference.of_onnx(other, link="lan", profile=tmp_path / "net.json")
