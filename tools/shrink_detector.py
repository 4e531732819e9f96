r"""Compresses a detector's bank to weighted centres and calibrates it again, with what that costs.

    python tools/shrink_detector.py --detector=results/auxiliary-rot90-0.keras --bank_size=1000 \
        --calibration=tfds:cifar10@test --output=sddns_tf/trained/cifar10-small.keras

Calibrates on every other one of the first 5,000 images of `--calibration`, as
`tools/reproduce_cifar10.py` does, whose detectors it is for.
"""

import json
import os
import pathlib

import command_line
from absl import flags

FLAGS = flags.FLAGS


def define_flags():
    """All flags of the program."""
    flags.DEFINE_string("detector", None, "Detector to compress (.keras).")
    flags.DEFINE_string("calibration", "tfds:cifar10@test", "tfds:NAME@SPLIT of normal images.")
    flags.DEFINE_string("data_dir", None, "Prepared TFDS sets; defaults to $TFDS_DATA_DIR.")
    flags.DEFINE_integer("bank_size", 1000, "Centres to keep.", 1)
    flags.DEFINE_string("output", None, "File to write (.keras).")


def main():
    """Compress, calibrate, write."""
    if not (FLAGS.detector and FLAGS.output):
        raise ValueError("--detector and --output are needed. Received: not both")
    from sddns_tf import Detector, bank, data

    large = command_line.load_keras("detector", FLAGS.detector)
    name, _, split = FLAGS.calibration.partition("@")
    images = data.load_arrays(name, split=split or "test", data_dir=FLAGS.data_dir)[:5000]
    centers, weights = bank.compress(large.bank.numpy(), FLAGS.bank_size)
    small = Detector(
        large.extractor,
        bank_size=len(centers),
        calibration_size=len(images[::2]),
        temperature=large.temperature,
        offset=large.offset,
        k=large.k,
    )
    small.bank.assign(centers)
    small.bank_weights.assign(weights)
    small.recalibrate(images[::2], false_positive_rate=large.false_positive_rate, verbose=0)
    target = pathlib.Path(FLAGS.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.partial.keras")
    small.save(unfinished)
    os.replace(unfinished, target)
    flagged = float(small.predict(images[1::2], verbose=0)["is_ood"].mean())
    record = {"path": str(target), "bytes": target.stat().st_size, "fresh_flagged": flagged}
    print(json.dumps(record))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
