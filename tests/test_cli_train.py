"""`sddns train`: what it writes, how it goes on, what it refuses."""

import csv
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from tiny import no_pictures

import sddns_tf
from sddns_tf import image_ops
from sddns_tf.cli import advice, evaluate, train, training
from sddns_tf.cli import images as image_options
from sddns_tf.cli import main as cli
from sddns_tf.cli.errors import UsageError
from sddns_tf.cli.progress import Progress
from sddns_tf.cli.schedule_forms import Length


def test_it_writes_what_it_says(trained):
    model, backbone, detector = (
        keras.saving.load_model(trained / f"{name}.keras")
        for name in ("model", "backbone", "detector")
    )
    assert int(model.step) == 4
    assert model.negatives.source == "auxiliary"
    # 24 of the 120 images are held out.
    assert detector.calibration_scores.shape == (24,)
    assert detector.bank.shape == (96, 16)
    assert detector.extractor.standardized  # as in training
    np.testing.assert_allclose(np.mean(detector.bank, axis=0), 0.0, atol=1e-3)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(model.teacher_backbone(image), backbone(image), atol=1e-6)
    np.testing.assert_allclose(detector.extractor.backbone(image), backbone(image), atol=1e-6)
    config = json.loads((trained / "config.json").read_text())
    assert config["backbone"]["stages"] == [8, 16]
    assert config["detector"]["standardize"] is True
    assert config["negatives"]["source"] == "auxiliary"
    assert config["views"]["hue"] == sddns_tf.MultiCrop(8).hue
    derived = config["derived"]
    assert (derived["training_images"], derived["resolution"]) == (96, [32, 32])
    assert len(list(csv.DictReader((trained / "log.csv").open()))) == 2


def test_it_logs_to_tensorboard(trained):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(trained / "tensorboard" / "pictures"))
    tags = events.Reload().Tags()["tensors"]
    shown = {tag.removesuffix("/image_0") for tag in tags}
    assert {"views of 32 px", "views of 16 px", "negatives of 32 px", "separation"} <= shown
    assert {"scores/held_out", "scores/rot90"} <= shown


def test_it_goes_on_and_refuses_another_run(train_on, trained):
    before = keras.saving.load_model(trained / "model.keras").get_weights()
    train_on(trained)  # nothing is left to do, but everything is written again
    assert len((trained / "log.csv").read_text().splitlines()) == 3
    after = keras.saving.load_model(trained / "model.keras").get_weights()
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(UsageError, match=r'negatives.shift="rot90".* Received: .*="perm4"'):
        train_on(trained, "--shift=perm4")


