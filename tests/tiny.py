"""The smallest networks and views that train: tests of other things spend their time elsewhere.

Tracing a step with `MultiCrop` and a vision transformer takes most of ten seconds. What they
compute is the subject of `test_views` and `test_vit`, and `test_save_load_continue` trains them.
"""

import contextlib
from unittest import mock

import keras
import tensorflow as tf

from sddns_tf import shifts


@keras.saving.register_keras_serializable("tests")
class Brightness:
    """Views that differ in their brightness, drawn anew for each image and step: few operations.

    Args:
        image_size: Side of the two global views.
        local_size: Side of one local view, or None for none.
        darkest: Smallest factor; with 1 nothing changes.
    """

    def __init__(self, image_size, local_size=None, darkest=0.5):
        self.image_size = image_size
        self.local_size = local_size
        self.darkest = darkest
        self.sizes = (image_size, local_size) if local_size else (image_size,)

    def __call__(self, images, seed):
        return self._draw(images, seed, 2)

    def negative(self, images, seed):
        return self._draw(images, seed, 1)

    def _draw(self, images, seed, count):
        images = tf.cast(images, tf.float32)
        draws = shifts.uniform([count, tf.shape(images)[0]], seed)
        share = 1.0 - (1.0 - self.darkest) * draws[..., tf.newaxis, tf.newaxis, tf.newaxis]
        groups = [share * images[:, : self.image_size, : self.image_size]]
        if self.local_size:
            groups.append(share[:1] * images[:, -self.local_size :, -self.local_size :])
        return groups

    def get_config(self):
        return {
            "image_size": self.image_size,
            "local_size": self.local_size,
            "darkest": self.darkest,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@contextlib.contextmanager
def no_pictures():
    """A block in which `sddns train` draws no pictures, which are a fifth of its time.

    The session's `trained` has them, and `test_cli_train` looks at them.
    """
    target = "sddns_tf.callbacks.pictures.TrainingPictures"
    with mock.patch(target, lambda *arguments: keras.callbacks.Callback()):
        yield


def conv(features=16, dropout=0.0, batch_norm=False):
    """A network of one convolution, the mean over the image, and one layer more."""
    layers = keras.layers
    more = [layers.BatchNormalization()] if batch_norm else []
    more += [layers.Dropout(dropout)] if dropout else []
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            *more,
            layers.GlobalAveragePooling2D(),
            layers.Dense(features),
        ]
    )
