"""The views of an image: DINO's multi-crop, and the negatives made from it.

Longer than other modules because the arguments of two classes need much explanation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from sddns_tf import image_ops, shifts, tracing
from sddns_tf.types import Array
from sddns_tf.validation import check_choice, check_int, check_number, check_numbers

SOURCES = ("in_distribution", "auxiliary", "both")

# torchvision's RandomResizedCrop tries this many times before it takes the largest box allowed.
_CROP_ATTEMPTS = 10

# A Gaussian this narrow puts less than 2e-8 on the neighboring pixel: nothing in float32.
_LEAST_SIGMA = 0.168

# Numbers that one view needs: two for each attempt at a crop, and one for each other choice.
_DRAWS = 2 * _CROP_ATTEMPTS + 15


@keras.saving.register_keras_serializable("sddns_tf")
class MultiCrop:
    """Two global views and some local ones of each image, computed in the graph as one batch.

    A view is a random resized crop (bicubic, antialiased), flipped, color-jittered, turned gray,
    blurred and solarized with the probabilities below. All draws are per view and per image, fixed
    by the seed and the image's place in the global batch, on any number of devices.

    A *group* is all views of one resolution, `(V, B, h, w, 3)` float32 in 0-255. The first group
    holds the global views, the second, if there are any, the local ones.

    Args:
        image_size: Side of the global views in pixels.
        local_views: Number of local views.
        local_size: Side of the local views in pixels. Defaults to half of `image_size`.
        global_area: Smallest and largest share of the image's area in a global view.
        local_area: The same for a local view. The paper uses `(0.15, 0.4)` for CIFAR.
        aspect_ratio: Smallest and largest width / height of the crop.
        flip: Probability of a horizontal flip.
        color_jitter: Probability of the color jitter.
        brightness: Largest relative change of the brightness.
        contrast: Largest relative change of the contrast.
        saturation: Largest relative change of the saturation.
        hue: Largest hue shift, in turns of the color circle, at most 0.5.
        grayscale: Probability of a gray view.
        blur: Probability of Gaussian blur on the first global, second global and local views.
        blur_sigma: Smallest and largest standard deviation, in pixels, where `image_size` is
            224; scaled with `image_size`, for local views as well.
        solarize: Probability of solarization on the first global, second global and local views.

    Example:
        >>> views = MultiCrop(image_size=32, local_views=4)
        >>> [group.shape for group in views(images, seed=[0, 1])]
        [TensorShape([2, 64, 32, 32, 3]), TensorShape([4, 64, 16, 16, 3])]

    Reference:
        Caron et al., arXiv 2104.14294, sections 3.1 and 5; Rafiee et al., arXiv 2201.06378.
    """

    def __init__(
        self,
        image_size: int,
        local_views: int = 8,
        local_size: int | None = None,
        global_area: Sequence[float] = (0.4, 1.0),
        local_area: Sequence[float] = (0.05, 0.4),
        aspect_ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        color_jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grayscale: float = 0.2,
        blur: Sequence[float] = (1.0, 0.1, 0.5),
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize: Sequence[float] = (0.0, 0.2, 0.0),
    ) -> None:
        check_int("image_size", image_size)
        check_int("local_views", local_views, low=0)
        if local_size is not None:
            check_int("local_size", local_size)
        elif local_views:
            check_int("image_size", image_size, low=2)  # Local views are half as large.
        for name, value, highest in (
            ("flip", flip, 1.0),
            ("color_jitter", color_jitter, 1.0),
            ("grayscale", grayscale, 1.0),
            ("brightness", brightness, None),
            ("contrast", contrast, None),
            ("saturation", saturation, None),
            ("hue", hue, 0.5),
        ):
            check_number(name, value, 0.0, highest)
        self.image_size = image_size
        self.local_views = local_views
        self.local_size = local_size or max(image_size // 2, 1)
        shares: dict[str, Any] = {"high": 1.0, "above": 0.0, "ascending": True}
        self.global_area = check_numbers("global_area", global_area, 2, **shares)
        self.local_area = check_numbers("local_area", local_area, 2, **shares)
        self.aspect_ratio = check_numbers(
            "aspect_ratio", aspect_ratio, 2, above=0.0, ascending=True
        )
        self.flip = flip
        self.color_jitter = color_jitter
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.grayscale = grayscale
        self.blur = check_numbers("blur", blur, 3, 0.0, 1.0)
        self.blur_sigma = check_numbers("blur_sigma", blur_sigma, 2, 0.0, ascending=True)
        self.solarize = check_numbers("solarize", solarize, 3, 0.0, 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the views in pixels, one per group."""
        return (self.image_size, self.local_size) if self.local_views else (self.image_size,)

    def __call__(self, images: Array, seed: Array) -> list[tf.Tensor]:
        """Draw all views of each image.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`.
            seed: Two integers; the same seed gives the same views.

        Returns:
            List of groups: `(2, B, S, S, 3)` and, with local views, `(local_views, B, s, s, 3)`.
        """
        global_seed, local_seed = tf.unstack(tf.random.split(seed, 2))
        groups = [self._global_views(images, tf.constant([[0], [1]]), global_seed)]
        return groups + self._local_views(images, local_seed)

    def negative(self, images: Array, seed: Array) -> list[tf.Tensor]:
        """Draw the views a negative is made from: one global, of either recipe, and the local ones.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`.
            seed: Two integers.

        Returns:
            List of groups: `(1, B, S, S, 3)` and, with local views, `(local_views, B, s, s, 3)`.
        """
        recipe_seed, global_seed, local_seed = tf.unstack(tf.random.split(seed, 3))
        shape = [1, tf.shape(images)[0]]
        recipe = shifts.uniform(shape, recipe_seed, maxval=2, dtype=tf.int32)
        groups = [self._global_views(images, recipe, global_seed)]
        return groups + self._local_views(images, local_seed)

    def _global_views(self, images, recipe, seed):
        """`recipe` is 0 or 1, `(V, 1)` or `(V, B)`: the first or the second global view's."""
        draws = Draws([recipe.shape[0], tf.shape(images)[0]], seed)
        blur = tf.gather(tf.constant(self.blur, tf.float32), recipe)
        solarize = tf.gather(tf.constant(self.solarize, tf.float32), recipe)
        return self._views(images, draws, self.image_size, self.global_area, blur, solarize)

    def _local_views(self, images, seed):
        if not self.local_views:
            return []

        def of(images, seed):
            draws = Draws([self.local_views, tf.shape(images)[0]], seed)
            blur, solarize = self.blur[2], self.solarize[2]
            return self._views(images, draws, self.local_size, self.local_area, blur, solarize)

        # Positive and negative local views differ only in their images and seed.
        return [tracing.run_once((id(self), "local views"), of, tf.cast(images, tf.float32), seed)]

    def _views(self, images, draws, size, area, blur, solarize):
        planes = self._crop(images, draws, size, area)
        planes = self._recolor(planes, draws)
        low, high = (self.image_size / 224 * sigma for sigma in self.blur_sigma)
        sigma = draws.uniform(low, high)
        sigma = tf.where(draws.happens(blur), sigma, 0.0)
        if high > _LEAST_SIGMA:
            kernel = image_ops.gaussian_matrix(size, sigma)
            planes = image_ops.resample(planes, kernel, kernel)
        solarized = draws.happens(solarize)[..., tf.newaxis, tf.newaxis, tf.newaxis]
        planes = tf.where(solarized, image_ops.solarize(planes), planes)
        return image_ops.from_planes(planes)

    def _crop(self, images, draws, size, area):
        """Crop, resize and flip at random: planes `(V, B, 3, size, size)`."""
        height, width = images.shape[1:3]
        top, left, crop_height, crop_width = crop_boxes(
            draws, height, width, area, self.aspect_ratio
        )
        rows = image_ops.resampling_matrix(height, size, top, crop_height)
        columns = image_ops.resampling_matrix(width, size, left, crop_width)
        flipped = draws.happens(self.flip)[..., tf.newaxis, tf.newaxis]
        columns = tf.where(flipped, tf.reverse(columns, axis=[-2]), columns)
        planes = image_ops.resample(image_ops.to_planes(images), rows, columns)
        return tf.clip_by_value(planes, 0.0, 255.0)

    def _recolor(self, planes, draws):
        """Jitter the color, in a random order of its four parts, then grayscale."""
        jittered = draws.happens(self.color_jitter)

        def factor(change):
            return tf.where(jittered, draws.uniform(max(0.0, 1.0 - change), 1.0 + change), 1.0)

        hue_rank, contrast_rank, saturation_rank = (draws.unit() for _ in range(3))
        planes = image_ops.jitter_color(
            planes,
            brightness=factor(self.brightness),
            contrast=factor(self.contrast),
            saturation=factor(self.saturation),
            hue=tf.where(jittered, draws.uniform(-self.hue, self.hue), 0.0),
            contrast_first=contrast_rank < hue_rank,
            saturation_first=saturation_rank < hue_rank,
        )
        planes = tf.clip_by_value(planes, 0.0, 255.0)
        gray = draws.happens(self.grayscale)[..., tf.newaxis, tf.newaxis]
        to_gray = tf.where(gray, image_ops.gray_matrix(), tf.eye(3))
        return image_ops.mix_channels(to_gray, planes)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "image_size": self.image_size,
            "local_views": self.local_views,
            "local_size": self.local_size,
            "global_area": self.global_area,
            "local_area": self.local_area,
            "aspect_ratio": self.aspect_ratio,
            "flip": self.flip,
            "color_jitter": self.color_jitter,
            "brightness": self.brightness,
            "contrast": self.contrast,
            "saturation": self.saturation,
            "hue": self.hue,
            "grayscale": self.grayscale,
            "blur": self.blur,
            "blur_sigma": self.blur_sigma,
            "solarize": self.solarize,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the object that `get_config` describes."""
        return cls(**config)


@keras.saving.register_keras_serializable("sddns_tf")
class Negatives:
    """Negative examples: views put through a shifting transformation.

    Args:
        shift: Name or callable `(images, seed) -> images`: see `shifts.get`. A callable that is
            registered with Keras is saved with the model.
        source: Where negatives come from: `"in_distribution"` images, `"auxiliary"` images, or
            `"both"`, weighted equally.

    Example:
        >>> negatives = Negatives("rot90", source="both")
        >>> groups = negatives(MultiCrop(32, local_views=4), images, auxiliary, seed=[0, 1])
        >>> [group.shape for group in groups]
        [TensorShape([2, 64, 32, 32, 3]), TensorShape([8, 64, 16, 16, 3])]

    Reference:
        Rafiee et al., arXiv 2201.06378.
    """

    def __init__(self, shift: str | Callable = "rot90", source: Any = "auxiliary") -> None:
        check_choice("source", source, SOURCES)
        apply = shifts.get(shift)
        if apply is shifts.identity and source != "auxiliary":
            raise ValueError(
                "The shift 'identity' makes negatives of auxiliary images only; on "
                "in-distribution images it would call the positives negative. "
                f"Received: source={source!r}"
            )
        shifts.warn_if_not_savable(shift)
        self.shift = shift
        self.source = source
        self._apply = apply

    @property
    def needs_auxiliary(self) -> bool:
        """Whether the training batches must hold auxiliary images."""
        return self.source != "in_distribution"

    def __call__(
        self, views: Any, images: Array, auxiliary: Array | None, seed: Array
    ) -> list[tf.Tensor]:
        """Draw the negatives of a batch.

        Args:
            views: The `MultiCrop` that makes the positive views.
            images: In-distribution images, uint8 or float in 0-255, `(B, H, W, 3)`.
            auxiliary: Auxiliary images `(B, H', W', 3)`, resized to `(H, W)` first so that
                resolution gives nothing away; `None` where the source needs none.
            seed: Two integers.

        Returns:
            List of groups as from `views`: `(n, B, S, S, 3)`, `(n * local_views, B, s, s, 3)` with
            n the number of sources.
        """
        sources = [] if self.source == "auxiliary" else [images]
        if self.needs_auxiliary:
            sources.append(image_ops.resize(auxiliary, *images.shape[1:3]))
        seeds = tf.unstack(tf.random.split(seed, len(sources)))
        groups = [self._of_source(views, *pair) for pair in zip(sources, seeds, strict=True)]
        return [tf.concat(group, axis=0) for group in zip(*groups, strict=True)]

    def _of_source(self, views, images, seed):
        seeds = tf.random.split(seed, 1 + len(views.sizes))
        groups = views.negative(images, seeds[0])
        return [
            self._shift_group(group, seeds[index]) for index, group in enumerate(groups, start=1)
        ]

    def _shift_group(self, group, seed):
        # All views of an image are adjacent: a replica's are then a contiguous part of the global
        # batch's, which is what fixes their draws.
        by_image = tf.transpose(group, [1, 0, 2, 3, 4])
        views = tf.reshape(by_image, [-1, *group.shape[2:]])
        shifted = shifts.checked(self.shift, views, self._apply(views, seed))
        by_image = tf.reshape(shifted, tf.shape(by_image))
        return tf.ensure_shape(tf.transpose(by_image, [1, 0, 2, 3, 4]), group.shape)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        shift = self.shift
        if not isinstance(shift, str):
            shift = keras.saving.serialize_keras_object(shift)
        return {"shift": shift, "source": self.source}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the object that `get_config` describes."""
        shift = config["shift"]
        if isinstance(shift, dict):
            shift = keras.saving.deserialize_keras_object(shift)
        return cls(shift, config["source"])


