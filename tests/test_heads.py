"""The projection head against its formula, in float32 and mixed precision, frozen and saved."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from scipy.special import erf

from sddns_tf import heads


def features(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def tiny(**kwargs):
    keras.utils.set_random_seed(5)
    config = {"num_prototypes": 40, "hidden_dim": 32, "bottleneck_dim": 8}
    head = heads.ProjectionHead(**{**config, **kwargs})
    head.build((None, 12))
    return head


def reference(head, x):
    """DINO's head in NumPy, float64."""
    *weights, kernel, gain = (np.float64(weight) for weight in head.get_weights())
    for i in range(0, len(weights), 2):
        if i:
            x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
        x = x @ weights[i] + weights[i + 1]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ (gain * kernel / np.linalg.norm(kernel, axis=0))


def randomize(head):
    """Weights of all sizes, biases and gains included."""
    generator = np.random.default_rng(2)
    head.set_weights([generator.normal(size=w.shape) for w in head.weights])
    return head


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(6, 12), (2, 5, 12)])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_head_is_dinos_formula(num_layers, shape, jit_compile):
    head = randomize(tiny(num_layers=num_layers))
    assert len(head.mlp) == num_layers
    logits = tf.function(head, jit_compile=jit_compile)(features(*shape))
    assert logits.dtype == "float32"
    np.testing.assert_allclose(logits, reference(head, features(*shape)), rtol=1e-4, atol=1e-4)


def test_logits_start_as_cosines():
    logits = np.abs(tiny()(features(500, 12)))
    assert logits.max() <= 1 + 1e-6
    assert logits.max() > 0.5


def test_initial_weights():
    head = heads.ProjectionHead(num_prototypes=4096, hidden_dim=512)
    head.build((None, 384))
    for layer in head.mlp:
        assert abs(np.mean(layer.kernel)) < 1e-3
        # PyTorch's trunc_normal_(std=0.02) cuts at +-2: kurtosis and deviation of a normal.
        np.testing.assert_allclose(np.std(layer.kernel), 0.02, rtol=0.01)
        np.testing.assert_allclose(stats.kurtosis(layer.kernel, axis=None), 0.0, atol=0.05)
        assert not np.any(layer.bias)
    kernel = np.asarray(head.last_layer.kernel)
    assert kernel.shape == (256, 4096)
    assert 0.99 / 16 < np.abs(kernel).max() <= 1 / 16
    np.testing.assert_allclose(np.std(kernel), 1 / 16 / np.sqrt(3), rtol=0.01)
    np.testing.assert_array_equal(head.last_layer.gain, 1)
    # DINO's own count: three layers and the prototypes; the gain is a parameter too.
    mlp = 384 * 512 + 512 + 512 * 512 + 512 + 512 * 256 + 256
    assert head.count_params() == mlp + 256 * 4096 + 4096


def test_gain_is_trained_on_request_and_the_last_layer_can_be_frozen_for_a_while():
    fixed, trained = tiny(), tiny(norm_last_layer=False)
    assert len(trained.trainable_weights) == len(fixed.trainable_weights) + 1 == 8
    for head, own in ((fixed, 1), (trained, 2)):
        head.last_layer.trainable = False
        assert len(head.trainable_weights) == 6
        head.last_layer.trainable = True
        assert len(head.trainable_weights) == 6 + own


def test_gradient_leaves_the_length_of_a_prototype_alone():
    head = randomize(tiny(norm_last_layer=False))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(head(features(6, 12)) ** 2 * tf.range(1.0, 41.0))
    gradients = tape.gradient(loss, head.trainable_weights)
    for weight, gradient in zip(head.trainable_weights, gradients, strict=True):
        assert np.abs(gradient).max() > 0, weight.path
    kernel, gradient = (np.asarray(v) for v in (head.last_layer.kernel, gradients[-2]))
    along = np.sum(kernel * gradient, axis=0)
    scale = np.linalg.norm(kernel, axis=0) * np.linalg.norm(gradient, axis=0)
    np.testing.assert_allclose(along / scale, 0, atol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_rounds_the_mlp_and_not_the_prototypes(policy):
    head = tiny(dtype=policy)
    x = features(6, 12)
    logits = head(x)
    assert logits.dtype == "float32"
    assert head(keras.Input((12,))).dtype == "float32"
    np.testing.assert_allclose(logits, reference(head, x), atol=0.05)
    assert head.mlp[0](x).dtype == keras.DTypePolicy(policy).compute_dtype
    last = head.last_layer
    unit = tf.math.l2_normalize(features(6, 8), axis=-1)
    expected = unit.numpy() @ (last.kernel / np.linalg.norm(last.kernel, axis=0))
    np.testing.assert_allclose(last(unit), expected, atol=1e-6)


def test_zero_features_give_finite_logits_and_gradients():
    head = tiny()
    with tf.GradientTape() as tape:
        logits = head(np.zeros((2, 12), "float32"))
    assert np.isfinite(logits).all()
    assert all(np.isfinite(g).all() for g in tape.gradient(logits, head.trainable_weights))


def test_file_and_copy(tmp_path):
    head = randomize(tiny(num_layers=2, norm_last_layer=False, name="spy"))
    x = features(6, 12)
    head.save(tmp_path / "spy.keras")
    loaded = keras.models.load_model(tmp_path / "spy.keras")
    np.testing.assert_array_equal(loaded(x), head(x))
    assert loaded.get_config() == head.get_config()
    assert len(loaded.trainable_weights) == len(head.trainable_weights)
    copy = keras.models.clone_model(head)
    assert np.abs(copy(x) - head(x)).max() > 1e-3
    assert [weight.path for weight in copy.weights] == [weight.path for weight in head.weights]
    assert "spy/last_layer/kernel" in [weight.path for weight in head.weights]
    head.save_weights(tmp_path / "spy.weights.h5")
    copy.load_weights(tmp_path / "spy.weights.h5")
    np.testing.assert_array_equal(copy(x), head(x))


@pytest.mark.parametrize("name", ["num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_arguments_that_make_no_sense_are_named(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        heads.ProjectionHead(**{name: 0})


def test_one_prototype_teaches_nothing():
    with pytest.raises(ValueError, match=r"at least 2. Received: num_prototypes=1"):
        heads.ProjectionHead(1)
