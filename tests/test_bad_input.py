"""What comes through each door: folders, arrays, bytes sent to a server."""

import io
import struct
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image, PngImagePlugin

import sddns_tf
from sddns_tf import data, pictures
from sddns_tf.export import decode_files

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


def bmp_of_runs(indices, colors):
    """An 8-bit BMP compressed by run lengths (RLE8): pairs of a count and an index."""
    height, width = indices.shape
    rows = [
        b"".join(bytes([1, index]) for index in row) + b"\0\0" for row in indices[::-1].tolist()
    ]
    body = b"".join(rows)[:-2] + b"\0\1"
    palette = np.pad(colors[:, ::-1], [(0, 256 - len(colors)), (0, 1)]).tobytes()
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + palette + body


def gif_in_a_larger_canvas(image):
    file = bytearray(encoded(image, "GIF"))
    file[6:10] = struct.pack("<HH", image.width + 8, image.height)
    return bytes(file)


RNG = np.random.default_rng(0)
DEEP_COLOR = RNG.integers(0, 65536, (32, 32, 3)).astype(np.uint16)
DIM = RNG.integers(0, 300, (32, 32)).astype(np.uint16)  # Stretched it would be bright.
ALPHA = np.dstack([PHOTO, np.indices(PHOTO.shape[:2]).sum(0).astype(np.uint8)])
SMALL = Image.fromarray(PHOTO[:64:2, :64:2]).quantize(64)
COLORS = np.reshape(SMALL.getpalette(), (-1, 3)).astype(np.uint8)
INVERTED = Image.fromarray(PHOTO[..., 0])
INVERTED = INVERTED.convert("P")
INVERTED.putpalette([255 - value // 3 for value in range(768)])


def gray(pixels):
    return np.repeat(np.asarray(pixels)[..., np.newaxis], 3, -1)


def rgb(picture):
    return np.asarray(picture.convert("RGB"))


# Name, bytes, the pixels of a folder (None: refused), the largest mean error of them, and whether a
# served graph takes the file.
FILES = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], None, 0, False),
    "truncated.png": (PNG[: len(PNG) // 2], None, 0, False),
    "empty.png": (b"", None, 0, False),
    "text.png": (b"these are words", None, 0, False),
    "header_only.bmp": (encoded(PHOTO, "BMP")[:40], None, 0, False),
    "deep.png": (encoded(DEEP, "PNG"), gray(PHOTO[..., 0]), 0, True),
    "deep color.png": (
        tf.io.encode_png(DEEP_COLOR).numpy(),
        (DEEP_COLOR // 257).astype(np.uint8),
        0,
        True,
    ),
    "dim.png": (encoded(DIM, "PNG"), gray((DIM // 257).astype(np.uint8)), 0, True),
    "dim.tif": (encoded(DIM, "TIFF"), gray((DIM // 257).astype(np.uint8)), 0, False),
    "palette.png": (encoded(PALETTE, "PNG"), rgb(PALETTE), 0, True),
    "gray.png": (encoded(PHOTO[..., 0], "PNG"), gray(PHOTO[..., 0]), 0, True),
    "cmyk.jpg": (encoded(CMYK, "JPEG", quality=95), PHOTO, 8, True),
    "color.bmp": (encoded(PHOTO, "BMP"), PHOTO, 0, True),
    "gray.bmp": (encoded(PHOTO[..., 0], "BMP"), gray(PHOTO[..., 0]), 0, True),
    "alpha.bmp": (encoded(ALPHA, "BMP"), PHOTO, 0, True),
    "palette.bmp": (encoded(PALETTE, "BMP"), rgb(PALETTE), 0, False),
    "inverted.BMP": (encoded(INVERTED, "BMP"), rgb(INVERTED), 0, False),
    "two colors.bmp": (encoded(CMYK.convert("1"), "BMP"), rgb(CMYK.convert("1")), 0, False),
    "runs.bmp": (bmp_of_runs(np.asarray(SMALL), COLORS), rgb(SMALL), 0, False),
    "color.tiff": (encoded(PHOTO, "TIFF"), PHOTO, 0, False),
    "packed.tif": (encoded(PALETTE, "TIFF", compression="tiff_lzw"), rgb(PALETTE), 0, False),
    "inks.tif": (encoded(CMYK, "TIFF"), rgb(CMYK), 0, False),
    "pages.tif": (
        encoded(PHOTO, "TIFF", save_all=True, append_images=FRAMES),
        PHOTO,
        0,
        False,
    ),
    "floats.tif": (
        encoded(PHOTO[..., 0].astype(np.float32), "TIFF"),
        gray(PHOTO[..., 0]),
        0,
        False,
    ),
    "wide floats.tif": (encoded(PHOTO[..., 0] * np.float32(2), "TIFF"), None, 0, False),
    "tiff.png": (encoded(PHOTO, "TIFF"), PHOTO, 0, False),
    "photo.webp": (encoded(PHOTO, "WEBP", lossless=True), PHOTO, 0, False),
    "moving.webp": (
        encoded(PHOTO, "WEBP", lossless=True, save_all=True, append_images=FRAMES),
        PHOTO,
        0,
        False,
    ),
    "animated.gif": (
        encoded(PALETTE, "GIF", save_all=True, append_images=FRAMES),
        rgb(PALETTE),
        0,
        True,
    ),
    "holes.gif": (
        encoded(PALETTE, "GIF", transparency=int(np.asarray(PALETTE)[0, 0])),
        rgb(PALETTE),
        0,
        False,
    ),
    "canvas.gif": (
        gif_in_a_larger_canvas(SMALL),
        rgb(Image.open(io.BytesIO(gif_in_a_larger_canvas(SMALL)))),
        0,
        False,
    ),
    "one_pixel.png": (encoded(PHOTO[:1, :1], "PNG"), PHOTO[:1, :1], 0, True),
    "line.png": (encoded(np.repeat(PHOTO[:1, :1], 20_000, 0), "PNG"), PHOTO[:1, :1], 0, True),
    "ein Bild, größer 深い.png": (PNG, PHOTO, 0, True),
}


def expected_pixels(pixels):
    """At `SIZE`, by the package's own resampler, which is compared with Pillow's elsewhere."""
    resized = sddns_tf.image_ops.resize(tf.constant(pixels[np.newaxis], tf.float32), *SIZE)
    return np.clip(np.asarray(resized)[0], 0, 255)


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_a_folder(tmp_path, name):
    content, pixels, error, _ = FILES[name]
    (tmp_path / name).write_bytes(content)
    if pixels is None:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            data.load_arrays(f"folder:{tmp_path}", image_size=SIZE[0])
        return
    (image,) = data.load_arrays(f"folder:{tmp_path}", image_size=SIZE[0])
    assert np.abs(image - expected_pixels(pixels)).mean() <= error + 0.51  # Rounding.


@pytest.fixture(scope="module")
def served():
    """What a served graph makes of all the files in one batch."""
    contents = [content for content, *_ in FILES.values()]
    images, status = decode_files.decode(tf.constant(contents), SIZE, 64_000_000)
    return dict(zip(FILES, zip(images.numpy(), status.numpy(), strict=True), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_a_file_sent_to_a_server_gives_the_same_pixels_or_a_status(served, name):
    _, pixels, error, is_taken = FILES[name]
    image, status = served[name]
    assert (status == b"") == is_taken
    if is_taken:
        found = np.clip(image, 0, 255)
        assert np.abs(found - expected_pixels(pixels)).mean() <= error + 0.01
    else:
        assert not np.any(image)


def test_files_of_all_kinds_in_one_folder_come_in_the_order_of_their_paths(tmp_path):
    good = {name: file for name, file in FILES.items() if file[1] is not None}
    for name, (content, *_) in good.items():
        (tmp_path / name).write_bytes(content)
    files = data.image_files(tmp_path)
    assert files == [str(tmp_path / name) for name in sorted(good)]
    assert files == data.image_files(f"folder:{tmp_path}")
    read = data.load_arrays(tmp_path, image_size=SIZE[0])
    for image, name in zip(read, sorted(good), strict=True):
        error = np.abs(image - expected_pixels(good[name][1])).mean()
        assert error <= good[name][2] + 0.51, name
    streamed = np.concatenate(list(data.load(tmp_path, image_size=SIZE, batch_size=7)))
    np.testing.assert_array_equal(streamed, read)


def test_each_file_is_opened_once_where_all_are_read_into_memory(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.{'png' if index % 2 else 'bmp'}").write_bytes(PNG)
    opened = []
    read_file = tf.io.read_file
    sys.addaudithook(
        lambda event, arguments: opened.append(arguments[0]) if event == "open" else None
    )
    with mock.patch.object(tf.io, "read_file", side_effect=read_file) as later:
        data.load_arrays(tmp_path, image_size=8)
    assert sorted(path for path in opened if str(path).startswith(str(tmp_path))) == sorted(
        map(str, tmp_path.iterdir())
    )
    assert not later.called


def test_images_of_other_kinds_are_left_out_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "raw").mkdir()
    for name in ("b.heic", "raw/c.DNG", "d.jp2", "e.svg", "f.exr", "g.avif", "h.jxl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        assert len(data.load_arrays(tmp_path)) == 1
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("Skipped 7 files") and "notes.txt" not in message
    assert all(name in message for name in ("b.heic", "c.DNG", "e.svg", "h.jxl"))


def rotated(orientation):
    """The stored pixels that a viewer, which turns them, shows as `PHOTO[:64]`."""
    back = [Image.Transpose[name] for name in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE",
        "ROTATE_270",
    )]  # fmt: skip
    picture = Image.fromarray(PHOTO[:64])
    return picture if orientation == 1 else picture.transpose(back[orientation - 2])


def turned_by_xmp(compressed):
    """A PNG that only its XMP data turn, by 90 degrees."""
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=compressed)
    return encoded(rotated(1), "PNG", pnginfo=info)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_png_that_xmp_turns_is_turned_by_all_readers(tmp_path, compressed):
    content = turned_by_xmp(compressed)
    (tmp_path / "a.png").write_bytes(content)
    found = data.load_arrays(f"folder:{tmp_path}")[0]
    np.testing.assert_array_equal(found, pictures.decode(content))
    assert found.shape[:2] == rotated(1).size  # width and height have changed places
    assert pictures.may_be_turned(content)


def turned(kind, orientation):
    """A file whose data say how to turn it."""
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    return encoded(rotated(orientation), kind, exif=exif(orientation), **options)


@pytest.fixture(scope="module")
def turned_at_a_server():
    """What a served graph makes of such files, by kind and orientation: in batches of one size."""
    found = {}
    for orientations in (range(1, 5), range(5, 9)):
        names = [(kind, number) for kind in ("JPEG", "PNG") for number in orientations]
        contents = tf.constant([turned(*name) for name in names])
        size = rotated(orientations[0]).size[::-1]
        images, _ = decode_files.decode(contents, size, 64_000_000)
        found.update(zip(names, images.numpy(), strict=True))
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_unless_it_is_not_wanted(
    tmp_path, turned_at_a_server, kind, orientation
):
    stored, content = rotated(orientation), turned(kind, orientation)
    (tmp_path / f"a.{kind}").write_bytes(content)
    for wanted, expected in ((True, PHOTO[:64]), (False, np.asarray(stored))):
        options = {"exif_orientation": wanted}
        picture = Image.open(io.BytesIO(content))
        for (image,) in (
            data.load_arrays(tmp_path, **options),
            next(iter(data.load(tmp_path, batch_size=1, **options))).numpy(),
            data.load_arrays([picture], **options),
        ):
            assert image.shape == expected.shape
            assert np.abs(image.astype(int) - expected).mean() < (3 if kind == "JPEG" else 0.01)
    if kind in ("JPEG", "PNG"):  # A served graph takes the pixels as they are stored.
        image = turned_at_a_server[kind, orientation]
        assert np.abs(image - np.asarray(stored)).mean() < 3


def test_damaged_exif_data_turn_nothing(tmp_path):
    content = encoded(PHOTO, "JPEG", exif=b"Exif\0\0" + b"MM\0*" + b"\xff" * 20, quality=100)
    (tmp_path / "a.jpg").write_bytes(content)
    (image,) = data.load_arrays(tmp_path)
    assert np.abs(image.astype(int) - PHOTO).mean() < 5


PICTURES = {
    "P": PALETTE,
    "L": Image.fromarray(PHOTO[..., 0]),
    "LA": Image.fromarray(ALPHA).convert("LA"),
    "RGBA": Image.fromarray(ALPHA),
    "1": CMYK.convert("1"),
    "CMYK": CMYK,
    "I;16": DEEP,
    "PA": PALETTE.convert("PA"),
    "F": Image.fromarray(PHOTO[..., 0].astype(np.float32)),
}
SHOWN = {
    "RGBA": PHOTO,
    "LA": gray(Image.fromarray(PHOTO).convert("L")),
    "I;16": gray(PHOTO[..., 0]),
    "F": gray(PHOTO[..., 0]),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_a_picture_of_any_mode_in_a_list(mode, grass_detector):
    picture = PICTURES[mode]
    assert picture.mode == mode
    expected = SHOWN.get(mode, rgb(picture))
    (image,) = data.load_arrays([picture])
    np.testing.assert_array_equal(image, expected)
    scores = [
        grass_detector.predict(images, verbose=0)["ood_score"]
        for images in ([picture], expected[np.newaxis])
    ]
    np.testing.assert_array_equal(*scores)


def test_a_float_file_in_0_to_1_is_refused(tmp_path):
    floats = PHOTO[..., 0].astype(np.float32)
    Image.fromarray(floats / 255).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: Float pixels must lie in 0-255: multiply"):
        data.load_arrays(tmp_path)
    Image.fromarray(floats * 0).save(tmp_path / "a.tif")
    assert data.load_arrays(tmp_path).max() == 0


def test_a_file_with_a_transparent_palette_in_a_list_warns_of_nothing():
    content = encoded(PALETTE, "PNG", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (image,) = data.load_arrays([Image.open(io.BytesIO(content))])
    np.testing.assert_array_equal(image, rgb(PALETTE))


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
    labeled = tf.data.Dataset.from_tensor_slices((IMAGES, np.arange(6))).batch(2)
    with pytest.raises(ValueError, match="label"):
        model.fit(labeled, verbose=0)
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
    decode = tf.function(lambda files: decode_files.decode(files, (8, 8), 1_000_000))
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
