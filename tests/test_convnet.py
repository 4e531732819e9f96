"""`ConvNet`: its arithmetic, any size of image, a `.keras` file, training."""

import keras
import numpy as np
import pytest

import sddns_tf


def gelu(x):
    from scipy.special import erf

    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0.0), "gelu": gelu}


def numpy_stage(x, weights, groups, strides, activation):
    """Convolution, group normalization and activation, written out."""
    kernel, gain, bias = weights
    height, width = x.shape[1:3]
    total = [max((-(-side // strides) - 1) * strides + 3 - side, 0) for side in (height, width)]
    pads = [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)]
    padded = np.pad(x, pads)
    rows, columns = -(-height // strides), -(-width // strides)
    out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + strides * rows : strides, j : j + strides * columns : strides]
            out += part[:, :rows, :columns] @ kernel[i, j]
    grouped = out.reshape(len(x), -1, groups, out.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    normalized = ((grouped - mean) / np.sqrt(variance + 1e-3)).reshape(out.shape)
    return ACTIVATIONS[activation](normalized * gain + bias)


@pytest.mark.parametrize(("convolutions", "all_strides"), [(1, (1, 2)), (2, (1, 1, 2, 1))])
@pytest.mark.parametrize(("size", "activation"), [((8, 8), "relu"), ((7, 10), "gelu")])
def test_features_equal_a_numpy_network(size, activation, convolutions, all_strides):
    keras.utils.set_random_seed(0)
    network = sddns_tf.ConvNet((4, 8), convolutions, groups=2, activation=activation)
    for weight in network.weights:
        weight.assign(weight + 0.1 * np.random.default_rng(1).normal(size=weight.shape))
    images = np.random.default_rng(0).normal(size=(3, *size, 3)).astype("float32")
    x, weights = images.astype("float64"), [w.numpy() for w in network.weights]
    for index, strides in enumerate(all_strides):
        x = numpy_stage(x, weights[3 * index : 3 * index + 3], 2, strides, activation)
    np.testing.assert_allclose(network(images), x.mean(axis=(1, 2)), atol=1e-5)


def test_a_saved_network_is_the_same(tmp_path):
    network = sddns_tf.ConvNet((8, 16), convolutions=2, groups=4, activation="gelu")
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype("float32")
    np.testing.assert_array_equal(network(images), loaded(images))
    assert loaded.get_config() == network.get_config()


def test_a_saved_network_keeps_its_precision_and_stays_frozen(tmp_path):
    network = sddns_tf.ConvNet((8, 16), dtype="mixed_bfloat16", trainable=False)
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype("float32")
    assert network(images).dtype == "bfloat16"
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert loaded(images).dtype == loaded.compute_dtype == "bfloat16"
    assert not loaded.trainable_weights
    assert loaded.get_config() == network.get_config()


def test_images_have_channels_last_whatever_keras_is_set_to():
    expected = sddns_tf.ConvNet((8, 8), groups=4)
    keras.config.set_image_data_format("channels_first")
    try:
        network = sddns_tf.ConvNet((8, 8), groups=4)
        network.set_weights(expected.get_weights())
        images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
        np.testing.assert_array_equal(network(images), expected(images))
    finally:
        keras.config.set_image_data_format("channels_last")


def test_a_configuration_of_an_older_file_means_the_older_network():
    network = sddns_tf.ConvNet.from_config({"name": "old", "stages": [8], "groups": 4})
    assert (network.convolutions, network.activation) == (2, "gelu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": (30,)},
        {"stages": ()},
        {"stages": (8,), "groups": 0},
        {"stages": (8,), "convolutions": 0},
        {"stages": (8,), "activation": "rely"},
    ],
)
def test_wrong_stages_are_refused(wrong):
    with pytest.raises(ValueError, match="Received"):
        sddns_tf.ConvNet(**wrong)


def test_it_trains_on_views_of_two_sizes(normal):
    network = sddns_tf.ConvNet(stages=(8,))
    model = sddns_tf.SelfDistillation(
        network,
        sddns_tf.MultiCrop(16, local_views=1),
        head=sddns_tf.ProjectionHead(16, hidden_dim=8, bottleneck_dim=4),
    )
    before = [weight.numpy() for weight in network.trainable_weights]
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(normal, batch_size=32, verbose=0)
    pairs = zip(before, network.trainable_weights, strict=True)
    assert all((old != new.numpy()).any() for old, new in pairs)
