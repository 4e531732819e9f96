"""How the student moves: clipped gradients, weight decay, frozen weights, Keras' optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from sddns_tf.keras_private import batches_counted, decays, fused_adam, inner


def check_optimizer(
    optimizer: keras.optimizers.Optimizer, replicas: int, has_decay_schedule: bool
) -> None:
    """Check that an optimizer can move a student.

    Args:
        optimizer: Keras optimizer, or a loss-scaling one around it.
        replicas: Int, number of replicas that it trains on.
        has_decay_schedule: Whether the model decays weights by a schedule of its own.

    Raises:
        ValueError: If it is to do what Keras cannot do on several replicas, or weight decay was
            asked for twice.
    """
    optimizer = inner(optimizer)
    accumulation = optimizer.gradient_accumulation_steps
    overwriting = optimizer.use_ema and optimizer.ema_overwrite_frequency
    if replicas > 1 and (accumulation or overwriting):
        raise ValueError(
            "On several replicas, Keras' optimizers can neither accumulate gradients nor overwrite "
            "weights with their moving average. Use larger batches, or one device. Received: "
            f"gradient_accumulation_steps={accumulation}, use_ema={optimizer.use_ema}, "
            f"ema_overwrite_frequency={optimizer.ema_overwrite_frequency}"
        )
    if has_decay_schedule and optimizer.weight_decay:
        raise ValueError(
            "Weight decay was asked for twice: compile with keras.optimizers.Adam, which has none, "
            "or leave the model's `weight_decay` at None. Received: a schedule of the model and "
            f"the optimizer's weight_decay={optimizer.weight_decay}"
        )


def build(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    is_decayed: Callable[[keras.Variable], bool],
) -> None:
    """Build an optimizer that spares from its decay what the model spares, unless it is built.

    Args:
        optimizer: Keras optimizer, or a loss-scaling one around it.
        variables: What it will move.
        is_decayed: Function that tells whether weight decay may act on a variable.
    """
    if optimizer.built:
        return
    # Keras forgets earlier exclusions at each call.
    spared = [one for one in variables if not (is_decayed(one) and decays(optimizer, one))]
    inner(optimizer).exclude_from_weight_decay(var_list=spared)
    optimizer.build(variables)


def clipped(
    optimizer: keras.optimizers.Optimizer, gradients: list[tf.Tensor], norm: float
) -> list[tf.Tensor]:
    """Scale each tensor's gradient down to a largest norm, by `tf.clip_by_norm`'s formula.

    The factors of all tensors are one vector: three operations per tensor instead of seventeen.

    Args:
        optimizer: Keras optimizer, which may have scaled the loss.
        gradients: Tensors.
        norm: Positive float.

    Returns:
        Tensors of the same shapes.
    """
    largest = optimizer.scale_loss(tf.constant(float(norm)))
    norms = tf.sqrt(2.0 * tf.stack([tf.cast(tf.nn.l2_loss(g), tf.float32) for g in gradients]))
    factors = tf.unstack(largest / tf.maximum(norms, largest))
    return [g * tf.cast(factor, g.dtype) for g, factor in zip(gradients, factors, strict=True)]


def will_move(optimizer: keras.optimizers.Optimizer, gradients: list[tf.Tensor]) -> tf.Tensor:
    """Return whether an optimizer is about to move its variables, by its own count of batches.

    It skips batches whose gradients overflowed, and moves at the last one that it accumulates.

    Args:
        optimizer: Built Keras optimizer, or a loss-scaling one around it.
        gradients: Tensors.

    Returns:
        Scalar bool tensor.
    """
    finite = True
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        finite = optimizer.check_finite(gradients)
    batches = inner(optimizer).gradient_accumulation_steps or 1
    is_last = (batches_counted(optimizer) + 1) % batches == 0
    return tf.logical_and(finite, is_last)


def decay(variables: Sequence[keras.Variable], share: tf.Tensor) -> None:
    """Shrink variables by a share of themselves."""
    for variable in variables:
        variable.assign_sub(share * variable)


@contextlib.contextmanager
def frozen(variables: Sequence[keras.Variable], is_frozen: tf.Tensor) -> Iterator[None]:
    """Undo what happens to variables inside this context, where `is_frozen` is true.

    Putting the values back, rather than dropping the gradients, keeps Adam's moments warm for the
    first step that counts, and undoes decay and momentum too.

    Args:
        variables: Such as those of the head's last layer.
        is_frozen: Scalar bool tensor.
    """
    before = [tf.identity(variable) for variable in variables]
    yield
    for variable, value in zip(variables, before, strict=True):
        variable.assign(tf.where(is_frozen, value, variable))


def move(
    optimizer: keras.optimizers.Optimizer,
    gradients: list[tf.Tensor],
    variables: Sequence[keras.Variable],
) -> None:
    """Let the optimizer move variables by gradients of the global batch's mean loss.

    Args:
        optimizer: Built Keras optimizer, or a loss-scaling one around it.
        gradients: Tensors, the same on all replicas.
        variables: One for each gradient.
    """
    # Keras adds up what the replicas hand over.
    count = tf.distribute.get_replica_context().num_replicas_in_sync
    if count > 1:
        gradients = [gradient / count for gradient in gradients]
    with fused_adam(optimizer):
        optimizer.apply(gradients, variables)
