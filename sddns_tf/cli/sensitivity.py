r"""Choose the shift without labels and without OOD data: train one model per strategy.

    sddns sensitivity --recipe=cpu_small --data_dir=TFDS --epochs=1 \
        --strategies=rot90:auxiliary,perm4:auxiliary,pixel_perm:auxiliary --output_dir=shifts

A strategy is SHIFT:SOURCE, or none for no negatives. All other options are those of `sddns train`
and apply to every strategy. Each model is scored on its held-out images and on the same images
transformed by shifts that it was not trained on. The mean AUROC between the two is the sensitivity
of the strategy, and the strategy with the highest sensitivity is chosen.

With --ood and --test the choice can be checked: the table then also has the true AUROCs, and
Spearman's correlation of the two with a bootstrap interval over strategies.

Prints the table as Markdown. Writes results.json and sensitivity.png to --output_dir, and a folder
for each strategy with the files of `sddns train` and sensitivity.json. If the command was stopped,
run it again: strategies that are done are not trained again.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np

from sddns_tf import files
from sddns_tf.cli import quiet, sources, train
from sddns_tf.cli.console import Parser, positive_int, say
from sddns_tf.cli.errors import UsageError

if TYPE_CHECKING:
    from sddns_tf.cli.training import Place

STRATEGIES = ",".join(
    f"{shift}:auxiliary" for shift in ("rot90", "rot360", "perm4", "perm16", "pixel_perm")
)
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
    group.add_argument("--epochs", metavar="N", type=positive_int, help="Epochs per strategy.")
    group.add_argument("--output_dir", metavar="FOLDER", help="Folder to write to.")
    group = parser.group("check of the choice")
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
    return found


def configuration_of(options: Namespace, shift: str, source: str) -> dict[str, Any]:
    """Return the resolved configuration of one strategy."""
    from sddns_tf.cli import configuration

    config = train.configuration_of(options)
    negatives = None if shift == "none" else {"shift": shift, "source": source}
    return configuration.resolve(config, [("negatives", negatives)])


def measure(name: str, config: dict[str, Any], place: Place, options: Namespace) -> dict[str, Any]:
    """Train and score one strategy, or read the results if that was done earlier."""
    import keras

    from sddns_tf import sensitivity
    from sddns_tf.cli import training

    path = pathlib.Path(place.output_dir) / "sensitivity.json"
    asked = {"ood": options.ood, "test": options.test, "probe_images": options.probe_images}
    if path.exists() and place.resume:
        training.check_same_run(config, place.output_dir)
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["asked"] == asked:
            say(f"Strategy {name} was done earlier")
            return before
    path.unlink(missing_ok=True)
    detector, images = training.train(config, place)
    negatives = config["negatives"]
    found = {
        "asked": asked,
        "sensitivity": sensitivity.sensitivity(
            detector,
            images.calibration[: options.probe_images],
            trained_on=negatives and negatives["shift"],
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
        **sources.seen_by(detector),
    }

    def scores(option: str, source: sources.Source) -> np.ndarray:
        images = sources.read(option, source, **reading)
        return detector.predict(images, batch_size=256, verbose=0)["ood_score"]

    if not options.ood:
        return {}
    normal = scores("test", sources.parse("test", options.test, "test"))
    return {
        source.name: metrics.ood_metrics(normal, scores("ood", source))["auroc"]
        for source in sources.parse_list("ood", options.ood, "test")
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of results.json: the choice, the sensitivities and their check."""
    from sddns_tf import sensitivity

    means = {name: one["sensitivity"]["mean"] for name, one in found.items()}
    aurocs = {
        name: float(np.mean(list(one["auroc"].values())))
        for name, one in found.items()
        if one["auroc"]
    }
    correlation = None
    if len(aurocs) > 2:
        values = sensitivity.rank_correlation(
            list(means.values()), [aurocs[name] for name in means]
        )
        correlation = dict(zip(("value", "low", "high"), values, strict=True))
    return {
        "chosen": max(means, key=lambda name: means[name]),
        "sensitivity": means,
        "mean_auroc": aurocs,
        "spearman": correlation,
        "strategies": found,
    }


def table(results: dict[str, Any]) -> str:
    """Return the summary as Markdown, the most sensitive strategy first."""
    names = sorted(results["sensitivity"], key=results["sensitivity"].get, reverse=True)
    sets = list(next(iter(results["strategies"].values()))["auroc"])
    head = ["strategy", "sensitivity", *(["mean AUROC"] if sets else []), *sets]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in names:
        true = results["strategies"][name]["auroc"]
        values = [results["sensitivity"][name]]
        values += [results["mean_auroc"][name], *true.values()] if sets else []
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", f"Chosen: {results['chosen']}"]
    if correlation := results["spearman"]:
        lines.append(
            f"Spearman's correlation of sensitivity and mean AUROC: {correlation['value']:.2f} "
            f"(95 % interval over strategies {correlation['low']:.2f} to {correlation['high']:.2f})"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Train and score each strategy, then choose one."""
    options = parser().parse_args(argv)
    asked = strategies(options.strategies)
    if options.ood and not options.test:
        raise UsageError(f"--ood needs --test. Received: only --ood={','.join(options.ood)}")
    sources.parse_list("ood", options.ood, "test")
    quiet.import_tensorflow()

    from sddns_tf import plots, sensitivity
    from sddns_tf.cli import training

    place = train.place_of(options)
    configs = {name: configuration_of(options, *strategy) for name, strategy in asked.items()}
    for config in configs.values():
        training.check(config)  # before anything slow
    output_dir = pathlib.Path(place.output_dir).expanduser()
    found: dict[str, Any] = {}
    for name, config in configs.items():
        say(f"Strategy {name} ({len(found) + 1} of {len(configs)})")
        own = place._replace(output_dir=str(output_dir / name.replace(":", "-")))
        found[name] = measure(name, config, own, options)
    results = summary(found)
    files.write_json(output_dir / "results.json", results)
    if importlib.util.find_spec("matplotlib"):
        figure = sensitivity.bar_chart(results["sensitivity"], results["mean_auroc"])
        plots.save(figure, output_dir / "sensitivity.png")
    else:
        say("Skipping sensitivity.png, which needs matplotlib: pip install sddns_tf[plots]")
    print(table(results))
