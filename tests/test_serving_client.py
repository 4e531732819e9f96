"""The client, the configurations of the server, and the formats on the wire, over loopback."""

import base64
import http.server
import importlib.util
import json
import pathlib
import shutil
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import serving_double
import tensorflow as tf
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SERVING = EXAMPLES / "serving"
OUTPUTS = ("ood_score", "p_value", "is_ood")


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("serving_client", EXAMPLES / "serving_client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(served, tmp_path_factory):
    """Versions 1 and 2, which are equal, under the labels of the example's configuration."""
    folder = tmp_path_factory.mktemp("models") / "parts"
    for version in "12":
        shutil.copytree(served, folder / version)
    return serving_double.Model(folder, {"stable": 1, "canary": 2})


@pytest.fixture
def rest(model):
    with serving_double.rest_server(model) as url:
        yield url


@pytest.fixture
def grpc(model):
    pytest.importorskip("tensorflow_serving.apis", reason="no tensorflow-serving-api")
    with serving_double.grpc_server(model) as address:
        yield address


@pytest.fixture(scope="module")
def photos_folder(grass_and_person, tmp_path_factory):
    """Ten images, of which one is damaged, and a file that a folder of images may hold."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(grass_and_person(5, 21, 40, 50)):
        (folder / f"{index}.png").write_bytes(tf.io.encode_png(image).numpy())
    damaged = folder / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (folder / "notes.txt").write_text("not sent")
    return folder


def expected(detector, folder, left_out="3.png"):
    files = sorted(path for path in folder.glob("*.png") if path.name != left_out)
    images = np.stack([tf.io.decode_png(path.read_bytes(), 3) for path in files])
    return files, {name: value.numpy() for name, value in detector(images).items()}


def post(url, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as r:
            return r.status, json.load(r)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("interface", ["rest", "grpc"])
def test_the_client_answers_for_a_folder(
    client, model, interface, request, grass_detector, photos_folder, capsys
):
    server = request.getfixturevalue(interface)
    model.requests.clear()
    model.busy = 2  # Turned away twice, the client comes again.
    arguments = [f"--server={server}", "--model=parts", "--batch_size=4", "--concurrency=3"]
    code = client.main([*arguments, "--drift=49", str(photos_folder)])
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert code == 1  # One of them is no image.
    assert [pathlib.Path(line["file"]).name for line in lines] == [f"{i}.png" for i in range(10)]
    damaged = lines.pop(3)
    assert damaged["ood_score"] is None and damaged["is_ood"] is True
    assert "cannot be decoded" in damaged["status"]
    files, answers = expected(grass_detector, photos_folder)
    assert [line["file"] for line in lines] == [str(path) for path in files]
    assert not any(line["status"] for line in lines)
    found = [line["ood_score"] for line in lines]
    np.testing.assert_allclose(found, answers["ood_score"], rtol=0, atol=1e-4)
    for line in lines:
        assert line["is_ood"] == (round(50 * line["p_value"]) <= 5)
    assert sorted(model.requests) == [("serving_bytes", 2, n) for n in (2, 4, 4)]
    assert "P-values of 9 images" in captured.err


@pytest.mark.parametrize("interface", ["rest", "grpc"])
def test_the_client_chooses_version_label_and_rate(
    client, model, interface, request, photos_folder, capsys
):
    server = request.getfixturevalue(interface)
    one = str(photos_folder / "0.png")
    of = [f"--server={server}", "--model=parts", "--retries=0"]
    model.requests.clear()
    assert client.main([*of, "--version=1", one]) == 0
    assert client.main([*of, "--label=canary", one]) == 0
    assert client.main([*of, "--false_positive_rate=0.9999", one]) == 0
    assert [version for _, version, _ in model.requests] == [1, 2, 2]
    assert model.requests[-1][0] == "serving_bytes_at_rate"
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["ood_score"] == pytest.approx(lines[1]["ood_score"], abs=1e-4)
    assert not lines[0]["is_ood"] and lines[0]["p_value"] < 1.0 and lines[2]["is_ood"]

    assert client.main([*of, "--version=7", one, str(photos_folder / "1.png")]) == 1
    model.busy = 1
    assert client.main([*of, one]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "no answer: " in lines[0]["status"] and "not found" in lines[1]["status"]
    assert "no answer after 1 tries" in lines[2]["status"] and lines[2]["is_ood"] is None


def test_a_server_that_is_not_there_is_told(client, photos_folder, capsys):
    of = ["--server=http://127.0.0.1:9", "--model=parts", "--retries=1"]
    assert client.main([*of, str(photos_folder / "0.png")]) == 1
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "no answer after 2 tries" in line["status"]
    with pytest.raises(FileNotFoundError, match="Received: nowhere"):
        client.main([*of, "nowhere"])


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b'{"predictions": [', "no answer after 2 tries: IncompleteRead"),
        (503, b"bus", "no answer after 2 tries: HTTP 503: an answer that breaks off: Incomplete"),
        (200, b"<html>a proxy's page</html>", "no answer: not an answer of TensorFlow Serving"),
        (200, b'{"outputs": []}', "no answer: not an answer of TensorFlow Serving"),
        (200, b'{"predictions": null}', "no answer: not an answer of TensorFlow Serving"),
        (200, b'{"predictions": [1.0, 2.0]}', "no answer: not an answer of TensorFlow Serving"),
        (
            200,
            b'{"predictions": [{"ood_score": 1.0}, {"ood_score": 2.0}]}',
            'no answer: not an answer of TensorFlow Serving: ValueError("each answer must have',
        ),
    ],
)
def test_a_broken_answer_is_told_for_each_file(client, photos_folder, capsys, status, body, told):
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 9 * ("Incomplete" in told)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            del args

    with http.server.HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        of = [f"--server=http://127.0.0.1:{server.server_port}", "--model=parts", "--retries=1"]
        files = [str(photos_folder / name) for name in ("0.png", "1.png")]
        assert client.main([*of, *files]) == 1
        server.shutdown()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files
    assert all(line["status"].startswith(told) for line in lines)


def test_what_a_folder_holds_gets_a_line_each(client, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Expected a folder with images"):
        list(client.image_files([tmp_path]))
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.tif").write_bytes(b"b")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")

    def ask(files, rate):
        return [{"status": file.decode()} for file in files]

    found = list(client.answers(ask, list(client.image_files([tmp_path]))))
    assert [pathlib.Path(one["file"]).name for one in found] == ["a.png", "b.tif", "gone.png"]
    assert [one["status"] for one in found[:2]] == ["a", "b"]
    assert "cannot be read" in found[2]["status"] and found[2]["is_ood"] is None


@pytest.mark.parametrize("option", ["--batch_size=0", "--concurrency=0", "--drift=-3"])
def test_numbers_below_one_are_refused(client, option):
    with pytest.raises(SystemExit):
        client.parse(["--model=parts", option, "photos"])


def test_rest_takes_rows_and_columns(rest, grass_detector, photos_folder, grass_and_person):
    url = f"{rest}/v1/models/parts:predict"
    files, answers = expected(grass_detector, photos_folder)
    binary = [{"b64": base64.b64encode(path.read_bytes()).decode()} for path in files]
    of = {"signature_name": "serving_bytes"}
    rows = [{"image_bytes": one} for one in binary]
    status, row_format = post(url, {**of, "instances": rows})
    assert status == 200
    assert post(url, {**of, "instances": binary}) == (200, row_format)
    for name in OUTPUTS:
        found = [row[name] for row in row_format["predictions"]]
        np.testing.assert_allclose(found, answers[name], rtol=0, atol=1e-4)
    for inputs in (binary, {"image_bytes": binary}):
        _, column_format = post(url, {**of, "inputs": inputs})
        for name in (*OUTPUTS, "status"):
            column = [row[name] for row in row_format["predictions"]]
            assert column_format["outputs"][name] == column
    images = grass_and_person(1, 22)
    _, found = post(url, {"instances": images.tolist()})
    scores = [row["ood_score"] for row in found["predictions"]]
    np.testing.assert_allclose(scores, grass_detector(images)["ood_score"], rtol=0, atol=1e-4)
    _, found = post(url, {"signature_name": "features", "instances": images.tolist()})
    features = grass_detector.features(images)
    np.testing.assert_allclose(found["predictions"], features, rtol=0, atol=1e-5)
    status, found = post(url, {"signature_name": "nothing", "instances": [1]})
    assert status == 400 and "nothing not found" in found["error"]


def test_the_body_of_a_rest_request_is_as_documented(client):
    files = [b"\x89PNG", b"\xff\xd8"]
    assert json.loads(client.rest_body(files)) == {
        "signature_name": "serving_bytes",
        "instances": [{"image_bytes": {"b64": "iVBORw=="}}, {"image_bytes": {"b64": "/9g="}}],
    }
    assert json.loads(client.rest_body(files[:1], rate=0.01)) == {
        "signature_name": "serving_bytes_at_rate",
        "instances": [{"image_bytes": {"b64": "iVBORw=="}, "false_positive_rate": 0.01}],
    }


def test_drift_is_seen_and_seldom_imagined(client):
    rng = np.random.default_rng(0)

    def alarm(calibration_size, count, shift):
        calibration = rng.normal(size=calibration_size)
        scores = rng.normal(shift, size=count)
        ranks = 1 + (calibration >= scores[:, np.newaxis]).sum(1)
        distance, limit = client.drift(ranks / (calibration_size + 1), calibration_size, 0.05)
        return distance > limit

    for calibration_size, count in ((200, 2000), (500, 100)):
        assert np.mean([alarm(calibration_size, count, 0.0) for _ in range(200)]) < 0.1
        assert np.mean([alarm(calibration_size, count, 0.8) for _ in range(20)]) > 0.9
    distance, _ = client.drift([0.2, 0.4, 0.6, 0.8, 1.0], 4)
    assert distance == pytest.approx(0.0)
    assert client.drift([0.2], 4)[0] == pytest.approx(0.8)


# --- Configurations of the server ---------------------------------------------------------------


def official(package, messages):
    """A message of TensorFlow Serving that its package on PyPI lacks, by its published fields.

    Args:
        package: Name of the file.
        messages: Dict from message to its fields: (name, number, type), the wanted message last.
    """
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=f"tensorflow.serving.{package}", syntax="proto3"
    )
    file.dependency.append("google/protobuf/wrappers.proto")
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for name, number, kind in fields:
            label = types.LABEL_REPEATED if kind == "int64" else types.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if "." in kind:
                field.type, field.type_name = types.TYPE_MESSAGE, kind
            else:
                field.type = getattr(types, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{file.package}.{message}")
    return message_factory.GetMessageClass(descriptor)()


def parsed(name, message):
    return text_format.Parse((SERVING / name).read_text(), message)


def test_models_are_configured_with_labels_for_versions_that_are_served():
    config = pytest.importorskip(
        "tensorflow_serving.config.model_server_config_pb2", reason="no tensorflow-serving-api"
    )
    (model,) = parsed("models.config", config.ModelServerConfig()).model_config_list.config
    assert model.model_platform == "tensorflow" and model.base_path == f"/models/{model.name}"
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}
    assert set(model.version_labels.values()) <= set(model.model_version_policy.specific.versions)


def test_batching_and_monitoring_are_configured():
    number, text = ".google.protobuf.Int64Value", ".google.protobuf.StringValue"
    fields = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    batching = parsed(
        "batching.config",
        official(
            "session_bundle",
            {
                "BatchingParameters": [
                    *((name, index, number) for index, name in enumerate(fields, start=1)),
                    ("thread_pool_name", 5, text),
                    ("allowed_batch_sizes", 6, "int64"),
                    ("pad_variable_length_inputs", 7, "bool"),
                ]
            },
        ),
    )
    assert all(getattr(batching, name).value > 0 for name in fields)
    # Padding would change the images.
    assert not batching.pad_variable_length_inputs
    monitoring = parsed(
        "monitoring.config",
        official(
            "monitoring",
            {
                "PrometheusConfig": [("enable", 1, "bool"), ("path", 2, "string")],
                "MonitoringConfig": [
                    ("prometheus_config", 1, ".tensorflow.serving.monitoring.PrometheusConfig")
                ],
            },
        ),
    )
    assert monitoring.prometheus_config.enable
    with pytest.raises(text_format.ParseError):
        text_format.Parse("prometheus { enable: true }", type(monitoring)())


def test_the_container_is_given_files_that_are_there():
    yaml = pytest.importorskip("yaml", reason="no pyyaml")
    service = yaml.safe_load((SERVING / "docker-compose.yml").read_text())["services"]["serving"]
    image, tag = service["image"].split(":")
    assert image == "tensorflow/serving" and tag[0].isdigit()
    options = dict(argument.removeprefix("--").split("=", 1) for argument in service["command"])
    configured = [value for value in options.values() if value.startswith("/config/")]
    assert len(configured) == 3
    for path in configured:
        assert (SERVING / pathlib.PurePosixPath(path).name).is_file()
    assert options["enable_batching"] == "true"
