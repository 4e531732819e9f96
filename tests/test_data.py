"""Images from folders, arrays, files and TFDS: decoded, checked, batched and continued."""

import io
import itertools
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from PIL import Image
from skimage import data as photographs

from sddns_tf import data, image_ops

SIDE = 24


def patches(photograph, count, side=SIDE):
    """Cuts different squares out of a photograph."""
    columns = photograph.shape[1] // side
    corners = [(side * (i // columns), side * (i % columns)) for i in range(count)]
    return np.stack([photograph[y : y + side, x : x + side] for y, x in corners])


@pytest.fixture(scope="module")
def coffee():
    return patches(photographs.coffee(), 10)


@pytest.fixture(scope="module")
def chelsea():
    return patches(photographs.chelsea(), 7)


def stack(dataset):
    return np.concatenate(list(dataset.as_numpy_iterator()))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


# --- Arrays -------------------------------------------------------------------------------------


def test_array_gives_its_own_pixels_in_order(coffee):
    dataset = data.load(coffee, batch_size=4)
    assert dataset.element_spec == tf.TensorSpec((None, SIDE, SIDE, 3), tf.uint8)
    assert dataset.cardinality() == 3
    assert [len(batch) for batch in dataset] == [4, 4, 2]
    np.testing.assert_array_equal(stack(dataset), coffee)
    np.testing.assert_array_equal(data.load_arrays(coffee), coffee)
    np.testing.assert_array_equal(data.load_arrays(tf.constant(coffee), limit=3), coffee[:3])


def test_drop_remainder_gives_a_static_batch_size_and_refuses_no_batch(coffee):
    dataset = data.load(coffee, batch_size=4, drop_remainder=True)
    assert dataset.element_spec.shape[0] == 4
    assert [len(batch) for batch in dataset] == [4, 4]
    with pytest.raises(ValueError, match=r"batch_size=11 for .* 10 images"):
        data.load(coffee, batch_size=11, drop_remainder=True)


def test_gray_becomes_rgb_and_alpha_is_dropped(coffee):
    gray = coffee[..., 1]
    expected = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(data.load_arrays(gray), expected)
    np.testing.assert_array_equal(data.load_arrays(gray[..., None]), expected)
    alpha = np.random.default_rng(0).integers(0, 256, (*coffee.shape[:3], 1), dtype=np.uint8)
    rgba = np.concatenate([coffee, alpha], axis=-1)
    np.testing.assert_array_equal(data.load_arrays(rgba), coffee)


@pytest.mark.parametrize("dtype", ["int64", "int16", "float16", "float32", "float64"])
def test_other_dtypes_in_range_are_accepted(coffee, dtype):
    np.testing.assert_array_equal(data.load_arrays(coffee.astype(dtype)), coffee)


def test_floats_are_rounded():
    images = np.full((1, 8, 8, 3), 99.6)
    assert (data.load_arrays(images) == 100).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype("float32") - 100.5, r"0-255.*Received: -\d+\.5 to"),
        (lambda x: x.astype("int64") + 200, r"0-255.*Received: .* to 4\d\d"),
        (lambda x: np.where(x == x.max(), np.nan, x), "0-255.*Received: nan"),
        (lambda x: np.where(x == x.max(), np.inf, x), "0-255.*Received: .* to inf"),
        (lambda x: x > 100, "Received: dtype bool"),
        (lambda x: x.astype(object), "Received: dtype object"),
        (lambda x: x.astype(str), "Received: dtype <U"),
        (lambda x: x[:0], r"not be empty. Received: shape \(0, 24, 24, 3\)"),
        (lambda x: x[0], r"a single image as image\[None\]. Received: \(24, 24, 3\)"),
        (lambda x: x[0, ..., 0], r"Received: \(24, 24\)"),
        (lambda x: x[..., :2], r"1, 3 or 4 channels. Received: \(10, 24, 24, 2\)"),
        (lambda x: x[None], r"Received: \(1, 10, 24, 24, 3\)"),
    ],
)
def test_bad_arrays_are_refused(coffee, change, message):
    with pytest.raises(ValueError, match=message):
        data.load(change(coffee), batch_size=4)


