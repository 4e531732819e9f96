"""Detectors of aligned images: each place against the same place of other images."""

import contextlib

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from forks import save_with_and_without
from PIL import Image
from scipy.spatial import distance
from scripts import example
from test_local import check_promise, convnet, damaged
from test_local_exports import VARIANTS, close

from sddns_tf import aligned, export
from sddns_tf.cli import info
from sddns_tf.detector import Detector
from sddns_tf.export import metadata, verify
from sddns_tf.features import FeatureExtractor, extract_features

SCENE = skimage.data.astronaut()[60:124, 180:244].astype(np.float32)


def scenes(count, seed):
    """One scene, seen by a fixed camera: only light and noise change."""
    rng = np.random.default_rng(seed)
    light = rng.uniform(0.9, 1.1, (count, 1, 1, 1))
    noise = rng.normal(0, 8, (count, *SCENE.shape))
    return np.clip(light * SCENE + noise, 0, 255).astype(np.uint8)


def moved(count, seed):
    """The same with its left and right half exchanged: every part is there, in another place."""
    return np.roll(scenes(count, seed), 32, axis=2)


def made(**options):
    options = {"layers": "eight", "aligned": True, "verbose": 0, **options}
    return Detector.from_images(convnet(), scenes(60, 0), scenes(39, 1), 0.1, **options)


@pytest.fixture(scope="module")
def detector():
    return made()


def mahalanobis(extractor, training, images):
    """Squared Mahalanobis distances of places `(N, h, w)`, written out place by place."""
    raw = FeatureExtractor(
        extractor.backbone, extractor.image_size, extractor.resolution, layers=extractor.layer_names
    )
    seen, new = (extract_features(raw, x, verbose=0).astype(np.float64) for x in (training, images))
    deviation = seen.reshape(-1, seen.shape[-1]).std(axis=0)
    deviation = np.maximum(deviation, 0.01 * np.median(deviation[deviation > 0]))
    found = np.empty(new.shape[:3])
    for row, column in np.ndindex(new.shape[1:3]):
        place = seen[:, row, column] / deviation
        covariance = np.cov(place.T, bias=True) + aligned.REGULARIZATION * np.eye(place.shape[1])
        found[:, row, column] = [
            distance.mahalanobis(one / deviation, place.mean(axis=0), np.linalg.inv(covariance))
            for one in new[:, row, column]
        ]
    return found**2


def test_a_place_scores_its_mahalanobis_distance(detector):
    images = np.concatenate([scenes(4, 2), moved(2, 3)])
    distances = mahalanobis(detector.extractor, scenes(60, 0), images)
    dim = detector.extractor.feature_dim
    expected = detector.lowest_score + distances / (2 * dim * detector.temperature)
    found = detector.predict(images, verbose=0)
    np.testing.assert_allclose(found["anomaly_map"], expected, rtol=1e-3, atol=0.02)
    check_promise(detector, found)


def test_what_is_in_another_place_is_found():
    # Only columns inside both halves count: no place there sees the seam.
    seam = np.ones((8, 8), bool)
    seam[:, [1, 5]] = False
    exchanged, found = moved(20, 5), {}
    for is_aligned, size in ((True, None), (False, 5000)):
        one = made(aligned=is_aligned, bank_size=size, ignore=seam)
        found[is_aligned] = one.predict(exchanged, verbose=0)["ood_score"] - one.threshold
        assert one.predict(scenes(30, 4), verbose=0)["is_ood"].mean() < 0.35
    assert (found[True] > 0).all()
    # In a bank of all places, what is new for this place is known from another.
    assert (found[False] < 0).mean() > 0.5


