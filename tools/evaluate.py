r"""Measures how well a detector tells normal images from others.

    python tools/evaluate.py --model=parts/detector.keras --test=folder:parts/fresh \
        --ood=scratched=folder:parts/scratched,tfds:dtd --output_dir=parts/evaluation

AUROC, AUPR, FPR95 and the share flagged at the calibrated threshold of every set, each with a 95 %
bootstrap interval; with --data, whose images have labels, the k-NN accuracy of the features too.
--test must be images that were neither trained nor calibrated on.

A training model or a backbone (model.keras, backbone.keras) will do for --model as well: give
--data and --calibration then, from which a detector is made.

Prints the table as Markdown. Writes to --output_dir: table.md, table.csv, results.json and
report.html, one page that needs no network: charts, galleries, the configuration.
"""

import json
import pathlib

import command_line
from absl import flags, logging

FLAGS = flags.FLAGS


def define_flags():
    """All flags of the program."""
    command_line.define_data_flags()
    command_line.define_detector_flags()
    FLAGS.set_default("false_positive_rate", None)
    flags.DEFINE_string("model", None, "Detector, training model or backbone (.keras).")
    flags.DEFINE_string("test", None, "Source of fresh normal images (split: test).")
    flags.DEFINE_list("ood", [], "Sources of OOD images, with commas between (split: test).")
    flags.DEFINE_string(
        "data",
        None,
        "Source of the normal images trained on (split: train): the bank, where --model is no "
        "detector, and the neighbours of the k-NN accuracy.",
    )
    flags.DEFINE_integer("limit", None, "Score at most so many images of each set.", 1)
    flags.DEFINE_integer("resamples", 1000, "Draws of the bootstrap.", 1)
    flags.DEFINE_integer("gallery_size", 12, "Images in each gallery of the report, about.", 1)
    flags.DEFINE_string("title", None, "Title of the report.")
    flags.DEFINE_string("output_dir", None, "Folder to write to.")


def load_detector():
    """The detector that --model is, or one made of the backbone that it is."""
    import sddns_tf

    model = command_line.load_keras("model", FLAGS.model)
    if isinstance(model, sddns_tf.Detector):
        if FLAGS.calibration:
            one = command_line.source("calibration", FLAGS.calibration, "test")
            size = model.extractor.resolution
            images = command_line.read("calibration", one, FLAGS, size)
            model.recalibrate(images, FLAGS.false_positive_rate, verbose=command_line.progress())
        elif FLAGS.false_positive_rate is not None:
            model.recalibrate(false_positive_rate=FLAGS.false_positive_rate)
        return model
    for name in ("data", "calibration"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is needed: --model={FLAGS.model} is no detector.")
    return make_detector(model)


def make_detector(model):
    """A detector of a training model or a backbone."""
    import sddns_tf

    options = {}
    if isinstance(model, sddns_tf.SelfDistillation):
        options = {
            "mean": model.mean, "std": model.std, "image_size": model.views.image_size
        }  # fmt: skip
        model = model.teacher_backbone
    one = command_line.source("data", FLAGS.data, "train")
    bank = command_line.read("data", one, FLAGS)
    one = command_line.source("calibration", FLAGS.calibration, "test")
    rate = 0.05 if FLAGS.false_positive_rate is None else FLAGS.false_positive_rate
    return sddns_tf.Detector.from_images(
        model,
        bank_images=bank,
        calibration_images=command_line.read("calibration", one, FLAGS, bank.shape[1:3]),
        false_positive_rate=rate,
        temperature=FLAGS.score_temperature,
        offset=FLAGS.score_offset,
        k=FLAGS.neighbors,
        bank_size=FLAGS.bank_size,
        seed=FLAGS.seed,
        verbose=command_line.progress(),
        **options,
    )


def read_sets(resolution):
    """Normal images and OOD images by name, and what is known of classes."""
    one = command_line.source("test", FLAGS.test, "test")
    normal, labels = command_line.read_labelled("test", one, FLAGS, resolution, FLAGS.limit)
    ood = {
        each.name: command_line.read("ood", each, FLAGS, resolution, limit=FLAGS.limit)
        for each in command_line.sources("ood", FLAGS.ood, "test")
    }
    if not FLAGS.data:
        return normal, ood, None, None
    one = command_line.source("data", FLAGS.data, "train")
    labelled = command_line.read_labelled("data", one, FLAGS, resolution)
    if labels is None or labelled[1] is None:
        logging.warning("No k-NN accuracy: --data or --test has no labels.")
        return normal, ood, None, None
    return normal, ood, labels, labelled


def configuration(detector):
    """What the report lists: the flags of the evaluation and the detector's own settings."""
    extractor = detector.extractor
    settings = {
        "model": FLAGS.model,
        "test": FLAGS.test,
        "ood": ", ".join(FLAGS.ood),
        "backbone": f"{extractor.backbone.name}, {extractor.backbone.count_params():,} parameters",
        "resolution": extractor.resolution,
        "image_size": extractor.image_size,
        "bank": detector.bank.shape[0],
        "calibration images": detector.calibration_scores.shape[0],
        "score_temperature": detector.temperature,
        "score_offset": detector.offset,
        "neighbors": detector.k,
        "resamples": FLAGS.resamples,
    }
    beside = pathlib.Path(FLAGS.model).expanduser().with_name("config.json")
    if beside.is_file():
        trained = json.loads(beside.read_text())["flags"]
        settings.update((f"training: {name}", value) for name, value in trained.items())
    return settings


def main():
    """Score, measure, write."""
    for name in ("model", "test", "ood", "output_dir"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is needed. Received: --{name}={FLAGS[name].value}")
    command_line.sources("ood", FLAGS.ood, "test")  # before anything slow

    import sddns_tf
    from sddns_tf import evaluation, report

    detector = load_detector()
    resolution = detector.extractor.resolution or detector.extractor.image_size
    normal, ood, labels, labelled = read_sets(resolution)
    found = evaluation.evaluate(
        detector,
        normal,
        ood,
        labels,
        labelled,
        resamples=FLAGS.resamples,
        seed=FLAGS.seed,
        verbose=command_line.progress(),
    )
    settings = configuration(detector)
    output_dir = pathlib.Path(FLAGS.output_dir)
    table = evaluation.markdown(found)
    results = {**found.as_dict(), "version": sddns_tf.__version__, "configuration": settings}
    command_line.write_text(output_dir / "table.md", table)
    command_line.write_text(output_dir / "table.csv", evaluation.csv(found))
    command_line.write_json(output_dir / "results.json", results)
    title = FLAGS.title or f"Evaluation of {pathlib.Path(FLAGS.model).name}"
    report.write(output_dir / "report.html", found, detector, title, settings, FLAGS.gallery_size)
    print(table)
    command_line.say(f"Report: {(output_dir / 'report.html').resolve()}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
