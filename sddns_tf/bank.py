"""The bank of in-distribution features: the out-of-distribution score, compression."""

import numpy as np
import tensorflow as tf

from sddns_tf.validation import check_choice, check_int, check_number

# Above this many distances per iteration, k-means sees mini-batches instead of the whole set.
_FULL_KMEANS_DISTANCES = 50_000_000


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
    rows, dim = _check_score_arguments(features, bank, temperature, offset, k, weights, block_size)
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


def _check_score_arguments(features, bank, temperature, offset, k, weights, block_size):
    """Rows and dimension of the bank; a `ValueError` if the arguments do not fit together."""
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
    check_int("size", size)
    check_int("seed", seed, low=0, high=2**32 - 1)
    methods = {"kmeans": _kmeans_centers, "kcenter": _kcenter_centers}
    check_choice("method", method, sorted(methods))
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
