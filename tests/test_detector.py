"""Detectors of whole images: answers, calibration, saving, and what is refused."""

import subprocess
import sys
import tracemalloc
import warnings

import export_checks
import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from sddns_tf import export, image_ops
from sddns_tf.calibration import largest_flagged_rank, merged, snapped
from sddns_tf.detector import Detector
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.vit import VisionTransformer


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def crops(photograph, number, seed, size=32):
    """Random square crops of a photograph, as RGB."""
    if photograph.ndim == 2:
        photograph = np.repeat(photograph[..., np.newaxis], 3, axis=-1)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, photograph.shape[0] - size, number)
    columns = rng.integers(0, photograph.shape[1] - size, number)
    return np.stack(
        [photograph[y : y + size, x : x + size] for y, x in zip(rows, columns, strict=True)]
    )


def grass(number, seed):
    return crops(skimage.data.grass(), number, seed)


def conv_backbone():
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


def vit_backbone():
    backbone = VisionTransformer(image_size=16, patch_size=8, hidden_dim=12, depth=1, num_heads=2)
    backbone.build((None, 16, 16, 3))
    return backbone


def make_detector(backbone=None, rate=0.1, **options):
    return Detector.from_images(
        backbone or conv_backbone(), grass(30, 0), grass(19, 1), rate, verbose=0, **options
    )


def assert_same(outputs, expected):
    assert outputs.keys() == expected.keys() == {"ood_score", "p_value", "is_ood"}
    for name in expected:
        np.testing.assert_array_equal(outputs[name], expected[name])


def test_score_is_the_paper_formula_on_the_images():
    backbone, images = conv_backbone(), grass(6, 2)
    detector = make_detector(backbone, temperature=0.05, offset=0.2)

    def features(images):
        rows = backbone(image_ops.normalize(images)).numpy().astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    cosines = features(images) @ features(grass(30, 0)).T
    expected = -np.log(np.mean(np.exp((cosines - 0.2) / 0.05), axis=1))
    np.testing.assert_allclose(detector(images)["ood_score"], expected, rtol=1e-4)
    np.testing.assert_allclose(detector.features(images), features(images), atol=1e-5)


