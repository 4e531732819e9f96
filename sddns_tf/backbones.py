"""Other people's networks as backbones, with the preprocessing that they expect built in.

Whatever a network takes (0-255, -1 to 1, BGR), its backbone takes images as the rest of this
package supplies them: normalized by ImageNet's mean and standard deviation, the defaults of
`SelfDistillation`, `Detector` and `FeatureExtractor`. So there is no `mean` or `std` to pass.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from sddns_tf import vit
from sddns_tf.efficientnet_lite import efficientnet_lite0 as efficientnet_lite0
from sddns_tf.image_ops import IMAGENET_MEAN, IMAGENET_STD
from sddns_tf.validation import check_choice, check_size

# Side of the solid-color images that show what a preprocessing function does.
_PROBE_SIDE = 32
_DINO = ("vit_tiny", "vit_small", "vit_base")


def wrap(
    network: keras.Model, preprocess: Callable | None = None, *, name: str | None = None
) -> keras.Model:
    """Return a network as a backbone that maps normalized images to one vector each.

    Args:
        network: Built functional Keras model with one input `(B, H, W, 3)`. Its output may be a
            vector `(B, D)`, a map `(B, h, w, D)`, which is averaged, or tokens `(B, T, D)`, of
            which the first, the class token, is taken.
        preprocess: What is applied to images in 0-255 before they enter the network:
            `keras.applications.resnet.preprocess_input`, a `keras_hub.layers.ImageConverter`, or
            any function that scales and shifts channels and may reorder them. None for a network
            that takes 0-255.
        name: Name of the backbone. Defaults to the network's name plus `_backbone`.

    Returns:
        Functional `keras.Model` from normalized float32 images `(B, H, W, 3)` to `(B, D)`. The
        network is one of its layers, its weights and input size unchanged. A local detector can use
        the network's inner layers (`layers="auto"`, `"tokens"` or their names).

    Raises:
        ValueError: If the network is not of this kind, or `preprocess` does more than scale, shift
            and reorder channels.

    Example:
    ```python
    network = keras.applications.ResNet50V2(include_top=False, weights="imagenet")
    backbone = backbones.wrap(network, keras.applications.resnet_v2.preprocess_input)
    detector = sddns_tf.Detector.from_images(backbone, train_images, held_out, image_size=224)
    ```
    """
    if not isinstance(network, keras.Model) or len(getattr(network, "inputs", None) or ()) != 1:
        raise ValueError(
            "`network` must be a functional Keras model with one input, the images. "
            f"Received: {network!r}"
        )
    (given,) = network.inputs
    if len(given.shape) != 4 or given.shape[-1] != 3:
        raise ValueError(
            f"`network` must take images (B, H, W, 3). Received: input shape {given.shape}"
        )
    order, scale, offset = _channels_of(preprocess)
    images = keras.Input(given.shape[1:], name="images")
    x = images
    if order != [0, 1, 2]:
        x = keras.ops.take(x, order, axis=-1)
    # From ImageNet's normalization to 0-255, and from there to what the network takes.
    mean, std = 255.0 * np.array(IMAGENET_MEAN)[order], 255.0 * np.array(IMAGENET_STD)[order]
    scale, offset = scale * std, scale * mean + offset
    if np.abs(scale - 1.0).max() > 1e-6 or np.abs(offset).max() > 1e-6:
        x = keras.layers.Rescaling(
            scale.tolist(), offset.tolist(), dtype="float32", name="preprocessing"
        )(x)
    # The same layers, but with one input instead of a dict as in KerasHub. Copies of this model
    # keep the names of its layers; copies of KerasHub's classes do not.
    x = keras.Model(given, network.outputs, name=network.name)(x)
    x = x[0] if isinstance(x, list) and len(x) == 1 else x
    rank = len(getattr(x, "shape", ()))
    if rank == 4:
        x = keras.layers.GlobalAveragePooling2D(name="pooled")(x)
    elif rank == 3:
        x = x[:, 0]
    elif rank != 2:
        raise ValueError(
            "`network` must give a vector (B, D), a map (B, h, w, D) or tokens (B, T, D). "
            f"Received: {x}"
        )
    return keras.Model(images, x, name=name or f"{network.name}_backbone")


def _channels_of(preprocess):
    """Return the channels' order, scale and offset, found by preprocessing solid colors."""
    if preprocess is None:
        return [0, 1, 2], np.ones(3), np.zeros(3)

    def of(color):
        # A new array each time: Keras' functions work in place.
        image = np.empty((1, _PROBE_SIDE, _PROBE_SIDE, 3), np.float32)
        image[:] = color
        image = np.asarray(keras.ops.convert_to_numpy(preprocess(image)), np.float64)
        if image.ndim != 4 or image.shape[-1] != 3 or np.ptp(image, axis=(1, 2)).max() > 1e-3:
            raise ValueError(
                "`preprocess` must give images of three channels, plain ones for plain ones. "
                f"Received: {preprocess}, which gives shape {image.shape}"
            )
        return image[0, 0, 0]

    black, tried = of((0, 0, 0)), np.array([200.0, 30.0, 90.0])
    matrix = np.stack([(of(color) - black) / 255.0 for color in 255.0 * np.eye(3)], axis=1)
    order = np.argmax(np.abs(matrix), axis=1)
    scale = matrix[np.arange(3), order]
    rest = matrix.copy()
    rest[np.arange(3), order] = 0.0
    is_linear = np.allclose(matrix @ tried + black, of(tried), atol=1e-3)
    if sorted(order) != [0, 1, 2] or np.abs(rest).max() > 1e-5 or not is_linear:
        raise ValueError(
            "`preprocess` may scale, shift and reorder channels, and nothing else; make the rest a "
            f"layer of the network. Received: {preprocess}"
        )
    return order.tolist(), scale, black


