"""The score's second voice: how much features look like those of auxiliary images."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from sddns_tf.local import Moments
from sddns_tf.types import Array

# Of scikit-learn's logistic regression; from 0.001 to 10 it made no difference on CIFAR-10.
_INVERSE_REGULARIZATION = 0.1


def fit(bank: Array, auxiliary: Array, bank_weights: Array) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression that tells auxiliary images from the bank's, as many of each.

    Args:
        bank: Features of the bank's images, float32 `(M, D)`.
        auxiliary: Features of auxiliary images, float32 `(A, D)`.
        bank_weights: Weights of the rows of the bank, `(M,)`.

    Returns:
        Direction, float32 `(D,)`, and bias, float32 `()`, of the logit of being auxiliary.
    """
    from sklearn.linear_model import LogisticRegression

    moments = Moments(bank.shape[1])
    moments.add(bank)
    rows = (np.concatenate([bank, auxiliary]) - moments.mean) / moments.deviation
    labels = np.repeat([0, 1], [len(bank), len(auxiliary)])
    shares = np.concatenate(
        [bank_weights / bank_weights.sum(), np.full(len(auxiliary), 1.0 / len(auxiliary))]
    )
    regression = LogisticRegression(C=_INVERSE_REGULARIZATION, max_iter=1_000)
    regression.fit(rows, labels, sample_weight=shares * len(rows) / 2)
    direction = regression.coef_[0] / moments.deviation
    bias = regression.intercept_[0] - direction @ moments.mean
    return direction.astype(np.float32), np.asarray(bias, np.float32)


def surprise(features: Array, direction: Array, bias: Array) -> tf.Tensor:
    """Compute minus the log of the probability that features are not those of auxiliary images.

    `log(1 + exp(l))` of the logit `l`: nothing for what does not look auxiliary, so that it never
    makes an image more normal, and `l` for what clearly does.

    Args:
        features: Float32 `(B, D)`.
        direction: Float32 `(D,)`.
        bias: Float32 `()`.

    Returns:
        Float32 `(B,)`, at least 0.
    """
    logits = tf.linalg.matvec(features, direction) + bias
    # As softplus does it, of operations that TFLite has.
    return tf.nn.relu(logits) + tf.math.log(1.0 + tf.exp(-tf.abs(logits)))
