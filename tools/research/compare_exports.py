r"""Compare the TFLite variants of a detector: size, AUROC, and share of normal images flagged.

    python -m tools.research.compare_exports --detector=sddns_tf/trained/cifar10-small.keras \
        --calibration=tfds:cifar10@test[:5000] --test=tfds:cifar10@test[5000:] \
        --ood=tfds:cifar100,tfds:dtd32

Exports the detector in float32, float16, dynamic and int8 with a compressed bank, and calibrates
each file with --calibration. Scores --test (normal images not used for anything else) and each OOD
set with the files, and prints a Markdown table with the detector's own figures in the first row.
With --output_dir the files and the table are kept.
"""

import argparse
import contextlib
import pathlib
import tempfile

import keras
import numpy as np

import sddns_tf
from sddns_tf import files, metrics
from sddns_tf.cli import sources

VARIANTS = ("float32", "float16", "dynamic", "int8")


def parse(argv):
    """Return settings of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--detector", required=True, help="detector to export (.keras)")
    add(
        "--calibration",
        required=True,
        help="source of the images that it was calibrated with (split: test)",
    )
    add("--test", required=True, help="source of fresh normal images (split: test)")
    add("--ood", required=True, help="sources of OOD images, separated by commas (split: test)")
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--limit", type=int, default=2000, help="largest number of images to score per set")
    add("--tflite_bank_size", type=int, default=1000, help="largest number of rows in the bank")
    add("--output_dir", help="folder to write to; by default nothing is kept")
    return parser.parse_args(argv)


def tflite_answers(path, images):
    """Return the OOD scores and decisions of a file, in batches of 50 images."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    answers = [runner(images=images[i : i + 50]) for i in range(0, len(images), 50)]
    return {key: np.concatenate([one[key] for one in answers]) for key in ("ood_score", "is_ood")}


def row(name, path, predict, test, ood):
    """Return a line of the table: name, MB, AUROC of each set, share of normal images flagged."""
    normal = predict(test)
    cells = [f"{pathlib.Path(path).stat().st_size / 1e6:.2f}"]
    for images in ood.values():
        found = metrics.ood_metrics(normal["ood_score"], predict(images)["ood_score"])
        cells.append(f"{found['auroc']:.4f}")
    return f"| {name} | {' | '.join(cells)} | {normal['is_ood'].mean():.4f} |"


def rows(settings, detector, calibration, test, ood, folder):
    """Write the files to `folder`, and yield the lines of the table."""
    name = f"the detector, bank of {detector.bank.shape[0]:,}"
    yield row(name, settings.detector, lambda x: detector.predict(x, verbose=0), test, ood)
    for variant in VARIANTS:
        path = sddns_tf.export.tflite(
            detector,
            folder / f"{variant}.tflite",
            quantization=None if variant == "float32" else variant,
            calibration_images=calibration,
            representative_images=calibration[:256],
            bank_size=settings.tflite_bank_size,
            verbose=0,
        )
        yield row(variant, path, lambda x, path=path: tflite_answers(path, x), test, ood)


def main(argv=None):
    """Read the images, compare the variants, print the table."""
    settings = parse(argv)
    detector = keras.models.load_model(settings.detector)
    shape = sources.seen_by(detector)

    def read(option, source, limit=settings.limit):
        return sources.read(option, source, data_dir=settings.data_dir, limit=limit, **shape)

    calibration = read(
        "calibration", sources.parse("calibration", settings.calibration, "test"), limit=None
    )
    test = read("test", sources.parse("test", settings.test, "test"))
    ood = {
        source.name: read("ood", source)
        for source in sources.parse_list("ood", [settings.ood], "test")
    }
    lines = [
        "| | MB | " + " | ".join(ood) + " | normal images flagged |",
        "|---|---|" + "---|" * (len(ood) + 1),
    ]
    print("\n".join(lines))
    with contextlib.ExitStack() as stack:
        folder = settings.output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        for line in rows(settings, detector, calibration, test, ood, pathlib.Path(folder)):
            print(line, flush=True)
            lines.append(line)
        files.write_text(pathlib.Path(folder) / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
