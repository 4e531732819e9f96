import json
import os
import pathlib
import stat
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf

from sddns_tf import edge, export, export_checks, image_ops, serving
from sddns_tf.detector import Detector
from sddns_tf.vit import VisionTransformer

OUTPUTS = ("ood_score", "p_value", "is_ood")
VARIANTS = (None, "float16", "dynamic", "int8")
SIZES = ((1, 32, 32), (3, 32, 32), (1, 57, 91), (3, 57, 91))


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


@pytest.fixture(scope="session")
def detector():
    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=2, num_heads=2)
    grass = skimage.data.grass()
    detector = Detector.from_images(
        backbone, crops(grass, 60, 0), crops(grass, 39, 1), 0.1, bank_size=40, verbose=0
    )
    detector.recalibrate(crops(grass, 49, 2), verbose=0)  # The scores are another variable now.
    return detector


@pytest.fixture(scope="session")
def served(detector, tmp_path_factory):
    return export.saved_model(detector, tmp_path_factory.mktemp("served") / "models" / "grass")


@pytest.fixture(scope="session")
def files(detector, tmp_path_factory):
    pytest.importorskip("ai_edge_quantizer")
    folder = tmp_path_factory.mktemp("tflite")
    images = mixture(50, 5)
    return {q: export.tflite(detector, folder / f"{q}.tflite", q, images) for q in VARIANTS}


