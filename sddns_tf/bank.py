"""The bank of in-distribution features: the out-of-distribution score, compression, sampling."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.types import Array
from sddns_tf.validation import check_choice, check_int, check_number

# Above this many distances per iteration, k-means sees mini-batches instead of the whole set.
_FULL_KMEANS_DISTANCES = 50_000_000
METRICS = ("cosine", "euclidean")
METHODS = ("kcenter", "kmeans")
# Distances in this many random directions are enough: farthest-first picks nearly the same.
_PROJECTED_DIM = 64
_FARTHEST_AT_ONCE = 256


def ood_score(
    features: Array,
    bank: Array,
    temperature: float = 0.04,
    offset: float = 0.1,
    k: int | None = None,
    *,
    metric: str = "cosine",
    weights: Array | None = None,
    block_size: int = 65_536,
) -> tf.Tensor:
    """Score how far out of distribution features lie: higher means more out-of-distribution.

    `-log sum_m w_m exp((s(f, b_m) - offset) / temperature)`, with weights that sum to 1, over the
    whole bank or over its `k` rows nearest to `f`. Computed in float32 and in log space
    whatever the precision policy, and in blocks of the bank, so that memory stays bounded.

    For features of norm 1, the similarity `s` is the cosine. For features whose channels are
    standardized by the bank (`metric="euclidean"`), it is `1 - |f - b|^2 / (2 D)`, one minus half
    the mean squared difference per channel. It is 1 for equal features, as the cosine is, and 0 on
    average for two rows of the bank; where both have the norm `sqrt(D)`, it is the cosine. The
    score is then minus the logarithm of a Parzen window estimate of the density, with Gaussian
    windows of variance `D * temperature`.

    Args:
        features: Features `(B, D)`: L2-normalized, or standardized for `metric="euclidean"`.
        bank: Features of in-distribution images or places `(M, D)`, normalized the same way.
        temperature: Positive float, of the exponential.
        offset: Float, subtracted from the similarity.
        k: None for the whole bank, or the number of nearest rows to average over. With weights
            these are the `k` nearest centers, with weights rescaled to sum to 1.
        metric: `"cosine"` or `"euclidean"`.
        weights: Positive weights `(M,)` of the rows of the bank, scaled here to sum to 1: see
            `compress`. None weights them equally.
        block_size: Rows of the bank to compare at once; no block has twice as many.

    Returns:
        Float32 scores `(B,)`. The score of a NaN feature is NaN.

    Raises:
        ValueError: If shapes do not fit, or `k`, `metric` or `temperature` are out of range.

    Reference:
        Rafiee et al., "Self-Supervised Anomaly Detection by Self-Distillation and Negative
        Sampling", arXiv 2201.06378: minus the logarithm of its in-distribution score. Parzen,
        "On estimation of a probability density function and mode", 1962.

    Example:
    >>> ood_score(features=[[1.0, 0.0]], bank=[[1.0, 0.0], [0.0, 1.0]])
    <tf.Tensor: shape=(1,), dtype=float32, numpy=array([-21.806852], dtype=float32)>
    """
    features, bank = tf.convert_to_tensor(features), tf.convert_to_tensor(bank)
    rows, dim = _check_score_arguments(features, bank, temperature, offset, k, weights, block_size)
    check_choice("metric", metric, METRICS)
    features = tf.cast(features, tf.float32)
    weights = tf.ones([rows]) if weights is None else tf.cast(weights, tf.float32)
    log_weights = tf.math.log(weights) - tf.math.log(tf.reduce_sum(weights))

    def products(start, length):
        """Return how near rows are to the features: `similarities` less what it adds."""
        block = tf.cast(tf.slice(bank, [start, 0], [length, dim]), tf.float32)
        found = tf.matmul(features, block, transpose_b=True)
        # Half the squared lengths of the rows; for a constant bank, the bias of a dense layer.
        half = tf.reduce_sum(tf.square(block), axis=1) / 2.0 if metric == "euclidean" else None
        return found if half is None else found - half

    def similarities(products):
        if metric == "cosine":
            return products
        half = tf.reduce_sum(tf.square(features), axis=1, keepdims=True) / 2.0
        return 1.0 + (products - half) * (1.0 / dim)

    def logits(products):
        return (similarities(products) - offset) / temperature

    def log_sum(start, length):
        block_weights = tf.slice(log_weights, [start], [length])
        return (tf.reduce_logsumexp(logits(products(start, length)) + block_weights, axis=1),)

    def add(left, right):
        return (tf.reduce_logsumexp(tf.stack([left[0], right[0]]), axis=0),)

    def nearest(start, length):
        values, indices = tf.math.top_k(products(start, length), k)
        return values, indices + start

    def nearest_of_both(left, right):
        values, which = tf.math.top_k(tf.concat([left[0], right[0]], axis=1), k)
        return values, tf.gather(tf.concat([left[1], right[1]], axis=1), which, batch_dims=1)

    def highest(start, length):
        return (tf.reduce_max(products(start, length), axis=1, keepdims=True),)

    def higher(left, right):
        return (tf.maximum(left[0], right[0]),)

    if k is None:
        return -_over_blocks(log_sum, add, rows, block_size)[0]
    if k == 1:  # Its weight is scaled to 1, and a maximum needs no sorting.
        return -logits(_over_blocks(highest, higher, rows, block_size)[0])[:, 0]
    values, indices = _over_blocks(nearest, nearest_of_both, rows, max(block_size, k))
    near = tf.gather(log_weights, indices)
    return tf.reduce_logsumexp(near, axis=1) - tf.reduce_logsumexp(logits(values) + near, axis=1)


def _check_score_arguments(features, bank, temperature, offset, k, weights, block_size):
    """Return the bank's number of rows and its dimension.

    Raise a `ValueError` if the arguments do not fit together.
    """
    shapes = f"features of shape {features.shape} and a bank of shape {bank.shape}"
    if features.shape.rank != 2 or bank.shape.rank != 2 or None in bank.shape or 0 in bank.shape:
        raise ValueError(
            f"Expected features (B, D) and a bank (M, D) of known M and D. Received: {shapes}."
        )
    rows, dim = bank.shape
    if features.shape[1] not in (dim, None):
        raise ValueError(f"Features and bank must have one dimension. Received: {shapes}.")
    check_number("temperature", temperature, above=0.0)
    check_number("offset", offset)
    check_int("block_size", block_size)
    if k is not None:
        check_int("k", k)
        if k > rows:
            raise ValueError(f"`k` must be between 1 and the bank's {rows} rows. Received: k={k}")
    if weights is not None and tuple(weights.shape) != (rows,):
        raise ValueError(f"`weights` must have shape ({rows},). Received: {weights.shape}.")
    return rows, dim


def _over_blocks(block, combine, rows, block_size):
    """`combine` the tensors that `block(start, length)` returns for consecutive blocks of rows."""
    # The first block takes the remainder too, so that the others have one length, as XLA needs.
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


def compress(
    features: Array,
    size: int,
    method: str = "kmeans",
    seed: int = 0,
    *,
    metric: str = "cosine",
    weights: Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compress a bank to a smaller one that scores like the whole one.

    Args:
        features: Features `(M, D)`: L2-normalized, or standardized for `metric="euclidean"`.
        size: Largest number of centers to keep.
        method: `"kmeans"` takes the means of clusters, and with cosines normalizes them (spherical
            k-means). `"kcenter"` is the greedy k-center coreset: a subset of the features, each the
            farthest from those chosen before it.
        seed: Int; equal seeds give equal banks.
        metric: `"cosine"` or `"euclidean"`, of the score.
        weights: Positive weights `(M,)` of the features, such as those of a compressed bank, or
            None for equal ones. They do not affect which features `"kcenter"` takes.

    Returns:
        Centers, float32 `(M', D)` with `M' <= size` (a center without members is left out), with
        cosines of L2 norm 1, and their weights, float32 `(M',)`: each center's share of the
        features. They sum to 1, so that the weighted mean over the centers stands for the mean over
        the features. With `size >= M` the result is the features themselves, weighted as they were.

    Raises:
        ValueError: If the features are not a finite matrix, `size` is not positive, `method` is
            unknown or `weights` are not M positive numbers.

    References:
        Dhillon and Modha, "Concept decompositions for large sparse text data using clustering",
        2001; Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.

    Example:
    >>> centers, weights = compress(bank, size=1000)
    >>> scores = ood_score(features, centers, weights=weights)
    """
    features = _finite_matrix("features", features)
    check_int("size", size)
    check_int("seed", seed, low=0, high=2**32 - 1)
    check_choice("method", method, METHODS)
    check_choice("metric", metric, METRICS)
    shares = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(features),) or not ((shares > 0) & np.isfinite(shares)).all():
        raise ValueError(
            f"`weights` must be {len(features)} positive numbers. Received: shape={shares.shape}, "
            f"smallest {shares.min(initial=np.inf):.3g}"
        )
    shares = shares / shares.sum()
    if size >= len(features):
        return features, shares.astype(np.float32)
    from sklearn.metrics import pairwise_distances_argmin

    centers = {"kmeans": _kmeans_centers, "kcenter": _kcenter_centers}[method](
        features, size, seed, weights
    )
    if method == "kmeans" and metric == "cosine":
        # Members that cancel out leave no direction; such a center stays near zero, not undefined.
        centers = centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-6)
    nearest = pairwise_distances_argmin(features, centers)
    members = np.bincount(nearest, shares, minlength=len(centers))
    kept = members > 0
    return centers[kept], members[kept].astype(np.float32)


