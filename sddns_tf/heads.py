"""DINO's projection head."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers, ops

from sddns_tf.gelu import gelu
from sddns_tf.types import Array
from sddns_tf.validation import check_bool, check_int


@keras.saving.register_keras_serializable("sddns_tf")
class WeightNormDense(layers.Layer):
    """Bias-free linear layer whose columns have the length given by their gain.

    Output k is `gain[k] * <x, kernel[:, k]> / |kernel[:, k]|`. With a gain of one and inputs of
    length one it is the cosine between the input and prototype k. Everything is in float32
    whatever the dtype policy: a temperature of 0.01 magnifies rounding a hundredfold.

    Args:
        units: Number of outputs.
        trainable_gain: Whether the gain is trained. It starts at one.
        **kwargs: `name` and `trainable` of the layer.

    Call arguments:
        inputs: `(..., D)`.

    Returns:
        float32 `(..., units)`.

    Reference:
        Salimans and Kingma, "Weight Normalization", arXiv 1602.07868.
    """

    def __init__(self, units: int, trainable_gain: bool = False, **kwargs) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        check_int("units", units)
        check_bool("trainable_gain", trainable_gain)
        self.units = units
        self.trainable_gain = trainable_gain

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        # Uniform in +-1/sqrt(fan in), the default of the linear layer that DINO normalizes.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.units),
            initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
        )
        self.gain = self.add_weight(
            name="gain",
            shape=(self.units,),
            initializer="ones",
            trainable=self.trainable_gain,
        )

    def call(self, inputs: Array) -> tf.Tensor:
        """Map inputs `(..., D)` to float32 `(..., units)`."""
        kernel = ops.convert_to_tensor(self.kernel)
        scale = self.gain * ops.rsqrt(ops.sum(ops.square(kernel), axis=0))
        return ops.matmul(inputs, kernel * scale)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update({"units": self.units, "trainable_gain": self.trainable_gain})
        return config


@keras.saving.register_keras_serializable("sddns_tf")
class ProjectionHead(keras.Model):
    """DINO's projection head: features to logits over prototypes.

    An MLP with GELU ends in a bottleneck, which is scaled to length one and compared with
    `num_prototypes` directions by a weight-normalized linear layer, `last_layer`.

    Args:
        num_prototypes: Number K of prototypes, the length of the output.
        hidden_dim: Width of the MLP's hidden layers.
        bottleneck_dim: Width of the MLP's output.
        num_layers: Number of linear layers in the MLP, at least 1.
        norm_last_layer: Whether each prototype has length one. Otherwise its length is trained,
            which may do better and is less stable.
        **kwargs: `name`, `dtype` and `trainable` of the model.

    Call arguments:
        features: `(..., D)`.

    Returns:
        Logits, float32 `(..., num_prototypes)` whatever the dtype policy.

    Raises:
        ValueError: If a size or the number of layers is not a positive integer.

    Example:
    >>> head = ProjectionHead(num_prototypes=1024)
    >>> head(np.ones((8, 384), "float32")).shape
    TensorShape([8, 1024])
    >>> head.last_layer.trainable = False  # for the first epoch, say

    Reference:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers",
        arXiv 2104.14294, section 3.1 and appendix C.
    """

    def __init__(
        self,
        num_prototypes: int = 4096,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (
            ("hidden_dim", hidden_dim),
            ("bottleneck_dim", bottleneck_dim),
            ("num_layers", num_layers),
        ):
            check_int(name, number)
        check_int("num_prototypes", num_prototypes, low=2)  # One has the same share of everything.
        check_bool("norm_last_layer", norm_last_layer)
        self.num_prototypes = num_prototypes
        self.hidden_dim = hidden_dim
        self.bottleneck_dim = bottleneck_dim
        self.num_layers = num_layers
        self.norm_last_layer = norm_last_layer
        self.mlp = [
            layers.Dense(
                units,
                # As in `vit`, and fresh for each layer: a shared one draws the same values twice.
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
                dtype=self.dtype_policy,
                name=f"mlp_{i}",
            )
            for i, units in enumerate([hidden_dim] * (num_layers - 1) + [bottleneck_dim])
        ]
        self.last_layer = WeightNormDense(
            num_prototypes, trainable_gain=not norm_last_layer, name="last_layer"
        )

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        shape = tuple(input_shape)
        for layer in (*self.mlp, self.last_layer):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, features: Array) -> tf.Tensor:
        """Map features `(..., D)` to float32 logits `(..., num_prototypes)`."""
        x = features
        for layer in self.mlp[:-1]:
            x = gelu(layer(x))
        x = ops.cast(self.mlp[-1](x), "float32")
        # `epsilon` is for the squared length.
        return self.last_layer(tf.math.l2_normalize(x, axis=-1, epsilon=1e-24))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return (*input_shape[:-1], self.num_prototypes)

    def compute_output_spec(self, features: Array) -> keras.KerasTensor:
        """Return the shape and dtype of the output."""
        return keras.KerasTensor(self.compute_output_shape(features.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update(
            {
                "num_prototypes": self.num_prototypes,
                "hidden_dim": self.hidden_dim,
                "bottleneck_dim": self.bottleneck_dim,
                "num_layers": self.num_layers,
                "norm_last_layer": self.norm_last_layer,
            }
        )
        return config
