"""The exported SavedModel against `Detector.predict` and against the backbone alone."""

import tempfile

import tensorflow as tf

import sddns_tf
from tools.benchmark import harness, models


def run(settings):
    """Yield two records."""
    shape = models.scoring_shape(settings)
    detector = models.detector(shape)
    images = models.random_images(32, shape[0])
    halves = [tf.constant(images[:16]), tf.constant(images[16:])]
    with tempfile.TemporaryDirectory() as folder:
        loaded = tf.saved_model.load(str(sddns_tf.export.saved_model(detector, folder)))
    served = loaded.signatures["serving_default"]
    features = tf.function(detector.extractor, autograph=False)
    for partner, theirs in (
        ("Detector.predict", lambda: detector.predict(images, batch_size=16, verbose=0)),
        ("features alone", lambda: [features(half).numpy() for half in halves]),
    ):
        times = harness.take_turns(
            lambda: [served(images=half)["ood_score"].numpy() for half in halves],
            theirs,
            settings.rounds,
        )
        yield harness.rates("saved_model", partner, times, len(images))
