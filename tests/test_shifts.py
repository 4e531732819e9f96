"""Shifts against NumPy and SciPy, and as draws: one per image, uniform, repeatable."""

import itertools

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from sddns_tf import shifts

SEED = [3, 5]
RANDOM = [name for name in shifts.NAMES if name != "identity"]


def numbered(count, size):
    """Images whose every pixel and channel has its own value, float32."""
    one = np.arange(size * size * 3, dtype=np.float32).reshape(1, size, size, 3)
    return np.repeat(one, count, axis=0)


def quarter_turns(image, shifted):
    """The numbers of counter-clockwise quarter turns that make one image of the other."""
    return [turns for turns in range(4) if np.array_equal(np.rot90(image, turns), shifted)]


def patches(image, grid):
    """The grid's patches in reading order."""
    return [patch for row in np.split(image, grid) for patch in np.split(row, grid, axis=1)]


def patch_order(image, shifted, grid):
    originals = patches(image, grid)
    return tuple(
        next(i for i, original in enumerate(originals) if np.array_equal(original, patch))
        for patch in patches(shifted, grid)
    )


def p_value_of_uniform(draws, outcomes):
    counts = [draws.count(outcome) for outcome in outcomes]
    assert sum(counts) == len(draws)
    return scipy.stats.chisquare(counts).pvalue


def test_names():
    assert set(shifts.NAMES) == {"rot90", "rot360", "perm4", "perm16", "pixel_perm", "identity"}


def test_identity_keeps_the_images(photos):
    np.testing.assert_array_equal(shifts.get("identity")(photos, SEED), photos)


# ---- rotations


def test_rot90_is_one_of_the_three_quarter_turns(photos):
    shifted = shifts.rot90(photos, SEED)
    for image, turned in zip(photos, shifted.numpy(), strict=True):
        assert quarter_turns(image, turned) in ([1], [2], [3])


def test_rot90_draws_the_three_turns_alike():
    images = numbered(1500, 2)
    turns = [
        quarter_turns(image, turned)[0]
        for image, turned in zip(images, shifts.rot90(images, SEED).numpy(), strict=True)
    ]
    assert p_value_of_uniform(turns, [1, 2, 3]) > 1e-3


@pytest.mark.parametrize("degrees", [0.0, 17.0, 45.0, 90.0, 123.4, 180.0, 270.0, 359.0])
@pytest.mark.parametrize("size", [64, 41])
def test_rotate_is_scipys(photos, degrees, size):
    images = photos[:2, :size, :size].astype(np.float32)
    ours = shifts.rotate(images, tf.fill([2], np.float32(np.deg2rad(degrees))))
    expected = [
        # "grid-constant" interpolates with the black outside, as we do.
        ndimage.rotate(image, degrees, reshape=False, order=1, mode="grid-constant")
        for image in images.astype(np.float64)
    ]
    np.testing.assert_allclose(ours, expected, atol=0.05)


def test_rotate_by_a_quarter_is_counter_clockwise(photos):
    turned = shifts.rotate(tf.constant(photos), tf.fill([8], np.float32(np.pi / 2)))
    np.testing.assert_array_equal(turned, np.rot90(photos, axes=(1, 2)))


def test_rotate_turns_each_image_by_its_own_angle(photos):
    angles = tf.linspace(0.0, 6.0, 8)
    images = photos.astype(np.float32)
    together = shifts.rotate(images, angles)
    for i in range(8):
        alone = shifts.rotate(images[i : i + 1], angles[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, atol=0.05)


def test_rotate_rounds_integers(photos):
    angles = tf.linspace(0.0, 6.0, 8)
    exact = shifts.rotate(photos.astype(np.float32), angles)
    rounded = shifts.rotate(photos, angles)
    assert rounded.dtype == tf.uint8
    # Odd sums of two halves may fall to either side.
    assert np.abs(rounded.numpy() - exact.numpy()).max() <= 0.51


def test_rot360_angles_are_uniform():
    # A horizontal ramp: from the rotated image's gradient the angle can be read.
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, np.newaxis], (8, 8, 3))
    shifted = shifts.rot360(np.repeat(ramp[np.newaxis], 2000, axis=0), SEED).numpy()[..., 0]
    down = shifted[:, 4, 3] - shifted[:, 3, 3]
    right = shifted[:, 3, 4] - shifted[:, 3, 3]
    angles = np.arctan2(right, down)
    uniform = scipy.stats.uniform(-np.pi, 2 * np.pi)
    assert scipy.stats.kstest(angles, uniform.cdf).pvalue > 1e-3


# ---- permutations of patches


def test_perm4_is_uniform_over_all_orders_but_the_identity():
    images = numbered(23 * 200, 2)
    orders = [
        patch_order(image, shifted, 2)
        for image, shifted in zip(images, shifts.perm4(images, SEED).numpy(), strict=True)
    ]
    others = list(itertools.permutations(range(4)))[1:]
    assert (0, 1, 2, 3) not in orders
    assert p_value_of_uniform(orders, others) > 1e-3


