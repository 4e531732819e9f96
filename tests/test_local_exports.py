"""Anomaly maps in every export, and on the device."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_local import bricks, check_promise, convnet, damaged

from sddns_tf import export, plots
from sddns_tf.cli import score
from sddns_tf.detector import Detector
from sddns_tf.export import delegates, metadata, verify

pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.schema_py_generated import BuiltinOperator

VARIANTS = (None, "float16", "dynamic", "int8")
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "edge_inference.py"


@pytest.fixture(scope="module")
def detector():
    return Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), 0.1, layers="auto", bank_size=200, verbose=0
    )


@pytest.fixture(scope="module")
def images():
    return np.concatenate([bricks(6, 5), damaged(6, 6)])


@pytest.fixture(scope="module")
def files(detector, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tflite")
    return {
        quantization: export.tflite(
            detector,
            folder / f"{quantization}.tflite",
            quantization,
            np.concatenate([bricks(20, 7), images]),
            bricks(59, 1),
            batch_size=1,
            verbose=0,
        )
        for quantization in VARIANTS
    }


def close(detector, maps, expected, cosine, times=1.0):
    """Whether maps agree to so many times the tolerance that exports state."""
    distance = 1.0 + detector.temperature * (expected - detector.lowest_score)
    allowed = times * verify.score_tolerance(detector, cosine) * distance
    return (np.abs(maps - expected) <= allowed).all()


def test_a_saved_model_gives_the_map_wherever_it_gives_a_score(detector, images, tmp_path):
    path = export.saved_model(detector, tmp_path / "parts", images=images)
    signatures = tf.saved_model.load(str(path)).signatures
    expected = detector.predict(images, verbose=0)
    encoded = tf.constant([tf.io.encode_png(image).numpy() for image in images] + [b"no image"])
    rate = tf.fill([len(images)], 0.1)
    answers = {
        "serving_default": signatures["serving_default"](images=tf.constant(images)),
        "serving_at_rate": signatures["serving_at_rate"](
            images=tf.constant(images), false_positive_rate=rate
        ),
        "serving_bytes": signatures["serving_bytes"](image_bytes=encoded),
    }
    for name, answer in answers.items():
        found = {key: value.numpy()[: len(images)] for key, value in answer.items()}
        assert close(detector, found["anomaly_map"], expected["anomaly_map"], 4e-6), name
        check_promise(detector, found)
    spoiled = answers["serving_bytes"]
    assert np.isnan(spoiled["anomaly_map"][-1]).all() and np.isnan(spoiled["ood_score"][-1])
    assert signatures["features"](images=tf.constant(images))["features"].shape == (12, 8, 8, 80)
    about = json.loads((path / "assets.extra" / "metadata.json").read_text())
    assert about["map_size"] == [8, 8]
    assert about["lowest_score"] == pytest.approx(detector.lowest_score)


@pytest.mark.parametrize("quantization", VARIANTS)
def test_every_variant_gives_the_map(detector, images, files, quantization):
    path = files[quantization]
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    answers = [runner(images=image[np.newaxis]) for image in images]
    answers = {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}
    expected = detector.predict(images, verbose=0)
    cosine = verify.COSINE_TOLERANCE[quantization]
    normal, other = slice(0, 6), slice(6, None)
    found, known = answers["anomaly_map"], expected["anomaly_map"]
    assert close(detector, found[normal], known[normal], cosine)
    # Activations in 8 bits put places twenty times as far out as the threshold further off.
    in_8_bits = quantization in ("dynamic", "int8")
    assert close(detector, found[other], known[other], cosine, 2.0 if in_8_bits else 1.0)
    about = metadata.description(path.read_bytes())
    above = (answers["anomaly_map"] > np.float32(about["threshold"])).any(axis=(1, 2))
    np.testing.assert_array_equal(answers["is_ood"], above)
    np.testing.assert_array_equal(answers["ood_score"], answers["anomaly_map"].max(axis=(1, 2)))
    assert answers["is_ood"][6:].all() and not answers["is_ood"][:6].all()


def test_a_smoothed_map_is_exported(images, tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[:2] = True
    smooth = Detector.from_images(
        convnet(),
        bricks(60, 0),
        bricks(59, 1),
        0.1,
        layers="eight",
        ignore=mask,
        smoothing=3,
        bank_size=100,
        verbose=0,
    )
    path = export.tflite(smooth, tmp_path / "smooth.tflite", batch_size=1, verbose=0)
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    maps = np.concatenate([runner(images=image[np.newaxis])["anomaly_map"] for image in images])
    expected = smooth.predict(images, verbose=0)["anomaly_map"]
    assert close(smooth, maps, expected, verify.COSINE_TOLERANCE[None])
    assert not {"CUSTOM", "DELEGATE"} & set(metadata.operators(path.read_bytes()))


def test_shapes_are_fixed_and_operations_built_in(files):
    interpreter = Interpreter(str(files[None]))
    interpreter.allocate_tensors()
    assert all(
        (tensor["shape_signature"] >= 0).all() for tensor in interpreter.get_tensor_details()
    )
    names = metadata.operators(files[None].read_bytes())
    assert not {"CUSTOM", "DELEGATE", "TOPK_V2", "WHILE"} & set(names)


def test_what_delegates_refuse_is_told(detector, files, capsys, tmp_path):
    about = metadata.description(files[None].read_bytes())
    operators = metadata.operators(files[None].read_bytes())
    assert about["refused_by_delegates"] == delegates.refused(operators)
    assert "GATHER" in about["refused_by_delegates"]["Edge TPU"]
    assert delegates.refused(["CONV_2D", "ADD"]) == {name: [] for name in delegates.TAKEN}
    export.tflite(detector, tmp_path / "a.tflite", batch_size=1, verbose=1)
    assert delegates.report(operators, None, 1) in capsys.readouterr().out


def test_operations_of_delegates_are_named_as_in_files():
    for taken in delegates.TAKEN.values():
        assert taken <= set(vars(BuiltinOperator))


def test_another_map_is_discarded(detector, images):
    answers = {name: value.numpy() for name, value in detector(images).items()}
    verify.check_answers(detector, images, answers, "", 4e-6)
    changed = answers["anomaly_map"].copy()
    changed[3, 0, 0] = min(changed[3].max() - 1e-3, changed[3, 0, 0] + 0.5)
    with pytest.raises(RuntimeError, match=r"does not agree.*anomaly map"):
        verify.check_answers(detector, images, {**answers, "anomaly_map": changed}, "", 4e-6)
    changed = answers["ood_score"] + np.float32(1e-4)
    with pytest.raises(RuntimeError, match="score, compared with the maximum of its map"):
        verify.check_answers(detector, images, {**answers, "ood_score": changed}, "", 4e-6)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("edge_inference", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_device_writes_overlays(detector, images, files, example, tmp_path, capsys):
    for name, image in (("sound", images[0]), ("damaged", images[7])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("sound", "damaged")]
    example.main([str(files[None]), *paths, f"--maps={tmp_path / 'maps'}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert set(rows[0]) == {"path", "ood_score", "p_value", "is_ood", "map"}
    about = metadata.description(files[None].read_bytes())
    assert about["threshold"] == pytest.approx(detector.threshold, abs=1e-2)
    for row, image in zip(rows, (images[0], images[7]), strict=True):
        painted = np.asarray(Image.open(row["map"]))
        # The image differs from its overlay exactly where something is flagged.
        assert (painted != image).any() == row["is_ood"]
        maps = detector.predict(image[np.newaxis], verbose=0)["anomaly_map"][0]
        same = plots.overlay(image, maps, about["threshold"], about["lowest_score"])
        assert np.abs(painted.astype(int) - same.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["tflite", "saved_model"])
def test_scores_of_an_export_come_with_overlays(kind, detector, images, files, tmp_path, capsys):
    model = files[None]
    if kind == "saved_model":
        model = export.saved_model(detector, tmp_path / "bricks", images=images)
    (tmp_path / "in").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "in" / f"{index}.png")
    arguments = [f"--images=folder:{tmp_path}/in", f"--maps={tmp_path}/maps", "--format=jsonl"]
    assert score.main([f"--model={model}", *arguments]) == 0
    about = metadata.description(files[None].read_bytes())
    threshold = about["threshold"] if kind == "tflite" else detector.threshold
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        image = np.asarray(Image.open(row["path"]))
        painted = np.asarray(Image.open(f"{tmp_path}/maps{row['path']}.png")).astype(int)
        maps = detector.predict(image[np.newaxis], verbose=0)["anomaly_map"][0]
        expected = plots.overlay(image, maps, threshold, detector.lowest_score)
        assert np.abs(painted - expected).max() <= 1


def test_the_device_keeps_the_promise_for_maps(images, files, example, tmp_path):
    normal = bricks(40, 9)
    scores = example.score(example.load(files["dynamic"]), normal)["ood_score"]
    example.recalibrate(files["dynamic"], scores, tmp_path / "here.tflite", 0.1)
    about = example.description(tmp_path / "here.tflite")
    assert about["threshold"] == np.sort(scores)[-4]
    again = bytearray(files["dynamic"].read_bytes())
    metadata.calibrate(again, scores, 0.1)
    assert bytes(again) == (tmp_path / "here.tflite").read_bytes()
    answers = example.score(
        example.load(tmp_path / "here.tflite"), np.concatenate([normal, images])
    )
    above = (answers["anomaly_map"] > np.float32(about["threshold"])).any(axis=(1, 2))
    np.testing.assert_array_equal(answers["is_ood"], above)
    assert answers["is_ood"][:40].sum() == 3


def test_maps_need_a_file_that_has_them(example, tmp_path):
    whole = Detector.from_images(convnet(), bricks(20, 0), bricks(19, 1), 0.1, verbose=0)
    path = export.tflite(whole, tmp_path / "whole.tflite", verbose=0)
    Image.fromarray(bricks(1, 0)[0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--maps needs the file of a local detector"):
        example.main([str(path), str(tmp_path / "a.png"), f"--maps={tmp_path}"])
