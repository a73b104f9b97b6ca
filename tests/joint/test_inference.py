import asyncio
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx2
import msgspec
import numpy as np
import pytest
import torch
from tiers import CLOUD_TEXT, EDGE_TEXT, SURE, UNSURE, tier

import replays
from edgewise import JointInference
from edgewise.engines.fake import FakePredictor
from edgewise.errors import ConfigError, RemoteTimeout, UsageError
from edgewise.joint import inference
from edgewise.joint.fit.calibrate import calibrate
from edgewise.joint.fit.target import Budget
from edgewise.joint.judge import SignalsJudge
from edgewise.joint.policy import Policy, Whole
from edgewise.joint.replay import Replay

SURE_ROW, UNSURE_ROW = [9.0, 0.0, 0.0], [0.4, 0.3, 0.2]


class Cloud:
    """A client as users write them."""

    def __init__(self, answer="from the cloud", available=True):
        self.answer, self.available = answer, available
        self.asked = []

    def is_available(self):
        return self.available() if callable(self.available) else self.available

    def infer(self, x):
        self.asked.append(x)
        return self.answer() if callable(self.answer) else self.answer


def model(*rows):
    return lambda x: SimpleNamespace(logits=np.array(rows))


def fails(error):
    def call():
        raise error

    return call


@pytest.fixture
def never():
    """A call that hangs for the length of a test."""
    gate = threading.Event()
    yield gate.wait
    gate.set()


def test_the_guide_s_own_rule():
    cloud = Cloud()
    assert JointInference(model(SURE_ROW), cloud).confidence_threshold == 0.8
    assert JointInference(model(SURE_ROW), cloud).infer("x")[1] == "edge"
    assert cloud.asked == []
    assert JointInference(model(UNSURE_ROW), cloud).infer("x") == ("from the cloud", "cloud")
    assert cloud.asked == ["x"]
    assert JointInference(model(UNSURE_ROW), Cloud(available=False)).infer("x")[1] == "edge_fallback"
    assert JointInference(model(UNSURE_ROW)).infer("x")[1] == "edge_fallback"


def test_the_threshold_is_strict_and_can_be_changed():
    joint = JointInference(model([0.0, 0.0]), Cloud())
    joint.confidence_threshold = 0.5
    assert joint.infer(1)[1] == "cloud"
    joint.confidence_threshold = 0.49
    assert joint.infer(1)[1] == "edge"
    joint.confidence_threshold = 1.5
    with pytest.raises(ConfigError, match=r"1\.5"):
        joint.infer(1)


class Net(torch.nn.Module):
    def forward(self, x):
        return SimpleNamespace(logits=x * 10)


@pytest.mark.parametrize(
    "answer",
    [
        np.array([SURE_ROW]),
        np.array(SURE_ROW, np.float16),
        [SURE_ROW],
        {"logits": np.array([SURE_ROW]), "boxes": "any"},
        SimpleNamespace(logits=torch.tensor([SURE_ROW], dtype=torch.bfloat16)),
        torch.tensor([SURE_ROW], requires_grad=True),
    ],
    ids=["array", "one row", "list", "mapping", "torch", "tensor"],
)
def test_anything_with_logits_and_the_very_object_comes_back(answer):
    output, route = JointInference(lambda x: answer, Cloud()).infer("x")
    assert route == "edge"
    assert output is answer


def test_torch_modules_in_the_caller_s_thread_and_gradient_mode():
    seen = []
    net = Net()
    net.register_forward_hook(lambda *_: seen.append((threading.get_ident(), torch.is_grad_enabled())))
    with torch.no_grad():
        output, route = JointInference(net, Cloud()).infer(torch.eye(3))
    assert route == "edge"
    assert output.logits.shape == (3, 3)
    assert seen == [(threading.get_ident(), False)]


def test_a_batch_goes_by_its_least_confident_row():
    assert JointInference(model(SURE_ROW, UNSURE_ROW), Cloud()).infer("x")[1] == "cloud"


@pytest.mark.parametrize("answer", [None, "text", 3.0, {"probs": [1]}, object(), (np.zeros(2), np.zeros(3))])
def test_an_output_without_logits_is_the_caller_s_mistake(answer):
    cloud = Cloud()
    with pytest.raises(UsageError, match="without logits"):
        JointInference(lambda x: answer, cloud).infer("x")
    assert cloud.asked == []


