"""Image arithmetic against Pillow, SciPy and scikit-image."""

import itertools

import numpy as np
import pytest
import skimage.color
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from sddns_tf import image_ops


def with_pillow(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def with_pillow_in_float(images, change):
    """The same for each channel alone, in Pillow's mode "F": neither rounded nor clipped."""
    channels = [
        with_pillow(images[..., channel].astype(np.float32), change) for channel in range(3)
    ]
    return np.stack(channels, axis=-1)


def soft(images):
    """Images of little contrast: no overshoot of the resampling is clipped."""
    return images // 2 + np.uint8(64)


# Pillow rounds uint8 images after each of its two passes.
ROUNDED_TWICE = 1.5


def hue_shifted(image, turns):
    """Float64 image in 0-255 with its hue rotated in HSV."""
    hsv = skimage.color.rgb2hsv(image / 255.0)
    hsv[..., 0] = (hsv[..., 0] + turns) % 1.0
    return 255.0 * skimage.color.hsv2rgb(hsv)


def gray(image):
    return image @ np.array([0.299, 0.587, 0.114])


def jitter(images, **changes):
    """`jitter_color` of a batch with the same factors for each image."""
    neutral = {
        "brightness": 1.0,
        "contrast": 1.0,
        "saturation": 1.0,
        "hue": 0.0,
        "contrast_first": True,
        "saturation_first": True,
    }
    arguments = {name: tf.fill([len(images)], value) for name, value in (neutral | changes).items()}
    return image_ops.from_planes(
        image_ops.jitter_color(image_ops.to_planes(images), **arguments)
    ).numpy()


# ---- resampling


@pytest.mark.parametrize(
    ("left", "top", "width", "height", "out_width", "out_height"),
    [
        (0, 0, 64, 64, 32, 32),
        (5, 9, 40, 31, 16, 16),
        (7, 0, 50, 64, 33, 21),
        (20, 30, 11, 9, 32, 32),
        (0, 40, 64, 24, 24, 64),
        (63, 63, 1, 1, 8, 8),
    ],
)
def test_resampling_matrices_are_pillows_crop_and_resize(
    photos, left, top, width, height, out_width, out_height
):
    rows = image_ops.resampling_matrix(64, out_height, tf.constant(float(top)), float(height))
    columns = image_ops.resampling_matrix(64, out_width, tf.constant(float(left)), float(width))
    box = (left, top, left + width, top + height)

    def crop(image):
        return image.crop(box).resize((out_width, out_height), Image.Resampling.BICUBIC)

    def ours(images):
        planes = image_ops.resample(image_ops.to_planes(images), rows, columns)
        return image_ops.from_planes(planes).numpy()

    exact = with_pillow_in_float(photos, crop)
    np.testing.assert_allclose(ours(photos), exact, atol=1e-3)
    assert np.abs(ours(soft(photos)) - with_pillow(soft(photos), crop)).max() <= ROUNDED_TWICE


def test_each_image_of_a_batch_gets_its_own_crop(photos):
    starts, extents = tf.constant([3.0, 10.0]), tf.constant([20.0, 41.0])
    together = image_ops.resampling_matrix(64, 16, starts, extents)
    assert together.shape == (2, 16, 64)
    for matrix, start, extent in zip(together, starts, extents, strict=True):
        np.testing.assert_allclose(matrix, image_ops.resampling_matrix(64, 16, start, extent))


@given(data=st.data(), in_size=st.integers(1, 60), out_size=st.integers(1, 60))
def test_resampling_rows_sum_to_one_and_stay_in_the_crop(data, in_size, out_size):
    extent = data.draw(st.integers(1, in_size))
    start = data.draw(st.integers(0, in_size - extent))
    matrix = image_ops.resampling_matrix(
        in_size, out_size, tf.constant(float(start)), tf.constant(float(extent))
    ).numpy()
    assert matrix.shape == (out_size, in_size)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
    outside = np.ones(in_size, bool)
    outside[start : start + extent] = False
    assert not matrix[:, outside].any()
    if extent == out_size:
        np.testing.assert_allclose(matrix[:, ~outside], np.eye(extent), atol=1e-6)


def test_bicubic_kernel_interpolates_and_has_the_given_slope():
    kernel = image_ops.bicubic_kernel(tf.constant([0.0, 1.0, -1.0, 2.0, 3.0, -7.0]))
    np.testing.assert_allclose(kernel, [1, 0, 0, 0, 0, 0], atol=1e-6)
    # Keys' derivative at distance 1 is `a`.
    for a in (-0.5, -0.75):
        near = image_ops.bicubic_kernel(tf.constant([0.99, 1.01]), a).numpy()
        assert (near[1] - near[0]) / 0.02 == pytest.approx(a, abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 40), (96, 80), (64, 30)])
