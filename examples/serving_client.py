r"""Send image files to TensorFlow Serving by gRPC or REST, with parallel requests and retries.

    python serving_client.py --server=localhost:8500 --model=parts photos/            # gRPC
    python serving_client.py --server=http://localhost:8501 --model=parts photos/     # REST

Prints one line of JSON per file, in order: `file`, `ood_score`, `p_value`, `is_ood` and `status`,
which is empty for a good file and otherwise says what is wrong. The exit code is 1 if a file got no
decision. REST needs no package; gRPC needs `pip install tensorflow-serving-api`. A server does not
turn photographs as their EXIF data say: turn them before (`PIL.ImageOps.exif_transpose`).

`--drift=N`, where N is the `calibration_size` in the export's `metadata.json`, compares all
p-values with those expected for normal images (see `drift`) and prints the result to stderr.
"""

import argparse
import base64
import concurrent.futures
import functools
import http.client
import json
import math
import pathlib
import sys
import time
import urllib.error
import urllib.request

# TIFF and WebP too: a server refuses them, so that each gets a line that says so.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ANSWERS = ("ood_score", "p_value", "is_ood", "status")
# The server may be starting, overloaded or slow, so another try may succeed.
TEMPORARY_HTTP = (429, 502, 503, 504)
TEMPORARY_GRPC = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")


class TemporaryError(Exception):
    """A failure after which another try may succeed."""


class PermanentError(Exception):
    """A failure that another try would not change."""


def signature_and_inputs(files, rate):
    """Return the signature to call and its inputs, given the contents of image files."""
    if rate is None:
        return "serving_bytes", {"image_bytes": files}
    return "serving_bytes_at_rate", {
        "image_bytes": files,
        "false_positive_rate": [rate] * len(files),
    }


def rest_body(files, rate=None):
    """Return the JSON of a REST request in row format, with one instance per file."""
    signature, inputs = signature_and_inputs(files, rate)
    encoded = [{"b64": base64.b64encode(file).decode()} for file in files]
    inputs = {**inputs, "image_bytes": encoded}
    rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    return json.dumps({"signature_name": signature, "instances": rows}).encode()


def ask_rest(server, model, version, label, timeout, files, rate):
    """Send files to TensorFlow Serving's REST API, and return a dict for each file."""
    which = f"/versions/{version}" if version else f"/labels/{label}" if label else ""
    request = urllib.request.Request(
        f"{server.rstrip('/')}/v1/models/{model}{which}:predict", rest_body(files, rate)
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return _checked(json.load(response)["predictions"])  # Takes NaN, which servers write.
    except urllib.error.HTTPError as error:
        try:
            text = error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as broken:
            text = f"an answer that breaks off: {broken!r}"
        kind = TemporaryError if error.code in TEMPORARY_HTTP else PermanentError
        raise kind(f"HTTP {error.code}: {text}") from error
    except (OSError, http.client.HTTPException) as error:  # the latter if an answer breaks off
        raise TemporaryError(f"{type(error).__name__}: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise PermanentError(f"not an answer of TensorFlow Serving: {error!r}") from error


def _checked(predictions):
    """Return answers, or raise a `ValueError` unless each has all that is asked for."""
    if not all(isinstance(one, dict) and set(ANSWERS) <= set(one) for one in predictions):
        raise ValueError(f"each answer must have {', '.join(ANSWERS)}. Received: {predictions}")
    return predictions


def ask_grpc(stub, model, version, label, timeout, files, rate):
    """Send files to TensorFlow Serving's gRPC API, and return a dict for each file."""
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
    """Send one request with retries, and return a dict for each file, even without an answer."""
    files, statuses = [], {}
    for path in paths:
        try:
            files.append(pathlib.Path(path).read_bytes())
        except OSError as error:
            statuses[path] = f"cannot be read: {error}"
    answers = iter(_answers_of(ask, files, rate, retries) if files else ())
    found = [
        (path, {"status": statuses[path]} if path in statuses else next(answers)) for path in paths
    ]
    return [
        {"file": str(path), **{name: _json(one.get(name)) for name in ANSWERS}}
        for path, one in found
    ]


def _answers_of(ask, files, rate, retries):
    """Return a dict for each file of a request."""
    for attempt in range(retries + 1):
        try:
            found = ask(files=files, rate=rate)
            if len(found) != len(files):
                raise PermanentError(f"{len(found)} answers for {len(files)} files")
            return found
        except PermanentError as error:
            return [{"status": f"no answer: {error}"}] * len(files)
        except TemporaryError as error:
            failed = f"no answer after {attempt + 1} tries: {error}"
            if attempt < retries:
                time.sleep(min(0.1 * 2.0**attempt, 5.0))
    return [{"status": failed}] * len(files)


def _json(value):
    """Replace NaN, the score of a bad file, with None, because JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def image_files(places):
    """Yield the given files, and the image files in given folders, in order."""
    for place in map(pathlib.Path, places):
        if place.is_dir():
            found = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise FileNotFoundError(f"Expected a folder with images. Received: {place}")
            yield from found
        elif place.is_file():
            yield place
        else:
            raise FileNotFoundError(f"Expected existing image files or folders. Received: {place}")


def answers(ask, paths, *, batch_size=16, concurrency=4, rate=None, retries=5):
    """Send several requests in parallel, and yield a dict for each file in order."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        for batch in pool.map(lambda batch: answer(ask, batch, rate, retries), batches):
            yield from batch


def drift(p_values, calibration_size, significance=0.001):
    """Return how far p-values are from those of normal images, and how far they may be.

    On average over sets of N calibration images, p-values of normal images are uniform over
    1/(N+1), ..., 1. For a single set they differ from that as two samples differ from each other,
    so this is the two-sample Kolmogorov-Smirnov test. A test against the uniform distribution
    itself would raise false alarms as soon as there are more than N images.

    Args:
        p_values: P-values of independent images that should be normal.
        calibration_size: Number of calibration images, N.
        significance: Probability of an alarm if nothing has changed.

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


def positive(text):
    """Return the int of an option, or raise a `ValueError` if it is below 1."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def natural(text):
    """Return the int of an option, or raise a `ValueError` if it is below 0."""
    return positive(text) if int(text) else 0


def parse(arguments):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="+", help="image files, or folders of them")
    parser.add_argument("--server", default="localhost:8500", help="HOST:PORT or http://HOST:PORT")
    parser.add_argument("--model", required=True, help="name of the served model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, help="version; default: the latest")
    which.add_argument("--label", help="version label, such as stable or canary")
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        help="largest share of normal images to flag; default: the detector's",
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="files per request")
    parser.add_argument("--concurrency", type=positive, default=4, help="parallel requests")
    parser.add_argument("--retries", type=natural, default=5, help="retries per request")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds per request")
    parser.add_argument(
        "--drift", type=positive, metavar="N", help="number of the detector's calibration images"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Send all files, and return 0 if each got a decision."""
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
        verdict = "have drifted" if distance > limit else "are as expected"
        print(
            f"P-values of {len(p_values)} images {verdict}: distance {distance:.3f}, "
            f"limit {limit:.3f}.",
            file=sys.stderr,
        )
    return 0 if all_good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(f"ERROR: {error}")
