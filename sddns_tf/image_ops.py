"""Batched image arithmetic: resampling, color and blur as matrix products.

Everything here takes a whole batch, runs inside a compiled graph (XLA included) and needs neither
`gather` nor a loop over images. A resized crop with its flip is linear and separable, so it is two
small matrices per image: `rows @ image @ columns^T`.

Inside this module and `views` images are *planes*, `(..., 3, H, W)`: a matrix product then acts on
whole rows and columns of a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from sddns_tf.types import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ITU-R 601, as in Pillow's "L" mode.
LUMA = (0.299, 0.587, 0.114)

RESIZES = ("squash", "crop")

_JPEG = b"\xff\xd8\xff"


def bicubic_kernel(x: tf.Tensor, a: float = -0.5) -> tf.Tensor:
    """Evaluate Keys' cubic convolution kernel.

    Args:
        x: Float tensor of any shape, distances in (scaled) pixels.
        a: Slope at distance 1. Pillow's bicubic has -0.5, PyTorch's and OpenCV's -0.75.

    Returns:
        Float tensor of the shape of `x`: zero beyond distance 2.

    Reference:
        R. Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    x = tf.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = a * (((x - 5.0) * x + 8.0) * x - 4.0)
    return tf.where(x < 1.0, near, tf.where(x < 2.0, far, tf.zeros_like(x)))


def resampling_matrix(
    in_size: Array | int,
    out_size: Array | int,
    start: Array | float = 0.0,
    extent: Array | None = None,
) -> tf.Tensor:
    """Return matrices that crop an interval of pixels and resize it, antialiased bicubic.

    Equal to cropping the interval first and then resizing it with Pillow's `BICUBIC`, before
    rounding: pixels outside the interval have no weight.

    Args:
        in_size: Number of pixels of the input along the axis; int or scalar int tensor.
        out_size: Number of pixels of the output; int or scalar int tensor.
        start: First pixel of the interval; float tensor `(...)`, whole numbers.
        extent: Number of pixels of the interval; float tensor `(...)`. Defaults to `in_size`.

    Returns:
        Float32 tensor `(..., out_size, in_size)`, each row sums to 1.

    Example:
        >>> start, extent = tf.constant([4.0]), tf.constant([20.0])
        >>> columns = resampling_matrix(32, 16, start, extent)
        >>> columns.shape
        TensorShape([1, 16, 32])
    """
    # Not `[..., tf.newaxis, tf.newaxis]`, which OpenVINO takes for 0 on a scalar.
    start, extent = (
        tf.expand_dims(tf.expand_dims(tf.cast(value, tf.float32), -1), -1)
        for value in (start, in_size if extent is None else extent)
    )
    scale = extent / tf.cast(out_size, tf.float32)
    outputs = tf.cast(tf.range(out_size), tf.float32)[:, tf.newaxis]
    inputs = tf.cast(tf.range(in_size), tf.float32)[tf.newaxis, :]
    center = start + (outputs + 0.5) * scale
    weights = bicubic_kernel((inputs + 0.5 - center) / tf.maximum(scale, 1.0))
    inside = tf.logical_and(inputs >= start, inputs < start + extent)
    weights = tf.where(inside, weights, tf.zeros_like(weights))
    return weights / tf.reduce_sum(weights, axis=-1, keepdims=True)


def gaussian_matrix(size: int, sigma: Array) -> tf.Tensor:
    """Return matrices that blur along one axis with a Gaussian, renormalized at the edges.

    Args:
        size: Number of pixels along the axis, int.
        sigma: Standard deviations in pixels, float tensor `(...)`; 0 gives the identity.

    Returns:
        Float32 tensor `(..., size, size)`, each row sums to 1.
    """
    sigma = tf.maximum(sigma, 1e-3)[..., tf.newaxis, tf.newaxis]
    positions = tf.range(size, dtype=tf.float32)
    distance = positions[:, tf.newaxis] - positions[tf.newaxis, :]
    weights = tf.exp(-0.5 * tf.square(distance / sigma))
    return weights / tf.reduce_sum(weights, axis=-1, keepdims=True)


def to_planes(images: Array) -> tf.Tensor:
    """Map images `(..., H, W, 3)` of any number type to float32 planes `(..., 3, H, W)`."""
    images = tf.cast(images, tf.float32)
    rank = images.shape.rank
    return tf.transpose(images, [*range(rank - 3), rank - 1, rank - 3, rank - 2])


def from_planes(planes: Array) -> tf.Tensor:
    """Map planes `(..., 3, H, W)` to images `(..., H, W, 3)`."""
    rank = planes.shape.rank
    return tf.transpose(planes, [*range(rank - 3), rank - 2, rank - 1, rank - 3])


def resample(planes: Array, rows: Array, columns: Array) -> tf.Tensor:
    """Apply one matrix along the height and one along the width.

    Args:
        planes: `(..., 3, H, W)`; leading axes may broadcast against those of the matrices.
        rows: `(..., h, H)`.
        columns: `(..., w, W)`.

    Returns:
        Planes `(..., 3, h, w)`.
    """
    planes = tf.matmul(rows[..., tf.newaxis, :, :], planes)
    return tf.matmul(planes, columns[..., tf.newaxis, :, :], transpose_b=True)


