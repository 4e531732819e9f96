r"""Train on unlabeled normal images, and make a calibrated detector.

    sddns train --data=folder:parts/good --auxiliary=folder:photos --image_size=64 \
        --output_dir=parts
    sddns train --recipe=cpu_small --data_dir=TFDS --output_dir=cifar10

A source of images is folder:PATH, npz:PATH, tfds:NAME or tfds:NAME@SPLIT. A recipe is a JSON file
of the constructor arguments that it changes; --set changes one more, as in --set views.hue=0.2.

Writes to --output_dir:
  detector.keras   the calibrated detector: what the other commands take
  backbone.keras   the teacher's backbone alone
  model.keras      the whole training state, to train on
  config.json      the resolved configuration, which is a recipe
  log.csv          what was logged in each epoch
  tensorboard/     scalars, views, negatives, separation of scores, where TensorBoard is installed
  checkpoint/      from which the same command goes on if it was stopped
"""

from sddns_tf.cli import configuration, quiet
from sddns_tf.cli.console import Parser, positive_int, require, share, size
from sddns_tf.cli.devices import STRATEGIES

# The options that are short for a key of the configuration.
SHORT_FOR = {
    "data": "data.source",
    "auxiliary": "data.auxiliary",
    "auxiliary_exclude": "data.auxiliary_exclude",
    "calibration": "data.calibration",
    "calibration_share": "data.calibration_share",
    "limit": "data.limit",
    "resolution": "data.resolution",
    "resize": "data.resize",
    "in_memory": "data.in_memory",
    "backbone": "backbone.type",
    "image_size": "views.image_size",
    "source": "negatives.source",
    "false_positive_rate": "detector.false_positive_rate",
    "bank_size": "detector.bank_size",
    "epochs": "epochs",
    "steps_per_epoch": "steps_per_epoch",
    "batch_size": "batch_size",
    "seed": "seed",
    "precision": "precision",
}
SHIFTS = ("rot90", "rot360", "perm4", "perm16", "pixel_perm", "identity", "none")


def parser():
    """Return the options of the command."""
    parser = Parser("train", __doc__)
    group = parser.group("what most people need")
    group.add_argument(
        "--data", metavar="SOURCE", help="Source of the normal images to train on (split: train)."
    )
    group.add_argument(
        "--auxiliary",
        metavar="SOURCE",
        help="Source of unrelated images that make negatives (split: train).",
    )
    group.add_argument(
        "--image_size", metavar="N", type=positive_int, help="Side of the network's input."
    )
    group.add_argument("--epochs", metavar="N", type=positive_int, help="Epochs.")
    group.add_argument("--output_dir", metavar="FOLDER", help="Folder to write to.")
    add_recipe_options(parser)
    add_training_options(parser)
    return parser


def add_recipe_options(parser):
    """Options on the recipe."""
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
        help="Change an argument of a constructor, such as model.student_temperature=0.1; a wrong "
        "key tells which there are. May be repeated.",
    )


def add_training_options(parser):
    """All options that `sensitivity` has as well."""
    group = parser.group("images")
    group.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="Folder of prepared TFDS sets; default: $TFDS_DATA_DIR.",
    )
    group.add_argument(
        "--auxiliary_exclude", metavar="FILE", help="Names of classes to leave out of a TFDS set."
    )
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="Source of normal images that are not trained on, which set the threshold (split: "
        "test). Default: some of --data.",
    )
    group.add_argument(
        "--calibration_share", metavar="SHARE", type=float, help="How much of --data; default: 0.1."
    )
    group.add_argument(
        "--limit", metavar="N", type=positive_int, help="Train on at most so many images."
    )
    group.add_argument(
        "--resolution",
        metavar="SIZE",
        type=size,
        help="SIDE or HEIGHT,WIDTH at which images are read. Default: their own; of a folder "
        "--image_size.",
    )
    group.add_argument(
        "--resize",
        choices=("squash", "crop"),
        help="How images of another shape are brought to it: squeezed (the default), or cut at "
        "the sides. The detector does the same.",
    )
    group.add_argument(
        "--noin_memory",
        dest="in_memory",
        action="store_false",
        default=None,
        help="Read the training images in each epoch. Needs --calibration.",
    )
    group = parser.group("training")
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help=f"One of {', '.join(configuration.BACKBONES)}, or a .keras file to start from. "
        "Default: convnet, which a CPU trains.",
    )
    group.add_argument(
        "--shift", choices=SHIFTS, help="Shift that makes negatives; none: no negatives."
    )
    group.add_argument(
        "--source",
        choices=("in_distribution", "auxiliary", "both"),
        help="What is shifted; default: auxiliary where --auxiliary is given.",
    )
    group.add_argument(
        "--batch_size", metavar="N", type=positive_int, help="Images of a step, on all devices."
    )
    group.add_argument(
        "--steps_per_epoch",
        metavar="N",
        type=positive_int,
        help="Default: once through the images.",
    )
    group.add_argument("--seed", metavar="N", type=int, help="Fixes all that is random.")
    group.add_argument(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        help="Keras' dtype policy.",
    )
    group = parser.group("detector")
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
        help="Compress the bank to at most so many centers.",
    )
    add_place_options(parser)


def add_place_options(parser):
    """Options that change nothing in what comes out."""
    group = parser.group("machine")
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="All GPUs of this machine if it has several (auto, mirrored), one device, or those of "
        "the machines that $TF_CONFIG names.",
    )
    group.add_argument(
        "--logical_devices",
        type=positive_int,
        metavar="N",
        help="Divide the CPU into N devices, to try out what will run on several GPUs.",
    )
    group.add_argument(
        "--noresume",
        dest="resume",
        action="store_false",
        help="Start anew where --output_dir holds a run.",
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
        type=int,
        default=0,
        help="How often to go back to the last checkpoint, and on at half the learning rate, where "
        "a loss or weight is not finite, before giving up.",
    )
    group.add_argument(
        "--pictures_every",
        metavar="N",
        type=positive_int,
        default=5,
        help="Epochs between histograms.",
    )


def configuration_of(options):
    """Return the resolved configuration of a command line.

    Args:
        options: What the parser gave.

    Returns:
        Dictionary.

    Raises:
        UsageError: If recipe or options are wrong.
    """
    require(options, "output_dir")
    settings = [configuration.parse_setting(text) for text in options.set]
    if options.shift == "none":
        settings.append(("negatives", None))
    elif options.shift:
        settings.append(("negatives.shift", options.shift))
    for name, key in SHORT_FOR.items():
        if getattr(options, name) is not None:
            settings.append((key, getattr(options, name)))
    return configuration.resolve(configuration.read_recipe(options.recipe), settings)


def place_of(options):
    """Return the `training.Place` of a command line."""
    from sddns_tf.cli.training import Place

    return Place(**{name: getattr(options, name) for name in Place._fields})


def main(argv):
    """Train what the options describe."""
    options = parser().parse_args(argv)
    quiet.import_tensorflow()
    from sddns_tf.cli import training

    config, place = configuration_of(options), place_of(options)
    detector, _ = training.train(config, place)
    if detector is not None:
        print(
            f"{place.output_dir}: detector.keras, backbone.keras, model.keras. Threshold of the "
            f"OOD score {detector.threshold:.6g}, for at most {detector.false_positive_rate:.2%} "
            "of normal images."
        )
