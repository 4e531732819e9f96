r"""Put several splits of `examples/solar_cells.py` together, paired by split.

    python examples/solar_cells.py --split_seed=0 --output_dir=solar/0
    python examples/solar_cells.py --split_seed=1 --output_dir=solar/1
    python -m tools.research.inspection_table --runs=solar/0,solar/1

Reads the `results.json` of each folder and, where they are there, `patchcore_TYPE.json` and
`labels_TYPE.json`, which `tools.benchmark.inspection` and `tools.research.with_labels` wrote for
the same split. Prints in Markdown, for each type of cell
and network, the mean AUROC over splits, the difference from `--reference` paired by split with its
95 % interval (Student's t), and how many fresh sound cells of all splits were flagged.

Splits share their photographs, above all the broken cells, which are the same in each. So the
intervals tell how much a figure hangs on the split, not on the choice of the photographs.
"""

import argparse
import json
import pathlib

import numpy as np

from tools.research.make_results import signed

# Beside the example's networks: the beginning of a file's name, and that of its row.
OTHERS = {"patchcore": "PatchCore", "labels": "with labels"}


def parser():
    """Return the arguments."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--runs", required=True, help="folders that the example wrote to, separated by commas")
    add("--reference", default="frozen", help="network to compare the others with")
    return found


def read(folder):
    """Return the figures of one split, by type of cell and network."""
    folder, found = pathlib.Path(folder), {}
    for network, by_kind in json.loads((folder / "results.json").read_text()).items():
        for kind, figures in by_kind.items():
            found[kind, network] = figures
    for file, name in OTHERS.items():
        for path in sorted(folder.glob(f"{file}_*.json")):
            # PatchCore's file has our AUROC first and then its own.
            auroc = np.ravel(json.loads(path.read_text())["auroc"])[-1]
            found[path.stem.partition("_")[2], name] = {"auroc": float(auroc)}
    return found


def flagged(rows):
    """Return the share of all fresh cells of some splits that were flagged, as text."""
    if not all("fresh_flagged" in row for row in rows):
        return ""
    counts = np.array([row["images"][1] for row in rows])
    shares = np.array([row["fresh_flagged"] for row in rows])
    return f"{np.sum(counts * shares) / np.sum(counts):.1%} of {np.sum(counts)}"


def main(argv=None):
    """Print the table."""
    options = parser().parse_args(argv)
    splits = [read(folder) for folder in options.runs.split(",")]
    head = ("cells", "network", "splits", "AUROC", "of each split", f"minus {options.reference}")
    print(f"| {' | '.join(head)} | fresh cells flagged |\n|---|---|--:|--:|---|--:|--:|")
    for kind, network in {key: None for split in splits for key in split}:
        rows = [split[kind, network] for split in splits if (kind, network) in split]
        aurocs = [row["auroc"] for row in rows]
        pairs = [
            split[kind, network]["auroc"] - split[kind, options.reference]["auroc"]
            for split in splits
            if {(kind, network), (kind, options.reference)} <= split.keys()
        ]
        difference = "" if not pairs or network == options.reference else signed(pairs)
        each = ", ".join(f"{auroc:.3f}" for auroc in aurocs)
        print(
            f"| {kind} | {network} | {len(rows)} | {np.mean(aurocs):.3f} | {each} | "
            f"{difference} | {flagged(rows)} |"
        )


if __name__ == "__main__":
    main()
