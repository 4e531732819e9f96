r"""Choose the shift without labels and without OOD data: train one model per strategy.

    sddns sensitivity --recipe=cpu_small --data_dir=TFDS --epochs=1 \
        --strategies=none,rot90:auxiliary,rot360:auxiliary --output_dir=shifts

A strategy is SHIFT:SOURCE, or none for no negatives. All other options are those of `sddns train`
and apply to every strategy. Each is trained --runs times, with seeds that all strategies share.
Each model is scored on the central squares of its held-out images and on the same squares
transformed by the probes. These are the shifts whose family (rotations; permutations) no strategy
trains on. The AUROC between the two, averaged over probes and runs, is the sensitivity of the
strategy.

A strategy is chosen only if there are at least two probes and its lead is larger than chance.
Otherwise the command says why not, and the table only ranks the strategies.

With --ood and --test the choice can be checked: the table then also has the true AUROCs. Below it
is how well the best of all probes and their mean ranks the strategies, and the chance that the best
of that many would do as well if the order were random.

Prints the table as Markdown. Writes results.json and sensitivity.png to --output_dir, and a folder
for each run, STRATEGY/SEED, with the files of `sddns train` and sensitivity.json. If the command
was stopped, run it again: finished runs are not repeated.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sddns_tf import files
from sddns_tf.cli import sources, starting, train
from sddns_tf.cli.console import Parser, positive_int, say
from sddns_tf.cli.errors import UsageError, user_input

if TYPE_CHECKING:
    from sddns_tf.cli.training import Place

STRATEGIES = "none,rot90:in_distribution,rot90:auxiliary,rot90:both"
_SOURCES = ("in_distribution", "auxiliary", "both")


def parser() -> Parser:
    """Return the options of the comparison and those of `sddns train`."""
    parser = Parser("sensitivity", __doc__)
    group = parser.group("what most people need")
    group.add_argument(
        "--data", metavar="SOURCE", help="Source of the normal images to train on (split: train)."
    )
    group.add_argument(
        "--auxiliary",
        metavar="SOURCE",
        help="Source of unrelated images to make negatives from (split: train).",
    )
    group.add_argument(
        "--strategies",
        metavar="LIST",
        default=STRATEGIES,
        help=f"Strategies to compare, each SHIFT:SOURCE or none. Default: {STRATEGIES}.",
    )
    group.add_argument(
        "--runs",
        metavar="N",
        type=positive_int,
        default=3,
        help="Runs of each strategy, with seeds from --seed on. One run is not enough to choose.",
    )
    group.add_argument("--epochs", metavar="N", type=positive_int, help="Epochs per run.")
    group.add_argument("--output_dir", metavar="FOLDER", help="Folder to write to.")
    group = parser.group("checking the choice")
    group.add_argument(
        "--test", metavar="SOURCE", help="Source of fresh normal images, for --ood (split: test)."
    )
    group.add_argument(
        "--ood",
        metavar="SOURCE",
        action="append",
        default=[],
        help="Sources of OOD images, separated by commas (split: test). May be repeated.",
    )
    group.add_argument(
        "--probe_images",
        metavar="N",
        type=positive_int,
        default=1000,
        help="Largest number of images to score from each set.",
    )
    train.add_recipe_options(parser)
    train.add_training_options(parser)
    group = parser.group("network")
    group.add_argument(
        "--image_size", metavar="N", type=positive_int, help="Side of the network's input."
    )
    return parser


def strategies(text: str) -> dict[str, tuple[str, str]]:
    """Parse the value of `--strategies`.

    Args:
        text: `SHIFT:SOURCE` or `none`, separated by commas.

    Returns:
        Dictionary from the name of each strategy to its shift and source.

    Raises:
        UsageError: If a strategy does not exist or is repeated.
    """
    found: dict[str, Any] = {}
    for name in text.split(","):
        shift, _, source = name.partition(":")
        expected = ("",) if shift == "none" else _SOURCES
        if shift not in train.SHIFTS or source not in expected or name in found:
            raise UsageError(
                "--strategies must be a list without repetition of SHIFT:SOURCE or none, with "
                f"SHIFT one of {train.SHIFTS[:-1]} and SOURCE one of {_SOURCES}. Received: {text}"
            )
        found[name] = shift, source or "in_distribution"
    if len(found) < 2:
        raise UsageError(f"--strategies must name two or more to compare. Received: {text}")
    return found


def probes_of(asked: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """Return the names of the probes by which strategies can be compared.

    Raises:
        UsageError: If there are none.
    """
    from sddns_tf import sensitivity

    left = sensitivity.untouched(shift for shift, _ in asked.values() if shift != "none")
    probes = tuple(probe for probe in sensitivity.PROBES if probe in left)
    if not probes:
        raise UsageError(
            f"--strategies must leave one of {sensitivity.PROBES} that none trains on, nor on one "
            f"of its family, {sensitivity.FAMILIES}. Received: {','.join(asked)}"
        )
    return probes


def configuration_of(options: Namespace, shift: str, source: str, run: int) -> dict[str, Any]:
    """Return the resolved configuration of one run of one strategy."""
    from sddns_tf.cli import configuration

    for text in options.set:
        if text.startswith("negatives"):
            raise UsageError(f"--strategies names the negatives. Received: --set={text}")
    config = train.configuration_of(options)
    negatives = None if shift == "none" else {"shift": shift, "source": source}
    settings = [("negatives", negatives), ("seed", config["seed"] + run)]
    return configuration.resolve(config, settings)


def measure(
    config: dict[str, Any], place: Place, options: Namespace, probes: tuple[str, ...]
) -> dict[str, Any]:
    """Train and score one run, or read the results if that was done earlier."""
    import keras

    from sddns_tf import sensitivity, shifts
    from sddns_tf.cli import earlier, training

    path = pathlib.Path(place.output_dir) / "sensitivity.json"
    asked = {"ood": options.ood, "test": options.test, "probe_images": options.probe_images}
    # What the detector is like may change without training again.
    asked |= {"probes": list(probes), "detector": json.loads(json.dumps(config["detector"]))}
    if path.exists() and place.resume:
        earlier.check_same_run(config, place.output_dir)
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["asked"] == asked:
            say("Already done")
            return before
    path.unlink(missing_ok=True)
    detector, images = training.train(config, place)
    found = {
        "asked": asked,
        "sensitivity": sensitivity.sensitivity(
            detector,
            shifts.central_squares(images.calibration[: options.probe_images]),
            probes=probes,
            seed=config["seed"],
        ),
        "auroc": true_aurocs(detector, options),
    }
    files.write_json(path, found)
    keras.backend.clear_session()
    return found


def true_aurocs(detector: Any, options: Namespace) -> dict[str, float]:
    """Return the AUROC against each OOD set, by name."""
    from sddns_tf import metrics

    reading = {
        "data_dir": options.data_dir,
        "limit": options.probe_images,
        "on_error": options.on_error or "raise",
        **sources.seen_by(detector),
    }

    def scores(option: str, source: sources.Source) -> np.ndarray:
        images = sources.read(option, source, **reading)
        return detector.predict(images, verbose=0)["ood_score"]

    if not options.ood:
        return {}
    normal = scores("test", sources.parse("test", options.test, "test"))
    return {
        source.name: metrics.ood_metrics(normal, scores("ood", source))["auroc"]
        for source in sources.parse_list("ood", options.ood, "test")
    }


def summary(found: dict[str, list[dict[str, Any]]], probes: tuple[str, ...]) -> dict[str, Any]:
    """Return the contents of results.json: the choice or the doubts, and the ranking's check."""
    from sddns_tf import sensitivity

    measured = {name: [run["sensitivity"] for run in runs] for name, runs in found.items()}
    compared = sensitivity.compare(measured, probes)
    aurocs = {
        name: mean_over(runs, lambda run: np.mean(list(run["auroc"].values())))
        for name, runs in found.items()
        if runs[0]["auroc"]
    }
    return {
        "chosen": compared.chosen,
        "doubts": compared.doubts,
        "probes": list(probes),
        "sensitivity": compared.means,
        "differences": compared.differences,
        "mean_auroc": aurocs,
        "ranking": ranking(measured, aurocs) if len(aurocs) > 2 else None,
        "strategies": found,
    }


