"""Show what a .keras file, a SavedModel or a .tflite file contains.

    sddns info parts/detector.keras
    sddns info exports/parts
    sddns info --json parts.tflite

A .tflite file is read without TensorFlow.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

from sddns_tf import files
from sddns_tf.cli import starting
from sddns_tf.cli.console import Parser
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.scorers import described, load_keras, saved_model_folder


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("info", __doc__)
    parser.usage = "sddns info [--json] FILE"
    parser.add_argument("file", metavar="FILE", help="File, or folder of a SavedModel.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def describe(path: str | pathlib.Path) -> dict[str, Any]:
    """Return a description of a file.

    Args:
        path: Path of a `.keras` or `.tflite` file, or of the folder of a SavedModel.

    Returns:
        JSON-serializable dictionary.

    Raises:
        UsageError: If it is none of these, or cannot be read.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".tflite" and path.is_file():
        return _tflite(path)
    if path.suffix == ".keras" and path.is_file():
        return _keras(path)
    if (folder := saved_model_folder(path)) is not None:
        return _saved_model(folder)
    raise UsageError(
        "FILE must be an existing .keras file, .tflite file or folder of a SavedModel. "
        f"Received: {path}"
    )


def _tflite(path: pathlib.Path) -> dict[str, Any]:
    file = path.read_bytes()
    with user_input("FILE"):
        from ai_edge_litert.interpreter import Interpreter

        from sddns_tf.export import metadata

        try:
            description = metadata.description(file)
            interpreter = Interpreter(model_content=file)
        # Bytes that are not a .tflite file can raise anything.
        except Exception as error:
            raise UsageError(
                f"FILE must be a .tflite file that sddns export wrote. Received: {path} ({error})"
            ) from error
    inputs = interpreter.get_input_details()[0]
    return {
        "file": str(path),
        "holds": "detector (TFLite)",
        "bytes": len(file),
        "input": {"dtype": inputs["dtype"].__name__, "shape": inputs["shape_signature"].tolist()},
        **{key: value for key, value in description.items() if key != "buffers"},
        "operators": metadata.operators(file),
    }


def _saved_model(folder: pathlib.Path) -> dict[str, Any]:
    found = described("FILE", folder)
    for name, written in found["files"].items():
        path = folder / name
        with user_input("FILE", OSError):
            same = path.is_file() and files.sha256(path) == written["sha256"]
        if not same:
            raise UsageError(
                "FILE must be a SavedModel as sddns export wrote it. "
                f"Received: {path}, which is missing or has changed since"
            )
    keys = (
        "name", "version", "training_data", "written", "false_positive_rate", "threshold",
        "calibration_size", "bank_size", "feature_dimension", "resolution", "max_pixels",
        "self_check", "packages",
    )  # fmt: skip
    extractor = found.get("configuration", {}).get("extractor", {}).get("config", {})
    return {
        "file": str(folder),
        "holds": "detector (SavedModel)",
        "bytes": sum(one["bytes"] for one in found["files"].values()),
        **{key: found[key] for key in keys if key in found},
        "resize": extractor.get("resize", "squash"),
        "signatures": _signatures(folder),
    }


def _signatures(folder: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """Return the names of each signature's inputs and outputs."""
    starting.import_tensorflow()
    from tensorflow.core.protobuf import saved_model_pb2

    graph = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return {
        name: {
            "takes": sorted(signature.inputs),
            "gives": sorted(signature.outputs),
        }
        for name, signature in sorted(graph.meta_graphs[0].signature_def.items())
        if not name.startswith("__")
    }


def _keras(path: pathlib.Path) -> dict[str, Any]:
    starting.import_tensorflow()
    model = load_keras("FILE", path)
    found = {"file": str(path), "holds": type(model).__name__, "bytes": path.stat().st_size}
    with zipfile.ZipFile(path) as archive:
        found["keras"] = json.loads(archive.read("metadata.json"))["keras_version"]
    describers = {
        "Detector": _detector,
        "FeatureExtractor": _extractor,
        "SelfDistillation": _self_distillation,
    }
    if type(model).__name__ in describers:
        return {**found, **describers[type(model).__name__](model)}
    takes_images = hasattr(model, "image_size") or len(getattr(model, "input_shape", ())) == 4
    if not takes_images:
        raise UsageError(
            "FILE must hold a detector, a SelfDistillation, a feature extractor or a network from "
            f"images to features. Received: {path}, which holds a {type(model).__name__}"
        )
    return {**found, **_network(model)}


def _extractor(extractor: Any) -> dict[str, Any]:
    return {
        "backbone": _network(extractor.backbone),
        "layers": extractor.layer_names,
        "standardized": extractor.standardized,
        "aligned": extractor.aligned,
        "components": extractor.components,
        "resolution": extractor.resolution,
        "resize": extractor.resize,
        "image_size": extractor.image_size,
        "mean": extractor.mean,
        "std": extractor.std,
        "feature_dimension": extractor.feature_dim,
    }


def _detector(detector: Any) -> dict[str, Any]:
    return {
        **_extractor(detector.extractor),
        "bank_rows": detector.bank.shape[0],
        "temperature": detector.temperature,
        "offset": detector.offset,
        "k": detector.k,
        "smoothing": detector.smoothing,
        "auxiliary_weight": detector.auxiliary_weight,
        "calibration_images": detector.calibration_scores.shape[0],
        "false_positive_rate": detector.false_positive_rate,
        "threshold": detector.threshold,
    }


def _self_distillation(model: Any) -> dict[str, Any]:
    from sddns_tf import shifts

    negatives = None
    if model.negatives is not None:
        negatives = {
            "shift": shifts.name_of(model.negatives.shift),
            "source": model.negatives.source,
        }
    return {
        "steps": int(model.step),
        "backbone": _network(model.student_backbone),
        "head_parameters": model.student_head.count_params(),
        "prototypes": model.center.shape[0],
        "image_size": model.views.image_size,
        "local_views": model.views.local_views,
        "negatives": negatives,
        "mean": model.mean,
        "std": model.std,
    }


def _network(model: Any) -> dict[str, Any]:
    size = getattr(model, "image_size", None) or model.input_shape[1:3]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return {
        "class": type(model).__name__,
        "name": model.name,
        "parameters": model.count_params(),
        "input": size,
        "features": model.compute_output_shape((None, *size, 3))[-1],
    }


def lines(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a description as text; nested dictionaries are indented.

    Args:
        found: Dictionary from `describe`.
        indent: String at the start of each line.

    Yields:
        Strings.
    """
    width = max(map(len, found), default=0)
    for key, value in found.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}"
            yield from lines(value, indent + "  ")
            continue
        if isinstance(value, (list, tuple)):
            value = ", ".join("any" if one is None else str(one) for one in value)
        yield f"{indent}{key:<{width}}  {'none' if value is None else value}"


def main(argv: list[str]) -> None:
    """Describe the file."""
    options = parser().parse_args(argv)
    found = describe(options.file)
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))