def test_a_finished_run_makes_another_detector(train_on, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    train_on(run, "--set=detector.false_positive_rate=0.2", "--set=detector.bank_size=20")
    detector = keras.saving.load_model(run / "detector.keras")
    assert (detector.false_positive_rate, detector.bank.shape[0]) == (0.2, 20)
    one, other = (keras.saving.load_model(x / "model.keras") for x in (trained, run))
    for old, new in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    config = json.loads((run / "config.json").read_text())
    assert config["detector"]["bank_size"] == 20


def test_epochs_that_are_done_again_are_logged_once(train_on, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "log.csv").read_text()
    (run / "log.csv").write_text(before + ",0.1\n2")  # torn by a full disk
    for state in (run / "checkpoint").glob("step-*.npz"):
        if int(state.stem.removeprefix("step-")) > 2:
            state.unlink()  # as if the run had been killed before it was written
    assert list((run / "checkpoint").glob("step-*.npz"))
    train_on(run)
    after = (run / "log.csv").read_text()
    assert [row["epoch"] for row in csv.DictReader(after.splitlines())] == ["0", "1"]
    assert after.splitlines()[0] == before.splitlines()[0]


@pytest.mark.parametrize("name", ["backbone", "model"])
def test_training_goes_on_from_a_saved_network(trained, image_sets, tmp_path, name):
    """A teacher is saved frozen, but is not meant to stay so."""
    train.main(
        [
            f"--data=npz:{image_sets}/grass.npz", f"--backbone={trained}/{name}.keras",
            "--set=views.local_views=0", "--set=head.num_prototypes=16", "--epochs=1",
            "--steps_per_epoch=2", f"--output_dir={tmp_path}",
        ]
    )  # fmt: skip
    before = keras.saving.load_model(trained / "backbone.keras").get_weights()
    after = keras.saving.load_model(tmp_path / "model.keras").student_backbone
    assert len(after.trainable_weights) == len(before)
    for old, new in zip(before, after.get_weights(), strict=True):
        assert (old != new).any()


def test_a_mistake_leaves_the_run_that_was_there(train_on, trained, tmp_path):
    """`--noresume` removes it once the new one begins."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(UsageError, match="existing folder"):
        train_on(run, "--noresume", f"--data=folder:{tmp_path}/nowhere")
    with pytest.raises(UsageError, match="no layer of that name"):
        train_on(run, "--noresume", "--set=detector.layers=nowhere")
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_two_runs_do_not_write_to_one_folder(train_on, trained, tmp_path):
    """A run that ends in an error has released the folder; one that is killed has, too."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(UsageError, match="existing folder"):
        train_on(run, "--noresume", f"--data=folder:{tmp_path}/nowhere")
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)"
    script += "; print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match=r"no other run is writing to.*Received: .*run"):
            train_on(run, "--noresume")
        other.kill()  # as a run that is killed
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    train_on(run)


def test_too_few_calibration_images_are_told_before_training(train_on, image_sets, tmp_path):
    calibration = f"--calibration=npz:{image_sets}/fresh.npz"
    with pytest.raises(UsageError, match=r"at least 99 calibration images.*Received: 40"):
        train_on(tmp_path, calibration, "--set=detector.false_positive_rate=0.01")
    assert not list(tmp_path.iterdir())


def test_other_images_are_another_run(train_on, trained, image_sets, tmp_path):
    """Or images that were trained on would be held out to calibrate with."""
    run, path = shutil.copytree(trained, tmp_path / "run"), tmp_path / "grass.npz"
    images = np.load(image_sets / "grass.npz")["images"]
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = f"npz:{path}"
    (run / "config.json").write_text(json.dumps(config))
    np.savez(path, images=images)
    train_on(run, f"--data=npz:{path}")
    for others in (images[:-5], np.concatenate([255 - images[:1], images[1:]])):
        np.savez(path, images=others)
        with pytest.raises(UsageError, match=r"trained on 96 other images.*Received: 9[26] images"):
            train_on(run, f"--data=npz:{path}")
    train_on(run, f"--data=npz:{path}", "--noresume", "--steps_per_epoch=1", "--epochs=1")


