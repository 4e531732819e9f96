"""`sddns evaluate` and `sddns sensitivity`: tables that agree with the detector."""

import csv
import json
import shutil
from unittest import mock

import keras
import numpy as np
import pytest
from tiny import no_pictures

from sddns_tf import metrics
from sddns_tf.cli import evaluate, sensitivity, sources
from sddns_tf.cli.errors import UsageError
from sddns_tf.features import extract_features


@pytest.fixture
def run(trained, image_sets, tmp_path):
    """A function that evaluates a model of the finished training, and gives the results."""

    def run(model, *arguments):
        evaluate.main(
            [
                f"--model={trained}/{model}.keras",
                f"--test=npz:{image_sets}/fresh.npz",
                f"--ood=npz:{image_sets}/brick.npz,a|b=npz:{image_sets}/coffee.npz",
                f"--output_dir={tmp_path}",
                "--resamples=50",
                "--gallery_size=4",
                *arguments,
            ]
        )
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_it_agrees_with_the_detector(run, trained, image_sets, tmp_path, capsys):
    results = run("detector", f"--data=npz:{image_sets}/grass.npz")
    printed = capsys.readouterr().out
    detector = keras.saving.load_model(trained / "detector.keras")
    images = {name: np.load(image_sets / f"{name}.npz")["images"] for name in ("fresh", "brick")}
    scores = {name: detector.predict(x, verbose=0)["ood_score"] for name, x in images.items()}
    greater = scores["brick"][:, None] > scores["fresh"][None]
    brick = results["sets"]["brick"]
    assert brick["auroc"]["value"] == pytest.approx(greater.mean())
    assert brick["auroc"]["low"] <= brick["auroc"]["value"] <= brick["auroc"]["high"]
    assert brick["flagged"]["value"] == np.mean(scores["brick"] > detector.threshold)
    assert results["sets"]["fresh normal images"]["images"] == 40
    known, fresh = (np.load(image_sets / f"{name}.npz") for name in ("grass", "fresh"))
    features = [
        extract_features(detector.extractor, x["images"], verbose=0) for x in (known, fresh)
    ]
    accuracy = metrics.knn_accuracy(
        features[0], known["labels"], features[1], fresh["labels"], k=20
    )
    assert results["knn_accuracy"]["value"] == pytest.approx(accuracy)
    assert f"| brick | 30 | {brick['auroc']['value']:.3f} (" in printed
    assert r"| a\|b | 60 |" in printed
    assert printed.strip() == (tmp_path / "table.md").read_text().strip()
    rows = {row["set"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert float(rows["brick"]["fpr95_high"]) == brick["fpr95"]["high"]
    assert rows["fresh normal images"]["auroc"] == ""
    page = (tmp_path / "report.html").read_text()
    assert "a|b" in page
    assert "training: backbone.stages" in page


def test_normal_images_of_the_bank_are_noticed(run, image_sets):
    with pytest.warns(UserWarning, match=r"of the first 120 normal images to test on are in"):
        run("detector", f"--test=npz:{image_sets}/grass.npz")


def test_a_set_is_called_like_its_folder(tmp_path):
    (tmp_path / "scratched_0.5mm").mkdir()
    given = f"folder:{tmp_path}/scratched_0.5mm/"
    assert sources.parse("ood", given, "test").name == "scratched_0.5mm"
    assert sources.parse("ood", f"npz:{tmp_path}/dark.v2.npz", "test").name == "dark.v2"


@pytest.mark.parametrize("model", ["model", "backbone"])
def test_it_makes_a_detector(run, image_sets, model):
    arguments = (
        f"--data=npz:{image_sets}/grass.npz",
        f"--calibration=npz:{image_sets}/coffee.npz",
        "--set=detector.k=3",
    )
    results = run(model, *arguments, "--false_positive_rate=0.1")
    assert results["false_positive_rate"] == 0.1
    assert results["configuration"]["bank"] == 120
    assert results["configuration"]["neighbors"] == 3
    # A model without teacher temperature was trained on standardized features.
    assert results["configuration"]["standardized"] is (model == "model")
    with pytest.raises(UsageError, match="--data is needed"):
        run(model)


def test_a_backbone_says_how_its_features_are_compared(run, image_sets, capsys):
    """It does not tell how it was trained."""
    arguments = f"--data=npz:{image_sets}/grass.npz", f"--calibration=npz:{image_sets}/coffee.npz"
    run("backbone", *arguments)
    assert "needs --set=detector.standardize=true" in capsys.readouterr().err
    results = run("backbone", *arguments, "--set=detector.standardize=true")
    assert results["configuration"]["standardized"]
    assert "standardize" not in capsys.readouterr().err


def test_a_detector_of_oblong_images_is_that_of_training(run, image_sets, tmp_path):
    """Its input has the aspect ratio of the images."""
    path = tmp_path / "oblong.npz"
    np.savez(path, images=np.load(image_sets / "grass.npz")["images"][:, ::2])
    results = run("model", f"--data=npz:{path}", f"--calibration=npz:{image_sets}/coffee.npz")
    assert results["configuration"]["resolution"] == [16, 32]
    assert results["configuration"]["image_size"] == [23, 45]  # the area of a view of 32 x 32


def test_a_detector_of_a_folder_reads_it_as_training_does(run, tmp_path):
    """Photographs are brought to the network's size, or to that of --resolution."""
    (tmp_path / "photos").mkdir()
    for index in range(24):
        image = np.full((60 + index, 90, 3), 8 * index, np.uint8)
        keras.utils.save_img(tmp_path / "photos" / f"{index:02}.png", image, scale=False)
    arguments = [f"--{option}=folder:{tmp_path}/photos" for option in ("data", "calibration")]
    with pytest.warns(UserWarning, match="calibration images are in the bank"):
        results = run("model", *arguments)
        assert results["configuration"]["resolution"] == [32, 32]
        results = run("model", *arguments, "--resolution=16,24", "--resize=crop")
        assert results["configuration"]["resolution"] == [16, 24]
        assert results["configuration"]["resize"] == "crop"


def test_it_recalibrates(run, image_sets):
    results = run("detector", "--false_positive_rate=0.25")
    assert results["false_positive_rate"] == 0.25
    results = run("detector", f"--calibration=npz:{image_sets}/coffee.npz")
    assert results["configuration"]["calibration images"] == 60
    with pytest.raises(UsageError, match="--false_positive_rate"):
        run("detector", "--false_positive_rate=0.001")


def sensitivity_arguments(image_sets, tmp_path, *more):
    return [
        f"--data=npz:{image_sets}/grass.npz",
        "--calibration_share=0.2",
        f"--output_dir={tmp_path}",
        "--set=backbone.stages=[8]",
        "--set=views.local_views=0",
        "--set=head.num_prototypes=16",
        "--set=head.hidden_dim=16",
        "--set=head.bottleneck_dim=8",
        "--batch_size=16",
        "--epochs=1",
        "--steps_per_epoch=1",
        *more,
    ]


def rewrite(path, **probes):
    """Put other values into the sensitivities of a run."""
    known = json.loads(path.read_text())
    known["sensitivity"].update(probes)
    path.write_text(json.dumps(known))


@pytest.mark.slow
def test_sensitivity_chooses_only_what_leads_by_more_than_chance(image_sets, tmp_path, capsys):
    arguments = sensitivity_arguments(
        image_sets, tmp_path, "--strategies=rot90:in_distribution,none", "--runs=2"
    )
    with no_pictures():
        sensitivity.main(arguments)
    assert capsys.readouterr().err.count("Training") == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["sensitivity"]) == {"rot90:in_distribution", "none"}
    assert results["probes"] == ["perm4", "perm16", "pixel_perm", "cut_paste"]  # no rotations
    assert (tmp_path / "sensitivity.png").stat().st_size > 1000

    probes = dict.fromkeys(results["probes"], 0.6)
    for seed in (0, 1):
        rewrite(tmp_path / "none" / str(seed) / "sensitivity.json", **probes)
        path = tmp_path / "rot90-in_distribution" / str(seed) / "sensitivity.json"
        rewrite(path, **dict.fromkeys(probes, 0.7 + 0.001 * seed))
    sensitivity.main(arguments)  # read, not trained again
    printed = capsys.readouterr()
    assert "Training" not in printed.err
    assert "Chosen: rot90:in_distribution" in printed.out
    assert "| none | 2 | 0.600 | 0.600 |" in printed.out
    with no_pictures():
        sensitivity.main([*arguments, "--set=detector.k=3"])  # measured again, not trained again
    printed = capsys.readouterr()
    assert "Already done" not in printed.err
    assert "| none | 2 | 0.600 | 0.600 |" not in printed.out
    assert json.loads(path.read_text())["asked"]["detector"]["k"] == 3
    for seed in (0, 1):
        rewrite(tmp_path / "none" / str(seed) / "sensitivity.json", **probes)
        path = tmp_path / "rot90-in_distribution" / str(seed) / "sensitivity.json"
        rewrite(path, **dict.fromkeys(probes, 0.7 + 0.001 * seed))
    arguments.append("--set=detector.k=3")

    rewrite(path, **dict.fromkeys(probes, 0.8))  # one seed now leads by 0.1, the other by 0.2
    sensitivity.main(arguments)
    printed = capsys.readouterr()
    assert "Chosen" not in printed.out
    assert "by no more than chance" in printed.err
    assert json.loads((tmp_path / "results.json").read_text())["chosen"] is None


@pytest.mark.slow
def test_sensitivity_of_images_that_no_grid_of_patches_divides(image_sets, tmp_path, capsys):
    arguments = sensitivity_arguments(
        image_sets, tmp_path, "--strategies=rot90:in_distribution,none", "--runs=1"
    )
    with no_pictures():
        sensitivity.main([*arguments, "--resolution=26,30"])
    assert "| none | 1 |" in capsys.readouterr().out


def test_sensitivity_takes_its_shifts_from_the_strategies_only():
    with pytest.raises(UsageError, match="--shift"):
        sensitivity.main(["--strategies=none,rot90:auxiliary", "--shift=perm4", "--output_dir=o"])


@pytest.mark.parametrize("beside", ['{"epochs": 3, "seed": 9}', "[1, 2]", '{"a": ', None])
def test_settings_of_training_are_those_of_the_model(run, trained, tmp_path, beside, capsys):
    """Not what happens to lie beside it."""
    moved = shutil.copytree(trained, tmp_path / "moved")
    if beside:
        (moved / "config.json").write_text(beside)
    else:  # another detector than that of the run
        detector = keras.saving.load_model(moved / "detector.keras")
        detector.recalibrate(false_positive_rate=0.3)
        detector.save(moved / "detector.keras")
    results = run("detector", f"--model={moved}/detector.keras")
    assert not [name for name in results["configuration"] if name.startswith("training")]
    assert "config.json names no run of this model" in capsys.readouterr().err
    assert run("detector")["configuration"]["training: epochs"]


def test_a_folder_that_cannot_be_written_to_is_told_before_scoring(run, tmp_path):
    (tmp_path / "file").touch()
    with (
        mock.patch.object(evaluate, "load_detector", side_effect=AssertionError),
        pytest.raises(UsageError, match=r"--output_dir.*file"),
    ):
        run("detector", f"--output_dir={tmp_path}/file/results")


@pytest.mark.parametrize("option", ["--set=detector.k=10", "--resize=crop", "--resolution=8"])
def test_options_that_make_a_detector_are_refused_for_one(run, option):
    with pytest.raises(UsageError, match=r"takes a --model that is not a detector.*Received: --"):
        run("detector", option)


@pytest.mark.slow
def test_sensitivity_of_one_run_chooses_nothing_and_its_ranks_are_tested(
    image_sets, tmp_path, capsys
):
    strategies = "--strategies=none,rot90:in_distribution,cut_paste:in_distribution"
    with no_pictures():
        sensitivity.main(
            sensitivity_arguments(
                image_sets,
                tmp_path,
                strategies,
                "--runs=1",
                "--set=model.negative_weight=1",  # By default they do not count in a first step.
                f"--test=npz:{image_sets}/fresh.npz",
                f"--ood=npz:{image_sets}/brick.npz",
            )
        )
    printed = capsys.readouterr()
    assert "with one run each" in printed.err
    assert "No evidence that these" in printed.err  # three strategies have six orders
    assert "| mean AUROC | brick |" in printed.out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["probes"] == ["perm4", "perm16", "pixel_perm"]
    assert results["chosen"] is None
    assert results["ranking"]["p_value"] >= 1 / 6 - 1e-9
    with pytest.raises(UsageError, match="none trains on"):
        sensitivity.main([strategies + ",perm4:in_distribution", "--output_dir=o"])
    with pytest.raises(UsageError, match="two or more"):
        sensitivity.main(["--strategies=none", "--output_dir=o"])
