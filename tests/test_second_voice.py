"""The second voice of the score: auxiliary images beside the bank."""

import export_checks
import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import conv, no_pictures

import sddns_tf
from sddns_tf import building, export, second_voice
from sddns_tf.bank import ood_score
from sddns_tf.cli import info
from sddns_tf.cli.errors import UsageError
from sddns_tf.features import extract_features

WEIGHT = 4.0


@pytest.fixture(scope="module")
def features():
    generator = np.random.default_rng(0)
    bank = generator.normal(3.0, (0.1, 1.0, 0.0, 20.0), (120, 4)).astype(np.float32)
    others = generator.normal((3.2, 4.0, 3.0, 3.0), (0.2, 1.0, 0.1, 30.0), (60, 4))
    return bank, others.astype(np.float32)


def probability(features, direction, bias):
    return expit(features.astype(np.float64) @ direction + bias)


def test_it_is_a_logistic_regression_of_as_many_of_each(features):
    bank, others = features
    found = second_voice.fit(bank, others, np.full(120, 1 / 120, np.float32))
    # Each auxiliary image twice, and channels of one scale.
    rows = np.concatenate([bank, others, others])
    scaler = StandardScaler().fit(bank)
    scaler.scale_ = building.moments_of(bank)[1]  # One channel is constant in the bank.
    expected = LogisticRegression(C=0.1 * 180 / 240, max_iter=5_000, tol=1e-8)
    expected.fit(scaler.transform(rows), np.repeat([0, 1], 120))
    expected = expected.predict_proba(scaler.transform(rows))[:, 1]
    np.testing.assert_allclose(probability(rows, *found), expected, atol=5e-3)


