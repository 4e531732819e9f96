r"""Scores image files with a detector: one row of CSV or JSON for each, as it goes.

    python tools/score.py --model=parts.tflite --images=folder:camera > scores.csv
    find camera -name '*.png' | python tools/score.py --model=exports/parts/1 --images=-

The model is a `.tflite` file, which is run without TensorFlow, a SavedModel (its folder, or that of
its versions, of which the last is taken) or a `.keras` detector. A row has `path`, `ood_score`
(higher is more out-of-distribution), `p_value`, `is_ood` and `error`: a file that cannot be read
gets its error and no score, and the others are scored. Memory does not grow with their number.

Ends with 0 if all images were scored, with 2 if some were not, with 1 if nothing could be done.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import command_line
import numpy as np
from absl import flags

FLAGS = flags.FLAGS
FIELDS = ("path", "ood_score", "p_value", "is_ood", "error")
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


def define_flags():
    """All flags of the program."""
    flags.DEFINE_string("model", None, "A .tflite file, a SavedModel's folder or a .keras file.")
    flags.DEFINE_string(
        "images",
        None,
        "folder:PATH (with its subfolders), list:FILE (a path on each line) or - (such a list on "
        "stdin).",
    )
    flags.DEFINE_string("output", None, "File to write; default: stdout.")
    flags.DEFINE_enum(
        "format", None, ["csv", "jsonl"], "Default: as --output's name ends, else csv."
    )
    flags.DEFINE_integer("batch_size", 32, "Images read and scored at a time.", 1)
    flags.DEFINE_integer("threads", None, "CPU cores to use for a .tflite; default: all.", 1)


def main():
    """Score what the flags name."""
    if not FLAGS.model or not FLAGS.images:
        raise ValueError(
            "--model and --images are needed. "
            f"Received: --model={FLAGS.model} --images={FLAGS.images}"
        )
    paths = image_paths(FLAGS.images)
    scorer = open_model(pathlib.Path(FLAGS.model).expanduser())
    kind = FLAGS.format or ("jsonl" if str(FLAGS.output).endswith(".jsonl") else "csv")
    counts = {"images": 0, "flagged": 0, "failed": 0}
    with opened_output(FLAGS.output) as output:
        write = row_writer(output, kind)
        last_told = started = time.monotonic()
        for rows in scored(scorer, paths, FLAGS.batch_size):
            for row in rows:
                write(row)
                counts["images"] += 1
                counts["flagged"] += bool(row["is_ood"])
                counts["failed"] += bool(row["error"])
            output.flush()
            if time.monotonic() - last_told > 2:
                last_told = time.monotonic()
                rate = counts["images"] / (last_told - started)
                command_line.say(f"{counts['images']} images, {rate:.1f}/s")
    command_line.say(
        f"{counts['images']} images, {counts['flagged']} of them out of distribution, "
        f"{counts['failed']} not scored"
    )
    return 2 if counts["failed"] else 0


def image_paths(text):
    """Paths of the images that the flag names, one after another."""
    kind, _, place = text.partition(":")
    if text == "-":
        return listed(sys.stdin)
    place = pathlib.Path(place).expanduser()
    if kind == "list" and place.is_file():
        return listed(place.open(encoding="utf-8", errors="surrogateescape"))
    if kind == "folder" and place.is_dir():
        paths = in_folder(place)
        first = next(paths, None)
        if first is None:
            raise ValueError(f"--images: {place} must hold images ({', '.join(EXTENSIONS)}).")
        return itertools.chain([first], paths)
    raise ValueError(
        f"--images must be folder:PATH, list:FILE or -, of what is there. Received: {text}"
    )


def listed(lines):
    """The paths of a list, without its empty lines."""
    return (line.rstrip("\r\n") for line in lines if line.strip())


def in_folder(folder):
    """The image files of a folder and its subfolders, hidden ones left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(parent, name)


