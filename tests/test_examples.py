"""The examples run as a user runs them: as programs, from a folder of their own."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from scripts import example
from toy_sets import tiles, write_tfds

import sddns_tf
from sddns_tf import data, metrics

ROOT = pathlib.Path(sddns_tf.__file__).parents[1]
SIDE = 32


def run(*command, cwd):
    """A Python program in a process of its own, without a GPU, with the package on its path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# --- cifar10.py ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_cifar10_trains_and_its_detector_is_that_of_its_table(tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    grass = tiles("grass", 140, SIDE)
    write_tfds(tmp_path, "lawn", SIDE, train=grass[:100], test=grass[100:])
    # Sets of two sizes of image, as most public ones are of many.
    scenes = [*tiles("coffee", 60, 40), *tiles("chelsea", 40, 48)]
    write_tfds(tmp_path, "scenes", train=scenes)
    write_tfds(tmp_path, "wall", test=[*tiles("brick", 16, 36), *tiles("brick", 8, SIDE)])
    out = tmp_path / "out"
    with example("cifar10") as cifar10:
        cifar10.FLAGS(
            [
                "cifar10", f"--data_dir={tmp_path}", f"--output_dir={out}", "--epochs=1",
                "--in_distribution=lawn", "--auxiliary=scenes", "--ood=wall",
            ]
        )  # fmt: skip
        cifar10.main([])
    detector = keras.models.load_model(out / "detector.keras")
    normal = detector.predict(grass[101::2], verbose=0)
    source = {"split": "test", "data_dir": str(tmp_path), "image_size": SIDE}
    wall = detector.predict(data.load_arrays("tfds:wall", **source), verbose=0)
    auroc = metrics.ood_metrics(normal["ood_score"], wall["ood_score"])["auroc"]
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("wall")]
    assert float(row[1]) == pytest.approx(auroc, abs=1e-3)
    assert row[3] == f"{wall['is_ood'].mean():.1%}"
    assert f"{normal['is_ood'].mean():.1%}  (asked for" in printed
    assert {path.name for path in out.iterdir()} == {
        "detector.keras", "model.keras", "roc_curves.png", "score_histograms.png",
        "training_curves.png",
    }  # fmt: skip


# --- quickstart.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart():
    with example("quickstart") as module:
        yield module


@pytest.mark.parametrize("name", ["grass", "brick"])
def test_quickstart_holds_out_rows_that_it_does_not_train_on(quickstart, name):
    photo = quickstart.photograph(name)
    assert photo.dtype == np.uint8
    assert photo.ndim == 2
    top, bottom = quickstart.HELD_OUT_ROWS
    assert 0 <= top < bottom <= len(photo)
    assert min(top, bottom - top, len(photo) - bottom) >= quickstart.CROP_SIZE
    # A photograph that shows which of its rows are held out, cut as the example cuts it.
    rows = np.zeros_like(photo)
    rows[top:bottom] = 255
    generator = np.random.default_rng(0)
    for part in (rows[:top], rows[bottom:]):
        assert quickstart.crops(part, 100, generator).max() == 0
    assert quickstart.crops(rows[top:bottom], 100, generator).min() == 255
    assert 0 < quickstart.crops(rows, 100, generator).mean() < 255


def test_quickstart_crops_are_color_images_of_one_size(quickstart):
    photo = quickstart.photograph("coffee")  # in color
    assert photo.ndim == 2
    crops = quickstart.crops(photo, 5, np.random.default_rng(0))
    assert crops.shape == (5, quickstart.IMAGE_SIZE, quickstart.IMAGE_SIZE, 3)
    assert crops.dtype == np.uint8
    assert len(np.unique(crops, axis=0)) == 5
    assert (crops[..., 0] == crops[..., 2]).all()


# --- The package --------------------------------------------------------------------------------


def test_every_name_of_the_short_example_is_there_after_a_bare_import(tmp_path):
    names = (
        "SelfDistillation", "vit_small", "MultiCrop", "Negatives", "data.with_auxiliary",
        "Detector.from_images", "export.saved_model", "export.tflite",
    )  # fmt: skip
    program = "\n".join(["import sddns_tf", *(f"assert callable(sddns_tf.{n})" for n in names)])
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