def test_images_in_0_to_1_are_warned_about(coffee):
    with pytest.warns(UserWarning, match="nearly black: expected values in 0-255"):
        data.load(coffee / 255.0, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(coffee.astype("float32"), batch_size=4)


def test_min_size_applies_to_the_stored_size(coffee):
    with pytest.raises(ValueError, match=r"min_size=25 pixels a side\. Received: 24 x 24"):
        data.load(coffee, batch_size=4, min_size=25, image_size=64)
    data.load(coffee, batch_size=4, min_size=24)


def test_resizing_agrees_with_pillow(coffee):
    # Pillow's bicubic is antialiased too; its kernel parameter and rounding are the same.
    large = photographs.coffee()[:192, :160][None]
    expected = np.asarray(Image.fromarray(large[0]).resize((48, 48), Image.Resampling.BICUBIC))
    resized = data.load_arrays(large, image_size=48)
    assert resized.shape == (1, 48, 48, 3)
    difference = np.abs(resized[0].astype(int) - expected)
    assert difference.max() <= 3
    assert difference.mean() < 0.5
    np.testing.assert_array_equal(data.load_arrays(coffee, image_size=SIDE), coffee)


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("size", [(20, 36), (36, 20), 28])
def test_rectangles_and_crops_are_those_of_the_extractor(tmp_path, resize, size):
    photograph = photographs.coffee()[:90, :160]
    height, width = (size, size) if isinstance(size, int) else size
    expected = image_ops.fit(tf.constant(photograph[None]), height, width, resize).numpy()
    save(tmp_path / "a.png", photograph)
    np.savez(tmp_path / "set.npz", photograph[None])
    options = {"image_size": size, "resize": resize}
    for source in (tmp_path, tmp_path / "set.npz", photograph[None], [photograph]):
        for read in (
            data.load_arrays(source, **options),
            stack(data.load(source, batch_size=1, **options)),
        ):
            assert read.shape == (1, height, width, 3)
            assert np.abs(read - expected).max() <= 0.51


def test_a_path_must_be_one_of_a_folder_or_an_archive(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"folder or an \.npz file. Received: .*a\.png"):
        data.load(path, batch_size=1)


def test_overshoot_of_bicubic_is_clipped():
    step = np.zeros((1, 16, 16, 3), np.uint8)
    step[:, :, 8:] = 255
    resized = data.load_arrays(step, image_size=64)[0, 0, :, 0].astype(int)
    assert (np.diff(resized) >= 0).all()  # an overflow would wrap round


def test_list_of_arrays_of_mixed_sizes_and_channels(coffee):
    images = [coffee[0], coffee[1, ..., 0], coffee[2, :10]]
    resized = data.load_arrays(images, image_size=SIDE)
    np.testing.assert_array_equal(resized[0], coffee[0])
    np.testing.assert_array_equal(resized[1], np.repeat(coffee[1, ..., :1], 3, axis=-1))
    np.testing.assert_array_equal(
        resized[2], data.load_arrays(coffee[2:3, :10], image_size=SIDE)[0]
    )
    np.testing.assert_array_equal(data.load_arrays(list(coffee)), coffee)
    with pytest.raises(ValueError, match=r"image 0 of the list is 24 x 24, image 2 .* 10 x 24"):
        data.load(images, batch_size=2)
    with pytest.raises(ValueError, match=r"image 1 of the list .* Received: \(3,\)"):
        data.load([coffee[0], np.zeros(3)], batch_size=2)
    with pytest.raises(ValueError, match=r"image 1 of the list.*dtype <U"):
        data.load([coffee[0], np.full((8, 8), "a.png")], batch_size=2)
    with pytest.raises(ValueError, match="empty list"):
        data.load([], batch_size=2)


def test_shuffle_permutes_all_anew_each_time_and_repeats_by_seed():
    # Image i is filled with the value i.
    images = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)

    def orders(seed):
        dataset = data.load(images, batch_size=32, shuffle=True, seed=seed)
        return [stack(dataset)[:, 0, 0, 0].tolist() for _ in range(2)]

    first, second = orders(seed=1)
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second
    assert max(first[:10]) > 50  # not a small buffer that keeps the early images early
    assert orders(seed=1) == [first, second]
    assert orders(seed=2)[0] != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive int. Received: batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"image_size": -1}, "image_size=-1"),
        ({"image_size": (32, 0)}, r"image_size=\(32, 0\)"),
        ({"image_size": True}, "image_size=True"),
        ({"resize": "stretch"}, "resize='stretch'"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"shuffle": 1}, "shuffle=1"),
        ({"drop_remainder": None}, "drop_remainder=None"),
        ({"first_batch": -1}, "first_batch=-1"),
        ({"exif_orientation": "no"}, "exif_orientation='no'"),
        ({"max_pixels": 1e6}, "max_pixels=1000000.0"),
        ({"min_size": "8"}, "min_size='8'"),
        ({"on_error": "ignore"}, "on_error.* Received: on_error='ignore'"),
        ({"exclude_labels": ["cat"]}, '`exclude_labels` needs a "tfds:" source'),
        ({"exclude_labels": "cat"}, "`exclude_labels` must be a list of names. Received: 'cat'"),
    ],
)
def test_bad_options_are_refused(coffee, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(coffee, **{"batch_size": 4, **options})


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Received: int"):
        data.load(3, batch_size=2)
    for source in ("cifar10", "http://images", "folder:"):
        with pytest.raises(ValueError, match=f"`source` must be .*{source}"):
            data.load(source, batch_size=2)
    with pytest.raises(ValueError, match=f'did you mean "folder:{tmp_path}"'):
        data.load(str(tmp_path), batch_size=2)


# --- .npz ---------------------------------------------------------------------------------------


def test_npz(tmp_path, coffee):
    path = tmp_path / "set.npz"
    np.savez(path, coffee)
    np.testing.assert_array_equal(data.load_arrays(f"npz:{path}"), coffee)
    labels = np.arange(10, dtype=np.int32)
    np.savez_compressed(path, other=labels, images=coffee, labels=labels)
    images, read = data.load_arrays(f"npz:{path}", with_labels=True, limit=4)
    np.testing.assert_array_equal(images, coffee[:4])
    np.testing.assert_array_equal(read, [0, 1, 2, 3])
    assert read.dtype == np.int64
    np.testing.assert_array_equal(stack(data.load(f"npz:{path}", batch_size=3)), coffee)


def test_bad_npz_is_refused_by_name(tmp_path, coffee):
    path = tmp_path / "set.npz"
    with pytest.raises(ValueError, match=r"must be an existing file. Received: .*set\.npz"):
        data.load_arrays(f"npz:{path}")
    np.savez(path, left=coffee, right=coffee)
    with pytest.raises(ValueError, match=r"set.npz .*Received: \['left', 'right'\]"):
        data.load_arrays(f"npz:{path}")
    np.savez(path, labels=np.arange(3))
    with pytest.raises(ValueError, match=r"set.npz .*Received: \['labels'\]"):
        data.load_arrays(f"npz:{path}")
    np.savez(path, images=coffee, labels=np.arange(3))
    with pytest.raises(ValueError, match=r"set.npz: labels must have shape \(10,\)"):
        data.load_arrays(f"npz:{path}")
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"set\.npz"):
        data.load_arrays(f"npz:{path}")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"set\.npz"):
        data.load_arrays(f"npz:{path}")
    np.save(tmp_path / "set.npy", coffee)
    with pytest.raises(ValueError, match=r"set\.npy .*single array"):
        data.load_arrays(f"npz:{tmp_path / 'set.npy'}")


