r"""Asks TensorFlow Serving about image files: gRPC or REST, many at once, with retries.

    python serving_client.py --server=localhost:8500 --model=parts photos/            # gRPC
    python serving_client.py --server=http://localhost:8501 --model=parts photos/     # REST

prints a line of JSON for each file, in their order: `file`, `ood_score`, `p_value`, `is_ood` and
`status`, which is empty for an image and otherwise says what is wrong. Ends with 1 if a file got no
decision. REST needs no package at all; gRPC needs `pip install tensorflow-serving-api`.

`--drift=N`, with the `calibration_size` of the export's `metadata.json`, compares all p-values with
what normal images give (see `drift`) and tells the result on stderr.
"""

import argparse
import base64
import concurrent.futures
import functools
import json
import math
import pathlib
import sys
import time
import urllib.error
import urllib.request

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
ANSWERS = ("ood_score", "p_value", "is_ood", "status")
# A server that is starting, that is full, or that was too slow once: worth another try.
TEMPORARY_HTTP = (429, 502, 503, 504)
TEMPORARY_GRPC = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")


class TemporaryError(Exception):
    """The server may answer if it is asked again."""


class PermanentError(Exception):
    """The server answered that it will not."""


def signature_and_inputs(files, rate):
    """Signature to ask and its inputs, for a list of the bytes of image files."""
    if rate is None:
        return "serving_bytes", {"image_bytes": files}
    return "serving_bytes_at_rate", {
        "image_bytes": files,
        "false_positive_rate": [rate] * len(files),
    }


def rest_body(files, rate=None):
    """Return the JSON of a REST request, in row format: one instance for each file."""
    signature, inputs = signature_and_inputs(files, rate)
    encoded = [{"b64": base64.b64encode(file).decode()} for file in files]
    inputs = {**inputs, "image_bytes": encoded}
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    return json.dumps({"signature_name": signature, "instances": rows}).encode()


def ask_rest(server, model, version, label, timeout, files, rate):
    """Return answers of TensorFlow Serving's REST interface, a dict for each file."""
    which = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
    request = urllib.request.Request(
        f"{server.rstrip('/')}/v1/models/{model}{which}:predict", rest_body(files, rate)
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)["predictions"]  # Takes the NaN that the server writes.
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        kind = TemporaryError if error.code in TEMPORARY_HTTP else PermanentError
        raise kind(f"HTTP {error.code}: {text}") from error
    except OSError as error:
        raise TemporaryError(str(error)) from error


def ask_grpc(stub, model, version, label, timeout, files, rate):
    """Return answers of TensorFlow Serving's gRPC interface, a dict for each file."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    signature, inputs = signature_and_inputs(files, rate)
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = model, signature
    if version:
        request.model_spec.version.value = version
    elif label:
        request.model_spec.version_label = label
    for name, values in inputs.items():
        dtype = tf.string if name == "image_bytes" else tf.float32
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values, dtype))
    try:
        outputs = stub.Predict(request, timeout=timeout).outputs
    except grpc.RpcError as error:
        code = error.code().name
        kind = TemporaryError if code in TEMPORARY_GRPC else PermanentError
        raise kind(f"gRPC {code}: {error.details()}") from error
    columns = {name: tf.make_ndarray(outputs[name]).tolist() for name in ANSWERS}
    columns["status"] = [text.decode() for text in columns["status"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def grpc_stub(server):
    """Return a stub of the official `PredictionService`, for messages of any size."""
    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(server, sizes))


def answer(ask, paths, rate, retries):
    """Return a dict for each file of one request, whether there is an answer or not."""
    files = [pathlib.Path(path).read_bytes() for path in paths]
    for attempt in range(retries + 1):
        try:
            answers = ask(files=files, rate=rate)
            break
        except PermanentError as error:
            answers = [{"status": f"no answer: {error}"}] * len(paths)
            break
        except TemporaryError as error:
            answers = [{"status": f"no answer after {attempt + 1} tries: {error}"}] * len(paths)
            if attempt < retries:
                time.sleep(min(0.1 * 2.0**attempt, 5.0))
    return [
        {"file": str(path), **{name: _json(one.get(name)) for name in ANSWERS}}
        for path, one in zip(paths, answers, strict=True)
    ]


def _json(value):
    """NaN, the score of a file that is no image, is not JSON."""
    return None if isinstance(value, float) and math.isnan(value) else value


def image_files(places):
    """Yield the files that are named and those in the folders that are named, in order."""
    for place in map(pathlib.Path, places):
        if place.is_dir():
            inside = place.rglob("*")
            yield from sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
        elif place.is_file():
            yield place
        else:
            raise FileNotFoundError(f"Expected image files or folders. Received: {place}")


def answers(ask, paths, *, batch_size=16, concurrency=4, rate=None, retries=5):
    """Yield a dict for each file, in their order, of requests that are sent several at once."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        for batch in pool.map(lambda batch: answer(ask, batch, rate, retries), batches):
            yield from batch


