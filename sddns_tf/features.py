"""Images to features or feature maps: resize, normalize, backbone; whole data sets, streamed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import image_ops, local
from sddns_tf.aligned import PlaceWhitening
from sddns_tf.components import PrincipalComponents, check_reducible
from sddns_tf.image_sources import image_source
from sddns_tf.networks import check_names, copy_of
from sddns_tf.replicas import applied, local_devices, on_all_devices
from sddns_tf.types import Array
from sddns_tf.validation import (
    check_choice,
    check_images,
    check_int,
    check_numbers,
    check_size,
)


def image_size_of(images: Array) -> tuple[int, int] | None:
    """Return the height and width of a set's images, or None if they are not of one known size.

    Args:
        images: Images `(N, H, W, 3)`, or a dataset of batches of them (labels may follow).

    Returns:
        A pair of ints, or None.
    """
    spec = getattr(images, "element_spec", images)
    spec = spec[0] if isinstance(spec, tuple) else spec
    size = tuple(tf.TensorShape(getattr(spec, "shape", None))[1:3])
    return None if None in size else size


def _input_size_of(backbone):
    """Return the image size that a backbone was made for, or None if it does not say."""
    if getattr(backbone, "image_size", None) is not None:
        return backbone.image_size
    size = tuple((getattr(backbone, "input_shape", None) or ())[1:3])
    return size if len(size) == 2 and None not in size else None


@keras.saving.register_keras_serializable("sddns_tf")
class FeatureExtractor(keras.Model):
    """Maps images of any size to a backbone's L2-normalized features, or to its feature maps.

    Images are resized to the native resolution of in-distribution images, so that resolution gives
    nothing away, then to the backbone's input size (both antialiased bicubic), and normalized. All
    of it is float32 whatever the precision of the backbone.

    With `layers` it gives maps of what these layers see in each place: averaged over 3 x 3 places,
    resized to the grid of the first layer (bilinear) and concatenated. Each channel has its mean
    over the bank subtracted and is divided by its standard deviation. Both are weights, 0 and 1
    until `standardize` sets them. With `standardized=True` the same is done to the L2-normalized
    features of whole images. With `aligned=True` each place is whitened instead, by the mean and
    the covariance of this place over the bank's images: see `aligned.PlaceWhitening`. With
    `components`, their channels are then reduced: see `components.PrincipalComponents`.

    Args:
        backbone: Keras model from normalized float images `(B, h, w, 3)` to features `(B, D)`.
            It is used directly, not copied: features follow its training.
        layers: None, or which layers give the maps. For a functional model, nested or not: names of
            layers, or `"auto"`, the last layers at strides 8 and 16, or at the largest stride of a
            shallow network such as `ConvNet`. For a vision transformer: `"tokens"`, those that
            enter the last block, which cost nothing extra, or names of blocks. See
            `local.inner_maps`.
        standardized: Whether channels of features are standardized; those of maps always are.
        aligned: Whether each place of a map is whitened by itself.
        components: None, or how many channels maps are reduced to: their principal components over
            the bank and the length of the rest. Not if aligned.
        image_size: Size of the backbone's input in pixels, an int or (height, width). Defaults
            to the size that the backbone was made for, else to `resolution`.
        resolution: Native resolution of in-distribution images in pixels, an int or (height,
            width). None skips this step.
        resize: How an image of another shape is brought to the resolution: `"squash"` changes its
            aspect ratio, `"crop"` cuts off its sides first, equally.
        mean: Three floats, mean of each channel for images scaled to 0-1.
        std: Three floats, standard deviation of each channel for images scaled to 0-1.

    Call arguments:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

    Returns:
        Float32 features `(B, D)`, of L2 norm 1 unless standardized; with layers, feature maps
        `(B, h, w, C)`, where C is the number of components if there are any.

    Raises:
        ValueError: If the backbone's input size is unknown, its output is not `(B, D)`, a layer
            gives no map of at least 2 x 2 places, or there are not more channels than components.

    References:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), CVPR 2022:
        maps of two layers, averaged over neighbors. It standardizes nothing. Defard et al., "PaDiM:
        a patch distribution modeling framework", 2020: a Gaussian for each place.

    Example:
    >>> extractor = FeatureExtractor(model.teacher_backbone, image_size=32)
    >>> extractor(images).shape
    TensorShape([64, 384])
    """

    def __init__(
        self,
        backbone: keras.Model,
        image_size: int | tuple[int, int] | None = None,
        resolution: int | tuple[int, int] | None = None,
        *,
        layers: Any = None,
        standardized: bool = False,
        aligned: bool = False,
        components: int | None = None,
        resize: str = "squash",
        mean: Sequence[float] = image_ops.IMAGENET_MEAN,
        std: Sequence[float] = image_ops.IMAGENET_STD,
        **kwargs,
    ) -> None:
        # Images in 0-255 would lose their last bits if Keras cast them to the global policy.
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        if image_size is None:
            image_size = _input_size_of(backbone) or resolution
        if image_size is None:
            raise ValueError(
                "`image_size` is needed: the backbone has neither a fixed `input_shape` nor an "
                f"`image_size`. Received: backbone={backbone}, image_size=None, resolution=None."
            )
        check_names(backbone)
        self.backbone = backbone
        self.image_size = check_size("image_size", image_size)
        self.resolution = None if resolution is None else check_size("resolution", resolution)
        self.resize = check_choice("resize", resize, image_ops.RESIZES)
        self.mean = check_numbers("mean", mean, 3)
        self.std = check_numbers("std", std, 3, above=0.0)
        inputs = keras.KerasTensor((None, *self.image_size, 3))
        if not backbone.built:
            backbone.build(inputs.shape)
        self.layer_names = self.map_size = None
        if layers is None:
            self.feature_dim = _feature_dim(backbone, inputs)
        else:
            self._prepare_maps(layers)
        self.standardized = bool(standardized) or layers is not None
        self.aligned = bool(aligned)
        if self.aligned and self.map_size is None:
            raise ValueError(
                "`aligned=True` compares each place with the same place of other images: pass "
                "`layers` as well. Received: aligned=True without layers"
            )
        self.components = self.principal = None
        if self.aligned:
            self.whitening = PlaceWhitening(self.map_size, self.feature_dim)
        elif self.standardized:
            self.channel_mean = self._add_moment("channel_mean", "zeros")
            self.channel_deviation = self._add_moment("channel_deviation", "ones")
        if components is not None:
            self._prepare_components(components)
        self.built = True

    def _prepare_maps(self, layers):
        names, self._inner_maps, grids = local.inner_maps(self.backbone, layers, self.image_size)
        local.check_grids(names, grids, self.image_size)
        # The names that "auto" found, so that a copy uses the same ones.
        self.layer_names = names
        self.map_size = tuple(int(side) for side in grids[0][:2])
        self.feature_dim = int(sum(channels for *_, channels in grids))

    def _prepare_components(self, components):
        check_reducible(components, self.map_size is not None, self.aligned)
        self.principal = PrincipalComponents(self.feature_dim, components)
        self.components = self.feature_dim = components

    @property
    def metric(self) -> str:
        """How its features are compared: `"euclidean"` if standardized, else `"cosine"`."""
        return "euclidean" if self.standardized else "cosine"

    def _add_moment(self, name, value):
        return self.add_weight(
            shape=(self.feature_dim,),
            initializer=value,
            dtype="float32",
            trainable=False,
            autocast=False,
            name=name,
        )

    def call(self, images: Array) -> tf.Tensor:
        """Map images `(B, H, W, 3)` to features `(B, D)` or feature maps `(B, h, w, C)`.

        Features of an image with a NaN are NaN.
        """
        features = applied(self._features, self.preprocess(images))
        return image_ops.nan_where_images_are(images, features)

    def _features(self, images):
        if self.layer_names is not None:
            maps = local.combined(self._inner_maps(images))
            if self.aligned:
                return self.whitening(maps)
            maps = (maps - self.channel_mean) / self.channel_deviation
            return maps if self.principal is None else self.principal(maps)
        features = tf.cast(self.backbone(images, training=False), tf.float32)
        features = tf.math.l2_normalize(features, axis=-1)
        if not self.standardized:
            return features
        return (features - self.channel_mean) / self.channel_deviation

    def standardize(self, mean: Array, deviation: Array) -> None:
        """Set the mean and standard deviation of each channel over the bank, in place.

        Args:
            mean: Float `(C,)`, mean of the maps or features as they were before.
            deviation: Positive float `(C,)`, standard deviation of the same.
        """
        before, spread = self.channel_mean.numpy(), self.channel_deviation.numpy()
        self.channel_mean.assign(before + spread * mean)
        self.channel_deviation.assign(spread * deviation)

    def at_resolution(self, images: Array) -> tf.Tensor:
        """Return images at the resolution that shows everything the backbone sees of them.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

        Returns:
            Float32 in 0-255, `(B, *resolution, 3)`, or of `image_size` where there is no
            resolution.
        """
        images = check_images(images)
        return image_ops.fit(images, *(self.resolution or self.image_size), self.resize)

    def preprocess(self, images: Array) -> tf.Tensor:
        """Return what the backbone sees of images.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

        Returns:
            Normalized float32 `(B, *image_size, 3)`.
        """
        images = image_ops.resize(self.at_resolution(images), *self.image_size)
        return image_ops.normalize(images, self.mean, self.std)

    def snapshot(self) -> FeatureExtractor:
        """Return an extractor with a copy of the backbone, which further training does not change.

        Returns:
            `FeatureExtractor`.
        """
        backbone = copy_of(self.backbone, (*self.image_size, 3))
        copy = type(self)(**{**self.get_config(), "backbone": backbone})
        copy.set_weights(self.get_weights())
        return copy

    @functools.cached_property
    def compiled_call(self) -> Callable:
        """The call as one compiled function, traced once for each size of image.

        An extractor made in the scope of a `MirroredStrategy` uses all its devices, and takes
        batches whose size is a multiple of their number.
        """
        call = tf.function(self.__call__, jit_compile=self.jit_compile, reduce_retracing=True)
        return on_all_devices(call, self.distribute_strategy)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "name": self.name,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "image_size": self.image_size,
            "resolution": self.resolution,
            "layers": self.layer_names,
            "standardized": self.standardized,
            "aligned": self.aligned,
            "components": self.components,
            "resize": self.resize,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the extractor that a configuration describes, including its backbone."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


def _feature_dim(backbone, inputs):
    shape = getattr(backbone.compute_output_spec(inputs), "shape", None)
    if shape is None or len(shape) != 2 or shape[-1] is None:
        raise ValueError(
            "A backbone must return one feature vector per image, (batch, dimension); to compare "
            "places of images pass `layers`. "
            f"Received: a backbone that returns shape {shape} for {inputs.shape}."
        )
    return shape[-1]


def extract_features(
    extractor: Any,
    images: Array,
    *,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    name: str = "images",
) -> np.ndarray:
    """Extract the features of a whole set of images.

    The compiled forward pass belongs to the extractor: keep the extractor to extract again (after
    more training, say) without retracing. The last batch is padded, so that one trace is enough.
    An extractor made in the scope of a `tf.distribute.MirroredStrategy` uses all of its devices.

    Args:
        extractor: A `FeatureExtractor`, or a backbone that knows its input size.
        images: Images `(N, H, W, 3)`, uint8 or float in 0-255, or batches of such images: a finite
            `tf.data.Dataset`, a generator or a `keras.utils.PyDataset`. Whatever follows the images
            in a batch (labels) is ignored.
        batch_size: Images per step, 256 by default, 32 for maps; a dataset has its own.
        verbose: 0 is silent, 1 shows a progress bar, 2 one line at the end; `"auto"` shows the
            bar unless there is only one step.
        name: What error messages call the images.

    Returns:
        NumPy array `(N, D)`, float32, in the order of the images, rows of L2 norm 1 unless the
        extractor standardizes them; for an extractor with `layers`, feature maps `(N, h, w, C)`.

    Raises:
        ValueError: If there are no images, or they are not images in 0-255.

    Example:
    >>> extractor = FeatureExtractor(backbone, image_size=32, resolution=32)
    >>> bank = extract_features(extractor, train_images)
    """
    if not isinstance(extractor, FeatureExtractor):
        extractor = FeatureExtractor(extractor)
    stream = stream_features(extractor, images, batch_size=batch_size, verbose=verbose, name=name)
    return np.concatenate(list(stream))


def images_per_step(extractor: Any, batch_size: int | None = None) -> int:
    """Return how many images go through an extractor at once.

    Args:
        extractor: A `FeatureExtractor`.
        batch_size: Positive int, or None for 256, or 32 if the extractor gives maps, which take
            more memory.

    Returns:
        Int.
    """
    if batch_size is None:
        return 256 if extractor.map_size is None else 32
    check_int("batch_size", batch_size)
    return batch_size


def stream_features(
    extractor: Any,
    images: Array,
    *,
    batch_size: int | None = None,
    verbose: int | str = "auto",
    name: str = "images",
) -> Iterator[np.ndarray]:
    """Extract the features of a whole set of images, batch by batch: they need not fit into memory.

    Args:
        extractor: A `FeatureExtractor`.
        images: As for `extract_features`.
        batch_size: Images per step, 256 by default, 32 for maps; a dataset has its own.
        verbose: As for `extract_features`.
        name: What error messages call the images.

    Yields:
        NumPy arrays `(n, D)` or `(n, h, w, C)`, float32, in the order of the images.

    Raises:
        ValueError: As for `extract_features`.

    Example:
    >>> extractor = FeatureExtractor(backbone, image_size=224, layers="auto")
    >>> total = sum(maps.sum() for maps in stream_features(extractor, train_images))
    """
    batches, steps = _batches(image_source(images, name), images_per_step(extractor, batch_size))
    progress = keras.utils.Progbar(steps, verbose=int(steps != 1) if verbose == "auto" else verbose)
    devices = local_devices(extractor.distribute_strategy)
    done = full = 0
    for batch in batches:
        count = len(batch)
        full = max(full, -(-count // devices) * devices)
        if count < full:
            filling = np.zeros((full - count, *batch.shape[1:]), batch.dtype)
            batch = np.concatenate([batch, filling])
        yield extractor.compiled_call(tf.convert_to_tensor(batch)).numpy()[:count]
        done += 1
        progress.update(done, finalize=False)
    if not full:
        raise ValueError(f"At least one image is needed. Received: {images}.")
    progress.update(done, finalize=True)


def _batches(images, batch_size):
    """Return an iterable of NumPy batches, and their number or None if it is unknown."""
    if isinstance(images, tf.data.Dataset):
        steps = int(images.cardinality())
        if steps == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "A dataset must have an end: pass it before `.repeat()`. "
                "Received: a dataset that repeats forever"
            )
        return images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator(), steps if steps >= 0 else None
    if isinstance(images, np.ndarray):
        starts = range(0, len(images), batch_size)
        return (images[start : start + batch_size] for start in starts), len(starts)
    steps = None
    if isinstance(images, keras.utils.PyDataset) and (steps := images.num_batches) is None:
        raise ValueError(
            "A PyDataset must have an int as `num_batches`. Received: num_batches=None"
        )
    return (batch for (batch,) in images), steps