# --- Folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, coffee):
    """Six files of one size in nested folders, and the pixels that they hold, in sorted order."""
    root = tmp_path / "photos"
    save(root / "a.png", coffee[0])
    save(root / "b 1" / "großes Bild.PNG", coffee[1])
    save(root / "b 1" / "深い" / "c.bmp", coffee[2])
    Image.fromarray(coffee[3]).quantize(256).save(root / "d.png")  # with a palette
    quantized = np.asarray(Image.open(root / "d.png").convert("RGB"))
    save(root / "e.png", coffee[4, ..., 0])
    gray = np.repeat(coffee[4, ..., :1], 3, axis=-1)
    save(root / "f.png", np.concatenate([coffee[5], coffee[6, ..., :1]], axis=-1))
    return root, np.stack([coffee[0], coffee[1], coffee[2], quantized, gray, coffee[5]])


def test_folder_of_all_kinds_of_lossless_files(folder):
    root, expected = folder
    (root / "notes.txt").write_text("not an image")
    (root / "._a.png").write_bytes(b"what macOS leaves behind")
    save(root / ".thumbnails" / "a.png", expected[0])
    (root / "loop").symlink_to(root, target_is_directory=True)
    dataset = data.load(f"folder:{root}", batch_size=4)
    assert dataset.cardinality() == 2
    assert dataset.element_spec == tf.TensorSpec((None, SIDE, SIDE, 3), tf.uint8)
    np.testing.assert_array_equal(stack(dataset), expected)
    np.testing.assert_array_equal(data.load_arrays(f"folder:{root}", limit=2), expected[:2])
    files = data.image_files(root)
    assert [file.rsplit("/")[-1] for file in files] == [
        "a.png",
        "großes Bild.PNG",
        "c.bmp",
        "d.png",
        "e.png",
        "f.png",
    ]


