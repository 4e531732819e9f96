import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.calibration import largest_flagged_rank
from sddns_tf.detector import Detector
from sddns_tf.features import FeatureExtractor
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


def test_out_of_distribution_photographs_are_flagged():
    detector = make_detector(k=3, bank_size=20)
    assert detector.bank.shape[0] <= 20
    normal, other = grass(100, 3), crops(skimage.data.astronaut(), 100, 4)
    assert np.mean(detector.predict(normal, verbose=0)["is_ood"]) < 0.3
    assert np.mean(detector.predict(other, verbose=0)["is_ood"]) > 0.9


def test_p_values_are_conformal_with_ties_and_at_boundaries(monkeypatch):
    # Scores in whole numbers, so that many are equal.
    monkeypatch.setattr(Detector, "_score", lambda self, f: tf.round(40.0 * f[:, 0] ** 2))
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


@pytest.mark.parametrize("size", [1, 9, 19, 99, 999])
def test_a_rate_of_c_in_n_flags_exactly_c(size):
    for count in range(1, size + 1):
        assert largest_flagged_rank(size, count / (size + 1)) == count
        if count > 1:
            assert largest_flagged_rank(size, count / (size + 1) - 1e-5) == count - 1


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


@pytest.mark.parametrize("make_backbone", [conv_backbone, vit_backbone])
def test_saved_detector_answers_alike(make_backbone, tmp_path):
    images = np.concatenate([grass(5, 2), crops(skimage.data.astronaut(), 5, 0)])
    detector = make_detector(
        make_backbone(), bank_size=10, resolution=24, k=2, temperature=0.1, mean=(0.4, 0.4, 0.4)
    )
    for change in (None, {"images": grass(39, 7)}, {"false_positive_rate": 0.3}):
        if change:
            detector.recalibrate(**change, verbose=0)
        detector.save(tmp_path / "detector.keras")
        loaded = keras.models.load_model(tmp_path / "detector.keras")
        assert_same(loaded.predict(images, verbose=0), detector.predict(images, verbose=0))
        assert loaded.threshold == detector.threshold
        assert loaded.false_positive_rate == detector.false_positive_rate
        for name in ("temperature", "offset", "k"):
            assert getattr(loaded, name) == getattr(detector, name)


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
    for arguments in ({}, {"false_positive_rate": 0.01}, {"images": grass(9, 0) / 255.0}):
        with pytest.raises(ValueError):
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


def test_what_is_not_finite_is_flagged_with_the_lowest_p_value():
    detector = make_detector(vit_backbone())
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


def test_calibration_images_in_the_bank_are_called_out():
    bank, calibration = grass(30, 0), grass(19, 1)
    calibration[3:5] = bank[:2]
    with pytest.warns(UserWarning, match="2 of the 19 calibration images are in the bank"):
        Detector.from_images(conv_backbone(), bank, calibration, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_detector()


def test_wrong_arguments_are_named():
    backbone, images = conv_backbone(), grass(30, 0)
    few = grass(18, 1)
    with pytest.raises(ValueError, match=r"at least 19 calibration images.*Received: 18"):
        Detector.from_images(backbone, images, few, 0.05, verbose=0)
    with pytest.raises(ValueError, match=r"between 0 and 1\. Received: 5"):
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
    with pytest.raises(ValueError, match="not finite for 30 of the 30 bank images"):
        Detector.from_images(backbone, images, few, 0.1, verbose=0)


def test_predict_names_wrong_images():
    detector, images = make_detector(), grass(3, 0)
    for wrong, message in [
        (images[0], "One image takes a batch axis"),
        (images[:0], "At least one image"),
        (images.astype(np.int64), "uint8 or float"),
        (images[..., :2], r"\(batch, height, width, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            detector.predict(wrong, verbose=0)