def drift(p_values, calibration_size, significance=0.001):
    """Tell how far p-values are from those of normal images, and how far is too far.

    P-values of normal images are uniform over 1/(N+1), ..., 1, on average over sets of N
    calibration images; with one such set they are as far off as two samples are from each
    other, so this is the two-sample test of Kolmogorov and Smirnov. A test against the uniform
    distribution itself would raise false alarms as soon as there are more images than N.

    Args:
        p_values: P-values of images that should be normal, one for each independent image.
        calibration_size: N.
        significance: Probability of an alarm where nothing has changed.

    Returns:
        Largest distance between the two distribution functions, and the limit for it.
    """
    ranks = [round(p_value * (calibration_size + 1)) for p_value in p_values]
    counts = [0] * (calibration_size + 2)
    for rank in ranks:
        counts[rank] += 1
    distance, seen = 0.0, 0
    for rank in range(1, calibration_size + 2):
        seen += counts[rank]
        distance = max(distance, abs(seen / len(ranks) - rank / (calibration_size + 1)))
    spread = math.sqrt(1.0 / len(ranks) + 1.0 / calibration_size)
    return distance, math.sqrt(-0.5 * math.log(significance / 2.0)) * spread


def parse(arguments):
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="+", help="image files, or folders of them")
    parser.add_argument("--server", default="localhost:8500", help="HOST:PORT or http://HOST:PORT")
    parser.add_argument("--model", required=True, help="name under which it is served")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, help="default: the latest")
    which.add_argument("--label", help="such as stable or canary")
    parser.add_argument("--false_positive_rate", type=float, help="default: the detector's own")
    parser.add_argument("--batch_size", type=int, default=16, help="files in a request")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once")
    parser.add_argument("--retries", type=int, default=5, help="of a request")
    parser.add_argument("--timeout", type=float, default=30.0, help="of a request, in seconds")
    parser.add_argument("--drift", type=int, metavar="N", help="calibration images of the detector")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Ask about all files; 0 if each got a decision."""
    flags = parse(arguments)
    rest = flags.server.startswith(("http://", "https://"))
    ask = functools.partial(
        ask_rest if rest else ask_grpc,
        flags.server if rest else grpc_stub(flags.server),
        flags.model,
        flags.version,
        flags.label,
        flags.timeout,
    )
    options = {"batch_size": flags.batch_size, "concurrency": flags.concurrency}
    paths, p_values, all_good = list(image_files(flags.places)), [], True
    for one in answers(
        ask, paths, rate=flags.false_positive_rate, retries=flags.retries, **options
    ):
        print(json.dumps(one), flush=True)
        if one["status"]:
            all_good = False
        else:
            p_values.append(one["p_value"])
    if flags.drift and p_values:
        distance, limit = drift(p_values, flags.drift)
        verdict = "have drifted" if distance > limit else "are as they should be"
        print(
            f"P-values of {len(p_values)} images {verdict}: distance {distance:.3f}, "
            f"limit {limit:.3f}.",
            file=sys.stderr,
        )
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
