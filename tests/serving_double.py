"""Stands in for TensorFlow Serving: one export, its gRPC and REST interfaces, on loopback.

No binary of TensorFlow Serving can be installed where the tests run. This loads the export into a
session, as the server does, speaks the official gRPC messages, and encodes JSON as the
server's documentation of its REST interface says. Versions are those that the directory holds;
labels and busy spells are given by the test.
"""

import base64
import contextlib
import http.server
import json
import re
import threading
from concurrent import futures

import numpy as np
import tensorflow as tf


class ServingError(Exception):
    """An error as TensorFlow Serving answers it: a gRPC code and a message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Model:
    """A served model: all versions in a directory, run by the session loader.

    Args:
        directory: Holds the numbered exports.
        labels: Dict from label to version.
    """

    def __init__(self, directory, labels=None):
        self.name = directory.name
        self.labels = labels or {}
        self.requests = []  # Of each request: its signature, version and number of items.
        self.busy = 0  # So many requests are turned away first.
        self._versions = {int(p.name): _load(p) for p in directory.iterdir() if p.name.isdigit()}

    def predict(self, name, signature, inputs, version=None, label=None):
        """Outputs of a signature, a dict of arrays."""
        if label is not None and label not in self.labels:
            raise ServingError("NOT_FOUND", f"Unrecognized servable version label: {label}")
        version = self.labels[label] if label else version or max(self._versions)
        if name != self.name or version not in self._versions:
            raise ServingError("NOT_FOUND", f"Servable not found for request: {name} {version}")
        if self.busy:
            self.busy -= 1
            raise ServingError("UNAVAILABLE", "the batch scheduling queue is full")
        signature_def = self._signature(version, signature)
        if set(inputs) != set(signature_def.inputs):
            raise ServingError(
                "INVALID_ARGUMENT",
                f"input size does not match signature: {len(inputs)}!={len(signature_def.inputs)}",
            )
        self.requests.append((signature, version, len(next(iter(inputs.values())))))
        feeds = {
            tensor.name: np.asarray(inputs[key], tf.as_dtype(tensor.dtype).as_numpy_dtype)
            for key, tensor in signature_def.inputs.items()
        }
        fetches = {key: tensor.name for key, tensor in signature_def.outputs.items()}
        try:
            return self._versions[version][0].run(fetches, feeds)
        except tf.errors.InvalidArgumentError as error:
            raise ServingError("INVALID_ARGUMENT", error.message) from error

    def input_names(self, signature):
        """Names of the inputs of a signature of the latest version."""
        return list(self._signature(max(self._versions), signature).inputs)

    def _signature(self, version, name):
        _, signatures = self._versions[version]
        if name not in signatures:
            raise ServingError("INVALID_ARGUMENT", f"Serving signature key {name} not found.")
        return signatures[name]


def _load(path):
    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(path))
    return session, loaded.signature_def


# --- gRPC ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def grpc_server(model):
    """Address of a server of the official `PredictionService`."""
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802  (the name in the official service)
            spec = request.model_spec
            inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
            version = spec.version.value if spec.HasField("version") else None
            name = spec.signature_name or "serving_default"
            try:
                outputs = model.predict(
                    spec.name, name, inputs, version, spec.version_label or None
                )
            except ServingError as error:
                context.abort(grpc.StatusCode[error.code], str(error))
            response = predict_pb2.PredictResponse()
            response.model_spec.CopyFrom(spec)
            for key, value in outputs.items():
                response.outputs[key].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(8))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


# --- REST ---------------------------------------------------------------------------------------

_PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:predict")
_HTTP = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400, "UNAVAILABLE": 503}


@contextlib.contextmanager
def rest_server(model):
    """URL of a server of the REST predict interface."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, answer = 200, _predict_json(model, self.path, body)
            except ServingError as error:
                status, answer = _HTTP[error.code], {"error": str(error)}
            data = json.dumps(answer).encode()  # Writes NaN as the server does.
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _predict_json(model, path, body):
    match = _PATH.fullmatch(path)
    if not match:
        raise ServingError("INVALID_ARGUMENT", f"Malformed request: POST {path}")
    name, version, label = match.groups()
    try:
        request = json.loads(body)
    except json.JSONDecodeError as error:
        raise ServingError("INVALID_ARGUMENT", f"JSON Parse error: {error}") from error
    if ("instances" in request) == ("inputs" in request):
        raise ServingError("INVALID_ARGUMENT", "Expected one of `instances` and `inputs`")
    signature = request.get("signature_name", "serving_default")
    names = model.input_names(signature)
    rows = "instances" in request
    inputs = _columns(request["instances"], names) if rows else request["inputs"]
    if not isinstance(inputs, dict) or _is_binary(inputs):
        inputs = {names[0]: inputs}
    inputs = {key: _values(value) for key, value in inputs.items()}
    outputs = model.predict(name, signature, inputs, int(version) if version else None, label)
    outputs = {key: _json_values(value) for key, value in outputs.items()}
    if not rows:
        return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
    predictions = [
        dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)
    ]
    return {"predictions": predictions if len(outputs) > 1 else next(iter(outputs.values()))}


def _columns(instances, names):
    """Row format to columns; rows of one input may leave out its name."""
    if not isinstance(instances[0], dict) or _is_binary(instances[0]):
        return {names[0]: instances}
    return {key: [instance[key] for instance in instances] for key in instances[0]}


def _is_binary(value):
    return isinstance(value, dict) and set(value) == {"b64"}


def _values(value):
    if _is_binary(value):
        return base64.b64decode(value["b64"], validate=True)
    return [_values(one) for one in value] if isinstance(value, list) else value


def _json_values(array):
    if array.dtype == object:
        return [text.decode() for text in array.tolist()]
    if array.dtype == np.float32:  # The shortest decimals that are the same float32.
        return json.loads(json.dumps(array.astype(float).tolist()))
    return array.tolist()
