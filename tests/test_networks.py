"""What is asked of a backbone, and copies of it: equal, apart, or refused."""

import warnings

import keras
import numpy as np
import pytest

from sddns_tf.detector import Detector
from sddns_tf.heads import ProjectionHead
from sddns_tf.networks import check_backbone, copy_of
from sddns_tf.self_distillation import SelfDistillation
from sddns_tf.views import MultiCrop, Negatives

layers = keras.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)


def convolutions(*first, **names):
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            *first,
            layers.Conv2D(8, 3, 2, **names),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
        ]
    )


def adapted():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 5, (64, 16, 16, 3)).astype("float32"))
    return normalization


def nested_adapted():
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, keras.Model(inputs, adapted()(inputs))(inputs), name="nested")


class Subclassed(keras.Model):
    """The commonest way to write a Keras model: built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Conv2D(8, 3, 2)
        self.pool = layers.GlobalAveragePooling2D()

    def call(self, images):
        return self.pool(self.inner(images))


class Forgetful(Subclassed):
    """Holds a number that neither its configuration nor its weights tell of."""

    scale = 1.0

    def call(self, images):
        return self.scale * super().call(images)


def make_model(backbone, local_views=1):
    return SelfDistillation(
        backbone,
        MultiCrop(16, local_views=local_views, local_size=8),
        Negatives("rot90", "in_distribution"),
        ProjectionHead(16, hidden_dim=16, bottleneck_dim=8),
    )


@pytest.mark.parametrize("first", [adapted, nested_adapted])
def test_what_a_layer_adapted_to_is_copied(first, tmp_path):
    backbone = convolutions(first())
    pixels = (IMAGES[:4] / 255.0).astype("float32")
    model = make_model(backbone)
    assert not np.allclose(backbone(pixels), convolutions()(pixels))
    np.testing.assert_array_equal(model.teacher_backbone(pixels), backbone(pixels))

    detector = Detector.from_images(backbone, IMAGES[:30], IMAGES[30:49], 0.1, verbose=0)
    np.testing.assert_array_equal(detector.extractor.backbone(pixels), backbone(pixels))
    detector.save(tmp_path / "detector.keras")
    loaded = keras.saving.load_model(tmp_path / "detector.keras")
    np.testing.assert_array_equal(
        loaded.predict(IMAGES[49:], verbose=0)["ood_score"],
        detector.predict(IMAGES[49:], verbose=0)["ood_score"],
    )


def test_a_copy_that_answers_otherwise_is_refused():
    backbone = Forgetful()
    backbone(IMAGES[:1].astype("float32"))
    backbone.scale = 2.0
    with pytest.raises(ValueError, match=r"does not answer as it does.*add_weight.*differ by"):
        make_model(backbone)
    with pytest.raises(ValueError, match="does not answer as it does"):
        Detector.from_images(backbone, IMAGES[:30], IMAGES[30:49], 0.1, image_size=16, verbose=0)


def test_values_that_are_not_finite_are_copied():
    backbone = convolutions()
    backbone.set_weights([w * np.nan for w in backbone.get_weights()])
    assert np.isnan(copy_of(backbone, (16, 16, 3)).get_weights()[0]).all()


def test_a_subclassed_model_trains():
    model = make_model(Subclassed())
    model.compile("adam")
    before = model.teacher_backbone.get_weights()
    loss = model.fit(IMAGES[:32], verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    moved = zip(before, model.teacher_backbone.get_weights(), strict=True)
    assert all((a != b).any() for a, b in moved)


def test_a_backbone_with_lora_trains_its_low_rank_matrices_only():
    inputs = keras.Input((None, None, 3))
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, 2)(inputs))
    backbone = keras.Model(inputs, layers.Dense(8, name="dense")(pooled))
    backbone.layers[1].trainable = False
    backbone.get_layer("dense").enable_lora(2)
    model = make_model(backbone)
    model.compile("adam")
    biases = [m.get_layer("dense").bias.numpy() for m in (backbone, model.teacher_backbone)]
    model.fit(IMAGES[:32], epochs=2, verbose=0)
    student, teacher = (
        np.abs(m.get_layer("dense").lora_kernel_b.numpy()).max()
        for m in (model.student_backbone, model.teacher_backbone)
    )
    assert 0 < teacher < student
    np.testing.assert_array_equal(*biases)
    frozen = [v for v in backbone.weights if not v.trainable]
    assert len(frozen) >= 3  # the convolution's and the dense layer's own kernel


def test_a_quantized_backbone_is_scored_with_and_not_trained():
    inputs = keras.Input((None, None, 3))
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, 2)(inputs))
    backbone = keras.Model(inputs, layers.Dense(8)(pooled))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone.quantize("int8")
    with pytest.raises(ValueError, match=r"quantized backbone cannot be trained.*Received"):
        make_model(backbone)
    detector = Detector.from_images(
        backbone, IMAGES[:30], IMAGES[30:49], 0.1, image_size=16, verbose=0
    )
    assert np.isfinite(detector.predict(IMAGES[49:], verbose=0)["ood_score"]).all()


@pytest.mark.parametrize("name", ["erste Faltung", "größe", "-conv", "a:b"])
def test_names_that_tensorflow_refuses_are_told_before_a_step(name):
    backbone = convolutions(name=name)
    with pytest.raises(ValueError, match=r"Layers must have names of letters.*Received"):
        make_model(backbone)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (layers.Dense(3), r"must be a keras\.Model"),
        (keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(8, 3)]), "one vector"),
        (keras.Sequential([keras.Input((32, 32, 3)), layers.Flatten()]), "inputs of shape"),
    ],
)
def test_what_is_no_backbone_is_named(backbone, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(backbone, (16, 8))