def test_resize_is_pillows(photos, height, width):
    def change(image):
        return image.resize((width, height), Image.Resampling.BICUBIC)

    ours = image_ops.resize(photos, height, width)
    assert ours.dtype == tf.float32
    assert ours.shape == (8, height, width, 3)
    exact = np.clip(with_pillow_in_float(photos, change), 0, 255)
    np.testing.assert_allclose(ours, exact, atol=1e-3)
    softened = image_ops.resize(soft(photos), height, width)
    assert np.abs(softened - with_pillow(soft(photos), change)).max() <= ROUNDED_TWICE
    np.testing.assert_array_equal(image_ops.resize(photos.astype(np.float32), height, width), ours)


def test_resize_clips_the_overshoot():
    edge = np.zeros((1, 8, 8, 3), np.uint8)
    edge[:, :, 4:] = 255
    resized = image_ops.resize(edge, 32, 32).numpy()
    assert resized.min() == 0.0
    assert resized.max() == 255.0


def test_resize_to_the_same_size_keeps_the_pixels(photos):
    np.testing.assert_array_equal(image_ops.resize(photos, 64, 64), photos)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_resize_takes_sizes_unknown_at_trace_time(photos, jit_compile):
    resize = tf.function(
        lambda images: image_ops.resize(images, 24, 20),
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)],
        jit_compile=jit_compile,
    )
    for images in (photos, photos[:2, :40, :33], photos[:1, :24, :20]):
        np.testing.assert_allclose(resize(images), image_ops.resize(images, 24, 20), atol=1e-3)


def test_planes_round_trip(photos):
    planes = image_ops.to_planes(photos)
    assert planes.dtype == tf.float32
    np.testing.assert_array_equal(planes, photos.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(image_ops.from_planes(planes), photos)
    views = photos.reshape(2, 4, 64, 64, 3)
    np.testing.assert_array_equal(image_ops.from_planes(image_ops.to_planes(views)), views)


# ---- normalization


def test_normalize_is_the_formula(photos):
    scaled = photos.astype(np.float64) / 255.0
    expected = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    normalized = image_ops.normalize(photos)
    assert normalized.dtype == tf.float32
    np.testing.assert_allclose(normalized, expected, atol=2e-6)
    np.testing.assert_allclose(
        image_ops.normalize(photos, mean=(0.5, 0.4, 0.3), std=(1.0, 0.5, 0.25)),
        (scaled - [0.5, 0.4, 0.3]) / [1.0, 0.5, 0.25],
        atol=2e-6,
    )


# ---- color


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_one_color_operation_is_pillows(photos, name, enhance, factor):
    ours = np.clip(jitter(photos, **{name: factor}), 0, 255)
    pillow = with_pillow(photos, lambda image: enhance(image).enhance(factor))
    # Pillow rounds the gray value, then truncates the blend.
    assert np.abs(ours - pillow).max() <= 2.0


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.04, 0.1, 0.37])
def test_hue_shift_is_a_rotation_in_hsv(photos, turns):
    planes = image_ops.shift_hue(image_ops.to_planes(photos), tf.fill([8], turns))
    expected = np.stack([hue_shifted(image, turns) for image in photos])
    np.testing.assert_allclose(image_ops.from_planes(planes), expected, atol=2e-3)


def test_hue_shift_leaves_gray_alone():
    grays = np.repeat(np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1), 3, axis=-1)
    shifted = image_ops.shift_hue(image_ops.to_planes(grays), tf.constant([0.3]))
    np.testing.assert_array_equal(image_ops.from_planes(shifted), grays)


