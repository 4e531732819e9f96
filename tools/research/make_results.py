r"""Make the tables and the figure of the runs of `reproduce_cifar10` and `baselines_cifar10`.

    python -m tools.research.make_results --results=docs/results/short --figure=results.svg

Prints Markdown tables of the runs in a folder: AUROCs; differences from training without negatives
or from `--minus`, paired by seed; sensitivities, and how well they rank strategies. Means are over
the test sets alone: sets that are synthetic (noise) or from the negatives' own source (validation
images of the auxiliary set) are shown beside them but are in no mean. Rank correlations are also
printed with these sets, to show what depends on them. With several seeds there is a 95 % interval
(Student's t).
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
        if record["flags"].get("standardize"):
            strategy += ", standardized"
        others = runs.setdefault(strategy, [])
        if record["flags"]["seed"] in [other["flags"]["seed"] for other in others]:
            raise ValueError(
                f"--results must hold one run of each strategy and seed. Received: {path}, and "
                f"another with seed {record['flags']['seed']} of {strategy}"
            )
        others.append(record)
    if not runs:
        raise ValueError(
            f"--results must hold JSON files of runs. Received: {folder}, which has none"
        )
    return runs


def with_interval(values):
    """Return the mean over seeds, with half the width of its 95 % interval, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.3f}"
    return f"{np.mean(values):.3f} ± {half_width(values):.3f}"


def half_width(values):
    """Return half the width of the 95 % interval of a mean."""
    return stats.t.interval(0.95, len(values) - 1)[1] * stats.sem(values)


def sets_of(runs):
    """Return the names of the sets that are averaged, and of those that are not."""
    first = next(iter(runs.values()))[0]
    tested = first["flags"].get("ood", "cifar100,dtd32,gtsrb32,mnist").split(",")
    if first["flags"].get("sets") == "development":
        tested = [name for name in first["ood"] if name != first["flags"]["auxiliary"]]
    return tested, [name for name in first["ood"] if name not in tested]


def mean_of(record, metric, sets):
    """Return the mean of a metric over OOD sets of one run."""
    return float(np.mean([record["ood"][name][metric] for name in sets]))


def by_auroc(runs):
    """Return the names of strategies, the highest mean AUROC first."""
    tested, _ = sets_of(runs)
    means = {
        name: np.mean([mean_of(r, "auroc", tested) for r in each]) for name, each in runs.items()
    }
    return sorted(means, key=means.get, reverse=True)


def print_ood_table(runs):
    """Print the AUROC of each strategy against each set, and further figures of its runs."""
    tested, alone = sets_of(runs)
    means = ["mean AUROC", "mean FPR95"]
    head = ["", "seeds", "images", *tested, *means, *(f"*{name}*" for name in alone)]
    if "knn" in next(iter(runs.values()))[0]:
        head += ["k-NN", "probe rot90", "positive loss", "negative loss"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for strategy in by_auroc(runs):
        records = runs[strategy]
        aurocs = {
            name: with_interval([r["ood"][name]["auroc"] for r in records])
            for name in (*tested, *alone)
        }
        cells = [strategy, str(len(records)), image_counts(records), *map(aurocs.get, tested)]
        cells += [
            with_interval([mean_of(r, metric, tested) for r in records])
            for metric in ("auroc", "fpr95")
        ]
        cells += map(aurocs.get, alone)
        if "k-NN" in head:
            cells += [with_interval([r["knn"] for r in records])]
            cells += [mean_if_there([r["sensitivity"].get("rot90") for r in records])]
            for loss in ("positive_loss", "negative_loss"):
                cells += [mean_if_there([r["history"].get(loss, [None])[-1] for r in records])]
        print(f"| {' | '.join(cells)} |")


def mean_if_there(values):
    """Return the mean as text, or nothing where a value is missing."""
    return "" if None in values else f"{np.mean(values):.3f}"


def image_counts(records):
    """Return the number of training images, or its range over seeds."""
    counts = sorted({record["images"] for record in records})
    return " to ".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)])


