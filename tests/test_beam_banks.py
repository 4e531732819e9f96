"""Banks made in parts: how far their scores are from the whole bank's."""

import io

import keras
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
import apache_beam as beam
from apache_beam.testing.util import assert_that, equal_to

from sddns_tf.bank import compress, ood_score
from sddns_tf.beam import Bank, BankSketch, CompressFeatures, ExtractFeatures
from sddns_tf.beam.banks import ExtractorHandler
from sddns_tf.detector import Detector
from sddns_tf.features import FeatureExtractor, extract_features

SIZE = 60


def clusters(count, seed, dim=16, kinds=25, spread=0.12):
    """Rows of norm 1 around common directions, as features of a trained network lie."""
    directions = np.random.default_rng(0).normal(size=(kinds, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    generator = np.random.default_rng(seed)
    rows = directions[generator.integers(0, kinds, count)]
    rows = rows + spread * generator.normal(size=rows.shape) / np.sqrt(dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def features():
    return clusters(8000, seed=1)


@pytest.fixture(scope="module")
def probes():
    """Features like the bank's, and some of any direction."""
    other = np.random.default_rng(3).normal(size=(100, 16)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return np.concatenate([clusters(200, seed=2), other])


def merged(shards, method):
    sketch = BankSketch(SIZE, method)
    for shard in shards:
        other = BankSketch(SIZE, method)
        for start in range(0, len(shard), 100):
            other.add(shard[start : start + 100])
        sketch.merge(other)
    return sketch.bank()


@pytest.mark.parametrize("method", ["kmeans", "kcenter"])
def test_scores_of_ten_merged_shards_are_within_the_bound(method, features, probes):
    bank = merged(np.split(features, 10), method)
    assert bank.features.shape[0] <= SIZE and bank.total == len(features)
    np.testing.assert_allclose(np.linalg.norm(bank.features, axis=1), 1.0, rtol=1e-5)
    assert bank.weights.sum() == pytest.approx(1.0, rel=1e-5)
    # No feature lies farther from the nearest center than the largest radius says.
    distances = np.linalg.norm(features[:, None] - bank.features[None], axis=-1).min(axis=1)
    assert distances.max() <= bank.radius.max() + 1e-6
    whole = ood_score(probes, features).numpy()
    found = ood_score(probes, bank.features, weights=bank.weights).numpy()
    assert np.abs(found - whole).max() <= bank.score_error()
    # What is measured is far less than what is promised, and hardly more than of one compression.
    centers, weights = compress(features, SIZE, method)
    at_once = ood_score(probes, centers, weights=weights).numpy()
    limit = 2.0 * np.abs(at_once - whole).mean() + 0.02
    assert np.abs(found - whole).mean() <= limit
    assert np.abs(found - whole).mean() <= 0.1 * bank.score_error()


def test_a_bank_that_fits_is_kept_as_it_is(features):
    bank = merged(np.split(features[:SIZE], 10), "kmeans")
    assert sorted(map(tuple, bank.features)) == sorted(map(tuple, features[:SIZE]))
    np.testing.assert_allclose(bank.weights, 1.0 / SIZE)
    assert bank.score_error() == 0.0
    with pytest.raises(ValueError, match="at least one feature"):
        BankSketch(3).bank()


def test_memory_grows_with_the_logarithm_of_the_number_of_features(features):
    import pickle

    sketch, sizes = BankSketch(20, "kcenter"), []
    for start in range(0, len(features), 160):
        sketch.add(features[start : start + 160])
        sizes.append(len(pickle.dumps(sketch)))
    # 50 times as many rows at once: six levels of 40 rows of 16 floats and what stands with them.
    assert max(sizes) < 6 * 40 * (16 * 4 + 12) + 5000


def test_a_combine_fn_gives_a_bank_for_a_detector(features):
    rows = features[:600]
    with beam.Pipeline("FnApiRunner") as pipeline:
        bank = (
            pipeline
            | beam.Create(list(np.split(rows, 10)))
            | beam.Reshuffle()
            | beam.CombineGlobally(CompressFeatures(SIZE))
        )
        bank | beam.Map(_check_bank)


def _check_bank(bank):
    assert isinstance(bank, Bank) and bank.total == 600 and len(bank.features) == SIZE


def test_weights_stand_for_repeated_features():
    rows = clusters(12, seed=5)
    counts = np.arange(1, 13)
    repeated = np.repeat(rows, counts, axis=0)
    centers, weights = compress(rows, 12, weights=counts)
    np.testing.assert_allclose(weights, counts / counts.sum(), rtol=1e-6)
    for method in ("kmeans", "kcenter"):
        centers, weights = compress(rows, 4, method, weights=counts)
        nearest = (repeated @ centers.T).argmax(axis=1)
        np.testing.assert_allclose(weights, np.bincount(nearest) / len(repeated), rtol=1e-6)
        if method == "kmeans":
            means = np.stack([repeated[nearest == c].mean(axis=0) for c in range(4)])
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            np.testing.assert_allclose(centers, means, atol=1e-5)
    with pytest.raises(ValueError, match="12 positive numbers"):
        compress(rows, 4, weights=np.zeros(12))


def test_from_files_to_a_detector(normal, tmp_path):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(8, 5, 4),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    extractor = FeatureExtractor(backbone, 32, 32)
    extractor.save(tmp_path / "extractor.keras")
    for number, image in enumerate(normal[:12]):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    file = io.BytesIO()
    Image.fromarray(np.tile(normal[0], (2, 2, 1))).save(file, "png")
    files = [(path.name, path.read_bytes()) for path in sorted(tmp_path.glob("*.png"))]
    files += [("large", file.getvalue()), ("bad", b"no image")]
    file = io.BytesIO()  # A few kilobytes that would decode to 200 MB.
    Image.new("1", (9000, 7500)).save(file, "tiff", compression="group4")
    files += [("huge", file.getvalue())]
    found_at = str(tmp_path / "bank.npz")
    with beam.Pipeline("FnApiRunner") as pipeline:
        found = pipeline | beam.Create(files) | ExtractFeatures(tmp_path / "extractor.keras", 4)
        assert_that(found.errors | beam.Keys(), equal_to(["bad", "huge"]))
        bank = found.features | beam.Values() | beam.CombineGlobally(CompressFeatures(100))
        bank | beam.Map(lambda bank: np.savez(found_at, **bank._asdict()))
    bank = np.load(found_at)
    assert bank["total"] == 13
    expected = extract_features(extractor, normal[:12], verbose=0)
    nearest = np.linalg.norm(expected[:, None] - bank["features"][None], axis=-1).min(axis=1)
    assert nearest.max() < 1e-5
    calibration = extract_features(extractor, normal[12:], verbose=0)
    detector = Detector.from_features(
        extractor, bank["features"], calibration, 0.1, bank_weights=bank["weights"]
    )
    assert detector.predict(normal[:4], verbose=0)["ood_score"].shape == (4,)


def convolution_and_mean():
    images = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(8, 5, 4, name="maps")(images)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(maps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "maps"}, "one feature vector per image. Received: .*layers=.*maps"),
        ({"standardized": True}, "call `standardize` first. Received: .*deviations of 1"),
    ],
)
def test_extractors_without_features_to_compare_are_refused(options, message, tmp_path):
    path = tmp_path / "extractor.keras"
    FeatureExtractor(convolution_and_mean(), 32, 32, **options).save(path)
    with pytest.raises(ValueError, match=message):
        ExtractorHandler(path).load_model()


def test_a_bank_for_a_detector_that_standardizes_features(normal, tmp_path):
    detector = Detector.from_images(
        convolution_and_mean(), normal[:12], normal[12:], 0.1, image_size=32, standardize=True
    )
    detector.save(tmp_path / "detector.keras")
    for number, image in enumerate(normal[:12]):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    files = [(path.name, path.read_bytes()) for path in sorted(tmp_path.glob("*.png"))]
    compress_features = CompressFeatures(100, metric=detector.extractor.metric)
    found_at = str(tmp_path / "bank.npz")
    with beam.Pipeline("FnApiRunner") as pipeline:
        found = pipeline | beam.Create(files) | ExtractFeatures(tmp_path / "detector.keras", 4)
        bank = found.features | beam.Values() | beam.CombineGlobally(compress_features)
        bank | beam.Map(lambda bank: np.savez(found_at, **bank._asdict()))
    bank = np.load(found_at)
    again = Detector.from_features(
        detector.extractor,
        bank["features"],
        extract_features(detector.extractor, normal[12:], verbose=0),
        0.1,
        bank_weights=bank["weights"],
    )
    # The same bank, in another order: the same scores.
    expected = detector.predict(normal, verbose=0)["ood_score"]
    np.testing.assert_allclose(again.predict(normal, verbose=0)["ood_score"], expected, atol=0.01)


def test_standardized_features_are_merged_by_distance():
    rows = clusters(4000, seed=1) * 4.0 + 1.0
    sketch = BankSketch(SIZE, metric="euclidean")
    for shard in np.split(rows, 20):
        sketch.add(shard)
    bank = sketch.bank()
    assert np.ptp(np.linalg.norm(bank.features, axis=1)) > 1.0  # Means, not of norm 1.
    probes = clusters(200, seed=2) * 4.0 + 1.0
    whole, found = (
        ood_score(probes, of, metric="euclidean", weights=weights).numpy()
        for of, weights in ((rows, None), (bank.features, bank.weights))
    )
    assert np.corrcoef(whole, found)[0, 1] > 0.99
    with pytest.raises(ValueError, match=r"bounds the error.*metric='euclidean'"):
        bank.score_error()
    with pytest.raises(ValueError, match=r"pass `metric=extractor.metric`.*norms from"):
        BankSketch(SIZE).add(rows)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_that_are_not_finite_are_refused(metric):
    rows = clusters(5, seed=1)
    rows[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"Features must be finite. Received: 1 of 5"):
        BankSketch(SIZE, metric=metric).add(rows)


def test_equal_features_make_one_center():
    sketch = BankSketch(3, "kcenter")
    sketch.add(np.repeat(np.eye(4, dtype=np.float32)[:2], 50, axis=0))
    bank = sketch.bank()
    assert len(bank.features) == 2 and (bank.weights > 0).all()
