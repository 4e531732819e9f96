"""The experiments of `tools/research` on toy sets: each is run, and its arithmetic looked at."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
from scipy import stats
from toy_sets import tiles, write_tfds

import sddns_tf
from tools.research import (
    ablate_score,
    accuracy_per_minute,
    baselines_cifar10,
    cifar10,
    compare_exports,
    make_figures,
    make_results,
    nearest_neighbors,
    reproduce_cifar10,
    second_voice,
    shrink_detector,
)

SIDE = cifar10.SIDE
RESULTS = pathlib.Path(sddns_tf.__file__).parents[1] / "docs" / "results" / "seven_minutes"
SETS = ("--in_distribution=lawn", "--ood=wall,cup", "--auxiliary=scenes")
TINY = (*SETS, "--steps=4", "--width=8", "--batch_size=8", "--bank_images=90", "--ood_images=12")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Toy sets under names of their own: grass is normal."""
    pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    grass, scenes = tiles("grass", 180, SIDE), tiles("astronaut", 60, SIDE)
    write_tfds(root, "lawn", SIDE, train=grass[:100], test=grass[100:])
    write_tfds(root, "wall", SIDE, test=tiles("brick", 12, SIDE))
    write_tfds(root, "cup", 48, test=tiles("coffee", 12, 48))
    write_tfds(root, "scenes", SIDE, train=scenes[:40], validation=scenes[40:])
    return f"--data_dir={root}"


