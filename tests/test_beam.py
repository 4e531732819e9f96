"""Scoring on Beam: the one-process command's answers, every file once, whatever happens."""

import contextlib
import csv
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from sddns_tf.cli.main import main

pytest.importorskip("apache_beam")
import apache_beam as beam
import pyarrow
import pyarrow.parquet
import tensorflow as tf
from apache_beam.testing.util import assert_that, equal_to

from sddns_tf.beam import ReadFiles, SavedModelHandler, Score, ScoringJob, Unreadable
from sddns_tf.beam import job as job_module

ROOT = pathlib.Path(__file__).parents[1]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(grass_and_person):
    return grass_and_person(20, 7)


@pytest.fixture(scope="module")
def photographs(images, tmp_path_factory):
    """Folder of 40 files, four of which TensorFlow alone would show otherwise or not at all."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    Image.fromarray(images[1]).save(folder / "01.tif")
    (folder / "01.png").unlink()
    Image.fromarray(images[2]).quantize(32).save(folder / "02.bmp")
    (folder / "02.png").unlink()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(images[3]).save(folder / "03.png", exif=turned)
    Image.fromarray(images[4]).save(folder / "04.jpg", exif=turned, quality=95)
    (folder / "04.png").unlink()
    return folder


def score(*arguments):
    """The command in this process: exit code and what it said."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(["score", *map(str, arguments)])
    return code, errors.getvalue()


def rows_of(folder):
    """Rows of all shards in a folder, by path; each path must be there once."""
    rows = []
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix == ".csv":
            rows += csv.DictReader(path.open())
        else:
            rows += pyarrow.parquet.read_table(path).to_pylist()
    by_path = {row["path"]: row for row in rows}
    assert len(by_path) == len(rows)
    return by_path


def test_rows_are_those_of_the_one_process_command_to_the_bit(served, photographs, tmp_path):
    common = (f"--model={served}", "--batch_size=8")
    code, _ = score(*common, f"--images=folder:{photographs}", f"--output={tmp_path}/one.csv")
    assert code == 0
    expected = {row["path"]: row for row in csv.DictReader((tmp_path / "one.csv").open())}
    code, told = score(
        *common,
        f"--images={photographs}/*",
        f"--output={tmp_path}/many",
        "--runner=DirectRunner",
        "--images_per_shard=16",
    )
    assert code == 0, told
    assert rows_of(tmp_path / "many" / "scores") == expected
    names = ["part-00000.csv", "part-00001.csv", "part-00002.csv"]
    assert sorted(os.listdir(tmp_path / "many" / "scores")) == names
    flagged = sum(row["is_ood"] == "True" for row in expected.values())
    assert 0 < flagged < 40
    assert told.splitlines()[-2:] == [
        "3 shards, 0 of them done before",
        f"40 images, {flagged} of them out of distribution, 0 not scored",
    ]


def test_bad_files_are_dead_letters_and_stop_nothing(served, images, tmp_path, grass_detector):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, image in enumerate(images[:6]):
        (folder / f"{number}.png").write_bytes(png(image))
    (folder / "cut.png").write_bytes(png(images[0])[:300])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    paths = [*sorted(map(str, folder.iterdir())), str(folder / "missing.png")]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    output = tmp_path / "scores.parquet"
    code, told = score(
        f"--model={served.parent}",
        f"--images=list:{tmp_path}/list.txt",
        f"--output={output}",
        "--runner=DirectRunner",
        "--batch_size=4",
        "--images_per_shard=4",
    )
    assert code == 2
    assert told.endswith("4 not scored\n")
    scored, errors = rows_of(output / "scores"), rows_of(output / "errors")
    assert sorted([*scored, *errors]) == sorted(paths)
    expected = grass_detector.predict(images[:6], verbose=0)
    for number in range(6):
        row = scored[str(folder / f"{number}.png")]
        assert row["ood_score"] == pytest.approx(expected["ood_score"][number], abs=1e-4)
        assert row["p_value"] == expected["p_value"][number]
        assert row["is_ood"] == expected["is_ood"][number]
        assert row["error"] is None
    reasons = {pathlib.Path(path).name: row["error"] for path, row in errors.items()}
    assert "damaged or cut off" in reasons["cut.png"]
    assert "is not a" in reasons["notes.txt"] and "is not a" in reasons["empty.jpg"]
    assert "missing.png" in reasons["missing.png"]
    assert all(row["ood_score"] is None for row in errors.values())


def write_records(path, files):
    with tf.io.TFRecordWriter(str(path), "GZIP" if path.suffix == ".gz" else None) as writer:
        for file in files:
            writer.write(file)


