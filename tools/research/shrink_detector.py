r"""Compress a detector's bank to weighted centers and recalibrate it.

    python -m tools.research.shrink_detector --detector=results/auxiliary-rot90-0.keras \
        --bank_size=1000 --output=sddns_tf/trained/cifar10-small.keras

This is for detectors that `reproduce_cifar10` wrote, and uses the same calibration images. Prints
the size of the file and the share of fresh normal images flagged.
"""

import argparse
import json
import pathlib

import keras

from tools.research import cifar10


def main(argv=None):
    """Compress the detector, recalibrate it, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detector", required=True, help="detector to compress (.keras)")
    parser.add_argument(
        "--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR"
    )
    parser.add_argument(
        "--in_distribution", default="cifar10", help="TFDS data set of normal images"
    )
    parser.add_argument("--bank_size", type=int, default=1000, help="centers to keep")
    parser.add_argument("--output", required=True, help="file to write (.keras)")
    settings = parser.parse_args(argv)
    calibration, fresh = cifar10.read_held_out(settings)
    small = keras.models.load_model(settings.detector).compressed(settings.bank_size)
    small.recalibrate(calibration, verbose=0)
    path = pathlib.Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path)
    flagged = float(small.predict(fresh, verbose=0)["is_ood"].mean())
    record = {"path": str(path), "bytes": path.stat().st_size, "fresh_flagged": flagged}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
