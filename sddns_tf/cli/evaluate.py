r"""Measure how well a detector tells normal images from others.

    sddns evaluate --model=parts/detector.keras --test=folder:photos/good_fresh \
        --ood=scratched=folder:photos/scratched,npz:photos.npz --output_dir=parts/evaluation

Reports AUROC, AUPR, FPR95 and the share of images above the calibrated threshold for every set,
each with a 95 % interval, and the k-NN accuracy of the features if --data and --test have labels.
--test must hold images that were used neither for training nor for calibration.

--model may also be a training model or a backbone (model.keras, backbone.keras). A detector is then
made from it with --data and --calibration.

Prints the table as Markdown. Writes table.md, table.csv, results.json and report.html to
--output_dir. The report is one self-contained page with charts, galleries and the configuration.

For a local detector, --masks=FOLDER also measures how well its maps show the damage: pixel AUROC,
AUPRO up to 30 % false positives, and the share of each damaged region above the threshold. FOLDER
has a folder for each OOD set; the mask of 000.png is 000_mask.png or 000.png in it, and is black
except where the damage is. MVTec AD's ground_truth folders are like this. To read a whole folder in
that layout:

    sddns evaluate --model=bottle.keras --test=mvtec:bottle --output_dir=evaluation
"""

from __future__ import annotations

import pathlib
import tempfile
from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np

from sddns_tf import files
from sddns_tf.cli import configuration, detectors, sources, starting
from sddns_tf.cli.console import (
    Parser,
    natural_int,
    positive_int,
    require,
    say,
    share,
    size,
    verbose,
)
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.scorers import load_keras


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("evaluate", __doc__)
    group = parser.group("what most people need")
    group.add_argument(
        "--model", metavar="FILE", help="Detector, training model or backbone (.keras)."
    )
    group.add_argument(
        "--test", metavar="SOURCE", help="Source of fresh normal images (split: test)."
    )
    group.add_argument(
        "--ood",
        metavar="SOURCE",
        action="append",
        default=[],
        help="Sources of OOD images, separated by commas; NAME=SOURCE names one (split: test). "
        "May be repeated.",
    )
    group.add_argument(
        "--masks",
        metavar="FOLDER",
        help="Masks of the damage, in a folder for each OOD set that is a folder.",
    )
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="Source of the training images (split: train), for the k-NN accuracy and, if --model "
        "is not a detector, for the bank.",
    )
    group.add_argument("--output_dir", metavar="FOLDER", help="Folder to write to.")
    group = parser.group("images")
    group.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR.",
    )
    group.add_argument(
        "--limit", metavar="N", type=positive_int, help="Score at most N images of each set."
    )
    sources.add_on_error(group)
    group = parser.group("detector")
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="Source of normal images that were not trained on, to recalibrate the threshold with "
        "(split: test).",
    )
    group.add_argument(
        "--false_positive_rate",
        metavar="SHARE",
        type=share,
        help="Largest share of normal images to flag.",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="detector.KEY=VALUE",
        help="Set an argument of `Detector.from_images`, such as detector.k=10, if --model is not "
        "a detector. May be repeated.",
    )
    group.add_argument(
        "--resize",
        choices=("squash", "crop"),
        help="How images of another aspect ratio are resized, if --model is not a detector: squash "
        "distorts them, crop cuts off the sides. Default: as the run in the model's folder did, "
        "otherwise squash.",
    )
    group.add_argument(
        "--resolution",
        metavar="SIZE",
        type=size,
        help="SIDE or HEIGHT,WIDTH to which images are resized when read, if --model is not a "
        "detector. Default: as the run in the model's folder did, otherwise the network's input "
        "for a folder and the size they have for others.",
    )
    group.add_argument("--seed", metavar="N", type=natural_int, default=0, help="Random seed.")
    group = parser.group("report")
    group.add_argument(
        "--resamples",
        metavar="N",
        type=positive_int,
        default=1000,
        help="Number of bootstrap resamples.",
    )
    group.add_argument(
        "--gallery_size",
        metavar="N",
        type=positive_int,
        default=12,
        help="Approximate number of images in a gallery.",
    )
    group.add_argument("--title", metavar="TEXT", help="Title of the report.")
    return parser


def load_detector(options: Namespace) -> Any:
    """Return the detector in --model, or one made from the backbone in it."""
    import sddns_tf

    model = load_keras("model", options.model)
    if not isinstance(model, sddns_tf.Detector):
        require(options, "data", "calibration")
        return make_detector(model, options)
    for option in ("set", "resize", "resolution"):
        if given := getattr(options, option):
            given = given[0] if option == "set" else given
            raise UsageError(
                f"--{option} takes a --model that is not a detector: model.keras or backbone.keras "
                f"of a run. Received: --{option}={given}"
            )
    if options.calibration:
        source = sources.parse("calibration", options.calibration, "test")
        images = sources.read("calibration", source, **reading(options, **sources.seen_by(model)))
        with user_input("calibration"):
            model.recalibrate(images, options.false_positive_rate, verbose=verbose())
    elif options.false_positive_rate is not None:
        with user_input("false_positive_rate"):
            model.recalibrate(false_positive_rate=options.false_positive_rate)
    return model


