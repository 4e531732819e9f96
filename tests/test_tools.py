"""The tools as a user runs them: each on tiny images, and told wrong things."""

import csv
import importlib
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import skimage.data
from absl import flags

import sddns_tf

TOOLS = pathlib.Path(sddns_tf.__file__).parents[1] / "tools"
NAMES = ("train", "evaluate", "export", "sensitivity")
FLAGS = flags.FLAGS
TINY = (
    "--patch_size=8", "--hidden_dim=16", "--depth=1", "--num_heads=2", "--local_views=1",
    "--num_prototypes=16", "--head_hidden_dim=16", "--bottleneck_dim=8", "--batch_size=16",
    "--epochs=2", "--steps_per_epoch=2",
)  # fmt: skip


def crops(photograph, count, side=32):
    """Squares of a photograph, in rows."""
    columns = photograph.shape[1] // side
    corners = [(side * (i // columns), side * (i % columns)) for i in range(count)]
    squares = np.stack([photograph[y : y + side, x : x + side] for y, x in corners])
    return squares if squares.ndim == 4 else np.repeat(squares[..., None], 3, axis=-1)


def run(tool, *arguments):
    """A tool in this process: what Python and TensorFlow take to start is paid once."""
    sys.path.insert(0, str(TOOLS))
    try:
        module = importlib.import_module(tool)
    finally:
        sys.path.remove(str(TOOLS))
    before = set(FLAGS)
    module.define_flags()
    try:
        FLAGS([tool, *map(str, arguments)])
        module.main()
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
        FLAGS.unparse_flags()


def run_apart(tool, *arguments):
    """A tool in a process of its own."""
    return subprocess.run(
        [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Image sets in files, and a finished training on them in `run`."""
    folder = tmp_path_factory.mktemp("tools")
    sets = {
        "grass": crops(skimage.data.grass(), 120),
        "fresh": crops(skimage.data.grass()[256:], 40),
        "coffee": crops(skimage.data.coffee(), 60),
        "brick": crops(skimage.data.brick(), 30),
    }
    for name, images in sets.items():
        np.savez(folder / name, images=images, labels=np.arange(len(images)) % 2)
    train(folder, "run")
    return folder


def train(folder, output_dir, *arguments):
    run(
        "train",
        f"--data=npz:{folder}/grass.npz",
        f"--auxiliary=npz:{folder}/coffee.npz",
        "--calibration_share=0.2",
        f"--output_dir={folder}/{output_dir}",
        *TINY,
        *arguments,
    )


def evaluate(folder, output_dir, model, *arguments):
    run(
        "evaluate",
        f"--model={folder}/run/{model}.keras",
        f"--test=npz:{folder}/fresh.npz",
        f"--ood=npz:{folder}/brick.npz,a|b=npz:{folder}/coffee.npz",
        f"--output_dir={folder}/{output_dir}",
        "--resamples=50",
        "--gallery_size=4",
        *arguments,
    )
    return json.loads((folder / output_dir / "results.json").read_text())


# --- train -------------------------------------------------------------------------------------


def test_train_writes_what_it_says(folder):
    model, backbone, detector = (
        keras.models.load_model(folder / "run" / f"{name}.keras")
        for name in ("model", "backbone", "detector")
    )
    assert int(model.step) == 4
    assert model.negatives.source == "auxiliary"
    # 24 of the 120 images are held out.
    assert detector.calibration_scores.shape == (24,)
    assert detector.bank.shape == (96, 16)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(model.teacher_backbone(image), backbone(image), atol=1e-6)
    np.testing.assert_allclose(detector.extractor.backbone(image), backbone(image), atol=1e-6)
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["flags"]["hidden_dim"] == 16
    assert config["flags"]["source"] == "auxiliary"
    assert config["derived"] == {**config["derived"], "image_size": 32, "training_images": 96}
    assert len(list(csv.DictReader((folder / "run" / "log.csv").open()))) == 2


def test_train_logs_to_tensorboard(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder / "run" / "tensorboard" / "pictures"))
    tags = events.Reload().Tags()["tensors"]
    shown = {tag.removesuffix("/image_0") for tag in tags}
    assert {"views of 32 px", "views of 16 px", "negatives of 32 px", "separation"} <= shown
    assert {"scores/held_out", "scores/rot90"} <= shown


def test_train_goes_on_and_refuses_another_run(folder):
    log, weights = (folder / "run" / name for name in ("log.csv", "model.keras"))
    before = keras.models.load_model(weights).get_weights()
    train(folder, "run")  # nothing is left to do, but everything is written again
    assert len(log.read_text().splitlines()) == 3
    for old, new in zip(before, keras.models.load_model(weights).get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(
        ValueError, match=r"holds a run with --shift=rot90. Received: --shift=perm4"
    ):
        train(folder, "run", "--shift=perm4")


def test_recipe_sets_flags_and_flags_override_it(folder, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nRECIPE = {"depth": 2, "local_area": [0.2, 0.3], "epochs": 9}\n')
    train(folder, "recipe", f"--recipe={path}", "--steps_per_epoch=1", "--nonorm_last_layer")
    values = json.loads((folder / "recipe" / "config.json").read_text())["flags"]
    assert values["local_area"] == [0.2, 0.3]
    assert (values["depth"], values["epochs"]) == (1, 2)  # on the command line, in TINY
    path.write_text('RECIPE = {"dept": 2}\n')
    with pytest.raises(ValueError, match=r"mine\.py sets a flag that there is not: dept"):
        train(folder, "other", f"--recipe={path}")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (TOOLS / "recipes").glob("*.py")))
def test_recipes_are_understood(recipe):
    spec = importlib.util.spec_from_file_location(recipe, TOOLS / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--recipe={recipe}" in module.__doc__
    result = run_apart("train", f"--recipe={recipe}", "--output_dir=x", "--data=tfds")
    # The recipe's own flags were taken: what is wrong is ours.
    assert "--data must be tfds:NAME" in result.stderr


def test_rectangles_and_mixed_sizes_are_cropped(folder, tmp_path):
    cat = skimage.data.chelsea()
    for index in range(30):
        side = 60 + index
        keras.utils.save_img(tmp_path / f"{index:02}.png", cat[:side, index : index + 2 * side])
    run(
        "train",
        f"--data=folder:{tmp_path}",
        "--resolution=16,48",
        "--resize=crop",
        "--shift=none",
        "--calibration_share=0.7",
        f"--output_dir={folder}/rectangles",
        *TINY,
        "--batch_size=4",
        "--image_size=32",
    )
    extractor = keras.models.load_model(folder / "rectangles" / "detector.keras").extractor
    assert extractor.resolution == (16, 48)
    assert extractor.image_size == (16, 56)  # about 32 x 32 pixels, in patches of 8


def test_crop_keeps_the_centre():
    sys.path.insert(0, str(TOOLS))
    import types

    import command_line

    sys.path.remove(str(TOOLS))
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200
    settings = types.SimpleNamespace(resize="crop")
    assert (command_line._fitted(image, (20, 20), settings).numpy() == 200).all()
    settings.resize = "squash"
    assert (command_line._fitted(image, (20, 20), settings).numpy() == 0).any()


# --- evaluate ----------------------------------------------------------------------------------


def test_evaluate_agrees_with_the_detector(folder, capsys):
    results = evaluate(folder, "evaluation", "detector", f"--data=npz:{folder}/grass.npz")
    printed = capsys.readouterr().out
    detector = keras.models.load_model(folder / "run" / "detector.keras")
    scores = {
        name: detector.predict(np.load(folder / f"{name}.npz")["images"], verbose=0)["ood_score"]
        for name in ("fresh", "brick")
    }
    greater = scores["brick"][:, None] > scores["fresh"][None]
    brick = results["sets"]["brick"]
    assert brick["auroc"]["value"] == pytest.approx(greater.mean())
    assert brick["auroc"]["low"] <= brick["auroc"]["value"] <= brick["auroc"]["high"]
    assert brick["flagged"]["value"] == np.mean(scores["brick"] > detector.threshold)
    assert results["sets"]["fresh normal images"]["images"] == 40
    assert 0 <= results["knn_accuracy"]["value"] <= 1
    assert f"| brick | 30 | {brick['auroc']['value']:.3f} (" in printed
    assert r"| a\|b | 60 |" in printed
    assert printed.strip() == (folder / "evaluation" / "table.md").read_text().strip()
    rows = {row["set"]: row for row in csv.DictReader((folder / "evaluation/table.csv").open())}
    assert float(rows["brick"]["fpr95_high"]) == brick["fpr95"]["high"]
    assert rows["fresh normal images"]["auroc"] == ""
    page = (folder / "evaluation" / "report.html").read_text()
    assert "a|b" in page
    assert "training: hidden_dim" in page


@pytest.mark.parametrize("model", ["model", "backbone"])
def test_evaluate_makes_a_detector(folder, model):
    arguments = (f"--data=npz:{folder}/grass.npz", f"--calibration=npz:{folder}/coffee.npz")
    results = evaluate(folder, model, model, *arguments, "--false_positive_rate=0.1")
    assert results["false_positive_rate"] == 0.1
    assert results["configuration"]["bank"] == 120
    with pytest.raises(ValueError, match="--data is needed"):
        evaluate(folder, model, model)


def test_evaluate_recalibrates(folder):
    results = evaluate(folder, "rate", "detector", "--false_positive_rate=0.25")
    assert results["false_positive_rate"] == 0.25
    other = f"--calibration=npz:{folder}/coffee.npz"
    results = evaluate(folder, "other", "detector", other)
    assert results["configuration"]["calibration images"] == 60


# --- export ------------------------------------------------------------------------------------


def test_export_writes_both(folder, capsys):
    run(
        "export",
        f"--detector={folder}/run/detector.keras",
        f"--saved_model={folder}/exported",
        f"--tflite={folder}/exported.tflite",
        f"--representative=npz:{folder}/grass.npz",
        "--limit=8",
    )
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [line["export"] for line in told] == ["saved_model", "tflite"]
    assert (pathlib.Path(told[0]["path"]) / "saved_model.pb").is_file()
    assert told[1]["bytes"] == (folder / "exported.tflite").stat().st_size


# --- sensitivity -------------------------------------------------------------------------------


def test_sensitivity_chooses_and_goes_on(folder, capsys):
    arguments = (
        f"--data=npz:{folder}/grass.npz",
        "--calibration_share=0.2",
        f"--output_dir={folder}/strategies",
        f"--test=npz:{folder}/fresh.npz",
        f"--ood=npz:{folder}/brick.npz",
        *TINY,
        "--epochs=1",
        "--steps_per_epoch=1",
    )
    both = "--strategies=rot90:in_distribution,none"
    run("sensitivity", *arguments, both)
    table = capsys.readouterr().out
    results = json.loads((folder / "strategies" / "results.json").read_text())
    assert set(results["sensitivity"]) == {"rot90:in_distribution", "none"}
    assert results["chosen"] == max(results["sensitivity"], key=results["sensitivity"].get)
    assert "rot90" not in results["strategies"]["rot90:in_distribution"]["sensitivity"]
    assert f"Chosen: {results['chosen']}" in table
    assert "| strategy | sensitivity | mean AUROC | brick |" in table
    assert (folder / "strategies" / "sensitivity.png").stat().st_size > 1000

    found = folder / "strategies" / "none" / "sensitivity.json"
    known = json.loads(found.read_text())
    known["sensitivity"]["mean"] = 0.999
    found.write_text(json.dumps(known))
    run("sensitivity", *arguments, both)  # read, not trained again
    assert "| none | 0.999 |" in capsys.readouterr().out


# --- What is said ------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", NAMES)
def test_help_is_readable(tool):
    result = run_apart(tool, "--help")
    assert result.returncode == 1  # absl's own
    assert f"python tools/{tool}.py" in result.stdout
    own = result.stdout.partition(f"{tool}.py:\n")[2]
    assert "--" in own
    assert "(a comma separated list)" in own or tool == "export"


WRONG = [
    ("train", ["--data=cifar10"], "--data must be tfds:NAME", "Received: cifar10"),
    ("train", [], "--data is needed", "--data=None"),
    ("train", ["--shift=rot45"], "--shift", "rot45"),
    ("train", ["--epochs=0"], "--epochs", "0"),
    ("train", ["--local_area=0.1,x"], "--local_area must be", "0.1,x"),
    ("train", ["--backbone=resnet"], "--backbone must be one of", "resnet"),
    ("train", ["--source=both"], "--source=both needs --auxiliary", ""),
    ("train", ["--recipe=mine"], "--recipe must be one of", "mine"),
    ("train", ["--resolution=1,2,3"], "--resolution must be SIDE", "1,2,3"),
    ("train", ["left"], "Expected flags only", "left"),
    ("evaluate", ["--model=m.keras"], "--test is needed", ""),
    ("evaluate", ["--ood=npz:a.npz,npz:b/a.npz"], "--ood has two sets named a", ""),
    ("export", ["--detector=d.keras"], "--saved_model or --tflite is needed", ""),
    ("export", ["--detector=d.keras", "--tflite=x.lite"], "--tflite must end in .tflite", "x.lite"),
    ("export", ["--quantization=int4"], "--quantization", "int4"),
    ("sensitivity", ["--strategies=rot90"], "--strategies must be", "rot90"),
]
NEEDED = {
    "train": ["--data=npz:x.npz", "--output_dir=unused"],
    "evaluate": ["--model=m.keras", "--test=npz:x.npz", "--output_dir=unused"],
    "export": [],
    "sensitivity": ["--data=npz:x.npz", "--output_dir=unused"],
}


@pytest.mark.parametrize(("tool", "arguments", "flag", "value"), WRONG)
def test_what_is_wrong_is_said_in_a_line(tool, arguments, flag, value):
    needed = [] if flag.endswith("is needed") else NEEDED[tool]
    result = run_apart(tool, *needed, *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if x.startswith(("ERROR", "FATAL"))] or [""]
    assert "Traceback" not in result.stderr
    told = line + result.stderr
    assert flag in told
    assert value in told


def test_missing_files_are_named(tmp_path):
    missing = tmp_path / "d.keras"
    result = run_apart("export", f"--detector={missing}", f"--tflite={tmp_path}/x.tflite")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"ERROR: --detector must be a .keras file. Received: {missing}"
