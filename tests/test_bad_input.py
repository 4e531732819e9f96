"""What comes through each door: folders, arrays, bytes sent to a server."""

import io
import warnings

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image

import sddns_tf
from sddns_tf import data, served_bytes

PHOTO = skimage.data.astronaut()[::4, ::4]  # 128 x 128
SIZE = (32, 32)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PALETTE = Image.fromarray(PHOTO).quantize(200)
CMYK = Image.fromarray(PHOTO).convert("CMYK")
DEEP = Image.fromarray(np.asarray(PHOTO[..., 0], np.uint16) * 257)
FRAMES = [Image.fromarray(PHOTO[::-1]).quantize(200)]
JPEG, PNG = encoded(PHOTO, "JPEG", quality=95), encoded(PHOTO, "PNG")

# Name, bytes, the pixels expected (None: refused), the largest mean error of them.
FILES = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], None, 0),
    "truncated.png": (PNG[: len(PNG) // 2], None, 0),
    "empty.png": (b"", None, 0),
    "text.png": (b"these are words", None, 0),
    "header_only.bmp": (encoded(PHOTO, "BMP")[:40], None, 0),
    "tiff.png": (encoded(PHOTO, "TIFF"), None, 0),
    "deep.png": (encoded(DEEP, "PNG"), np.repeat(PHOTO[..., :1], 3, -1), 0),
    "palette.png": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0),
    "grey.png": (encoded(PHOTO[..., 0], "PNG"), np.repeat(PHOTO[..., :1], 3, -1), 0),
    "cmyk.jpg": (encoded(CMYK, "JPEG", quality=95), PHOTO, 8),
    "animated.gif": (
        encoded(PALETTE, "GIF", save_all=True, append_images=FRAMES),
        np.asarray(PALETTE.convert("RGB")),
        0,
    ),
    "rotated.jpg": (encoded(PHOTO[:64], "JPEG", exif=exif(6), quality=95), PHOTO[:64], 3),
    "one_pixel.png": (encoded(PHOTO[:1, :1], "PNG"), PHOTO[:1, :1], 0),
    "line.png": (encoded(np.repeat(PHOTO[:1, :1], 20_000, 0), "PNG"), PHOTO[:1, :1], 0),
    "ein Bild, größer 深い.png": (PNG, PHOTO, 0),
}


def expected_pixels(pixels):
    """At `SIZE`, by the package's own resampler, which is compared with Pillow's elsewhere."""
    resized = sddns_tf.image_ops.resize(tf.constant(pixels[np.newaxis], tf.float32), *SIZE)
    return np.clip(np.asarray(resized)[0], 0, 255)


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_a_folder(tmp_path, name):
    content, pixels, error = FILES[name]
    (tmp_path / name).write_bytes(content)
    if pixels is None:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            data.load_arrays(f"folder:{tmp_path}", image_size=SIZE[0])
        return
    (image,) = data.load_arrays(f"folder:{tmp_path}", image_size=SIZE[0])
    assert np.abs(image - expected_pixels(pixels)).mean() <= error + 0.51  # Rounding.


@pytest.mark.parametrize("name", FILES)
def test_a_file_sent_to_a_server(name):
    content, pixels, error = FILES[name]
    images, status = served_bytes.decode(tf.constant([content, PNG]), SIZE, 64_000_000)
    assert status.numpy()[1] == b""  # Its neighbour is not affected.
    assert (status.numpy()[0] == b"") == (pixels is not None)
    if pixels is not None:
        found = np.clip(images[0], 0, 255)
        assert np.abs(found - expected_pixels(pixels)).mean() <= error + 0.01


def test_loops_of_links_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photo.png").write_bytes(PNG)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    assert len(data.load_arrays(f"folder:{tmp_path}", on_error="skip")) == 1
    with pytest.raises(ValueError, match=r"itself\.png"):
        data.load_arrays(f"folder:{tmp_path}")


FLOATS = np.tile(PHOTO[:32, :32].astype(np.float32), [4, 1, 1, 1])


