"""Multi-crop and negatives: what a view is made of, and the distributions it is drawn from."""

import itertools
import math

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from sddns_tf import image_ops, shifts
from sddns_tf.views import Draws, MultiCrop, Negatives, crop_boxes

SEED = [3, 5]

# A view that is the image itself; each test switches on what it looks at.
PLAIN = {
    "local_views": 0,
    "global_area": (1.0, 1.0),
    "aspect_ratio": (1.0, 1.0),
    "flip": 0.0,
    "color_jitter": 0.0,
    "grayscale": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}

# Run on the host, or not in XLA, or not in TFLite: none may be in a training graph.
HOST_ONLY = {
    "PyFunc",
    "EagerPyFunc",
    "PyFuncStateless",
    "Map",
    "ResizeBicubic",
    "CropAndResize",
    "ImageProjectiveTransformV2",
    "ImageProjectiveTransformV3",
    "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2",
    "While",
    "StatelessWhile",
}


def plain(image_size, **options):
    return MultiCrop(image_size, **{**PLAIN, **options})


def copies(image, count):
    return np.repeat(image[np.newaxis], count, axis=0)


def global_views(views, images, seed=SEED):
    return views(images, seed)[0].numpy()


def assert_rate(happened, probability):
    """A two-sided binomial test that a fair draw fails once in ten thousand."""
    happened = np.asarray(happened)
    assert scipy.stats.binomtest(int(happened.sum()), happened.size, probability).pvalue > 1e-4


def assert_uniform(values, low, high):
    slack = 2e-3 * (high - low)
    assert values.min() >= low - slack
    assert values.max() <= high + slack
    uniform = scipy.stats.uniform(low, high - low)
    assert scipy.stats.kstest(np.ravel(values), uniform.cdf).pvalue > 1e-4


def compiled(function):
    """The function under XLA, for any batch of 32 px images."""
    signature = [tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([2], tf.int32)]
    return tf.function(function, input_signature=signature, jit_compile=True)


def operations(function, *arguments):
    """Types of all operations of a traced function, those of the functions it calls too."""
    graph = tf.function(function).get_concrete_function(*arguments).graph.as_graph_def()
    nodes = [*graph.node, *itertools.chain(*(f.node_def for f in graph.library.function))]
    return {node.op for node in nodes}


# ---- views


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"local_views": 4}, [(2, 8, 32, 32, 3), (4, 8, 16, 16, 3)]),
        ({}, [(2, 8, 32, 32, 3), (8, 8, 16, 16, 3)]),
        ({"local_views": 1, "local_size": 20}, [(2, 8, 32, 32, 3), (1, 8, 20, 20, 3)]),
        ({"local_views": 0}, [(2, 8, 32, 32, 3)]),
    ],
)
def test_groups_hold_the_views_of_one_resolution(photos, options, shapes):
    views = MultiCrop(32, **options)
    groups = views(photos, SEED)
    assert [tuple(group.shape) for group in groups] == shapes
    assert views.sizes == tuple(shape[2] for shape in shapes)
    negative = views.negative(photos, SEED)
    assert [tuple(g.shape) for g in negative] == [(1, *shapes[0][1:]), *shapes[1:]]
    for group in (*groups, *negative):
        assert group.dtype == tf.float32
        assert float(tf.reduce_min(group)) >= 0.0
        # The blur's weights sum to 1 but for rounding.
        assert 200.0 < float(tf.reduce_max(group)) <= 255.001
        assert np.isfinite(group).all()


def test_the_seed_alone_decides(photos):
    views = MultiCrop(32, local_views=2)
    for method in (views, views.negative):
        first = method(photos, SEED)
        for again in (method(photos, SEED), method(tf.constant(photos), tf.constant(SEED))):
            for one, other in zip(first, again, strict=True):
                np.testing.assert_array_equal(one, other)
        for one, other in zip(first, method(photos, [3, 6]), strict=True):
            assert (np.abs(one - other).mean(axis=(2, 3, 4)) > 1.0).all()


def test_each_view_and_image_has_its_own_draw(photos):
    same = copies(photos[0], 6)
    for group in MultiCrop(32, local_views=3)(same, SEED):
        views = group.numpy().reshape(-1, *group.shape[2:])
        for one, other in itertools.combinations(views, 2):
            assert np.abs(one - other).mean() > 1.0


