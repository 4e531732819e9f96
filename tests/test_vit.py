"""The vision transformer: sizes, position embeddings, stochastic depth, precision, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from skimage import data

from sddns_tf import vit


def photographs(height, width):
    """Four normalized crops of photographs, float32 (4, height, width, 3)."""
    crops = [
        image[100 : 100 + height, 150 : 150 + width] for image in (data.astronaut(), data.coffee())
    ]
    crops += [crop[::-1] for crop in crops]
    return ((np.stack(crops) / 255.0 - 0.45) / 0.225).astype("float32")


def tiny(**kwargs):
    keras.utils.set_random_seed(3)
    config = {"image_size": 32, "patch_size": 4, "hidden_dim": 24, "depth": 2, "num_heads": 3}
    return vit.VisionTransformer(**{**config, **kwargs})


def enlarge(model, factor=10.0):
    """Weights of a size where positions and attention matter: the initial ones are small."""
    for weight in model.weights:
        if weight.path.endswith(("kernel", "class_token", "position_embedding")):
            weight.assign(factor * weight)
    return model


def keys_resample(line, size):
    """Bicubic resampling of one line, tap by tap: the textbook form, a = -0.75."""
    a = -0.75
    result = []
    for i in range(size):
        center = (i + 0.5) * len(line) / size - 0.5
        first = int(np.floor(center)) - 1
        total = 0.0
        for tap in range(first, first + 4):
            t = abs(center - tap)
            if t <= 1:
                weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
            else:
                weight = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            total += weight * line[min(max(tap, 0), len(line) - 1)]
        result.append(total)
    return np.array(result)


@pytest.mark.parametrize(
    ("preset", "image_size", "parameters"),
    [
        (vit.vit_small, 224, 21_665_664),  # published with DINO
        (vit.vit_small, 256, 21_688_704),
        (vit.vit_tiny, 224, 5_524_416),  # timm's vit_tiny_patch16_224 without its classifier
        (vit.vit_base, 224, 85_798_656),  # published with DINO
    ],
)
def test_presets_have_the_published_number_of_parameters_before_any_call(
    preset, image_size, parameters
):
    assert preset(image_size).count_params() == parameters


def test_initial_weights_are_drawn_as_by_pytorchs_truncated_normal():
    """It cuts at +-2, a hundred of its deviations of 0.02: a normal."""
    keras.utils.set_random_seed(0)
    drawn = [
        weight
        for weight in vit.vit_tiny(224).weights
        if weight.path.endswith(("kernel", "position_embedding")) and "patch" not in weight.path
    ]
    assert len(drawn) == 12 * 4 + 1
    for weight in drawn:
        np.testing.assert_allclose(np.std(weight), 0.02, rtol=0.02)
        np.testing.assert_allclose(stats.kurtosis(weight, axis=None), 0.0, atol=0.1)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (16, 40)])
def test_feature_does_not_depend_on_how_the_graph_is_made(size):
    model = enlarge(tiny())
    images = photographs(*size)
    features = model(images)
    assert features.shape == (4, 24)
    compiled = tf.function(model, jit_compile=True)(images)
    unknown = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 3))])(images)
    np.testing.assert_allclose(compiled, features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(unknown, features, rtol=1e-3, atol=1e-4)
    assert np.std(features, axis=0).min() > 1e-3  # it looks at the image


def test_patches_are_projected_like_a_convolution():
    layer = vit.PatchEmbedding(4, 24)
    images = photographs(16, 40)
    tokens = layer(images)
    layer.bias.assign(np.arange(24))
    expected = tf.nn.conv2d(images, layer.kernel.value, 4, "VALID") + np.arange(24, dtype="float32")
    np.testing.assert_allclose(layer(images), tf.reshape(expected, (4, 40, 24)), atol=1e-4)
    assert tokens.shape == layer.compute_output_shape(images.shape)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 20), source=st.integers(1, 20), seed=st.integers(0, 99))
def test_bicubic_matrix_is_keys_rule(size, source, seed):
    line = np.random.default_rng(seed).normal(size=source)
    matrix = vit.bicubic_matrix(size, source)
    assert matrix.shape == (size, source)
    np.testing.assert_allclose(matrix @ line, keys_resample(line, size), atol=1e-5)
    in_graph = vit.bicubic_matrix(tf.constant(size), source, keras.ops)
    np.testing.assert_allclose(in_graph, matrix, atol=1e-5)


def test_position_embedding_is_resampled_along_both_sides_and_the_class_token_keeps_its_own():
    model = tiny(image_size=(32, 24))
    table = np.random.default_rng(0).normal(size=(1, 49, 24)).astype("float32")
    model.position_embedding.assign(table)
    np.testing.assert_array_equal(model.positions(8, 6), table)
    received = np.asarray(model.positions(5, 9))
    grid = np.apply_along_axis(keys_resample, 0, table[0, 1:].reshape(8, 6, 24), 5)
    grid = np.apply_along_axis(keys_resample, 1, grid, 9)
    np.testing.assert_array_equal(received[0, 0], table[0, 0])
    np.testing.assert_allclose(received[0, 1:], grid.reshape(45, 24), atol=1e-5)


def test_without_positions_the_order_of_patches_does_not_matter_and_with_them_it_does():
    model = enlarge(tiny())
    model.position_embedding.assign(20 * model.position_embedding)
    images = photographs(32, 32)
    shifted = np.roll(images, 8, axis=2)
    assert np.abs(model(images) - model(shifted)).max() > 0.01
    model.position_embedding.assign(tf.zeros_like(model.position_embedding))
    np.testing.assert_allclose(model(images), model(shifted), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_every_weight_gets_a_gradient(size, jit_compile):
    model = enlarge(tiny(drop_path_rate=0.1))

    @tf.function(jit_compile=jit_compile)
    def gradients(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images, training=True) ** 2 * tf.range(24.0))
        return tape.gradient(loss, [weight.value for weight in model.trainable_weights])

    for weight, gradient in zip(
        model.trainable_weights, gradients(photographs(*size)), strict=True
    ):
        assert np.abs(gradient).max() > 0, weight.path


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    keras.utils.set_random_seed(0)
    layer = vit.StochasticDepth(0.25)
    inputs = np.random.default_rng(0).uniform(1, 2, size=(20_000, 3, 2)).astype("float32")
    np.testing.assert_array_equal(layer(inputs, training=False), inputs)
    for function in (layer, tf.function(layer, jit_compile=True)):
        ratio = np.asarray(function(inputs, training=True)) / inputs
        kept = ratio[:, 0, 0] > 0
        np.testing.assert_allclose(ratio[kept], 1 / 0.75, rtol=1e-5)
        assert not ratio[~kept].any()
        assert abs(kept.mean() - 0.75) < 0.02
        again = np.asarray(function(inputs, training=True)[:, 0, 0]) > 0
        assert (again != kept).any()


def test_stochastic_depth_grows_with_depth_and_acts_in_training_only():
    model = enlarge(tiny(depth=3, drop_path_rate=0.8))
    np.testing.assert_allclose([block.drop_path_rate for block in model.blocks], [0.0, 0.4, 0.8])
    images = photographs(32, 32)
    np.testing.assert_array_equal(model(images), model(images))
    assert np.abs(model(images, training=True) - model(images, training=True)).max() > 1e-3
    still = tiny()
    np.testing.assert_array_equal(still(images, training=True), still(images))
    assert len(still.variables) == len(still.weights)  # no random state


def test_attention_weights_are_those_of_the_last_block():
    model = enlarge(tiny())
    images = photographs(16, 24)
    attention = model.attention_weights(images)
    assert attention.shape == (4, 3, 25, 25)
    np.testing.assert_allclose(np.sum(attention, axis=-1), 1, atol=1e-5)
    # The last block, written out from its weights.
    block = model.blocks[-1]
    tokens = model.blocks[0](model.embed(tf.constant(images)))
    mean, variance = tf.nn.moments(tokens, -1, keepdims=True)
    x = ((tokens - mean) / np.sqrt(variance + 1e-6)).numpy()
    qkv = (x @ block.attention.qkv.kernel.numpy()).reshape(4, 25, 3, 3, 8)
    logits = np.einsum("bnhd,bmhd->bhnm", qkv[:, :, 0], qkv[:, :, 1]) / np.sqrt(8)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention, expected, rtol=1e-2, atol=1e-3)
    assert np.max(attention) > 0.2


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)]
)
def test_mixed_precision_stays_near_float32(policy, tolerance):
    model = enlarge(tiny(), 3.0)
    mixed = tiny(dtype=policy)
    mixed.set_weights(model.get_weights())
    for size in ((32, 32), (16, 24)):
        images = photographs(*size)
        features = mixed(images)
        assert features.dtype == keras.DTypePolicy(policy).compute_dtype
        np.testing.assert_allclose(tf.cast(features, "float32"), model(images), atol=tolerance)
    assert mixed.attention_weights(images).dtype == "float32"


def test_file_and_copy(tmp_path):
    model = tiny(image_size=(32, 24), drop_path_rate=0.2, mlp_ratio=2.0, qkv_bias=False, name="spy")
    images = photographs(16, 16)
    model.save(tmp_path / "spy.keras")
    loaded = keras.models.load_model(tmp_path / "spy.keras")
    np.testing.assert_array_equal(loaded(images), model(images))
    assert loaded.get_config() == model.get_config()
    paths = [weight.path for weight in model.weights]
    assert "spy/blocks_0/attention/qkv/kernel" in paths
    for copy in (keras.models.clone_model(model), type(model).from_config(model.get_config())):
        assert [weight.path for weight in copy.weights] == paths
        assert np.abs(copy(images) - model(images)).max() > 1e-3
        model.save_weights(tmp_path / "spy.weights.h5")
        copy.load_weights(tmp_path / "spy.weights.h5")
        np.testing.assert_array_equal(copy(images), model(images))


def test_inside_a_functional_model():
    inputs = keras.Input((None, None, 3))
    backbone = tiny()
    model = keras.Model(inputs, backbone(inputs))
    assert model.output_shape == (None, 24)
    np.testing.assert_array_equal(model(photographs(16, 24)), backbone(photographs(16, 24)))


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_tflite_with_builtin_operations_only(size):
    model = enlarge(tiny())
    images = photographs(*size)
    function = tf.function(model, input_signature=[tf.TensorSpec((None, *size, 3))])
    # Without the model beside it, for then the converter would leave the weights variables.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, images)
    interpreter.invoke()
    features = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(features, model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 30}, "image_size=30"),
        ({"image_size": (32, 30)}, "multiples"),
        ({"image_size": (32, 32, 3)}, "pair"),
        ({"hidden_dim": 25}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"patch_size": 0}, "patch_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_images_that_do_not_fit_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"patch size, 4.*\(4, 32, 30, 3\)"):
        model(photographs(32, 30))
    with pytest.raises(ValueError, match=r"\(4, 32, 32, 1\)"):
        model(photographs(32, 32)[..., :1])
    with pytest.raises(ValueError, match="multiples of the patch size"):
        model(keras.Input((30, 32, 3)))
    with pytest.raises(ValueError, match="uint8"):
        model(np.zeros((1, 32, 32, 3), "uint8"))
    unknown = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 3))])
    with pytest.raises(tf.errors.InvalidArgumentError, match="width of `images`"):
        unknown(photographs(32, 30))


def test_the_last_block_computes_what_the_feature_needs():
    """As if all tokens went through it."""
    backbone = vit.VisionTransformer(16, 4, hidden_dim=16, depth=3, num_heads=2)
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype("float32")
    tokens = backbone.embed(keras.ops.convert_to_tensor(images))
    for block in backbone.blocks:
        tokens = block(tokens)
    whole = backbone.norm(tokens)
    assert tokens.shape == (3, 17, 16)
    np.testing.assert_allclose(backbone(images), whole[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_recomputed_gradients_are_those_kept(drop_path_rate):
    images = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype("float32")

    def gradients(recompute):
        keras.utils.set_random_seed(1)
        backbone = vit.VisionTransformer(
            16, 4, hidden_dim=16, depth=3, num_heads=2, drop_path_rate=drop_path_rate,
            recompute=recompute,
        )  # fmt: skip

        @tf.function(autograph=False)
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(backbone(images, training=True) ** 3)
            return tape.gradient(loss, [v.value for v in backbone.trainable_variables])

        return [step() for _ in range(2)][1], backbone

    kept, _ = gradients(False)
    again, backbone = gradients(True)
    assert backbone.get_config()["recompute"] is True
    assert len(kept) == len(again) > 10
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
