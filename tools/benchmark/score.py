"""`Detector` with a bank of 50,000 rows against its feature extraction alone."""

from tools.benchmark import harness, models


def run(settings):
    """Yield one record."""
    shape = models.scoring_shape(settings)
    detector = models.detector(shape)
    images = models.random_images(32, shape[0])

    def predict(model):
        return lambda: model.predict(images, batch_size=16, verbose=0)

    times = harness.take_turns(predict(detector), predict(detector.extractor), settings.rounds)
    yield harness.rates("score", "features alone", times, len(images))