def test_integers_and_floats_give_equal_views(photos):
    views = MultiCrop(32, local_views=2)
    from_integers = views(photos, SEED)
    for one, other in zip(from_integers, views(photos.astype(np.float32), SEED), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_view_of_the_whole_image_is_the_image(photos):
    np.testing.assert_allclose(global_views(plain(64), photos), np.stack([photos] * 2), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 40), (24, 64), (33, 47)])
def test_a_crop_and_its_flip_are_pillows(photos, monkeypatch, height, width):
    boxes = []

    def recorded(*arguments):
        drawn = crop_boxes(*arguments)
        boxes.append([x.numpy().astype(int) for x in drawn])
        return drawn

    monkeypatch.setattr("sddns_tf.views.crop_boxes", recorded)
    # Little contrast: Pillow clips overshoot between its two passes, we do after both.
    images = photos[:, :height, :width] // 2 + np.uint8(64)
    views = global_views(
        plain(20, global_area=(0.3, 0.9), aspect_ratio=(3 / 4, 4 / 3), flip=0.5), images
    )
    flips = 0
    for v, i in np.ndindex(2, 8):
        top, left, crop_height, crop_width = (x[v, i] for x in boxes[0])
        assert top >= 0 and left >= 0
        assert top + crop_height <= height and left + crop_width <= width
        pillow = np.asarray(
            Image.fromarray(images[i])
            .crop((left, top, left + crop_width, top + crop_height))
            .resize((20, 20), Image.Resampling.BICUBIC)
        )
        straight, flipped = (np.abs(views[v, i] - p).max() for p in (pillow, pillow[:, ::-1]))
        assert min(straight, flipped) <= 1.5
        flips += flipped < straight
    assert 0 < flips < 16


def test_flip_rate(photos):
    image = photos[0, :16, :16]
    views = global_views(plain(16, flip=0.3), copies(image, 1000))
    flipped = np.abs(views - image).max(axis=(2, 3, 4)) > 1.0
    np.testing.assert_allclose(views[flipped], copies(image[:, ::-1], flipped.sum()), atol=1e-3)
    assert_rate(flipped, 0.3)
    # Neither the two views of an image nor neighbors in the batch share a draw.
    assert_rate(flipped[0] & flipped[1], 0.09)
    assert_rate(flipped[:, :-1] & flipped[:, 1:], 0.09)


def test_default_rates(photos):
    """Flip, jitter, gray, blur and solarization each alone, at the constructor's defaults."""
    image = photos[0, :16, :16]
    images = copies(image, 600)
    for name in ("flip", "color_jitter", "grayscale", "blur", "solarize"):
        options = {key: value for key, value in PLAIN.items() if key != name}
        options |= {"local_views": 2, "local_size": 16, "local_area": (1.0, 1.0)}
        # A sigma that shows in 16 px.
        views = MultiCrop(16, blur_sigma=(14.0, 28.0), **options)
        changed = [np.abs(group - image).max(axis=(2, 3, 4)) > 0.5 for group in views(images, SEED)]
        expected = {
            "flip": (0.5, 0.5, 0.5),
            "color_jitter": (0.8, 0.8, 0.8),
            "grayscale": (0.2, 0.2, 0.2),
            "blur": (1.0, 0.1, 0.5),
            "solarize": (0.0, 0.2, 0.0),
        }[name]
        for happened, rate in zip((*changed[0], changed[1]), expected, strict=True):
            assert_rate(happened, rate)


def test_gray_views_have_pillows_gray(photos):
    views = global_views(plain(64, grayscale=1.0), photos)
    gray = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in photos])
    assert np.abs(views - gray[..., np.newaxis]).max() <= 0.52


def test_solarized_views_are_inverted_from_128_on(photos):
    # The crop's arithmetic may leave 128 a hair below itself.
    images = np.where(photos == 128, np.uint8(129), photos)
    views = global_views(plain(64, solarize=(0.0, 1.0, 0.0)), images)
    np.testing.assert_allclose(views[0], images, atol=1e-3)
    expected = np.where(images < 128, images, 255 - images)
    np.testing.assert_allclose(views[1], expected, atol=1e-3)


def test_whole_numbers_are_probabilities_too(photos):
    whole = MultiCrop(
        16, local_views=1, flip=0, color_jitter=1, grayscale=0, blur=(1, 0, 0), solarize=(0, 1, 0)
    )
    floats = MultiCrop(
        16, 1, flip=0.0, color_jitter=1.0, grayscale=0.0, blur=(1.0, 0.0, 0.0), solarize=(0, 1.0, 0)
    )
    for one, other in zip(whole(photos, SEED), floats(photos, SEED), strict=True):
        np.testing.assert_array_equal(one, other)


