"""Image files to images inside a served graph: of each what it is, how large, and if it is whole.

One file that is no image must not fail the requests that a server put into the same batch. So files
are decoded by a `tf.data` pipeline inside the graph, the one construct of TensorFlow that lets go
of an element that raised an error; what is missing in the end is what could not be decoded.
"""

import tensorflow as tf

from sddns_tf import image_ops

FORMATS = "JPEG, PNG, BMP or GIF"
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
# Of a GIF file up to the end of its first frame: one is read after the other, and there are at most
# 255 bytes in a block, so that 16 MB are enough for any frame, and a file made to take long is not.
_GIF_BLOCKS = 65_536
_AT_ONCE = 8  # Files of one request; no more are decoded at once than the server has threads.


def decode(image_bytes, size, max_pixels, resize="squash"):
    """Image files to images of one size, each with a status instead of an error.

    Args:
        image_bytes: String tensor `(B,)`: JPEG, PNG, BMP or GIF files (of which the first frame
            counts), of any sizes, grey or with transparency too.
        size: `(height, width)` in pixels, of the images.
        max_pixels: Images of more pixels are not decoded; their size is read from the header.
        resize: How images of another shape are brought to the size: see `image_ops.fit`.

    Returns:
        Images, float32 `(B, height, width, 3)` in 0-255 (antialiased bicubic, not rounded), black
        where there is none; and status, string `(B,)`, empty where there is one.

    Example:
    >>> images, status = decode(tf.constant([png, png[:100]]), (32, 32), max_pixels=64_000_000)
    >>> status.numpy()
    array([b'', b'cannot be decoded: the file is damaged or cut off'], dtype=object)
    """
    kinds = _kinds(image_bytes)
    count = tf.size(image_bytes)

    def decode_one(index, file, kind):
        file, pixels = _measured(file, kind)
        no_image = tf.zeros([1, *size, 3])
        image = tf.cond(
            pixels <= max_pixels,
            lambda: image_ops.fit(_decoded(file)[tf.newaxis], *size, resize),
            lambda: no_image,
        )
        return index, pixels, tf.ensure_shape(image, no_image.shape)[0]

    # Row 0 stands for all files that give no image.
    nothing = tf.data.Dataset.from_tensors((0, tf.zeros([], tf.int64), tf.zeros([*size, 3])))
    files = tf.data.Dataset.from_tensor_slices((tf.range(1, count + 1), image_bytes, kinds))
    images = files.map(decode_one, _AT_ONCE, deterministic=False).ignore_errors()
    rows = nothing.concatenate(images).batch(tf.cast(count, tf.int64) + 1)
    index, pixels, images = rows.with_options(_options()).get_single_element()
    row_of = tf.scatter_nd(index[:, tf.newaxis], tf.range(tf.size(index)), [count + 1])[1:]
    status = _status(kinds, tf.gather(pixels, row_of), max_pixels)
    return tf.gather(images, row_of), status


def _kinds(files):
    """Index of each file's format in `_BEGINNINGS`; -1 if it begins as none of them does."""
    matches = [tf.strings.substr(files, 0, len(text)) == text for text in _BEGINNINGS]
    kinds = tf.argmax(tf.cast(matches, tf.int32), axis=0, output_type=tf.int32)
    return tf.where(tf.reduce_any(matches, axis=0), kinds, -1)


def _options():
    """A pipeline that lives for one request is not worth rewriting and tuning."""
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return options


def _status(kinds, pixels, max_pixels):
    number = tf.strings.as_string(pixels)
    too_large = tf.strings.join(["has ", number, f" pixels; at most {max_pixels} are decoded"])
    status = tf.where(pixels > max_pixels, too_large, "")
    status = tf.where(pixels > 0, status, "cannot be decoded: the file is damaged or cut off")
    return tf.where(kinds < 0, f"is not a {FORMATS} file", status)


def _decoded(file):
    image = tf.io.decode_image(file, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def _measured(file, kind):
    """A file, and its number of pixels as its header tells. An error where it tells none."""
    readers = (_jpeg, _png, _bmp, _gif, _neither)
    file, sides = tf.switch_case(kind, [lambda read=read: read(file) for read in readers])
    sides = tf.cast(sides, tf.int64)
    with tf.control_dependencies([tf.debugging.assert_positive(sides)]):
        return tf.identity(file), tf.reduce_prod(sides)


def _jpeg(file):
    return file, tf.image.extract_jpeg_shape(file)[:2]


def _png(file):
    # The first chunk: its length, "IHDR", then width and height, the highest byte first.
    return file, tf.io.decode_raw(tf.strings.substr(file, 16, 8), tf.int32, little_endian=False)


def _bmp(file):
    # A negative height says that the rows go down.
    return file, tf.abs(tf.io.decode_raw(tf.strings.substr(file, 18, 8), tf.int32))


def _neither(file):
    return file, tf.zeros([2], tf.int32)


def _gif(file):
    """The file up to the end of its first frame, and the sides of that.

    The decoder would unpack all frames, of which a small file may hold very many.
    """
    data = tf.cast(tf.io.decode_raw(file, tf.uint8), tf.int32)

    def colors(flags):
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)

    def next_block(_, start, inside, sides):
        def next_part():  # Of an extension or of a frame; one of no bytes ends it.
            length = data[start]
            inside_next = tf.where(length > 0, inside, 0)
            found = tf.logical_and(inside == 2, length == 0)
            return found, start + 1 + length, inside_next, sides

        def extension():
            return False, start + 2, 1, sides

        def frame():
            low_and_high = tf.reshape(data[start + 5 : start + 9], [2, 2])
            pixels = start + 10 + colors(data[start + 9]) + 1
            return False, pixels, 2, tf.linalg.matvec(low_and_high, [1, 256])

        introducer = tf.where(inside > 0, 0, data[start])
        known = tf.reduce_any(introducer == [0x21, 0x2C]) | (inside > 0)
        with tf.control_dependencies([tf.debugging.Assert(known, ["no frame"])]):
            which = tf.where(inside > 0, 0, tf.where(introducer == 0x21, 1, 2))
        return tf.switch_case(which, [next_part, extension, frame])

    found, end, _, sides = tf.while_loop(
        lambda found, *_: ~found,
        next_block,
        (tf.constant(False), 13 + colors(data[10]), tf.constant(0), tf.zeros([2], tf.int32)),
        maximum_iterations=_GIF_BLOCKS,
        parallel_iterations=1,
    )
    with tf.control_dependencies([tf.debugging.Assert(found, ["no frame"])]):
        return tf.strings.join([tf.strings.substr(file, 0, end), b"\x3b"]), sides