@pytest.mark.parametrize("logits", [[[float("nan"), 1.0]], [[5.0]], np.zeros((0, 3))])
def test_logits_that_say_nothing_go_to_the_cloud(logits):
    assert JointInference(lambda x: logits, Cloud()).infer("x")[1] == "cloud"


@pytest.mark.parametrize(
    "error", [ConnectionError("down"), ValueError("bad json"), TimeoutError(), SystemExit(3), StopIteration()]
)
@pytest.mark.parametrize("where", ["available", "answer"])
def test_a_client_that_raises_costs_nothing_but_its_answer(where, error):
    cloud = Cloud(**{where: fails(error)})
    output, route = JointInference(model(UNSURE_ROW), cloud).infer("x")
    assert route == "edge_fallback"
    assert output.logits.tolist() == [UNSURE_ROW]


@pytest.mark.parametrize("where", ["available", "answer"])
def test_a_client_that_hangs_is_left_alone(where, never, monkeypatch):
    monkeypatch.setattr(inference, "AVAILABLE_WITHIN_S", 0.05)
    cloud = Cloud(**{where: never})
    joint = JointInference(model(UNSURE_ROW), cloud, cloud_timeout_s=0.1)
    assert joint.infer("x")[1] == "edge_fallback"
    assert [joint.infer("x")[1] for _ in range(50)] == ["edge_fallback"] * 50
    assert joint.stats.reasons == {"cloud_timeout": 1, "breaker_open": 50}


def test_a_client_that_comes_back_is_used_at_once():
    cloud = Cloud(available=False)
    joint = JointInference(model(UNSURE_ROW), cloud)
    assert [joint.infer("x")[1] for _ in range(10)] == ["edge_fallback"] * 10
    cloud.available, cloud.answer = True, fails(ConnectionError("it lied"))
    assert joint.infer("x")[1] == "edge_fallback"
    cloud.answer = "back"
    assert joint.infer("x") == ("back", "cloud")


def test_where_the_edge_fails_the_cloud_answers():
    def broken(x):
        raise MemoryError("no room")

    assert JointInference(broken, Cloud()).infer("x") == ("from the cloud", "cloud")
    with pytest.raises(MemoryError, match="no room"):
        JointInference(broken, Cloud(available=False)).infer("x")


def test_generators_take_prompts_and_give_texts():
    near, far = tier(EDGE_TEXT, UNSURE), tier(CLOUD_TEXT)
    joint = JointInference(near, far)
    assert joint.infer("hello") == (CLOUD_TEXT, "cloud")
    assert near.requests[0].messages[0].content == "hello"
    assert JointInference(tier(EDGE_TEXT, SURE), far).infer("hello") == (EDGE_TEXT, "edge")
    assert JointInference(near, tier(CLOUD_TEXT, error=RemoteTimeout("x"))).infer("hello") == (
        EDGE_TEXT,
        "edge_fallback",
    )
    assert JointInference(near, Cloud("a text")).infer("hello") == ("a text", "cloud")
    with pytest.raises(UsageError, match="type str, not int"):
        joint.infer(3)


def test_predictors_take_tensors_and_give_tensors():
    near = FakePredictor({"logits": np.array([UNSURE_ROW], np.float32)})
    far = FakePredictor({"logits": np.array([SURE_ROW], np.float32)})
    output, route = JointInference(near, far).infer({"input": np.zeros(3)})
    assert route == "cloud"
    assert output is far.answer


# Batches


class Doubler:
    """A cloud that gives the rows that it got, doubled."""

    def __init__(self):
        self.asked = []

    def is_available(self):
        return True

    def infer(self, x):
        self.asked.append(x)
        return SimpleNamespace(logits=2 * (x["x"] if isinstance(x, dict) else np.asarray(x)))


BATCH = [SURE_ROW, UNSURE_ROW, SURE_ROW, UNSURE_ROW]
MIXED = [SURE_ROW, [0.8, 0.6, 0.4], SURE_ROW, [0.8, 0.6, 0.4]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, tuple, lambda rows: {"x": np.array(rows)}])
def test_of_a_batch_only_the_unsure_rows_are_sent(kind):
    cloud = Doubler()
    batch = kind(BATCH)
    joint = JointInference(lambda x: x["x"] if isinstance(x, dict) else np.asarray(x), cloud)
    logits, routes = joint.infer_batch(batch)
    assert routes == ("edge", "cloud", "edge", "cloud")
    assert logits.tolist() == pytest.approx(np.array(MIXED))
    (sent,) = cloud.asked
    assert type(sent) is type(batch)
    np.testing.assert_allclose(sent["x"] if isinstance(sent, dict) else sent, [UNSURE_ROW] * 2, rtol=1e-6)