def _finite_matrix(name, values):
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` must be a finite array of shape (M, D). Received: shape {values.shape}, "
            f"{np.count_nonzero(~np.isfinite(values))} values not finite"
        )
    return values


def _kmeans_centers(features, size, seed, weights):
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(features) * size <= _FULL_KMEANS_DISTANCES:
        clusters = KMeans(size, random_state=seed)
    else:
        clusters = MiniBatchKMeans(size, random_state=seed, batch_size=max(4096, 2 * size))
    return clusters.fit(features, sample_weight=weights).cluster_centers_.astype(np.float32)


def _kcenter_centers(features, size, seed, weights):
    del weights  # Weights do not change which feature is the farthest.
    return features[_farthest_first(features, size, seed)]


def coreset(places: Array, size: int, seed: int = 0) -> np.ndarray:
    """Choose rows for a bank of places, each the farthest from those chosen before it.

    Greedy k-center by Euclidean distance. With more than 64 channels, distances are taken in 64
    random directions, which changes them by some 10 percent.

    Args:
        places: Standardized features of places, float `(M, C)`.
        size: Largest number of rows.
        seed: Int; equal seeds give equal rows.

    Returns:
        Float32 `(min(M, size), C)`.

    Raises:
        ValueError: If the places are not a finite matrix or `size` is not positive.

    Reference:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, section
        3.2; Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; Johnson
        and Lindenstrauss, "Extensions of Lipschitz mappings into a Hilbert space", 1984.

    Example:
    >>> rows = coreset(places, size=5000)
    """
    places = _finite_matrix("places", places)
    check_int("size", size)
    if size >= len(places):
        return places
    projected, dim = places, places.shape[1]
    if dim > _PROJECTED_DIM:
        directions = np.random.default_rng(seed).normal(size=(dim, _PROJECTED_DIM))
        projected = places @ (directions / np.sqrt(_PROJECTED_DIM)).astype(np.float32)
    return places[_farthest_first(projected, size, seed)]


def _farthest_first(features, size, seed):
    """Return indices of rows, each the farthest from those before it; the first is random.

    Rows are taken from the farthest few while these are sure to be farther than all others, and
    only then compared with everything. The choice is the same, with matrix products instead of one
    pass over all rows per choice.
    """
    half = np.einsum("nd,nd->n", features, features) / 2.0

    def nearness(some, rows):  # Half of the squared distance is `half[rows]` minus this.
        products = features[some] @ features[rows].T
        products -= half[some, np.newaxis]
        return products

    everything, few = slice(None), min(_FARTHEST_AT_ONCE, len(features))
    chosen = [int(np.random.default_rng(seed).integers(len(features)))]
    nearest = half - nearness(chosen, everything)[0]
    nearest[chosen] = -1.0
    while len(chosen) < size:
        farthest = np.argpartition(nearest, len(nearest) - few)[-few:]
        current, among = nearest[farthest], half[farthest] - nearness(farthest, farthest)
        bound, new = current.min(), []
        while len(chosen) + len(new) < size and current.max() >= bound:
            best = int(np.argmax(current))
            new.append(int(farthest[best]))
            np.minimum(current, among[best], out=current)
            current[best] = -1.0
        np.minimum(nearest, half - nearness(new, everything).max(axis=0), out=nearest)
        chosen += new
        nearest[chosen] = -1.0
    return chosen


class Reservoir:
    """Random rows of a stream, drawn without replacement in bounded memory.

    Every row offered is equally likely to be kept. Which ones are kept depends on the seed and the
    order of the rows, not on how they are split into batches.

    Args:
        capacity: Number of rows to keep.
        seed: Int.

    Example:
    >>> reservoir = Reservoir(50_000, seed=0)
    >>> for rows in batches:
    ...     reservoir.offer(rows)
    >>> reservoir.rows.shape
    (50000, 160)

    Reference:
        Vitter, "Random sampling with a reservoir", 1985; here each row gets a random key and those
        with the smallest keys are kept, which is the same.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        check_int("capacity", capacity)
        self._capacity = capacity
        self._generator = np.random.default_rng(seed)
        self._offered = 0
        self._keys = np.full(capacity, np.inf)  # Infinite where there is no row yet.
        self._numbers = np.zeros(capacity, np.int64)
        self._rows: Any = None

    def offer(self, rows: Any) -> None:
        """Offer more rows, float `(N, C)`."""
        if self._rows is None:
            self._rows = np.empty((self._capacity, rows.shape[1]), np.float32)
        keys = self._generator.random(len(rows))
        wanted = np.flatnonzero(keys < self._keys.max())
        both = np.concatenate([self._keys, keys[wanted]])
        lowest = np.zeros(len(both), bool)
        lowest[np.argpartition(both, self._capacity - 1)[: self._capacity]] = True
        # New rows replace those that leave, so that those that stay need no copying.
        places, new = np.flatnonzero(~lowest[: self._capacity]), wanted[lowest[self._capacity :]]
        self._rows[places], self._keys[places] = rows[new], keys[new]
        self._numbers[places] = self._offered + new
        self._offered += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """The rows kept so far, float32 `(N, C)`, in the order they were offered."""
        kept = np.flatnonzero(self._keys < np.inf)
        return self._rows[kept[np.argsort(self._numbers[kept])]]


def __getattr__(name: str) -> Any:
    """Return names that were documented here before they moved to `features`."""
    if name in ("FeatureExtractor", "extract_features", "image_size_of"):
        return getattr(importlib.import_module("sddns_tf.features"), name)
    raise AttributeError(f"module 'sddns_tf.bank' has no attribute {name!r}")
