"""Places of many channels, reduced to principal components and the length of the rest."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_checks import in_this_process
from scripts import example
from sklearn.decomposition import PCA
from test_local import bricks, check_promise, damaged
from test_local_exports import VARIANTS, close

from sddns_tf import export
from sddns_tf.cli import info
from sddns_tf.components import PrincipalComponents
from sddns_tf.detector import Detector
from sddns_tf.export import verify
from sddns_tf.features import FeatureExtractor, extract_features

# 8 x 8 places of 160 channels, as a pretrained network has them.
WIDE = {"eight": 64, "sixteen": 96}


def wide():
    """Random weights; normal images are gray, so that many channels vary together."""
    keras.utils.set_random_seed(0)
    x = images = keras.Input((None, None, 3))
    for name, width in (("two", 16), ("four", 24), *WIDE.items()):
        x = keras.layers.Conv2D(width, 3, 2, padding="same", activation="relu", name=name)(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x), name="wide")


def made(**options):
    options = {"layers": "auto", "bank_size": 300, "verbose": 0, **options}
    return Detector.from_images(wide(), bricks(60, 0), bricks(59, 1), **options)


@pytest.fixture(scope="module")
def detector():
    return made(components=16)


def plain_maps(detector, images):
    """All channels, standardized by the bank, before they are reduced."""
    raw = FeatureExtractor(detector.extractor.backbone, 64, 64, layers=("eight", "sixteen"))
    bank = extract_features(raw, bricks(60, 0), verbose=0).reshape(-1, 160)
    deviation = bank.std(axis=0)
    deviation = np.maximum(deviation, 0.01 * np.median(deviation[deviation > 0]))
    return (extract_features(raw, images, verbose=0) - bank.mean(axis=0)) / deviation


def test_they_are_principal_components_and_the_length_of_the_rest(detector):
    """By scikit-learn; all 3,840 places are drawn here, so they are those of the whole bank."""
    bank = plain_maps(detector, bricks(60, 0)).reshape(-1, 160)
    images = np.concatenate([bricks(4, 2), damaged(4, 3)])
    maps = plain_maps(detector, images)
    pca = PCA(15).fit(bank)
    parts = maps.reshape(-1, 160) @ pca.components_.T
    rest = np.linalg.norm(maps.reshape(-1, 160) - parts @ pca.components_, axis=1)
    expected = np.abs(np.column_stack([parts, rest])) * np.sqrt(16 / 160)
    found = np.abs(detector.features(images).numpy().reshape(-1, 16))  # signs are arbitrary
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_distances_are_bounded_by_those_of_all_channels():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20))).astype(np.float32)
    layer = PrincipalComponents(20, 8)
    layer.assign(rows[:250])
    reduced = layer(rows).numpy() / np.sqrt(8 / 20)
    first, second = rng.integers(0, 500, (2, 2000))
    near = np.linalg.norm(reduced[first] - reduced[second], axis=1)
    assert (near <= np.linalg.norm(rows[first] - rows[second], axis=1) * (1 + 1e-5)).all()
    np.testing.assert_allclose(
        np.linalg.norm(reduced, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5
    )


def test_rows_within_the_components_lose_nothing():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(500, 5)) @ rng.normal(size=(5, 20))).astype(np.float32)
    layer = PrincipalComponents(20, 8)
    layer.assign(rows)
    reduced = layer(rows).numpy() / np.sqrt(8 / 20)
    assert np.abs(reduced[:, -1]).max() < 1e-4
    distances = [np.linalg.norm(x[:250] - x[250:], axis=1) for x in (rows, reduced)]
    np.testing.assert_allclose(*distances, rtol=1e-4)


def test_what_varies_in_no_normal_image_is_still_seen(detector):
    """A tint, where all normal images are gray, lies in the rest more than in the components."""
    tinted = bricks(8, 4).astype(np.float32)
    tinted[:, 24:40, 24:40] *= [2.0, 1.0, 0.2]
    tinted = np.clip(tinted, 0, 255).astype(np.uint8)
    features = detector.features(tinted).numpy()
    found = detector.answer(tf.constant(features))
    assert found["is_ood"].numpy().all()
    features[..., -1] = 0.0
    without_rest = detector.answer(tf.constant(features))
    assert (without_rest["ood_score"] + 5.0 < found["ood_score"]).numpy().all()


def test_by_default_all_channels_are_compared():
    every = made()
    assert every.extractor.components is None and every.bank.shape == (300, 160)
    found = extract_features(every.extractor, bricks(3, 2), verbose=0)
    np.testing.assert_allclose(found, plain_maps(every, bricks(3, 2)), atol=1e-3)


def test_few_places_are_enough():
    few = Detector.from_images(
        wide(), bricks(1, 0), bricks(19, 1), layers="sixteen", components=40, verbose=0
    )
    assert few.bank.shape == (16, 40)
    assert np.isfinite(few.predict(damaged(3, 2), verbose=0)["anomaly_map"]).all()


def test_it_survives_keras_and_is_described(detector, tmp_path):
    detector.save(tmp_path / "parts.keras")
    again = keras.saving.load_model(tmp_path / "parts.keras")
    for name, value in detector.predict(damaged(4, 5), verbose=0).items():
        np.testing.assert_array_equal(again.predict(damaged(4, 5), verbose=0)[name], value)
    about = info.describe(tmp_path / "parts.keras")
    assert about["components"] == about["feature_dimension"] == 16
    directions = detector.extractor.principal.directions
    np.testing.assert_array_equal(detector.extractor.snapshot().principal.directions, directions)


def test_false_alarms_count_as_normal(detector):
    one = Detector.from_config(detector.get_config())
    one.set_weights(detector.get_weights())
    assert one.predict(damaged(2, 5), verbose=0)["is_ood"].all()
    one.extend(damaged(2, 5), verbose=0)
    assert not one.predict(damaged(2, 5), verbose=0)["is_ood"].any()


def test_calibration_images_of_the_bank_are_noticed():
    with pytest.warns(UserWarning, match="5 of the 59 calibration images are in the bank"):
        images = np.concatenate([bricks(60, 0)[:5], bricks(54, 1)])
        options = {"layers": "auto", "bank_size": 10_000, "components": 16, "verbose": 0}
        Detector.from_images(wide(), bricks(60, 0), images, **options)


def test_a_saved_model_agrees(detector, tmp_path):
    images = np.concatenate([bricks(4, 2), damaged(4, 3)])
    with in_this_process():
        path = export.saved_model(detector, tmp_path / "parts", images=images)
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = {key: value.numpy() for key, value in signature(images=tf.constant(images)).items()}
    expected = detector.predict(images, verbose=0)["anomaly_map"]
    assert close(detector, found["anomaly_map"], expected, 4e-6)
    check_promise(detector, found)


@pytest.mark.parametrize("quantization", VARIANTS)
def test_every_variant_of_a_tflite_file_agrees(detector, quantization, tmp_path):
    pytest.importorskip("ai_edge_litert")
    images = np.concatenate([bricks(6, 2), damaged(6, 3)])
    representative = np.concatenate([bricks(20, 7), images])
    options = {"batch_size": 1, "verbose": 0}
    path = tmp_path / "parts.tflite"
    export.tflite(detector, path, quantization, representative, bricks(59, 1), **options)
    with example("edge_inference") as module:
        found = module.score(module.load(path), images)
    expected = detector.predict(images, verbose=0)["anomaly_map"]
    cosine = verify.COSINE_TOLERANCE[quantization]
    assert close(detector, found["anomaly_map"], expected, cosine)


def test_a_device_extends_as_the_detector(detector, tmp_path):
    pytest.importorskip("ai_edge_litert")
    path, alarm = tmp_path / "parts.tflite", damaged(1, 5)
    export.tflite(detector, path, batch_size=1, extension_room=100, verbose=0)
    one = Detector.from_config(detector.get_config())
    one.set_weights(detector.get_weights())
    one.extend(alarm, verbose=0)
    keras.utils.save_img(tmp_path / "alarm.png", alarm[0], scale=False)
    images = np.concatenate([alarm, bricks(3, 6), damaged(2, 7)])
    with example("edge_inference") as module:
        assert module.score(module.load(path), alarm)["is_ood"][0]
        module.main([str(path), "--extend", str(tmp_path / "alarm.png")])
        found = module.score(module.load(path), images)
    expected, features = one.predict(images, verbose=0), one.features(images).numpy()
    cosine = verify.COSINE_TOLERANCE[None]
    assert close(one, found["anomaly_map"], expected["anomaly_map"], cosine, 1, features)
    np.testing.assert_array_equal(found["is_ood"], expected["is_ood"])
    assert not found["is_ood"][0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"components": 1}, "`components` must be an int from 2 to 159. Received: components=1"),
        ({"components": 160}, "`components` must be an int from 2 to 159. Received: "),
        ({"components": 6.5}, "`components` must be a positive int. Received: components=6.5"),
        ({"components": 16, "aligned": True}, "places that are not aligned: .* aligned=True"),
        ({"components": 16, "layers": None}, "pass `layers` without `aligned=True`. Received: "),
    ],
    ids=str,
)
def test_a_wrong_number_is_told_before_any_image_is_read(options, message):
    unread = tf.data.Dataset.from_generator(iter, output_signature=tf.TensorSpec((1, 64, 64, 3)))
    options = {"layers": "auto", "resolution": 64, **options}
    with pytest.raises(ValueError, match=message):
        Detector.from_images(wide(), unread, unread, **options)


@pytest.mark.parametrize("options", [{}, {"layers": "eight", "aligned": True}], ids=str)
def test_only_maps_that_are_not_aligned_have_components(options):
    with pytest.raises(ValueError, match="`components` reduces the channels of places"):
        FeatureExtractor(wide(), 64, components=16, **options)
