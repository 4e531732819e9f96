"""The bank of in-distribution features: extraction, the out-of-distribution score, compression."""

import functools
import warnings

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import image_ops

# Above this many distances per iteration, k-means sees mini-batches instead of the whole set.
_FULL_KMEANS_DISTANCES = 50_000_000


def check_images(images, name="images"):
    """Raise a `ValueError` unless shape and dtype are those of a batch of images.

    Args:
        images: Anything with `shape` and `dtype`: an array, a tensor, a `tf.TensorSpec`.
        name: What the message calls them.
    """
    shape, dtype = tf.TensorShape(images.shape), tf.as_dtype(images.dtype)
    if shape.rank == 4 and shape[3] in (3, None) and (dtype == tf.uint8 or dtype.is_floating):
        return
    hint = " One image takes a batch axis: `image[None]`." if shape.rank == 3 else ""
    raise ValueError(
        f"`{name}` must be uint8 or float in 0-255, of shape (batch, height, width, 3).{hint} "
        f"Received: shape={shape}, dtype={dtype.name}."
    )


def warn_if_nearly_black(images, name="images"):
    """Warn of float images in 0-1, which are taken for images in 0-255.

    Args:
        images: An array `(N, H, W, 3)`, a dictionary of such, or anything else, which passes.
        name: What the message calls them.
    """
    for one in images.values() if isinstance(images, dict) else [images]:
        is_float = isinstance(one, np.ndarray) and np.issubdtype(one.dtype, np.floating)
        if is_float and one.size and 0.0 < np.max(one) <= 1.0:
            warnings.warn(
                f"`{name}` are nearly black: expected values in 0-255, received "
                f"{np.min(one):.3g} to {np.max(one):.3g}. Multiply images in 0-1 by 255.",
                stacklevel=3,
            )


def _check_range(batch):
    """Float images that were already scaled to 0-1 or normalised would be scored as black."""
    largest = float(np.max(np.abs(batch), initial=0.0))
    if np.issubdtype(batch.dtype, np.floating) and 0.0 < largest <= 5.0:
        raise ValueError(
            "Images must be in 0-255: they are normalized here, not by the caller. Received float "
            f"images between {float(np.min(batch)):.3g} and {float(np.max(batch)):.3g}."
        )


def image_size_of(images):
    """Height and width of the images of a set, or None if they are not all of one known size.

    Args:
        images: Images `(N, H, W, 3)`, or a dataset of batches of them (labels may follow).

    Returns:
        A pair of ints, or None.
    """
    spec = images.element_spec if isinstance(images, tf.data.Dataset) else images
    spec = spec[0] if isinstance(spec, tuple) else spec
    size = tuple(tf.TensorShape(spec.shape)[1:3])
    return None if None in size else size


def _input_size_of(backbone):
    """The image size that a backbone was made for, or None if it does not say."""
    if getattr(backbone, "image_size", None) is not None:
        return backbone.image_size
    size = tuple((getattr(backbone, "input_shape", None) or ())[1:3])
    return size if len(size) == 2 and None not in size else None


def _as_pair(size, name):
    """`32` or `(32, 48)` as a pair of positive ints (height, width)."""
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in pair):
        raise ValueError(
            f"`{name}` must be a positive int or a pair (height, width). Received: {size!r}."
        )
    return int(pair[0]), int(pair[1])