def test_folder_of_photographs_as_jpeg_and_gif(tmp_path):
    photograph = photographs.chelsea()[:128, :96]
    save(tmp_path / "a.jpg", photograph, quality=95)
    frames = [Image.fromarray(photograph).quantize(256), Image.new("P", (96, 128))]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    save(tmp_path / "c.jpeg", photograph[..., 0], quality=95)
    images = data.load_arrays(f"folder:{tmp_path}")
    assert images.shape == (3, 128, 96, 3)
    assert np.abs(images[0].astype(int) - photograph).mean() < 3
    np.testing.assert_array_equal(images[1], np.asarray(frames[0].convert("RGB")))
    assert np.abs(images[2].astype(int) - photograph[..., :1]).mean() < 3


@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"quality": 60, "subsampling": 2}, {"quality": 75, "progressive": True}],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_jpeg_has_the_pixels_that_pillow_gives(tmp_path, options, channels):
    """`sddns score` and devices read with Pillow; one gray level is a difference to a detector."""
    photograph = photographs.chelsea()[:97, :130]
    save(tmp_path / "a.jpg", photograph if channels == 3 else photograph[..., 0], **options)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(data.load_arrays(f"folder:{tmp_path}")[0], expected)
    np.testing.assert_array_equal(next(iter(data.load(tmp_path, batch_size=1)))[0], expected)


def test_folders_behind_links_are_told(tmp_path, coffee):
    save(tmp_path / "in" / "a.png", coffee[0])
    save(tmp_path / "out" / "b.png", coffee[1])
    (tmp_path / "in" / "day").symlink_to(tmp_path / "out", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"Skipped 1 links to folders.*in/day"):
        assert len(data.load_arrays(tmp_path / "in")) == 1


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, coffee, monkeypatch):
    for name in ("one", "two"):
        save(tmp_path / name / "a.png", coffee[0])
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("two"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="two"):
        data.load_arrays(tmp_path)


def test_mixed_sizes_need_image_size(tmp_path, coffee):
    save(tmp_path / "a.png", coffee[0])
    save(tmp_path / "b.png", coffee[1, :20])
    with pytest.raises(ValueError, match=r"image_size.*a\.png is 24 x 24, .*b\.png is 20 x 24"):
        data.load(f"folder:{tmp_path}", batch_size=2)
    images = data.load_arrays(f"folder:{tmp_path}", image_size=SIDE)
    np.testing.assert_array_equal(images[0], coffee[0])
    np.testing.assert_array_equal(images[1], data.load_arrays(coffee[1:2, :20], image_size=SIDE)[0])


