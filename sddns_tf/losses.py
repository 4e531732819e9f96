"""The two terms of the loss, the teacher's targets and the center, as pure functions.

Reference:
    Caron et al., arXiv 2104.14294, section 3.1 (distillation, centering); Caron et al.,
    arXiv 2006.09882, section 3.1 (balanced targets); Rafiee et al., arXiv 2201.06378 (negative
    term).
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from sddns_tf.types import Array
from sddns_tf.validation import check_number

# Logits are cosines: a spread or a share of the batch below these is rounding.
_LEAST_SPREAD = 1e-6
_LEAST_SHARE = 1e-20
# Negatives count in full once the positive loss is this share of ln K below it.
_FULL_ONSET = 0.05


def teacher_probabilities(
    teacher_logits: Array, center: Array, teacher_temperature: Any
) -> tf.Tensor:
    """Center and sharpen the teacher's output: `softmax((logits - center) / temperature)`.

    Args:
        teacher_logits: `(..., K)`.
        center: `(K,)`.
        teacher_temperature: Float or scalar tensor.

    Returns:
        Float32 `(..., K)`, without gradient.
    """
    _check_temperature("teacher_temperature", teacher_temperature)
    logits = tf.cast(teacher_logits, tf.float32)
    return tf.stop_gradient(tf.nn.softmax((logits - center) / teacher_temperature))


def spread(values: Any, global_mean: Any = tf.identity) -> tf.Tensor:
    """Compute the standard deviation over the batch, as a root mean square over the last axis.

    Args:
        values: `(..., K)`; all leading axes are the batch.
        global_mean: Function that averages a tensor over all replicas.

    Returns:
        Scalar, float32.
    """
    _, variance = batch_moments(values, global_mean)
    return tf.sqrt(tf.reduce_mean(variance))


def batch_moments(values: Any, global_mean: Any = tf.identity) -> tuple[tf.Tensor, tf.Tensor]:
    """Compute the mean and variance over the batch.

    Args:
        values: `(..., K)`; all leading axes are the batch.
        global_mean: Function that averages a tensor over all replicas.

    Returns:
        Float32 `(K,)` and `(K,)`.
    """
    values = tf.cast(values, tf.float32)
    axes = list(range(values.shape.rank - 1))
    mean = global_mean(tf.reduce_mean(values, axes))
    return mean, global_mean(tf.reduce_mean(tf.square(values - mean), axes))


def standardized(values: Any, moments: Any) -> tf.Tensor:
    """Subtract each channel's mean and divide by its standard deviation.

    Channels that vary less than a hundredth as much as channels do on average, or less than
    float32's rounding of the mean, are not blown up.

    Args:
        values: `(..., K)`.
        moments: Mean and variance, `(K,)` each, as from `batch_moments`.

    Returns:
        Float32 `(..., K)`.
    """
    mean, variance = moments
    floor = 1e-4 * tf.reduce_mean(variance) + 1e-12 * tf.reduce_mean(tf.square(mean)) + 1e-20
    return (tf.cast(values, tf.float32) - mean) * tf.math.rsqrt(variance + floor)


def balanced_probabilities(
    teacher_logits: Array,
    temperature: float = 0.5,
    iterations: int = 3,
    global_mean: Any = tf.identity,
) -> tf.Tensor:
    """Compute teacher targets that tell images apart and use all prototypes equally.

    The logits are centered over the batch, divided by their `spread` and sharpened by a softmax.
    Then two scalings alternate (Sinkhorn-Knopp): prototypes are scaled to equal shares of the
    batch, and images to probabilities that sum to one. Nothing depends on the size of the logits:
    the targets tell images apart even if all look nearly alike to the teacher, and they can become
    neither uniform nor one prototype for all images.

    Args:
        teacher_logits: `(..., K)`: every positive teacher view of the batch.
        temperature: Float, relative to the spread of the logits.
        iterations: Number of times that prototypes and images are scaled.
        global_mean: Function that averages a tensor over all replicas.

    Returns:
        Float32 `(..., K)`, without gradient.

    Reference:
        Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
        Assignments", arXiv 2006.09882, section 3.1 and appendix A.
    """
    logits = tf.cast(teacher_logits, tf.float32)
    mean, variance = batch_moments(logits, global_mean)
    scale = temperature * tf.maximum(tf.sqrt(tf.reduce_mean(variance)), _LEAST_SPREAD)
    log_probabilities = tf.nn.log_softmax((logits - mean) / scale)
    axes = list(range(logits.shape.rank - 1))
    for _ in range(iterations):
        share = global_mean(tf.reduce_mean(tf.exp(log_probabilities), axes))
        log_probabilities = tf.nn.log_softmax(log_probabilities - tf.math.log(share + _LEAST_SHARE))
    return tf.stop_gradient(tf.exp(log_probabilities))


def distillation_loss(
    teacher_logits: Array,
    student_logits: Array,
    center: Array,
    teacher_temperature: Any,
    student_temperature: float = 0.1,
) -> tf.Tensor:
    """Compute the cross-entropy of student views against the centered teacher's other views.

    Args:
        teacher_logits: `(G, B, K)`, global views.
        student_logits: `(V, B, K)`, whose first G views are the teacher's.
        center: `(K,)`.
        teacher_temperature: Float or scalar tensor.
        student_temperature: Float.

    Returns:
        Scalar, float32: `cross_entropy` with `teacher_probabilities` as targets.

    Reference:
        arXiv 2104.14294, equation 3.
    """
    targets = teacher_probabilities(teacher_logits, center, teacher_temperature)
    return cross_entropy(targets, student_logits, student_temperature)


def cross_entropy(
    targets: Array, student_logits: Array, student_temperature: float = 0.1
) -> tf.Tensor:
    """Compute the cross-entropy of student views against targets of the images' other views.

    The mean over all pairs (teacher view `t`, student view `s`, `s != t`) and over the batch of
    `-sum_k P_t[k] log P_s[k]`. No pairs are formed: the targets of each student view are summed
    first, and `-sum_k P[k] log softmax(z)[k] = logsumexp(z) - sum_k P[k] z[k]`.

    Args:
        targets: Probabilities `(G, B, K)` of the teacher's global views.
        student_logits: `(V, B, K)`, whose first G views are the teacher's.
        student_temperature: Float.

    Returns:
        Scalar, float32.

    Reference:
        arXiv 2104.14294, equation 3.
    """
    _check_temperature("student_temperature", student_temperature)
    scaled = tf.cast(student_logits, tf.float32) / student_temperature
    num_teacher, num_student = targets.shape[0], scaled.shape[0]
    if num_student < 2:
        raise ValueError(
            "The student needs a view that its teacher did not see. Received: "
            f"student_logits.shape={student_logits.shape}"
        )
    total = tf.reduce_sum(targets, axis=0, keepdims=True)
    own_view_out = total - targets
    dots = tf.concat(
        [
            tf.reduce_sum(own_view_out * scaled[:num_teacher], axis=-1),
            tf.reduce_sum(total * scaled[num_teacher:], axis=-1),
        ],
        axis=0,
    )
    pairs_per_view = tf.constant(
        [[num_teacher - 1.0]] * num_teacher + [[float(num_teacher)]] * (num_student - num_teacher)
    )
    per_view = pairs_per_view * tf.reduce_logsumexp(scaled, axis=-1) - dots
    num_pairs = num_teacher * (num_student - 1)
    return tf.reduce_sum(tf.reduce_mean(per_view, axis=1)) / num_pairs


def uniformity_loss(student_logits: Array, student_temperature: float = 0.1) -> tf.Tensor:
    """Compute the cross-entropy of the student's output against the uniform distribution.

    `-(1/K) sum_k log P_s[k] = logsumexp(z) - mean(z)` with `z = logits / temperature`: smallest,
    `log K`, if the student's output is uniform.

    Args:
        student_logits: `(..., K)`.
        student_temperature: Float.

    Returns:
        Scalar, float32: the mean over all leading axes.
    """
    _check_temperature("student_temperature", student_temperature)
    scaled = tf.cast(student_logits, tf.float32) / student_temperature
    return tf.reduce_mean(tf.reduce_logsumexp(scaled, axis=-1) - tf.reduce_mean(scaled, axis=-1))


def negative_onset(positive_loss: Array, num_prototypes: int) -> tf.Tensor:
    """Compute how much negatives count, given how far the student follows the teacher.

    `min(1, max(0, 1 - positive_loss / ln K) / 0.05)`: 0 while the positive loss is at `ln K`, that
    of a student without an opinion, 1 from 5 % below it on. Negatives ask for uniform outputs. A
    student that has no opinion on normal images either would learn nothing but that.

    Args:
        positive_loss: Scalar, the cross-entropy of the student's outputs and the targets.
        num_prototypes: K.

    Returns:
        Float32 scalar between 0 and 1, through which no gradient flows.
    """
    opinion = 1.0 - tf.stop_gradient(positive_loss) / math.log(num_prototypes)
    return tf.clip_by_value(opinion / _FULL_ONSET, 0.0, 1.0)


def updated_center(center: Array, teacher_logits: Array, momentum: float = 0.9) -> tf.Tensor:
    """Compute the exponential moving average of the teacher's mean output.

    Args:
        center: `(K,)`.
        teacher_logits: `(..., K)`: every positive teacher view of the batch.
        momentum: Share of the old center that stays.

    Returns:
        Float32 `(K,)`.

    Reference:
        arXiv 2104.14294, equation 4.
    """
    if not tf.is_tensor(momentum):
        check_number("momentum", momentum, 0.0, 1.0)
    logits = tf.cast(teacher_logits, tf.float32)
    mean = tf.reduce_mean(logits, axis=list(range(logits.shape.rank - 1)))
    return momentum * center + (1.0 - momentum) * mean


def relative_entropy(probabilities: Array) -> tf.Tensor:
    """Compute the entropy over the last axis, relative to that of the uniform distribution.

    Args:
        probabilities: `(..., K)`.

    Returns:
        Float32 `(...)`: 1 is uniform, 0 is one-hot.
    """
    log_probabilities = tf.math.log(tf.maximum(probabilities, 1e-30))
    entropy = -tf.reduce_sum(probabilities * log_probabilities, axis=-1)
    return entropy / tf.math.log(float(probabilities.shape[-1]))


def relative_spread(features: Array, global_mean: Any = tf.identity) -> tf.Tensor:
    """Compute the standard deviation of L2-normalized features, relative to that of isotropic ones.

    Args:
        features: `(..., D)`; all leading axes are the batch.
        global_mean: Function that averages a tensor over all replicas.

    Returns:
        Scalar, float32: 0 where all images look alike.
    """
    normalized = tf.math.l2_normalize(tf.cast(features, tf.float32), axis=-1)
    _, variance = batch_moments(normalized, global_mean)
    return tf.reduce_mean(tf.sqrt(variance)) * features.shape[-1] ** 0.5


def _check_temperature(name, value):
    """Check a number; a tensor is a schedule's, whose numbers were checked before."""
    if not tf.is_tensor(value):
        check_number(name, value, above=0.0)
