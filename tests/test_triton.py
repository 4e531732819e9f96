"""A real server: `examples/serving/triton.py`, asked over HTTP and gRPC by many clients at once.

It needs a Python with `nvidia-pytriton` and TensorFlow, which is not this one: see the example.
`SDDNS_TRITON_PYTHON=triton/bin/python python -m pytest tests/test_triton.py`
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from toy_sets import tiles

import sddns_tf

ROOT = pathlib.Path(sddns_tf.__file__).parents[1]
PYTHON = os.environ.get("SDDNS_TRITON_PYTHON")
CLIENTS, REQUESTS = 8, 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="SDDNS_TRITON_PYTHON names no Python with nvidia-pytriton and TensorFlow"
    ),
]


@pytest.fixture(scope="module")
def detector():
    return sddns_tf.pretrained("cifar10-small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of several kinds and sizes, one of them damaged, one that ends with zeros."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate([*tiles("coffee", 4, 40), *tiles("grass", 4, 32)]):
        kind = ("png", "jpg")[index % 2]
        Image.fromarray(image).save(folder / f"{index}.{kind}", quality=95)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(folder / "black.bmp")
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def server(detector, tmp_path_factory):
    """Addresses of HTTP, gRPC and metrics of a server that is ready."""
    folder = tmp_path_factory.mktemp("server")
    sddns_tf.export.saved_model(detector, folder / "parts", images=tiles("coffee", 8, 32))
    ports = {f"--{name}_port": free_port() for name in ("http", "grpc", "metrics")}
    command = [PYTHON, str(ROOT / "examples" / "serving" / "triton.py"), "--model=parts"]
    command += [f"--exports={folder / 'parts'}", *(f"{key}={port}" for key, port in ports.items())]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            http = f"localhost:{ports['--http_port']}"
            wait_until_ready(http, process, folder / "log")
            yield http, *(f"localhost:{ports[f'--{name}_port']}" for name in ("grpc", "metrics"))
        finally:
            process.terminate()
            process.wait(60)


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def wait_until_ready(http, process, log):
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://{http}/v2/models/parts/ready", timeout=5):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def get(http, path):
    with urllib.request.urlopen(f"http://{http}{path}", timeout=30) as response:
        return response.read().decode()


def counted(metrics, name):
    """Return a counter of the model from the server's metrics."""
    return float(re.search(rf'^{name}{{.*model="parts".*}} (\S+)$', metrics, re.MULTILINE)[1])


def test_the_server_describes_the_model_in_the_terms_of_kserve(server):
    about = json.loads(get(server[0], "/v2/models/parts"))
    assert about["inputs"] == [{"name": "image_bytes", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = {each["name"]: each["datatype"] for each in about["outputs"]}
    assert outputs == {"ood_score": "FP32", "p_value": "FP32", "is_ood": "BOOL", "status": "BYTES"}


def test_many_clients_get_the_detectors_answers(server, detector, photos):
    script = ROOT / "tests" / "triton_load.py"
    command = [PYTHON, str(script), *server[:2], str(photos), str(CLIENTS), str(REQUESTS)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    images = {
        path.name: tf.io.decode_image(path.read_bytes(), 3, expand_animations=False).numpy()
        for path in photos.iterdir()
        if path.name != "damaged.png"
    }
    expected = {
        name: {
            key: value[0] for key, value in detector.predict(image[np.newaxis], verbose=0).items()
        }
        for name, image in images.items()
    }
    for protocol, one in found.items():
        assert len(one["rows"]) == CLIENTS * REQUESTS
        for row in one["rows"]:
            if row["file"] == "damaged.png":
                assert row["status"]
                assert row["is_ood"] and np.isnan(row["ood_score"])
                continue
            right = expected[row["file"]]
            assert row["status"] == ""
            assert row["ood_score"] == pytest.approx(right["ood_score"], abs=1e-4)
            assert row["p_value"] == pytest.approx(right["p_value"], abs=1e-6)
            assert row["is_ood"] == right["is_ood"]
        times = np.array([row["milliseconds"] for row in one["rows"]])
        rate = len(times) / one["seconds"]
        low, high = np.percentile(times, [50, 99])
        print(f"{protocol}: {rate:.0f} images/s, median {low:.1f} ms, 99 % {high:.1f} ms")

    measured = get(server[2], "/metrics")
    answered, executions = (counted(measured, f"nv_inference_{k}") for k in ("count", "exec_count"))
    print(f"{answered / executions:.1f} images in a batch")
    assert answered >= 2 * CLIENTS * REQUESTS
    assert executions < answered / 2  # requests were batched
