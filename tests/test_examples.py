"""The examples run as a user runs them: as programs, from a folder of their own."""

import csv
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
from absl import flags

import sddns_tf
from sddns_tf import data

ROOT = pathlib.Path(sddns_tf.__file__).parents[1]
EXAMPLES = ROOT / "examples"
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


def tiles(photograph, count, side):
    """Different squares of a photograph."""
    columns = photograph.shape[1] // side
    corners = [(side * (i // columns), side * (i % columns)) for i in range(count)]
    return [photograph[y : y + side, x : x + side] for y, x in corners]


def store(root, name, side=None, **splits):
    """A prepared TFDS set of two classes; with `side=None` it states no size of its images."""
    import tensorflow_datasets as tfds

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    features = {
        "image": tfds.features.Image(shape=(side, side, 3)),
        "label": tfds.features.ClassLabel(names=["even", "odd"]),
    }
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=200)
    writer.initialize_splits(list(splits))
    for split, images in splits.items():
        rows = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
        writer.add_examples({split: rows})
    writer.close_all()


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """A finished run on tiny sets: its command, its folder and what it printed."""
    pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("cifar10")
    grass, brick = (
        np.repeat(photograph[..., np.newaxis], 3, axis=-1)
        for photograph in (skimage.data.grass(), skimage.data.brick())
    )
    grass = tiles(grass, 140, SIDE)
    store(root / "tfds", "lawn", SIDE, train=grass[:100], test=grass[100:])
    # Sets of two sizes of image, as most public ones are of many.
    coffee, chelsea = skimage.data.coffee(), skimage.data.chelsea()
    store(root / "tfds", "scenes", train=tiles(coffee, 60, 40) + tiles(chelsea, 40, 48))
    store(root / "tfds", "wall", test=tiles(brick, 16, 36) + tiles(brick, 8, SIDE))
    command = (
        EXAMPLES / "cifar10.py",
        "--data_dir=tfds",
        "--output_dir=out",
        "--in_distribution=lawn",
        "--auxiliary=scenes",
        "--ood=wall",
        "--recipe=cpu",
        "--epochs=1",
    )
    done = run(*command, cwd=root)
    assert done.returncode == 0, done.stderr
    return command, root, done.stdout


def results_of(root):
    return json.loads((root / "out" / "results.json").read_text())


def test_cifar10_trains_and_prints_its_table(cifar10):
    _, root, printed = cifar10
    lines = printed.splitlines()
    assert "trained 1 steps of 96 images" in printed
    header = next(i for i, line in enumerate(lines) if "aupr_in" in line)
    assert lines[header].split() == ["auroc", "aupr_in", "aupr_out", "fpr95", "flagged"]
    wall, fresh = lines[header + 1].rsplit(None, 5), lines[header + 2].rsplit(None, 1)
    assert wall[0] == "wall"
    assert fresh[0] == "fresh normal images"
    table = results_of(root)["table"]
    np.testing.assert_allclose(
        [float(cell) for cell in wall[1:]], list(table["wall"].values()), atol=5e-4
    )
    assert 0.0 <= table["wall"]["auroc"] <= 1.0


def test_cifar10_writes_everything(cifar10):
    _, root, _ = cifar10
    written = {path.name for path in (root / "out").iterdir()}
    assert written == {
        "attention.png",
        "backup",
        "detector.keras",
        "log.csv",
        "model.keras",
        "results.json",
        "roc_curves.png",
        "run.json",
        "score_histograms.png",
        "training_curves.png",
    }
    plan = json.loads((root / "out" / "run.json").read_text())
    assert [plan[name] for name in ("steps", "epochs", "steps_per_epoch")] == [1, 1, 1]
    assert plan["flags"]["auxiliary"] == "scenes"
    assert plan["flags"]["minutes"] is None


def test_cifar10_saves_the_detector_of_its_table(cifar10):
    _, root, _ = cifar10
    detector = keras.models.load_model(root / "out" / "detector.keras")
    fresh = data.load_arrays("tfds:lawn", split="test", data_dir=str(root / "tfds"))[1::2]
    flagged = np.mean(detector.predict(fresh, verbose=0)["is_ood"])
    assert results_of(root)["table"]["fresh normal images"]["flagged"] == pytest.approx(flagged)


def test_cifar10_again_goes_on_where_it_stood(cifar10):
    command, root, _ = cifar10
    before, log = results_of(root), (root / "out" / "log.csv").read_text()
    (root / "out" / "results.json").unlink()
    done = run(*command, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "trained 1 steps" in done.stdout  # restored, not trained again
    assert "Epoch 1/1" not in done.stdout
    assert (root / "out" / "log.csv").read_text() == log
    assert len(list(csv.DictReader(log.splitlines()))) == 1
    after = results_of(root)
    assert after["minutes"] == before["minutes"]
    for name, row in before["table"].items():
        assert after["table"][name] == pytest.approx(row, abs=1e-6)


def test_cifar10_refuses_another_run_in_the_same_folder(cifar10):
    command, root, _ = cifar10
    before = (root / "out" / "run.json").read_text()
    done = run(*command, "--shift=perm4", cwd=root)
    assert done.returncode == 1
    assert "--shift=rot90" in done.stderr
    assert "--shift=perm4: choose another --output_dir" in done.stderr
    assert (root / "out" / "run.json").read_text() == before


# --- quickstart.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart():
    """The example as a module; the flags that it defines go when the tests are done."""
    others = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - others:
        delattr(flags.FLAGS, name)


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


def test_quickstart_crops_are_colour_images_of_one_size(quickstart):
    photo = quickstart.photograph("coffee")  # in colour
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