def differences(runs, strategy, sets, baseline):
    """Return a strategy's mean AUROC minus the baseline's for each seed that both have."""
    by_seed = [
        {r["flags"]["seed"]: mean_of(r, "auroc", sets) for r in runs[name]}
        for name in (strategy, baseline)
    ]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    return [by_seed[0][seed] - by_seed[1][seed] for seed in seeds]


def with_pairs(runs, baseline):
    """Return the strategies, the best first, with several runs to subtract the baseline's from."""
    several = [name for name in by_auroc(runs) if len(runs[name]) > 1]
    return [name for name in several if name != baseline] if baseline in several else []


def sets_of_means(runs):
    """Return the sets of each mean: all test sets, then each set alone."""
    tested, alone = sets_of(runs)
    return {"the test sets": tested, **{name: [name] for name in (*tested, *alone)}}


def print_differences(runs, baseline):
    """Print what each strategy with several seeds gains over the baseline."""
    tested, alone = sets_of(runs)
    several = with_pairs(runs, baseline)
    if not several:
        return
    print(f"\nMinus {baseline}, paired by seed:\n")
    print(f"| AUROC over | {' | '.join(several)} |\n|---|{'---|' * len(several)}")
    rows = sets_of_means(runs)
    for count in range(1, len(alone) + 1):
        rows[f"the test sets and {' and '.join(alone[:count])}"] = [*tested, *alone[:count]]
    for title, sets in rows.items():
        cells = [signed(differences(runs, name, sets, baseline)) for name in several]
        print(f"| {title} | {' | '.join(cells)} |")


def signed(values):
    """Return a mean difference with its interval, if there are several values, as text."""
    if len(values) < 2:
        return f"{np.mean(values):+.3f}"
    return f"{np.mean(values):+.3f} ± {half_width(values):.3f}"


def print_sensitivities(runs):
    """Print the sensitivity of each strategy to each probe, and how well they rank."""
    probes = [name for name in (*sensitivity.PROBES, "mean") if measured(runs, name)]
    print(f"\n| | {' | '.join(probes)} |\n|---|{'---|' * len(probes)}")
    for strategy, records in runs.items():
        cells = []
        for probe in probes:
            values = [r["sensitivity"][probe] for r in records if probe in r["sensitivity"]]
            cells.append(with_interval(values) if values else "")
        print(f"| {strategy} | {' | '.join(cells)} |")
    print_rankings({name: runs[name] for name in runs if name in STRATEGIES}, probes)


def measured(runs, probe):
    """Return the names of strategies all of whose runs have a probe."""
    return [name for name, each in runs.items() if all(probe in r["sensitivity"] for r in each)]


def print_rankings(runs, probes):
    """Print the rank correlation of each probe with the mean AUROC over more and more sets."""
    probes = [probe for probe in probes if len(measured(runs, probe)) > 2]
    if not probes:
        return
    tested, alone = sets_of(runs)
    unions = {"test sets": tested}
    for count in range(1, len(alone) + 1):
        unions[f"and {' and '.join(alone[:count])}"] = [*tested, *alone[:count]]
    values = {
        probe: np.array(
            [np.mean([r["sensitivity"].get(probe, np.nan) for r in each]) for each in runs.values()]
        )
        for probe in probes
    }
    aurocs = {
        title: np.array(
            [np.mean([mean_of(r, "auroc", sets) for r in each]) for each in runs.values()]
        )
        for title, sets in unions.items()
    }
    print("\nSpearman's correlation with the mean AUROC over")
    print(
        f"\n| sensitivity to | strategies | {' | '.join(unions)} |\n|---|---|{'---|' * len(unions)}"
    )
    for probe in probes:
        known = np.isfinite(values[probe])
        cells = []
        for title in unions:
            pair = values[probe][known], aurocs[title][known]
            value, low, high = sensitivity.rank_correlation(*pair)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {probe} | {known.sum()} | {' | '.join(cells)} |")
    print(
        f"\nChance that the best of these {len(probes)} ranks as well in a random order:", end=" "
    )
    found = {title: sensitivity.permutation_test(values, one) for title, one in aurocs.items()}
    print("; ".join(f"{title}: {best}, {p:.3f}" for title, (best, _, p) in found.items()))
    single = {
        title: sensitivity.permutation_test({best: values[best]}, aurocs[title])[2]
        for title, (best, _, _) in found.items()
    }
    print(f"For that one alone: {'; '.join(f'{title}: {p:.4f}' for title, p in single.items())}")