def png_bomb():
    """A PNG of a hundred bytes that announces 50,000 x 50,000 pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(array, kind):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty.png": (lambda: b"", "Received: an empty file"),
    "text.png": (lambda: b"<html>404</html>", "Expected a JPEG, PNG, BMP, GIF, TIFF or WEBP image"),
    "half.webp": (lambda: encoded(photographs.rocket(), "webp")[:2000], "corrupt or cut short"),
    "half.tif": (lambda: encoded(photographs.rocket(), "tiff")[:9000], "corrupt or cut short"),
    "half.jpg": (lambda: encoded(photographs.rocket(), "jpeg")[:9000], "corrupt or cut short"),
    "half.png": (lambda: encoded(photographs.rocket(), "png")[:9000], "corrupt or cut short"),
    "stub.jpg": (lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF", "corrupt or cut short"),
    "stub.png": (lambda: b"\x89PNG\r\n\x1a\n\0\0", "a damaged header"),
    "bomb.png": (png_bomb, "more than max_pixels=64000000.*2500000000 pixels"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_before_the_first_batch(tmp_path, coffee, name):
    content, reason = BAD_FILES[name]
    save(tmp_path / "good.png", coffee[0])
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=rf"Received: 1 of 2 image files.*\n.*/{name}: .*{reason}"):
        data.load(f"folder:{tmp_path}", batch_size=1)


def test_bad_files_are_skipped_and_counted(tmp_path, coffee, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", coffee[i])
    for name, (content, _) in BAD_FILES.items():
        (tmp_path / name).write_bytes(content())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    dataset = data.load(f"folder:{tmp_path}", batch_size=2, on_error="skip", shuffle=True)
    assert dataset.cardinality() == 2
    assert len(stack(dataset)) == 3
    assert len(warned) == 1
    assert f"{len(BAD_FILES) + 1} of {len(BAD_FILES) + 4} image files" in warned[0]
    assert "half.jpg" in warned[0] and "gone.png" in warned[0]
    np.testing.assert_array_equal(
        data.load_arrays(f"folder:{tmp_path}", on_error="skip"), coffee[:3]
    )
    files = data.image_files(tmp_path, on_error="skip")
    assert files == [str(tmp_path / f"{i}.png") for i in range(3)]


def test_a_limit_on_files_holds_for_their_check(tmp_path, coffee):
    for number in range(100):
        save(tmp_path / f"{number:03}.png", coffee[0])
    (tmp_path / "099.png").write_bytes(b"damaged")
    found = data.image_files(tmp_path, limit=10)
    assert found == [str(tmp_path / f"{number:03}.png") for number in range(10)]
    assert len(data.image_files(tmp_path, limit=99)) == 99
    (tmp_path / "001.png").write_bytes(b"damaged")
    assert data.load_arrays(f"folder:{tmp_path}", limit=1).shape == (1, 24, 24, 3)
    (tmp_path / "001.png").unlink()
    (tmp_path / "001.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"001\.png: cannot be opened \(No such file"):
        data.image_files(tmp_path, limit=2)
    with pytest.raises(ValueError, match=r"099\.png"):
        data.image_files(tmp_path)


def test_folder_limits_on_size(tmp_path, coffee):
    save(tmp_path / "a.jpg", coffee[0])
    save(tmp_path / "b.gif", coffee[1, :, :20])
    with pytest.raises(ValueError, match=r"b\.gif: 24 x 20 is smaller than min_size=24"):
        data.load(f"folder:{tmp_path}", batch_size=2, min_size=24, image_size=48)
    with pytest.raises(ValueError, match=r"a\.jpg: 24 x 24 is more than max_pixels=500"):
        data.load(f"folder:{tmp_path}", batch_size=2, max_pixels=500, image_size=48)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"must be an existing folder. Received: .*nowhere"):
        data.load(f"folder:{tmp_path / 'nowhere'}", batch_size=2)
    with pytest.raises(ValueError, match="Received: no files"):
        data.load(f"folder:{tmp_path}", batch_size=2)
    (tmp_path / "scan.heic").write_bytes(b"II*")
    with pytest.raises(ValueError, match=r"1 other files, such as .*scan\.heic"):
        data.load(f"folder:{tmp_path}", batch_size=2)
    (tmp_path / "scan.heic").unlink()
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 1 image files that cannot be used:\n.*a\.png"):
        data.load(f"folder:{tmp_path}", batch_size=2, on_error="skip")


def test_folder_has_no_labels(folder):
    with pytest.raises(
        ValueError, match=r"with_labels=True needs a source with labels. Received: folder:"
    ):
        data.load_arrays(f"folder:{folder[0]}", with_labels=True)


# --- tf.data ------------------------------------------------------------------------------------


def test_datasets_of_images_dictionaries_and_pairs(coffee):
    slices = tf.data.Dataset.from_tensor_slices
    labels = np.arange(10)
    for dataset in (
        slices(coffee),
        slices(coffee).batch(3),
        slices(coffee.astype("float32")).batch(3),
        slices({"image": coffee, "label": labels, "id": labels.astype(str)}),
        slices((coffee, labels)).batch(4),
    ):
        images = data.load(dataset, batch_size=4)
        assert images.element_spec == tf.TensorSpec((None, SIDE, SIDE, 3), tf.uint8)
        np.testing.assert_array_equal(stack(images), coffee)
    for dataset in (slices((coffee, labels)).batch(4), slices({"image": coffee, "label": labels})):
        images, read = data.load_arrays(dataset, with_labels=True)
        np.testing.assert_array_equal(images, coffee)
        np.testing.assert_array_equal(read, labels)
    gray = data.load_arrays(slices(coffee[..., 0]))
    np.testing.assert_array_equal(gray, np.repeat(coffee[..., :1], 3, axis=-1))
    shuffled = stack(data.load(slices(coffee).batch(3), batch_size=4, shuffle=True, seed=3))
    assert not np.array_equal(shuffled, coffee)
    assert sorted(map(bytes, shuffled)) == sorted(map(bytes, coffee))


def test_dataset_of_mixed_sizes_needs_image_size(coffee):
    def generate():
        yield coffee[0]
        yield coffee[1, :20]

    dataset = tf.data.Dataset.from_generator(
        generate, output_signature=tf.TensorSpec((None, None, 3), tf.uint8)
    )
    with pytest.raises(ValueError, match="`image_size` is needed"):
        data.load(dataset, batch_size=2)
    images = data.load_arrays(dataset, image_size=SIDE)
    np.testing.assert_array_equal(images[0], coffee[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="an image is under 22 pixels"):
        data.load_arrays(dataset, image_size=SIDE, min_size=22)


def test_bad_datasets_are_refused(coffee):
    slices = tf.data.Dataset.from_tensor_slices
    for dataset, message in (
        (slices({"pixels": coffee}), "key 'image'.*'pixels'"),
        (slices(coffee[..., :2]), "1, 3 or 4 channels. Received: .*24, 24, 2"),
        (slices(coffee.astype(str)), "Received: dtype string"),
        (slices(np.arange(5)), r"Received: elements TensorSpec\(shape=\(\)"),
        (slices(coffee).take(0), "empty dataset"),
        (slices(coffee.astype("int32") - 100), "0-255.*Received: -"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(dataset, batch_size=2)
    later = np.concatenate([coffee[:2].astype("float32"), np.full((1, SIDE, SIDE, 3), 256.0)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="must hold values in 0-255"):
        data.load_arrays(slices(later.astype("float32")))
    with pytest.warns(UserWarning, match="nearly black"):
        data.load(slices(coffee / 255.0), batch_size=2)


# --- TFDS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, coffee, chelsea):
    """A folder of prepared data sets: `tiny` (two splits, two classes) and others."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root = str(tmp_path_factory.mktemp("prepared"))

    def store(name, features, **splits):
        # A writer and no builder class: TFDS then knows the set only from its files.
        folder = f"{root}/{name}/1.0.0"
        os.makedirs(folder)
        identity = tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=folder, module_name=""
        )
        info = tfds.core.DatasetInfo(
            builder=identity, features=tfds.features.FeaturesDict(features)
        )
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=6)
        writer.initialize_splits(list(splits))
        for split, columns in splits.items():
            rows = zip(*columns.values(), strict=True)
            writer.add_examples({split: [dict(zip(columns, row, strict=True)) for row in rows]})
        writer.close_all()

    store(
        "tiny",
        {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "cup"]),
        },
        train={
            "image": np.concatenate([coffee, chelsea]),
            "label": np.array([1] * 10 + [0] * 7),
        },
        test={"image": chelsea[:3], "label": np.zeros(3, np.int64)},
    )
    store(
        "gray",
        {"image": tfds.features.Image(shape=(None, None, 1))},
        train={"image": coffee[..., :1]},
    )
    store("other", {"x": tfds.features.Scalar(np.int64)}, train={"x": np.arange(3)})
    return root