def open_model(path):
    """A function from images of one size, uint8 `(N, H, W, 3)`, to answers; and that size or None.

    Args:
        path: `pathlib.Path` of any of the three kinds of model.
    """
    if path.suffix == ".tflite" and path.is_file():
        return tflite_scorer(path)
    if path.suffix == ".keras":
        return keras_scorer(path), None
    versions = [one for one in path.glob("*/saved_model.pb") if one.parent.name.isdecimal()]
    if (path / "saved_model.pb").is_file():
        return saved_model_scorer(path), None
    if versions:
        last = max(versions, key=lambda one: int(one.parent.name))
        return saved_model_scorer(last.parent), None
    raise ValueError(
        "--model must be a .tflite file, a SavedModel's folder or a .keras file, and be there. "
        f"Received: {path}"
    )


def tflite_scorer(path):
    """Of a `.tflite` file, which takes images of one size and perhaps a fixed number of them."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(str(path), num_threads=FLAGS.threads or os.cpu_count())
        runner = interpreter.get_signature_runner("serving_default")
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"--model: {path} cannot be loaded: {error}") from error
    batch, height, width, _ = interpreter.get_input_details()[0]["shape_signature"].tolist()

    def answers(images):
        if batch < 0:
            return runner(images=images)
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            full = np.resize(part, (batch, *part.shape[1:]))
            parts.append({k: v[: len(part)] for k, v in runner(images=full).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return answers, (height, width)


def saved_model_scorer(path):
    """Of a SavedModel, which takes images of any size."""
    import tensorflow as tf

    try:
        signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    except (OSError, KeyError, tf.errors.OpError) as error:
        raise ValueError(f"--model: {path} cannot be loaded: {error}") from error
    return lambda images: {k: v.numpy() for k, v in signature(images=tf.constant(images)).items()}


def keras_scorer(path):
    """Of a `.keras` detector, which takes images of any size."""
    import tensorflow as tf

    import sddns_tf

    detector = command_line.load_keras("model", path)
    if not isinstance(detector, sddns_tf.Detector):
        raise ValueError(
            f"--model must hold a Detector. Received: {path}, which holds a "
            f"{type(detector).__name__}"
        )
    # Traced once for all sizes, or memory would grow with their number.
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
    call = tf.function(lambda images: detector(images), input_signature=[spec], autograph=False)
    return lambda images: {name: value.numpy() for name, value in call(images).items()}


def scored(model, paths, batch_size):
    """Rows of so many images at a time, in the order of the paths."""
    answers, size = model
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(paths, batch_size)):
            images = list(pool.map(lambda path: read_image(path, size), some))
            rows = [dict.fromkeys(FIELDS) | {"path": path} for path in some]
            by_size = {}
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, str):
                    row["error"] = image
                else:
                    by_size.setdefault(image.shape, []).append((row, image))
            for alike in by_size.values():
                found = answers(np.stack([image for _, image in alike]))
                for number, (row, _) in enumerate(alike):
                    row.update({name: values[number].item() for name, values in found.items()})
            yield rows


def read_image(path, size):
    """An image file as uint8 `(H, W, 3)`, or a sentence on why it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                return f"more than 8 bits a channel (mode {image.mode})"
            image = image.convert("RGB")
            if size is not None:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            return np.asarray(image)
    # Whatever a damaged file makes a decoder raise, the other files are to be scored.
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")


@contextlib.contextmanager
def opened_output(path):
    """Stdout, or a file that gets its name when it is whole."""
    if path is None:
        sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def row_writer(output, kind):
    """A function that writes one row."""
    if kind == "jsonl":
        return lambda row: output.write(json.dumps(as_json(row)) + "\n")
    writer = csv.DictWriter(output, FIELDS, lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow(as_json(row))


def as_json(row):
    """A row in which a number that is not finite is None, as JSON has none."""
    finite = row["ood_score"] is None or math.isfinite(row["ood_score"])
    return row if finite else {**row, "ood_score": None}


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