def test_standardized_features_are_compared_as_the_bank_sees_them(tmp_path):
    backbone, images = conv_backbone(), grass(6, 2)
    detector = make_detector(backbone, standardize=True)
    known, new = (
        (lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True))(
            backbone(image_ops.normalize(some)).numpy().astype(np.float64)
        )
        for some in (grass(30, 0), images)
    )
    known, new = ((rows - known.mean(axis=0)) / known.std(axis=0) for rows in (known, new))
    np.testing.assert_allclose(detector.features(images), new, rtol=1e-3, atol=1e-3)
    squares = np.square(new[:, np.newaxis] - known).mean(axis=-1)
    expected = -np.log(np.mean(np.exp((1 - squares / 2 - 0.1) / 0.04), axis=1))
    found = detector.predict(images, verbose=0)
    np.testing.assert_allclose(found["ood_score"], expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(found["ood_score"], make_detector(backbone)(images)["ood_score"])
    detector.save(tmp_path / "detector.keras")
    loaded = keras.models.load_model(tmp_path / "detector.keras")
    assert_same(loaded.predict(images, verbose=0), found)
    # The same images score the same, up to rounding, alone and in a batch.
    alone = [detector(images[i : i + 1])["ood_score"].numpy()[0] for i in range(6)]
    np.testing.assert_allclose(alone, found["ood_score"], atol=detector.rounding)


def test_standardized_features_are_exported(tmp_path):
    """A `.tflite` file and a SavedModel check themselves against the detector."""
    detector = make_detector(standardize=True)
    for quantization in (None, "int8"):
        path = tmp_path / f"{quantization}.tflite"
        export.tflite(detector, path, quantization, grass(30, 5), grass(19, 1), verbose=0)
        assert path.stat().st_size
    with export_checks.in_this_process():
        export.saved_model(detector, tmp_path / "saved", images=grass(8, 5))
    served = tf.saved_model.load(str(tmp_path / "saved" / "1"))
    images = grass(6, 2)
    np.testing.assert_allclose(
        served.signatures["serving_default"](images=tf.constant(images))["ood_score"],
        detector(images)["ood_score"],
        atol=detector.rounding,
    )


def test_maps_are_always_standardized():
    backbone = conv_backbone()
    assert FeatureExtractor(backbone, 32, layers=backbone.layers[1].name).standardized
    assert not FeatureExtractor(conv_backbone(), 32).standardized


def test_out_of_distribution_photographs_are_flagged():
    detector = make_detector(k=3, bank_size=20)
    assert detector.bank.shape[0] <= 20
    normal, other = grass(100, 3), crops(skimage.data.astronaut(), 100, 4)
    assert np.mean(detector.predict(normal, verbose=0)["is_ood"]) < 0.3
    assert np.mean(detector.predict(other, verbose=0)["is_ood"]) > 0.9


def test_p_values_are_conformal_with_ties_and_at_boundaries(monkeypatch):
    # Scores in whole numbers, so that many are equal.
    monkeypatch.setattr(
        "sddns_tf.detector.ood_score", lambda f, *_, **__: tf.round(40.0 * f[:, 0] ** 2)
    )
    detector, images = make_detector(), crops(skimage.data.coffee(), 60, 5)
    calibration = detector.calibration_scores.numpy()
    assert len(set(calibration)) < len(calibration)
    images = np.concatenate([images, grass(19, 1)])
    for rate in (1 / 20, 2 / 20, 0.149, 3 / 20, 0.5, 19 / 20):
        detector.recalibrate(false_positive_rate=rate)
        outputs = {name: value.numpy() for name, value in detector(images).items()}
        counts = [1 + int(np.sum(calibration >= score)) for score in outputs["ood_score"]]
        np.testing.assert_array_equal(outputs["p_value"], np.float32(counts) / np.float32(20))
        assert outputs["is_ood"].tolist() == [c <= rate * 20 + 1e-6 for c in counts]
        np.testing.assert_array_equal(outputs["is_ood"], outputs["p_value"] <= np.float32(rate))
        np.testing.assert_array_equal(outputs["is_ood"], outputs["ood_score"] > detector.threshold)
        assert detector.false_positive_rate == pytest.approx(rate, rel=1e-7)


@pytest.mark.parametrize("layers", [None, "auto"])
def test_a_wrong_rate_or_seed_is_told_before_any_image_is_read(layers):
    def unread():
        raise AssertionError("An image was read")
        yield

    images = tf.data.Dataset.from_generator(
        unread, output_signature=tf.TensorSpec((None, 32, 32, 3), tf.uint8)
    )
    for options, message in (
        ({"false_positive_rate": 5}, "`false_positive_rate` must be .* Received: .*5"),
        ({"seed": -1}, "`seed` must be .* Received: seed=-1"),
        ({"batch_size": 0}, "`batch_size` must be .* Received: batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Detector.from_images(
                conv_backbone(), images, images, resolution=32, layers=layers, verbose=0, **options
            )


@pytest.mark.parametrize("size", [1, 9, 19, 99, 999])
def test_a_rate_of_c_in_n_flags_exactly_c(size):
    for count in range(1, size + 1):
        assert largest_flagged_rank(size, count / (size + 1)) == count
        if count > 1:
            assert largest_flagged_rank(size, count / (size + 1) - 1e-5) == count - 1


def test_the_rank_of_many_scores_takes_no_memory():
    tracemalloc.start()
    try:
        assert largest_flagged_rank(10**9, 0.05) == pytest.approx(5 * 10**7, rel=1e-6)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_false_positive_rate_holds_on_average_over_calibration_sets():
    detector = make_detector(rate=0.14)  # 2 of 20 is the largest share within it.
    shares = []
    for draw in range(150):
        images = grass(59, 100 + draw)
        detector.recalibrate(images[:19], verbose=0)
        shares.append(np.mean(detector(images[19:])["is_ood"]))
    # Four standard errors: the share of one draw follows Beta(2, 18).
    assert abs(np.mean(shares) - 0.1) < 4 * (0.066 + 0.3 / 40**0.5) / 150**0.5
    assert np.std(shares) > 0.02


@pytest.mark.parametrize(
    ("make_backbone", "changes"),
    [
        (vit_backbone, [None]),
        (conv_backbone, [{"images": grass(39, 7)}, {"false_positive_rate": 0.3}]),
    ],
)
def test_saved_detector_answers_alike(make_backbone, changes, tmp_path):
    images = np.concatenate([grass(5, 2), crops(skimage.data.astronaut(), 5, 0)])
    detector = make_detector(
        make_backbone(), bank_size=10, resolution=24, k=2, temperature=0.1, mean=(0.4, 0.4, 0.4)
    )
    for change in changes:
        if change:
            detector.recalibrate(**change, verbose=0)
        detector.save(tmp_path / "detector.keras")
        loaded = keras.models.load_model(tmp_path / "detector.keras")
        assert_same(loaded.predict(images, verbose=0), detector.predict(images, verbose=0))
        assert loaded.threshold == detector.threshold
        assert loaded.false_positive_rate == detector.false_positive_rate
        for name in ("temperature", "offset", "k"):
            assert getattr(loaded, name) == getattr(detector, name)


@pytest.mark.slow
def test_saved_detector_answers_alike_in_another_process(tmp_path):
    detector, images = make_detector(vit_backbone()), grass(5, 2)
    detector.save(tmp_path / "detector.keras")
    np.save(tmp_path / "images.npy", images)
    program = (
        "import keras, numpy, sddns_tf.detector, sddns_tf.vit\n"
        "detector = keras.models.load_model('detector.keras')\n"
        "numpy.savez('out.npz', **detector.predict(numpy.load('images.npy'), verbose=0))\n"
    )
    python_path = ":".join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": python_path, "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"},
        check=True,
    )
    with np.load(tmp_path / "out.npz") as outputs:
        assert_same(dict(outputs), detector.predict(images, verbose=0))


def test_a_group_has_its_own_calibration_and_the_same_bank():
    detector, group = make_detector(rate=0.05), crops(skimage.data.astronaut(), 29, 0)
    before = detector.get_weights()
    one = detector.calibrated_on(group, verbose=0)
    assert one.false_positive_rate == detector.false_positive_rate
    # The promise is that of the group: at most one in twenty of its own images stands out.
    assert one.predict(group, verbose=0)["p_value"].min() == pytest.approx(2 / 30)
    assert detector.predict(group, verbose=0)["is_ood"].mean() > 0.9
    np.testing.assert_array_equal(one.bank, detector.bank)
    np.testing.assert_allclose(  # up to snapping to calibration scores, which are the group's own
        one.predict(group, verbose=0)["ood_score"],
        detector.predict(group, verbose=0)["ood_score"],
        atol=detector.rounding,
    )
    for value, expected in zip(detector.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert detector.calibrated_on(group[:9], 0.1, verbose=0).false_positive_rate == 0.1
    with pytest.raises(ValueError, match=r"at least 19 calibration images.*Received: 9"):
        detector.calibrated_on(group[:9], verbose=0)


def test_recalibration_reaches_predict_and_leaves_the_detector_on_error():
    detector, images = make_detector(rate=0.05), grass(40, 8)
    before = detector.predict(images, verbose=0)
    detector.recalibrate(false_positive_rate=0.5)
    assert detector.false_positive_rate == 0.5
    half = detector.predict(images, verbose=0)
    np.testing.assert_array_equal(half["p_value"], before["p_value"])
    assert half["is_ood"].sum() > before["is_ood"].sum()

    detector.recalibrate(crops(skimage.data.astronaut(), 29, 0), verbose=0)
    other = detector.predict(images, verbose=0)
    np.testing.assert_array_equal(other["ood_score"], before["ood_score"])
    assert other["p_value"].min() > 0.5  # Grass is normal beside photographs of a person.
    assert not other["is_ood"].any()

    config, weights = detector.get_config(), detector.get_weights()
    for arguments, told in (
        ({}, "Received: neither"),
        ({"false_positive_rate": 0.01}, "at least 99 calibration images"),
        ({"images": grass(9, 0) - 300.0}, "0-255"),
    ):
        with pytest.raises(ValueError, match=told):
            detector.recalibrate(**arguments, verbose=0)
    with pytest.raises(ValueError, match=r"at least 9 calibration images.*Received: 3"):
        detector.recalibrate(grass(3, 0), 0.1, verbose=0)
    assert detector.get_config() == config
    for value, expected in zip(detector.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_detector_is_a_snapshot_of_its_backbone():
    backbone, images = vit_backbone(), grass(4, 2)
    detector = make_detector(backbone)
    expected = detector.predict(images, verbose=0)
    backbone.set_weights([0.5 - w for w in backbone.get_weights()])
    assert_same(detector.predict(images, verbose=0), expected)
    assert backbone.trainable and backbone.trainable_weights
    assert not detector.trainable_weights


@pytest.mark.parametrize("size", [(32, 32), (57, 91), (8, 200)])
def test_images_of_any_size_are_scored_at_the_resolution_of_the_bank(size):
    detector, images = make_detector(vit_backbone()), grass(5, 2)
    assert detector.extractor.resolution == (32, 32)
    assert detector.extractor.image_size == (16, 16)
    resized = image_ops.resize(images, *size)
    expected = detector(image_ops.resize(resized, 32, 32))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def serve(images):
        return detector(images)

    dataset = tf.data.Dataset.from_tensor_slices((resized, np.arange(5))).batch(2)
    for outputs in (
        detector.predict(resized.numpy(), batch_size=3, verbose=0),
        detector.predict(dataset, verbose=0),
        serve(resized),
    ):
        np.testing.assert_allclose(outputs["ood_score"], expected["ood_score"], atol=1e-4)
        assert outputs["is_ood"].shape == (5,)
        assert (outputs["ood_score"].dtype, outputs["p_value"].dtype) == (np.float32, np.float32)
        assert outputs["is_ood"].dtype == bool


def relu_backbone():
    """A network that turns a NaN into zero in a graph, where convolution and ReLU are one."""
    images = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, 3, activation="relu")(images)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize("backbone", [vit_backbone, relu_backbone])
def test_what_is_not_finite_is_flagged_with_the_lowest_p_value(backbone):
    detector = make_detector(backbone())
    images = grass(3, 2).astype(np.float32)
    images[1, 4, 4] = np.nan
    outputs = detector.predict(images, verbose=0)
    assert np.isnan(outputs["ood_score"]).tolist() == [False, True, False]
    assert outputs["p_value"][1] == np.float32(1 / 20)
    assert outputs["is_ood"][1]


def test_an_empty_detector_flags_everything():
    detector = Detector(FeatureExtractor(conv_backbone()), bank_size=4, calibration_size=9)
    assert detector(grass(3, 0))["is_ood"].numpy().all()


def test_low_precision_backbone_gives_float32_scores():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        backbone = vit_backbone()
        detector = make_detector(backbone)
        outputs = detector.predict(grass(5, 2), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert backbone.compute_dtype == "bfloat16"
    assert {w.dtype for w in detector.weights} == {"float32"}
    scores = outputs["ood_score"]
    assert scores.dtype == np.float32
    assert (tf.cast(tf.cast(scores, tf.bfloat16), tf.float32).numpy() != scores).any()


@pytest.mark.parametrize("k", [None, 3])
def test_tflite_takes_the_whole_detector_with_built_in_operations(k, tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    images = np.concatenate([grass(8, 2), crops(skimage.data.astronaut(), 2, 0)])
    detector = make_detector(k=k, bank_size=10)
    module = tf.Module()
    module.variables_to_hold = [weight.value for weight in detector.weights]
    module.serve = tf.function(
        lambda images: detector(images),
        input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8, name="images")],
    )
    tf.saved_model.save(module, tmp_path, signatures=module.serve)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    interpreter = litert.Interpreter(model_content=converter.convert())
    outputs = interpreter.get_signature_runner()(images=images)
    expected = {name: value.numpy() for name, value in detector(images).items()}
    np.testing.assert_allclose(outputs["ood_score"], expected["ood_score"], atol=1e-3)
    np.testing.assert_allclose(outputs["p_value"], expected["p_value"], rtol=1e-6)
    assert outputs["is_ood"].tolist() == expected["is_ood"].tolist()
    assert set(outputs["is_ood"].tolist()) == {False, True}


@pytest.mark.parametrize("method", ["recalibrate", "calibrated_on"])
def test_recalibration_with_the_bank_is_called_out(method):
    bank = grass(30, 0)
    detector = Detector.from_images(conv_backbone(), bank, grass(19, 1), verbose=0)
    with pytest.warns(UserWarning, match="30 of the 30 calibration images are in the bank"):
        getattr(detector, method)(bank, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(detector, method)(crops(skimage.data.astronaut(), 19, 0), verbose=0)


def test_calibration_images_in_the_bank_are_called_out():
    bank, calibration = grass(30, 0), grass(19, 1)
    calibration[3:18] = bank[:15]
    # The features of one image differ in their last bits with the batch it is in.
    for batch_size in (7, 256):
        with pytest.warns(UserWarning, match="15 of the 19 calibration images are in the bank"):
            Detector.from_images(
                conv_backbone(),
                bank,
                calibration,
                batch_size=batch_size,
                verbose=0,
                standardize=batch_size == 7,
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_detector()


def frames_of_a_still_camera(seed, count=99):
    """Which of four frames each of `count` images is."""
    return np.random.default_rng(seed).integers(0, 4, count)


@pytest.mark.parametrize("black", [False, True])
def test_frames_equal_to_calibration_frames_get_one_answer_in_every_batch(black):
    frames = grass(4, 2)
    if black:
        frames[0] = 0
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        calibration = frames[frames_of_a_still_camera(seed)]
        detector = Detector.from_images(conv_backbone(), grass(30, 0), calibration, verbose=0)
        again = frames[frames_of_a_still_camera(seed + 10, 60)]
        found = [detector.predict(again, batch_size=n, verbose=0) for n in (1, 2, 5, 32, 60)]
        for answers in found[1:]:
            np.testing.assert_array_equal(answers["p_value"], found[0]["p_value"])
        # Each frame is a quarter of the calibration images: none can be flagged at 5 %.
        assert not any(answers["is_ood"].any() for answers in found)
        # And equal frames have equal scores, those of the calibration frames.
        assert len(set(found[0]["ood_score"].tolist())) <= 4
        assert set(found[0]["ood_score"].tolist()) <= set(detector.calibration_scores.numpy())


def test_only_rounding_moves_a_score_to_a_calibration_score():
    calibration = np.array([1.0, 2.0, 3.0], np.float32)
    scores = np.array([0.5, 1.00005, 1.001, 2.9999, 2.99998, 3.5, np.nan], np.float32)
    found = snapped(tf.constant(scores), tf.constant(calibration), 1e-4).numpy()
    expected = np.array([0.5, 1.0, scores[2], scores[3], 3.0, 3.5, np.nan], np.float32)
    np.testing.assert_array_equal(found, expected)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    st.floats(1e-5, 0.5),
)
def test_merging_raises_scores_by_half_a_rounding_at_most(scores, rounding):
    scores = np.sort(np.array(scores, np.float32))
    raised = merged(scores, rounding)
    assert (np.diff(raised) >= 0).all()
    assert (raised >= scores).all() and (raised - scores <= rounding / 2 + 1e-6).all()
    assert set(raised) <= set(scores)


def test_a_detector_from_features_is_that_from_images():
    images, bank, calibration = grass(5, 2), grass(30, 0), grass(19, 1)
    expected = make_detector()
    extractor = expected.extractor
    detector = Detector.from_features(
        extractor,
        extract_features(extractor, bank, verbose=0),
        extract_features(extractor, calibration, verbose=0),
        0.1,
    )
    assert_same(detector.predict(images, verbose=0), expected.predict(images, verbose=0))


@pytest.mark.parametrize(
    ("bank", "calibration", "message"),
    [
        (np.eye(8)[:, :7], np.eye(8), r"`bank_features` must have shape \(N, 8\)"),
        (np.eye(8), np.zeros((0, 8)), r"`calibration_features` must have shape \(N, 8\)"),
        (np.eye(8) * 2, np.eye(8), "`bank_features` must be L2-normalized"),
        (np.eye(9)[:, :8], np.eye(8), "1 of 9 rows of `bank_features` are 0"),
        (np.eye(8) * np.nan, np.eye(8), "not finite for 8 of 8 bank"),
    ],
)
def test_features_that_do_not_fit_are_named(bank, calibration, message):
    with pytest.raises(ValueError, match=message):
        Detector.from_features(FeatureExtractor(conv_backbone()), bank, calibration, 0.2)


def test_a_detector_of_a_network_in_training_does_not_freeze_it():
    network = conv_backbone()
    before = [v.path for v in network.trainable_weights]
    detector = Detector.from_features(
        FeatureExtractor(network), np.eye(8)[:4], np.eye(8), 0.2, bank_weights=[1, 2, 3, 4]
    )
    assert [v.path for v in network.trainable_weights] == before != []
    assert not detector.trainable_weights and not detector.trainable_variables


def test_weights_and_scores_from_elsewhere_are_checked():
    extractor = FeatureExtractor(conv_backbone())
    for weights in ([0, 1], [np.nan, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="`bank_weights` must be 2 positive numbers"):
            Detector.from_features(extractor, np.eye(8)[:2], np.eye(8), 0.2, bank_weights=weights)
    detector = make_detector()
    for scores in ([np.nan] * 30, [[1.0] * 30], [1.0, np.inf]):
        with pytest.raises(ValueError, match="`scores` must"):
            detector.with_calibration_scores(scores)


def test_a_compressed_detector_scores_like_the_whole_one():
    detector, images = make_detector(), np.concatenate([grass(20, 2), grass(20, 3)])
    whole = detector.predict(images, verbose=0)["ood_score"]
    small = detector.compressed(15)
    assert small.bank.shape[0] <= 15 < detector.bank.shape[0]
    assert small.false_positive_rate == detector.false_positive_rate
    scores = small.predict(images, verbose=0)["ood_score"]
    assert np.abs(scores - whole).max() < 0.2 * np.ptp(whole)
    with pytest.raises(ValueError, match=r"`size` must be at least k=20, .*Received: size=15"):
        Detector.from_config({**detector.get_config(), "k": 20}).compressed(15)
    with pytest.raises(ValueError, match=r"compressed already, to 15 weighted.*Received: size=5"):
        small.compressed(5)


def test_a_cropping_detector_looks_at_the_middle_of_an_image(tmp_path):
    detector = make_detector(resize="crop")
    detector.save(tmp_path / "detector.keras")
    loaded = keras.models.load_model(tmp_path / "detector.keras")
    normal = grass(8, 2)
    wide = np.zeros((8, 32, 64, 3), np.uint8)
    wide[:, :, 16:48] = normal
    for one in (detector, loaded):
        np.testing.assert_allclose(
            one.predict(wide, verbose=0)["ood_score"],
            one.predict(normal, verbose=0)["ood_score"],
            atol=1e-4,
        )
    assert make_detector().predict(wide, verbose=0)["is_ood"].all()


def test_wrong_arguments_are_named():
    backbone, images = conv_backbone(), grass(30, 0)
    few = grass(18, 1)
    with pytest.raises(ValueError, match=r"at least 19 calibration images.*Received: 18"):
        Detector.from_images(backbone, images, few, 0.05, verbose=0)
    with pytest.raises(ValueError, match=r"above 0\.0 and below 1\.0\. Received: .*=5"):
        Detector.from_images(backbone, images, few, 5, verbose=0)
    with pytest.raises(ValueError, match="`k` must be between 1 and the bank's 30 rows"):
        Detector.from_images(backbone, images, few, 0.1, k=31, verbose=0)
    ragged = tf.data.Dataset.from_generator(
        lambda: iter([images]), output_signature=tf.TensorSpec((None, None, None, 3), tf.uint8)
    )
    with pytest.raises(ValueError, match="`resolution` is needed"):
        Detector.from_images(backbone, ragged, few, 0.1, verbose=0)
    Detector.from_images(backbone, ragged, few, 0.1, resolution=32, verbose=0)
    backbone.set_weights([w * np.nan for w in backbone.get_weights()])
    with pytest.raises(ValueError, match="not finite for 30 of 30 bank images"):
        Detector.from_images(backbone, images, few, 0.1, verbose=0)


def test_predict_names_wrong_images():
    detector, images = make_detector(), grass(3, 0)
    for wrong, message in [
        (images[0], "One image takes a batch axis"),
        (images[:0], "At least one image"),
        (images.astype(np.int64) - 300, "must hold values in 0-255"),
        (images[..., :2], r"\(batch, height, width, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            detector.predict(wrong, verbose=0)


def test_an_array_is_predicted_batch_by_batch():
    detector, images = make_detector(), grass(7, 2)
    expected, batches = detector(images)["ood_score"], []

    class Count(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            batches.append(batch)

    for options, number, count in [
        ({"batch_size": 3}, 3, 7),
        ({"batch_size": 3, "steps": 2}, 2, 6),
        ({}, 1, 7),
    ]:
        batches.clear()
        scores = detector.predict(images, verbose=0, callbacks=[Count()], **options)["ood_score"]
        np.testing.assert_allclose(scores, expected[:count], atol=1e-5)
        assert len(batches) == number
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive int\. Received: .*=0"):
        detector.predict(images, batch_size=0, verbose=0)