WRONG_DETECTORS = [
    (["detector.smoothing=3"], "`smoothing` averages over places.*Received: smoothing=3"),
    (["detector.temperature=0"], "`temperature` must be a number above 0.0. Received: .*0"),
    (["detector.bank_method=median"], "`bank_method` must be one of .*'median'"),
    (["detector.layers=nowhere"], "no layer of that name.*Received: layers='nowhere'"),
    (["detector.aligned=true"], "pass `layers` as well. Received: aligned=True without layers"),
    (["detector.components=64"], "pass `layers` without `aligned=True`. Received: components=64"),
    (
        ["detector.layers=auto", "detector.components=64", "backbone.stages=[8,8,8,8]"],
        "`components` must be an int from 2 to 7. Received: components=64",
    ),
    (
        ["detector.layers=auto", "detector.ignore=none.png", "backbone.stages=[8,8,8,8]"],
        "none.png",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG_DETECTORS, ids=str)
def test_a_wrong_detector_is_told_before_training(train_on, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        train_on(tmp_path / "run", *(f"--set={option}" for option in options))
    assert not list(tmp_path.glob("run/*"))  # so that the same folder can be used again


def test_what_was_trained_is_written_before_the_detector(train_on, trained, tmp_path, monkeypatch):
    @functools.wraps(sddns_tf.Detector.from_images)
    def failing(*args, **kwargs):
        raise ValueError("not finite")

    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.keras"))
    monkeypatch.setattr(sddns_tf.Detector, "from_images", failing)
    with pytest.raises(UsageError, match="not finite"):
        train_on(run)
    assert {path.name for path in run.glob("*.keras")} == {"model.keras", "backbone.keras"}


def test_a_written_configuration_is_a_recipe_and_each_source_is_read_once(
    trained, tmp_path, monkeypatch
):
    read = []
    load_arrays = sddns_tf.data.load_arrays

    def counted(source, **options):
        read.append(source)
        return load_arrays(source, **options)

    monkeypatch.setattr(sddns_tf.data, "load_arrays", counted)
    with no_pictures():
        train.main([f"--recipe={trained}/config.json", f"--output_dir={tmp_path}"])
    assert [source.rpartition("/")[2] for source in read] == ["grass.npz", "coffee.npz"]
    one, other = (
        keras.saving.load_model(folder / "model.keras").get_weights()
        for folder in (trained, tmp_path)
    )
    for old, new in zip(one, other, strict=True):
        np.testing.assert_array_equal(old, new)


def test_images_can_be_read_in_each_epoch(train_on, image_sets, tmp_path):
    train_on(
        tmp_path,
        "--noin_memory",
        f"--calibration=npz:{image_sets}/fresh.npz",
        "--set=views.local_views=0",
        "--steps_per_epoch=1",
        "--epochs=1",
    )
    detector = keras.saving.load_model(tmp_path / "detector.keras")
    assert detector.bank.shape[0] == 120
    assert detector.calibration_scores.shape == (40,)


def test_few_photographs_need_no_options(image_sets, tmp_path):
    """Of 45 images 19 calibrate, as many as 5 % needs, and one batch holds all others."""
    train.main(
        [
            f"--data=npz:{image_sets}/grass.npz", "--limit=45", "--layers=auto", "--epochs=1",
            "--set=backbone.stages=[8,8,8]", "--set=head.num_prototypes=16",
            "--set=head.hidden_dim=16", "--set=views.local_views=0", f"--output_dir={tmp_path}",
            "--set=detector.components=4",
        ]
    )  # fmt: skip
    derived = json.loads((tmp_path / "config.json").read_text())["derived"]
    assert {name: derived[name] for name in ("batch_size", "steps_per_epoch")} == {
        "batch_size": 26,
        "steps_per_epoch": 1,
    }
    assert (derived["training_images"], derived["calibration_images"]) == (26, 19)
    detector = keras.saving.load_model(tmp_path / "detector.keras")
    assert detector.extractor.layer_names == ("stage_3",)
    assert detector.bank.shape[1] == detector.extractor.components == 4
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert detector.predict(image, verbose=0)["anomaly_map"].shape == (1, 8, 8)


@pytest.mark.parametrize(("images", "expected"), [(np.zeros(200), 64), (np.zeros(41), 41)])
def test_a_step_takes_64_images_or_all(images, expected):
    assert image_options.batch_size({"batch_size": None}, images) == expected
    assert image_options.batch_size({"batch_size": 7}, images) == 7
    assert image_options.batch_size({"batch_size": None}, None) == 64
    with pytest.raises(
        UsageError, match=r"at most the number of images to train on, 41\. Received: 42"
    ):
        image_options.batch_size({"batch_size": 42}, np.zeros(41))


def write_rectangles(folder, count):
    """Pictures of a cat whose middle is what counts, of several sizes."""
    cat = skimage.data.chelsea()
    for index in range(count):
        side = 60 + index
        keras.utils.save_img(folder / f"{index:02}.png", cat[:side, index : index + 2 * side])


@pytest.mark.parametrize("resolution", ["16,48"])
def test_rectangles_and_mixed_sizes(tmp_path, resolution):
    write_rectangles(tmp_path, 30)
    train.main(
        [
            f"--data=folder:{tmp_path}",
            f"--resolution={resolution}",
            "--resize=crop",
            "--shift=none",
            "--calibration_share=0.7",
            f"--output_dir={tmp_path}/run",
            "--backbone=vit_tiny",
            "--set=backbone.patch_size=8",
            "--set=backbone.hidden_dim=16",
            "--set=backbone.depth=1",
            "--set=backbone.num_heads=2",
            "--set=views.local_views=0",
            "--set=head.num_prototypes=16",
            "--set=head.hidden_dim=16",
            "--set=head.bottleneck_dim=8",
            "--batch_size=4",
            "--image_size=32",
            "--epochs=1",
            "--steps_per_epoch=1",
        ]
    )
    extractor = keras.saving.load_model(tmp_path / "run" / "detector.keras").extractor
    assert extractor.resolution == (16, 48)
    assert extractor.image_size == (16, 56)  # about 32 x 32 pixels, in patches of 8
    assert extractor.resize == "crop"
    image = np.zeros((1, 40, 200, 3), np.uint8)
    image[:, :, 40:160] = 200  # all that a crop of that aspect sees
    assert np.all(np.asarray(extractor.at_resolution(image)) > 199)


def test_broken_files_are_left_out_on_request(tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    write_rectangles(photos, 30)
    whole = (photos / "29.png").read_bytes()
    (photos / "29.png").write_bytes(whole[: len(whole) // 2])
    command = [
        f"--data=folder:{photos}",
        "--image_size=16",
        "--calibration_share=0.7",
        "--set=backbone.stages=[8,8,8]",
        "--set=views.local_views=0",
        "--set=head.num_prototypes=16",
        "--set=head.hidden_dim=16",
        "--epochs=1",
        f"--output_dir={tmp_path}/run",
    ]
    with pytest.raises(UsageError, match=r"--on_error=skip\). Received: 1 of 30 [\s\S]*29\.png"):
        train.main(command)
    train.main([*command, "--on_error=skip"])
    assert "29.png: corrupt or cut short" in caplog.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["on_error"] == "skip"
    counts = [config["derived"][f"{name}_images"] for name in ("training", "calibration")]
    assert sum(counts) == 29

    evaluate.main(
        [
            f"--model={tmp_path}/run/detector.keras",
            f"--test=folder:{photos}",
            f"--ood=broken=folder:{photos}",
            "--on_error=skip",
            "--resamples=10",
            f"--output_dir={tmp_path}/evaluation",
        ]
    )
    sets = json.loads((tmp_path / "evaluation" / "results.json").read_text())["sets"]
    assert [found["images"] for found in sets.values()] == [29, 29]


def test_a_run_of_an_earlier_version_goes_on(trained, train_on, tmp_path):
    """Its configuration lacks the keys that were added since, which have their defaults."""
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["data"]["on_error"]
    (run / "config.json").write_text(json.dumps(config))
    train_on(run)
    assert json.loads((run / "config.json").read_text())["data"]["on_error"] == "raise"


def test_another_programs_configuration_is_left_alone(train_on, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UsageError, match=r"--output_dir must be .*another program's config\.json"):
        train_on(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"architectures": ["BertModel"]}


def test_numbers_are_told_before_the_first_epoch_ends(capsys):
    now = iter(np.arange(0.0, 4000.0, 10.0))
    progress = Progress(100, steps_done=2, clock=lambda: next(now))
    for batch in range(9):
        progress.on_train_batch_end(batch, {"loss": 1.5})
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Step 4 of 100: 10 s a step, 16.0 min left of 16.7 min, loss 1.500"
    assert [line.split()[1] for line in told] == ["4", "7", "10"]  # every 30 s


def test_a_long_first_step_is_told(capsys):
    now = iter([0.0, 95.0, 96.0, 102.0])
    progress = Progress(100, clock=lambda: next(now))
    progress.on_train_begin()
    for batch in range(3):
        progress.on_train_batch_end(batch, {"loss": 1.5})
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("Step 1 of 100 took 1.6 min, compilation included")
    assert told[1].startswith("Step 3 of 100: 3.5 s a step")


def test_beside_a_progress_bar_only_the_first_line_is_told(capsys):
    now = iter(np.arange(0.0, 4000.0, 10.0))
    progress = Progress(100, advice=lambda s: [f"{s:g} s"], once=True, clock=lambda: next(now))
    for batch in range(9):
        progress.on_train_batch_end(batch, {"loss": 1.5})
    told = capsys.readouterr().err.split("\n")
    assert [line.partition(":")[0] for line in told] == ["", "Step 2 of 100", "10 s", ""]


def advised(
    seconds, steps, backbone, negatives="auxiliary", local_views=2, precision="mixed_bfloat16"
):
    config = {"backbone": {"type": backbone}, "precision": precision}
    views = sddns_tf.MultiCrop(32, local_views)
    negatives = negatives and sddns_tf.Negatives("rot90", negatives)
    model = types.SimpleNamespace(views=views, negatives=negatives)
    return advice.lines(model, config, Length(10, steps // 10, 64), seconds)


def test_what_takes_most_of_a_step_is_told():
    # In passes of a global view: student 3 x (2 + 2/4), teacher 2, negatives 3 x (1 + 2/4).
    (line,) = advised(1.0, 100, "vit_tiny")
    assert (
        line == "Of a step, about 32% for negatives.source=auxiliary, 11% for views.local_views=2"
    )
    (line,) = advised(1.0, 100, "vit_tiny", "both")
    assert "49% for negatives.source=both" in line
    assert advised(1.0, 100, "vit_tiny", None, 0) == []


def test_a_run_of_hours_is_told_what_would_be_shorter():
    line = advised(2.0, 18_000, "vit_tiny")[-1]
    assert "more than an hour" in line
    assert "--backbone=convnet" in line
    assert "--set=views.local_views=0; --epochs=1" in line  # 1,800 steps of 18,000
    assert "--backbone" not in advised(2.0, 18_000, "convnet", local_views=0)[-1]
    assert "--epochs=1 --steps_per_epoch=1800" in advised(2.0, 180_000, "vit_tiny")[-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [("avx2 avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx2 avx512f", False)],
)
def test_bfloat16_is_advised_where_the_processor_multiplies_in_it(monkeypatch, flags, told):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: f"flags\t\t: fpu {flags}\n")
    line = advised(2.0, 18_000, "convnet", precision="float32")[-1]
    assert ("--precision=mixed_bfloat16" in line) == told
    assert "--precision" not in advised(2.0, 18_000, "convnet")[-1]


@pytest.mark.parametrize(("images", "epochs"), [(320, 100), (3_200, 40), (50_000, 3), (10**7, 1)])
def test_few_images_are_seen_more_often_than_many(images, epochs):
    config = {"epochs": None, "steps_per_epoch": None, "batch_size": 64}
    steps = tf.data.Dataset.range(images // 64)
    assert training.length_of(config, steps).epochs == epochs
    assert training.length_of({**config, "epochs": 7}, steps).epochs == 7


WRONG = [
    (["--data=cifar10"], "--data must be tfds:NAME.*Received: cifar10"),
    (["--data="], "--data is needed"),
    (["--output_dir="], "--output_dir is needed"),
    (["--shift=rot45"], "--shift.*rot45"),
    (["--epochs=0"], "--epochs must be a positive int. Received: 0"),
    (["--set=views.local_area=[0.1,2]"], "local_area.*2"),
    (["--backbone=resnet"], "backbone.type must be one of .*Received: 'resnet'"),
    (["--source=both"], "negatives.source=both needs --auxiliary"),
    (["--recipe=mine"], "--recipe must be one of .*Received: mine"),
    (["--resolution=1,2,3"], "--resolution must be SIDE or HEIGHT,WIDTH. Received: 1,2,3"),
    (["left"], "left"),
    (["--noin_memory"], "--noin_memory needs --calibration"),
    (["--data=npz:x.npz"], "--data: .*x.npz"),
    (["--batch_size=400", "--steps_per_epoch="], "steps_per_epoch"),
    (["--set=negatives.shift=rot45"], "rot45"),
    (["--set=optimizer.learning_rate=fast"], "learning_rate must be a number"),
    (["--set=optimizer.type=Adan"], "optimizer.type must be the name of a Keras optimizer"),
    (["--set=data.auxiliary=5"], "data.auxiliary must be a string. Received: 5"),
    (["--set=data.limit=few"], "limit.*few"),
    (["--set=views.local_size=half"], "local_size.*half"),
    (["--limit=20", "--false_positive_rate=0.01"], "at least 198 images: 99 to calibrate with"),
    (["--limit=37"], "at least 38 images: 19 to calibrate with.*Received: 37 images"),
    (["--layers=stage_1,stage_9"], "no layer of that name.*'stage_3'.*Received: layers='stage_9'"),
    (["--aligned"], "pass `layers` as well. Received: aligned=True without layers"),
    (["--limit=20", "--calibration_share=0.95"], "calibration_share"),
    (["--set=seed=Infinity"], "seed must be a number.*Infinity"),
    (
        ["--image_size=30", "--shift=perm4", "--source=in_distribution"],
        "'perm4' takes images with sides divisible by 2.*Received: views of 15 pixels",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said(image_sets, tmp_path, arguments, message):
    needed = [f"--data=npz:{image_sets}/grass.npz", f"--output_dir={tmp_path}/run"]
    with pytest.raises(UsageError, match=message):
        train.main([*needed, *arguments])
    assert not list(tmp_path.glob("run/*.keras"))


def test_a_bug_keeps_its_traceback(train_on, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(sddns_tf.SelfDistillation, "train_step", broken)
    tf.keras.backend.clear_session()
    with pytest.raises(ValueError, match="a bug"):
        train_on(tmp_path)


def test_the_reader_cuts_as_the_detector_does(image_sets, tmp_path):
    """What the training sees is what the detector makes of the files."""
    write_rectangles(tmp_path, 3)
    seen = sddns_tf.data.load_arrays(f"folder:{tmp_path}", image_size=(16, 20), resize="crop")
    for path, image in zip(sorted(tmp_path.glob("*.png")), seen, strict=True):
        whole = keras.utils.img_to_array(keras.utils.load_img(path))[None]
        expected = image_ops.fit(whole, 16, 20, "crop")[0]
        assert np.abs(np.clip(expected, 0, 255) - image).max() <= 0.51


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=folder:nowhere"], "--data: .*nowhere"),
        (["--data=folder:bad"], "--data: .*text.png"),
        (["--data=npz:missing.npz"], "--data: .*missing.npz"),
        (["--data=folder:good", "--batch_size=64"], r"--batch_size must be .*, 1\. Received: 64"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path, monkeypatch, arguments, message, capsys):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    keras.utils.save_img(tmp_path / "good" / "a.png", skimage.data.astronaut()[:32, :32])
    (tmp_path / "bad" / "text.png").write_bytes(b"these are words")
    monkeypatch.chdir(tmp_path)
    more = ["--resolution=16", "--calibration=folder:good", "--output_dir=out"]
    assert cli.main(["train", *arguments, *more]) == 1
    told = capsys.readouterr().err
    assert re.match(f"sddns train: {message}", told, re.DOTALL)
