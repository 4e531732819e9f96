"""`ConvNet`: a small convolutional network that trains on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import keras
from keras import layers

from sddns_tf.group_normalization import GroupNormalization
from sddns_tf.validation import check_choice, check_int

_ACTIVATIONS = ("relu", "gelu")


@keras.saving.register_keras_serializable("sddns_tf")
class ConvNet(keras.Model):
    """A small network of plain 3x3 convolutions, for images of any size.

    Each stage is one convolution or more, each with group normalization and an activation; from the
    second stage on, the first convolution halves the resolution. The feature is the mean over all
    places. Stages end in the layers `stage_1`, `stage_2`, ..., whose maps a local detector can
    compare.

    Convolutions learn local structure in minutes where a vision transformer takes hours, and plain
    ones make better use of a CPU than depthwise ones do. The default knew most after some minutes
    of training of the networks that were compared: see docs/training.md.

    Args:
        stages: Number of channels of each stage, a multiple of `groups`.
        convolutions: Number of convolutions in each stage.
        groups: Number of groups in each normalization.
        activation: `"relu"`, or `"gelu"`, which takes longer.
        **kwargs: `name`, `dtype` and `trainable` of the model.

    Call arguments:
        inputs: Normalized float images `(B, H, W, 3)`, of any height and width.

    Returns:
        Features `(B, stages[-1])`.

    Raises:
        ValueError: If the channels of a stage are not a positive multiple of `groups`, or there is
            no such activation.

    Reference:
        Wu and He, "Group Normalization", arXiv 1803.08494.

    Example:
    >>> backbone = ConvNet(stages=(32, 64, 128))
    >>> model = SelfDistillation(backbone, MultiCrop(image_size=32, local_views=2))
    """

    def __init__(
        self,
        stages: Sequence[int] = (32, 64, 128),
        convolutions: int = 1,
        groups: int = 8,
        activation: str = "relu",
        **kwargs,
    ) -> None:
        check_int("convolutions", convolutions)
        check_int("groups", groups)
        check_choice("activation", activation, _ACTIVATIONS)
        if not isinstance(stages, (list, tuple)) or not stages:
            raise ValueError(f"`stages` must be channels of each stage. Received: stages={stages}")
        for channels in stages:
            check_int("stages", channels)
            if channels % groups:
                raise ValueError(
                    f"Each of `stages` must be a multiple of `groups`. "
                    f"Received: stages={stages}, groups={groups}"
                )
        policy = keras.dtype_policies.get(kwargs.pop("dtype", None) or keras.config.dtype_policy())
        images = keras.Input((None, None, 3))
        order = {"data_format": "channels_last", "dtype": policy}  # whatever Keras is set to
        x = images
        for index, channels in enumerate(stages):
            for number in range(convolutions):
                strides = 2 if index and not number else 1
                name = f"stage_{index + 1}" if number == convolutions - 1 else None
                # The normalization has a bias of its own.
                x = layers.Conv2D(channels, 3, strides, padding="same", use_bias=False, **order)(x)
                x = GroupNormalization(groups, dtype=policy)(x)
                x = layers.Activation(activation, dtype=policy, name=name)(x)
        features = layers.GlobalAveragePooling2D(name="features", **order)(x)
        super().__init__(inputs=images, outputs=features, **kwargs)
        self.stages = tuple(stages)
        self.convolutions = convolutions
        self.groups = groups
        self.activation = activation
        self.dtype_policy = policy

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "stages": self.stages,
            "convolutions": self.convolutions,
            "groups": self.groups,
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the network that a configuration describes."""
        # Files that were written before these were arguments say nothing of them.
        return cls(**{"convolutions": 2, "activation": "gelu", **config})