def with_value(value):
    images = FLOATS.copy()
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_value(np.nan), "nan"),
        (with_value(np.inf), "inf"),
        (with_value(-1.0), "-1"),
        (with_value(256.0), "256"),
        (FLOATS[0], r"\(32, 32, 3\)"),
        (FLOATS[:0], r"\(0, 32, 32, 3\)|no images|empty"),
        (FLOATS[..., :2], r"\(4, 32, 32, 2\)"),
        (FLOATS.astype(str), "str|<U"),
    ],
)
def test_an_array_that_is_no_images_is_refused(images, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        data.load_arrays(images)


def test_images_in_0_to_1_are_accused_of_being_black():
    from unittest import mock

    with warnings.catch_warnings(record=True) as caught, mock.patch("absl.logging.warning") as log:
        warnings.simplefilter("always")
        data.load_arrays(FLOATS / 255)
    told = " ".join([str(w.message) for w in caught] + [str(call.args) for call in log.mock_calls])
    assert "0-1" in told or "black" in told


def test_fit_and_predict_warn_of_images_in_0_to_1(model, grass_detector):
    with pytest.warns(UserWarning, match="nearly black: expected values in 0-255"):
        grass_detector.predict(FLOATS / 255, verbose=0)
    images = {"images": FLOATS / 255, "auxiliary": FLOATS / 255}
    with pytest.warns(UserWarning, match="nearly black: expected values in 0-255"):
        model.fit(images, verbose=0)


@pytest.fixture(scope="module")
def model():
    backbone = sddns_tf.VisionTransformer(8, 4, hidden_dim=8, depth=1, num_heads=2)
    model = sddns_tf.SelfDistillation(
        backbone,
        sddns_tf.MultiCrop(8, local_views=0),
        sddns_tf.Negatives("rot90", source="auxiliary"),
        head=sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4),
    )
    model.compile("sgd")
    return model


IMAGES = np.tile(PHOTO[np.newaxis, :16, :16], [6, 1, 1, 1])


def test_one_auxiliary_image_is_repeated(model):
    batches = data.with_auxiliary(
        data.load(IMAGES, batch_size=4), data.load(IMAGES[:1], batch_size=4)
    )
    shapes = [tuple(batch["auxiliary"].shape) for batch in batches]
    assert shapes == [(4, 16, 16, 3), (2, 16, 16, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(model.fit(batches, verbose=0).history["loss"][0])


def test_fewer_images_than_a_batch_are_told_of():
    with pytest.raises(ValueError, match=r"batch_size"):
        data.load(IMAGES, batch_size=64, drop_remainder=True)
    assert len(list(data.load(IMAGES, batch_size=64))) == 1


def test_labels_by_accident_and_missing_auxiliary_are_told_of(model):
    labelled = tf.data.Dataset.from_tensor_slices((IMAGES, np.arange(6))).batch(2)
    with pytest.raises(ValueError, match="label"):
        model.fit(labelled, verbose=0)
    with pytest.raises(ValueError, match="auxiliary"):
        model.fit(data.load(IMAGES, batch_size=2), verbose=0)


def mutated(count, seed):
    """Files of which some bytes were changed, cut out, doubled or put elsewhere."""
    random = np.random.default_rng(seed)
    small = PHOTO[::4, ::4]
    wholes = [
        encoded(small, "JPEG"),
        encoded(small, "JPEG", progressive=True),
        encoded(small, "PNG"),
        encoded(Image.fromarray(small).quantize(8), "PNG"),
        encoded(small, "BMP"),
        encoded(small, "GIF"),
    ]
    for index in range(count):
        file = bytearray(wholes[index % len(wholes)])
        for _ in range(random.integers(1, 8)):
            place, other = random.integers(0, max(len(file) - 8, 1), 2)
            change = random.integers(0, 4)
            if change == 0:
                file[place] = random.integers(0, 256)
            elif change == 1:
                del file[place : place + random.integers(1, 64)]
            elif change == 2:
                file[place:place] = file[other : other + random.integers(1, 64)]
            else:
                file[place : place + 4] = random.bytes(4)
        yield bytes(file)


def test_thousands_of_mutated_files_crash_nothing_at_a_server():
    decode = tf.function(lambda files: served_bytes.decode(files, (8, 8), 1_000_000))
    refused = 0
    for batch in range(12):
        files = [PNG, *mutated(300, batch)]
        images, status = (value.numpy() for value in decode(tf.constant(files)))
        assert status[0] == b"" and np.isfinite(images).all()
        assert not images[status != b""].any()
        refused += np.count_nonzero(status != b"")
    assert 600 < refused < 3500


def test_a_thousand_mutated_files_crash_nothing_in_a_folder(tmp_path):
    (tmp_path / "whole.png").write_bytes(PNG)
    for index, file in enumerate(mutated(1000, 99)):
        (tmp_path / f"{index}.png").write_bytes(file)
    kept = data.image_files(tmp_path, on_error="skip", max_pixels=1_000_000)
    assert str(tmp_path / "whole.png") in kept and 50 < len(kept) < 900
    images = data.load_arrays(
        f"folder:{tmp_path}", image_size=8, on_error="skip", max_pixels=1_000_000
    )
    assert len(images) == len(kept)