def draw(runs, path, baseline):
    """Draw what the tables have: mean AUROCs, and differences from the baseline."""
    tested, alone = sets_of(runs)
    several = [name for name in with_pairs(runs, baseline) if name in STRATEGIES]
    rows = max(len(runs), (len(several) + 0.5) * (1 + len(tested) + len(alone)) if several else 0)
    size = (10 if several else 6, 0.28 * rows + 1.2)
    figure, columns = plt.subplots(1, 1 + bool(several), figsize=size, squeeze=False)
    axes = columns[0]
    draw_means(axes[0], runs, tested)
    if several:
        draw_differences(axes[1], runs, several, baseline)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    plots.save(figure, pathlib.Path(path))


def draw_means(axes, runs, tested):
    """Draw the mean AUROC of each strategy over the test sets, with intervals and single runs."""
    names = by_auroc(runs)[::-1]
    for place, name in enumerate(names):
        values = [mean_of(record, "auroc", tested) for record in runs[name]]
        draw_values(axes, values, place, plots.BLUE)
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.set_xlabel(f"AUROC, mean of {', '.join(tested)}")


def draw_differences(axes, runs, names, baseline):
    """Draw what strategies gain over the baseline, for each set."""
    _, alone = sets_of(runs)
    sets = sets_of_means(runs)
    labels = [f"{name}\n(in no mean)" if name in alone else name for name in sets]
    step = len(names) + 0.5
    for row, name in enumerate(names):
        color = plots.LINE_COLORS[row % len(plots.LINE_COLORS)]
        for place, one in enumerate(sets.values()):
            values = differences(runs, name, one, baseline)
            label = name if place == 0 else None
            draw_values(axes, values, place * step + row, color, label)
    axes.axvline(0, color="0.6", linewidth=1)
    middle = (len(names) - 1) / 2
    axes.set(yticks=[place * step + middle for place in range(len(sets))], yticklabels=labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"AUROC minus {baseline}, paired by seed")
    # Beside the nearest set, where differences are small.
    axes.legend(frameon=False, fontsize="small", loc="upper right", bbox_to_anchor=(1.0, 0.8))


def draw_values(axes, values, place, color, label=None):
    """Draw single runs as points, and the 95 % interval of their mean."""
    axes.plot(values, [place] * len(values), ".", color=color, alpha=0.4)
    width = half_width(values) if len(values) > 1 else None
    axes.errorbar(
        np.mean(values), place, xerr=width, color=color, marker="D", capsize=3, label=label
    )


def main(argv=None):
    """Print the tables, and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="results", help="folder of JSON files")
    parser.add_argument("--figure", help="figure of means and differences to write (.png, .svg)")
    parser.add_argument("--minus", default="none", help="strategy that differences are from")
    settings = parser.parse_args(argv)
    runs = read_runs(settings.results)
    if settings.minus not in {"none", *runs}:
        parser.error(f"--minus must be one of {', '.join(runs)}. Received: {settings.minus}")
    print_ood_table(runs)
    print_differences(runs, settings.minus)
    print_sensitivities(runs)
    if settings.figure:
        draw(runs, settings.figure, settings.minus)


if __name__ == "__main__":
    main()