class Draws:
    """Uniform random numbers for each view and image, `(V, B)`, new ones at each call.

    All come from one random operation: the graph stays small and compiles fast.
    """

    def __init__(self, shape: Any, seed: Any) -> None:
        self._numbers = iter(tf.unstack(shifts.uniform([_DRAWS, *shape], seed)))

    def unit(self) -> tf.Tensor:
        """Return numbers from 0 to 1, `(V, B)`."""
        return next(self._numbers)

    def uniform(self, low: Any, high: Any) -> tf.Tensor:
        """Return numbers from `low` to `high`, `(V, B)`."""
        return low + (high - low) * self.unit()

    def attempts(self, low: float, high: float) -> tf.Tensor:
        """Return a number for each attempt at a crop, `(V, B, _CROP_ATTEMPTS)`."""
        units = tf.stack([self.unit() for _ in range(_CROP_ATTEMPTS)], axis=-1)
        return low + (high - low) * units

    def happens(self, probability: Any) -> tf.Tensor:
        """Return bool `(V, B)`, true with the given probability, which may itself be `(V, B)`."""
        return self.unit() < probability


def crop_boxes(
    draws: Draws,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect_ratio: tuple[float, float],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draw whole-pixel boxes as torchvision's `RandomResizedCrop` does.

    The area is uniform and the aspect ratio log-uniform. The first of ten attempts that fits is
    taken, else the largest box of an allowed aspect ratio (for a square, the whole image). Its
    place is random.

    Args:
        draws: `Draws`.
        height: Height of the images.
        width: Width of the images.
        area: Pair of the smallest and largest share of the image's area.
        aspect_ratio: Pair of the smallest and largest ratio of width to height.

    Returns:
        top, left, height, width: float tensors `(V, B)`.
    """
    areas = draws.attempts(*area) * (height * width)
    ratios = tf.exp(draws.attempts(*map(math.log, aspect_ratio)))
    heights, widths = tf.round(tf.sqrt(areas / ratios)), tf.round(tf.sqrt(areas * ratios))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = tf.one_hot(tf.argmax(tf.cast(fits, tf.int32), axis=-1), _CROP_ATTEMPTS)
    found = tf.reduce_any(fits, axis=-1)
    narrowest, widest = aspect_ratio
    largest_height = float(min(height, max(1, round(width / narrowest))))
    largest_width = float(min(width, max(1, round(height * widest))))
    crop_height = tf.where(found, tf.reduce_sum(first * heights, axis=-1), largest_height)
    crop_width = tf.where(found, tf.reduce_sum(first * widths, axis=-1), largest_width)
    top = tf.floor(draws.unit() * (height - crop_height + 1.0))
    left = tf.floor(draws.unit() * (width - crop_width + 1.0))
    return top, left, crop_height, crop_width
