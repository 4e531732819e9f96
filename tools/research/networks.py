"""Small networks that training is tried on: none of them was tuned for the method's defaults."""

import keras

import sddns_tf

layers = keras.layers


def plain():
    """Return three 3x3 convolutions with group normalization."""
    images = x = keras.Input((None, None, 3))
    for index, width in enumerate((32, 64, 128)):
        x = layers.Conv2D(width, 3, strides=2 if index else 1, padding="same")(x)
        x = layers.Activation("relu")(layers.GroupNormalization(8)(x))
    return keras.Model(images, layers.GlobalAveragePooling2D()(x))


def depthwise(width=32):
    """Return four residual blocks of a depthwise 5x5 convolution and two dense layers.

    The features are the mean and the spread of each channel. The records of earlier results and
    of their 20 minutes use it.
    """
    images = keras.Input((None, None, 3))
    x = layers.Conv2D(width, 4, strides=2, padding="same")(images)
    for block, channels in enumerate((width, width, 2 * width, 2 * width)):
        if block == 2:
            x = layers.LayerNormalization(epsilon=1e-6)(x)
            x = layers.Conv2D(channels, 2, strides=2)(x)
        y = layers.DepthwiseConv2D(5, padding="same")(x)
        y = layers.LayerNormalization(epsilon=1e-6)(y)
        y = layers.Dense(2 * channels, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(channels)(y)])
    spread = keras.ops.sqrt(keras.ops.var(x, axis=(1, 2)) + 1e-4)
    return keras.Model(images, layers.Concatenate()([layers.GlobalAveragePooling2D()(x), spread]))


def resnet():
    """Return three residual blocks with batch normalization."""

    def convolution(x, width, size, strides=1):
        x = layers.Conv2D(width, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    images = keras.Input((None, None, 3))
    x = layers.Activation("relu")(convolution(images, 32, 3, 2))
    for index, width in enumerate((32, 64, 128)):
        strides = 2 if index else 1
        y = layers.Activation("relu")(convolution(x, width, 3, strides))
        y = convolution(y, width, 3)
        x = layers.Add()([convolution(x, width, 1, strides), y])
        x = layers.Activation("relu")(x)
    return keras.Model(images, layers.GlobalAveragePooling2D()(x))


def mobilenet_v3():
    """Return the minimalistic MobileNetV3Small of `keras.applications`."""
    return keras.applications.MobileNetV3Small(
        input_shape=(None, None, 3),
        minimalistic=True,
        include_top=False,
        weights=None,
        pooling="avg",
        include_preprocessing=False,
    )


def vit(image_size, width=96):
    """Return a vision transformer of 4 blocks with 8 x 8 patches."""
    return sddns_tf.VisionTransformer(
        image_size, patch_size=image_size // 8, hidden_dim=width, depth=4, num_heads=width // 32
    )


def vit_tiny(image_size):
    """Return ViT-Ti with 8 x 8 patches."""
    return sddns_tf.vit_tiny(image_size=image_size, patch_size=image_size // 8)


# From the size of images, which transformers need to know.
BY_NAME = {
    "plain": lambda image_size: plain(),
    "depthwise": lambda image_size: depthwise(),
    "resnet": lambda image_size: resnet(),
    "mobilenet_v3": lambda image_size: mobilenet_v3(),
    "vit": vit,
    "vit_tiny": vit_tiny,
}