def reading(options: Namespace, **more: Any) -> dict[str, Any]:
    """Return options of `sources.read`."""
    return {"data_dir": options.data_dir, "on_error": options.on_error or "raise", **more}


def make_detector(model: Any, options: Namespace) -> Any:
    """Return a detector made from a training model or a backbone."""
    import sddns_tf

    trained = model if isinstance(model, sddns_tf.SelfDistillation) else None
    settings = [configuration.parse_setting(text) for text in options.set]
    chosen = "detector.standardize" in dict(settings)
    if not chosen:
        standardize = trained is not None and trained.standardizes_features
        settings.append(("detector.standardize", standardize))
    for key, value in settings:
        if not key.startswith("detector."):
            raise UsageError(f"--set must be detector.KEY=VALUE here. Received: {key}={value}")
    if options.false_positive_rate is not None:
        settings.append(("detector.false_positive_rate", options.false_positive_rate))
    config = configuration.resolve({}, settings)
    if trained is None and not chosen and config["detector"]["layers"] is None:
        say(
            "Features are compared as they are. A backbone that was trained with balanced targets, "
            "as by default, needs --set=detector.standardize=true; model.keras knows it by itself"
        )
    source = sources.parse("data", options.data, "train")
    how = reading(options, **training_sizes(trained, source, options))
    bank = sources.read("data", source, **how)
    source = sources.parse("calibration", options.calibration, "test")
    calibration = sources.read("calibration", source, **{**how, "image_size": bank.shape[1:3]})
    given = {}
    if trained is not None:
        input_size = detectors.input_size(trained, bank.shape[1:3])
        given = {"mean": trained.mean, "std": trained.std, "image_size": input_size}
    with user_input():
        return sddns_tf.Detector.from_images(
            model if trained is None else trained.teacher_backbone,
            bank_images=bank,
            calibration_images=calibration,
            resize=how["resize"],
            seed=options.seed,
            verbose=verbose(),
            **given,
            **config["detector"],
        )


def training_sizes(trained: Any, source: sources.Source, options: Namespace) -> dict[str, Any]:
    """Return how to bring images to one size, as `sddns train` did: `image_size` and `resize`.

    Args:
        trained: The `SelfDistillation`, or None for a backbone.
        source: Source of the bank's images.
        options: The command's options, which come first.
    """
    run = detectors.configuration_beside(pathlib.Path(options.model).expanduser()) or {}
    read, side = run.get("data", {}), run.get("views", {}).get("image_size")
    if trained is not None:
        side = trained.views.image_size
    is_folder = source.location.startswith("folder:")
    return {
        "image_size": options.resolution or read.get("resolution") or (side if is_folder else None),
        "resize": options.resize or read.get("resize", "squash"),
    }


class Sets(NamedTuple):
    """The sets to measure, in the form that `evaluation.evaluate` takes.

    Attributes:
        normal: uint8 `(N, H, W, 3)`.
        ood: Dict from a name to images.
        labels: Classes of the normal images, or None.
        labeled: Training images and their classes, or None.
        masks: Dict from the names of OOD sets that have masks to their masks.
        files: Dict from the names of sets that are folders to the names of their files.
    """

    normal: np.ndarray
    ood: dict
    labels: np.ndarray | None
    labeled: tuple | None
    masks: dict
    files: dict


def ood_sources(options: Namespace) -> tuple[list[sources.Source], Any]:
    """Return sources of OOD images, and the folder of their masks or None."""
    named = sources.parse_list("ood", options.ood, "test")
    damaged, masks = sources.damaged_parts(options.test)
    names = [source.name for source in (*damaged, *named)]
    if len(set(names)) < len(names):
        raise UsageError(f"OOD sets must have names of their own. Received: {', '.join(names)}")
    return [*damaged, *named], options.masks or masks


