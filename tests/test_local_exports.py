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
from sddns_tf.cli import info, score
from sddns_tf.cli import main as cli
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


def close(detector, maps, expected, cosine, times=1.0, features=None):
    """Whether maps agree to so many times the tolerance that exports state.

    And, given features, to four last bits of their squared lengths.
    """
    distance = 1.0 + detector.temperature * (expected - detector.lowest_score)
    allowed = times * verify.score_tolerance(detector, cosine) * distance
    squares = 0.0 if features is None else np.square(features).mean(axis=-1)
    rounding = 4 * 2.0**-23 * squares / detector.temperature
    return (np.abs(maps - expected) <= allowed + rounding).all()


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


# --- False alarms that a device makes count as normal -------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="smoothing=1"),
        pytest.param(3, id="smoothing=3", marks=pytest.mark.slow),
    ],
)
def extensible(request, tmp_path_factory):
    """A detector of few places, three of them ignored, and its file with 150 free rows."""
    mask = np.zeros((8, 8), bool)
    mask[0, :3] = True
    one = Detector.from_images(
        convnet(),
        bricks(60, 0),
        bricks(59, 1),
        0.1,
        layers="auto",
        ignore=mask,
        smoothing=request.param,
        bank_size=200,
        verbose=0,
    )
    path = tmp_path_factory.mktemp("room") / "parts.tflite"
    return one, export.tflite(
        one, path, bank_size=None, batch_size=1, extension_room=150, verbose=0
    )


def copy_of(detector):
    other = Detector.from_config(detector.get_config())
    other.set_weights(detector.get_weights())
    return other


def saved(image, path):
    Image.fromarray(image).save(path)
    return str(path)


def test_a_device_extends_as_the_detector(extensible, images, example, tmp_path, capsys):
    one, path = extensible
    before = path.read_bytes()
    alarm, other = damaged(1, 3)[0], damaged(1, 8)[0]
    other[40:60, 2:30] = [0, 0, 250]
    all_images = np.concatenate([[alarm, other], images, bricks(12, 20)])
    old = example.score(example.load(path), all_images)
    here = tmp_path / "here.tflite"
    example.main([str(path), "--extend", saved(alarm, tmp_path / "a.png"), f"--output={here}"])
    told = json.loads(capsys.readouterr().out)
    extended = copy_of(one)
    extended.extend(alarm[np.newaxis], verbose=0)
    rows = extended.bank.shape[0] - one.bank.shape[0]
    assert told == {"extended": str(here), "rows": rows} and rows > 3
    about, was = (metadata.description(p.read_bytes()) for p in (here, path))
    assert about == {**was, "extension_rows": rows} and was["extension_rows"] == 0

    new = example.score(example.load(here), all_images)
    expected = extended.predict(all_images, verbose=0)
    features = extended.features(all_images).numpy()
    assert close(
        one, new["anomaly_map"], expected["anomaly_map"], verify.COSINE_TOLERANCE[None], 1, features
    )
    np.testing.assert_array_equal(new["is_ood"], expected["is_ood"])
    np.testing.assert_array_equal(new["ood_score"], new["anomaly_map"].max(axis=(1, 2)))
    assert old["is_ood"][0] and not new["is_ood"][0]
    # What is odd elsewhere stays so, and no score of any place rises.
    assert old["is_ood"][1] and new["is_ood"][1]
    assert (new["place_scores"] <= old["place_scores"]).all()
    assert not (new["is_ood"] & ~old["is_ood"]).any()
    np.testing.assert_array_equal(new["features"], old["features"])
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "here.tflite"]


def test_extensions_add_up_until_there_is_no_room(extensible, example, tmp_path, capsys):
    one, path = extensible
    here = tmp_path / "here.tflite"
    here.write_bytes(path.read_bytes())
    alarms = damaged(3, 3)
    alarms[1, 40:48, 8:16] = [0, 0, 250]
    first, second = (saved(a, tmp_path / f"{i}.png") for i, a in enumerate(alarms[:2]))
    example.main([str(here), "--extend", first])
    example.main([str(here), second, "--extend", second])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["path"] == second and not answer["is_ood"]
    extended = copy_of(one)
    for alarm in alarms[:2]:
        extended.extend(alarm[np.newaxis], verbose=0)
    rows = extended.bank.shape[0] - one.bank.shape[0]
    assert metadata.description(here.read_bytes())["extension_rows"] == rows
    expected = extended.predict(alarms, verbose=0)["anomaly_map"]
    found = example.score(example.load(here), alarms)["anomaly_map"]
    features = extended.features(alarms).numpy()
    assert close(one, found, expected, verify.COSINE_TOLERANCE[None], features=features)
    # Such a detector is exported, too: alarms in its bank lie far from the bank's mean.
    export.tflite(extended, tmp_path / "again.tflite", representative_images=alarms)

    full = here.read_bytes()
    far = saved(
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), tmp_path / "n.png"
    )
    message = rf"Received: 61 places, but {150 - rows} of 150 rows are free"
    with pytest.raises(ValueError, match=message):
        example.main([str(here), "--extend", far])
    assert here.read_bytes() == full and len(list(tmp_path.glob("here*"))) == 1