@pytest.mark.parametrize("order", list(itertools.permutations(["b", "c", "s", "h"])), ids="".join)
def test_every_order_of_the_color_operations_is_one_expression(photos, order):
    brightness, contrast, saturation, hue = 1.3, 0.65, 1.2, 0.09
    image = photos[2].astype(np.float64)

    def with_contrast(x):
        return contrast * x + (1.0 - contrast) * gray(x).mean()

    def with_saturation(x):
        return saturation * x + (1.0 - saturation) * gray(x)[..., np.newaxis]

    one_by_one = {
        "b": lambda x: brightness * x,
        "c": with_contrast,
        "s": with_saturation,
        "h": lambda x: hue_shifted(x, hue),
    }
    expected = image
    for operation in order:
        expected = one_by_one[operation](expected)
    ours = jitter(
        image[np.newaxis],
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        contrast_first=order.index("c") < order.index("h"),
        saturation_first=order.index("s") < order.index("h"),
    )
    np.testing.assert_allclose(ours[0], expected, atol=5e-3)


def test_the_orders_differ(photos):
    changes = {"contrast": 0.6, "saturation": 1.4, "hue": 0.1}
    results = [
        jitter(photos, contrast_first=c, saturation_first=s, **changes)
        for c, s in itertools.product([False, True], repeat=2)
    ]
    for one, other in itertools.combinations(results, 2):
        assert np.abs(one - other).max() > 0.1


def test_color_jitter_is_per_image(photos):
    factors = tf.linspace(0.6, 1.4, 8)
    order = tf.constant([True, False] * 4)
    planes = image_ops.to_planes(photos)
    hue = tf.linspace(-0.1, 0.1, 8)
    together = image_ops.jitter_color(planes, factors, factors, factors, hue, order, ~order)
    for i in range(8):
        one = slice(i, i + 1)
        alone = image_ops.jitter_color(
            planes[one], *(factors[one],) * 3, hue[one], order[one], ~order[one]
        )
        np.testing.assert_allclose(together[one], alone, atol=1e-3)


def test_luma_is_pillows_gray(photos):
    pillow = with_pillow(photos, lambda image: image.convert("L"))
    ours = image_ops.mix_channels(image_ops.gray_matrix(), image_ops.to_planes(photos))[:, :1]
    assert ours.shape == (8, 1, 64, 64)
    assert np.abs(ours[:, 0] - pillow).max() <= 0.51


@pytest.mark.parametrize("threshold", [128, 60])
def test_solarize_is_pillows(photos, threshold):
    pillow = with_pillow(photos, lambda image: ImageOps.solarize(image, threshold))
    ours = image_ops.solarize(tf.cast(photos, tf.float32), float(threshold))
    np.testing.assert_array_equal(ours, pillow)


def test_solarize_inverts_from_128_on():
    np.testing.assert_array_equal(
        image_ops.solarize(tf.constant([0.0, 127.0, 128.0, 255.0])), [0, 127, 127, 0]
    )


# ---- blur


def test_blur_is_scipys_away_from_the_edges(photos):
    sigma = np.array([0.3, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0, 3.0], np.float32)
    kernel = image_ops.gaussian_matrix(64, sigma)
    assert kernel.shape == (8, 64, 64)
    blurred = image_ops.from_planes(
        image_ops.resample(image_ops.to_planes(photos), kernel, kernel)
    ).numpy()
    for image, ours, s in zip(photos.astype(np.float64), blurred, sigma, strict=True):
        expected = ndimage.gaussian_filter(image, (s, s, 0), truncate=6.0)
        margin = int(np.ceil(5 * s))
        inner = slice(margin, 64 - margin)
        np.testing.assert_allclose(ours[inner, inner], expected[inner, inner], atol=0.01)


def test_blur_keeps_a_constant_image_and_zero_sigma_any_image():
    kernels = image_ops.gaussian_matrix(20, tf.constant([2.0, 0.0]))
    np.testing.assert_allclose(tf.reduce_sum(kernels, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(kernels[1], np.eye(20))