@pytest.mark.parametrize(("shift", "grid"), [(shifts.perm4, 2), (shifts.perm16, 4)])
def test_patches_are_moved_whole(photos, shift, grid):
    orders = [
        patch_order(image, shifted, grid)
        for image, shifted in zip(photos, shift(photos, SEED).numpy(), strict=True)
    ]
    assert all(sorted(order) == list(range(grid**2)) for order in orders)
    assert len(set(orders)) > 4


def test_perm16_puts_each_patch_anywhere():
    images = numbered(1600, 4)
    orders = np.array(
        [
            patch_order(image, shifted, 4)
            for image, shifted in zip(images, shifts.perm16(images, SEED).numpy(), strict=True)
        ]
    )
    for place in range(16):
        assert p_value_of_uniform(orders[:, place].tolist(), range(16)) > 1e-4


@given(size=st.integers(1, 9), count=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_pixel_perm_moves_pixels_with_their_channels(size, count, seed):
    images = numbered(count, size)
    shifted = shifts.pixel_perm(images, [seed, 0]).numpy()
    for image, result in zip(images, shifted, strict=True):
        pixels = result.reshape(-1, 3)
        np.testing.assert_array_equal(np.sort(pixels[:, 0]), image.reshape(-1, 3)[:, 0])
        np.testing.assert_array_equal(pixels - pixels[:, :1], [[0, 1, 2]] * size**2)


def test_pixel_perm_puts_each_pixel_anywhere():
    first = shifts.pixel_perm(numbered(1800, 3), SEED).numpy()[:, 0, 0, 0]
    assert p_value_of_uniform(first.tolist(), range(0, 27, 3)) > 1e-3


# ---- what holds for all


@pytest.mark.parametrize("name", RANDOM)
def test_each_image_has_its_own_draw(photos, name):
    same = np.repeat(photos[:1], 8, axis=0)
    shifted = shifts.get(name)(same, SEED).numpy()
    assert len(np.unique(shifted, axis=0)) >= (3 if name == "rot90" else 5)


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_alone_decides(photos, name):
    shift = shifts.get(name)
    first = shift(photos, SEED)
    np.testing.assert_array_equal(shift(photos, SEED), first)
    np.testing.assert_array_equal(shift(tf.constant(photos), tf.constant(SEED)), first)
    assert not np.array_equal(shift(photos, [3, 6]), first)


@pytest.mark.parametrize("name", (*shifts.NAMES, "cut_paste"))
@pytest.mark.parametrize("dtype", [tf.uint8, tf.float32, tf.bfloat16])
def test_shape_and_dtype_stay(photos, name, dtype):
    images = tf.cast(photos, dtype)
    shifted = shifts.get(name)(images, SEED)
    assert shifted.dtype == dtype
    assert shifted.shape == images.shape


@pytest.mark.parametrize("name", ["rot90", "rot360", "pixel_perm", "identity"])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_squares_of_any_side(photos, name, size):
    images = photos[:, :size, :size]
    assert shifts.get(name)(images, SEED).shape == images.shape


@pytest.mark.parametrize("name", (*shifts.NAMES, "cut_paste"))
def test_compiles_with_an_unknown_batch(photos, name):
    shift = tf.function(
        shifts.get(name),
        input_signature=[tf.TensorSpec([None, 16, 16, 3], tf.uint8), tf.TensorSpec([2], tf.int32)],
        jit_compile=True,
    )
    images = photos[:, :16, :16]
    shifted = shift(images, SEED).numpy()
    if name == "identity":
        np.testing.assert_array_equal(shifted, images)
    elif name in ("rot360", "cut_paste"):
        assert shifted.shape == images.shape
    else:
        assert not np.array_equal(shifted, images)
        for image, result in zip(images, shifted, strict=True):
            np.testing.assert_array_equal(
                np.unique(result.reshape(-1, 3), axis=0, return_counts=True)[1],
                np.unique(image.reshape(-1, 3), axis=0, return_counts=True)[1],
            )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rot90", (2, 8, 9, 3)),
        ("rot360", (2, 8, 9, 3)),
        ("pixel_perm", (2, 8, 9, 3)),
        ("perm4", (2, 9, 9, 3)),
        ("perm16", (2, 10, 10, 3)),
        ("perm16", (2, 16, 8, 3)),
    ],
)
def test_wrong_sides_are_named(name, shape):
    with pytest.raises(ValueError, match=rf"{name}.*square.*{shape[1]}, {shape[2]}, 3"):
        shifts.get(name)(np.zeros(shape, np.uint8), SEED)


def test_get():
    assert shifts.get("perm4") is shifts.perm4

    def own(images, seed):
        return images

    assert shifts.get(own) is own
    for unknown in ("rot45", None, 3):
        with pytest.raises(ValueError, match=r"callable.*'rot90'.*Received: "):
            shifts.get(unknown)