def test_blur_sigma_is_uniform_and_scaled_with_the_size():
    impulse = np.zeros((33, 33, 3), np.uint8)
    impulse[16, 16] = 255
    views = plain(33, blur=(1.0, 1.0, 0.0), blur_sigma=(4.0, 12.0))
    blurred = global_views(views, copies(impulse, 500))[..., 0]
    # exp(-1 / (2 sigma^2)) is the ratio of two neighbors.
    sigma = np.sqrt(-0.5 / np.log(blurred[:, :, 16, 17] / blurred[:, :, 16, 16]))
    assert_uniform(sigma * 224 / 33, 4.0, 12.0)
    expected = ndimage.gaussian_filter(impulse[..., 0].astype(float), sigma[1, 7], truncate=8.0)
    np.testing.assert_allclose(blurred[1, 7], expected, atol=0.01)


def test_local_views_are_blurred_as_widely_as_global_ones():
    """In pixels: the authors scale sigma with the full size, whatever the size of the view."""
    stripe = np.zeros((32, 32, 3), np.uint8)
    stripe[:, 16:] = 255
    views = MultiCrop(
        32,
        local_views=1,
        local_size=16,
        local_area=(1.0, 1.0),
        aspect_ratio=(1.0, 1.0),
        flip=0.0,
        color_jitter=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0, 1.0),
        blur_sigma=(7.0, 7.0),
        solarize=(0.0, 0.0, 0.0),
    )
    blurred = views(stripe[np.newaxis], SEED)[1][0, 0, 8, :, 0].numpy()
    sharp = MultiCrop.from_config({**views.get_config(), "blur": (0.0, 0.0, 0.0)})
    edge = sharp(stripe[np.newaxis], SEED)[1][0, 0, 8, :, 0].numpy()
    expected = ndimage.gaussian_filter1d(edge.astype(float), 7.0 * 32 / 224, truncate=8.0)
    np.testing.assert_allclose(blurred[4:12], expected[4:12], atol=0.01)
    assert np.abs(blurred - edge).max() > 10.0


