"""`.tflite` files against the detector, run by `ai_edge_litert` without TensorFlow."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf

import sddns_tf
from sddns_tf import bank, export
from sddns_tf.detector import Detector
from sddns_tf.export import metadata, to_tflite, verify
from sddns_tf.vit import VisionTransformer

pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")
from ai_edge_litert.interpreter import Interpreter

OUTPUTS = ("ood_score", "p_value", "is_ood")
VARIANTS = (None, "float16", "dynamic", "int8")
BATCHES = {None: None, "float16": 8, "dynamic": 1, "int8": None}
# What XNNPACK has no kernels for: the cast of the pixels, and what is around the score; six of them
# make a score equal to the calibration score that only rounding sets it apart from.
OUTSIDE = {
    "CAST", "STRIDED_SLICE", "L2_NORMALIZATION", "EQUAL", "SELECT", "SELECT_V2", "GREATER_EQUAL",
    "LESS_EQUAL", "SUM", "GATHER",
}  # fmt: skip


def crops(photograph, number, seed, height=32, width=32):
    """Random crops of a photograph, as RGB."""
    if photograph.ndim == 2:
        photograph = np.repeat(photograph[..., np.newaxis], 3, axis=-1)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, photograph.shape[0] - height, number)
    columns = rng.integers(0, photograph.shape[1] - width, number)
    return np.stack(
        [photograph[y : y + height, x : x + width] for y, x in zip(rows, columns, strict=True)]
    )


def mixture(number, seed, height=32, width=32):
    """As many crops of grass as of a person."""
    photographs = (skimage.data.grass(), skimage.data.astronaut())
    return np.concatenate([crops(p, number, seed, height, width) for p in photographs])


def grass(number, seed, size=32):
    return crops(skimage.data.grass(), number, seed, size, size)


@pytest.fixture(scope="module")
def calibration():
    return grass(49, 2)


def vit_detector(calibration):
    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=2, num_heads=2)
    return Detector.from_images(backbone, grass(60, 0), calibration, 0.1, verbose=0)


@pytest.fixture(scope="module")
def detector(calibration):
    return vit_detector(calibration)


def small_mobilenet():
    """The first blocks of MobileNetV3Small, with batch statistics that are not the initial ones."""
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV3Small(
        (32, 32, 3), alpha=0.35, minimalistic=False, include_top=False, weights=None,
        include_preprocessing=False,
    )  # fmt: skip
    features = network.get_layer("expanded_conv_3_project_bn").output
    network = keras.Model(
        network.input, keras.layers.GlobalAveragePooling2D()(features), name="mobilenet"
    )
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight, (low, high) in zip(
                layer.weights, ((0.8, 1.2), (-0.1, 0.1), (-0.1, 0.1), (0.5, 1.0)), strict=True
            ):
                weight.assign(rng.uniform(low, high, weight.shape))
    return network


@pytest.fixture(scope="module")
def mobilenet_detector():
    calibration = grass(19, 2)
    return Detector.from_images(small_mobilenet(), grass(30, 4), calibration, 0.1, verbose=0)


@pytest.fixture(scope="module")
def files(detector, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tflite")
    return {
        q: export.tflite(
            detector, folder / f"{q}.tflite", q, mixture(25, 5), calibration, batch_size=BATCHES[q]
        )
        for q in VARIANTS
    }


def run(program, folder):
    """Run a program in a fresh Python that has no TensorFlow."""
    blocked = 'import sys\nsys.modules.update(dict.fromkeys(["tensorflow", "keras", "sddns_tf"]))\n'
    result = subprocess.run(
        [sys.executable, "-c", blocked + program],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def answers_of(path, images):
    runner = Interpreter(str(path)).get_signature_runner()
    batch = metadata.description(path.read_bytes())["batch_size"] or 8
    answers = [runner(images=images[i : i + batch]) for i in range(0, len(images), batch)]
    return {name: np.concatenate([a[name] for a in answers]) for name in OUTPUTS}


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


@pytest.mark.parametrize("quantization", VARIANTS)
def test_a_file_answers_like_the_detector_without_tensorflow(
    detector, files, calibration, quantization
):
    folder, images = files[quantization].parent, mixture(12, 11)
    batch = BATCHES[quantization]
    np.savez(
        folder / "images.npz", images=images, calibration=np.resize(calibration, (56, 32, 32, 3))
    )
    splits = [1, 4, 12] if batch is None else range(batch, len(images), batch)
    program = f"""
