"""MVTec AD's layout through the commands: train on it, calibrate, measure maps against masks."""

import csv
import json

import keras
import numpy as np
import pytest
from PIL import Image
from test_local import bricks, convnet, damaged

from sddns_tf import data, metrics, plots
from sddns_tf.cli import evaluate, score, train
from sddns_tf.cli.errors import UsageError
from sddns_tf.data import mvtec
from sddns_tf.detector import Detector
from sddns_tf.evaluation import ALL_MASKS, FRESH

SIZE = 64


def write_images(folder, images, ending=""):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03}{ending}.png")


@pytest.fixture(scope="module")
def wall(tmp_path_factory):
    """A folder in the layout of MVTec AD: good bricks, with a red patch, with a small dark one."""
    root = tmp_path_factory.mktemp("mvtec") / "wall"
    write_images(root / "train" / "good", bricks(60, 0))
    write_images(root / "test" / "good", bricks(12, 2))
    write_images(root / "test" / "patch", damaged(6, 3))
    dark, masks = bricks(5, 4), np.zeros((5, SIZE, SIZE), "uint8")
    dark[:, 40:48, 8:24] = 0
    masks[:, 40:48, 8:24] = 255
    write_images(root / "test" / "dark", dark)
    write_images(root / "ground_truth" / "dark", masks, "_mask")
    masks = np.zeros((6, SIZE, SIZE), "uint8")
    masks[:, 20:36, 36:52] = 255
    write_images(root / "ground_truth" / "patch", masks, "_mask")
    return root


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """File of a local detector of bricks."""
    path = tmp_path_factory.mktemp("local") / "bricks.keras"
    Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), layers="auto", bank_size=300, verbose=0
    ).save(path)
    return path


def results_of(output_dir, *arguments):
    evaluate.main([f"--output_dir={output_dir}", "--resamples=20", *map(str, arguments)])
    return json.loads((output_dir / "results.json").read_text())


