"""The image files of a folder: which there are, how large, and which cannot be used, and why."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf
from absl import logging

from sddns_tf.data.pixels import Opened, by, final_shape, finish

MAX_PIXELS = 64_000_000

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


def open_folder(folder, image_size, min_size, max_pixels, on_error):
    """The image files of a folder, decoded as they are needed."""
    files = usable_files(folder, min_size, max_pixels, on_error)
    first_path, first_size = files[0]
    for path, size in files:
        if image_size is None and size != first_size:
            raise ValueError(
                "image_size is needed where sizes differ (height x width): "
                f"{first_path} has {by(first_size)}, {path} has {by(size)}."
            )
    shape = final_shape(first_size, image_size, None, folder)

    def decode(path):
        pixels = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return {"image": finish(pixels, shape, None)}

    # Bytes, because a file name need not be valid Unicode.
    records = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path, _ in files])
    return Opened(records, decode, shuffle_buffer=len(files))


def usable_files(folder, min_size, max_pixels, on_error):
    """Lists `(path, (height, width))` of the usable images of a folder."""
    paths = _image_paths(folder)

    def inspect(path):
        return _inspect(path, min_size or 1, max_pixels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(zip(paths, pool.map(inspect, paths), strict=True))
    files = [(path, size) for path, (size, _) in results if size]
    problems = [f"{path}: {problem}" for path, (_, problem) in results if problem]
    if problems:
        listed = "\n  ".join(problems[:10] + ["..."] * (len(problems) > 10))
        summary = f"{len(problems)} of {len(paths)} image files cannot be used:\n  {listed}"
        if on_error == "raise" or not files:
            raise ValueError(
                f'{summary}\nRemove or mend them, or leave them out with on_error="skip".'
            )
        logging.warning("Skipped: %s", summary)
    return files


def _image_paths(folder):
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"folder:{folder} must be a folder; there is none of that name.")
    paths, others = [], []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                is_image = name.lower().endswith(_EXTENSIONS)
                (paths if is_image else others).append(os.path.join(parent, name))
    if not paths:
        found = f"{len(others)} other files, such as {min(others)}" if others else "no files"
        raise ValueError(
            f"folder:{folder} must hold images ({', '.join(_EXTENSIONS)}); it holds {found}."
        )
    return sorted(paths)


def _inspect(path, min_size, max_pixels):
    """Returns the size of a file's image and `None`, or `None` and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        height, width = _announced_size(data)
        # A few kilobytes can announce, and decode to, gigabytes.
        if height * width > max_pixels:
            return None, f"{height} x {width} is more than max_pixels={max_pixels}"
        pixels = tf.io.decode_image(data, channels=3, expand_animations=False)
    except (OSError, ValueError) as error:
        return None, str(error)
    except struct.error:
        return None, "its header is cut short"
    except tf.errors.InvalidArgumentError as error:
        reason = error.message.partition("}} ")[2] or error.message
        return None, f"corrupt or cut short ({reason.partition(' [Op:')[0]})"
    height, width = pixels.shape[:2]
    if min(height, width) < min_size:
        return None, f"{height} x {width} is smaller than min_size={min_size}"
    return (height, width), None


def _announced_size(data):
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
    elif data.startswith(b"\xff\xd8\xff"):
        height, width, _ = tf.io.extract_jpeg_shape(data).numpy().tolist()
    else:
        raise ValueError("not a JPEG, PNG, GIF or BMP image")
    return abs(height), width
