"""The image files of a folder: which exist, their sizes, and which cannot be used and why."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from sddns_tf import pictures
from sddns_tf.data.pixels import Opened, Shaping, by
from sddns_tf.image_ops import decoded, from_16_bits
from sddns_tf.pictures import EXTENSIONS

# Extensions of image formats that are not supported: skipped with a warning.
_OTHER_KINDS = frozenset(
    "3fr ai apng arw avif cr2 cr3 cur dcm dcx dds dib djvu dng emf eps exr fit fits fts hdr heic "  # noqa: SIM905
    "heif hif icns ico j2k jfif jp2 jpc jpe jpf jpm jpx jxl jxr mpo nef nrw orf pbm pcx pef pfm "
    "pgm pnm ppm psb psd qoi raf raw rw2 sgi sr2 srw svg svgz tga wbmp wdp wmf x3f xbm xcf "
    "xpm".split()
)

_AT_ONCE = 64  # Files that are read before checking whether there are enough.
_DECODERS = ("tensorflow", "png_16", "pillow")


class ImageFile(NamedTuple):
    """An image file that can be used."""

    path: str
    size: tuple  # height and width, after rotation
    decoder: str
    orientation: int


class Folder:
    """A folder of images, with options for reading it.

    Args:
        path: Path of the folder.
        shaping: `pixels.Shaping`.
        max_pixels: A file whose header states more pixels is not decoded.
        on_error: `"raise"` or `"skip"`.
        exif_orientation: Whether to rotate images as their EXIF data says.
    """

    def __init__(
        self, path: str, shaping: Shaping, max_pixels: int, on_error: str, exif_orientation: bool
    ) -> None:
        self.path = os.path.expanduser(path)
        self.shaping = shaping
        self.max_pixels = max_pixels
        self.on_error = on_error
        self.exif_orientation = exif_orientation

    def files(self, limit: int | None = None) -> list[ImageFile]:
        """Return the first `limit` usable files, or all, by path. Each is decoded as a check."""
        return [file for file, _ in self._inspected(lambda pixels: None, limit)]

    def open(self) -> Opened:
        """Open the folder as records of its files, which are decoded when needed."""
        files = self.files()
        shape = self._shape([file.size for file in files], files)
        decoders = sorted({file.decoder for file in files}, key=_DECODERS.index)
        is_turned = any(file.orientation != 1 for file in files)

        def decode(path, decoder, orientation):
            pixels = tf.switch_case(
                decoder, [lambda name=name: self._decode_later(path, name) for name in decoders]
            )
            if is_turned:
                pixels = _turned_later(pixels, orientation)
            return {"image": self.shaping.finish(tf.ensure_shape(pixels, (None, None, 3)), shape)}

        columns = (
            [os.fsencode(file.path) for file in files],  # A name need not be valid Unicode.
            np.array([decoders.index(file.decoder) for file in files], np.int32),
            np.array([file.orientation for file in files], np.int32),
        )
        records = tf.data.Dataset.from_tensor_slices(columns)
        return Opened(records, decode, shuffle_buffer=len(files))

    def read(self, limit: int | None = None) -> tuple[tuple[ImageFile, ...], np.ndarray]:
        """Read the first `limit` images, or all, into memory.

        Returns:
            The files, and uint8 `(N, H, W, 3)`.
        """

        def finished(pixels):
            if self.shaping.image_size is None:
                return pixels
            with tf.device("CPU:0"):  # which is a thread's own
                return self.shaping.finish(tf.constant(pixels), self.shaping.image_size).numpy()

        inspected = self._inspected(finished, limit)
        files, images = zip(*inspected, strict=True)
        self._shape([file.size for file in files], files)
        return files, np.stack(images)

    def _shape(self, sizes, files):
        """Return the height and width of the images to yield, or raise if they differ."""
        for size, file in zip(sizes, files, strict=True):
            if self.shaping.image_size is None and size != sizes[0]:
                raise ValueError(
                    "`image_size` is needed where images differ in size (height x width). "
                    f"Received: {files[0].path} is {by(sizes[0])}, {file.path} is {by(size)}"
                )
        return self.shaping.final_shape(sizes[0], self.path)

    def _inspected(self, use, limit=None):
        """Return pairs of a usable file and the result of `use` for its pixels.

        Stops once there are `limit` of them.
        """
        paths, found, problems = self._paths(), [], []

        def inspect(path):
            file, pixels, problem = self._inspect(path)
            return file, None if problem else use(pixels), problem

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            start = 0
            while start < len(paths) and (limit is None or len(found) < limit):
                missing = _AT_ONCE if limit is None else min(_AT_ONCE, limit - len(found))
                some, start = paths[start : start + missing], start + missing
                for path, (file, used, problem) in zip(some, pool.map(inspect, some), strict=True):
                    if problem:
                        problems.append(f"{path}: {problem}")
                    else:
                        found.append((file, used))
        if problems:
            listed = ";\n  ".join(problems[:10] + ["..."] * (len(problems) > 10))
            summary = (
                f"{len(problems)} of {len(paths)} image files that cannot be used:\n  {listed}"
            )
            if self.on_error == "raise" or not found:
                raise ValueError(
                    f"folder:{self.path} must hold readable images. Remove or repair the others, "
                    "or leave them out with on_error='skip' (train and evaluate: --on_error=skip). "
                    f"Received: {summary}"
                )
            logging.warning("Skipped: %s", summary)
        return found

    def _inspect(self, path):
        """Return an `ImageFile`, its pixels and None; or None, None and what is wrong."""
        try:
            with open(path, "rb") as opened:
                file = opened.read()
        except OSError as error:
            return None, None, f"cannot be opened ({error.strerror})"
        try:
            header = pictures.header(file)
            if header.height * header.width > self.max_pixels:
                announced = f"{header.height} x {header.width}"
                return None, None, f"{announced} is more than max_pixels={self.max_pixels}"
            pixels = self._decoded(file, header)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return (
                None,
                None,
                f"more than max_pixels={self.max_pixels} or than Pillow opens: {error}",
            )
        except tf.errors.InvalidArgumentError as error:
            reason = error.message.partition("}} ")[2] or error.message
            return None, None, f"corrupt or cut short ({reason.partition(' [Op:')[0]})"
        except ValueError as error:
            return None, None, str(error)
        except Exception as error:  # Pillow's readers can raise anything for damaged files.
            return None, None, f"corrupt or cut short ({error})" if str(error) else "corrupt"
        size = pixels.shape[:2]
        if min(size) < self.shaping.min_size:
            return None, None, f"{by(size)} is smaller than min_size={self.shaping.min_size}"
        orientation = header.orientation if self._turns(header) else 1
        return ImageFile(path, size, header.decoder, orientation), pixels, None

    def _turns(self, header):
        return self.exif_orientation and header.decoder != "pillow"

    def _decoded(self, file, header):
        """Decode a file eagerly to uint8 `(H, W, 3)`."""
        if header.decoder == "pillow":
            return pictures.decode(file, self.exif_orientation, self.max_pixels)
        pixels = _by_tensorflow(file, header.decoder).numpy()
        return pictures.turned(pixels, header.orientation) if self._turns(header) else pixels

    def _decode_later(self, path, decoder):
        """Decode a file in a graph. Only Pillow also rotates it."""
        if decoder != "pillow":
            return _by_tensorflow(tf.io.read_file(path), decoder)

        def by_pillow(path):
            with open(path, "rb") as opened:
                return pictures.decode(opened.read(), self.exif_orientation, self.max_pixels)

        return tf.numpy_function(by_pillow, [path], tf.uint8)

    def _paths(self):
        if not os.path.isdir(self.path):
            raise ValueError(
                f"folder:PATH must be an existing folder. Received: folder:{self.path}"
            )
        paths, others, links = [], [], []
        for parent, folders, names in os.walk(self.path, onerror=_raise, followlinks=False):
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += filter(os.path.islink, (os.path.join(parent, name) for name in folders))
            for name in names:
                if not name.startswith("."):
                    is_image = name.lower().endswith(EXTENSIONS)
                    (paths if is_image else others).append(os.path.join(parent, name))
        if not paths:
            found = f"{len(others)} other files, such as {min(others)}" if others else "no files"
            raise ValueError(
                f"folder:{self.path} must hold images ({', '.join(EXTENSIONS)}). Received: {found}"
            )
        _warn_of_other_images(others)
        if links:
            warnings.warn(
                f"Skipped {len(links)} links to folders, such as {min(links)}. Name the folders "
                "themselves to use their images.",
                stacklevel=2,
            )
        return sorted(paths)


def _raise(error):
    """Stop at a folder that cannot be read; `os.walk` would leave it out."""
    raise error


def _warn_of_other_images(paths):
    """Warn about files that are skipped although they look like images."""
    paths = sorted(path for path in paths if path.lower().rpartition(".")[2] in _OTHER_KINDS)
    if paths:
        listed = ", ".join(paths[:10] + ["..."] * (len(paths) > 10))
        warnings.warn(
            f"Skipped {len(paths)} files that look like images of formats other than "
            f"{', '.join(EXTENSIONS)}. Convert them to use them. Skipped: {listed}",
            stacklevel=2,
        )


def _by_tensorflow(file, decoder):
    if decoder == "png_16":
        return from_16_bits(tf.io.decode_png(file, channels=3, dtype=tf.uint16))
    return decoded(file)


def _turned_later(pixels, orientation):
    """Apply `pictures.turned` in a graph."""
    branches = [lambda value=value: pictures.turned(pixels, value) for value in range(1, 9)]
    return tf.switch_case(orientation - 1, branches)