def test_jitter_factors_are_uniform(photos):
    images = copies(photos[5, 8:16, 8:16] // 2 + np.uint8(32), 800)
    one = images[0].astype(np.float64)
    gray = one @ image_ops.LUMA
    none = {"color_jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}

    def factor(name, size, toward):
        """The factor by which views lie on the line from `toward` to the image."""
        views = global_views(plain(8, **(none | {name: size})), images)
        direction = one - toward
        return ((views - toward) * direction).sum(axis=(2, 3, 4)) / (direction**2).sum()

    assert_uniform(factor("brightness", 0.4, 0.0), 0.6, 1.4)
    assert_uniform(factor("contrast", 0.3, gray.mean()), 0.7, 1.3)
    assert_uniform(factor("saturation", 0.2, gray[..., np.newaxis]), 0.8, 1.2)


def test_a_change_of_more_than_all_does_not_turn_negative(photos):
    bright = np.full((400, 4, 4, 3), 40, np.uint8)
    views = plain(4, color_jitter=1.0, brightness=1.5, contrast=0.0, saturation=0.0, hue=0.0)
    assert_uniform(global_views(views, bright)[:, :, 0, 0, 0] / 40, 0.0, 2.5)


def test_hue_shift_is_uniform():
    red = np.zeros((800, 4, 4, 3), np.uint8)
    red[..., 0], red[..., 1:] = 200, 50
    views = plain(4, color_jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.1)
    r, g, b = np.moveaxis(global_views(views, red)[:, :, 0, 0].astype(np.float64), -1, 0)
    np.testing.assert_allclose(r, 200, atol=1e-2)
    assert_uniform((g - b) / 150 / 6, -0.1, 0.1)


def test_the_order_of_the_color_operations_is_uniform(photos, monkeypatch):
    flags = {}

    def recorded(planes, **arguments):
        flags.update(arguments)
        return planes

    monkeypatch.setattr(image_ops, "jitter_color", recorded)
    plain(4, color_jitter=1.0)(copies(photos[0, :4, :4], 1000), SEED)
    contrast, saturation = flags["contrast_first"].numpy(), flags["saturation_first"].numpy()
    assert contrast.shape == (2, 1000)
    # Of the six orders of hue, contrast and saturation, hue comes first in two, last in two.
    assert_rate(contrast, 1 / 2)
    assert_rate(saturation, 1 / 2)
    assert_rate(contrast & saturation, 1 / 3)
    assert_rate(~contrast & ~saturation, 1 / 3)


def torchvision_boxes(count, height, width, area, aspect_ratio, seed=0):
    """`RandomResizedCrop.get_params` of torchvision, one box at a time."""
    generator = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        for _ in range(10):
            target = height * width * generator.uniform(*area)
            ratio = math.exp(generator.uniform(*np.log(aspect_ratio)))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = generator.integers(0, height - h + 1)
                left = generator.integers(0, width - w + 1)
                break
        else:
            w, h = width, height
            if width / height < aspect_ratio[0]:
                h = round(w / aspect_ratio[0])
            elif width / height > aspect_ratio[1]:
                w = round(h * aspect_ratio[1])
            top, left = (height - h) // 2, (width - w) // 2
        boxes.append((top, left, h, w))
    return np.array(boxes, float).T


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [
        (64, 64, (0.4, 1.0)),
        (32, 32, (0.05, 0.4)),
        (48, 80, (0.4, 1.0)),
        (200, 150, (0.15, 0.4)),
        (30, 30, (0.9, 1.0)),
    ],
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, area):
    ratio = (3 / 4, 4 / 3)
    draws = Draws([2, 3000], tf.constant(SEED))
    boxes = crop_boxes(draws, height, width, area, ratio)
    boxes = np.array([x.numpy().ravel() for x in boxes], np.float64)
    top, left, h, w = boxes
    np.testing.assert_array_equal(boxes, np.round(boxes))
    assert top.min() >= 0 and left.min() >= 0
    assert (top + h).max() <= height and (left + w).max() <= width
    # Half a pixel of rounding on each side.
    share = h * w / (height * width)
    slack = 0.6 * (h + w) / (height * width)
    assert (share >= area[0] - slack).all()
    assert (share <= area[1] + slack).all()
    theirs = torchvision_boxes(6000, height, width, area, ratio)
    for ours, reference in zip(
        (*boxes, *derived(boxes)),
        (*theirs, *derived(theirs)),
        strict=True,
    ):
        assert scipy.stats.ks_2samp(ours, reference).pvalue > 1e-4


def derived(boxes):
    top, left, h, w = boxes
    return h * w, np.log(w / h), top * w, h * left


def test_a_strip_gets_the_largest_box_of_an_allowed_ratio():
    for height, width, box in ((20, 100, (20, 27)), (90, 20, (27, 20)), (20, 20, (20, 20))):
        draws = Draws([1, 200], tf.constant(SEED))
        top, left, h, w = crop_boxes(draws, height, width, (0.95, 1.0), (3 / 4, 4 / 3))
        if height == width:
            # Here many attempts fit, and those that do are near the whole.
            assert float(tf.reduce_min(h * w)) >= 0.9 * 400
            continue
        assert set(zip(h.numpy().ravel(), w.numpy().ravel(), strict=True)) == {box}
        free = (top if height > width else left).numpy()
        assert free.min() >= 0
        assert free.max() <= max(height, width) - max(box)
        assert free.std() > 5


@pytest.mark.parametrize(("height", "width"), [(64, 30), (9, 64), (5, 5)])
def test_images_of_any_shape(photos, height, width):
    groups = MultiCrop(32, local_views=2)(photos[:, :height, :width], SEED)
    assert [tuple(g.shape) for g in groups] == [(2, 8, 32, 32, 3), (2, 8, 16, 16, 3)]
    assert all(np.isfinite(group).all() for group in groups)


def test_a_negatives_view_follows_one_of_the_two_recipes(photos):
    image = photos[0, :16, :16]
    # First recipe: blur always; second: solarize always.
    views = plain(16, blur=(1.0, 0.0, 0.0), blur_sigma=(28.0, 28.0), solarize=(0.0, 1.0, 0.0))
    (negative,) = views.negative(copies(image, 800), SEED)
    blurred, solarized = (group.numpy() for group in views(image[np.newaxis], SEED)[0])
    assert np.abs(blurred - solarized).max() > 10.0
    like_first, like_second = (
        np.abs(negative[0] - recipe).max(axis=(1, 2, 3)) < 0.5 for recipe in (blurred, solarized)
    )
    assert (like_first ^ like_second).all()
    assert_rate(like_first, 0.5)


def test_views_compile_with_an_unknown_batch(photos):
    views = MultiCrop(24, local_views=1)
    groups = compiled(views)(photos[:3, :32, :32], SEED)
    assert [tuple(g.shape) for g in groups] == [(2, 3, 24, 24, 3), (1, 3, 12, 12, 3)]
    for group in groups:
        assert np.isfinite(group).all()
        assert group.numpy().std() > 5.0


def test_negatives_compile_with_an_unknown_batch(photos):
    # Each shift is compiled alone in `test_shifts`.
    views, negatives = MultiCrop(24, local_views=0), Negatives("rot90", source="auxiliary")

    def of_smaller(images, seed):
        return negatives(views, images[:, :24, :24], images, seed)

    (group,) = compiled(of_smaller)(photos[:3, :32, :32], SEED)
    assert group.shape == (1, 3, 24, 24, 3)
    assert np.isfinite(group).all()
    assert group.numpy().std() > 5.0


def test_the_graph_runs_on_the_device_without_a_loop():
    views = MultiCrop(16, local_views=2)
    every_shift = [Negatives(name, source="auxiliary") for name in shifts.NAMES]

    def step(images, auxiliary, seed):
        without_local = MultiCrop(16, local_views=0)
        return views(images, seed), [n(without_local, images, auxiliary, seed) for n in every_shift]

    found = operations(
        step,
        tf.TensorSpec([None, 32, 32, 3], tf.uint8),
        tf.TensorSpec([None, 40, 40, 3], tf.uint8),
        tf.TensorSpec([2], tf.int32),
    )
    assert found >= {"BatchMatMulV2", "StatelessRandomUniformV2"}
    assert not found & HOST_ONLY


def test_a_host_function_would_be_found():
    def on_the_host(images):
        return tf.map_fn(lambda x: tf.numpy_function(np.flip, [x], tf.float32), images)

    found = operations(on_the_host, tf.TensorSpec([2, 4, 4, 3]))
    assert found & HOST_ONLY >= {"PyFunc"}


def test_multi_crop_survives_saving():
    views = MultiCrop(
        32,
        local_views=3,
        local_size=12,
        global_area=(0.5, 0.9),
        local_area=(0.15, 0.4),
        aspect_ratio=(0.9, 1.1),
        flip=0.1,
        color_jitter=0.2,
        brightness=0.3,
        contrast=0.35,
        saturation=0.45,
        hue=0.05,
        grayscale=0.6,
        blur=(0.7, 0.8, 0.9),
        blur_sigma=(0.2, 1.0),
        solarize=(0.15, 0.25, 0.35),
    )
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(views))
    assert isinstance(restored, MultiCrop)
    assert restored.get_config() == views.get_config()
    default = MultiCrop(32).get_config()
    assert all(default[k] != v for k, v in views.get_config().items() if k != "image_size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "`image_size` must be a positive int. Received: image_size=0"),
        ({"image_size": 32.0}, "`image_size` must be a positive int. Received: image_size=32.0"),
        ({"image_size": 32, "local_views": -1}, "`local_views` must be an int, 0 or more"),
        ({"image_size": 32, "global_area": (0.0, 1.0)}, "`global_area`.*0.0, 1.0"),
        ({"image_size": 32, "global_area": (0.4, 1.1)}, "`global_area`.*0.4, 1.1"),
        ({"image_size": 32, "local_area": (0.4, 0.1)}, "`local_area`.*0.4, 0.1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**options)


# ---- negatives


@keras.saving.register_keras_serializable("test_views")
def upside_down(images, seed):
    del seed
    return tf.reverse(images, axis=[1])


def gray_images(value, count=4, size=32):
    return np.full((count, size, size, 3), value, np.uint8)


@pytest.mark.parametrize(
    ("source", "levels"), [("in_distribution", [50]), ("auxiliary", [200]), ("both", [50, 200])]
)
def test_sources_have_the_same_number_of_views(source, levels):
    views = MultiCrop(16, local_views=3, color_jitter=0.0, solarize=(0.0, 0.0, 0.0))
    negatives = Negatives("rot90", source=source)
    assert negatives.needs_auxiliary == (200 in levels)
    auxiliary = gray_images(200, size=40) if negatives.needs_auxiliary else None
    global_group, local_group = negatives(views, gray_images(50), auxiliary, SEED)
    assert global_group.shape == (len(levels), 4, 16, 16, 3)
    assert local_group.shape == (3 * len(levels), 4, 8, 8, 3)
    for group, count in ((global_group, 1), (local_group, 3)):
        expected = np.repeat(levels, count)[:, np.newaxis, np.newaxis, np.newaxis, np.newaxis]
        np.testing.assert_allclose(group, np.broadcast_to(expected, group.shape), atol=0.01)


def test_without_local_views_there_is_one_group(photos):
    groups = Negatives("rot90", source="both")(plain(16), photos, photos, SEED)
    assert [tuple(group.shape) for group in groups] == [(2, 8, 16, 16, 3)]


def test_the_two_sources_are_drawn_apart(photos):
    (group,) = Negatives("rot90", source="both")(MultiCrop(32, local_views=0), photos, photos, SEED)
    assert (np.abs(group[0] - group[1]).mean(axis=(1, 2, 3)) > 1.0).all()


def test_the_shift_acts_on_whole_views(photos):
    views = plain(64)
    (group,) = Negatives("rot90", source="in_distribution")(views, photos, None, SEED)
    turns = [
        min(range(4), key=lambda k, i=i: np.abs(np.rot90(photos[i], k) - group[0, i]).max())
        for i in range(8)
    ]
    for i, k in enumerate(turns):
        np.testing.assert_allclose(group[0, i], np.rot90(photos[i], k), atol=1e-3)
    assert set(turns) <= {1, 2, 3}
    assert len(set(turns)) > 1


def test_identity_gives_the_views_themselves(photos):
    (group,) = Negatives("identity", source="auxiliary")(plain(64), photos, photos, SEED)
    np.testing.assert_allclose(group[0], photos, atol=1e-3)


def test_the_seed_alone_decides_the_negatives(photos):
    views, negatives = MultiCrop(16, local_views=1), Negatives("perm4", source="both")
    first = negatives(views, photos, photos, SEED)
    for one, other in zip(first, negatives(views, photos, photos, SEED), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(first, negatives(views, photos, photos, [0, 1]), strict=True):
        assert not np.array_equal(one, other)


def test_auxiliary_detail_beyond_the_own_resolution_is_gone():
    normal = gray_images(127, size=16)
    stripes = np.zeros((4, 128, 128, 3), np.uint8)
    stripes[:, :, ::4] = stripes[:, :, 1::4] = 255
    views = MultiCrop(64, local_views=0, color_jitter=0.0, blur=(0, 0, 0), solarize=(0, 0, 0))
    # A view straight from the larger image would show them.
    assert views.negative(stripes, SEED)[0].numpy().std() > 50
    (group,) = Negatives("identity", source="auxiliary")(views, normal, stripes, SEED)
    assert group.numpy().std() < 3


def test_a_shift_of_ones_own(photos):
    negatives = Negatives(upside_down, source="in_distribution")
    (group,) = negatives(plain(64), photos, None, SEED)
    np.testing.assert_allclose(group[0], photos[:, ::-1], atol=1e-3)


@pytest.mark.parametrize(
    "shift", ["perm16", upside_down, shifts.rot360], ids=["name", "own", "function"]
)
def test_negatives_survive_saving(photos, shift):
    negatives = Negatives(shift, source="both")
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(negatives))
    assert isinstance(restored, Negatives)
    assert restored.shift == shift
    assert restored.source == "both"
    (one,), (other,) = (n(plain(16), photos, photos, SEED) for n in (negatives, restored))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shift", ["identity", shifts.identity])
@pytest.mark.parametrize("source", ["in_distribution", "both"])
def test_identity_is_refused_on_in_distribution_images(shift, source):
    with pytest.raises(ValueError, match=f"'identity'.*auxiliary.*source='{source}'"):
        Negatives(shift, source=source)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"`shift` must be.*'rot90'.*Received: 'rot45'"):
        Negatives("rot45")
    with pytest.raises(ValueError, match=r"`source` must be.*'auxiliary'.*Received: source='web'"):
        Negatives("rot90", source="web")


def test_sides_that_the_grid_does_not_divide_are_refused(photos):
    for views, received in ((plain(18), "18, 18"), (MultiCrop(20), "10, 10")):
        with pytest.raises(ValueError, match=rf"'perm16'.*divisible by 4.*{received}"):
            Negatives("perm16")(views, photos, photos, SEED)


def test_a_shift_must_keep_the_shape(photos):
    negatives = Negatives(lambda images, seed: images[:, 1:], source="in_distribution")
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="must return"):
        negatives(plain(16), photos, None, SEED)
