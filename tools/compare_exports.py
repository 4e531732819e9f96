r"""What each TFLite variant of a detector costs: size, AUROC, and normal images flagged.

    python tools/compare_exports.py --detector=sddns_tf/trained/cifar10-small.keras \
        --calibration=tfds:cifar10@test[0:5000:2] --test=tfds:cifar10@test[5000:] \
        --ood=tfds:cifar100,tfds:dtd

Exports the detector in float32, float16, dynamic and int8 with a compressed bank, calibrates each
on --calibration, scores --test (normal images used for nothing else) and each OOD set with the
file itself, and prints a Markdown table beside the detector's own figures. --output_dir keeps the
files and the table.
"""

import pathlib
import tempfile

import command_line
from absl import flags

FLAGS = flags.FLAGS
VARIANTS = ("float32", "float16", "dynamic", "int8")


def define_flags():
    """All flags of the program."""
    command_line.define_data_flags()
    flags.DEFINE_string("detector", None, "Detector to export (.keras).")
    flags.DEFINE_string(
        "calibration", None, "Source of the images it was calibrated with (split: test)."
    )
    flags.DEFINE_string("test", None, "Source of fresh normal images (split: test).")
    flags.DEFINE_list("ood", [], "Sources of OOD images, with commas between (split: test).")
    flags.DEFINE_integer("limit", 2000, "Score at most so many images of each set.", 1)
    flags.DEFINE_integer("tflite_bank_size", 1000, "Largest number of rows of the bank.", 1)
    flags.DEFINE_string("output_dir", None, "Folder to write to; default: nothing is kept.")


def tflite_answers(path, images):
    """OOD scores and decisions of a file, for images in batches of 50."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    answers = [runner(images=images[i : i + 50]) for i in range(0, len(images), 50)]
    return {key: np.concatenate([one[key] for one in answers]) for key in ("ood_score", "is_ood")}


def row(name, size, answers, normal):
    """A line of the table: name, MB, AUROC of each set, share of normal images flagged."""
    from sddns_tf import metrics

    aurocs = [
        metrics.ood_metrics(normal["ood_score"], one["ood_score"])["auroc"]
        for one in answers.values()
    ]
    cells = [f"{size / 1e6:.2f}", *(f"{value:.4f}" for value in aurocs)]
    return f"| {name} | {' | '.join(cells)} | {normal['is_ood'].mean():.4f} |"


def compare(detector, images, folder):
    """Lines of the table; the files are written to `folder`."""
    import sddns_tf

    ood = {name: one for name, one in images.items() if name not in ("calibration", "test")}
    lines = [
        "| | MB | " + " | ".join(ood) + " | normal images flagged |",
        "|---|---|" + "---|" * (len(ood) + 1),
    ]
    normal = detector.predict(images["test"], verbose=0)
    own = {name: detector.predict(one, verbose=0) for name, one in ood.items()}
    size = pathlib.Path(FLAGS.detector).expanduser().stat().st_size
    lines.append(row(f"the detector, bank of {detector.bank.shape[0]:,}", size, own, normal))
    for variant in VARIANTS:
        command_line.say(f"Exporting and scoring: {variant}")
        path = sddns_tf.export.tflite(
            detector,
            folder / f"{variant}.tflite",
            quantization=None if variant == "float32" else variant,
            calibration_images=images["calibration"],
            representative_images=images["calibration"][:256],
            bank_size=FLAGS.tflite_bank_size,
            verbose=0,
        )
        answers = {name: tflite_answers(path, one) for name, one in ood.items()}
        normal = tflite_answers(path, images["test"])
        lines.append(row(variant, path.stat().st_size, answers, normal))
    return lines


def main():
    """Read, compare, print."""
    for name in ("detector", "calibration", "test", "ood"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is needed. Received: --{name}={FLAGS[name].value}")
    detector = command_line.load_keras("detector", FLAGS.detector)
    size = detector.extractor.resolution or detector.extractor.image_size
    named = {"calibration": FLAGS.calibration, "test": FLAGS.test}
    sources = {name: command_line.source(name, text, "test") for name, text in named.items()}
    images = {
        name: command_line.read(
            name, one, FLAGS, size, limit=FLAGS.limit * (name == "test") or None
        )
        for name, one in sources.items()
    }
    for one in command_line.sources("ood", FLAGS.ood, "test"):
        images[one.name] = command_line.read("ood", one, FLAGS, size, limit=FLAGS.limit)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(FLAGS.output_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines = compare(detector, images, folder)
        if FLAGS.output_dir:
            command_line.write_text(folder / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
