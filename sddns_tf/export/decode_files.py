"""Decode image files inside a served graph, with a status for each file instead of an error.

Files that TensorFlow's operations would decode to pixels other than those a viewer shows are
rejected with a status and never scored: BMP files with a color palette or compression, GIF files
whose first frame is transparent or does not fill the picture, TIFF and WebP. EXIF orientation is
not applied.

A server may put the requests of several clients into one batch, so a bad file must not make the
whole batch fail. Files are therefore decoded by a `tf.data` pipeline inside the graph, which can
skip elements that raise an error. The files that are missing at the end could not be decoded.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.types import Array

FORMATS = "JPEG, PNG, BMP or GIF"
_KIND_NOT_DECODED = (
    "is of a kind that is not supported: a BMP with a palette or compression, or a GIF whose "
    "first frame is transparent or does not fill the picture"
)
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
_OTHER_PIXELS = -1  # Instead of a number of pixels: the decoder would give wrong ones.
_GRAY_PALETTE = bytes(value for gray in range(256) for value in (gray, gray, gray, 0))
# Largest number of blocks read from a GIF file. A block has at most 255 bytes, so this allows 16 MB
# for the first frame, and stops files that were crafted to take long.
_GIF_BLOCKS = 65_536
_AT_ONCE = 8  # Files of a request that are decoded in parallel, if the server has as many threads.


def decode(
    image_bytes: Array, size: tuple[int, int], max_pixels: int, resize: str = "squash"
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decode image files to images of one size, each with a status instead of an error.

    Args:
        image_bytes: String tensor `(B,)`: JPEG, PNG, BMP or GIF files of any size, including
            gray and transparent ones. The first frame of an animated GIF is used.
        size: `(height, width)` in pixels to which images are resized.
        max_pixels: Images with more pixels, according to their header, are not decoded.
        resize: How images of another aspect ratio are resized: see `image_ops.fit`.

    Returns:
        Images, float32 `(B, height, width, 3)` in 0-255 (antialiased bicubic, not rounded), black
        if a file could not be decoded; and status, string `(B,)`, empty if it could.

    Example:
    >>> images, status = decode(tf.constant([png, png[:100]]), (32, 32), max_pixels=64_000_000)
    >>> status.numpy()
    array([b'', b'cannot be decoded: the file is damaged or cut off'], dtype=object)
    """
    kinds = _kinds(image_bytes)
    count = tf.size(image_bytes)

    def decode_one(
        index: Array, file: Array, kind: Array
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        file, pixels = _measured(file, kind)
        no_image = tf.zeros([1, *size, 3])
        image = tf.cond(
            (pixels <= max_pixels) & (pixels != _OTHER_PIXELS),
            lambda: image_ops.fit(_decoded(file)[tf.newaxis], *size, resize),
            lambda: no_image,
        )
        return index, pixels, tf.ensure_shape(image, no_image.shape)[0]

    # Row 0 stands for all files that could not be decoded.
    nothing = tf.data.Dataset.from_tensors((0, tf.zeros([], tf.int64), tf.zeros([*size, 3])))
    files = tf.data.Dataset.from_tensor_slices((tf.range(1, count + 1), image_bytes, kinds))
    images = files.map(decode_one, _AT_ONCE, deterministic=False).ignore_errors()
    rows = nothing.concatenate(images).batch(tf.cast(count, tf.int64) + 1)
    index, pixels, images = rows.with_options(_options()).get_single_element()
    row_of = tf.scatter_nd(index[:, tf.newaxis], tf.range(tf.size(index)), [count + 1])[1:]
    status = _status(kinds, tf.gather(pixels, row_of), max_pixels)
    return tf.gather(images, row_of), status


def _kinds(files: Array) -> tf.Tensor:
    """Return the index of each file's format in `_BEGINNINGS`, or -1 for other formats."""
    matches = [tf.strings.substr(files, 0, len(text)) == text for text in _BEGINNINGS]
    kinds = tf.argmax(tf.cast(matches, tf.int32), axis=0, output_type=tf.int32)
    return tf.where(tf.reduce_any(matches, axis=0), kinds, -1)


def _options() -> tf.data.Options:
    """Return options without optimization, which would take longer than a request's pipeline."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return options


def _status(kinds: Array, pixels: Array, max_pixels: int) -> tf.Tensor:
    number = tf.strings.as_string(pixels)
    too_large = tf.strings.join(["has ", number, f" pixels; at most {max_pixels} are decoded"])
    status = tf.where(pixels > max_pixels, too_large, "")
    status = tf.where(pixels == 0, "cannot be decoded: the file is damaged or cut off", status)
    status = tf.where(pixels == _OTHER_PIXELS, _KIND_NOT_DECODED, status)
    return tf.where(kinds < 0, f"is not a {FORMATS} file", status)


def _decoded(file: Array) -> tf.Tensor:
    """Return the pixels of a file as uint8, even of a PNG with 16 bits per channel."""
    is_16_bits = (tf.strings.substr(file, 0, 4) == b"\x89PNG") & (
        tf.strings.substr(file, 24, 1) == b"\x10"
    )
    image = tf.cond(
        is_16_bits,
        lambda: image_ops.from_16_bits(tf.io.decode_png(file, channels=3, dtype=tf.uint16)),
        lambda: image_ops.decoded(file),
    )
    return tf.ensure_shape(image, [None, None, 3])


def _measured(file: Array, kind: Array) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a file and the number of pixels that its header states, or fail if there is none.

    The number is `_OTHER_PIXELS` if the decoder would not give the pixels that the file shows.
    """
    readers = (_jpeg, _png, _bmp, _gif, _neither)
    file, sides, is_right = tf.switch_case(kind, [lambda read=read: read(file) for read in readers])
    sides = tf.cast(sides, tf.int64)
    with tf.control_dependencies([tf.debugging.assert_positive(sides)]):
        pixels = tf.where(is_right, tf.reduce_prod(sides), tf.constant(_OTHER_PIXELS, tf.int64))
        return tf.identity(file), pixels


def _jpeg(file: Array) -> tuple[Array, Array, Array]:
    return file, tf.image.extract_jpeg_shape(file)[:2], True


def _png(file: Array) -> tuple[Array, Array, Array]:
    # The first chunk holds its length, "IHDR", then width and height, big-endian.
    sides = tf.io.decode_raw(tf.strings.substr(file, 16, 8), tf.int32, little_endian=False)
    return file, sides, True


def _bmp(file: Array) -> tuple[Array, Array, Array]:
    # Length of the header, width, height, planes and bits, compression. The height is negative if
    # rows are stored from the top.
    header = tf.io.decode_raw(tf.strings.substr(file, 14, 20), tf.int32)
    bits = tf.bitwise.right_shift(header[3], 16)
    is_gray = tf.strings.substr(file, 14 + header[0], 1024) == _GRAY_PALETTE
    is_color = (bits == 24) | (bits == 32)
    is_plain = (header[0] >= 40) & (header[4] == 0)
    return file, tf.abs(header[1:3]), is_plain & (is_color | ((bits == 8) & is_gray))


def _neither(file: Array) -> tuple[Array, Array, Array]:
    return file, tf.zeros([2], tf.int32), True


def _gif(file: Array) -> tuple[Array, Array, Array]:
    """Return the file cut after its first frame, the frame's sides, and whether it is supported.

    The decoder would unpack all frames, and a small file may have a great many. It also paints
    transparent pixels, and the area around a small frame, black.
    """
    data = tf.cast(tf.io.decode_raw(file, tf.uint8), tf.int32)

    def colors(flags: Array) -> tf.Tensor:
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)

    canvas = tf.linalg.matvec(tf.reshape(data[6:10], [2, 2]), [1, 256])

    def next_block(_: Array, start: Array, inside: Array, sides: Array, is_right: Array) -> Any:
        def next_part() -> tuple[Array, ...]:  # Of an extension or a frame; an empty part ends it.
            length = data[start]
            inside_next = tf.where(length > 0, inside, 0)
            found = tf.logical_and(inside == 2, length == 0)
            return found, start + 1 + length, inside_next, sides, is_right

        def extension() -> tuple[Array, ...]:
            # The lowest bit of the flags in a graphic control extension (0xF9).
            is_transparent = (data[start + 1] == 0xF9) & (data[start + 3] % 2 == 1)
            return False, start + 2, 1, sides, is_right & ~is_transparent

        def frame() -> tuple[Array, ...]:
            low_and_high = tf.reshape(data[start + 1 : start + 9], [4, 2])
            place_and_sides = tf.linalg.matvec(low_and_high, [1, 256])
            pixels = start + 10 + colors(data[start + 9]) + 1
            fills = tf.reduce_all(place_and_sides == tf.concat([[0, 0], canvas], axis=0))
            return False, pixels, 2, place_and_sides[2:], is_right & fills

        introducer = tf.where(inside > 0, 0, data[start])
        known = tf.reduce_any(introducer == [0x21, 0x2C]) | (inside > 0)
        with tf.control_dependencies([tf.debugging.Assert(known, ["no frame"])]):
            which = tf.where(inside > 0, 0, tf.where(introducer == 0x21, 1, 2))
        return tf.switch_case(which, [next_part, extension, frame])

    found, end, _, sides, is_right = tf.while_loop(
        lambda found, *_: ~found,
        next_block,
        (
            tf.constant(False),
            13 + colors(data[10]),
            tf.constant(0),
            tf.zeros([2], tf.int32),
            tf.constant(True),
        ),
        maximum_iterations=_GIF_BLOCKS,
        parallel_iterations=1,
    )
    with tf.control_dependencies([tf.debugging.Assert(found, ["no frame"])]):
        return tf.strings.join([tf.strings.substr(file, 0, end), b"\x3b"]), sides, is_right
