"""`sddns score`: rows for files, whatever the model and however many, bad ones reported."""

import contextlib
import csv
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import export_checks
import keras
import numpy as np
import pytest
from PIL import Image
from tiny import no_pictures

from sddns_tf import data, export, files, image_ops
from sddns_tf.cli import info
from sddns_tf.cli import score as command
from sddns_tf.cli.main import main
from sddns_tf.cli.scorers import Scorer, open_model
from sddns_tf.convnet import ConvNet
from sddns_tf.detector import Detector
from sddns_tf.vit import VisionTransformer

pytest.importorskip("ai_edge_litert")
ROOT = pathlib.Path(__file__).parents[1]
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
    with export_checks.in_this_process():
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
    Image.fromarray(normal[6][..., 0]).save(folder / "b" / "gray.png")
    (folder / "b" / "cut.png").write_bytes((folder / "a1.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    return folder


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def score(*arguments, stdin=""):
    """The command in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        mock.patch("sys.stdin", io.StringIO(stdin)),
    ):
        code = main(["score", *map(str, arguments)])
    return Done(code, out.getvalue(), errors.getvalue())


def test_nothing_in_a_folder_is_left_out_in_silence(models, normal, tmp_path, monkeypatch):
    for name in ("out", "in/one", "in/two"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(normal[0]).save(tmp_path / name / "a.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    scandir, two = os.scandir, str(tmp_path / "in" / "two")

    def denied(path):
        if str(path) == two:
            raise PermissionError(13, "Permission denied", two)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    done = score(f"--model={models / 'model.tflite'}", f"--images=folder:{tmp_path / 'in'}")
    assert done.returncode == 2
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in rows] == [str(tmp_path / "in" / "one" / "a.png"), two]
    assert rows[1]["error"] and not rows[0]["error"]
    assert "Skipped 1 links to folders" in done.stderr and "1 not scored" in done.stderr


def score_without_tensorflow(*arguments, missing=("tensorflow", "keras")):
    """The command in a process in which TensorFlow and Keras cannot be imported."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
from sddns_tf.cli.main import run
sys.argv[0] = "sddns"
sys.argv.insert(1, "score")
run()
"""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_gives_the_detectors_answers(
    kind, models, photos_folder, detector, normal, auxiliary
):
    run = score_without_tensorflow if kind == "model.tflite" else score
    done = run(f"--model={models / kind}", f"--images=folder:{photos_folder}", "--batch_size=5")
    assert done.returncode == 2, done.stderr
    rows = {
        str(pathlib.Path(row["path"]).relative_to(photos_folder)): row
        for row in csv.DictReader(io.StringIO(done.stdout))
    }
    inner = [f"c, d/ü{number}.PNG" for number in range(4)]
    names = [f"a{number}.png" for number in range(4)] + inner + ["b/gray.png"]
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
    told = done.stderr.splitlines()
    assert told[-1].endswith(", 2 not scored")
    assert told[-2] == f"Skipped 1 files that are not images, such as {photos_folder / 'notes.txt'}"


def test_a_detector_of_places_is_scored(normal, photos_folder, tmp_path):
    backbone = ConvNet(stages=(8, 8, 8, 8, 8))
    detector = Detector.from_images(
        backbone, normal[:13], normal[13:], 0.2, layers="auto", bank_size=50, verbose=0
    )
    path = tmp_path / "places.keras"
    detector.save(path)
    done = score(f"--model={path}", "--images=-", stdin=f"{photos_folder}/a0.png")
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    expected = detector.predict(normal[:1], verbose=0)
    assert float(row["ood_score"]) == pytest.approx(expected["ood_score"][0], abs=1e-3)
    assert set(row) == {"path", "ood_score", "p_value", "is_ood", "error"}
    assert list(info.describe(path)["layers"]) == list(detector.extractor.layer_names)


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
    (tmp_path / "windows.txt").write_text(f"{paths[0]}\r\n", encoding="utf-8-sig")
    assert score(model, f"--images=list:{tmp_path}/windows.txt").returncode == 0
    done = score(model, "--images=-", stdin="a.png\0b.png")
    assert done.returncode == 1 and "one path per line, as UTF-8. Received:" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "sddns_tf", "score", model, "--images=-"],
        input=b"gr\xfcn.png\n", capture_output=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 2 and b"gr\xfcn.png,,,,FileNotFoundError" in done.stdout


def test_large_photographs_are_scored_a_few_at_once(photos_folder, monkeypatch):
    counts = []

    def answer(images):
        counts.append(len(images))
        return {name: np.arange(len(images)) for name in command.ANSWERS}

    monkeypatch.setattr(command, "_PIXELS_AT_ONCE", 3 * 32 * 32)
    paths = [str(photos_folder / "a0.png")] * 7
    (rows,) = command.scored(Scorer(answer), iter(paths), batch_size=8)
    assert counts == [3, 3, 1] and [row["ood_score"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images=-"], "--model is needed"),
        (["--model=no.tflite", "--images=-"], "--model must be an existing .tflite file"),
        (["--model={here}", "--images=-"], "--model must be an existing .tflite file"),
        (
            ["--model={models}/model.tflite", "--images=there"],
            "--images must be an existing folder:PATH",
        ),
        (
            ["--model={models}/model.tflite", "--images=folder:{here}"],
            "must be a folder that holds images",
        ),
        (
            ["--model={models}/model.tflite", "--images=folder:"],
            "--images must be an existing folder:PATH",
        ),
        (
            ["--model={here}/broken.tflite", "--images=-"],
            "--model must be a .tflite file that sddns export wrote",
        ),
        (
            ["--model={here}/broken.tflite", "--images=-", "more"],
            "Expected options that --help lists. Received: more",
        ),
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


def test_a_runner_without_beam_says_what_to_install(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    done = score_without_tensorflow(
        f"--model={tmp_path}",
        f"--images={tmp_path}/*",
        f"--output={tmp_path / 'out'}",
        "--runner=DirectRunner",
        missing=("tensorflow", "keras", "apache_beam"),
    )
    assert done.returncode == 1
    needed = 'sddns_tf.beam needs Apache Beam: pip install "sddns_tf[beam]"'
    assert done.stderr.splitlines() == [f"sddns score: --runner: {needed}"]


def test_memory_does_not_grow_with_the_number_of_images(models, normal, tmp_path):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads /proc")
    for number in range(200):
        Image.fromarray(normal[number % 32]).save(tmp_path / f"{number}.png")
    paths = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    program = f"""
from sddns_tf.cli import score, scorers
paths = {paths!r} * 40
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
scorer = scorers.open_model({str(models / "model.tflite")!r})
count = 0
for rows in score.scored(scorer, iter(paths), 32):
    count += len(rows)
    assert not any(row["error"] for row in rows)
    if count == 1600:
        before = resident()
print(count, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, growth = map(int, done.stdout.split())
    assert count == 8000
    assert growth < 2_000_000


def test_what_was_scored_survives_an_interruption(models, photos_folder, tmp_path):
    paths = [str(photos_folder / f"a{number}.png") for number in range(4)]

    def interrupted():
        yield from paths[:3]
        raise KeyboardInterrupt

    output = tmp_path / "scores.csv"
    with mock.patch.object(command, "image_paths", lambda text: interrupted()):
        done = score(
            f"--model={models / 'model.tflite'}",
            "--images=-",
            f"--output={output}",
            "--batch_size=1",
        )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "sddns score: interrupted"
    assert not output.exists()
    partial = tmp_path / "scores.csv.partial"
    rows = list(csv.DictReader(partial.open()))
    assert [row["path"] for row in rows] == paths[:3]
    assert all(row["ood_score"] for row in rows)


# --- Images of another shape --------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("shape", [(60, 100), (100, 61), (31, 33), (17, 90)])
def test_a_file_is_brought_to_the_size_as_the_detector_does_it(resize, shape, auxiliary, tmp_path):
    image = np.tile(auxiliary[0], (3, 3, 1))[: shape[0], : shape[1]]
    Image.fromarray(image).save(tmp_path / "image.png")
    read = command.read_image(tmp_path / "image.png", Scorer(None, (24, 32), resize))
    expected = np.clip(image_ops.fit(image[None], 24, 32, resize)[0], 0, 255)
    difference = np.abs(read - expected)
    # Pillow computes with fixed-point weights, and rounds between the two directions.
    assert difference.max() <= 2 and difference.mean() < 0.4


@pytest.mark.parametrize("ending", ["model.tflite", "model.keras"])
def test_a_damaged_png_is_no_image(models, ending, normal, tmp_path):
    """Pillow hides the damage from whoever asks for EXIF data first."""
    file = io.BytesIO()
    Image.fromarray(np.tile(normal[0], (6, 6, 1))).save(file, "png")
    damaged = bytearray(file.getvalue())
    damaged[len(damaged) // 5] ^= 1
    (tmp_path / "damaged.png").write_bytes(damaged)
    done = score(f"--model={models / ending}", f"--images=folder:{tmp_path}")
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert row["error"] and not row["ood_score"] and done.returncode == 2
    with pytest.raises(ValueError, match=r"damaged\.png"):
        data.load_arrays(f"folder:{tmp_path}")


def test_two_runs_do_not_write_to_one_file(models, photos_folder, tmp_path):
    output = tmp_path / "scores.csv"
    arguments = [f"--model={models / 'model.tflite'}", f"--output={output}"]
    partial = tmp_path / "scores.csv.partial"
    partial.write_text("rows of a run that was killed")
    with partial.open("a") as other:
        assert files.lock(other.fileno())
        done = score(*arguments, f"--images=folder:{photos_folder}")
    assert done.returncode == 1 and "no other run is writing" in done.stderr
    assert partial.read_text() == "rows of a run that was killed"
    done = score(*arguments, "--images=-", stdin=f"{photos_folder}/a0.png")
    assert done.returncode == 0 and f"Replacing {partial}" in done.stderr
    assert len(list(csv.DictReader(output.open()))) == 1 and not partial.exists()
    assert "Received: " in score(*arguments[:1], f"--output={tmp_path}", "--images=-").stderr


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no full disk to write to")
def test_a_full_disk_is_told_in_one_line(models, photos_folder):
    command = [sys.executable, "-m", "sddns_tf", "score", f"--model={models / 'model.tflite'}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, f"--images=folder:{photos_folder}"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the disk must have room for all output. [Errno 28]" in done.stderr
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sddns_tf", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the disk must have room for all output. [Errno 28]" in done.stderr


def test_a_file_of_too_many_pixels_is_not_decoded(models, normal, tmp_path):
    """As by `load`, whose limit is Pillow's only at many more."""
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    Image.fromarray(normal[0]).save(tmp_path / "small.png")
    done = score(f"--model={models / 'model.tflite'}", f"--images=folder:{tmp_path}")
    huge, small = csv.DictReader(io.StringIO(done.stdout))
    assert huge["error"] == "8000 x 9000 is more than 64000000 pixels" and not huge["ood_score"]
    assert small["ood_score"] and done.returncode == 2


def test_a_turned_photograph_is_turned_back(normal, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned clockwise
    Image.fromarray(normal[0]).save(tmp_path / "turned.png", exif=tags)
    read = command.read_image(tmp_path / "turned.png", Scorer(None))
    np.testing.assert_array_equal(read, np.rot90(normal[0], -1))


def test_files_of_all_kinds_are_read_as_folders_are(photos, tmp_path):
    image = Image.fromarray(photos[0])
    deep = Image.fromarray(np.asarray(photos[0][..., 0], np.uint16) * 256)
    for name, picture in {
        "a.tif": image,
        "b.webp": image,
        "c.bmp": image.quantize(16),
        "d.png": deep,
        "e.gif": image,
    }.items():
        picture.save(tmp_path / name, **({"lossless": True} if name == "b.webp" else {}))
    expected = data.load_arrays(f"folder:{tmp_path}")
    paths = sorted(command.image_paths(f"folder:{tmp_path}"))
    assert [path[-5:] for path in paths] == ["a.tif", ".webp", "c.bmp", "d.png", "e.gif"]
    for path, pixels in zip(paths, expected, strict=True):
        np.testing.assert_array_equal(command.read_image(path, Scorer(None)), pixels)


@pytest.fixture(scope="module")
def wide_photographs(tmp_path_factory):
    """Folders of wide pictures whose middle is grass and whose sides are white."""
    import skimage.data

    folder = tmp_path_factory.mktemp("wide")
    grass = np.repeat(skimage.data.grass()[..., None], 3, axis=-1)
    generator = np.random.default_rng(5)
    for name, count in (("normal", 80), ("fresh", 60)):
        (folder / name).mkdir()
        for number in range(count):
            top, left = generator.integers(0, 512 - 64, 2)
            picture = np.full((64, 128, 3), 255, np.uint8)
            picture[:, 32:96] = grass[top : top + 64, left : left + 64]
            Image.fromarray(picture).save(folder / name / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(
    "kind",
    ["detector.keras", "parts.tflite", pytest.param("exports/1", marks=pytest.mark.slow)],
)
def test_after_a_training_on_crops_fresh_images_are_cropped(kind, cropped, wide_photographs):
    """Fresh images of what was trained on: at most about the share that was asked for."""
    if kind == "exports/1":
        exported = keras.saving.load_model(cropped / "detector.keras")
        with export_checks.in_this_process():
            export.saved_model(exported, cropped / "exports")
    done = score(f"--model={cropped / kind}", f"--images=folder:{wide_photographs / 'fresh'}")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    flagged = np.mean([row["is_ood"] == "True" for row in rows])
    assert flagged < 0.35  # 0.1 was asked
    found = [float(row["ood_score"]) for row in rows]
    images = [np.asarray(Image.open(row["path"])) for row in rows]
    detector = keras.saving.load_model(cropped / "detector.keras")
    expected = detector.predict(np.stack(images), verbose=0)["ood_score"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)
    # A reader that squashes would be seen: it has 0.88 of them flagged.
    squashed = np.clip(image_ops.resize(np.stack(images), 32, 32), 0, 255)
    assert detector.predict(squashed, verbose=0)["is_ood"].mean() > 0.6


@pytest.fixture(scope="module")
def cropped(wide_photographs, tmp_path_factory):
    """A training with `--resize=crop` on wide photographs, and a `.tflite` file of it."""
    folder = tmp_path_factory.mktemp("cropped")
    with no_pictures():
        code = main(
            [
                "train",
                f"--data=folder:{wide_photographs / 'normal'}",
                "--image_size=32",
                "--resize=crop",
                "--calibration_share=0.5",
                "--false_positive_rate=0.1",
                f"--output_dir={folder}",
                "--set=backbone.stages=[8,16]",
                "--set=views.local_views=0",
                "--set=head.num_prototypes=16",
                "--set=head.hidden_dim=16",
                "--set=head.bottleneck_dim=8",
                # After two steps the images' mean color is most of what features tell.
                "--set=detector.standardize=false",
                "--batch_size=16",
                "--epochs=1",
                "--steps_per_epoch=2",
            ]
        )
    assert code == 0
    detector = keras.saving.load_model(folder / "detector.keras")
    export.tflite(detector, folder / "parts.tflite")
    return folder


def test_a_detector_that_crops_is_one_when_loaded(cropped):
    assert open_model(cropped / "parts.tflite").resize == "crop"
