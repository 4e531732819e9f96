r"""How far the flagged share may be from the promised rate, by the number of calibration images.

    python examples/solar_cells.py --split_seed=0 --output_dir=solar/0
    python -m tools.research.calibration_curve --output_dir=solar/0 --type=mono

Takes the detector of `examples/solar_cells.py` as it is, and scores the sound cells that it was
not built from (calibration and fresh ones together) and the broken ones. Then it draws some of the
sound cells to calibrate with, a thousand times for each number, and counts how many of the rest,
and of the broken cells, the threshold flags. Prints in Markdown the mean and the range of 95 % of
the draws. All draws are from the same photographs of one split, so that the range is that of the
choice among them.
"""

import pathlib

import keras
import numpy as np

from sddns_tf import calibration, files
from tools.benchmark import inspection


def parser():
    """Return the arguments."""
    found = inspection.cells_parser(__doc__)
    add = found.add_argument
    add("--network", default="frozen", help="whose detector the example wrote")
    add("--rate", type=float, default=0.05, help="promised rate of false alarms")
    add("--counts", default="20,40,60,80,118,150", help="numbers of images to calibrate with")
    add("--draws", type=int, default=1_000, help="for each number of images")
    return found


def scores_of(options):
    """Return the scores of sound cells outside the bank and of broken ones."""
    cells = inspection.cells_of(options)
    folder = pathlib.Path(options.output_dir) / f"{options.type}_{options.network}"
    detector = keras.saving.load_model(folder / "detector.keras")
    return [
        detector.predict(images, verbose=0)["ood_score"]
        for images in (np.concatenate([cells.calibration, cells.fresh]), cells.broken)
    ]


def drawn(sound, broken, count, rate, generator):
    """Return the shares of sound and broken cells that one draw's threshold flags."""
    order = generator.permutation(sound)
    rank = calibration.largest_flagged_rank(count, rate)
    threshold = np.sort(order[:count])[count - rank]
    return np.mean(order[count:] > threshold), np.mean(broken > threshold)


def main(argv=None):
    """Print the table, and write it as JSON next to the detectors."""
    options = parser().parse_args(argv)
    sound, broken = scores_of(options)
    generator = np.random.default_rng(0)
    record = {}
    print("| calibration images | sound flagged | 95 % of draws | broken flagged | 95 % of draws |")
    print("|--:|--:|--:|--:|--:|")
    for count in map(int, options.counts.split(",")):
        shares = [
            drawn(sound, broken, count, options.rate, generator) for _ in range(options.draws)
        ]
        means, ranges = np.mean(shares, axis=0), np.percentile(shares, (2.5, 97.5), axis=0).T
        record[count] = {"mean": means.tolist(), "range": ranges.tolist()}
        cells = [
            text
            for mean, (low, high) in zip(means, ranges, strict=True)
            for text in (f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
        ]
        print(f"| {count} | {' | '.join(cells)} |")
    path = pathlib.Path(options.output_dir) / f"calibration_{options.type}_{options.network}.json"
    files.write_json(path, record)


if __name__ == "__main__":
    main()