def test_weights_of_the_bank_count(features):
    bank, others = features
    counts = np.where(bank[:, 1] > np.median(bank[:, 1]), 50, 1)
    weights = counts.astype(np.float32)
    found = second_voice.fit(bank, others, weights)
    repeated = np.repeat(bank, counts, axis=0)
    alike = second_voice.fit(bank, others, 7 * weights)
    for one, other in zip(found, alike, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    whole = second_voice.fit(repeated, others, np.ones(len(repeated), np.float32))
    equal = second_voice.fit(bank, others, np.ones_like(weights))
    everything = np.concatenate([bank, others])
    right, wrong = (
        np.abs(probability(everything, *one) - probability(everything, *whole)).mean()
        for one in (found, equal)
    )
    assert right < 0.5 * wrong


def test_surprise_is_minus_log_of_not_being_auxiliary():
    logits = np.array([-200.0, -3.0, 0.0, 2.0, 90.0], np.float32)
    found = second_voice.surprise(logits[:, np.newaxis] / 2, np.float32([2.0]), np.float32(0.0))
    np.testing.assert_allclose(found, np.logaddexp(0.0, logits), rtol=1e-6)
    assert np.isnan(second_voice.surprise(np.float32([[np.nan]]), [1.0], 0.0))


@pytest.fixture(scope="module")
def parts(grass_and_person):
    """Bank, calibration and fresh images of grass, and crops of a person."""
    images = grass_and_person(90, 0)
    return images[:50], images[50:79], images[79:90], images[90:]


def make(parts, **options):
    keras.utils.set_random_seed(0)
    bank, calibration, _, person = parts
    return sddns_tf.Detector.from_images(
        conv(16),
        bank,
        calibration,
        0.1,
        image_size=32,
        verbose=0,
        **{"auxiliary_images": person[:45], "auxiliary_weight": WEIGHT, **options},
    )


@pytest.fixture(scope="module", params=[False, True])
def detector(request, parts):
    return make(parts, standardize=request.param)


def test_it_is_added_to_the_papers_score(detector, parts):
    images = np.concatenate(parts[2:])
    features = extract_features(detector.extractor, images, verbose=0)
    bank = extract_features(detector.extractor, parts[0], verbose=0)
    alone = ood_score(features, bank, metric=detector.extractor.metric).numpy()
    others = extract_features(detector.extractor, parts[3][:45], verbose=0)
    voice = second_voice.fit(bank, others, np.ones(50, np.float32))
    expected = alone - WEIGHT * np.log(1.0 - probability(features, *voice))
    found = detector.predict(images, verbose=0)["ood_score"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
    assert np.abs(found - alone)[11:].min() > 0.1
    # The calibration images' scores have it too, so the promise holds.
    flagged = detector.predict(parts[1], verbose=0)["is_ood"]
    assert flagged.sum() <= 3 and detector.calibration_scores.shape == (29,)


def test_copies_and_files_keep_it(detector, parts, tmp_path):
    images = np.concatenate(parts[2:])
    expected = detector.predict(images, verbose=0)["ood_score"]
    detector.save(tmp_path / "d.keras")
    loaded = keras.models.load_model(tmp_path / "d.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0)["ood_score"], expected)
    group = detector.calibrated_on(parts[2], verbose=0)
    found = group.predict(images[11:], verbose=0)["ood_score"]
    np.testing.assert_allclose(found, expected[11:], atol=group.rounding)
    small = detector.compressed(20).predict(images, verbose=0)["ood_score"]
    without = make(parts, auxiliary_images=None, auxiliary_weight=0.0).compressed(20)
    assert np.corrcoef(small, expected)[0, 1] > 0.99 and without.auxiliary_weight == 0.0
    # What joins the bank looks like the auxiliary images all the same.
    loaded.extend(images[11:], verbose=0)
    features = extract_features(loaded.extractor, images, verbose=0)
    metric = loaded.extractor.metric
    alone = ood_score(features, loaded.bank, metric=metric, weights=loaded.bank_weights)
    added = loaded.scores(features)["ood_score"] - alone
    before = detector.scores(features)["ood_score"] - ood_score(
        features, detector.bank, metric=metric
    )
    np.testing.assert_allclose(added, before, atol=1e-3)


def test_batches_do_not_change_a_score_by_more_than_rounding(detector, parts):
    images = np.concatenate(parts)
    features = extract_features(detector.extractor, images, verbose=0)
    whole = detector.scores(features)["ood_score"].numpy()
    for size in (1, 7):
        apart = [
            detector.scores(extract_features(detector.extractor, images[i : i + size], verbose=0))
            for i in range(0, len(images), size)
        ]
        scores = np.concatenate([one["ood_score"] for one in apart])
        assert np.abs(scores - whole).max() <= detector.rounding


@pytest.mark.slow
def test_a_saved_model_and_its_own_check_agree(detector, parts, tmp_path):
    images = np.concatenate(parts[2:])
    with export_checks.in_this_process():
        folder = export.saved_model(detector, tmp_path / "model", images=images)
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    found = served(images=tf.constant(images))["ood_score"].numpy()
    expected = detector.predict(images, verbose=0)["ood_score"]
    np.testing.assert_allclose(found, expected, atol=10 * detector.rounding)


@pytest.mark.parametrize(
    "quantization",
    [None, *(pytest.param(x, marks=pytest.mark.slow) for x in ("dynamic", "float16", "int8"))],
)
def test_a_tflite_file_ranks_as_the_detector(parts, tmp_path, quantization):
    detector = make(parts, standardize=True)
    images = np.concatenate(parts[2:])
    path = export.tflite(
        detector,
        tmp_path / "d.tflite",
        quantization=quantization,
        representative_images=parts[0],
        calibration_images=parts[1],
        verbose=0,
    )
    found = tf.lite.Interpreter(str(path)).get_signature_runner()(images=images)["ood_score"]
    expected = detector.predict(images, verbose=0)["ood_score"]
    assert np.corrcoef(found, expected)[0, 1] > (0.999 if quantization != "int8" else 0.98)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_weight": 0.0}, "go together. Received: auxiliary_weight=0.0 and some"),
        ({"auxiliary_images": None}, "go together. Received: auxiliary_weight=4.0 and none"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"layers": "auto"}, "leave out one of it and `layers`"),
        ({"auxiliary_images": np.zeros((3, 8, 8, 3)) + 300}, "auxiliary_images"),
    ],
)
def test_what_does_not_fit_is_told(parts, options, message):
    with pytest.raises(ValueError, match=message):
        make(parts, **options)


@pytest.mark.slow
def test_the_command_trains_reports_and_refuses(train_on, tmp_path, capsys):
    with no_pictures():
        train_on(tmp_path / "out", "--set=detector.auxiliary_weight=4")
    capsys.readouterr()
    info.main([str(tmp_path / "out" / "detector.keras")])
    assert "auxiliary_weight     4.0" in capsys.readouterr().out
    with pytest.raises(UsageError, match="auxiliary_weight=4 needs --auxiliary"):
        train_on(tmp_path / "no", "--set=detector.auxiliary_weight=4", "--auxiliary=")
