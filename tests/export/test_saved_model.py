"""TensorFlow SavedModels: as sources, and as .tflite files, in an environment that has TensorFlow."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steps import Worker

from edgewise.errors import EdgewiseError, SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import Job, Source, Tensor, read_array

MAKE = """
import sys, numpy as np, tensorflow as tf
tf.random.set_seed(1)
class Net(tf.Module):
    def __init__(self):
        self.filters = tf.Variable(tf.random.normal((3, 3, 3, 16)) / 5)
        self.deep = tf.Variable(tf.random.normal((3, 3, 16, 16)) / 12)
        self.dense = tf.Variable(tf.random.normal((16, 10)) / 4)
    @tf.function(input_signature=[tf.TensorSpec((None, None, 12, 3), tf.float32, name="image")])
    def call(self, image):
        x = tf.nn.relu6(tf.nn.conv2d(image, self.filters, 2, "SAME"))
        x = tf.nn.relu(tf.nn.conv2d(x, self.deep, 1, "SAME"))
        logits = tf.reduce_mean(x, (1, 2)) @ self.dense
        return {"scores": tf.nn.softmax(logits), "logits": logits}
    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4), tf.float32, name="x")])
    def eigen(self, x):
        return {"y": tf.linalg.eigvalsh(x + tf.transpose(x, (0, 2, 1)))}
    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
    def total(self, x):
        return {"y": tf.reduce_sum(x)}
net = Net()
place = sys.argv[1]
tf.saved_model.save(net, place + "/net", signatures={"serving_default": net.call})
tf.saved_model.save(net, place + "/eigen", signatures={"serving_default": net.eigen})
tf.saved_model.save(net, place + "/total", signatures={"serving_default": net.total})
tf.saved_model.save(net, place + "/unsigned")
"""
OWN = """
def look(job):
    import numpy as np, tensorflow as tf
    net = tf.lite.Interpreter(job.artifact, num_threads=1)
    found = net.get_signature_runner("serving_default")(image=np.load(job.rows + "/image.npy")[:1])
    return {
        "outputs": {name: value.tolist() for name, value in found.items()},
        "inputs": [[one["dtype"].__name__, one["shape_signature"].tolist()] for one in net.get_input_details()],
        "stored": [one["dtype"].__name__ for one in net.get_tensor_details() if len(one["shape"]) == 4],
    }
"""
ROWS = 24
IMAGE = Tensor("image", (1, 10, 12, 3), "float32")


def tensorflow_python() -> Path:
    named = os.environ.get("EDGEWISE_TEST_TENSORFLOW_PYTHON")
    home = os.environ.get("EDGEWISE_HOME")
    found = Path(named) if named else Path(home or "/nowhere") / "environments" / "tensorflow" / "bin" / "python"
    if not found.is_file():
        pytest.skip("no environment with TensorFlow (EDGEWISE_TEST_TENSORFLOW_PYTHON, or EDGEWISE_HOME's own)")
    return found


def settings() -> dict[str, str]:
    code = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(code), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    subprocess.run([tensorflow_python(), "-c", MAKE, place], check=True, capture_output=True, env=settings())
    return place


@pytest.fixture(scope="module")
def worker(models: Path) -> Any:
    made = Worker(tensorflow_python(), "sources.saved_model", OWN)
    yield made
    made.close()


def source(models: Path, name: str = "net") -> Source:
    return Source("savedmodel", str(models / name), name, "classify")


@pytest.fixture(scope="module")
def job(models: Path, worker: Worker) -> Job:
    """The network's rows and reference."""
    data = models / "rows.npz"
    draw = np.random.default_rng(5)
    np.savez(data, image=draw.standard_normal((ROWS, 10, 12, 3)).astype(np.float32), labels=np.arange(ROWS) % 10)
    job = Job("begin", source(models), str(models / "begin"), data=str(data), threads=1)
    found = worker("begin", job)
    assert found["rows"] == ROWS
    assert found["labelled"]
    assert found["parameters"] == 3 * 3 * 3 * 16 + 3 * 3 * 16 * 16 + 160
    outputs = tuple(Tensor(one["name"], tuple(one["shape"]), one["dtype"]) for one in found["outputs"])
    assert {one.name: one.shape for one in outputs} == {"logits": (1, 10), "scores": (1, 10)}
    assert found["inputs"] == [{"name": "image", "shape": [1, 10, 12, 3], "dtype": "float32"}]
    begun = Path(job.work)
    return replace(
        job,
        source=replace(job.source, shapes={"image": IMAGE.shape}),
        inputs=(IMAGE,),
        outputs=outputs,
        rows=str(begun / "rows"),
        calibration=str(begun / "calibration"),
        reference=str(begun / "reference"),
    )