def test_a_folder_in_mvtecs_layout_is_measured_as_it_comes(wall, local, tmp_path, capsys):
    results = results_of(tmp_path, f"--model={local}", f"--test=mvtec:{wall}")
    printed = capsys.readouterr().out
    assert list(results["sets"]) == ["dark", "patch", FRESH]
    assert [results["sets"][name]["images"] for name in ("dark", "patch", FRESH)] == [5, 6, 12]
    # Against the metrics by themselves, on what the layout's own reader gives.
    detector, parts = keras.saving.load_model(local), mvtec.load(wall, SIZE)
    for name, kinds in (("patch", ["patch"]), (ALL_MASKS, ["dark", "patch"])):
        shown = np.concatenate([parts.test[kind] for kind in (*kinds, "good")])
        masks = np.concatenate([parts.masks[kind] for kind in (*kinds, "good")])
        maps = metrics.at_size(detector.predict(shown, verbose=0)["anomaly_map"], (SIZE, SIZE))
        expected = {
            "pixel_auroc": metrics.pixel_auroc(maps, masks),
            "aupro": metrics.aupro(maps, masks),
            "region_recall": metrics.region_recall(maps, masks, detector.threshold),
        }
        assert results["pixels"][name] == pytest.approx(expected, abs=1e-6)
        cells = " | ".join(f"{value:.3f}" for value in expected.values())
        assert f"| {name} | {cells} |" in printed
        rows = {row["set"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
        assert float(rows[name]["aupro"]) == pytest.approx(expected["aupro"], abs=1e-6)
    assert rows[FRESH]["aupro"] == "" and rows[ALL_MASKS]["auroc"] == ""
    assert printed.strip() == (tmp_path / "table.md").read_text().strip()
    page = (tmp_path / "report.html").read_text()
    for title in ("Least anomalous", "Most anomalous", "Borderline", "Missed", "False alarms"):
        assert f"<h2>{title}</h2>" in page
    for text in (
        "patch/003.png",
        "good/001.png",
        "region_recall",
        "all images have the same scale",
    ):
        assert text in page
    assert " #" not in page.partition("<h2>Least")[2].partition("<h2>Configuration")[0]


def test_masks_of_named_folders(wall, local, tmp_path, capsys):
    """Sets and masks that lie where a user has them; a set without masks has no row of pixels."""
    arguments = (
        f"--model={local}",
        f"--test=folder:{wall}/test/good",
        f"--ood=patch=folder:{wall}/test/patch,other=folder:{wall}/test/dark",
    )
    results = results_of(tmp_path, *arguments, f"--masks={wall}/ground_truth", "--limit=4")
    assert list(results["pixels"]) == ["patch"]
    assert results["sets"]["patch"]["images"] == 4
    assert "No masks for other." in (told := capsys.readouterr().err)
    assert told.splitlines()[0].endswith("ground_truth: dark")
    without = results_of(tmp_path, *arguments)
    assert "pixels" not in without and "aupro" not in (tmp_path / "table.csv").read_text()


def test_what_is_wrong_with_masks_is_told(wall, local, tmp_path):
    def fails(match, *arguments, model=local):
        with pytest.raises(UsageError, match=match):
            results_of(tmp_path, f"--model={model}", *arguments)

    good, masks = f"--test=folder:{wall}/test/good", f"--masks={wall}/ground_truth"
    patch = f"folder:{wall}/test/patch"
    fails("--ood is needed", good)
    fails("--masks must hold a folder named like an OOD set: a", good, f"--ood=a={patch}", masks)
    fails("must have names of their own", f"--test=mvtec:{wall}", f"--ood=patch={patch}")
    fails("must hold test/good and folders of damaged parts", f"--test=mvtec:{wall}/train")
    fails(
        "--calibration takes no mvtec:PATH", f"--test=mvtec:{wall}", f"--calibration=mvtec:{wall}"
    )
    np.savez(tmp_path / "patch.npz", images=damaged(3, 0))
    fails("images of an OOD set must be files", good, f"--ood=npz:{tmp_path}/patch.npz", masks)
    fails("The mask of .*005.png is missing", good, f"--ood=dark={patch},patch={good[7:]}", masks)
    whole = tmp_path / "whole.keras"
    Detector.from_images(convnet(), bricks(20, 0), bricks(19, 1), verbose=0).save(whole)
    fails("only a local detector gives them", good, f"--ood={patch}", masks, model=whole)


@pytest.mark.slow
def test_train_calibrate_and_evaluate_from_mvtecs_layout(wall, tmp_path):
    train.main(
        [
            f"--data=mvtec:{wall}", f"--output_dir={tmp_path}", f"--image_size={SIZE}",
            "--shift=none", "--calibration_share=0.4",
            "--set=detector.layers=auto", "--set=detector.bank_size=100",
            "--set=backbone.stages=[8,8,8,16]", "--set=views.local_views=0",
            "--set=head.num_prototypes=16", "--set=head.hidden_dim=16",
            "--set=head.bottleneck_dim=8", "--batch_size=8", "--epochs=1", "--steps_per_epoch=2",
        ]
    )  # fmt: skip
    detector = keras.saving.load_model(tmp_path / "detector.keras")
    assert detector.is_local and detector.calibration_scores.shape[0] == 24
    results = results_of(
        tmp_path / "evaluation", f"--model={tmp_path}/detector.keras", f"--test=mvtec:{wall}"
    )
    assert set(results["pixels"]) == {"dark", "patch", ALL_MASKS}
    assert results["configuration"]["training: data.source"] == f"mvtec:{wall}"


def test_masks_are_cut_as_images_are(tmp_path):
    """Of a wide image `crop` takes the middle square, of its mask as well."""
    mask = np.zeros((32, 64), "uint8")
    mask[8:16, 20:28] = 255
    write_images(tmp_path / "images", [np.zeros((32, 64, 3), "uint8")])
    write_images(tmp_path / "masks", [mask])
    paths = data.image_files(tmp_path / "images")
    (cut,) = mvtec.masks_of(paths, tmp_path / "masks", (32, 32), "crop")
    np.testing.assert_array_equal(cut, mask[:, 16:48] > 0)
    (squashed,) = mvtec.masks_of(paths, tmp_path / "masks", (32, 32))
    np.testing.assert_array_equal(squashed, mask[:, ::2] > 0)


def test_scores_come_with_overlays(local, wall, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(wall)
    maps = tmp_path / "maps"
    assert score.main([f"--model={local}", "--images=folder:test", f"--maps={maps}"]) == 0
    detector = keras.saving.load_model(local)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 23
    for row in rows:
        image = np.asarray(Image.open(row["path"]))
        answer = detector.predict(image[np.newaxis], verbose=0)
        expected = plots.overlay(
            image, answer["anomaly_map"][0], detector.threshold, detector.lowest_score
        )
        painted = np.asarray(Image.open(maps / f"{row['path']}.png")).astype(int)
        assert np.abs(painted - expected).max() <= 1
        assert (painted != image).any() == (row["is_ood"] == "True")
    assert len(list(maps.rglob("*.*"))) == 23  # nothing unfinished is left


def test_an_overlay_is_inside_of_its_folder_and_shows_what_the_detector_saw(tmp_path, capsys):
    detector = Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), layers="auto", bank_size=300, resolution=SIZE,
        resize="crop", verbose=0,
    )  # fmt: skip
    detector.save(tmp_path / "crop.keras")
    wide = np.concatenate([damaged(1, 3)[0]] * 2, axis=1)
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/in/../wide.png")
    score.main(
        [f"--model={tmp_path}/crop.keras", f"--images=list:{tmp_path}/list.txt",
         f"--maps={tmp_path}/maps"]
    )  # fmt: skip
    (painted,) = (tmp_path / "maps").rglob("*.png")
    answer = detector.predict(wide[np.newaxis], verbose=0)
    expected = plots.overlay(
        wide[:, 32:96], answer["anomaly_map"][0], detector.threshold, detector.lowest_score
    )
    assert np.abs(np.asarray(Image.open(painted)).astype(int) - expected).max() <= 1


def test_an_image_with_a_name_too_long_for_its_overlay_is_scored_like_others(
    local, tmp_path, capsys
):
    (tmp_path / "in").mkdir()
    names = ["a" * 240 + ".png", "a" * 251 + ".png", "b.png"]
    for name in names:
        Image.fromarray(damaged(1, 3)[0]).save(tmp_path / "in" / name)
    command = [f"--model={local}", f"--images=folder:{tmp_path}/in", f"--maps={tmp_path}/maps"]
    assert score.main(command) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 4
    assert {path.name for path in (tmp_path / "maps").rglob("*.png")} == {
        f"{names[0]}.png",
        "b.png.png",
    }
    assert told.err.count("is too long for a file") == 1


def test_a_detector_without_maps_has_no_overlays(wall, tmp_path):
    whole = Detector.from_images(convnet(), bricks(60, 0), bricks(59, 1), verbose=0)
    whole.save(tmp_path / "whole.keras")
    with pytest.raises(UsageError, match=f"--maps must not lie in the folder.*{wall}/maps"):
        score.main([f"--images=folder:{wall}", f"--maps={wall}/maps", "--model=none.keras"])
    with pytest.raises(UsageError, match="--maps needs the model of a local detector"):
        score.main([f"--model={tmp_path}/whole.keras", f"--images=folder:{wall}", "--maps=maps"])


@pytest.mark.slow
def test_cut_paste_trains(wall, tmp_path):
    train.main(
        [
            f"--data=folder:{wall}/train/good", "--calibration_share=0.4", "--shift=cut_paste",
            "--source=in_distribution", "--set=backbone.stages=[8,8]", "--set=views.local_views=0",
            "--set=head.num_prototypes=16", "--set=head.hidden_dim=16", "--batch_size=16",
            "--set=head.bottleneck_dim=8", f"--image_size={SIZE}", "--epochs=1",
            "--steps_per_epoch=1", f"--output_dir={tmp_path}",
        ]
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["negatives"]["shift"] == "cut_paste"
    assert keras.saving.load_model(tmp_path / "detector.keras").bank.shape[0]