import json
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter("{quantization}.tflite")
assert list(interpreter.get_signature_list()) == ["serving_default"]
(tensor,) = interpreter.get_input_details()
assert tensor["dtype"] == np.uint8
assert list(tensor["shape_signature"]) == [{batch or -1}, 32, 32, 3]
runner, images = interpreter.get_signature_runner(), np.load("images.npz")
def answers(images, splits):
    batches = [runner(images=batch) for batch in np.split(images, splits)]
    return {{k: np.concatenate([b[k] for b in batches]) for k in batches[0]}}
calibration = images["calibration"]
np.save("scores.npy", answers(calibration, range({batch or 8}, 56, {batch or 8}))["ood_score"])
np.savez("answers.npz", **answers(images["images"], {list(splits)}))
tensors = [(t["shape"].tolist(), t["dtype"].__name__) for t in interpreter.get_tensor_details()]
print(json.dumps(tensors))
"""
    tensors = json.loads(run(program, folder))
    expected = detector.predict(images, verbose=0)
    with np.load(folder / "answers.npz") as answers:
        answers = dict(answers)
    atol = {None: 1e-4, "float16": 2e-3, "dynamic": 0.05, "int8": 0.2}[quantization]
    np.testing.assert_allclose(answers["ood_score"], expected["ood_score"], rtol=0, atol=atol)
    for name in OUTPUTS:
        assert answers[name].dtype == expected[name].dtype
    # P-values are those of the file's own scores of the calibration images, by their definition;
    # 1e-3 allows for images of another batch.
    own = np.load(folder / "scores.npy")[np.newaxis, : len(calibration)]
    fewest, most = (
        (own >= answers["ood_score"][:, np.newaxis] + shift).sum(axis=1) for shift in (1e-3, -1e-3)
    )
    assert (answers["p_value"] >= (1 + fewest) / 50 - 1e-6).all()
    assert (answers["p_value"] <= (1 + most) / 50 + 1e-6).all()
    assert np.mean(most - fewest) < 0.5
    np.testing.assert_array_equal(answers["is_ood"], answers["p_value"] <= np.float32(0.1))
    assert len(set(answers["is_ood"])) == 2

    # The bank and the calibration stay float32; dense layers of the backbone do not.
    assert [list(detector.bank.shape), "float32"] in tensors
    narrow = {None: None, "float16": "float16", "dynamic": "int8", "int8": "int8"}[quantization]
    hidden = {dtype for shape, dtype in tensors if shape == [128, 32]}
    assert (narrow or "float32") in hidden
    assert {dtype for _, dtype in tensors} <= {"float32", "int32", "int64", "uint8", "bool", narrow}


def test_quantized_files_are_smaller(files):
    size = {quantization: path.stat().st_size for quantization, path in files.items()}
    assert size["float16"] < 0.75 * size[None]
    assert size["dynamic"] < 0.65 * size[None] and size["int8"] < 0.65 * size[None]


@pytest.mark.parametrize("quantization", VARIANTS)
def test_a_file_describes_itself(files, quantization):
    file = files[quantization].read_bytes()
    about = metadata.description(file)
    assert set(about["outputs"]) == set(OUTPUTS)
    assert about["image_size"] == [32, 32]
    assert about["false_positive_rate"] == 0.1
    assert about["calibration_images"] == 49
    assert about["quantization"] == quantization
    assert about["sddns_tf"] == sddns_tf.__version__
    check = about["self_check"]
    assert check["images"] == 16
    assert 0 < check["largest_score_difference"] < check["allowed"]
    names = metadata.operators(file)
    assert "FULLY_CONNECTED" in names and "CUSTOM" not in names


def test_a_file_without_a_description_is_named():
    with pytest.raises(ValueError, match="without a description"):
        model = tf.lite.TFLiteConverter.from_keras_model(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        )
        metadata.description(model.convert())


def test_a_bank_is_compressed_and_calibrated_anew(detector, calibration, tmp_path):
    path = export.tflite(
        detector, tmp_path / "a.tflite", calibration_images=calibration, bank_size=10, verbose=0
    )
    centers, weights = bank.compress(detector.bank.numpy(), 10)
    own = bank.ood_score(detector.features(calibration), centers, weights=weights).numpy()
    images = mixture(8, 3)
    expected = bank.ood_score(detector.features(images), centers, weights=weights).numpy()
    answers = answers_of(path, images)
    np.testing.assert_allclose(answers["ood_score"], expected, rtol=0, atol=1e-4)
    p_values = (1 + (own >= expected[:, np.newaxis]).sum(axis=1)) / 50
    np.testing.assert_allclose(answers["p_value"], p_values, rtol=0, atol=0.021)
    assert metadata.description(path.read_bytes())["bank_rows"] == len(centers) <= 10


def test_calibration_images_of_the_bank_are_told(detector, calibration, tmp_path):
    shared = np.concatenate([grass(60, 0)[:3], calibration])
    with pytest.warns(UserWarning, match="3 of the 52 calibration images are in the bank"):
        export.tflite(detector, tmp_path / "a.tflite", calibration_images=shared, verbose=0)


def test_there_is_room_for_more_calibration_images_than_the_detector_had(detector, tmp_path):
    images = mixture(1100, 7)[:1100]
    path = export.tflite(
        detector, tmp_path / "a.tflite", calibration_images=images, bank_size=10, verbose=0
    )
    found = metadata.description(path.read_bytes())
    assert found["calibration_room"] == 1100


def covered_by_xnnpack(path):
    """Operations in each of the delegate's partitions and those in none, by name."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    operations = interpreter._get_ops_details()
    delegates = [one for one in operations if one["op_name"] == "DELEGATE"]
    others = [one for one in operations if one["op_name"] != "DELEGATE"]
    made_by = {int(tensor): one for one in others for tensor in one["outputs"]}
    partitions = []
    for delegate in delegates:
        borders, inside = set(map(int, delegate["inputs"])), {}
        waiting = [int(tensor) for tensor in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            if tensor in made_by and tensor not in borders:
                one = made_by[tensor]
                if one["index"] not in inside:
                    inside[one["index"]] = one["op_name"]
                    waiting.extend(int(i) for i in one["inputs"] if i >= 0)
        partitions.append(inside)
    taken = set().union(*partitions)
    outside = [one["op_name"] for one in others if one["index"] not in taken]
    return [list(inside.values()) for inside in partitions], outside


@pytest.mark.parametrize(
    ("backbone", "quantization"),
    [
        pytest.param(backbone, quantization, marks=[] if quick else [pytest.mark.slow])
        for backbone in ("vit", "mobilenet")
        for quantization in VARIANTS
        for quick in [quantization == ("dynamic" if backbone == "vit" else "int8")]
    ],
)
def test_xnnpack_takes_the_backbone_as_a_whole(
    backbone, quantization, detector, calibration, mobilenet_detector, files, tmp_path
):
    chosen = detector if backbone == "vit" else mobilenet_detector
    images = mixture(25, 5)
    if backbone == "vit" and BATCHES[quantization] == 1:
        path = files[quantization]
    else:
        path = export.tflite(
            chosen, tmp_path / "a.tflite", quantization, images, calibration, batch_size=1,
            verbose=0,
        )  # fmt: skip
    partitions, outside = covered_by_xnnpack(path)
    heavy = {"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL", "SOFTMAX", "GELU"}
    assert not heavy.intersection(outside)
    assert set(outside) <= OUTSIDE and len(outside) <= 18
    # All of them in one partition but for the product with the bank.
    counts = [sum(name in heavy for name in names) for names in partitions]
    assert sum(counts) - max(counts) <= 1

    # And it answers like the detector: batch normalization is folded, so convolutions may differ.
    answers = answers_of(path, images)["ood_score"]
    expected = chosen.predict(images, verbose=0)["ood_score"]
    atol = {None: 1e-4, "float16": 5e-3, "dynamic": 0.1, "int8": 0.4}[quantization]
    np.testing.assert_allclose(answers, expected, rtol=0, atol=atol)


def test_batch_normalization_is_folded_into_convolutions(tmp_path):
    calibration = grass(9, 1, 24)
    counts = []
    for normalized in (False, True):
        inputs = x = keras.Input((24, 24, 3))
        for layer in (keras.layers.Conv2D(32, 3), keras.layers.DepthwiseConv2D(3)):
            x = layer(x)
            x = keras.layers.BatchNormalization()(x) if normalized else x
            x = keras.layers.Activation("relu")(x)
        backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
        for layer in backbone.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.moving_mean.assign(np.linspace(-1.0, 1.0, 32))
        detector = Detector.from_images(backbone, grass(20, 0, 24), calibration, 0.1, verbose=0)
        path = export.tflite(detector, tmp_path / "model.tflite")
        operations = Interpreter(str(path))._get_ops_details()
        counts.append(sorted(one["op_name"] for one in operations))
    assert counts[0] == counts[1]
    assert left_in(tmp_path) == ["model.tflite"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_exported_in_float32(policy, tmp_path):
    images = mixture(10, 14, 16, 16)

    def made(policy):
        keras.config.set_dtype_policy(policy)
        try:
            inputs = keras.Input((16, 16, 3))
            x = keras.layers.Dense(8, activation="gelu")(inputs)
            backbone = keras.Model(inputs, keras.layers.Flatten()(x))
            return Detector.from_images(backbone, images[:10], images[10:], 0.1, verbose=0)
        finally:
            keras.config.set_dtype_policy("float32")

    detector, in_float32 = made(policy), made("float32")
    in_float32.set_weights(detector.get_weights())
    path = export.tflite(detector, tmp_path / "model.tflite")
    answers = answers_of(path, images)
    assert detector.extractor.backbone.compute_dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(answers["ood_score"], in_float32(images)["ood_score"], atol=1e-4)
    assert np.abs(answers["ood_score"] - detector(images)["ood_score"]).max() > 1e-4


def test_mixed_precision_keeps_what_an_adapted_layer_has_learned(tmp_path):
    images = mixture(10, 14, 16, 16)
    normalization = keras.layers.Normalization(dtype="float32")
    normalization.adapt(np.float32([[0.0], [8.0]]) * np.ones((1, 3), np.float32))
    layers = [normalization, keras.layers.Dense(4, dtype="mixed_bfloat16")]
    layers.append(keras.layers.Flatten(dtype="mixed_bfloat16"))
    backbone = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    detector = Detector.from_images(backbone, images[:10], images[10:], 0.1, verbose=0)
    answers = answers_of(export.tflite(detector, tmp_path / "model.tflite"), images)
    np.testing.assert_allclose(answers["ood_score"], detector(images)["ood_score"], atol=0.02)


def test_a_thousand_runs_take_no_more_memory(files):
    program = """
import numpy as np
from ai_edge_litert.interpreter import Interpreter
runner = Interpreter("None.tflite").get_signature_runner()
images = np.zeros((8, 32, 32, 3), np.uint8)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
for number in range(1200):
    runner(images=images[: 1 + 7 * (number // 2 % 2)])
    if number == 200:
        before = resident()
print((resident() - before) * 4096)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads /proc")
    assert int(run(program, files[None].parent)) < 1_000_000


def test_an_export_that_disagrees_is_discarded(detector, tmp_path, monkeypatch):
    def save_negated(path, detector, signatures):
        answer = signatures["serving_default"]
        negated = tf.function(
            lambda images: answer(tf.cast(255.0 - tf.cast(images, tf.float32), tf.uint8)),
            input_signature=answer.input_signature,
        )
        verify.save(path, detector, {"serving_default": negated})

    monkeypatch.setattr(to_tflite, "save", save_negated)
    (tmp_path / "kept.tflite").write_bytes(b"earlier")
    message = "does not agree.*score may differ by at most 0.0001. .*over 16 images"
    with pytest.raises(RuntimeError, match=message):
        export.tflite(detector, tmp_path / "kept.tflite")
    assert left_in(tmp_path) == ["kept.tflite"]
    assert (tmp_path / "kept.tflite").read_bytes() == b"earlier"


def test_an_export_that_does_not_run_is_discarded(detector, tmp_path, monkeypatch):
    broken = "raise SystemExit('no such operation')"
    monkeypatch.setattr(to_tflite, "run_apart", lambda _, *rest: verify.run_apart(broken, *rest))
    with pytest.raises(RuntimeError, match="no such operation"):
        export.tflite(detector, tmp_path / "new" / "model.tflite")
    assert left_in(tmp_path) == []


def test_an_export_whose_calibration_is_not_found_is_discarded(detector, tmp_path, monkeypatch):
    right = metadata.described

    def wrong(file, description, placeholders):
        return right(file, description, {**placeholders, "rate": np.float32(7e7)})

    monkeypatch.setattr(metadata, "described", wrong)
    with pytest.raises(RuntimeError, match=r"rate should be one constant.*Received: 0"):
        export.tflite(detector, tmp_path / "new" / "model.tflite")
    assert left_in(tmp_path) == []


def test_wrong_arguments_are_named(detector, calibration, tmp_path, monkeypatch):
    images = mixture(2, 0)
    path = tmp_path / "new" / "model.tflite"
    for arguments, message in (
        ({"quantization": "int4"}, r"one of \[None, 'float16', 'dynamic', 'int8'\]. .*'int4'"),
        ({"quantization": "int8", "calibration_images": images}, "needs `representative_images`"),
        ({"quantization": "dynamic"}, "`calibration_images` are needed.*quantization='dynamic'"),
        ({"bank_size": 20}, "`calibration_images` are needed.*bank_size=20"),
        ({"bank_size": 0}, "`bank_size` must be a positive int. Received: bank_size=0"),
        ({"batch_size": 2.0}, "`batch_size` must be a positive int. Received: batch_size=2.0"),
        ({"representative_images": images * np.float32(0.99)}, "must be uint8.*dtype=float32"),
        ({"representative_images": images[:0]}, "At least one image"),
        ({"representative_images": images[0]}, "takes a batch axis"),
        (
            {"calibration_images": images[:, :24]},
            r"`calibration_images` must be .*\(N, 32, 32, 3\). Received: shape=\(4, 24, 32, 3\)",
        ),
        ({"calibration_images": images}, "at least 9 calibration images"),
    ):
        with pytest.raises(ValueError, match=message):
            export.tflite(detector, path, **arguments)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(ImportError, match=r"ai-edge-quantizer.*pip install sddns_tf\[tflite\]"):
        export.tflite(detector, path, "dynamic", calibration_images=calibration)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"ai-edge-litert.*pip install sddns_tf\[tflite\]"):
        export.tflite(detector, path)
    assert left_in(tmp_path) == []