def test_the_reference_holds_every_output_of_every_row(job: Job) -> None:
    by_name = {one.name: np.array(read_array(job.reference, str(n))) for n, one in enumerate(job.outputs)}
    exponents = np.exp(by_name["logits"])
    np.testing.assert_allclose(exponents / exponents.sum(1, keepdims=True), by_name["scores"], rtol=1e-5)
    assert len(np.unique(by_name["logits"][:, 0])) == ROWS


def test_tensors_between_are_found_and_end_in_the_outputs(job: Job, worker: Worker) -> None:
    found = worker("layers", replace(job, work=f"{job.work}/between", only=(2, 5)))
    assert len(found["names"]) == len(set(found["names"])) >= 6
    shapes = [read_array(f"{job.work}/between/layers", str(n)).shape for n in range(len(found["names"]))]
    assert (2, 5, 6, 16) in shapes
    logits = read_array(job.reference, str([one.name for one in job.outputs].index("logits")))[[2, 5]]
    between = [read_array(f"{job.work}/between/layers", str(n)) for n in range(len(found["names"]))]
    assert any(one.shape == logits.shape and np.allclose(one, logits, atol=1e-5) for one in between)


def look(artifact: str, job: Job, worker: Worker) -> dict[str, Any]:
    """What the file takes, holds, and gives for the first row."""
    found: dict[str, Any] = worker("look", replace(job, artifact=artifact))
    return found


@pytest.mark.parametrize(
    ("precision", "kind", "apart"),
    [("fp32", "float32", 1e-5), ("fp16", "float16", 2e-3), ("int8", "int8", 0.1), ("int8-dynamic", "int8", 0.1)],
)
def test_each_precision_is_in_the_file_and_gives_nearly_the_same(
    precision: Any, kind: str, apart: float, job: Job, worker: Worker
) -> None:
    made = worker("convert", replace(job, precision=precision, artifact=f"{job.work}/{precision}"))
    assert [(one["name"], one["ok"]) for one in made["checks"]] == [("conversion", True)]
    found = look(made["artifact"], job, worker)
    assert found["inputs"] == [["float32", [1, 10, 12, 3]]]
    assert kind in found["stored"]
    for n, one in enumerate(job.outputs):
        expected = read_array(job.reference, str(n))[:1]
        np.testing.assert_allclose(found["outputs"][one.name], expected, atol=apart * np.abs(expected).max())


def test_the_first_axis_stays_free_on_request(job: Job, worker: Worker) -> None:
    made = worker("convert", replace(job, artifact=f"{job.work}/free", options={"dynamic_batch": True}))
    assert look(made["artifact"], job, worker)["inputs"] == [["float32", [-1, 10, 12, 3]]]


def test_a_fault_in_the_way_there_is_seen_by_the_check(job: Job, worker: Worker, tmp_path: Path) -> None:
    for n in range(len(job.outputs)):
        np.save(tmp_path / f"{n}.npy", np.array(read_array(job.reference, str(n)))[::-1])
    made = worker("convert", replace(job, reference=str(tmp_path), artifact=f"{tmp_path}/other"))
    assert [one["ok"] for one in made["checks"]] == [False]


# What is refused


def test_an_operator_that_litert_has_not_is_named(models: Path, worker: Worker) -> None:
    job = Job("begin", source(models, "eigen"), str(models / "eigen-begin"), threads=1)
    found = worker("begin", job)
    outputs = tuple(Tensor(one["name"], tuple(one["shape"]), one["dtype"]) for one in found["outputs"])
    given = (Tensor("x", (1, 4, 4), "float32"),)
    with pytest.raises(UnsupportedModel, match="SelfAdjointEig"):
        worker("convert", replace(job, inputs=given, outputs=outputs, artifact=str(models / "eigen-out")))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("total", UnsupportedModel, "gives 'y'"),
        ("unsigned", UnsupportedModel, "the signatures"),
        ("none", SourceError, "pb"),
    ],
)
def test_what_is_no_network_over_rows_is_refused(
    name: str, kind: type[EdgewiseError], message: str, models: Path, worker: Worker
) -> None:
    with pytest.raises(kind, match=message):
        worker("begin", Job("begin", source(models, name), str(models / f"{name}-begin"), threads=1))


def test_a_damaged_file_is_refused(models: Path, worker: Worker) -> None:
    broken = models / "broken"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes((models / "net" / "saved_model.pb").read_bytes()[:500])
    with pytest.raises(SourceError, match="broken cannot be loaded"):
        worker("begin", Job("begin", source(models, "broken"), str(models / "broken-begin"), threads=1))


def test_a_free_axis_that_nobody_said_is_asked_for(models: Path, worker: Worker) -> None:
    with pytest.raises(UsageError) as caught:
        worker("begin", Job("begin", source(models), str(models / "unsaid"), threads=1))
    assert "--shape image=1,?,12,3" in str(caught.value.hint)


def test_int4_is_not_to_be_had(job: Job, worker: Worker) -> None:
    with pytest.raises(UsageError, match="int4"):
        worker("convert", replace(job, precision="int4", artifact=f"{job.work}/int4"))