def test_a_batch_of_torch_modules():
    """Rows by row or all at once: the same answers from the same tiers."""
    torch.manual_seed(0)
    near, far = (torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)) for _ in range(2))
    far = far.requires_grad_(False)
    x = torch.randn(40, 8) * 4
    with torch.no_grad():
        shares = torch.softmax(near(x), 1).max(1).values
    threshold = float(shares.sort().values[19:21].mean())
    cloud = SimpleNamespace(is_available=lambda: True, infer=far)
    joint = JointInference(near, cloud, confidence_threshold=threshold)
    logits, routes = joint.infer_batch(x)
    assert routes == tuple("edge" if share > threshold else "cloud" for share in shares)
    assert 10 < routes.count("edge") < 30
    for row, got, route in zip(x, logits, routes, strict=True):
        output, went = joint.infer(row[None])
        assert went == route
        np.testing.assert_allclose(got, output.detach().numpy()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("answer", [[SURE_ROW], [[1.0]] * 2, "no logits", None])
def test_a_cloud_that_answers_other_rows_counts_as_none(answer):
    logits, routes = JointInference(np.array, Cloud(answer)).infer_batch(BATCH)
    assert routes == ("edge", "edge_fallback", "edge", "edge_fallback")
    assert logits.tolist() == BATCH


def test_a_batch_without_a_cloud_and_one_that_is_all_unsure():
    assert JointInference(np.array).infer_batch(BATCH)[1] == ("edge", "edge_fallback", "edge", "edge_fallback")
    cloud = Doubler()
    logits, routes = JointInference(np.array, cloud).infer_batch([UNSURE_ROW] * 3)
    assert (routes, len(cloud.asked[0])) == (("cloud",) * 3, 3)
    assert logits[0].tolist() == [0.8, 0.6, 0.4]


def test_where_the_edge_fails_the_cloud_answers_the_batch():
    cloud = Doubler()
    logits, routes = JointInference(lambda x: 1 / 0, cloud).infer_batch(np.array(BATCH))
    assert (logits.shape, routes) == ((4, 3), ("cloud",) * 4)


# Fitted policies, more tiers, clients over HTTP


def test_a_fitted_policy_decides_row_by_row(tmp_path):
    known = [{key: value for key, value in row.items() if key != "prompt"} for row in replays.classified(500)]
    rows = Replay.open(replays.saved(known, tmp_path / "r.jsonl"))
    policy = calibrate(rows, Budget(0.3), labels=300).policy
    judge, threshold = policy.whole.judge, policy.whole.threshold
    wanted = ["edge" if judge.judge(row.evidence()).worth > threshold else "cloud" for row in rows]
    logits = np.array([row.edge.logits for row in rows])
    joint = JointInference(lambda x: x, SimpleNamespace(is_available=lambda: True, infer=lambda x: x), policy=policy)
    assert joint.confidence_threshold == threshold
    assert list(joint.infer_batch(logits)[1]) == wanted
    assert [joint.infer(row[None])[1] for row in logits[:50]] == wanted[:50]
    assert wanted.count("cloud") == pytest.approx(150, abs=40)
    joint.confidence_threshold = 1.0
    assert set(joint.infer_batch(logits)[1]) == {"cloud"}


def test_three_tiers_by_nesting():
    phone, box, cloud = [9.0, 0.0, 0.0], [1.2, 0.0, 0.0], [0.4, 0.3, 0.2]
    upper = JointInference(lambda x: ("box", x)[1], Cloud("cloud"), confidence_threshold=0.5)
    joint = JointInference(lambda x: x, upper)
    assert [joint.infer(np.array([row]))[1] for row in (phone, box, cloud)] == ["edge", "cloud", "cloud"]
    assert joint.infer(np.array([cloud]))[0] == "cloud"
    assert (joint.stats.routes, upper.stats.routes) == ({"edge": 1, "cloud": 3}, {"edge": 1, "cloud": 2})


class HttpCloud:
    """A client as users write them over HTTP."""

    def __init__(self, url):
        self.url = url

    def is_available(self):
        return httpx2.get(f"{self.url}/ready", timeout=1).status_code == 200

    def infer(self, x):
        return httpx2.post(f"{self.url}/predict", json=np.asarray(x).tolist(), timeout=5).json()


class Scorer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.sizes.append(len(rows))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"logits": [[one * 2 for one in row] for row in rows]}).encode())

    def log_message(self, *what):
        pass


