r"""Do one run of docs/results/protocol.md: CIFAR-10 as normal, one strategy, one seed.

    python -m tools.research.reproduce_cifar10 --data_dir=TFDS --auxiliary_exclude=FILE \
        --strategy=auxiliary:rot90 --seed=0 --steps=2400 --sets=test --output_dir=results

Trains for that many steps, whatever the strategy. Writes to the folder `auxiliary-rot90-0.json`
(AUROC and FPR at 95 % for each set, sensitivities, accuracy of nearest neighbors, settings, losses
and duration) and the detector `auxiliary-rot90-0.keras`. A run that was stopped goes on when it is
started again; one whose record exists is not repeated. `cifar10.py` describes the data sets;
`make_results` makes the tables of all runs in a folder.
"""

import pathlib

import sddns_tf
from sddns_tf import schedules
from tools.research import cifar10

STRATEGIES = (
    "none", "auxiliary:identity", "auxiliary:rot90", "auxiliary:rot360", "auxiliary:perm4",
    "auxiliary:perm16", "auxiliary:pixel_perm", "in_distribution:rot90", "in_distribution:perm4",
    "both:rot90",
)  # fmt: skip


def parse(argv):
    """Return settings of a command line."""
    parser = cifar10.parser(__doc__)
    add = parser.add_argument
    add("--strategy", default="auxiliary:rot90", choices=STRATEGIES, help="source and shift")
    add("--auxiliary_overlap", action="store_true", help="train on the excluded classes as well")
    add("--name", help="name of the files; default: strategy and seed")
    add("--teacher_temperature", type=float, help="a constant; default: balanced targets")
    add(
        "--teacher_momentum",
        type=float,
        help="initial value, rises to 1 along a cosine; default: the constructor's",
    )
    add("--negative_weight", type=float, default=1.0, help="lambda after the ramp")
    add(
        "--negative_ramp",
        type=float,
        default=0.2,
        help="share of the steps after which lambda is full",
    )
    add("--num_prototypes", type=int, default=1024, help="number of prototypes, K")
    add("--local_views", type=int, default=0, help="number of local views of 16 px")
    add("--color_jitter", type=float, default=0.8, help="probability of color jitter")
    settings = parser.parse_args(argv)
    settings.source, _, settings.shift = settings.strategy.partition(":")
    return settings


def make_model(settings):
    """Return the compiled model."""
    steps, weight = settings.steps, settings.negative_weight
    if settings.negative_ramp:
        ramp, start = int(settings.negative_ramp * steps), int(0.05 * steps)
        weight = schedules.Linear(0.0, weight, max(ramp, 1), start)
    momentum = settings.teacher_momentum
    if momentum is not None:
        momentum = schedules.WarmupCosine(momentum, 1.0, steps)
    model = sddns_tf.SelfDistillation(
        cifar10.backbone(settings),
        sddns_tf.MultiCrop(
            cifar10.SIDE,
            settings.local_views,
            local_area=(0.15, 0.4),
            color_jitter=settings.color_jitter,
        ),
        sddns_tf.Negatives(settings.shift, settings.source) if settings.shift else None,
        head=sddns_tf.ProjectionHead(
            settings.num_prototypes, hidden_dim=512, bottleneck_dim=128, norm_last_layer=False
        ),
        teacher_temperature=settings.teacher_temperature,
        teacher_momentum=momentum,
        negative_weight=weight,
        seed=settings.seed,
    )
    model.compile(cifar10.optimizer(settings, steps))
    return model


def main(argv=None):
    """Do one run, unless its record exists."""
    settings = parse(argv)
    name = settings.name or f"{settings.strategy.replace(':', '-')}-{settings.seed}"

    def measure():
        normal, auxiliary = cifar10.read_normal(settings), None
        if settings.source in ("auxiliary", "both"):
            excluded = [] if settings.auxiliary_overlap else cifar10.excluded_classes(settings)
            auxiliary = cifar10.read(settings, settings.auxiliary, "train", excluded)
        model, training = cifar10.fit(
            settings,
            name,
            lambda: make_model(settings),
            lambda first: cifar10.training_batches(settings, normal.training, auxiliary, first),
            [sddns_tf.callbacks.CollapseMonitor()],
        )
        balanced = settings.teacher_temperature is None
        detector = cifar10.detector_of(settings, model.teacher_backbone, normal, balanced)
        detector.save(pathlib.Path(settings.output_dir) / f"{name}.keras")
        trained_on = settings.shift if settings.shift not in ("", "identity") else None
        features_of = cifar10.features_with(detector.extractor)
        ood = cifar10.read_ood(settings, normal)
        return {
            "flags": cifar10.flags_of(settings),
            **training,
            "parameters": model.teacher_backbone.count_params(),
            **cifar10.evaluate(detector, normal, ood, features_of, trained_on),
        }

    cifar10.record_run(settings, name, measure)


if __name__ == "__main__":
    main()