def resize(images: Array, height: int, width: int) -> tf.Tensor:
    """Resize images with antialiased bicubic interpolation, as Pillow does, without rounding.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`; H and W may be unknown at trace time.
        height: Rows of the output, int.
        width: Columns of the output, int.

    Returns:
        Float32 in 0-255, `(B, height, width, 3)`. The same pixels if the size is right.
    """
    if images.shape[1:3] == (height, width):
        return tf.cast(images, tf.float32)
    in_height, in_width = (
        static if static is not None else tf.shape(images)[axis]
        for axis, static in enumerate(images.shape[1:3], start=1)
    )
    rows = resampling_matrix(in_height, height)
    columns = resampling_matrix(in_width, width)
    resized = from_planes(resample(to_planes(images), rows, columns))
    return tf.clip_by_value(resized, 0.0, 255.0)


def fit(images: Array, height: int, width: int, mode: str = "squash") -> tf.Tensor:
    """Bring images of any shape to one shape.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`; H and W may be unknown at trace time.
        height: Rows of the output, int.
        width: Columns of the output, int.
        mode: `"squash"` changes the aspect ratio if it differs; `"crop"` first cuts off the excess,
            equally on two sides.

    Returns:
        Float32 in 0-255, `(B, height, width, 3)`.
    """
    if mode == "crop":
        images = center_crop(images, height, width)
    return resize(images, height, width)


