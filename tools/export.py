r"""Exports a detector for servers (SavedModel) and for devices (TFLite).

    python tools/export.py --detector=parts/detector.keras --saved_model=exports/parts \
        --tflite=parts.tflite --quantization=dynamic --calibration=folder:parts/held_out

Either export carries everything: resizing, normalization, backbone, bank, score, calibration. It is
run in a process of its own and compared with the detector before it gets its name; where they
disagree nothing is left behind and the tool ends with 1. Prints a line of JSON for each export.

A .tflite file whose scores are not quite the detector's (quantization, a bank of more than
--tflite_bank_size) is calibrated anew, on --calibration: name the images that the detector was
calibrated with.
"""

import json
import pathlib

import command_line
from absl import flags

FLAGS = flags.FLAGS


def define_flags():
    """All flags of the program."""
    command_line.define_data_flags()
    flags.DEFINE_string("detector", None, "Detector to export (.keras).")
    flags.DEFINE_string("saved_model", None, "Folder in which to write the SavedModel's version.")
    flags.DEFINE_integer("version", None, "Its version; default: one more than the last.", 1)
    flags.DEFINE_string("tflite", None, "File to write (.tflite).")
    flags.DEFINE_enum(
        "quantization",
        "none",
        ["none", "float16", "dynamic", "int8"],
        "Of the backbone in the .tflite file.",
    )
    flags.DEFINE_string(
        "calibration",
        None,
        "Source of in-distribution images that are neither trained on nor in the bank, to "
        "calibrate the .tflite file with (split: test).",
    )
    flags.DEFINE_integer(
        "tflite_bank_size", 1000, "Compress its bank to at most so many centres.", 1
    )
    flags.DEFINE_integer("tflite_batch_size", None, "Images it takes at a time; default: any.", 1)
    flags.DEFINE_string(
        "representative",
        None,
        "Source of normal images on which exports are compared, and which set the ranges of int8 "
        "(split: train).",
    )
    flags.DEFINE_integer("limit", 128, "Representative images to use, at most.", 1)


def main():
    """Export to each place that the flags name."""
    if not FLAGS.detector:
        raise ValueError(f"--detector is needed. Received: --detector={FLAGS.detector}")
    if not (FLAGS.saved_model or FLAGS.tflite):
        raise ValueError("--saved_model or --tflite is needed. Received: neither")
    if FLAGS.tflite and not FLAGS.tflite.endswith(".tflite"):
        raise ValueError(f"--tflite must end in .tflite. Received: {FLAGS.tflite}")
    if FLAGS.quantization != "none" and not FLAGS.tflite:
        raise ValueError(f"--quantization={FLAGS.quantization} needs --tflite. Received: none")
    if FLAGS.quantization == "int8" and not FLAGS.representative:
        raise ValueError("--quantization=int8 needs --representative. Received: none")

    import sddns_tf

    detector = command_line.load_keras("detector", FLAGS.detector)
    if not isinstance(detector, sddns_tf.Detector):
        raise ValueError(
            f"--detector must hold a Detector. Received: {FLAGS.detector}, which holds a "
            f"{type(detector).__name__}"
        )
    images = read(detector, "representative", "train", FLAGS.limit)
    if FLAGS.saved_model:
        command_line.say("Writing and checking the SavedModel")
        path = sddns_tf.export.saved_model(
            detector, FLAGS.saved_model, version=FLAGS.version, images=images
        )
        tell("saved_model", path)
    if FLAGS.tflite:
        command_line.say("Writing and checking the TFLite file")
        quantization = None if FLAGS.quantization == "none" else FLAGS.quantization
        path = sddns_tf.export.tflite(
            detector,
            FLAGS.tflite,
            quantization=quantization,
            representative_images=images,
            calibration_images=read(detector, "calibration", "test", None),
            bank_size=FLAGS.tflite_bank_size,
            batch_size=FLAGS.tflite_batch_size,
            verbose=command_line.progress(),
        )
        tell("tflite", path)


def read(detector, flag, split, limit):
    """The images that a flag names, at the detector's resolution, or None."""
    if not FLAGS[flag].value:
        return None
    one = command_line.source(flag, FLAGS[flag].value, split)
    resolution = detector.extractor.resolution or detector.extractor.image_size
    return command_line.read(flag, one, FLAGS, resolution, limit=limit)


def tell(kind, path):
    """Where an export is and how large."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    size = sum(one.stat().st_size for one in files)
    print(json.dumps({"export": kind, "path": str(path.resolve()), "bytes": size}), flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
