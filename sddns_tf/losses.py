"""The two terms of the loss, and the centre, as pure functions.

Reference:
    Caron et al., arXiv 2104.14294, section 3.1 (distillation, centring); Rafiee et al.,
    arXiv 2201.06378 (negative term).
"""

import tensorflow as tf

from sddns_tf.validation import check_number


def teacher_probabilities(teacher_logits, center, teacher_temperature):
    """Centred and sharpened output of the teacher, `softmax((logits - center) / temperature)`.

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


def distillation_loss(
    teacher_logits, student_logits, center, teacher_temperature, student_temperature=0.1
):
    """Cross-entropy of student views against the teacher's other views of the same images.

    The mean over all pairs (teacher view `t`, student view `s`, `s != t`) and over the batch of
    `-sum_k P_t[k] log P_s[k]`. No pair is formed: the targets of one student view are added up
    first, and `-sum_k P[k] log softmax(z)[k] = logsumexp(z) - sum_k P[k] z[k]`.

    Args:
        teacher_logits: `(G, B, K)`, global views.
        student_logits: `(V, B, K)`, whose first G views are the teacher's.
        center: `(K,)`.
        teacher_temperature: Float or scalar tensor.
        student_temperature: Float.

    Returns:
        Scalar, float32.

    Reference:
        arXiv 2104.14294, equation 3.
    """
    _check_temperature("student_temperature", student_temperature)
    targets = teacher_probabilities(teacher_logits, center, teacher_temperature)
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


def uniformity_loss(student_logits, student_temperature=0.1):
    """Cross-entropy of the student's output for negatives against the uniform distribution.

    `-(1/K) sum_k log P_s[k] = logsumexp(z) - mean(z)` with `z = logits / temperature`: smallest,
    `log K`, where the student has no opinion.

    Args:
        student_logits: `(..., K)`.
        student_temperature: Float.

    Returns:
        Scalar, float32: the mean over all leading axes.
    """
    _check_temperature("student_temperature", student_temperature)
    scaled = tf.cast(student_logits, tf.float32) / student_temperature
    return tf.reduce_mean(tf.reduce_logsumexp(scaled, axis=-1) - tf.reduce_mean(scaled, axis=-1))


def updated_center(center, teacher_logits, momentum=0.9):
    """Exponential moving average of the teacher's mean output.

    Args:
        center: `(K,)`.
        teacher_logits: `(..., K)`: every positive teacher view of the batch.
        momentum: Share of the old centre that stays.

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


def _check_temperature(name, value):
    """A number is checked; a tensor is a schedule's, whose numbers were."""
    if not tf.is_tensor(value):
        check_number(name, value, above=0.0)
