"""`examples/edge_inference.py` as on a device: with its three libraries and no other."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from sddns_tf import export
from sddns_tf.detector import Detector
from sddns_tf.vit import VisionTransformer

pytest.importorskip("ai_edge_litert")
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "edge_inference.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("edge_inference", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector(normal, auxiliary):
    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=2, num_heads=2)
    return Detector.from_images(backbone, normal[:13], normal[13:], 0.2, verbose=0)


@pytest.fixture(scope="module")
def model(detector, tmp_path_factory):
    return export.tflite(detector, tmp_path_factory.mktemp("edge") / "model.tflite", batch_size=1)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Python of a virtual environment that holds the example's libraries and nothing else."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    done = subprocess.run(
        [*install, "ai-edge-litert", "numpy", "pillow"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"pip cannot install: {done.stderr.strip()[-200:]}")
    return python


def run(python, *arguments):
    done = subprocess.run([python, EXAMPLE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow  # pip makes an environment.
def test_a_device_decides_as_the_detector(device, detector, model, normal, auxiliary, tmp_path):
    images = [*normal[20:24], *auxiliary[::8, :32, :32]]
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    there = "import importlib.util as i; print(i.find_spec('tensorflow'), i.find_spec('keras'))"
    found = subprocess.run([device, "-c", there], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["None", "None"]
    rows = run(device, model, *paths)
    expected = detector.predict(np.stack(images), verbose=0)
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert [row["is_ood"] for row in rows] == expected["is_ood"].tolist()
    assert set(expected["is_ood"]) == {True, False}
    scores = [row["ood_score"] for row in rows]
    np.testing.assert_allclose(scores, expected["ood_score"], rtol=0, atol=1e-3)

    # Calibrated with its own images there, as the detector would be with the same.
    here = tmp_path / "here.tflite"
    (told,) = run(
        device, model, "--recalibrate", *paths[4:], "--output", here, "--false_positive_rate", 0.4
    )
    assert told["images"] == 4
    other = Detector.from_config(detector.get_config())
    other.set_weights(detector.get_weights())
    other.recalibrate(np.stack(images[4:]), 0.4, verbose=0)
    expected = other.predict(np.stack(images), verbose=0)
    rows = run(device, here, *paths)
    # Each of these four images is among the calibration scores: it may round to either side.
    for row, p_value in zip(rows[:4], expected["p_value"][:4], strict=True):
        assert row["p_value"] == pytest.approx(p_value, abs=1e-6)
    assert len(list(tmp_path.glob("*.tflite*"))) == 1


def test_another_size_is_resized(example, detector, model, auxiliary, tmp_path):
    image = np.ascontiguousarray(auxiliary[0][:, :40])
    Image.fromarray(image).save(tmp_path / "a.png")
    read = example.read_image(tmp_path / "a.png", (32, 32))
    assert read.shape == (32, 32, 3) and read.dtype == np.uint8
    answer = example.score(example.load(model), [read])
    # The file takes whole gray levels, the detector does not round after resizing.
    expected = detector(image[np.newaxis])["ood_score"]
    np.testing.assert_allclose(answer["ood_score"], expected, rtol=0, atol=0.1)


def test_threads_change_no_score(example, model, auxiliary, tmp_path, capsys):
    Image.fromarray(auxiliary[0][:32, :32]).save(tmp_path / "a.png")
    for threads in (1, 2):
        command = [str(model), str(tmp_path / "a.png"), f"--threads={threads}"]
        assert example.main(command) == 0
    one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["ood_score"] == pytest.approx(two["ood_score"], abs=1e-4)
    with pytest.raises(ValueError, match=r"at least 1\. Received: 0"):
        example.main([str(model), "--threads=0"])


def test_calibration_is_that_of_the_package(example, model, tmp_path):
    scores = np.random.default_rng(0).normal(size=57).astype(np.float32)
    example.recalibrate(model, scores, tmp_path / "device.tflite", 0.1)
    file = bytearray(model.read_bytes())
    export.metadata.calibrate(file, scores, 0.1)
    assert (tmp_path / "device.tflite").read_bytes() == bytes(file) != model.read_bytes()
    about = example.description(tmp_path / "device.tflite")
    assert about["false_positive_rate"] == 0.1 and about["calibration_images"] == 57
    assert about == export.metadata.description(file)


def test_p_values_follow_the_new_calibration(example, model, normal, auxiliary, tmp_path):
    images = np.concatenate([normal[:8], auxiliary[:8, :32, :32]])
    before = example.score(example.load(model), images)
    calibration = np.linspace(before["ood_score"].min() - 1, before["ood_score"].max() + 0.5, 99)
    for number in (99, 20):
        example.recalibrate(model, calibration[:number], tmp_path / "a.tflite", 0.1)
        after = example.score(example.load(tmp_path / "a.tflite"), images)
        np.testing.assert_array_equal(after["ood_score"], before["ood_score"])
        higher = (calibration[:number] >= before["ood_score"][:, np.newaxis]).sum(axis=1)
        p_values = (np.float32(1) + higher.astype(np.float32)) / np.float32(1 + number)
        np.testing.assert_array_equal(after["p_value"], p_values)
        np.testing.assert_array_equal(after["is_ood"], p_values <= np.float32(0.1))


def test_wrong_calibrations_are_refused(example, model, tmp_path):
    output = tmp_path / "a.tflite"
    for scores, rate, message in (
        (np.zeros(8), 0.1, r"at least 1 / rate - 1 .* Received: 0.1 and 8 images"),
        (np.zeros(50), 1.0, "between 0 and 1"),
        (np.zeros(1001), 0.1, "at most 1000 finite scores. Received: 1001"),
        (np.full(20, np.nan), 0.1, "20 of them not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            example.recalibrate(model, scores, output, rate)
    assert not list(tmp_path.iterdir())
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits per channel"):
        example.read_image(tmp_path / "deep.png", (32, 32))


@pytest.fixture(scope="module")
def local_file(normal, tmp_path_factory):
    """A file whose detector has maps and cuts images to squares."""
    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=2, num_heads=2)
    detector = Detector.from_images(
        backbone, normal[:13], normal[13:], 0.2, layers="tokens", resize="crop", verbose=0
    )
    return export.tflite(detector, tmp_path_factory.mktemp("local") / "local.tflite", batch_size=1)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("shape", [(40, 90), (64, 33)])
def test_photographs_are_turned_and_cut_as_by_the_detector(
    example, local_file, auxiliary, tmp_path, shape, orientation
):
    from sddns_tf.cli import score, scorers

    photograph = np.tile(auxiliary[0], (3, 3, 1))[: shape[0], : shape[1]]
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(photograph).save(path, exif=tags)
    expected = score.read_image(str(path), scorers.open_model(local_file, 1))
    read = example.read_image(path, (32, 32), example.description(local_file)["resize"])
    np.testing.assert_array_equal(read, expected)


def test_overlays_have_names_of_their_own(example, local_file, normal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "a", "b"):
        pathlib.Path(folder).mkdir(exist_ok=True)
        Image.fromarray(normal[0]).save(f"{folder}/1.png")
    before = pathlib.Path("1.png").read_bytes()
    arguments = [str(local_file), "1.png", "a/1.png", "b/1.png", f"{tmp_path}/1.png"]
    assert example.main([*arguments, "--maps=."]) == 0
    assert pathlib.Path("1.png").read_bytes() == before
    written = {str(path) for path in pathlib.Path().rglob("*.png.png")}
    assert written == {"1.png.png", "a/1.png.png", "b/1.png.png", f"{tmp_path}/1.png.png"[1:]}


def test_a_bad_file_is_named_and_the_others_are_scored(example, model, normal, tmp_path, capsys):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(normal[0]).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    assert example.main([str(model), str(bad), str(good)]) == 2
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert f"{bad} cannot be read" in first["error"] and "ood_score" in second
    with pytest.raises(ValueError, match=rf"{bad} cannot be read"):
        example.main([str(model), "--recalibrate", str(good), str(bad)])


@pytest.mark.parametrize("option", ["--false_positive_rate=0.5", "--output=other.tflite"])
def test_options_that_change_a_file_need_images_to_do_so(example, model, option):
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]} needs --recalibrate"):
        example.main([str(model), option])