def as_set(images):
    return {image.tobytes() for image in images}


def test_tfds_by_name_through_argument_and_environment(prepared, coffee, chelsea, monkeypatch):
    images, labels = data.load_arrays("tfds:tiny", data_dir=prepared, with_labels=True)
    assert as_set(images[labels == 1]) == as_set(coffee)
    assert as_set(images[labels == 0]) == as_set(chelsea)
    assert len(images) == 17 and labels.dtype == np.int64
    monkeypatch.setenv("TFDS_DATA_DIR", prepared)
    np.testing.assert_array_equal(data.load_arrays("tfds:tiny"), images)
    np.testing.assert_array_equal(data.load_arrays("tfds:tiny", split="train[2:5]"), images[2:5])
    assert as_set(data.load_arrays("tfds:tiny", split="test")) == as_set(chelsea[:3])
    dataset = data.load("tfds:tiny", batch_size=5)
    assert dataset.element_spec == tf.TensorSpec((None, SIDE, SIDE, 3), tf.uint8)
    assert dataset.cardinality() == 4
    np.testing.assert_array_equal(stack(dataset), images)


def test_tfds_does_not_warn_of_itself(prepared, monkeypatch, caplog):
    """Once opened, it warns as before: the level of absl's logger is what it was."""
    feature = pytest.importorskip("tensorflow_datasets.core.features.feature")
    # It counts its warnings, and gives ten of them in a process.
    warn = logging.warning
    monkeypatch.setattr(feature, "log_tf_warning", lambda name: warn("%s.dtype", name))
    data.load_arrays("tfds:tiny", data_dir=prepared)
    assert not caplog.records
    warn("later")
    assert [record.message for record in caplog.records] == ["later"]


def test_tfds_shuffle(prepared):
    def orders(seed):
        dataset = data.load("tfds:tiny", data_dir=prepared, batch_size=5, shuffle=True, seed=seed)
        return [[image.tobytes() for image in stack(dataset)] for _ in range(2)]

    first, second = orders(seed=1)
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == 17
    assert orders(seed=1) == [first, second]
    assert orders(seed=2)[0] != first


