"""The training step stays on the device: it compiles as a whole, and nothing in it is host work."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import sddns_tf

# What runs on the host, or one image after the other.
HOST_ONLY = ("PyFunc", "EagerPyFunc", "Decode", "While", "MapDefun", "Print")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = sddns_tf.SelfDistillation(
        backbone=sddns_tf.VisionTransformer(
            8, 4, hidden_dim=16, depth=2, num_heads=2, drop_path_rate=0.1
        ),
        views=sddns_tf.MultiCrop(8, local_views=0),  # `test_views` compiles local ones
        negatives=sddns_tf.Negatives("perm4", source="both"),
        head=sddns_tf.ProjectionHead(num_prototypes=32, hidden_dim=16, bottleneck_dim=8),
        negative_weight=1.0,
        weight_decay=0.04,
        frozen_last_layer_steps=1,
    )
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=False)
    return model


def batch():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 4, 8, 8, 3), dtype=np.uint8)
    return {"images": tf.constant(images[0]), "auxiliary": tf.constant(images[1])}


def operations(function, *args):
    """Types of all operations in a function's graph and in the functions that it calls."""
    graph = tf.function(function, autograph=False).get_concrete_function(*args).graph.as_graph_def()
    nodes = list(graph.node) + [node for part in graph.library.function for node in part.node_def]
    return {node.op for node in nodes}


def host_only(types):
    return {name for name in types if any(part in name for part in HOST_ONLY)}


@pytest.mark.slow  # Parts of it are compiled in `test_views`, `test_shifts`, `test_vit`.
def test_the_whole_step_compiles(model):
    step = tf.function(model.train_step, jit_compile=True, autograph=False)
    before = model.student_backbone.get_weights()
    logs = step(batch())
    assert all(np.isfinite(float(value)) for value in logs.values())
    after = model.student_backbone.get_weights()
    assert any(np.any(old != new) for old, new in zip(before, after, strict=True))


def test_no_operation_of_the_step_is_host_work(model):
    types = operations(model.train_step, batch())
    assert "MatMul" in types
    assert not host_only(types)


@pytest.mark.parametrize("shift", (*sddns_tf.shifts.NAMES, "cut_paste"))
def test_no_operation_of_the_negatives_is_host_work(model, shift):
    """They are all of the step that depends on the shift."""
    source = "auxiliary" if shift == "identity" else "both"
    negatives = sddns_tf.Negatives(shift, source=source)

    def draw(images, seed):
        return negatives(model.views, images["images"], images["auxiliary"], seed)

    types = operations(draw, batch(), tf.constant([0, 1]))
    assert "StatelessRandomGetKeyCounter" in types or "StatelessRandomUniformV2" in types
    assert not host_only(types)


@pytest.mark.parametrize(
    "work",
    [
        lambda images: tf.map_fn(lambda image: image + 1, images),
        lambda images: tf.numpy_function(lambda x: x, [images], tf.float32),
        lambda images: tf.py_function(lambda x: x, [images], tf.float32),
        lambda images: tf.io.decode_image(tf.strings.as_string(images)[0, 0, 0, 0]),
    ],
)
def test_host_work_would_be_found(work):
    assert host_only(operations(work, tf.zeros([2, 4, 4, 3])))