def ranking(measured: dict[str, list[dict[str, float]]], aurocs: dict[str, float]) -> Any:
    """Return how well the best probe ranks strategies, or None if no probe tells them apart."""
    from sddns_tf import sensitivity

    definitions = {
        probe: [mean_over(runs, lambda run, probe=probe: run[probe]) for runs in measured.values()]
        for probe in next(iter(measured.values()))[0]
    }
    tell_apart = {probe: values for probe, values in definitions.items() if np.ptp(values) > 0}
    if not tell_apart:
        return None
    best, value, p_value = sensitivity.permutation_test(
        tell_apart, [aurocs[name] for name in measured]
    )
    return {"best": best, "spearman": value, "p_value": p_value, "definitions": len(definitions)}


def mean_over(runs: list[Any], value: Callable) -> float:
    """Return the mean of a value over runs."""
    return float(np.mean([value(run) for run in runs]))


def table(results: dict[str, Any]) -> str:
    """Return the summary as Markdown, the most sensitive strategy first."""
    strategies = results["strategies"]
    sets = list(next(iter(strategies.values()))[0]["auroc"])
    head = ["strategy", "runs", "sensitivity", *results["probes"]]
    head += ["mean AUROC", *sets] if sets else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, value in results["sensitivity"].items():
        runs = strategies[name]
        values = [value]
        values += [mean_over(runs, lambda r, p=p: r["sensitivity"][p]) for p in results["probes"]]
        values += [results["mean_auroc"][name]] if sets else []
        values += [mean_over(runs, lambda r, s=s: r["auroc"][s]) for s in sets]
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {len(runs)} | {cells} |")
    first = next(iter(results["sensitivity"]))
    lines += [""]
    lines += [
        f"{first} minus {other}: {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        for other, (mean, low, high) in results["differences"].items()
    ]
    lines += [f"Chosen: {results['chosen']}"] if results["chosen"] else []
    if check := results["ranking"]:
        lines += [
            f"Best of {check['definitions']} rankings of the mean AUROC: {check['best']}, "
            f"Spearman's correlation {check['spearman']:.2f}; in a random order the best would "
            f"reach that with probability {check['p_value']:.2f}"
        ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Train and score each strategy, then choose one or say why none is chosen."""
    options = parser().parse_args(argv)
    asked = strategies(options.strategies)
    if options.ood and not options.test:
        raise UsageError(f"--ood needs --test. Received: only --ood={','.join(options.ood)}")
    sources.parse_list("ood", options.ood, "test")
    if options.strategy == "multi_worker":
        raise UsageError(
            "--strategy must be auto, mirrored or none here, because one machine compares; run "
            "`sddns train` for each strategy on several. Received: multi_worker"
        )
    starting.import_tensorflow()

    from sddns_tf import plots, sensitivity
    from sddns_tf.cli import earlier, training

    place, probes = train.place_of(options), probes_of(asked)
    runs = {
        (name, number): configuration_of(options, *strategy, number)
        for name, strategy in asked.items()
        for number in range(options.runs)
    }
    for config in runs.values():
        training.check(config)  # before anything slow
    output_dir = pathlib.Path(place.output_dir).expanduser()
    with user_input("output_dir", OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
    with earlier.alone(output_dir):
        for done, ((name, _), config) in enumerate(runs.items(), 1):
            say(f"Strategy {name}, seed {config['seed']} ({done} of {len(runs)})")
            folder = output_dir / name.replace(":", "-") / str(config["seed"])
            own = place._replace(output_dir=str(folder))
            found[name].append(measure(config, own, options, probes))
        results = summary(found, probes)
        files.write_json(output_dir / "results.json", results)
    if importlib.util.find_spec("matplotlib"):
        figure = sensitivity.bar_chart(results["sensitivity"], results["mean_auroc"])
        plots.save(figure, output_dir / "sensitivity.png")
    else:
        say("Skipping sensitivity.png, which needs matplotlib: pip install sddns_tf[plots]")
    print(table(results))
    if results["doubts"]:
        say(f"WARNING: No strategy is chosen: {'; '.join(results['doubts'])}")
    check = results["ranking"]
    if check and check["p_value"] > 0.05:
        say("WARNING: No evidence that these sensitivities rank the true AUROCs")