def center_crop(images: Array, height: int, width: int) -> tf.Tensor:
    """Return the largest central part with the aspect ratio of `height` to `width`.

    Args:
        images: `(B, H, W, C)`; H and W may be unknown at trace time.
        height: Int.
        width: Int.

    Returns:
        `(B, h, w, C)`, of the dtype of `images`.
    """
    rows, columns = images.shape[1:3]
    if None in (rows, columns):
        rows, columns = tf.unstack(tf.shape(images)[1:3])
        smaller, larger = tf.minimum, tf.maximum
    else:
        smaller, larger = min, max
    new_rows = smaller(rows, larger(1, columns * height // width))
    new_columns = smaller(columns, larger(1, rows * width // height))
    top, left = (rows - new_rows) // 2, (columns - new_columns) // 2
    return images[:, top : top + new_rows, left : left + new_columns]


def decoded(file: Array) -> tf.Tensor:
    """Decode a JPEG, PNG, BMP or GIF file to the pixels that Pillow gives.

    Args:
        file: Scalar string tensor, the file's bytes.

    Returns:
        uint8 `(H, W, 3)`, of a GIF the first frame.
    """
    # By default TensorFlow decodes JPEG by a faster transform, nearly a gray level darker. To a
    # detector of images from a fixed camera that is a difference.
    return tf.cond(
        tf.strings.substr(file, 0, len(_JPEG)) == _JPEG,
        lambda: tf.io.decode_jpeg(file, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(file, channels=3, expand_animations=False),
    )


def from_16_bits(values: Any) -> Array:
    """Convert 16-bit values to 8 bits: 0-65535 to 0-255, whatever range an image uses.

    Args:
        values: uint16 array or tensor of any shape.

    Returns:
        uint8 of the same shape and kind: `value // 257`, so that 65535 becomes 255.
    """
    if tf.is_tensor(values):
        return tf.cast(values // 257, tf.uint8)
    return (values // 257).astype("uint8")


def normalize(
    images: Array, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tf.Tensor:
    """Scale images in 0-255 to the normalized floats a backbone takes.

    Args:
        images: uint8 or float in 0-255, `(..., 3)`.
        mean: Three floats, mean of each channel for images scaled to 0-1.
        std: Three floats, standard deviation of each channel for images scaled to 0-1.

    Returns:
        Float32 tensor of the shape of `images`: `(images / 255 - mean) / std`.
    """
    center, spread = tf.constant(mean, tf.float32), tf.constant(std, tf.float32)
    return (tf.cast(images, tf.float32) - 255.0 * center) / (255.0 * spread)


def nan_where_images_are(images: Array, values: Array) -> tf.Tensor:
    """Make what was computed of an image NaN if a pixel is.

    A network need not do that: in a graph, a convolution and its ReLU are one operation, which may
    turn a NaN into zero.

    Args:
        images: `(B, H, W, 3)`; integers have no NaN.
        values: Float `(B, ...)`.

    Returns:
        The values, NaN for images with a NaN.
    """
    images = tf.convert_to_tensor(images)
    if not images.dtype.is_floating:
        return values
    spoiled = tf.reduce_any(tf.math.is_nan(images), axis=[1, 2, 3])
    spoiled = tf.reshape(spoiled, [-1, *[1] * (values.shape.rank - 1)])
    return tf.where(spoiled, float("nan"), values)


def shift_hue(planes: Array, shift: Array) -> tf.Tensor:
    """Rotate the hue in HSV space, as Pillow and torchvision do; value and saturation stay.

    Args:
        planes: Float `(..., 3, H, W)`.
        shift: Turns of the color circle, float tensor `(...)`; -0.5 to 0.5.

    Returns:
        Planes of the same shape.
    """
    red, green, blue = tf.unstack(planes, axis=-3)
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    scale = 1.0 / tf.maximum(chroma, 1e-6)
    sixths = tf.where(
        tf.equal(value, red),
        (green - blue) * scale,
        tf.where(tf.equal(value, green), (blue - red) * scale + 2.0, (red - green) * scale + 4.0),
    )
    hue = sixths / 6.0 + shift[..., tf.newaxis, tf.newaxis]

    def channel(offset):
        turned = hue + offset
        turned -= tf.floor(turned)  # `floormod` calls a function for each pixel.
        return value - chroma * tf.clip_by_value(2.0 - tf.abs(6.0 * turned - 2.0), 0.0, 1.0)

    return tf.stack([channel(5 / 6), channel(3 / 6), channel(1 / 6)], axis=-3)


def jitter_color(
    planes: Array,
    brightness: Array,
    contrast: Array,
    saturation: Array,
    hue: Array,
    contrast_first: Array,
    saturation_first: Array,
) -> tf.Tensor:
    """Change brightness, contrast, saturation and hue of each image, in the image's own order.

    Brightness scales, contrast blends with the mean gray value, saturation blends with the gray
    image. Without rounding and clipping in between, these three commute with one another. They
    commute with the hue shift too, except for *which* gray value they blend with: the one before or
    after the shift. So every order of the four is one expression with two choices. (The mean gray
    value after the shift is that of the saturated image: saturation before the shift does not
    preserve it.)

    Args:
        planes: Float in 0-255, `(..., 3, H, W)`.
        brightness: Factors, float tensor `(...)`; 1 changes nothing.
        contrast: Factors, as for `brightness`.
        saturation: Factors, as for `brightness`.
        hue: Turns of the color circle, float tensor `(...)`; 0 changes nothing.
        contrast_first: Bool tensor `(...)`: contrast acts before the hue shift.
        saturation_first: Bool tensor `(...)`: saturation acts before the hue shift.

    Returns:
        Planes of the same shape, not clipped.
    """

    def per_image(value):
        return tf.cast(value, tf.float32)[..., tf.newaxis, tf.newaxis]

    brightness, contrast, saturation, contrast_first, saturation_first = map(
        per_image, (brightness, contrast, saturation, contrast_first, saturation_first)
    )
    rest = 1.0 - saturation
    to_gray = tf.broadcast_to([LUMA], tf.concat([tf.shape(hue), [1, 3]], 0))
    gray = mix_channels(to_gray, planes)
    # Three rows for the saturated colors without the gray from before the shift; one for gray.
    to_colors = saturation * tf.eye(3) + rest * (1.0 - saturation_first) * gray_matrix()
    mixed = mix_channels(tf.concat([to_colors, to_gray], axis=-2), shift_hue(planes, hue))
    gray_mean, shifted_mean = (
        tf.reduce_mean(plane, axis=(-3, -2, -1))[..., tf.newaxis, tf.newaxis]
        for plane in (gray, mixed[..., 3:, :, :])
    )
    blended = saturation_first * gray_mean + (1.0 - saturation_first) * shifted_mean
    saturated_mean = saturation * shifted_mean + rest * blended
    mean = contrast_first * gray_mean + (1.0 - contrast_first) * saturated_mean
    saturated = mixed[..., :3, :, :] + (rest * saturation_first)[..., tf.newaxis] * gray
    offset = (1.0 - contrast) * mean
    return brightness[..., tf.newaxis] * (
        contrast[..., tf.newaxis] * saturated + offset[..., tf.newaxis]
    )


def gray_matrix() -> tf.Tensor:
    """Return the matrix `(3, 3)` that sets all channels of a pixel to its gray value."""
    return tf.ones([3, 1]) * tf.constant([LUMA])


def mix_channels(matrices: Array, planes: Array) -> tf.Tensor:
    """Multiply the channels of each pixel by a matrix.

    A matrix product even where a sum would do: XLA fuses elementwise operations into one loop, and
    there computes the inputs once for each channel of the outputs.

    Args:
        matrices: `(..., M, 3)`.
        planes: `(..., 3, H, W)`.

    Returns:
        Planes `(..., M, H, W)`.
    """
    height, width = planes.shape[-2:]
    lead = tf.shape(planes)[:-3]
    pixels = tf.reshape(planes, tf.concat([lead, [3, height * width]], 0))
    rows = matrices.shape[-2]
    return tf.reshape(tf.matmul(matrices, pixels), tf.concat([lead, [rows, height, width]], 0))


def solarize(planes: Array, threshold: float = 128.0) -> tf.Tensor:
    """Invert every value at or above the threshold; planes in 0-255 of any shape."""
    return tf.where(planes < threshold, planes, 255.0 - planes)
