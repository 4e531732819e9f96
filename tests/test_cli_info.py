"""`sddns info` and `sddns export`: what files hold."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import pytest

import sddns_tf
from sddns_tf.cli import export, info, scorers
from sddns_tf.cli.errors import UsageError

ROOT = pathlib.Path(sddns_tf.__file__).parents[1]


@pytest.fixture(scope="module")
def exported(trained, image_sets, tmp_path_factory):
    """What `sddns export` printed, and where its exports are."""
    pytest.importorskip("ai_edge_litert")
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("exported")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export.main(
            [
                f"--detector={trained}/detector.keras",
                f"--saved_model={folder}/grass",
                f"--tflite={folder}/grass.tflite",
                f"--representative=npz:{image_sets}/grass.npz",
                "--limit=8",
            ]
        )
    return folder, [json.loads(line) for line in printed.getvalue().splitlines() if line[0] == "{"]


def test_export_writes_both(exported):
    folder, told = exported
    assert [line["export"] for line in told] == ["saved_model", "tflite"]
    assert (pathlib.Path(told[0]["path"]) / "saved_model.pb").is_file()
    assert told[1]["bytes"] == (folder / "grass.tflite").stat().st_size


def test_info_of_a_detector(trained):
    detector = keras.saving.load_model(trained / "detector.keras")
    found = info.describe(trained / "detector.keras")
    assert found["holds"] == "Detector"
    assert found["threshold"] == detector.threshold
    assert (found["bank_rows"], found["calibration_images"]) == (96, 24)
    assert (found["resolution"], found["resize"]) == ((32, 32), "squash")
    assert found["keras"] == keras.__version__
    assert found["backbone"]["parameters"] == detector.extractor.backbone.count_params()
    text = "\n".join(info.lines(found))
    assert "bank_rows" in text and "  class" in text


def test_info_of_a_training_and_a_backbone(trained):
    found = info.describe(trained / "model.keras")
    assert (found["holds"], found["steps"], found["prototypes"]) == ("SelfDistillation", 4, 16)
    assert found["negatives"] == {"shift": "rot90", "source": "auxiliary"}
    found = info.describe(trained / "backbone.keras")
    # Keras numbers the networks of a process: `conv_net_3` where others were made before.
    assert re.fullmatch(r"conv_net(_\d+)?", found["name"])
    assert found["features"] == 16


def test_info_of_a_feature_extractor_and_of_what_is_no_network_of_images(trained, tmp_path):
    extractor = keras.saving.load_model(trained / "detector.keras").extractor
    extractor.save(tmp_path / "extractor.keras")
    found = info.describe(tmp_path / "extractor.keras")
    assert (found["holds"], found["feature_dimension"]) == ("FeatureExtractor", 16)
    assert found["backbone"]["features"] == 16
    head = sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4)
    keras.saving.save_model(keras.Sequential([head]), tmp_path / "head.keras")
    with pytest.raises(UsageError, match=r"FILE must hold .*Received: .*which holds a Sequential"):
        info.describe(tmp_path / "head.keras")


def test_info_of_a_saved_model(exported, trained):
    folder, _ = exported
    found = info.describe(folder / "grass")
    detector = info.describe(trained / "detector.keras")
    assert found["signatures"]["serving_bytes"]["takes"] == ["image_bytes"]
    assert found["bank_size"] == 96
    assert (found["threshold"], found["resize"]) == (detector["threshold"], "squash")
    assert found["packages"]["sddns_tf"] == sddns_tf.__version__


def test_a_changed_saved_model_is_told(exported, tmp_path, capsys):
    version = exported[0] / "grass" / "1"
    for name in ("variables/variables.data-00000-of-00001", "saved_model.pb"):
        broken = shutil.copytree(version, tmp_path / name.replace("/", "-"))
        (broken / name).write_bytes((broken / name).read_bytes()[:-99])
        with pytest.raises(UsageError, match=f"{name}, which is missing or has changed"):
            info.describe(broken)
        with pytest.raises(UsageError, match="--model must be a SavedModel"):
            scorers.open_model(broken)
    for text in ("[]", '{"name": '):
        (broken / "assets.extra" / "metadata.json").write_text(text)
        with pytest.raises(UsageError, match=r"without a whole assets.extra/metadata.json"):
            info.describe(broken)


def test_a_version_is_no_folder_for_versions(exported, trained):
    with pytest.raises(UsageError, match=r"holds the versions. Received: .*grass/1, which is a"):
        export.main(
            [f"--detector={trained}/detector.keras", f"--saved_model={exported[0]}/grass/1"]
        )
    assert not (exported[0] / "grass" / "1" / "1").exists()


def test_info_of_a_tflite_file_needs_no_tensorflow(exported):
    folder, _ = exported
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("tensorflow", "keras")))
from sddns_tf.cli.main import main
sys.exit(main(["info", "--json", {str(folder / "grass.tflite")!r}]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["bank_rows"], found["calibration_images"]) == (96, 24)
    assert found["image_size"] == [32, 32]
    assert found["resize"] == "squash"
    assert found["input"] == {"dtype": "uint8", "shape": [-1, 32, 32, 3]}
    assert "CONV_2D" in found["operators"]


def test_info_of_what_is_none(tmp_path, capsys):
    from sddns_tf.cli.main import main

    (tmp_path / "x.tflite").write_bytes(b"no model")
    (tmp_path / "x.keras").write_bytes(b"no model")
    for name in ("x.tflite", "x.keras", "missing"):
        assert main(["info", str(tmp_path / name)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