def test_entries_of_containers_get_the_answers_of_files(served, images, tmp_path, grass_detector):
    files = [png(image) for image in images]
    place = tmp_path / "containers"
    place.mkdir()
    write_records(place / "a.tfrecord-00000-of-00001", files[:10])
    write_records(place / "b.tfrecord.gz", files[10:20])
    table = pyarrow.table({"image": files[20:30], "label": list(range(10))})
    pyarrow.parquet.write_table(table, place / "c.parquet")
    names = [f"photograph {number}" for number in range(10)]
    pyarrow.parquet.write_table(
        pyarrow.table({"path": names, "image": files[30:]}), place / "d.parquet"
    )
    job = ScoringJob(served, f"{place}/*", tmp_path / "out", batch_size=10)
    totals = job.run()
    assert (totals.images, totals.failed, totals.shards) == (40, 0, 4)
    found = rows_of(tmp_path / "out" / "scores")
    keys = [f"{place}/a.tfrecord-00000-of-00001#{i}" for i in range(10)]
    keys += [f"{place}/b.tfrecord.gz#{i}" for i in range(10)]
    keys += [f"{place}/c.parquet#{i}" for i in range(10)]
    keys += names
    expected = grass_detector.predict(images, batch_size=10, verbose=0)
    scores = [found[key]["ood_score"] for key in keys]
    np.testing.assert_allclose(scores, expected["ood_score"], rtol=0, atol=1e-4)
    assert [found[key]["p_value"] for key in keys] == expected["p_value"].tolist()
    assert totals.flagged == expected["is_ood"].sum()


def test_a_damaged_container_keeps_what_lies_before_the_damage(served, images, tmp_path):
    files = [png(image) for image in images[:10]]
    write_records(tmp_path / "cut.tfrecord", files)
    whole = (tmp_path / "cut.tfrecord").read_bytes()
    (tmp_path / "cut.tfrecord").write_bytes(whole[: len(whole) - 100])
    write_records(tmp_path / "empty.tfrecord", [])
    write_records(tmp_path / "whole.tfrecord", files)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "other.parquet")
    totals = ScoringJob(served, f"{tmp_path}/*.*", tmp_path / "out").run()
    scored, errors = rows_of(tmp_path / "out" / "scores"), rows_of(tmp_path / "out" / "errors")
    assert len(scored) == totals.images - totals.failed == 19
    assert {key: row["error"].split(":")[0] for key, row in errors.items()} == {
        f"{tmp_path}/cut.tfrecord#9": "from this entry on",
        f"{tmp_path}/empty.tfrecord": "holds no entries",
        f"{tmp_path}/no.parquet#0": "from this entry on",
        f"{tmp_path}/other.parquet#0": "from this entry on",
    }
    assert "one column of bytes" in errors[f"{tmp_path}/other.parquet#0"]["error"]


def test_a_second_run_does_what_is_missing(served, photographs, tmp_path):
    def job(**kwargs):
        options = {"batch_size": 8, "images_per_shard": 8, **kwargs}
        return ScoringJob(served, f"{photographs}/*", tmp_path / "out", **options)

    job().run()
    scores = tmp_path / "out" / "scores"
    first = rows_of(scores)
    kept = {name: (scores / name).stat().st_mtime_ns for name in os.listdir(scores)}
    (scores / "part-00001.parquet").unlink()
    (scores / "part-00004.parquet").unlink()
    (scores / ".0123.part-00004.parquet").write_bytes(b"what a killed worker leaves")
    totals = job().run()
    assert (totals.shards, totals.done_before, totals.images) == (5, 3, 16)
    (scores / ".0123.part-00004.parquet").unlink()
    assert rows_of(scores) == first
    for name in ("part-00000.parquet", "part-00002.parquet", "part-00003.parquet"):
        assert (scores / name).stat().st_mtime_ns == kept[name]
    assert job().run().images == 0
    with mock.patch.object(job_module, "matching", side_effect=AssertionError):
        job()  # A plan is not made again, even if the images have moved.
    with pytest.raises(ValueError, match="in which this job was started before"):
        job(format="csv")
    with pytest.raises(ValueError, match="in which this job was started before"):
        ScoringJob(served, f"{photographs}/*.png", tmp_path / "out")


def test_errors_of_an_earlier_try_go_when_the_shard_is_scored_again(served, images, tmp_path):
    folder, out = tmp_path / "photographs", tmp_path / "out"
    folder.mkdir()
    for number, image in enumerate(images[:4]):
        (folder / f"{number}.png").write_bytes(png(image))
    (folder / "2.png").write_bytes(b"no image")
    assert ScoringJob(served, f"{folder}/*", out).run().failed == 1
    (folder / "2.png").write_bytes(png(images[2]))
    (out / "scores" / "part-00000.parquet").unlink()
    totals = ScoringJob(served, f"{folder}/*", out).run()
    assert (totals.failed, totals.with_errors) == (0, 0)
    assert len(rows_of(out / "scores")) == 4 and not os.listdir(out / "errors")


