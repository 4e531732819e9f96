r"""Train on unlabeled normal images and make a calibrated detector.

    sddns train --data=folder:photos/good --auxiliary=folder:photos/other --image_size=64 \
        --output_dir=parts
    sddns train --recipe=cpu_small --data_dir=TFDS --output_dir=cifar10

A source of images is folder:PATH, npz:PATH, tfds:NAME or tfds:NAME@SPLIT. A recipe is a JSON file
with the constructor arguments that differ from their defaults. --set overrides a single argument,
as in --set views.hue=0.2.

Writes to --output_dir:
  detector.keras   the calibrated detector, for all other commands
  backbone.keras   the teacher's backbone alone
  model.keras      the training model, to continue training with
  config.json      the resolved configuration, which can be used as a recipe
  log.csv          losses and metrics of each epoch
  tensorboard/     scalars, views, negatives and score histograms, if TensorBoard is installed
  checkpoint/      training state; if the command was stopped, run it again to continue
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from sddns_tf.cli import configuration, sources, starting
from sddns_tf.cli.console import Parser, natural_int, positive_int, require, share, size
from sddns_tf.cli.devices import STRATEGIES

if TYPE_CHECKING:
    from sddns_tf.cli.training import Place

# Options that set one key of the configuration.
SHORT_FOR = {
    "data": "data.source",
    "auxiliary": "data.auxiliary",
    "auxiliary_exclude": "data.auxiliary_exclude",
    "calibration": "data.calibration",
    "calibration_share": "data.calibration_share",
    "limit": "data.limit",
    "resolution": "data.resolution",
    "resize": "data.resize",
    "on_error": "data.on_error",
    "in_memory": "data.in_memory",
    "backbone": "backbone.type",
    "image_size": "views.image_size",
    "source": "negatives.source",
    "false_positive_rate": "detector.false_positive_rate",
    "bank_size": "detector.bank_size",
    "layers": "detector.layers",
    "aligned": "detector.aligned",
    "epochs": "epochs",
    "steps_per_epoch": "steps_per_epoch",
    "batch_size": "batch_size",
    "seed": "seed",
    "precision": "precision",
}
SHIFTS = ("rot90", "rot360", "perm4", "perm16", "pixel_perm", "cut_paste", "identity", "none")


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("train", __doc__)
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
        "--image_size", metavar="N", type=positive_int, help="Side of the network's input."
    )
    group.add_argument(
        "--epochs",
        metavar="N",
        type=positive_int,
        help="Number of epochs; by default as many as make some 2,000 steps, at most 100.",
    )
    group.add_argument("--output_dir", metavar="FOLDER", help="Folder to write to.")
    add_recipe_options(parser)
    group = parser.group("negatives")
    group.add_argument(
        "--shift", choices=SHIFTS, help="Shift that makes negatives; none for no negatives."
    )
    group.add_argument(
        "--source",
        choices=("in_distribution", "auxiliary", "both"),
        help="Images to make negatives from. Default: auxiliary if --auxiliary is given.",
    )
    add_training_options(parser)
    return parser


def add_recipe_options(parser: Parser) -> None:
    """Add the options of the recipe."""
    group = parser.group("recipe")
    group.add_argument(
        "--recipe",
        default="default",
        metavar="NAME",
        help=f"One of {', '.join(configuration.recipe_names())}, or a JSON file.",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Set an argument of a constructor, such as model.student_temperature=0.1. The error "
        "for a wrong key lists the right ones. May be repeated.",
    )


def add_training_options(parser: Parser) -> None:
    """Add the options that `sddns sensitivity` has as well."""
    _add_image_options(parser.group("images"))
    _add_step_options(parser.group("training"))
    _add_detector_options(parser.group("detector"))
    add_place_options(parser)


def _add_image_options(group: Any) -> None:
    group.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR.",
    )
    group.add_argument(
        "--auxiliary_exclude",
        metavar="FILE",
        help="File with classes to leave out of a TFDS auxiliary set, one per line.",
    )
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="Source of normal images to set the threshold with, which are not trained on (split: "
        "test). Default: a part of --data.",
    )
    group.add_argument(
        "--calibration_share",
        metavar="SHARE",
        type=float,
        help="Share of --data to hold out if there is no --calibration. Default: a tenth, or as "
        "many images as --false_positive_rate needs.",
    )
    group.add_argument("--limit", metavar="N", type=positive_int, help="Train on at most N images.")
    group.add_argument(
        "--resolution",
        metavar="SIZE",
        type=size,
        help="SIDE or HEIGHT,WIDTH to which images are resized when read. Default: --image_size "
        "for a folder, otherwise the size they have.",
    )
    group.add_argument(
        "--resize",
        choices=("squash", "crop"),
        help="How images of another aspect ratio are resized: squash distorts them (the default), "
        "crop cuts off the sides. The detector does the same.",
    )
    sources.add_on_error(group)
    group.add_argument(
        "--noin_memory",
        dest="in_memory",
        action="store_false",
        default=None,
        help="Read the training images again in every epoch. Needs --calibration.",
    )


def _add_step_options(group: Any) -> None:
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help=f"One of {', '.join(configuration.BACKBONES)}, or a .keras file to start from. "
        "Default: convnet, which trains on a CPU.",
    )
    group.add_argument(
        "--batch_size",
        metavar="N",
        type=positive_int,
        help="Images per step, over all devices. Default: 64, or all images where there are fewer.",
    )
    group.add_argument(
        "--steps_per_epoch",
        metavar="N",
        type=positive_int,
        help="Default: one pass through the images.",
    )
    group.add_argument("--seed", metavar="N", type=int, help="Random seed.")
    group.add_argument(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        help="Keras dtype policy.",
    )


def _add_detector_options(group: Any) -> None:
    group.add_argument(
        "--false_positive_rate",
        metavar="SHARE",
        type=share,
        help="Largest share of normal images to flag.",
    )
    group.add_argument(
        "--bank_size",
        metavar="N",
        type=positive_int,
        help="Compress the bank to at most N centers, or places.",
    )
    group.add_argument(
        "--layers",
        metavar="NAMES",
        type=_layers,
        help="Say where: compare places in maps of these layers of the backbone, separated by "
        "commas, instead of whole images. auto takes the last ones.",
    )
    group.add_argument(
        "--aligned",
        action="store_true",
        default=None,
        help="Compare each place of --layers with the same place only, for parts that a fixture "
        "holds in one place.",
    )


def _layers(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text


def add_place_options(parser: Parser) -> None:
    """Add the options that do not change the results."""
    group = parser.group("machine")
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="auto and mirrored use all GPUs of this machine, none uses one device, multi_worker "
        "uses the machines in $TF_CONFIG.",
    )
    group.add_argument(
        "--logical_devices",
        type=positive_int,
        metavar="N",
        help="Divide the CPU into N devices, to try out training on several GPUs.",
    )
    group.add_argument(
        "--noresume",
        dest="resume",
        action="store_false",
        help="Start over instead of continuing the run in --output_dir.",
    )
    group.add_argument(
        "--checkpoint_every",
        metavar="N",
        type=positive_int,
        default=500,
        help="Steps between checkpoints.",
    )
    group.add_argument(
        "--rollbacks",
        metavar="N",
        type=natural_int,
        default=0,
        help="How many times to return to the last checkpoint and halve the learning rate if a "
        "loss or weight is not finite. Default: 0, which stops at once.",
    )
    group.add_argument(
        "--pictures_every",
        metavar="N",
        type=positive_int,
        default=5,
        help="Epochs between pictures in TensorBoard.",
    )


def configuration_of(options: Namespace) -> dict[str, Any]:
    """Return the resolved configuration of a command line.

    Args:
        options: Parsed options.

    Returns:
        Dictionary.

    Raises:
        UsageError: If the recipe or an option is wrong.
    """
    require(options, "output_dir")
    settings = [configuration.parse_setting(text) for text in options.set]
    given = {name: value for name, value in vars(options).items() if value is not None}
    if given.get("shift") == "none":
        settings.append(("negatives", None))
    elif "shift" in given:
        settings.append(("negatives.shift", options.shift))
    settings += [(key, given[name]) for name, key in SHORT_FOR.items() if name in given]
    return configuration.resolve(configuration.read_recipe(options.recipe), settings)


def place_of(options: Namespace) -> Place:
    """Return the `training.Place` of a command line."""
    from sddns_tf.cli.training import Place

    return Place(**{name: getattr(options, name) for name in Place._fields})


def main(argv: list[str]) -> None:
    """Run the training that the options describe."""
    options = parser().parse_args(argv)
    starting.import_tensorflow()
    from sddns_tf.cli import training

    config, place = configuration_of(options), place_of(options)
    detector, _ = training.train(config, place)
    if detector is not None:
        print(
            f"Wrote detector.keras, backbone.keras and model.keras to {place.output_dir}. The "
            f"detector flags scores above {detector.threshold:.6g}: at most "
            f"{detector.false_positive_rate:.2%} of normal images."
        )
