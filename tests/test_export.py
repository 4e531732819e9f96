"""Writing a SavedModel: versions, what lies in it, and that nothing wrong gets its name."""

import collections
import hashlib
import json
import os
import pathlib
import shutil
import stat

import numpy as np
import pytest
import tensorflow as tf

from sddns_tf import export
from sddns_tf.export import to_saved_model, verify, warmup

OUTPUTS = ("ood_score", "p_value", "is_ood")


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


def test_each_variable_is_stored_once_and_others_may_read_it(grass_detector, served):
    stored = (served / "variables" / "variables.data-00000-of-00001").stat().st_size
    values = sum(weight.numpy().nbytes for weight in grass_detector.weights)
    assert values <= stored < 1.2 * values
    assert stat.S_IMODE(served.stat().st_mode) == stat.S_IMODE(served.parent.stat().st_mode)
    assert left_in(served.parent.parent)[:2] == ["grass", os.path.join("grass", "1")]


def test_metadata_tells_what_was_exported(grass_detector, served, grass_and_person):
    metadata = json.loads((served / "assets.extra" / "metadata.json").read_text())
    files = {path for path in left_in(served) if (served / path).is_file()}
    assert set(metadata["files"]) == files - {"assets.extra/metadata.json"}
    for path, told in metadata["files"].items():
        data = (served / path).read_bytes()
        assert told == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert metadata["packages"]["tensorflow"] == tf.__version__
    assert metadata["name"] == "grass" and metadata["version"] == 1
    assert metadata["training_data"] == "grass"
    assert metadata["false_positive_rate"] == 0.1
    assert (metadata["calibration_size"], metadata["bank_size"]) == (49, 40)
    assert metadata["feature_dimension"] == 32 and metadata["resolution"] == [32, 32]
    assert metadata["configuration"]["temperature"] == grass_detector.temperature
    check = metadata["self_check"]
    assert check["images"] == "16 given"
    assert check["largest_difference_of_ood_score"] <= 1e-4
    assert check["largest_difference_of_p_value"] <= 0.02 + 1e-6


def test_warm_up_requests_are_those_of_the_official_api(served):
    log = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2", reason="no tensorflow-serving-api"
    )
    records = tf.data.TFRecordDataset(str(served / "assets.extra" / "tf_serving_warmup_requests"))
    logs = [log.PredictionLog.FromString(record.numpy()) for record in records]
    signatures = tf.saved_model.load(str(served)).signatures
    assert {one.predict_log.request.model_spec.signature_name for one in logs} == set(signatures)
    for one in logs:
        assert one.WhichOneof("log_type") == "predict_log"
        request = one.predict_log.request
        assert request.model_spec.name == "grass"
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        answers = signatures[request.model_spec.signature_name](
            **{name: tf.constant(value) for name, value in inputs.items()}
        )
        (count,) = {len(value) for value in inputs.values()}
        assert {len(value) for value in answers.values()} == {count}
        assert not any(answers.get("status", tf.constant([""])).numpy())
    assert len(logs) == 2 * len(signatures)


def test_fields_whose_length_takes_several_bytes_are_written_right(tmp_path):
    log = pytest.importorskip(
        "tensorflow_serving.apis.prediction_log_pb2", reason="no tensorflow-serving-api"
    )
    names = ["m" * length for length in (0, 1, 127, 128, 16_383, 16_384, 3_000_000)]
    for name in names:
        warmup.write(tmp_path, name, [("serving_default", {"images": np.zeros([1, 2], np.uint8)})])
        (record,) = tf.data.TFRecordDataset(str(tmp_path / warmup.FILE))
        request = log.PredictionLog.FromString(record.numpy()).predict_log.request
        assert request.model_spec.name == name
        assert request.model_spec.signature_name == "serving_default"