def test_a_batch_that_fails_as_a_whole_is_scored_one_by_one(served, images):
    handler = SavedModelHandler(served)
    model, files = handler.load_model(), [png(image) for image in images[:5]]

    def short_of_memory(image_bytes):
        if len(image_bytes) > 1 or image_bytes[0] == files[3]:
            raise tf.errors.ResourceExhaustedError(None, None, "no memory")
        return model(image_bytes=image_bytes)

    expected = handler.run_inference(files, model)
    found = handler.run_inference(files, short_of_memory)
    assert found[3].error == "ResourceExhaustedError: no memory"
    for index in (0, 1, 2, 4):
        assert found[index].ood_score == pytest.approx(expected[index].ood_score, abs=1e-4)


def test_in_a_pipeline_of_ones_own(served, photographs, images):
    with beam.Pipeline("FnApiRunner") as pipeline:
        patterns = pipeline | beam.Create([f"{photographs}/0[0-4]*"])
        bad = pipeline | "Bad" >> beam.Create([("bad", b"no image"), ("gone", Unreadable("gone"))])
        found = (patterns | ReadFiles(), bad) | beam.Flatten() | Score(SavedModelHandler(served))
        scored = found.scored | beam.MapTuple(lambda key, answer: key.rpartition("/")[2])
        errors = found.errors | "Reasons" >> beam.MapTuple(lambda key, answer: (key, answer.error))
        names = ["00.png", "01.tif", "02.bmp", "03.png", "04.jpg"]
        assert_that(scored, equal_to(names), "scored")
        reasons = [("bad", "is not a JPEG, PNG, BMP or GIF file"), ("gone", "gone")]
        assert_that(errors, equal_to(reasons), "errors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runner=DirectRunner"], "--output is needed"),
        (["--runner=DirectRunner", "--output={here}/x.jsonl"], "--format must be csv or parquet"),
        (["--runner=Nobody", "--output={here}/x"], "Unexpected pipeline runner: Nobody"),
        (["--output={here}/x.parquet"], "--format must be csv or jsonl without --runner"),
        (
            ["--runner=DirectRunner", "--output={here}/x", "--images={here}/no*"],
            "must match at least one file",
        ),
        (
            ["--runner=DirectRunner", "--output={here}/x", "--model={here}"],
            "--model must be the folder of a SavedModel",
        ),
        (["--runner=DirectRunner", "--output={here}/x", "--images=s4://b/*"], "s4"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, message, served, photographs, tmp_path):
    filled = [argument.format(here=tmp_path) for argument in arguments]
    code, told = score(f"--model={served}", f"--images={photographs}/*", *filled)
    assert code == 1
    assert message in told.splitlines()[-1]
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def workers_of(parent):
    """Processes in which Beam's workers of a process run, by Linux' list of processes."""
    parents, lines = {}, {}
    for place in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            number = int(place.name)
            parents[number] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            lines[number] = (place / "cmdline").read_bytes()
    shells = {number for number, of in parents.items() if of == parent}
    below = [number for number, of in parents.items() if of in shells] + list(shells)
    return [
        number
        for number in below
        if b"sdk_worker_main" in lines.get(number, b"") and b"-c" not in lines[number].split(b"\0")
    ]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_killed_worker_loses_and_doubles_nothing(served, images, tmp_path, grass_detector):
    files = [png(image) for image in images]
    place = tmp_path / "records"
    place.mkdir()
    for number in range(20):
        write_records(place / f"{number:02}.tfrecord", files * 10)
    arguments = [f"--model={served}", f"--images={place}/*", f"--output={tmp_path}/out"]
    arguments += ["--runner=DirectRunner", "--format=parquet", "--threads=1"]
    several = "--direct_num_workers=2 --direct_running_mode=multi_processing"
    process = subprocess.Popen(
        [sys.executable, "-m", "sddns_tf", "score", *arguments, f"--runner_options={several}"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        scores = tmp_path / "out" / "scores"
        while not list(scores.glob("part-*")):
            assert process.poll() is None, process.communicate()[1][-4000:]
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Finished shards are kept" in told.splitlines()[-1]
    done = len(list(scores.glob("part-*")))
    assert 1 <= done < 20
    code, told = score(*arguments)
    assert code == 0, told
    # The other worker may have ended a shard after its driver had stopped.
    before = int(re.search(r"20 shards, (\d+) of them done before", told)[1])
    assert done <= before < 20
    found = rows_of(scores)
    expected = grass_detector.predict(images, verbose=0)["p_value"]
    assert found.keys() == {f"{place}/{n:02}.tfrecord#{i}" for n in range(20) for i in range(400)}
    for key, row in found.items():
        assert row["p_value"] == expected[int(key.rpartition("#")[2]) % 40]