@pytest.fixture(scope="module")
def detector_file(data_dir, tmp_path_factory):
    """A detector of grass that errs at times, with a bank that is not compressed."""
    keras.utils.set_random_seed(0)
    grass = tiles("grass", 180, SIDE)
    path = tmp_path_factory.mktemp("detector") / "grass.keras"
    network = sddns_tf.ConvNet((8, 16), convolutions=2)
    sddns_tf.Detector.from_images(
        network, grass[:100], grass[100::2], image_size=SIDE, verbose=0
    ).save(path)
    return path


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Folder of the records of one strategy and of the baselines with a network, on test sets."""
    folder = tmp_path_factory.mktemp("results")
    exclude = folder / "exclude.txt"
    exclude.write_text("# shown by CIFAR-10 too\nodd (all of it)\n")
    common = (
        data_dir, f"--auxiliary_exclude={exclude}", f"--output_dir={folder}", "--sets=test", *TINY
    )  # fmt: skip
    reproduce_cifar10.main([*common, "--num_prototypes=16"])
    for baseline in ("untrained", "rotation"):
        baselines_cifar10.main([*common, f"--baseline={baseline}"])
    baselines_cifar10.main([*common, "--baseline=untrained", "--standardize"])
    return folder


def record(runs, name):
    return json.loads((runs / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_strategy_is_trained_measured_and_kept(runs):
    found = record(runs, "auxiliary-rot90-0")
    assert (found["steps"], found["images"]) == (4, 32)
    assert set(found["ood"]) == {"wall", "cup", "scenes"}
    assert 0 <= found["knn"] <= 1
    assert len(found["history"]["negative_loss"]) == cifar10.EPOCHS
    assert (runs / "auxiliary-rot90-0.csv").exists()
    assert "rot90" not in found["sensitivity"]  # it is trained on
    assert "perm4" in found["sensitivity"]
    assert found["flags"]["strategy"] == "auxiliary:rot90"
    assert not {"data_dir", "output_dir", "auxiliary_exclude"} & set(found["flags"])
    detector = keras.models.load_model(runs / "auxiliary-rot90-0.keras")
    assert detector.bank.shape[0] == 90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "steps"), [("untrained", 0), ("untrained-standardized", 0), ("rotation", 4)]
)
def test_a_baseline_is_measured_as_the_method_is(runs, baseline, steps):
    found = record(runs, f"{baseline}-0")
    assert set(found["ood"]) == set(record(runs, "auxiliary-rot90-0")["ood"])
    assert found["steps"] == steps
    assert set(found["sensitivity"]) == {*sddns_tf.sensitivity.PROBES, "mean"}


@pytest.mark.slow
def test_a_baseline_of_standardized_features_has_a_row_of_its_own(runs, capsys):
    make_results.main([f"--results={runs}"])
    printed = capsys.readouterr().out
    assert "\n| untrained | 1 |" in printed
    assert "\n| untrained, standardized | 1 |" in printed


def test_runs_on_development_sets_have_a_table(capsys):
    folder = pathlib.Path(RESULTS).parent / "small" / "development"
    make_results.main([f"--results={folder}"])
    heading = capsys.readouterr().out.splitlines()[0]
    assert "| noise | blurred | gray | mean AUROC | mean FPR95 | *imagenet_aux* |" in heading


def test_two_runs_of_one_seed_are_refused(tmp_path):
    for name in ("none-0", "none-lr5"):
        shutil.copy(pathlib.Path(RESULTS) / "none-0.json", tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match=r"one run of each strategy and seed\. Received: .*lr5"):
        make_results.read_runs(tmp_path)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(data_dir, tmp_path, monkeypatch):
    class Stopped(keras.callbacks.Callback):
        """Stands for the monitor, and stops the run in the middle of its second epoch."""

        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.step) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(cifar10, "CHECKPOINT_STEPS", 3)
    # What is measured is looked at above.
    monkeypatch.setattr(cifar10, "evaluate", lambda *_: {"ood": {"wall": {"auroc": 0.5}}})
    tiny = [data_dir, *TINY, "--steps=12", "--num_prototypes=16"]
    broken, whole = (tmp_path / name for name in ("broken", "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sddns_tf.callbacks, "CollapseMonitor", Stopped)
        reproduce_cifar10.main([*tiny, f"--output_dir={broken}"])
    assert not (broken / "auxiliary-rot90-0.json").exists()
    for folder in (broken, whole):
        reproduce_cifar10.main([*tiny, f"--output_dir={folder}"])
    found = record(broken, "auxiliary-rot90-0")
    assert (found["steps"], found["resumed_at"]) == (12, 3)
    assert record(whole, "auxiliary-rot90-0")["resumed_at"] == 0
    loss = [record(folder, "auxiliary-rot90-0")["history"]["loss"] for folder in (broken, whole)]
    assert len(loss[0]) == cifar10.EPOCHS
    np.testing.assert_allclose(*loss, rtol=1e-5)
    (broken / "auxiliary-rot90-0.json").unlink()
    with pytest.raises(ValueError, match=r"same flags.*Received: {'learning_rate': 0.5}, not"):
        reproduce_cifar10.main([*tiny, f"--output_dir={broken}", "--learning_rate=0.5"])


def test_development_sets_share_no_image_with_test_sets(data_dir):
    def images_of(sets):
        settings = reproduce_cifar10.parse([data_dir, *SETS, f"--sets={sets}"])
        normal = cifar10.read_normal(settings)
        return normal, cifar10.read_ood(settings, normal)

    (normal, development), (test_normal, test) = images_of("development"), images_of("test")
    assert set(development) == {"noise", "blurred", "gray", "scenes"}
    assert set(test) == {"wall", "cup", "scenes"}
    for one, other in (
        (development["scenes"], test["scenes"]),
        (normal.fresh, test_normal.fresh),
        (normal.calibration, test_normal.fresh),
    ):
        assert not {image.tobytes() for image in one} & {image.tobytes() for image in other}
    assert len(normal.fresh_labels) == len(normal.fresh)
    assert (development["gray"][..., 0] == development["gray"][..., 2]).all()
    assert development["blurred"].std() < normal.fresh.std()


def test_neighbors_tell_classes(detector_file, data_dir, capsys):
    nearest_neighbors.main(
        [data_dir, *SETS, "--width=8", "--bank_images=50", f"--detector={detector_file}"]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["features"] for row in rows] == ["pixels", "untrained", "detector"]
    assert all(0 <= row["knn"] <= 1 for row in rows)


def test_accuracy_is_looked_at_as_minutes_pass(data_dir, tmp_path, monkeypatch, capsys):
    network = {"small": lambda: sddns_tf.ConvNet((8, 16))}
    monkeypatch.setattr(accuracy_per_minute, "candidates", lambda: network)
    path = tmp_path / "records.json"
    arguments = [data_dir, "--in_distribution=lawn", "--minutes=0.005,0.01", f"--json={path}"]
    accuracy_per_minute.main([*arguments, "--seeds=0"])
    (found,) = json.loads(path.read_text()).values()
    assert found["images_per_second"] > 0
    assert list(found["accuracy"]) == ["0", "0.005", "0.01"]
    assert all(0 <= accuracy <= 1 for accuracy in found["accuracy"].values())
    capsys.readouterr()
    monkeypatch.setattr(accuracy_per_minute, "measure", None)  # it is not done again
    accuracy_per_minute.main([*arguments, "--seeds=0"])
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == "| network | parameters | images/s | 0 min | 0.005 min | 0.01 min |"
    assert row.startswith("| small | ")


def test_a_run_is_recorded_once(data_dir, tmp_path, capsys):
    arguments = [data_dir, f"--output_dir={tmp_path}", *TINY, "--baseline=pixels"]
    baselines_cifar10.main(arguments)
    printed = json.loads(capsys.readouterr().out)
    found = record(tmp_path, "pixels-0")
    assert set(found["ood"]) == {"noise", "blurred", "gray", "scenes"}
    aurocs = [row["auroc"] for row in found["ood"].values()]
    assert printed["mean"] == pytest.approx(np.mean(aurocs), abs=1e-3)
    (tmp_path / "pixels-0.json").write_text("{}")
    baselines_cifar10.main(arguments)
    assert "exists" in capsys.readouterr().err
    assert record(tmp_path, "pixels-0") == {}


def test_the_classes_that_are_excluded_make_no_negatives(data_dir, tmp_path):
    (tmp_path / "exclude.txt").write_text("# shown by CIFAR-10 too\nodd (all of it)\n")
    exclude = f"--auxiliary_exclude={tmp_path / 'exclude.txt'}"
    settings = reproduce_cifar10.parse([data_dir, *SETS, exclude])
    excluded = cifar10.excluded_classes(settings)
    assert excluded == ["odd"]
    assert len(cifar10.read(settings, settings.auxiliary, "train", excluded)) == 20


def test_pixels_are_scored_by_their_distance_to_the_bank():
    grass = tiles("grass", 150, SIDE)
    scorer = baselines_cifar10.PixelScorer(cifar10.Normal(grass[:100], grass[100:], None), 100)
    np.testing.assert_allclose(scorer.predict(grass[:10])["ood_score"], 0.0, atol=1e-4)
    fresh = scorer.predict(grass[100:])
    assert (fresh["ood_score"] > 0.1).all()
    # Three of fifty lie above the 95 % quantile.
    assert fresh["is_ood"].sum() == 3


@pytest.mark.parametrize("network", list(cifar10.NETWORKS))
def test_each_network_gives_one_feature_for_each_image(network):
    settings = reproduce_cifar10.parse([f"--network={network}", "--width=32"])
    features = cifar10.backbone(settings)(np.zeros((2, SIDE, SIDE, 3), np.float32))
    assert len(features.shape) == 2


def test_a_rotation_is_told_by_its_quarter_turns():
    images = tiles("coffee", 4, SIDE)
    turned, turns = baselines_cifar10.rotated(images)
    # Undone, each is an image or its mirror image.
    for image, one, turn in zip(images, turned.numpy(), turns.numpy(), strict=True):
        upright = np.rot90(one, -turn)
        expected = sddns_tf.image_ops.normalize(image[np.newaxis])[0].numpy()
        distances = [np.abs(upright - expected).max(), np.abs(upright[:, ::-1] - expected).max()]
        assert min(distances) < 1e-5


def test_tables_have_a_row_for_each_strategy(capsys, tmp_path):
    figure = tmp_path / "bars.svg"
    make_results.main([f"--results={RESULTS}", f"--figure={figure}"])
    printed = capsys.readouterr().out
    pixels = record(RESULTS, "pixels-0")["ood"]
    tested = ("cifar100", "dtd32", "gtsrb32", "mnist")
    cells = [f"{pixels[name]['auroc']:.3f}" for name in tested]
    mean = np.mean([pixels[name]["auroc"] for name in tested])
    assert f"| pixels | 1 | 0 | {' | '.join(cells)} | {mean:.3f} |" in printed
    assert "| auxiliary:rot90 | 3 | 52,224 to 96,384 |" in printed
    assert printed.count("\n| auxiliary:rot90 |") == 2  # AUROCs and sensitivities
    assert figure.stat().st_size

    # What negatives add, seed by seed, with Student's interval.
    def mean_of(name):
        sets = [record(RESULTS, f"{name}-{seed}")["ood"] for seed in range(3)]
        return [np.mean([one[key]["auroc"] for key in tested]) for one in sets]

    test = stats.ttest_rel(mean_of("auxiliary-rot90"), mean_of("none"))
    low, high = test.confidence_interval(0.95)
    row = "| the test sets | {:+.3f} ± {:.3f} |"
    assert row.format((low + high) / 2, (high - low) / 2) in printed
    make_results.main([f"--results={RESULTS}", "--minus=auxiliary:rot90"])
    printed = capsys.readouterr().out
    assert "Minus auxiliary:rot90, paired by seed" in printed
    assert row.format(-(low + high) / 2, (high - low) / 2) in printed
    with pytest.raises(SystemExit):
        make_results.main([f"--results={RESULTS}", "--minus=rot90"])
    assert "Received: rot90" in capsys.readouterr().err


def test_an_interval_over_seeds_is_that_of_student():
    values = [0.7, 0.75, 0.85]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert make_results.with_interval(values) == f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}"
    assert make_results.with_interval([0.7]) == "0.700"
    assert make_results.with_interval([1.0, 1.0]) == "1.000 ± 0.000"


def test_the_score_is_varied_one_setting_at_a_time(detector_file, data_dir, capsys):
    ablate_score.main(
        [
            f"--detector={detector_file}", data_dir, "--limit=20",
            "--data=tfds:lawn@train", "--test=tfds:lawn@test[40:]",
            "--ood=tfds:wall,tfds:cup", "--bank_sizes=5,5000", "--neighbors=1",
            "--temperatures=0.04",
        ]
    )  # fmt: skip
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "all 100 images", "5 drawn at random", "5 by k-means, weighted", "5 by k-center, weighted",
        "all, 1 nearest", "all, temperature 0.04",
    ]  # fmt: skip
    assert rows[-1][1] == rows[0][1]  # 0.04 is what the first row has too


@pytest.mark.slow
def test_exports_are_compared_with_the_detector(detector_file, data_dir, tmp_path, capsys):
    pytest.importorskip("ai_edge_litert")
    compare_exports.main(
        [
            f"--detector={detector_file}", data_dir, "--limit=20",
            "--calibration=tfds:lawn@test[:40]", "--test=tfds:lawn@test[40:]",
            "--ood=tfds:wall,tfds:cup", "--tflite_bank_size=20", f"--output_dir={tmp_path}",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert [line.split(" | ")[0] for line in table.splitlines()[3:]] == [
        f"| {variant}" for variant in compare_exports.VARIANTS
    ]
    assert (tmp_path / "int8.tflite").stat().st_size < (tmp_path / "float32.tflite").stat().st_size


def test_a_bank_is_compressed_and_calibrated_again(detector_file, data_dir, tmp_path, capsys):
    path = tmp_path / "small.keras"
    shrink_detector.main(
        [f"--detector={detector_file}", data_dir, SETS[0], "--bank_size=10",
         f"--output={path}"]
    )  # fmt: skip
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    small = keras.models.load_model(path)
    assert small.bank.shape[0] == 10
    assert small.calibration_scores.shape[0] == 20
    assert printed["bytes"] == path.stat().st_size
    fresh = sddns_tf.data.load_arrays(
        "tfds:lawn", split="test", data_dir=data_dir.partition("=")[2]
    )[1:40:2]
    flagged = small.predict(fresh, verbose=0)["is_ood"].mean()
    assert printed["fresh_flagged"] == pytest.approx(flagged)


def test_figures_are_drawn(tmp_path):
    name = "growth, prototypes {}, local_views {}"
    records = [
        {"name": name.format(*setting), "ours": 1.0 + index, "theirs": 1.0}
        for index, setting in enumerate([(1024, 0), (4096, 0), (1024, 2)])
    ]
    growth = tmp_path / "growth.json"
    growth.write_text(json.dumps(records))
    make_figures.main([f"--output_dir={tmp_path}", f"--growth={growth}"])
    for file in ("shifts.png", "views.png", "growth.svg"):
        assert (tmp_path / file).stat().st_size
    panels = make_figures.growth(records).axes
    assert [list(axes.lines[0].get_xdata()) for axes in panels] == [[1024, 4096], [0, 2]]


def test_a_second_voice_is_measured_once_and_compared_by_seed(
    data_dir, detector_file, tmp_path, capsys
):
    for seed in (0, 1):
        (tmp_path / f"none-{seed}.keras").write_bytes(detector_file.read_bytes())
    arguments = [
        data_dir, *SETS, "--sets=test", f"--detectors={tmp_path}", "--weights=0,2",
        f"--json={tmp_path / 'found.json'}", "--bank_images=60", "--auxiliary_images=20",
    ]  # fmt: skip
    second_voice.main(arguments)
    records = json.loads((tmp_path / "found.json").read_text())
    assert set(records) == {"none-0", "none-1"} and set(records["none-0"]) == {"0", "2"}
    rows = records["none-0"]
    assert set(rows["2"]) == {"wall", "cup", "scenes"}
    grass, scenes = tiles("grass", 180, SIDE), tiles("astronaut", 60, SIDE)
    backbone = keras.models.load_model(detector_file).extractor.backbone
    detector = sddns_tf.Detector.from_images(
        backbone, grass[:60], grass[100:140:2], image_size=SIDE, verbose=0, auxiliary_weight=2.0,
        auxiliary_images=scenes[np.random.default_rng(0).permutation(40)[:20]],
    )  # fmt: skip
    fresh, wall = (
        detector.predict(images, verbose=0)["ood_score"]
        for images in (grass[140:], tiles("brick", 12, SIDE))
    )
    expected = sddns_tf.metrics.ood_metrics(fresh, wall)["auroc"]
    assert rows["2"]["wall"] == pytest.approx(expected, abs=1e-6) and rows["0"] != rows["2"]
    records["none-1"]["2"]["wall"] -= 0.2
    (tmp_path / "found.json").write_text(json.dumps(records))
    capsys.readouterr()
    second_voice.main(arguments)
    line = capsys.readouterr().out.splitlines()[-1]
    (difference, half) = map(float, line.split("|")[-2].split("±"))
    gains = [np.mean([r["2"][n] - r["0"][n] for n in ("wall", "cup")]) for r in records.values()]
    assert difference == pytest.approx(np.mean(gains), abs=1e-3)
    assert half == pytest.approx(stats.t.ppf(0.975, 1) * abs(gains[0] - gains[1]) / 2, abs=1e-3)
    second_voice.main([*arguments, "--weights=0,3"])
    assert set(json.loads((tmp_path / "found.json").read_text())["none-0"]) == {"0", "3"}
    with pytest.raises(ValueError, match=r"file of development sets\. Received: .*found\.json"):
        second_voice.main([*arguments, "--sets=development"])
