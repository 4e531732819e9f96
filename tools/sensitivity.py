r"""Chooses the shift without labels and without OOD data: trains one model per strategy.

    python tools/sensitivity.py --recipe=cpu_small --data_dir=TFDS --epochs=1 \
        --strategies=rot90:auxiliary,perm4:auxiliary,pixel_perm:auxiliary --output_dir=shifts

A strategy is SHIFT:SOURCE, or none for no negatives; all other flags are those of train.py and the
same for each. Every model is scored on its held-out images against those images put through shifts
that it was not trained on: the mean AUROC is the strategy's sensitivity, the highest is chosen.

With --ood and --test, to check the choice, true AUROCs stand beside it, and Spearman's correlation
of both with its bootstrap interval over strategies.

Prints the table as Markdown. Writes to --output_dir a folder for each strategy, as train.py does,
with its sensitivity.json; results.json and sensitivity.png. The same command goes on where it was
stopped: strategies that are done are not trained again.
"""

import copy
import json
import pathlib

import command_line
import numpy as np
import train
from absl import flags

FLAGS = flags.FLAGS


def define_flags():
    """The flags of train.py, and those of the comparison."""
    train.define_flags()
    flags.DEFINE_list(
        "strategies",
        [f"{shift}:auxiliary" for shift in ("rot90", "rot360", "perm4", "perm16", "pixel_perm")],
        "Strategies to compare, each SHIFT:SOURCE or none.",
    )
    flags.DEFINE_string("test", None, "Source of fresh normal images, for --ood (split: test).")
    flags.DEFINE_list("ood", [], "Sources of OOD images, with commas between (split: test).")
    flags.DEFINE_integer("probe_images", 1000, "Images to score, at most, of each set.", 1)


def strategies():
    """Dict from the name of each strategy to its shift and source."""
    found = {}
    for text in FLAGS.strategies:
        shift, _, source = text.partition(":")
        sources = ("",) if shift == "none" else ("in_distribution", "auxiliary", "both")
        if shift not in train.SHIFTS or source not in sources or text in found:
            raise ValueError(
                f"--strategies must be different ones of SHIFT:SOURCE or none, with SHIFT in "
                f"{train.SHIFTS[:-1]} and SOURCE in ('in_distribution', 'auxiliary', 'both'). "
                f"Received: {','.join(FLAGS.strategies)}"
            )
        found[text] = shift, source or "in_distribution"
    return found


def settings_of(settings, name, shift, source):
    """The settings of one strategy: its shift, its source, a folder of its own."""
    own = copy.copy(settings)
    own.shift, own.source = shift, source
    own.output_dir = str(pathlib.Path(settings.output_dir) / name.replace(":", "-"))
    train.check(own)
    return own


def measure(own):
    """Train one strategy and score it, or read what was found before."""
    import keras

    from sddns_tf import sensitivity

    path = pathlib.Path(own.output_dir) / "sensitivity.json"
    asked = {"ood": FLAGS.ood, "test": FLAGS.test, "probe_images": FLAGS.probe_images}
    if path.exists() and own.resume:
        train.check_same_run(own)
        before = json.loads(path.read_text())
        if before["asked"] == asked:
            return before
    path.unlink(missing_ok=True)
    detector, held_out = train.train(own)
    trained_on = None if own.shift == "none" else own.shift
    found = {
        "asked": asked,
        "sensitivity": sensitivity.sensitivity(
            detector, held_out[: FLAGS.probe_images], trained_on=trained_on, seed=own.seed
        ),
        "auroc": true_aurocs(detector, own),
    }
    command_line.write_json(path, found)
    keras.backend.clear_session()
    return found


def true_aurocs(detector, own):
    """AUROC against each OOD set, by name."""
    from sddns_tf import metrics

    if not FLAGS.ood:
        return {}

    def scores(flag, one):
        size = detector.extractor.resolution
        images = command_line.read(flag, one, own, size, limit=FLAGS.probe_images)
        return detector.predict(images, batch_size=256, verbose=0)["ood_score"]

    normal = scores("test", command_line.source("test", FLAGS.test, "test"))
    return {
        one.name: metrics.ood_metrics(normal, scores("ood", one))["auroc"]
        for one in command_line.sources("ood", FLAGS.ood, "test")
    }


def summary(found):
    """The choice, and how well it could be told: what results.json holds."""
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
        "chosen": max(means, key=means.get),
        "sensitivity": means,
        "mean_auroc": aurocs,
        "spearman": correlation,
        "strategies": found,
    }


def table(results):
    """The summary as Markdown, the most sensitive strategy first."""
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


def main():
    """Train and score each strategy; choose."""
    asked = strategies()
    settings = train.settings_of_flags()
    if FLAGS.ood and not FLAGS.test:
        raise ValueError(f"--ood needs --test. Received: --ood={','.join(FLAGS.ood)} alone")
    command_line.sources("ood", FLAGS.ood, "test")
    own = {name: settings_of(settings, name, *strategy) for name, strategy in asked.items()}

    from sddns_tf import plots, sensitivity

    found = {}
    for name, each in own.items():
        command_line.say(f"Strategy {name} ({len(found) + 1} of {len(own)})")
        found[name] = measure(each)
    results = summary(found)
    output_dir = pathlib.Path(settings.output_dir)
    command_line.write_json(output_dir / "results.json", results)
    figure = sensitivity.bar_chart(results["sensitivity"], results["mean_auroc"])
    plots.save(figure, output_dir / "sensitivity.png")
    print(table(results))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