def read_sets(options: Namespace, detector: Any) -> Sets:
    """Return the `Sets` of a command line, images and masks as the detector sees them."""
    from sddns_tf.evaluation import FRESH

    how = reading(options, **sources.seen_by(detector))
    limited = {**how, "limit": options.limit}
    source = sources.parse("test", options.test, "test")
    found, masks_folder = ood_sources(options)
    normal, labels = sources.read_labeled("test", source, **limited)
    ood = {each.name: sources.read("ood", each, **limited) for each in found}
    listed = {"limit": options.limit, "on_error": how["on_error"]}
    paths = {each.name: sources.file_names("ood", each, **listed) for each in found}
    masks = read_masks(masks_folder, paths, how) if detector.is_local else {}
    paths[FRESH] = sources.file_names("test", source, **listed)
    files = {
        name: [f"{path.parent.name}/{path.name}" for path in several]
        for name, several in paths.items()
        if several
    }
    labeled = None
    if options.data:
        source = sources.parse("data", options.data, "train")
        labeled = sources.read_labeled("data", source, **how)
        if labels is None or labeled[1] is None:
            say("Skipping k-NN accuracy: --data or --test has no labels.")
            labels = labeled = None
    return Sets(normal, ood, labels, labeled, masks, files)


def read_masks(folder: Any, paths: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """Return masks by the name of the set, for sets that have a folder of masks."""
    if folder is None:
        return {}
    from sddns_tf.data import mvtec

    folder = pathlib.Path(folder).expanduser()
    named = {name: several for name, several in paths.items() if (folder / name).is_dir()}
    if not named:
        raise UsageError(
            f"--masks must hold a folder named like an OOD set: {', '.join(paths)}. "
            f"Received: {folder}"
        )
    left = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name not in named
    )
    without = [name for name in paths if name not in named]
    if left and without:
        say(
            f"No masks for {', '.join(without)}. No OOD set is called like these folders of "
            f"{folder}: {', '.join(left)}"
        )
    for name, several in named.items():
        if several is None:
            raise UsageError(
                "With --masks, the images of an OOD set must be files in a folder. "
                f"Received: --ood={name}=..., which is not a folder"
            )
    with user_input("masks"):
        return {
            name: mvtec.masks_of(several, folder / name, how["image_size"], how["resize"])
            for name, several in named.items()
        }


def settings_of(detector: Any, options: Namespace) -> dict[str, Any]:
    """Return the settings to list in the report: options of the command and of the detector."""
    extractor = detector.extractor
    settings = {
        "model": options.model,
        "test": options.test,
        "ood": ", ".join(source.name for source in ood_sources(options)[0]),
        **({"masks": options.masks} if options.masks else {}),
        "backbone": f"{extractor.backbone.name}, {extractor.backbone.count_params():,} parameters",
        "resolution": extractor.resolution,
        "resize": extractor.resize,
        "image_size": extractor.image_size,
        "standardized": extractor.standardized,
        "bank": detector.bank.shape[0],
        "calibration images": detector.calibration_scores.shape[0],
        "score_temperature": detector.temperature,
        "score_offset": detector.offset,
        "neighbors": detector.k,
        "auxiliary_weight": detector.auxiliary_weight,
        "resamples": options.resamples,
    }
    model = pathlib.Path(options.model).expanduser()
    trained = detectors.configuration_beside(model)
    if trained is None:
        if (beside := model.with_name("config.json")).exists():
            say(f"The report lists no settings of training: {beside} names no run of this model")
        return settings
    flat = configuration.flat(trained)
    return settings | {f"training: {name}": value for name, value in flat.items()}


def check_writable(folder: pathlib.Path) -> None:
    """Make a folder, and raise a `UsageError` unless files can be written to it."""
    with user_input("output_dir", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def main(argv: list[str]) -> None:
    """Score all sets, measure, and write the report."""
    options = parser().parse_args(argv)
    require(options, "model", "test", "output_dir")
    if not ood_sources(options)[0]:
        require(options, "ood")
    for option, split in (("test", "test"), ("data", "train"), ("calibration", "test")):
        if text := getattr(options, option):
            sources.parse(option, text, split)  # before anything slow
    output_dir = pathlib.Path(options.output_dir).expanduser()
    check_writable(output_dir)
    starting.import_tensorflow()

    import sddns_tf
    from sddns_tf import evaluation, report

    detector = load_detector(options)
    if options.masks and not detector.is_local:
        raise UsageError(
            "--masks are compared with maps, and only a local detector gives them: train with "
            f"--layers=auto. Received: {options.model}"
        )
    settings = settings_of(detector, options)
    found = evaluation.evaluate(
        detector,
        **read_sets(options, detector)._asdict(),
        resamples=options.resamples,
        seed=options.seed,
        verbose=verbose(),
    )
    table = evaluation.markdown(found)
    results = {**found.as_dict(), "version": sddns_tf.__version__, "configuration": settings}
    title = options.title or f"Evaluation of {pathlib.Path(options.model).name}"
    page = output_dir / "report.html"
    try:
        with user_input("output_dir", OSError):
            files.write_text(output_dir / "table.md", table)
            files.write_text(output_dir / "table.csv", evaluation.csv(found))
            files.write_json(output_dir / "results.json", results)
            report.write(page, found, detector, title, settings, options.gallery_size)
    finally:  # Even if the disk is full.
        print(table)
    say(f"Report: {page.resolve()}")
