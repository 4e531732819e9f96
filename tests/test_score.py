"""`tools/score.py`: rows for files, whatever the model and however many, bad ones reported."""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from sddns_tf import export
from sddns_tf.detector import Detector
from sddns_tf.vit import VisionTransformer

pytest.importorskip("ai_edge_litert")
TOOLS = pathlib.Path(__file__).parents[1] / "tools"
KINDS = ("model.tflite", "one.tflite", "served", "model.keras")
BAD = ("b/cut.png", "empty.jpg")


@pytest.fixture(scope="module")
def detector(normal):
    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=1, num_heads=2)
    return Detector.from_images(backbone, normal[:13], normal[13:], 0.2, verbose=0)


@pytest.fixture(scope="module")
def models(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    detector.save(folder / "model.keras")
    export.tflite(detector, folder / "model.tflite")
    export.tflite(detector, folder / "one.tflite", batch_size=1)
    export.saved_model(detector, folder / "served")
    return folder


@pytest.fixture(scope="module")
def photos_folder(normal, auxiliary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("b", ".hidden", "c, d"):
        (folder / name).mkdir()
    for number in range(4):
        Image.fromarray(normal[number]).save(folder / f"a{number}.png")
        Image.fromarray(auxiliary[number, :32, :32]).save(folder / "c, d" / f"ü{number}.PNG")
    Image.fromarray(normal[5]).save(folder / ".hidden" / "x.png")
    Image.fromarray(normal[6][..., 0]).save(folder / "b" / "grey.png")
    (folder / "b" / "cut.png").write_bytes((folder / "a1.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    return folder


def score(*arguments, stdin="", blocked=()):
    """Run the tool; modules that are blocked cannot be imported."""
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({list(blocked)}))
sys.argv[0] = "score.py"
sys.path.insert(0, {str(TOOLS)!r})
runpy.run_path({str(TOOLS / "score.py")!r}, run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_the_detectors_answers(
    kind, models, photos_folder, detector, normal, auxiliary
):
    lite = kind.endswith(".tflite")
    done = score(
        f"--model={models / kind}",
        f"--images=folder:{photos_folder}",
        "--batch_size=5",
        blocked=("tensorflow", "keras", "sddns_tf") if lite else (),
    )
    assert done.returncode == 2, done.stderr
    rows = {
        str(pathlib.Path(row["path"]).relative_to(photos_folder)): row
        for row in csv.DictReader(io.StringIO(done.stdout))
    }
    inner = [f"c, d/ü{number}.PNG" for number in range(4)]
    names = [f"a{number}.png" for number in range(4)] + inner + ["b/grey.png"]
    assert set(rows) == {*names, *BAD}
    images = [*normal[:4], *auxiliary[:4, :32, :32], np.repeat(normal[6][..., :1], 3, axis=-1)]
    expected = detector.predict(np.stack(images), verbose=0)
    scores = [float(rows[name]["ood_score"]) for name in names]
    np.testing.assert_allclose(scores, expected["ood_score"], rtol=0, atol=1e-3)
    decisions = [rows[name]["is_ood"] for name in names]
    assert decisions == [str(value) for value in expected["is_ood"]]
    assert set(decisions) == {"True", "False"}
    assert not any(rows[name]["error"] for name in names)
    for name in BAD:
        assert rows[name]["error"] and not rows[name]["ood_score"] and not rows[name]["is_ood"]
    assert done.stderr.splitlines()[-1].endswith(", 2 not scored")


def test_stdin_and_lists_give_rows_in_their_order_as_json(models, photos_folder, tmp_path):
    paths = [str(photos_folder / name) for name in ("a2.png", "missing.png", "a0.png")]
    listing = "\n".join([*paths, "", paths[0]]) + "\n"
    (tmp_path / "list.txt").write_text(listing)
    model = f"--model={models / 'model.tflite'}"
    done = score(model, "--images=-", "--format=jsonl", stdin=listing)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2
    assert [row["path"] for row in rows] == [*paths, paths[0]]
    assert "FileNotFoundError" in rows[1]["error"] and rows[1]["ood_score"] is None
    assert rows[0] == rows[3] and rows[0]["error"] is None
    assert set(rows[0]) == {"path", "ood_score", "p_value", "is_ood", "error"}
    output = tmp_path / "new" / "scores.jsonl"
    done = score(model, f"--images=list:{tmp_path}/list.txt", f"--output={output}")
    assert done.returncode == 2 and done.stdout == ""
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert os.listdir(output.parent) == ["scores.jsonl"]
    assert score(model, "--images=-", stdin=paths[0]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images=-"], "--model and --images are needed"),
        (["--model=no.tflite", "--images=-"], "--model must be a .tflite file"),
        (["--model={here}", "--images=-"], "--model must be a .tflite file"),
        (["--model={models}/model.tflite", "--images=there"], "--images must be folder:PATH"),
        (["--model={models}/model.tflite", "--images=folder:{here}"], "must hold images"),
        (["--model={here}/broken.tflite", "--images=-"], "cannot be loaded"),
        (["--model={here}/broken.tflite", "--images=-", "more"], "Expected flags only"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, message, models, tmp_path):
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    filled = [argument.format(models=models, here=tmp_path) for argument in arguments]
    done = score(*filled, f"--output={tmp_path / 'out' / 'x.csv'}")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_memory_does_not_grow_with_the_number_of_images(models, normal, tmp_path):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads /proc")
    for number in range(200):
        Image.fromarray(normal[number % 32]).save(tmp_path / f"{number}.png")
    paths = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    program = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import score
from absl import flags
score.define_flags()
flags.FLAGS(["score"])
paths = {paths!r} * 40
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
model = score.open_model(score.pathlib.Path({str(models / "model.tflite")!r}))
count = 0
for rows in score.scored(model, iter(paths), 32):
    count += len(rows)
    assert not any(row["error"] for row in rows)
    if count == 1600:
        before = resident()
print(count, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, growth = map(int, done.stdout.split())
    assert count == 8000
    assert growth < 2_000_000
