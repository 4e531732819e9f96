r"""Write a detector for servers (SavedModel) and for devices (TFLite).

    sddns export --detector=parts/detector.keras --saved_model=exports/parts \
        --tflite=parts.tflite --quantization=dynamic --calibration=folder:photos/good_held_out

Each export contains everything: resizing, normalization, backbone, bank, score and calibration. It
is run in a separate process and compared with the detector before it is moved into place. If the
two disagree, nothing is written. Prints one line of JSON per export.

A .tflite file with slightly different scores (after quantization, or if the bank is compressed to
--tflite_bank_size) is recalibrated with --calibration: pass the images that the detector was
calibrated with.
"""

from __future__ import annotations

import json
import pathlib
from argparse import Namespace
from typing import Any

import numpy as np

from sddns_tf.cli import sources, starting
from sddns_tf.cli.console import Parser, positive_int, require, say, verbose
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.scorers import load_keras


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("export", __doc__)
    group = parser.group("what most people need")
    group.add_argument("--detector", metavar="FILE", help="Detector to export (.keras).")
    group.add_argument(
        "--saved_model",
        metavar="FOLDER",
        help="Folder to write a new version of the SavedModel to.",
    )
    group.add_argument("--tflite", metavar="FILE", help="File to write (.tflite).")
    group.add_argument(
        "--quantization",
        choices=("none", "float16", "dynamic", "int8"),
        default="none",
        help="Quantization of the backbone in the .tflite file.",
    )
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="Source of normal images to calibrate the .tflite file with, neither trained on nor "
        "in the bank (split: test).",
    )
    group = parser.group("images to compare on")
    group.add_argument(
        "--representative",
        metavar="SOURCE",
        help="Source of normal images to compare exports on and to set int8 ranges with (split: "
        "train).",
    )
    group.add_argument(
        "--limit",
        metavar="N",
        type=positive_int,
        default=128,
        help="Largest number of representative images to use.",
    )
    group.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR.",
    )
    group = parser.group("the exports")
    group.add_argument(
        "--version",
        metavar="N",
        type=positive_int,
        help="Version number of the SavedModel. Default: one more than the last.",
    )
    group.add_argument(
        "--tflite_bank_size",
        metavar="N",
        type=positive_int,
        default=1000,
        help="Compress the bank in the .tflite file to at most N centers.",
    )
    group.add_argument(
        "--tflite_batch_size",
        metavar="N",
        type=positive_int,
        help="Fixed batch size of the .tflite file. Default: any.",
    )
    group.add_argument(
        "--tflite_extension_room",
        metavar="N",
        type=positive_int,
        help="Rows to leave free in the .tflite file of a local detector, for false alarms that "
        "count as normal from then on. Default: none.",
    )
    return parser


def check(options: Namespace) -> None:
    """Check options that depend on each other, before anything slow."""
    require(options, "detector")
    if not (options.saved_model or options.tflite):
        raise UsageError("--saved_model or --tflite is needed. Received: neither")
    if options.tflite and not options.tflite.endswith(".tflite"):
        raise UsageError(f"--tflite must end in .tflite. Received: {options.tflite}")
    if options.quantization != "none" and not options.tflite:
        raise UsageError(f"--quantization={options.quantization} needs --tflite. Received: none")
    if options.quantization == "int8" and not options.representative:
        raise UsageError("--quantization=int8 needs --representative. Received: none")
    for option, split in (("calibration", "test"), ("representative", "train")):
        if text := getattr(options, option):
            sources.parse(option, text, split)


def main(argv: list[str]) -> None:
    """Write the exports that the options name."""
    options = parser().parse_args(argv)
    check(options)
    starting.import_tensorflow()

    import tensorflow as tf

    import sddns_tf

    full_or_closed = (tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError)
    wrong = (ValueError, OSError, ImportError, *full_or_closed)
    detector = load_keras("detector", options.detector, sddns_tf.Detector)
    images = read(detector, options, "representative", "train", options.limit)
    if options.saved_model:
        say("Writing and checking the SavedModel")
        with user_input("saved_model", wrong):
            path = sddns_tf.export.saved_model(
                detector, options.saved_model, version=options.version, images=images
            )
        tell("saved_model", path)
    if options.tflite:
        say("Writing and checking the TFLite file")
        calibration = read(detector, options, "calibration", "test")
        with user_input("tflite", wrong):
            path = sddns_tf.export.tflite(
                detector,
                options.tflite,
                quantization=None if options.quantization == "none" else options.quantization,
                representative_images=images,
                calibration_images=calibration,
                bank_size=options.tflite_bank_size,
                batch_size=options.tflite_batch_size,
                extension_room=options.tflite_extension_room or 0,
                verbose=verbose(),
            )
        tell("tflite", path)


def read(
    detector: Any, options: Namespace, option: str, split: str, limit: int | None = None
) -> np.ndarray | None:
    """Return the images that an option names, resized as for the detector, or None."""
    text = getattr(options, option)
    if not text:
        return None
    return sources.read(
        option,
        sources.parse(option, text, split),
        data_dir=options.data_dir,
        limit=limit,
        **sources.seen_by(detector),
    )


def tell(kind: str, path: str | pathlib.Path) -> None:
    """Print the path and size of an export."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(json.dumps({"export": kind, "path": str(path.resolve()), "bytes": size}), flush=True)