def test_tfds_exclude_labels(prepared, coffee):
    options = {"data_dir": prepared, "exclude_labels": ["cat"]}
    images, labels = data.load_arrays("tfds:tiny", with_labels=True, **options)
    assert as_set(images) == as_set(coffee) and set(labels) == {1}
    assert as_set(stack(data.load("tfds:tiny", batch_size=4, shuffle=True, **options))) == (
        as_set(coffee)
    )
    with pytest.raises(ValueError, match=r"labels of tfds:tiny \(cat, cup\). Received: \['dog'\]"):
        data.load_arrays("tfds:tiny", data_dir=prepared, exclude_labels=["cat", "dog"])
    with pytest.raises(ValueError, match=r"at least one image left.*\['cat', 'cup'\]"):
        data.load_arrays("tfds:tiny", data_dir=prepared, exclude_labels=["cat", "cup"])
    with pytest.raises(ValueError, match=r"needs a set with named labels. Received: tfds:gray"):
        data.load_arrays("tfds:gray", data_dir=prepared, exclude_labels=["cat"], image_size=SIDE)


def test_tfds_gray_of_no_fixed_size(prepared, coffee):
    with pytest.raises(ValueError, match=r"`image_size` is needed .*Received: tfds:gray"):
        data.load("tfds:gray", data_dir=prepared, batch_size=2)
    images = data.load_arrays("tfds:gray", data_dir=prepared, image_size=SIDE)
    assert as_set(images) == as_set(np.repeat(coffee[..., :1], 3, axis=-1))
    with pytest.raises(ValueError, match=r"needs a source with labels. Received: tfds:gray"):
        data.load_arrays("tfds:gray", data_dir=prepared, image_size=SIDE, with_labels=True)


def test_bad_tfds_requests_name_what_exists(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"tfds:tiny has the splits \['test', 'train'\], .*'val'"):
        data.load("tfds:tiny", data_dir=prepared, batch_size=2, split="val")
    for split in ("train[2:2]", "train[:3", None, ["train"]):
        with pytest.raises(ValueError, match=r"as in 'test' or 'test\[:100\]'\. Received: split="):
            data.load("tfds:tiny", data_dir=prepared, batch_size=2, split=split)
    with pytest.raises(ValueError, match=r"\['gray', 'other', 'tiny'\].*tfds:tyni") as caught:
        data.load("tfds:tyni", data_dir=prepared, batch_size=2)
    assert len(str(caught.value)) < 500  # TFDS's own message lists a thousand names
    with pytest.raises(ValueError, match=r"tfds:mnist .*`tfds build mnist --data_dir="):
        data.load("tfds:mnist", data_dir=str(tmp_path), batch_size=2)
    with pytest.raises(ValueError, match=r"image feature named 'image'\..*\['x'\]"):
        data.load("tfds:other", data_dir=prepared, batch_size=2)


# --- with_auxiliary -----------------------------------------------------------------------------


def numbered(count, batch_size, side=8, **options):
    """Batches of images of which the i-th is filled with the value i."""
    values = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return data.load(values * np.ones((side, side, 3), np.uint8), batch_size=batch_size, **options)


@pytest.mark.parametrize("auxiliary_count", [3, 5, 64])
@pytest.mark.parametrize("auxiliary_batch", [1, 4, 7])
def test_auxiliary_is_repeated_rebatched_and_cut(auxiliary_count, auxiliary_batch):
    joined = data.with_auxiliary(numbered(10, 4), numbered(auxiliary_count, auxiliary_batch))
    assert joined.cardinality() == 3
    batches = list(joined.as_numpy_iterator())
    assert [batch["images"].shape for batch in batches] == [(n, 8, 8, 3) for n in (4, 4, 2)]
    assert [batch["auxiliary"].shape for batch in batches] == [(n, 8, 8, 3) for n in (4, 4, 2)]
    images = np.concatenate([batch["images"][:, 0, 0, 0] for batch in batches])
    auxiliary = np.concatenate([batch["auxiliary"][:, 0, 0, 0] for batch in batches])
    assert images.tolist() == list(range(10))
    cycle = itertools.islice(itertools.cycle(range(auxiliary_count)), 10)
    assert auxiliary.tolist() == list(cycle)