def test_a_cloud_over_http_and_none_when_it_is_gone():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    server.sizes = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    joint = JointInference(torch.nn.Identity(), HttpCloud(f"http://127.0.0.1:{server.server_port}"))
    try:
        assert joint.infer(torch.tensor([UNSURE_ROW]))[1] == "cloud"
        logits, routes = joint.infer_batch(torch.tensor(BATCH))
        assert (routes, server.sizes) == (("edge", "cloud", "edge", "cloud"), [1, 2])
        np.testing.assert_allclose(logits, MIXED, rtol=1e-6)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert joint.infer(torch.tensor([UNSURE_ROW]))[1] == "edge_fallback"


@pytest.mark.parametrize("runs", [0, 101, -1])
def test_runs_that_cannot_be(runs):
    with pytest.raises(UsageError, match="edge_runs"):
        JointInference(model(SURE_ROW), edge_runs=runs)


def test_runs_with_dropout_are_a_signal():
    """One fitted on agreement sends away what the edge wavers on, and nothing else."""
    turns = iter(range(100))
    wavering = lambda x: np.array([SURE_ROW, np.roll(SURE_ROW, next(turns))])
    agreed = msgspec.structs.replace(
        Policy.softmax(0.6), whole=Whole(0.6, SignalsJudge({"agreement": 1.0}, 0.0, "identity"))
    )
    assert JointInference(wavering, policy=agreed, edge_runs=9).infer_batch(None)[1] == ("edge", "edge_fallback")
    with pytest.raises(UsageError, match="edge_runs"):
        JointInference(tier(EDGE_TEXT), edge_runs=2)


@pytest.mark.parametrize("bad", [3, "http://cloud", object()])
def test_what_is_no_model_is_refused_at_once(bad):
    with pytest.raises(UsageError, match=type(bad).__name__):
        JointInference(bad)
    with pytest.raises(UsageError, match=type(bad).__name__):
        JointInference(model(SURE_ROW), bad)
    with pytest.raises(UsageError, match="cloud_timeout_s"):
        JointInference(model(SURE_ROW), cloud_timeout_s=0)


async def test_inside_a_running_event_loop():
    assert JointInference(model(UNSURE_ROW), Cloud()).infer("x")[1] == "cloud"
    assert (await asyncio.to_thread(JointInference(model(SURE_ROW)).infer, "x"))[1] == "edge"


def test_from_many_threads():
    joint = JointInference(lambda x: [SURE_ROW] if x % 2 else [UNSURE_ROW], Cloud())
    routes = {}
    threads = [threading.Thread(target=lambda n=n: routes.update({n: joint.infer(n)[1]})) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert routes == {n: "edge" if n % 2 else "cloud" for n in range(40)}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_hanging_client_does_not_hold_up_the_interpreter_s_exit():
    code = """
from edgewise import JointInference
class Cloud:
    def is_available(self): return True
    def infer(self, x): time.sleep(1000)
print(JointInference(lambda x: [[0.0, 0.0]], Cloud(), cloud_timeout_s=0.1).infer(1)[1])
"""
    assert python(code).strip() == "edge_fallback"


def test_import_edgewise_loads_nothing_heavy():
    heavy = ["numpy", "onnxruntime", "onnx", "starlette", "uvicorn", "httpx2", "tokenizers", "torch", "msgspec"]
    code = f"import sys, edgewise; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_joint_inference_loads_no_runtime_no_server_and_no_torch():
    heavy = ["onnxruntime", "onnx", "starlette", "uvicorn", "httpx2", "tokenizers", "torch"]
    code = f"""
import sys
from edgewise import JointInference
JointInference(lambda x: [[9.0, 0.0]]).infer(0)
print([name for name in {heavy} if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_unknown_names_of_the_package_are_attribute_errors():
    import edgewise

    assert "JointInference" in dir(edgewise)
    with pytest.raises(AttributeError, match="NoSuchDoor"):
        _ = edgewise.NoSuchDoor
