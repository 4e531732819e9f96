"""Pictures as Pillow holds them: what a file's header says, and pixels as uint8 RGB.

Without TensorFlow, so that users of a `.tflite` file can read images as the package does.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# A few kilobytes can decode to gigabytes. Files with more pixels are not decoded.
MAX_PIXELS = 64_000_000

_ORIENTATION = 0x0112
_FLIPPED_LEFT_RIGHT = (2, 3, 6, 7)
_FLIPPED_UP_DOWN = (3, 4, 7, 8)
_BIT_DEPTH_OF_PNG = 24  # Offset of the byte: Pillow does not report it for 16-bit color.


class Header(NamedTuple):
    """What a file says about its image before it is decoded.

    Attributes:
        height: Rows, as stored.
        width: Columns, as stored.
        decoder: `"tensorflow"` where TensorFlow's pixels are right, `"png_16"` for a PNG of 16 bits
            a channel, else `"pillow"`.
        orientation: EXIF orientation, 1 to 8.
    """

    height: int
    width: int
    decoder: str
    orientation: int


def header(file: bytes) -> Header:
    """Return the header of an image file.

    TensorFlow takes the indices of a palette BMP for gray values, does not read TIFF and WebP, and
    turns transparent parts of a GIF black: Pillow decodes those formats.

    Args:
        file: Contents of the file.

    Returns:
        `Header`.

    Raises:
        ValueError: If it is not an image in one of `FORMATS`, or its header is damaged.
        PIL.Image.DecompressionBombError: If it has more pixels than Pillow opens.
    """
    if not file:
        raise ValueError("Expected an image. Received: an empty file")
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
            decoder = "pillow"
            if picture.format in ("JPEG", "MPO"):
                decoder = "tensorflow"
            elif picture.format == "PNG":
                decoder = "png_16" if file[_BIT_DEPTH_OF_PNG] == 16 else "tensorflow"
            # To look for it, Pillow decodes a PNG.
            is_sought = picture.format != "PNG" or may_be_turned(file)
            orientation = orientation_of(picture) if is_sought else 1
            return Header(picture.height, picture.width, decoder, orientation)
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"Expected a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image. Received: a file of "
            "another kind, or with a damaged header"
        ) from None


def decode(file: bytes, exif_orientation: bool = True, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of an image file, or of the first image if it holds several.

    Args:
        file: Contents of the file.
        exif_orientation: Whether to turn the image as its EXIF data say.
        max_pixels: Int; files with more pixels are not decoded.

    Returns:
        uint8 `(H, W, 3)`.

    Raises:
        ValueError: If it has more pixels.
        Exception: Whatever Pillow raises if the file is damaged.
    """
    with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
        if picture.height * picture.width > max_pixels:
            raise ValueError(
                f"Expected at most {max_pixels} pixels. "
                f"Received: {picture.height} x {picture.width}"
            )
        return pixels(picture, exif_orientation)


def pixels(picture: Image.Image, exif_orientation: bool = True) -> np.ndarray:
    """Return pixels of a picture of any mode.

    A palette becomes its colors, gray becomes RGB, an alpha channel is dropped, and 16 bits become
    8 by `value // 257`, whatever range the picture uses. (Of 16-bit color Pillow gives the upper 8
    bits, which are at most 1 more.)

    Args:
        picture: `PIL.Image.Image`.
        exif_orientation: Whether to turn the picture as its EXIF data say.

    Returns:
        uint8 `(H, W, 3)`.

    Raises:
        ValueError: If it has 32-bit values outside 0-255, floats in 0-1, or colors that Pillow does
            not convert.
        Exception: Whatever Pillow raises if the file is damaged.
    """
    if picture.format != "TIFF":
        picture.load()  # Now, because a PNG reads its EXIF data and hides what is damaged.
    orientation = orientation_of(picture)
    array = _rgb(picture)
    if picture.format == "TIFF":  # Pillow turned it on loading.
        return (
            array if exif_orientation else turned(array, {6: 8, 8: 6}.get(orientation, orientation))
        )
    return turned(array, orientation) if exif_orientation else array


def shown_size(picture: Image.Image) -> tuple[int, int]:
    """Return the width and height of a picture as `pixels` gives it, turned."""
    if picture.format != "TIFF" and orientation_of(picture) >= 5:
        return picture.size[::-1]
    return picture.size  # Pillow has turned a TIFF.


def _rgb(picture):
    if picture.mode.startswith("I;16"):
        return _repeated((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        values = np.asarray(picture)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 255):
            raise ValueError(f"32-bit pixels must lie in 0-255. Received: {low:.6g} to {high:.6g}")
        if picture.mode == "F" and 0 < high <= 1:
            raise ValueError(
                "Float pixels must lie in 0-255: multiply those in 0-1 by 255. "
                f"Received: {low:.6g} to {high:.6g}"
            )
        return _repeated(np.rint(values).astype(np.uint8))
    for premultiplied, mode in (("La", "LA"), ("RGBa", "RGBA")):
        if picture.mode == premultiplied:
            picture = picture.convert(mode)
    if "transparency" in picture.info:  # Pillow warns if it goes straight to RGB.
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))


def _repeated(gray):
    return np.repeat(gray[..., np.newaxis], 3, axis=-1)


def may_be_turned(file: bytes) -> bool:
    """Return whether a JPEG or PNG file may have an orientation: without these words it has none.

    EXIF data are under "Exif", "eXIf" or "exif". XMP has the word Orientation, unless a PNG
    compresses it, and then still its keyword.
    """
    return any(word in file for word in (b"xif", b"XIf", b"rientation", b"com.adobe.xmp"))


def orientation_of(picture: Image.Image) -> int:
    """Return the EXIF orientation of a picture, 1 to 8; 1 if it has none that can be read."""
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Damaged EXIF data makes Pillow's parsers raise all kinds of errors.
        return 1
    return orientation if orientation in range(1, 9) else 1


def turned(image: Any, orientation: int) -> Any:
    """Return an image turned so that what its EXIF orientation calls the top is at the top.

    Args:
        image: Array or tensor `(H, W, C)`.
        orientation: Int, 1 to 8.

    Returns:
        The same, of shape `(H, W, C)` or `(W, H, C)`.

    Reference:
        CIPA DC-008 (EXIF 2.32), tag 274.
    """
    is_array = isinstance(image, np.ndarray)
    if orientation >= 5:
        image = np.swapaxes(image, 0, 1) if is_array else _transposed(image)
    if orientation in _FLIPPED_LEFT_RIGHT:
        image = image[:, ::-1]
    if orientation in _FLIPPED_UP_DOWN:
        image = image[::-1]
    return np.ascontiguousarray(image) if is_array else image


def _transposed(image):
    import tensorflow as tf  # Whoever has a tensor has TensorFlow.

    return tf.transpose(image, [1, 0, 2])