def run(program, folder):
    """Run a program in a fresh Python without Keras and without this package."""
    blocked = 'import sys\nsys.modules["keras"] = sys.modules["sddns_tf"] = None\n'
    result = subprocess.run(
        [sys.executable, "-c", blocked + program],
        cwd=folder,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_agrees(answers, detector, images, atol=1e-4):
    expected = {name: value.numpy() for name, value in detector(images).items()}
    np.testing.assert_allclose(answers["ood_score"], expected["ood_score"], rtol=0, atol=atol)
    calibration = detector.calibration_scores.numpy()
    lowest, highest = (
        (1 + (calibration >= expected["ood_score"][:, np.newaxis] + shift).sum(1)) / 50
        for shift in (atol, -atol)
    )
    assert (answers["p_value"] >= lowest - 1e-6).all()
    assert (answers["p_value"] <= highest + 1e-6).all()
    np.testing.assert_array_equal(answers["is_ood"], answers["p_value"] <= 0.1)
    for name in OUTPUTS:
        assert answers[name].dtype == expected[name].dtype
        assert answers[name].shape == expected[name].shape


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


# --- SavedModel ---------------------------------------------------------------------------------


def test_saved_model_answers_like_the_detector_without_keras(detector, served, tmp_path):
    batches = {f"{b}_{h}_{w}": mixture(b, 7, h, w)[:b] for b, h, w in SIZES}
    batches["both"] = mixture(4, 8)
    np.savez(tmp_path / "images.npz", **batches)
    # Files of all formats and sizes, grey and transparent ones too, in one batch.
    rocket, grey = mixture(2, 9, 57, 91)[2], skimage.data.grass()[:40, :30, np.newaxis]
    clear = np.concatenate([rocket, rocket[..., :1]], axis=-1)
    encoded = {
        "0.jpg": tf.io.encode_jpeg(rocket),
        "1.png": tf.io.encode_png(mixture(1, 9)[0]),
        "2.png": tf.io.encode_png(grey),
        "3.png": tf.io.encode_png(clear),
        "4.jpg": tf.io.encode_jpeg(grey),
    }
    for name, data in encoded.items():
        (tmp_path / name).write_bytes(data.numpy())
    program = f"""
import glob
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load({str(served)!r}).signatures
answers = {{}}
with np.load("images.npz") as batches:
    for key in batches:
        for name in ("serving_default", "features"):
            outputs = signatures[name](images=tf.constant(batches[key]))
            answers.update({{f"{{key}}.{{k}}": v.numpy() for k, v in outputs.items()}})
data = [open(name, "rb").read() for name in sorted(glob.glob("*.*g"))]
outputs = signatures["serving_bytes"](image_bytes=tf.constant(data))
answers.update({{f"bytes.{{k}}": v.numpy() for k, v in outputs.items()}})
for wrong in ([data[1], b"", data[0], b"text"], [data[1], data[1][:200]]):
    try:
        signatures["serving_bytes"](image_bytes=tf.constant(wrong))
    except tf.errors.InvalidArgumentError as error:
        print(str(error).replace(chr(10), " "))
np.savez("answers.npz", **answers)
"""
    printed = run(program, tmp_path).splitlines()
    assert len(printed) == 2
    assert "Not a JPEG, PNG, BMP or GIF file: items of `image_bytes` at] [1 3]" in printed[0]
    with np.load(tmp_path / "answers.npz") as loaded:
        answers = dict(loaded)
    for key, images in batches.items():
        assert_agrees({name: answers[f"{key}.{name}"] for name in OUTPUTS}, detector, images)
        np.testing.assert_allclose(
            answers[f"{key}.features"], detector.features(images), rtol=0, atol=1e-5
        )
    assert set(answers["both.is_ood"]) == {True, False}

    decoded = [tf.io.decode_image(data, channels=3)[tf.newaxis] for data in encoded.values()]
    images = tf.concat([image_ops.resize(image, 32, 32) for image in decoded], axis=0)
    assert_agrees({name: answers[f"bytes.{name}"] for name in OUTPUTS}, detector, images)


def test_saved_model_runs_in_the_session_loader_from_the_command_line(detector, served, tmp_path):
    images = mixture(2, 3)
    np.save(tmp_path / "images.npy", images)
    command = pathlib.Path(sys.executable).with_name("saved_model_cli")
    arguments = ["--dir", served, "--tag_set", "serve", "--signature_def", "serving_default"]
    subprocess.run(
        [command, "run", *arguments, "--inputs", "images=images.npy", "--outdir", "."],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert_agrees({k: np.load(tmp_path / f"{k}.npy") for k in OUTPUTS}, detector, images)


def test_saved_model_stores_each_variable_once_and_others_may_read_it(detector, served):
    stored = (served / "variables" / "variables.data-00000-of-00001").stat().st_size
    values = sum(weight.numpy().nbytes for weight in detector.weights)
    assert values <= stored < 1.2 * values
    assert stat.S_IMODE(served.stat().st_mode) == stat.S_IMODE(served.parent.stat().st_mode)
    assert left_in(served.parent.parent)[:2] == ["grass", os.path.join("grass", "1")]


def test_versions_follow_one_another_and_are_never_overwritten(detector, tmp_path, monkeypatch):
    for name in ("3", "12", "notes", ".export-abc"):
        (tmp_path / name).mkdir()
    (tmp_path / "3" / "kept").touch()
    monkeypatch.setattr(serving, "run_apart", lambda *_: {"features.features": None})
    monkeypatch.setattr(serving, "check_answers", lambda *_: None)
    monkeypatch.setattr(serving, "check_features", lambda *_: None)
    assert export.saved_model(detector, tmp_path) == tmp_path / "13"
    assert export.saved_model(detector, str(tmp_path), version=5) == tmp_path / "5"
    before = left_in(tmp_path)
    with pytest.raises(FileExistsError, match="3 is there already"):
        export.saved_model(detector, tmp_path, version=3)
    for version in (0, -1, True, "7", 1.5):
        with pytest.raises(ValueError, match="must be a positive int"):
            export.saved_model(detector, tmp_path, version=version)
    assert left_in(tmp_path) == before


def test_an_export_that_disagrees_is_discarded(detector, tmp_path, monkeypatch):
    right = export_checks.answer_images

    def wrong(detector, size):
        answer = right(detector, size)
        spec = tf.TensorSpec([None, *size, 3], tf.uint8, name="images")
        return tf.function(
            lambda images: answer(tf.cast(255.0 - tf.cast(images, tf.float32), tf.uint8)),
            input_signature=[spec],
        )

    for module in (serving, edge):
        monkeypatch.setattr(module, "answer_images", wrong)
    (tmp_path / "kept.tflite").write_bytes(b"earlier")
    message = "does not agree.*score over 16 images: [0-9.]+; allowed: 0.0001"
    with pytest.raises(RuntimeError, match=message):
        export.saved_model(detector, tmp_path / "new" / "model")
    with pytest.raises(RuntimeError, match=message):
        export.tflite(detector, tmp_path / "kept.tflite")
    assert left_in(tmp_path) == ["kept.tflite"]
    assert (tmp_path / "kept.tflite").read_bytes() == b"earlier"


def test_an_export_that_does_not_run_is_discarded(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "_RUN_TFLITE", "raise SystemExit('no such operation')")
    with pytest.raises(RuntimeError, match="no such operation"):
        export.tflite(detector, tmp_path / "new" / "model.tflite")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_comparison_sees_every_output(detector, name):
    images = mixture(3, 4)
    answers = {key: value.numpy() for key, value in detector(images).items()}
    export_checks.check_answers(detector, images, answers, "", 4e-6)
    for change in [np.nan, 1e-3] if name == "ood_score" else [1e-3]:
        changed = answers[name].copy()
        changed[4] = ~changed[4] if name == "is_ood" else changed[4] + change
        with pytest.raises(RuntimeError, match="does not agree"):
            export_checks.check_answers(detector, images, {**answers, name: changed}, "", 4e-6)


# --- TFLite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", VARIANTS)
def test_tflite_answers_like_the_detector_without_tensorflow(detector, files, quantization):
    folder, images = files[quantization].parent, mixture(10, 11)
    np.save(folder / "images.npy", images)
    program = f"""
import json
sys.modules["tensorflow"] = None
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter("{quantization}.tflite")
assert list(interpreter.get_signature_list()) == ["serving_default"]
(tensor,) = interpreter.get_input_details()
assert tensor["dtype"] == np.uint8 and list(tensor["shape_signature"]) == [-1, 32, 32, 3]
runner, images = interpreter.get_signature_runner(), np.load("images.npy")
batches = [runner(images=batch) for batch in np.split(images, [1, 4])]
np.savez("answers.npz", **{{k: np.concatenate([b[k] for b in batches]) for k in batches[0]}})
tensors = [(t["shape"].tolist(), t["dtype"].__name__) for t in interpreter.get_tensor_details()]
print(json.dumps([tensors, [op["op_name"] for op in interpreter._get_ops_details()]]))
"""
    tensors, operations = json.loads(run(program, folder))
    with np.load(folder / "answers.npz") as answers:
        atol = {None: 1e-4, "float16": 2e-3, "dynamic": 0.05, "int8": 0.2}[quantization]
        assert_agrees(answers, detector, images, atol)
        assert len(set(answers["is_ood"])) == 2
    assert not [name for name in operations if name.startswith(("Flex", "CUSTOM"))]

    # The bank and the calibration stay float32; dense layers of the backbone do not.
    assert [list(detector.bank.shape), "float32"] in tensors
    assert [[1, 49], "float32"] in tensors or [[49], "float32"] in tensors
    narrow = {None: None, "float16": "float16", "dynamic": "int8", "int8": "int8"}[quantization]
    hidden = {dtype for shape, dtype in tensors if shape == [128, 32]}
    assert (narrow or "float32") in hidden
    assert {dtype for _, dtype in tensors} <= {"float32", "int32", "int64", "uint8", "bool", narrow}
    if quantization == "int8":
        assert [[1, 96], "int8"] in tensors  # Activations as well: queries, keys and values.


def test_quantized_files_are_smaller(files):
    size = {quantization: path.stat().st_size for quantization, path in files.items()}
    assert size["float16"] < 0.75 * size[None]
    assert size["dynamic"] < 0.6 * size[None] and size["int8"] < 0.6 * size[None]


def test_convolutional_backbones_are_quantized(tmp_path):
    pytest.importorskip("ai_edge_quantizer")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((24, 24, 3))
    x = keras.layers.Conv2D(32, 3, strides=2, activation="relu")(inputs)
    x = keras.layers.DepthwiseConv2D(3, activation="relu")(x)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(64, 3)(x))
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    images = mixture(20, 12)
    detector = Detector.from_images(backbone, images, mixture(5, 13), 0.1, verbose=0)
    sizes = [
        export.tflite(detector, tmp_path / "model.tflite", variant, images).stat().st_size
        for variant in VARIANTS
    ]
    assert sizes[1] < sizes[0] - 2 * 32 * 9 * 64 * 0.9
    assert max(sizes[2:]) < sizes[0] - 3 * 32 * 9 * 64 * 0.9
    assert left_in(tmp_path) == ["model.tflite"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_exported_to_tflite_in_float32(policy, tmp_path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((16, 16, 3))
        x = keras.layers.Dense(8, activation="gelu")(inputs)
        backbone = keras.Model(inputs, keras.layers.Flatten()(x))
        images = mixture(10, 14, 16, 16)
        detector = Detector.from_images(backbone, images[:10], images[10:], 0.1, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    path = export.tflite(detector, tmp_path / "model.tflite")
    answers = litert.Interpreter(str(path)).get_signature_runner()(images=images)
    assert detector.extractor.backbone.compute_dtype == policy.removeprefix("mixed_")
    in_float32 = edge._in_float32(detector)
    np.testing.assert_allclose(answers["ood_score"], in_float32(images)["ood_score"], atol=1e-4)
    assert np.abs(answers["ood_score"] - detector(images)["ood_score"]).max() > 1e-4


def test_wrong_arguments_are_named(detector, tmp_path, monkeypatch):
    images = mixture(2, 0)
    path = tmp_path / "new" / "model.tflite"
    for arguments, message in (
        (("int4",), r"one of \[None, 'float16', 'dynamic', 'int8'\]. Received: 'int4'"),
        (("int8",), "needs `representative_images`"),
        ((None, images.astype(np.float32)), "must be uint8.*dtype=float32"),
        ((None, images[:0]), "at least one"),
        ((None, images[0]), "takes a batch axis"),
        ((None, images[:, :24]), r"resolution, \(N, 32, 32, 3\). Received: shape=\(4, 24, 32, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            export.tflite(detector, path, *arguments)
    with pytest.raises(ValueError, match="must be uint8"):
        export.saved_model(detector, tmp_path / "new", images=images / 255.0)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(ImportError, match=r"pip install sddns_tf\[tflite\]"):
        export.tflite(detector, path, "dynamic")
    assert left_in(tmp_path) == []