@keras.saving.register_keras_serializable("sddns_tf")
class FeatureExtractor(keras.Model):
    """Images of any size to the L2-normalized features of a backbone.

    Images are resized to the in-distribution's own resolution, so that resolution gives nothing
    away, then to the backbone's input size (both antialiased bicubic), and normalized. All of it
    is float32 whatever the precision of the backbone.

    Args:
        backbone: Keras model from normalized float images `(B, h, w, 3)` to features `(B, D)`.
            It is used as it is, not copied: features follow its training.
        image_size: Size of the backbone's input in pixels, an int or (height, width). Defaults
            to the size that the backbone was made for, else to `resolution`.
        resolution: The in-distribution's own resolution in pixels, an int or (height, width).
            None leaves this step out.
        mean: Three floats, mean of each channel for images scaled to 0-1.
        std: Three floats, standard deviation of each channel for images scaled to 0-1.

    Call arguments:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

    Returns:
        Float32 features `(B, D)` of L2 norm 1.

    Raises:
        ValueError: If the backbone's input size is unknown or its output is not `(B, D)`.

    Example:
    >>> extractor = FeatureExtractor(model.teacher_backbone, image_size=32)
    >>> extractor(images).shape
    TensorShape([64, 384])
    """

    def __init__(
        self,
        backbone,
        image_size=None,
        resolution=None,
        *,
        mean=image_ops.IMAGENET_MEAN,
        std=image_ops.IMAGENET_STD,
        **kwargs,
    ):
        # Images in 0-255 would lose their last bits if Keras cast them to the global policy.
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        if image_size is None:
            image_size = _input_size_of(backbone) or resolution
        if image_size is None:
            raise ValueError(
                "`image_size` is needed: the backbone has neither a fixed `input_shape` nor an "
                f"`image_size`. Received: backbone={backbone}, image_size=None, resolution=None."
            )
        self.backbone = backbone
        self.image_size = _as_pair(image_size, "image_size")
        self.resolution = None if resolution is None else _as_pair(resolution, "resolution")
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        inputs = keras.KerasTensor((None, *self.image_size, 3))
        if not backbone.built:
            backbone.build(inputs.shape)
        shape = getattr(backbone.compute_output_spec(inputs), "shape", None)
        if shape is None or len(shape) != 2 or shape[-1] is None:
            raise ValueError(
                "A backbone must return one feature vector per image, (batch, dimension). "
                f"Received a backbone that returns shape {shape} for {inputs.shape}."
            )
        self.feature_dim = shape[-1]
        self.built = True

    def call(self, images):
        """Images `(B, H, W, 3)` to features `(B, D)`."""
        check_images(images)
        if self.resolution is not None:
            images = image_ops.resize(images, *self.resolution)
        images = image_ops.resize(images, *self.image_size)
        features = self.backbone(image_ops.normalize(images, self.mean, self.std), training=False)
        return tf.math.l2_normalize(tf.cast(features, tf.float32), axis=-1)

    @functools.cached_property
    def compiled_call(self):
        """The call as one compiled function, traced once for each size of image."""
        return tf.function(self.__call__, jit_compile=self.jit_compile, reduce_retracing=True)

    def get_config(self):
        """Constructor arguments."""
        return {
            "name": self.name,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "image_size": self.image_size,
            "resolution": self.resolution,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_config(cls, config):
        """The extractor of a configuration, its backbone included."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


def extract_features(extractor, images, *, batch_size=256, verbose="auto"):
    """Features of a whole set of images.

    The compiled forward belongs to the extractor: keep the extractor to extract again (after
    more training, say) without tracing again. The last batch is filled up, so that one trace does.

    Args:
        extractor: A `FeatureExtractor`, or a backbone that knows its input size.
        images: Images `(N, H, W, 3)`, uint8 or float in 0-255, or a finite dataset of batches of
            such images; whatever follows the images in a batch (labels) is left out.
        batch_size: Images per step; a dataset has its own.
        verbose: 0 is silent, 1 shows a progress bar, 2 one line at the end; `"auto"` shows the
            bar unless one step does it all.

    Returns:
        NumPy array `(N, D)`, float32, rows of L2 norm 1, in the order of the images.

    Raises:
        ValueError: If there are no images, or they are not images in 0-255.

    Example:
    >>> extractor = FeatureExtractor(backbone, image_size=32, resolution=32)
    >>> bank = extract_features(extractor, train_images)
    """
    if not isinstance(extractor, FeatureExtractor):
        extractor = FeatureExtractor(extractor)
    batches, steps = _batches(images, batch_size)
    progress = keras.utils.Progbar(steps, verbose=int(steps != 1) if verbose == "auto" else verbose)
    features, full = [], 0
    for batch in batches:
        if not features:
            _check_range(np.asarray(batch))
        count = len(batch)
        full = max(full, count)
        if count < full:
            filling = np.zeros((full - count, *batch.shape[1:]), batch.dtype)
            batch = np.concatenate([batch, filling])
        features.append(extractor.compiled_call(tf.convert_to_tensor(batch)).numpy()[:count])
        progress.update(len(features), finalize=False)
    if not full:
        raise ValueError(f"At least one image is needed. Received: {images}.")
    progress.update(len(features), finalize=True)
    return np.concatenate(features)


def _batches(images, batch_size):
    """An iterable of NumPy batches, and their number or None if it is unknown."""
    if isinstance(images, tf.data.Dataset):
        if isinstance(images.element_spec, tuple):
            images = images.map(lambda batch, *_: batch)
        if not isinstance(images.element_spec, tf.TensorSpec):
            raise ValueError(
                "A dataset must yield batches of images, or tuples that begin with them. "
                f"Received: {images.element_spec}."
            )
        check_images(images.element_spec)
        steps = int(images.cardinality())
        if steps == tf.data.INFINITE_CARDINALITY:
            raise ValueError("The dataset repeats for ever. Pass it before `.repeat()`.")
        return images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator(), steps if steps >= 0 else None
    images = np.asarray(images)
    check_images(images)
    starts = range(0, len(images), batch_size)
    return (images[start : start + batch_size] for start in starts), len(starts)


def ood_score(
    features, bank, temperature=0.04, offset=0.1, k=None, *, weights=None, block_size=65_536
):
    """How far out of distribution features lie: higher means more out-of-distribution.

    `-log sum_m w_m exp((cos(f, b_m) - offset) / temperature)`, the weights summing to 1, over the
    whole bank or over its `k` rows nearest to `f`. Computed in float32 and in log space
    whatever the precision policy, and in blocks of the bank, so that memory stays bounded.

    Args:
        features: L2-normalized features `(B, D)`.
        bank: L2-normalized features of in-distribution images `(M, D)`.
        temperature: Positive float, of the exponential.
        offset: Float, subtracted from the cosine.
        k: None for the whole bank, or the number of nearest rows to average over. With weights
            these are the `k` nearest centers, their weights scaled to sum to 1 again.
        weights: Weights `(M,)` of the rows of the bank, not negative, scaled here to sum to 1: see
            `compress`. None weighs them equally.
        block_size: Rows of the bank that are compared at once; a block never has twice as many.

    Returns:
        Float32 scores `(B,)`. The score of a feature that is not a number is not a number.

    Raises:
        ValueError: If shapes do not fit, or `k` or `temperature` are out of range.

    Reference:
        Rafiee et al., "Self-Supervised Anomaly Detection by Self-Distillation and Negative
        Sampling", arXiv 2201.06378: minus the logarithm of its in-distribution score.

    Example:
    >>> ood_score(features=[[1.0, 0.0]], bank=[[1.0, 0.0], [0.0, 1.0]])
    <tf.Tensor: shape=(1,), dtype=float32, numpy=array([-21.806852], dtype=float32)>
    """
    features, bank = tf.convert_to_tensor(features), tf.convert_to_tensor(bank)
    rows, dim = _check_score_arguments(features, bank, temperature, k, weights, block_size)
    features = tf.cast(features, tf.float32)
    weights = tf.ones([rows]) if weights is None else tf.cast(weights, tf.float32)
    log_weights = tf.math.log(weights) - tf.math.log(tf.reduce_sum(weights))

    def logits(cosines, log_weights):
        return (cosines - offset) / temperature + log_weights

    def cosines(start, length):
        block = tf.cast(tf.slice(bank, [start, 0], [length, dim]), tf.float32)
        return tf.matmul(features, block, transpose_b=True)

    def log_sum(start, length):
        block_weights = tf.slice(log_weights, [start], [length])
        return (tf.reduce_logsumexp(logits(cosines(start, length), block_weights), axis=1),)

    def add(left, right):
        return (tf.reduce_logsumexp(tf.stack([left[0], right[0]]), axis=0),)

    def nearest(start, length):
        values, indices = tf.math.top_k(cosines(start, length), k)
        return values, indices + start

    def nearest_of_both(left, right):
        values, which = tf.math.top_k(tf.concat([left[0], right[0]], axis=1), k)
        return values, tf.gather(tf.concat([left[1], right[1]], axis=1), which, batch_dims=1)

    if k is None:
        return -_over_blocks(log_sum, add, rows, block_size)[0]
    values, indices = _over_blocks(nearest, nearest_of_both, rows, max(block_size, k))
    near = tf.gather(log_weights, indices)
    return tf.reduce_logsumexp(near, axis=1) - tf.reduce_logsumexp(logits(values, near), axis=1)


def _check_score_arguments(features, bank, temperature, k, weights, block_size):
    """Rows and dimension of the bank; a `ValueError` if the arguments do not fit together."""
    shapes = f"features of shape {features.shape} and a bank of shape {bank.shape}"
    if features.shape.rank != 2 or bank.shape.rank != 2 or None in bank.shape or 0 in bank.shape:
        raise ValueError(
            f"Expected features (B, D) and a bank (M, D) of known M and D. Received: {shapes}."
        )
    rows, dim = bank.shape
    if features.shape[1] not in (dim, None):
        raise ValueError(f"Features and bank must have one dimension. Received: {shapes}.")
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be positive. Received: {temperature}.")
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive. Received: {block_size}.")
    if k is not None and not 1 <= k <= rows:
        raise ValueError(f"`k` must be between 1 and the bank's {rows} rows. Received: {k}.")
    if weights is not None and tuple(weights.shape) != (rows,):
        raise ValueError(f"`weights` must have shape ({rows},). Received: {weights.shape}.")
    return rows, dim


def _over_blocks(block, combine, rows, block_size):
    """`combine` the tensors that `block(start, length)` gives for consecutive blocks of rows."""
    # The first block takes the rest as well, so that the others have one length, as XLA needs.
    others = max(rows // block_size, 1) - 1
    head = rows - others * block_size
    total = block(0, head)
    if not others:
        return total
    _, total = tf.while_loop(
        lambda start, _: start < rows,
        lambda start, total: (start + block_size, combine(total, block(start, block_size))),
        (tf.constant(head), total),
        parallel_iterations=1,
    )
    return total


def compress(features, size, method="kmeans", seed=0):
    """A smaller bank that scores like the whole one.

    Args:
        features: L2-normalized features `(M, D)`.
        size: Largest number of centers to keep.
        method: `"kmeans"` is spherical k-means: centers are the normalized means of their
            members. `"kcenter"` is the greedy k-center coreset: some of the features themselves,
            each the one farthest from those before it.
        seed: Int; equal seeds give equal banks.

    Returns:
        Centers, float32 `(M', D)` of L2 norm 1 with `M' <= size` (a center without members is
        left out), and their weights, float32 `(M',)`: each center's share of the features, which
        sum to 1 and make the mean over the centers stand for the mean over the features. With
        `size >= M` they are the features themselves, weighted equally.

    Raises:
        ValueError: If the features are not a finite matrix, `size` is not positive or `method` is
            unknown.

    References:
        Dhillon and Modha, "Concept decompositions for large sparse text data using clustering",
        2001; Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.

    Example:
    >>> centers, weights = compress(bank, size=1000)
    >>> scores = ood_score(features, centers, weights=weights)
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size or not np.isfinite(features).all():
        raise ValueError(
            f"`features` must be a finite array of shape (M, D). Received shape {features.shape}, "
            f"{np.count_nonzero(~np.isfinite(features))} values not finite."
        )
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"`size` must be a positive int. Received: {size!r}.")
    methods = {"kmeans": _kmeans_centers, "kcenter": _kcenter_centers}
    if method not in methods:
        raise ValueError(f"`method` must be one of {sorted(methods)}. Received: {method!r}.")
    if size >= len(features):
        return features, np.full(len(features), 1.0 / len(features), np.float32)
    from sklearn.metrics import pairwise_distances_argmin

    centers = methods[method](features, size, seed)
    members = np.bincount(pairwise_distances_argmin(features, centers), minlength=len(centers))
    kept = members > 0
    return centers[kept], (members[kept] / len(features)).astype(np.float32)


def _kmeans_centers(features, size, seed):
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(features) * size <= _FULL_KMEANS_DISTANCES:
        clusters = KMeans(size, random_state=seed)
    else:
        clusters = MiniBatchKMeans(size, random_state=seed, batch_size=max(4096, 2 * size))
    centers = clusters.fit(features).cluster_centers_.astype(np.float32)
    # Members that cancel out leave no direction; such a center stays near zero, not undefined.
    return centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-6)


def _kcenter_centers(features, size, seed):
    chosen = [np.random.default_rng(seed).integers(len(features))]
    nearest = features @ features[chosen[0]]
    while len(chosen) < size:
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, features @ features[chosen[-1]])
    return features[chosen]
