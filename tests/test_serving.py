"""An exported detector in the runtimes that serve it: none of them has Keras."""

import io
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

from sddns_tf import bank, image_ops
from sddns_tf.export import decode_files
from sddns_tf.export import signatures as signatures_of

OUTPUTS = ("ood_score", "p_value", "is_ood")
SIZES = [(b, h, w) for b in (1, 3, 17) for h, w in ((32, 32), (57, 91))]
DAMAGED = "cannot be decoded: the file is damaged or cut off"
NO_IMAGE = "is not a JPEG, PNG, BMP or GIF file"


def run(program, folder):
    """Run a program in a fresh Python without Keras and without this package."""
    blocked = 'import sys\nsys.modules["keras"] = sys.modules["sddns_tf"] = None\n'
    result = subprocess.run(
        [sys.executable, "-c", blocked + program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_agrees(answers, detector, images, atol=1e-4):
    """Answers are the detector's, but for p-values on whose border a score lies."""
    expected = {name: value.numpy() for name, value in detector(images).items()}
    np.testing.assert_allclose(answers["ood_score"], expected["ood_score"], rtol=0, atol=atol)
    calibration = detector.calibration_scores.numpy()
    lowest, highest = (
        (1 + (calibration >= expected["ood_score"][:, np.newaxis] + shift).sum(1)) / 50
        for shift in (atol, -atol)
    )
    assert (answers["p_value"] >= lowest - 1e-6).all()
    assert (answers["p_value"] <= highest + 1e-6).all()
    np.testing.assert_array_equal(answers["is_ood"], answers["p_value"] <= 0.1)
    for name in OUTPUTS:
        assert answers[name].shape == expected[name].shape


def encoded(image, kind, **options):
    """An image file, written by Pillow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def resized(files, size=(32, 32)):
    """What the detector is to see of image files, float32 (B, h, w, 3)."""
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    return np.concatenate([image_ops.resize(np.asarray(i)[np.newaxis], *size) for i in images])


@pytest.fixture(scope="module")
def signatures(served):
    return tf.saved_model.load(str(served)).signatures


@pytest.fixture(scope="module")
def tensor_names(served):
    """Of each signature: names of the graph's tensors by names of inputs and of outputs."""
    saved = saved_model_pb2.SavedModel.FromString((served / "saved_model.pb").read_bytes())
    return {
        name: tuple(
            {key: tensor.name for key, tensor in side.items()}
            for side in (signature.inputs, signature.outputs)
        )
        for name, signature in saved.meta_graphs[0].signature_def.items()
    }


# --- Runtimes -----------------------------------------------------------------------------------


def test_it_answers_like_the_detector_where_there_is_no_keras(
    grass_detector, served, grass_and_person, tmp_path
):
    batches = {f"{b}_{h}_{w}": grass_and_person(b, 7, h, w)[::2][:b] for b, h, w in SIZES}
    np.savez(tmp_path / "images.npz", **batches)
    program = f"""
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load({str(served)!r}).signatures
answers = {{}}
with np.load("images.npz") as batches:
    for key in batches:
        images = tf.constant(batches[key])
        files = tf.stack([tf.io.encode_png(image) for image in images])
        rate = tf.fill([len(images)], 0.1)
        for name, inputs in {{
            "serving_default": {{"images": images}},
            "features": {{"images": images}},
            "serving_bytes": {{"image_bytes": files}},
            "serving_at_rate": {{"images": images, "false_positive_rate": rate}},
            "serving_bytes_at_rate": {{"image_bytes": files, "false_positive_rate": rate}},
        }}.items():
            for output, value in signatures[name](**inputs).items():
                if output == "status":
                    assert not any(value.numpy()), value
                else:
                    answers[f"{{key}}.{{name}}.{{output}}"] = value.numpy()
np.savez("answers.npz", **answers)
"""
    run(program, tmp_path)
    with np.load(tmp_path / "answers.npz") as loaded:
        answers = dict(loaded)
    decisions = set()
    for key, images in batches.items():
        for name in ("serving_default", "serving_bytes", "serving_at_rate"):
            of_signature = {k: answers[f"{key}.{name}.{k}"] for k in OUTPUTS}
            assert_agrees(of_signature, grass_detector, images)
            decisions.update(of_signature["is_ood"].tolist())
        np.testing.assert_allclose(
            answers[f"{key}.features.features"],
            grass_detector.features(images),
            rtol=0,
            atol=1e-5,
        )
    assert decisions == {True, False}


@pytest.mark.slow
def test_the_command_line_shows_and_runs_it(grass_detector, served, grass_and_person, tmp_path):
    images = grass_and_person(2, 3)
    np.save(tmp_path / "images.npy", images)
    command = pathlib.Path(sys.executable).with_name("saved_model_cli")
    of = ["--dir", served, "--tag_set", "serve", "--signature_def"]

    def cli(*arguments):
        return subprocess.run(
            [command, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    shown = cli("show", *of, "serving_bytes_at_rate")
    for text in ("DT_STRING", "inputs['image_bytes']", "inputs['false_positive_rate']", "(-1)"):
        assert text in shown
    inputs = ["--inputs", "images=images.npy", "--outdir", "."]
    cli("run", *of, "serving_default", *inputs)
    assert_agrees({k: np.load(tmp_path / f"{k}.npy") for k in OUTPUTS}, grass_detector, images)


@pytest.fixture(scope="module")
def c_program(tmp_path_factory):
    """The program that loads an export as TensorFlow Serving does, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    library = pathlib.Path(tf.__file__).parent
    libraries = [library / f"libtensorflow_{name}.so.2" for name in ("cc", "framework")]
    missing = [str(path) for path in libraries if not path.exists()]
    if compiler is None or missing:
        pytest.skip("no C compiler" if compiler is None else f"no {missing}")
    program = tmp_path_factory.mktemp("c") / "load_saved_model"
    source = pathlib.Path(__file__).with_name("load_saved_model.c")
    # The usual linker takes four seconds for libraries of that size.
    linker = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []
    compiled = subprocess.run(
        [
            *(compiler, "-Wall", "-Werror", source, "-o", program, f"-I{library}/include"),
            *linker,
            *(*libraries, f"-Wl,-rpath,{library}", "-lpthread"),
        ],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    return program


def run_c(program, *arguments):
    """Rows that the C program prints."""
    result = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [line.split("\t") for line in result.stdout.splitlines()]


def test_the_loader_of_tensorflow_serving_answers_like_the_detector_from_eight_threads(
    grass_detector, served, grass_and_person, tensor_names, c_program, tmp_path
):
    images = grass_and_person(3, 11, 57, 91)
    images.tofile(tmp_path / "images")
    (feed,), fetches = (
        tensor_names["serving_default"][0].values(),
        tensor_names["serving_default"][1],
    )
    shape = images.shape[:3]
    rows = run_c(
        c_program, served, 8, 200, *shape, tmp_path / "images", feed, *(fetches[k] for k in OUTPUTS)
    )
    assert_agrees(_numbers(rows), grass_detector, images)


def test_the_loader_of_tensorflow_serving_takes_image_files(
    grass_detector, served, grass_and_person, tensor_names, c_program, tmp_path
):
    images = grass_and_person(2, 12)
    files = [encoded(image, "PNG") for image in images]
    files.insert(1, files[0][:100])
    paths = [tmp_path / f"{index}.png" for index in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    inputs, fetches = tensor_names["serving_bytes"]
    names = [fetches[k] for k in (*OUTPUTS, "status")]
    *rows, status = run_c(
        c_program, served, 8, 10, 0, 0, 0, ",".join(map(str, paths)), inputs["image_bytes"], *names
    )
    assert status == ["", DAMAGED, "", "", ""]
    answers = _numbers(rows)
    assert np.isnan(answers["ood_score"][1]) and answers["is_ood"][1]
    assert_agrees({k: np.delete(v, 1) for k, v in answers.items()}, grass_detector, images)


def _numbers(rows):
    scores, p_values, is_ood = (np.array(row, np.float32) for row in rows)
    return {"ood_score": scores, "p_value": p_values, "is_ood": is_ood.astype(bool)}


def test_openvino_answers_like_the_detector(grass_detector, served, grass_and_person):
    openvino = pytest.importorskip("openvino", reason="no openvino")
    core = openvino.Core()
    # Where the processor has bfloat16, OpenVINO computes in it unless it is told not to.
    model = core.compile_model(
        core.read_model(str(served)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for height, width in ((32, 32), (57, 91)):
        images = grass_and_person(4, 13, height, width)
        found = {output.any_name: value for output, value in model(images).items()}
        assert_agrees(found, grass_detector, images, atol=1e-3)


def test_eight_threads_get_the_answers_of_one(signatures, grass_and_person):
    images = tf.constant(grass_and_person(2, 14))
    files = tf.stack([tf.io.encode_png(image) for image in images] + [tf.constant("no image")])
    expected = signatures["serving_bytes"](image_bytes=files)
    answers, errors = [], []

    def ask():
        try:
            for _ in range(200):
                answers.append(signatures["serving_default"](images=images)["ood_score"].numpy())
            for _ in range(5):
                found = signatures["serving_bytes"](image_bytes=files)
                np.testing.assert_array_equal(found["status"], expected["status"])
                np.testing.assert_allclose(found["ood_score"], expected["ood_score"], atol=1e-4)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(answers) == 8 * 200
    np.testing.assert_allclose(
        answers, np.tile(expected["ood_score"][:4], [len(answers), 1]), rtol=0, atol=1e-4
    )


# --- Files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_files(grass_and_person):
    """Image files of all kinds."""
    normal, other = grass_and_person(1, 9, 57, 91)
    frames = [Image.fromarray(grass_and_person(1, 10)[1])]
    files = {
        "jpeg": encoded(other, "JPEG"),
        "progressive jpeg": encoded(other, "JPEG", progressive=True),
        "gray jpeg": encoded(normal[..., 0], "JPEG"),
        "png": encoded(normal, "PNG"),
        "gray png": encoded(normal[:40, :30, 0], "PNG"),
        "bmp": encoded(other, "BMP"),
        "gif": encoded(normal, "GIF"),
        "animated gif": encoded(normal, "GIF", save_all=True, append_images=frames),
    }
    clear = np.concatenate([other, other[..., :1]], axis=-1)
    return {**files, "transparent png": encoded(clear, "PNG")}


def test_files_of_all_kinds_and_sizes_come_in_one_batch(grass_detector, signatures, good_files):
    files = list(good_files.values())
    answers = {k: v.numpy() for k, v in signatures["serving_bytes"](tf.constant(files)).items()}
    assert not any(answers["status"])
    assert_agrees({name: answers[name] for name in OUTPUTS}, grass_detector, resized(files))


def test_a_file_that_is_no_image_spoils_nothing_but_its_own_answer(signatures, good_files):
    png, jpeg, bmp, gif = (good_files[kind] for kind in ("png", "jpeg", "bmp", "gif"))
    wrong = {b"": NO_IMAGE, b"text": NO_IMAGE, b"RIFF\0\0\0\0WEBPVP8 ": NO_IMAGE}
    for file in (png, jpeg, bmp, gif):
        for length in (10, 20, len(file) // 2, len(file) - 9):
            wrong[file[:length]] = DAMAGED
    nothing = png[:16] + bytes(4) + png[20:]  # No pixels wide.
    wrong[nothing] = wrong[png[:16] + b"\xff" * 8 + png[24:]] = DAMAGED
    wrong[png[:60] + b"\0\0\0\0" + png[64:]] = DAMAGED
    files = [png, *wrong, jpeg]
    answers = {k: v.numpy() for k, v in signatures["serving_bytes"](tf.constant(files)).items()}
    assert answers["status"].tolist() == [b"", *(text.encode() for text in wrong.values()), b""]
    assert np.isnan(answers["ood_score"][1:-1]).all()
    np.testing.assert_allclose(answers["p_value"][1:-1], 1 / 50, rtol=1e-6)
    assert answers["is_ood"][1:-1].all()
    alone = signatures["serving_bytes"](tf.constant([png, jpeg]))
    np.testing.assert_allclose(answers["ood_score"][[0, -1]], alone["ood_score"], atol=1e-4)


@pytest.mark.parametrize("files", [[], [b"no image"]])
def test_batches_without_an_image_are_answered(signatures, files):
    answers = signatures["serving_bytes"](tf.constant(files, tf.string))
    assert {len(value) for value in answers.values()} == {len(files)}


def test_pixels_are_counted_before_any_is_decoded(good_files):
    decode = tf.function(lambda files: decode_files.decode(files, (8, 8), 57 * 91))
    kinds = ("png", "jpeg", "bmp", "gif")
    images, status = decode(tf.constant([good_files[kind] for kind in kinds]))
    assert not any(status.numpy()) and np.ptp(images, axis=(1, 2, 3)).min() > 10
    # A header that promises far more than there is memory for, and nothing behind it.
    png = good_files["png"][:16] + b"\x7f\xff\xff\xff" * 2 + good_files["png"][24:40]
    bmp = good_files["bmp"][:18] + b"\xff\xff\0\0\0\0\xff\xff" + good_files["bmp"][26:60]
    larger = [encoded(np.zeros([58, 91, 3], np.uint8), kind) for kind in ("PNG", "JPEG", "GIF")]
    images, status = decode(tf.constant([png, bmp, *larger]))
    counts = ((2**31 - 1) ** 2, 65_535 * 65_536, *[58 * 91] * 3)
    assert [text.decode() for text in status.numpy()] == [
        f"has {count} pixels; at most {57 * 91} are decoded" for count in counts
    ]
    assert not np.any(images)


def test_later_frames_of_a_gif_are_not_looked_at(good_files):
    whole = good_files["animated gif"]
    first = good_files["gif"]
    # Pillow writes the same first frame into both; what follows it is broken here.
    end = len(first) - 1
    broken = whole[: end + 60] + b"\xff" * 200
    images, status = decode_files.decode(tf.constant([first, whole, broken]), (57, 91), 10_000)
    assert not any(status.numpy())
    np.testing.assert_array_equal(images[1], images[2])
    reference = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"), np.float32)
    np.testing.assert_array_equal(images[1], reference)


# --- Another rate, and features -----------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.14, 0.5, 0.9999])
def test_a_request_may_name_its_own_rate(grass_detector, signatures, grass_and_person, rate):
    images = grass_and_person(30, 15)
    answers = signatures["serving_at_rate"](
        images=tf.constant(images), false_positive_rate=tf.fill([60], tf.constant(rate))
    )
    before = grass_detector.false_positive_rate
    try:
        grass_detector.recalibrate(false_positive_rate=rate)
        expected = grass_detector(images)
    finally:
        grass_detector.recalibrate(false_positive_rate=before)
    assert not any(answers["status"].numpy())
    # By the rank, so the p-value of the served score decides, also on a border.
    same = np.abs(answers["p_value"] - expected["p_value"]) < 1e-6
    assert same.mean() > 0.9
    np.testing.assert_array_equal(answers["is_ood"].numpy()[same], expected["is_ood"].numpy()[same])
    assert np.count_nonzero(answers["is_ood"]) > 0


def test_rates_differ_from_image_to_image_and_a_wrong_one_is_told(signatures, grass_and_person):
    image = grass_and_person(1, 16)[:1]
    rates = [0.02, 1.0 - 1e-6, 0.019, 0.0, -1.0, 1.0, 2.0, np.nan]
    images = tf.constant(np.repeat(image, len(rates), axis=0))
    answers = signatures["serving_at_rate"](
        images=images, false_positive_rate=tf.constant(rates, tf.float32)
    )
    wrong = b"needs a false_positive_rate of at least 1/50 and below 1"
    assert answers["status"].numpy().tolist() == [b"", b"", *[wrong] * 6]
    assert answers["is_ood"].numpy().tolist() == [False, True, *[True] * 6]
    assert np.isfinite(answers["ood_score"]).all()
    with pytest.raises(tf.errors.InvalidArgumentError, match="one number for each image"):
        signatures["serving_at_rate"](images=images, false_positive_rate=tf.constant([0.1]))


def test_of_a_file_and_a_rate_that_are_wrong_the_file_is_told(signatures, good_files):
    answers = signatures["serving_bytes_at_rate"](
        image_bytes=tf.constant([b"text", b"text", good_files["png"]]),
        false_positive_rate=tf.constant([0.1, 0.0, 0.0]),
    )
    told = [text.decode() for text in answers["status"].numpy()]
    assert told[:2] == [NO_IMAGE] * 2 and "needs a false_positive_rate" in told[2]
    assert answers["is_ood"].numpy().all()


def test_features_come_with_the_answers_if_they_are_asked_for(grass_detector, good_files):
    functions = signatures_of.signatures(grass_detector, 10_000, include_features=True)
    answers = functions["serving_bytes"](tf.constant([good_files["png"], b"text"]))
    assert answers["features"].shape == (2, 32)
    expected = grass_detector.features(resized([good_files["png"]]))
    np.testing.assert_allclose(answers["features"][:1], expected, rtol=0, atol=1e-5)
    assert np.isnan(answers["features"][1]).all()
    score = bank.ood_score(
        answers["features"][:1], grass_detector.bank, weights=grass_detector.bank_weights
    )
    np.testing.assert_allclose(answers["ood_score"][:1], score, atol=1e-4)