def application(name: str, weights: str | None = "imagenet") -> keras.Model:
    """Return a network of `keras.applications` as a backbone.

    Args:
        name: Its name there, such as `"EfficientNetB0"`, `"MobileNetV3Small"` or `"ResNet50V2"`.
        weights: `"imagenet"`, which Keras downloads on first use; the path of a weights file
            without the top; or None for random weights.

    Returns:
        Functional `keras.Model` from normalized images of any size to `(B, D)`.

    Raises:
        ValueError: If there is no such network.

    Example:
    ```python
    backbone = backbones.application("EfficientNetB0")
    detector = sddns_tf.Detector.from_images(
        backbone, train_images, held_out_images, image_size=224, layers="auto"
    )
    ```
    """
    known = [one for one in dir(keras.applications) if one[0].isupper()]
    check_choice("name", name, known)
    make = getattr(keras.applications, name)
    network = make(include_top=False, weights=weights, input_shape=(None, None, 3))
    return wrap(network, sys.modules[make.__module__].preprocess_input)


def keras_hub(
    backbone: Any,
    image_size: int | tuple[int, int] | None = None,
    *,
    preprocess: Callable | None = None,
) -> keras.Model:
    """Return a KerasHub backbone, such as EfficientNet, ViT, DINOv2 or DINOv3, as one of ours.

    Needs `pip install keras-hub`. Its vision transformers take images of one size: use them in
    detectors, or train them with `MultiCrop(image_size, local_views=0)`.

    Args:
        backbone: Name of a preset, such as `"dinov2_small"`, which KerasHub downloads on first use
            along with its preprocessing; or a `keras_hub.models.Backbone`.
        image_size: Height and width in pixels, to use a preset at another size than it was trained
            at. KerasHub resamples the position embedding.
        preprocess: For a backbone that is not a preset, its preprocessing: see `wrap`.

    Returns:
        Functional `keras.Model` from normalized images to `(B, D)`; for tokens, the class token.

    Raises:
        ImportError: If KerasHub is not installed.
        ValueError: If a size is given for a backbone that has one, or it does not take images.

    Example:
    ```python
    backbone = backbones.keras_hub("dinov2_small", image_size=224)
    detector = sddns_tf.Detector.from_images(
        backbone, train_images, held_out_images, layers="tokens"
    )
    ```
    """
    try:
        hub = importlib.import_module("keras_hub")
    except ImportError as error:
        raise ImportError(
            f"KerasHub is needed: `pip install keras-hub`. Received: backbone={backbone!r}"
        ) from error
    if isinstance(backbone, str):
        size = (
            {}
            if image_size is None
            else {"image_shape": (*check_size("image_size", image_size), 3)}
        )
        preprocess = preprocess or hub.layers.ImageConverter.from_preset(backbone)
        backbone = hub.models.Backbone.from_preset(backbone, **size)
    elif image_size is not None:
        raise ValueError(
            "`image_size` is for presets; a backbone that was made has a size. "
            f"Received: image_size={image_size}, backbone={backbone!r}"
        )
    return wrap(backbone, preprocess)


def dino(
    weights: str | None,
    network: str = "vit_small",
    *,
    patch_size: int = 16,
    image_size: int | tuple[int, int] = 224,
) -> keras.Model:
    """Return a vision transformer with DINO's published weights.

    Args:
        weights: Path of a `.weights.h5` file that `sddns convert-dino` wrote, or None for random
            weights.
        network: `"vit_tiny"`, `"vit_small"` or `"vit_base"`.
        patch_size: Side of the patches in pixels, 16 or 8 as published.
        image_size: Size in pixels that the weights were trained at. The network takes other sizes
            as well.

    Returns:
        `VisionTransformer`. It expects ImageNet's mean and standard deviation, our defaults.

    Example:
    ```python
    backbone = backbones.dino("dino_vits16.weights.h5")
    ```
    """
    check_choice("network", network, _DINO)
    backbone = getattr(vit, network)(image_size=image_size, patch_size=patch_size)
    if weights is not None:
        backbone.load_weights(weights)
    return backbone