def test_versions_follow_one_another_and_are_never_overwritten(
    grass_detector, tmp_path, monkeypatch
):
    for name in ("3", "12", "notes", ".export-abc"):
        (tmp_path / name).mkdir()
    (tmp_path / "3" / "kept").touch()
    monkeypatch.setattr(to_saved_model, "save", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(to_saved_model, "run_apart", lambda *_: collections.defaultdict(float))
    for check in ("check_answers", "check_features"):
        monkeypatch.setattr(to_saved_model, check, lambda *_: 0.0)
    assert export.saved_model(grass_detector, tmp_path) == tmp_path / "13"
    assert export.saved_model(grass_detector, str(tmp_path), version=5) == tmp_path / "5"
    before = left_in(tmp_path)
    with pytest.raises(FileExistsError, match=r"must be a new one.*/3, which exists"):
        export.saved_model(grass_detector, tmp_path, version=3)
    for wrong in (0, -1, True, "7", 1.5):
        for name in ("version", "max_pixels"):
            with pytest.raises(ValueError, match=f"`{name}` must be a positive int"):
                export.saved_model(grass_detector, tmp_path, **{name: wrong})
    assert left_in(tmp_path) == before


def test_two_exports_at_once_get_a_version_each(grass_detector, tmp_path, monkeypatch):
    def save_while_another_does(folder, *_):
        folder.mkdir()
        (tmp_path / "1").mkdir(exist_ok=True)
        (tmp_path / "1" / "another's").touch()

    monkeypatch.setattr(to_saved_model, "save", save_while_another_does)
    monkeypatch.setattr(to_saved_model, "run_apart", lambda *_: collections.defaultdict(float))
    for check in ("check_answers", "check_features"):
        monkeypatch.setattr(to_saved_model, check, lambda *_: 0.0)
    written = export.saved_model(grass_detector, tmp_path)
    assert written == tmp_path / "2"
    assert json.loads((written / "assets.extra" / "metadata.json").read_text())["version"] == 2
    assert left_in(tmp_path / "1") == ["another's"]
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(FileExistsError, match=r"must be a new one.*/1, which exists"):
        export.saved_model(grass_detector, tmp_path, version=1)


@pytest.mark.parametrize("wrong", ["answers", "program", "status"])
def test_an_export_that_is_not_right_is_discarded(grass_detector, tmp_path, monkeypatch, wrong):
    images = np.zeros([2, 32, 32, 3], np.uint8)
    expected = {name: value.numpy() for name, value in grass_detector(images).items()}
    answers = {"features.features": grass_detector.features(images).numpy()}
    for name in ("serving_default", "serving_bytes", "serving_at_rate", "serving_bytes_at_rate"):
        answers.update({f"{name}.{key}": value for key, value in expected.items()})
        answers[f"{name}.status"] = np.array([b"", b""])
    monkeypatch.setattr(to_saved_model, "save", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(to_saved_model, "run_apart", lambda *_: answers)
    export.saved_model(grass_detector, tmp_path / "right", images=images)
    message = {
        "answers": "does not agree.*at_rate.score may differ by at most 0.0001.*over 2 images",
        "status": "does not take images that it should.*serving_bytes, status=.*no image",
        "program": "no such operation",
    }[wrong]
    if wrong == "answers":
        answers["serving_at_rate.ood_score"] = expected["ood_score"] + 1e-3
    elif wrong == "status":
        answers["serving_bytes.status"] = np.array([b"", b"no image"])
    else:
        broken = "raise SystemExit('no such operation')"
        monkeypatch.setattr(
            to_saved_model, "run_apart", lambda _, *rest: verify.run_apart(broken, *rest)
        )
    with pytest.raises(RuntimeError, match=message):
        export.saved_model(grass_detector, tmp_path / "new" / "model", images=images)
    assert {path.split(os.sep)[0] for path in left_in(tmp_path)} == {"right"}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_comparison_sees_every_output(grass_detector, grass_and_person, name):
    images = grass_and_person(3, 4)
    answers = {key: value.numpy() for key, value in grass_detector(images).items()}
    verify.check_answers(grass_detector, images, answers, "", 4e-6)
    for change in [np.nan, 1e-3] if name == "ood_score" else [1e-3]:
        changed = answers[name].copy()
        changed[4] = ~changed[4] if name == "is_ood" else changed[4] + change
        with pytest.raises(RuntimeError, match="does not agree"):
            verify.check_answers(grass_detector, images, {**answers, name: changed}, "", 4e-6)


def test_images_to_compare_on_are_checked(grass_detector, grass_and_person, tmp_path):
    with pytest.raises(ValueError, match="must be uint8"):
        export.saved_model(grass_detector, tmp_path / "new", images=grass_and_person(2, 0) / 255.0)
    assert left_in(tmp_path) == []