def test_with_auxiliary_keeps_static_shapes_and_resizes():
    joined = data.with_auxiliary(
        numbered(10, 4, drop_remainder=True), numbered(6, 3, side=16, drop_remainder=True)
    )
    spec = tf.TensorSpec((4, 8, 8, 3), tf.uint8)
    assert joined.element_spec == {"images": spec, "auxiliary": spec}
    assert joined.cardinality() == 2
    values = [batch["auxiliary"][:, 3, 3, 0].tolist() for batch in joined.as_numpy_iterator()]
    assert values == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_with_auxiliary_takes_batches_of_several_sizes():
    def batches():
        for side in (8, 16, 12):
            yield np.full((2, side, side, 3), side, np.uint8)

    several = tf.data.Dataset.from_generator(
        batches, output_signature=tf.TensorSpec((None, None, None, 3), tf.uint8)
    )
    joined = data.with_auxiliary(numbered(6, 3), several)
    values = [batch["auxiliary"][:, 3, 3, 0].tolist() for batch in joined.as_numpy_iterator()]
    assert values == [[8, 8, 16], [16, 12, 12]]


def test_with_auxiliary_resizes_floats_within_range():
    step = np.zeros((2, 16, 16, 3), np.float32)
    step[:, :, 8:] = 255.0  # bicubic interpolation overshoots here on both sides
    floats = tf.data.Dataset.from_tensor_slices(step).batch(2)
    batch = next(iter(data.with_auxiliary(numbered(2, 2, side=32), floats)))
    assert batch["images"].dtype == tf.uint8
    assert batch["auxiliary"].dtype == tf.float32
    assert batch["auxiliary"].shape == (2, 32, 32, 3)
    assert batch["auxiliary"].numpy().min() == 0.0
    assert batch["auxiliary"].numpy().max() == 255.0


def test_the_end_of_an_epoch_waits_for_no_tuning_thread(coffee, chelsea):
    batches = data.with_auxiliary(data.load(coffee, batch_size=2), data.load(chelsea, batch_size=2))
    assert batches.options().autotune.enabled is False


def test_with_auxiliary_of_unknown_and_infinite_length():
    images = numbered(10, 4).filter(lambda batch: True)
    assert images.cardinality() == tf.data.UNKNOWN_CARDINALITY
    joined = data.with_auxiliary(images, numbered(3, 2).filter(lambda batch: True))
    assert [len(batch["auxiliary"]) for batch in joined] == [4, 4, 2]
    endless = data.with_auxiliary(numbered(10, 4).repeat(), numbered(3, 2))
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    sizes = [len(batch["auxiliary"]) for batch in endless.take(7)]
    assert sizes == [4, 4, 2, 4, 4, 2, 4]


def test_with_auxiliary_repeats_by_seed():
    def order(seed):
        joined = data.with_auxiliary(
            numbered(20, 4, shuffle=True, seed=seed), numbered(50, 4, shuffle=True, seed=seed)
        )
        return [
            value[:, 0, 0, 0].tolist()
            for _ in range(2)
            for batch in joined.as_numpy_iterator()
            for value in batch.values()
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_with_auxiliary_refuses_empty_datasets():
    full, empty = numbered(10, 4), numbered(10, 4).take(0)
    unknown = full.filter(lambda batch: tf.shape(batch)[0] > 100)
    with pytest.raises(ValueError, match="auxiliary must hold at least one batch"):
        data.with_auxiliary(full, empty)
    with pytest.raises(tf.errors.InvalidArgumentError, match="auxiliary must hold at least one"):
        next(iter(data.with_auxiliary(full, unknown)))
    for bad in (empty, unknown):
        with pytest.raises(ValueError, match="images must hold at least one batch"):
            data.with_auxiliary(bad, full)


def test_with_auxiliary_refuses_what_is_not_image_batches(coffee):
    full = numbered(10, 4)
    slices = tf.data.Dataset.from_tensor_slices
    with pytest.raises(TypeError, match=r"auxiliary must be .*load\(array.* Received: ndarray"):
        data.with_auxiliary(full, coffee)
    with pytest.raises(TypeError, match=r"images must be .* Received: list"):
        data.with_auxiliary([full], full)
    for bad in (
        slices(coffee),
        slices((coffee, np.arange(10))).batch(2),
        slices(coffee[..., :1]).batch(2),
        slices(coffee > 100).batch(2),
    ):
        with pytest.raises(ValueError, match=r"auxiliary.* must .*Received: "):
            data.with_auxiliary(full, bad)
    wide = slices(coffee.astype("uint16") * 257).batch(2)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"auxiliary.* must hold values in 0-255"
    ):
        next(iter(data.with_auxiliary(full, wide)))
