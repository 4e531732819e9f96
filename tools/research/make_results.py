r"""Make the tables and the figure of the runs of `reproduce_cifar10` and `baselines_cifar10`.

    python -m tools.research.make_results --results=docs/results --figure=docs/images/results.svg

Prints Markdown tables. The first has the AUROC of each strategy against each OOD set, the mean
AUROC and the mean FPR at 95 %. For several seeds it shows the mean with its 95 % interval
(Student's t). The others have the sensitivities, and the rank correlation of each probe, and of
their mean, with the mean AUROC.
"""

import argparse
import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from sddns_tf import plots, sensitivity
from tools.research.reproduce_cifar10 import STRATEGIES


def read_runs(folder):
    """Return the records of each strategy, a list over its seeds."""
    runs = {}
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        record = json.loads(path.read_text())
        strategy = record["flags"]["strategy"]
        if record["flags"].get("auxiliary_overlap"):
            strategy += ", overlap kept"
        runs.setdefault(strategy, []).append(record)
    if not runs:
        raise ValueError(
            f"--results must hold JSON files of runs. Received: {folder}, which has none"
        )
    return runs


def with_interval(values):
    """Return the mean over seeds, with half of the width of its 95 % interval, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.3f}"
    half = stats.t.interval(0.95, len(values) - 1)[1] * stats.sem(values)
    return f"{np.mean(values):.3f} ± {half:.3f}"


def mean_of(record, metric):
    """Return the mean of a metric over the OOD sets of one run."""
    return sum(row[metric] for row in record["ood"].values()) / len(record["ood"])


def print_ood_table(runs):
    """Print the AUROC of each strategy against each OOD set."""
    names = list(next(iter(runs.values()))[0]["ood"])
    print("| | seeds | images | " + " | ".join(names) + " | mean AUROC | mean FPR95 |")
    print("|---|---|---|" + "---|" * (len(names) + 2))
    means = {name: sum(mean_of(r, "auroc") for r in rs) / len(rs) for name, rs in runs.items()}
    order = sorted(means, key=means.get, reverse=True)
    for strategy in order:
        records = runs[strategy]
        cells = [with_interval([r["ood"][name]["auroc"] for r in records]) for name in names]
        cells += [with_interval([mean_of(r, key) for r in records]) for key in ("auroc", "fpr95")]
        images = round(sum(r["images"] for r in records) / len(records))
        print(f"| {strategy} | {len(records)} | {images:,} | " + " | ".join(cells) + " |")


def print_sensitivities(runs):
    """Print the sensitivity of each strategy to each probe, and the rank correlations."""
    print("\n| | " + " | ".join([*sensitivity.PROBES, "mean"]) + " |")
    print("|---|" + "---|" * (len(sensitivity.PROBES) + 1))
    for strategy, records in runs.items():
        cells = []
        for probe in (*sensitivity.PROBES, "mean"):
            values = [r["sensitivity"][probe] for r in records if probe in r["sensitivity"]]
            cells.append(with_interval(values) if values else "")
        print(f"| {strategy} | " + " | ".join(cells) + " |")
    strategies = [r for name, r in runs.items() if name in STRATEGIES]
    print("\n| sensitivity to | strategies | rank correlation with mean AUROC |\n|---|---|---|")
    for probe in (*sensitivity.PROBES, "mean"):
        pairs = [
            (
                np.mean([r["sensitivity"][probe] for r in records]),
                np.mean([mean_of(r, "auroc") for r in records]),
            )
            for records in strategies
            if all(probe in r["sensitivity"] for r in records)
        ]
        if len(pairs) >= 3:
            value, low, high = sensitivity.rank_correlation(*zip(*pairs, strict=True))
            print(f"| {probe} | {len(pairs)} | {value:.2f} ({low:.2f} to {high:.2f}) |")


def draw(runs, path):
    """Draw a bar chart of the mean AUROC of each strategy."""
    means = {
        name: sum(mean_of(r, "auroc") for r in records) / len(records)
        for name, records in runs.items()
    }
    names = sorted(means, key=means.get)
    figure, axes = plt.subplots(figsize=(6, 0.4 * len(names) + 1))
    axes.barh(names, [means[name] for name in names])
    axes.set(xlim=(0.4, 1.0), xlabel="mean AUROC over the OOD sets")
    figure.tight_layout()
    plots.save(figure, pathlib.Path(path))


def main(argv=None):
    """Print the tables, and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="results", help="folder of JSON files")
    parser.add_argument("--figure", help="bar chart of the mean AUROCs to write (.png, .svg)")
    settings = parser.parse_args(argv)
    runs = read_runs(settings.results)
    print_ood_table(runs)
    print_sensitivities(runs)
    if settings.figure:
        draw(runs, settings.figure)


if __name__ == "__main__":
    main()