@pytest.mark.parametrize("quantization", ["float16", "dynamic", "int8"])
def test_a_quantized_file_is_extended_with_its_own_features(
    detector, images, example, quantization, tmp_path
):
    path = export.tflite(
        detector,
        tmp_path / "parts.tflite",
        quantization,
        np.concatenate([bricks(20, 7), images]),
        bricks(59, 1),
        extension_room=150,
        verbose=0,
    )
    alarms = images[6:8]
    model = example.load(path)
    before = example.score(model, images)
    example.extend(path, example.places_of(path, example.score(model, alarms)), path)
    after = example.score(example.load(path), images)
    assert before["is_ood"][6:].all() and not after["is_ood"][6:8].any()
    assert (after["place_scores"] <= before["place_scores"]).all()
    # Nothing but the extension differs: here, too, the extension is float32.
    lowest = metadata.values(bytearray(path.read_bytes()), "scores")
    lowest = lowest[np.isfinite(lowest)].min()
    known = before["features"][6:8][before["place_scores"][6:8] > lowest]
    gaps = np.square(after["features"][..., np.newaxis, :] - known).mean(axis=-1).min(axis=-1) / 2
    expected = detector.lowest_score + gaps / detector.temperature
    expected = np.minimum(before["place_scores"], expected)
    np.testing.assert_allclose(after["place_scores"], expected, rtol=1e-4, atol=1e-2)


def test_an_extended_file_is_scored_described_and_recalibrated(
    extensible, images, example, tmp_path, capsys
):
    _, path = extensible
    alarm = damaged(1, 3)[0]
    here = tmp_path / "here.tflite"
    answer = example.score(example.load(path), alarm[np.newaxis])
    example.extend(path, example.places_of(path, answer), here)
    (tmp_path / "in").mkdir()
    for index, image in enumerate([alarm, *images[:3]]):
        saved(image, tmp_path / "in" / f"{index}.png")
    options = [f"--images=folder:{tmp_path}/in", f"--maps={tmp_path}/maps", "--format=jsonl"]
    assert score.main([f"--model={here}", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert set(rows[0]) == set(score.FIELDS)
    assert not rows[0]["is_ood"]
    info.main(["--json", str(here)])
    told = json.loads(capsys.readouterr().out)
    assert told["extension_room"] == 150 and told["extension_rows"] > 0
    assert {"features", "place_scores"} <= set(told["outputs"])
    scores = example.score(example.load(here), bricks(40, 9))["ood_score"]
    example.recalibrate(here, scores, tmp_path / "again.tflite")
    about = example.description(tmp_path / "again.tflite")
    assert about["extension_rows"] == told["extension_rows"]
    again = example.score(example.load(tmp_path / "again.tflite"), alarm[np.newaxis])
    np.testing.assert_array_equal(
        again["anomaly_map"], example.score(example.load(here), alarm[np.newaxis])["anomaly_map"]
    )


def test_places_that_are_not_finite_are_refused(extensible, example, tmp_path):
    one, path = extensible
    places = np.full((2, one.extractor.feature_dim), np.nan, np.float32)
    with pytest.raises(ValueError, match="must be finite"):
        example.extend(path, places, tmp_path / "here.tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_without_room_is_as_it_was(files, example, tmp_path):
    path = files[None]
    about = metadata.description(path.read_bytes())
    assert not {"extension_room", "extension_rows"} & set(about)
    assert set(about["outputs"]) == {"ood_score", "p_value", "is_ood", "anomaly_map"}
    assert set(about["buffers"]) == {"scores", "p_values", "rate"}
    alarm = saved(damaged(1, 3)[0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="exported with extension_room"):
        example.main([str(path), "--extend", alarm])
    with pytest.raises(ValueError, match="take two runs"):
        example.main([str(path), "--extend", alarm, "--recalibrate", alarm])


@pytest.mark.parametrize("room", [-1, 1.5, True, "10"])
def test_room_is_a_number_of_rows(detector, room, tmp_path):
    with pytest.raises(ValueError, match=r"`extension_room` must be an int, 0 or more\. Received"):
        export.tflite(detector, tmp_path / "a.tflite", extension_room=room)


def test_room_needs_places_and_the_nearest_row(tmp_path):
    whole = Detector.from_images(convnet(), bricks(20, 0), bricks(19, 1), 0.1, verbose=0)
    with pytest.raises(ValueError, match=r"compares whole images.*Received: extension_room=5"):
        export.tflite(whole, tmp_path / "a.tflite", extension_room=5)
    several = Detector.from_images(
        convnet(), bricks(20, 0), bricks(19, 1), 0.1, layers="eight", k=3, bank_size=50, verbose=0
    )
    with pytest.raises(ValueError, match=r"needs `k=1`.*Received: extension_room=5, k=3"):
        export.tflite(several, tmp_path / "a.tflite", extension_room=5)
    assert not list(tmp_path.iterdir())


def test_the_command_leaves_room(detector, tmp_path, capsys):
    detector.save(tmp_path / "parts.keras")
    path = tmp_path / "parts.tflite"
    options = [f"--detector={tmp_path}/parts.keras", f"--tflite={path}"]
    assert cli.main(["export", *options, "--tflite_extension_room=7"]) == 0, capsys.readouterr().err
    assert metadata.description(path.read_bytes())["extension_room"] == 7


def test_room_of_a_single_row_takes_one_place(detector, example, tmp_path):
    path = export.tflite(detector, tmp_path / "a.tflite", batch_size=1, extension_room=1, verbose=0)
    alarm = damaged(1, 3)
    answer = example.score(example.load(path), alarm)
    highest = np.unravel_index(answer["place_scores"].argmax(), answer["place_scores"].shape)
    example.extend(path, answer["features"][highest][np.newaxis], path)
    after = example.score(example.load(path), alarm)["place_scores"]
    assert after[highest] == pytest.approx(detector.lowest_score, abs=1e-2)
