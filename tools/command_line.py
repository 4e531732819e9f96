"""What the tools' flags mean, once for all of them, and how a tool ends.

A *source* of images is `tfds:NAME`, `tfds:NAME@SPLIT`, `folder:PATH` or `npz:PATH`. In a list of
sources each may be given the name that tables show: `NAME=SOURCE`.

A tool ends with 0 if all that was asked for has been written, otherwise with 1 and one line on
stderr that names the flag or file and what was received (with `--verbosity=1`, its traceback too).
"""

import json
import os
import pathlib
import sys
from typing import NamedTuple

from absl import app, flags, logging

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

FLAGS = flags.FLAGS
KINDS = ("tfds", "folder", "npz")


class Source(NamedTuple):
    """A source of images as the flags give it."""

    name: str
    location: str  # as `sddns_tf.data.load` takes it
    split: str


def run(main):
    """Parse flags and run `main()`; what a user can put right becomes one line and exit code 1."""

    def guarded(argv):
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell much that nobody asked
        try:
            if len(argv) > 1:
                raise ValueError(f"Expected flags only. Received: {' '.join(argv[1:])}")
            return main()
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            logging.debug("Where it happened:", exc_info=True)
            sys.exit(f"ERROR: {error}")

    app.run(guarded)


def say(text):
    """Tell a person how far it is, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def define_data_flags():
    """Flags on where images come from and how they are read."""
    flags.DEFINE_string("data_dir", None, "Prepared TFDS sets; defaults to $TFDS_DATA_DIR.")
    flags.DEFINE_enum(
        "resize",
        "squash",
        ["squash", "crop"],
        "How images of another shape are brought to the resolution: squeezed, or cut at the sides.",
    )
    flags.DEFINE_integer("seed", 0, "Fixes all that is random.")


def define_detector_flags():
    """Flags on how a detector is made from a trained backbone."""
    flags.DEFINE_string(
        "calibration",
        None,
        "Source of in-distribution images that are not trained on, which set the threshold "
        "(split: test).",
    )
    flags.DEFINE_float(
        "false_positive_rate", 0.05, "Largest share of normal images to flag.", 0.0, 1.0
    )
    flags.DEFINE_float("score_temperature", 0.04, "Temperature of the OOD score.", 1e-6)
    flags.DEFINE_float("score_offset", 0.1, "Offset of cosines in the OOD score.")
    flags.DEFINE_integer(
        "neighbors", None, "Score by this many nearest images of the bank, not all.", 1
    )
    flags.DEFINE_integer("bank_size", None, "Compress the bank to at most so many centres.", 1)


def source(flag, text, split):
    """The `Source` that the text of a flag names.

    Args:
        flag: Name of the flag, for the error.
        text: `SOURCE` or `NAME=SOURCE`.
        split: TFDS split where the text names none.
    """
    start, equals, rest = text.partition("=")
    name, location = (start, rest) if equals and ":" not in start else (None, text)
    kind, _, place = location.partition(":")
    if kind not in KINDS or not place or name == "":
        hint = f" Is it folder:{location}?" if os.path.isdir(os.path.expanduser(location)) else ""
        raise ValueError(
            f"--{flag} must be tfds:NAME, tfds:NAME@SPLIT, folder:PATH or npz:PATH. "
            f"Received: {text}.{hint}"
        )
    if kind == "tfds":
        place, at, given = place.partition("@")
        split = given if at else split
    default_name = place if kind == "tfds" else pathlib.Path(place).expanduser().resolve().stem
    return Source(name or default_name, f"{kind}:{place}", split)


def sources(flag, texts, split):
    """The `Source`s of a list flag, each with a name of its own."""
    found = [source(flag, text, split) for text in texts]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"--{flag} has two sets named {name}: name them, as in NAME=SOURCE. "
                f"Received: {','.join(texts)}"
            )
    return found


def opened(one, settings, resolution=None):
    """What `sddns_tf.data` takes for a source whose images are to be brought to a resolution.

    Args:
        one: A `Source`.
        settings: Has `data_dir` and `resize`.
        resolution: `(height, width)`, or None for the images' own size.

    Returns:
        Source and options for `sddns_tf.data.load` and `load_arrays`.
    """
    from sddns_tf import data

    options = {"split": one.split, "data_dir": settings.data_dir}
    height, width = resolution or (None, None)
    if height == width and (height is None or settings.resize == "squash"):
        return one.location, {**options, "image_size": height}
    kind, _, path = one.location.partition(":")
    if kind == "folder":
        files = data.image_files(path)
        return _photographs(files).map(lambda image: _fitted(image, resolution, settings)), {}
    images = data.load(one.location, batch_size=256, **options)
    return images.map(lambda batch: _fitted(batch, resolution, settings)), {}


def read(flag, one, settings, resolution=None, **options):
    """Images of a source in memory, uint8 `(N, H, W, 3)`; an error names the flag.

    Args:
        flag: Name of the flag.
        one: A `Source`.
        settings: Has `data_dir` and `resize`.
        resolution: `(height, width)`, or None for the images' own size.
        **options: Of `sddns_tf.data.load_arrays`.
    """
    from sddns_tf import data

    try:
        location, reading = opened(one, settings, resolution)
        return data.load_arrays(location, **reading, **options)
    except ValueError as error:
        hint = "" if resolution else " --resolution gives the size to read images at."
        raise ValueError(
            f"--{flag}: {error}{hint if 'image_size' in str(error) else ''}"
        ) from error


def read_labelled(flag, one, settings, resolution, limit=None):
    """Images of a source and their labels, int64 `(N,)`; None for labels where it has none.

    Nor has it any where images are cropped or brought to a rectangle.
    """
    try:
        return read(flag, one, settings, resolution, limit=limit, with_labels=True)
    except ValueError:
        return read(flag, one, settings, resolution, limit=limit), None


def _photographs(files):
    import tensorflow as tf

    def decode(path):
        return tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)

    paths = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in files])
    return paths.map(decode, num_parallel_calls=tf.data.AUTOTUNE)


def _fitted(images, resolution, settings):
    """Images `(..., H, W, 3)` of any one size at `resolution`, uint8."""
    import tensorflow as tf

    height, width = resolution
    if settings.resize == "crop":
        rows, columns = tf.unstack(tf.shape(images)[-3:-1])
        new_rows = tf.minimum(rows, tf.maximum(1, columns * height // width))
        new_columns = tf.minimum(columns, tf.maximum(1, rows * width // height))
        top, left = (rows - new_rows) // 2, (columns - new_columns) // 2
        images = images[..., top : top + new_rows, left : left + new_columns, :]
    resized = tf.image.resize(images, resolution, method="bicubic", antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(resized, 0.0, 255.0)), tf.uint8)


def numbers(flag, texts, count):
    """The floats of a list flag; one number stands for `count` equal ones."""
    try:
        values = tuple(float(text) for text in texts)
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ValueError(
            f"--{flag} must be a number or {count} with commas between. Received: {','.join(texts)}"
        )
    return values


def size(flag, texts):
    """`SIDE` or `HEIGHT,WIDTH` in pixels as a pair, or None if the flag is not given."""
    if texts is None:
        return None
    if len(texts) not in (1, 2) or not all(text.isdigit() and int(text) for text in texts):
        raise ValueError(f"--{flag} must be SIDE or HEIGHT,WIDTH. Received: {','.join(texts)}")
    return int(texts[0]), int(texts[-1])


def progress():
    """Keras' `verbose`: a bar for a person, nothing where the output is read by a program."""
    return 1 if sys.stdout.isatty() else 0


def write_text(path, text):
    """Write a file beside its place and rename it: never half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_keras(model, path):
    """Save a model or detector as `.keras`, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        model.save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_keras(flag, path):
    """A saved `.keras` model or detector; an error names the flag."""
    import keras

    import sddns_tf  # noqa: F401  (registers the classes)

    path = pathlib.Path(path).expanduser()
    if not path.is_file() or path.suffix != ".keras":
        raise ValueError(f"--{flag} must be a .keras file. Received: {path}")
    try:
        return keras.models.load_model(path)
    except Exception as error:  # Keras lets through whatever zipfile, json and h5py raise.
        raise ValueError(f"--{flag}: {path} cannot be loaded: {error}") from error