def test_batches_do_not_change_the_moments():
    maps = np.random.default_rng(0).normal(5, 2, (40, 2, 3, 4)).astype(np.float32)
    whole, parts = (aligned.PlaceMoments((2, 3), 4) for _ in range(2))
    whole.add(maps)
    for part in np.array_split(maps, 7):
        parts.add(part)
    np.testing.assert_allclose(parts.mean(), maps.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(parts.matrices(), whole.matrices(), rtol=1e-3, atol=1e-4)
    whitening = aligned.PlaceWhitening((2, 3), 4)
    np.testing.assert_array_equal(whitening(maps), maps)
    whitening.assign(whole.mean(), whole.matrices())
    found = whitening(maps).numpy()
    covariance = np.einsum("nhwc,nhwd->hwcd", found, found) / len(maps)
    # What regularization leaves out: less than a hundredth of a channel's variance.
    assert np.abs(covariance - np.eye(4)).max() < 0.05


def test_few_images_and_channels_without_spread_are_no_trouble():
    few = Detector.from_images(
        convnet(), scenes(3, 0), scenes(19, 1), layers="eight", aligned=True, verbose=0
    )
    answers = few.predict(np.concatenate([scenes(3, 2), moved(3, 3)]), verbose=0)
    assert np.isfinite(answers["anomaly_map"]).all()
    assert answers["ood_score"][:3].max() < answers["ood_score"][3:].min()


def test_images_that_are_not_finite_are_flagged(detector):
    spoiled = scenes(2, 2).astype(np.float32)
    spoiled[0, 5, 5] = np.nan
    assert detector.predict(spoiled, verbose=0)["is_ood"].tolist() == [True, False]


def test_it_survives_keras_and_is_described(detector, tmp_path):
    images = np.concatenate([scenes(4, 2), moved(2, 3)])
    detector.save(tmp_path / "scene.keras")
    again = keras.saving.load_model(tmp_path / "scene.keras")
    assert again.extractor.aligned and again.bank.shape[0] == 1
    for name, value in detector.predict(images, verbose=0).items():
        np.testing.assert_array_equal(again.predict(images, verbose=0)[name], value)
    assert info.describe(tmp_path / "scene.keras")["aligned"] is True
    copy = detector.extractor.snapshot()
    matrices = detector.extractor.whitening.matrices
    np.testing.assert_array_equal(copy.whitening.matrices, matrices)


def test_false_alarms_count_as_normal_and_groups_have_a_calibration_each(detector):
    one = Detector.from_config(detector.get_config())
    one.set_weights(detector.get_weights())
    alarms, others = moved(3, 5), scenes(20, 6)
    others[:, 20:36, 20:36] = [250, 0, 0]
    before = one.predict(others, verbose=0)["ood_score"]
    one.extend(alarms, verbose=0)
    assert not one.predict(alarms, verbose=0)["is_ood"].any()
    assert one.predict(others, verbose=0)["is_ood"].all()
    assert (one.predict(others, verbose=0)["ood_score"] <= before).all()
    group = detector.calibrated_on(scenes(19, 7), verbose=0)
    assert group.calibration_scores.shape == (19,) and group.extractor is detector.extractor


def test_a_saved_model_agrees(detector, tmp_path):
    images = np.concatenate([scenes(4, 2), moved(2, 3)])
    path = export.saved_model(detector, tmp_path / "scene", images=images)
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = {key: value.numpy() for key, value in signature(images=tf.constant(images)).items()}
    expected = detector.predict(images, verbose=0)
    assert close(detector, found["anomaly_map"], expected["anomaly_map"], 4e-6)
    check_promise(detector, found)


@pytest.mark.parametrize("quantization", VARIANTS)
def test_every_variant_of_a_tflite_file_agrees(detector, quantization, tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    images = np.concatenate([scenes(6, 2), moved(6, 3)])
    path = export.tflite(
        detector,
        tmp_path / "scene.tflite",
        quantization,
        np.concatenate([scenes(20, 7), images]),
        scenes(39, 1),
        batch_size=1,
        verbose=0,
    )
    runner = interpreter.Interpreter(str(path)).get_signature_runner("serving_default")
    answers = [runner(images=image[np.newaxis]) for image in images]
    found = {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}
    expected = detector.predict(images, verbose=0)["anomaly_map"]
    cosine = verify.COSINE_TOLERANCE[quantization]
    assert close(detector, found["anomaly_map"], expected, cosine)
    about = metadata.description(path.read_bytes())
    above = (found["anomaly_map"] > np.float32(about["threshold"])).any(axis=(1, 2))
    np.testing.assert_array_equal(found["is_ood"], above)
    assert found["is_ood"][6:].all()
    assert not {"CUSTOM", "DELEGATE"} & set(metadata.operators(path.read_bytes()))


@pytest.mark.slow
def test_a_device_extends_as_the_detector(detector, tmp_path):
    pytest.importorskip("ai_edge_litert")
    room = {"batch_size": 1, "extension_room": 100, "verbose": 0}
    path = export.tflite(detector, tmp_path / "scene.tflite", **room)
    alarm, one = scenes(1, 5), Detector.from_config(detector.get_config())
    alarm[:, 20:36, 20:36] = [250, 0, 0]
    one.set_weights(detector.get_weights())
    one.extend(alarm, verbose=0)
    Image.fromarray(alarm[0]).save(tmp_path / "alarm.png")
    with example("edge_inference") as module:
        module.main([str(path), "--extend", str(tmp_path / "alarm.png")])
        images = np.concatenate([alarm, scenes(3, 6), moved(2, 7)])
        found = module.score(module.load(path), images)
    expected = one.predict(images, verbose=0)
    features = one.features(images).numpy()
    cosine = verify.COSINE_TOLERANCE[None]
    assert close(one, found["anomaly_map"], expected["anomaly_map"], cosine, 1, features)
    np.testing.assert_array_equal(found["is_ood"], expected["is_ood"])
    assert detector.predict(alarm, verbose=0)["is_ood"][0] and not found["is_ood"][0]


def test_a_compressed_bank_keeps_the_mean_of_each_place(detector):
    one = Detector.from_config(detector.get_config())
    one.set_weights(detector.get_weights())
    rows = np.random.default_rng(0).normal(size=(300, one.extractor.feature_dim)) * 5
    one = one._with(
        np.concatenate([one.bank.numpy(), rows.astype(np.float32)]),
        np.full(301, 1 / 301),
        one.calibration_scores.numpy(),
    )
    for size in (1, 2, 50):
        small = one.compressed(size)
        assert small.bank.shape[0] == size and not np.any(small.bank[0])


def test_calibration_images_of_the_bank_are_noticed():
    with pytest.warns(UserWarning, match="5 of the 39 calibration images are in the bank"):
        Detector.from_images(
            convnet(),
            scenes(60, 0),
            np.concatenate([scenes(60, 0)[:5], scenes(34, 1)]),
            0.1,
            layers="eight",
            aligned=True,
            verbose=0,
        )


@pytest.mark.parametrize("options", [{"bank_size": 100}, {"aligned": True}], ids=str)
def test_images_may_come_from_generators(options):
    def parts(images):
        yield from np.array_split(images, 4)

    whole, streamed = (
        Detector.from_images(
            convnet(),
            kind(scenes(60, 0)),
            kind(scenes(39, 1)),
            0.1,
            layers="eight",
            resolution=64,
            verbose=0,
            **options,
        )
        for kind in (np.asarray, parts)
    )
    assert streamed.threshold == pytest.approx(whole.threshold, rel=1e-3)
    assert streamed.calibration_scores.shape == (39,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": None}, "pass `layers` as well. Received: aligned=True without layers"),
        ({"bank_size": 100}, "leave out `bank_size` and `k`. Received: bank_size=100, k=None"),
        ({"k": 5}, "Received: bank_size=None, k=5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_too_many_channels_are_named():
    images = keras.Input((64, 64, 3))
    maps = keras.layers.Conv2D(512, 3, 2, padding="same", name="wide")(images)
    wide = keras.Model(images, keras.layers.GlobalAveragePooling2D()(maps))
    with pytest.raises(ValueError, match=r"name fewer layers.* of 512 channels, 1,074 MB"):
        FeatureExtractor(wide, layers="wide", aligned=True)


def build(strategy):
    with strategy.scope() if strategy else contextlib.nullcontext():
        one = made()
    return {"threshold": one.threshold, **one.predict(damaged(5, 1), batch_size=4, verbose=0)}


@pytest.mark.slow
def test_two_replicas_equal_one_device(fork, tmp_path):
    path = tmp_path / "found.npz"
    process = fork(save_with_and_without, 2, build, path)
    assert process.wait() == 0, process.errors[-4000:]
    found = np.load(path)
    assert {"several anomaly_map", "several threshold"} <= set(found)
    for name in found:
        one = found[name.replace("several", "one")].astype(float)
        np.testing.assert_allclose(found[name].astype(float), one, rtol=1e-3, atol=2e-2)
