"""The losses against their sums written out, in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from sddns_tf import losses


def logits(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def pairwise_distillation(teacher, student, center, teacher_temperature, student_temperature):
    """DINO's loss, pair by pair and image by image."""
    teacher, student, center = (np.float64(x) for x in (teacher, student, center))
    cross_entropies = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s == t:
                continue
            for i in range(teacher.shape[1]):
                target = softmax((teacher[t, i] - center) / teacher_temperature)
                cross_entropies.append(
                    -np.sum(target * log_softmax(student[s, i] / student_temperature))
                )
    return np.mean(cross_entropies)


@pytest.mark.parametrize(("num_teacher", "num_student"), [(2, 2), (2, 10), (1, 3), (1, 2), (3, 5)])
@pytest.mark.parametrize(("teacher_temperature", "student_temperature"), [(0.04, 0.1), (0.5, 1.0)])
def test_distillation_loss_is_the_mean_over_pairs(
    num_teacher, num_student, teacher_temperature, student_temperature
):
    teacher, student = logits(num_teacher, 4, 12), logits(num_student, 4, 12, seed=1)
    center = logits(12, seed=2)
    loss = losses.distillation_loss(
        teacher, student, center, teacher_temperature, student_temperature
    )
    assert loss.dtype == tf.float32
    assert loss.shape == ()
    expected = pairwise_distillation(
        teacher, student, center, teacher_temperature, student_temperature
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_students_default_temperature_is_a_tenth():
    teacher, student, center = logits(2, 3, 8), logits(4, 3, 8, seed=1), np.zeros(8, np.float32)
    assert float(losses.distillation_loss(teacher, student, center, 0.04)) == pytest.approx(
        pairwise_distillation(teacher, student, center, 0.04, 0.1), rel=1e-5
    )


def test_distillation_loss_is_independent_of_the_own_view():
    """With one teacher view its own student view is in no pair."""
    teacher, student, center = logits(1, 3, 8), logits(3, 3, 8, seed=1), np.zeros(8, np.float32)
    changed = student.copy()
    changed[0] = logits(3, 8, seed=9)
    assert float(losses.distillation_loss(teacher, student, center, 0.04)) == pytest.approx(
        float(losses.distillation_loss(teacher, changed, center, 0.04)), rel=1e-6
    )


def sinkhorn(teacher, temperature, iterations):
    """Balanced probabilities by scaling columns and rows of a matrix, in float64."""
    x = np.float64(teacher).reshape(-1, teacher.shape[-1])
    x = (x - x.mean(0)) / (temperature * np.sqrt(x.var(0).mean()))
    matrix = softmax(x, axis=1)
    for _ in range(iterations):
        matrix = matrix / matrix.mean(0)
        matrix = matrix / matrix.sum(1, keepdims=True)
    return matrix.reshape(teacher.shape)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_balanced_probabilities_are_those_of_sinkhorn_and_knopp(scale, jit_compile):
    teacher = logits(2, 16, 12, scale=scale) + scale * logits(12, seed=1, scale=3.0)
    balance = tf.function(losses.balanced_probabilities, jit_compile=jit_compile)
    balanced = balance(teacher, temperature=0.7, iterations=4).numpy()
    np.testing.assert_allclose(balanced, sinkhorn(teacher, 0.7, 4), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(balanced.sum(-1), 1.0, rtol=1e-5)


def test_balanced_probabilities_give_every_prototype_its_share():
    # One prototype that wins for all images, and one that is never near.
    teacher = logits(2, 64, 8) + np.array([9, -9, 0, 0, 0, 0, 0, 0], np.float32)
    teacher[..., 2] *= 10
    shares = losses.balanced_probabilities(teacher, iterations=20).numpy().mean((0, 1))
    np.testing.assert_allclose(shares, 1 / 8, rtol=0.02)


def test_balanced_probabilities_of_equal_images_are_uniform():
    teacher = np.repeat(logits(1, 1, 8), 6, axis=1)
    np.testing.assert_allclose(losses.balanced_probabilities(teacher), 1 / 8, rtol=1e-3)


def test_standardized_has_mean_0_and_deviation_1_and_leaves_still_channels_alone():
    values = logits(3, 50, 5) * np.array([1e-3, 1.0, 5.0, 1.0, 0.0], np.float32) + 2.0
    found = losses.standardized(values, losses.batch_moments(values)).numpy()
    np.testing.assert_allclose(found.mean((0, 1)), 0.0, atol=1e-3)
    np.testing.assert_allclose(found.std((0, 1))[1:4], 1.0, rtol=1e-2)
    assert found.std((0, 1))[0] < 0.1
    np.testing.assert_array_equal(found[..., 4], 0.0)
    variances = np.float64(values).var((0, 1))
    assert float(losses.spread(values)) == pytest.approx(np.sqrt(variances.mean()), rel=1e-4)


@given(
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    offset=st.sampled_from([0.0, -1e4, 1e4]),
    seed=st.integers(0, 99),
)
def test_extreme_logits_stay_exact(scale, offset, seed):
    teacher = logits(2, 2, 6, seed=seed, scale=scale) + np.float32(offset)
    student = logits(3, 2, 6, seed=seed + 1, scale=scale) + np.float32(offset)
    center = logits(6, seed=seed + 2)
    # What float32 loses at numbers of this size.
    tolerance = 1e-5 * max(1.0, float(np.abs(student).max()))
    loss = float(losses.distillation_loss(teacher, student, center, 0.04))
    assert loss == pytest.approx(
        pairwise_distillation(teacher, student, center, 0.04, 0.1), rel=1e-4, abs=tolerance
    )
    uniformity = float(losses.uniformity_loss(student))
    assert uniformity == pytest.approx(
        -log_softmax(np.float64(student) / 0.1, axis=-1).mean(), rel=1e-4, abs=tolerance
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_logits_are_computed_in_float32(dtype):
    teacher, student = (tf.cast(logits(n, 4, 512, seed=n, scale=5.0), dtype) for n in (2, 6))
    center = logits(512, seed=2)
    loss = losses.distillation_loss(teacher, student, center, 0.04)
    assert loss.dtype == tf.float32
    wide = [tf.cast(x, tf.float32).numpy() for x in (teacher, student)]
    assert float(loss) == pytest.approx(pairwise_distillation(*wide, center, 0.04, 0.1), rel=1e-5)
    uniformity = losses.uniformity_loss(student)
    assert uniformity.dtype == tf.float32
    assert float(uniformity) == pytest.approx(float(losses.uniformity_loss(wide[1])), rel=1e-6)
    assert losses.updated_center(center, teacher).dtype == tf.float32


def test_no_gradient_reaches_the_teacher_or_the_center():
    teacher, student, center = (
        tf.Variable(x) for x in (logits(2, 3, 8), logits(4, 3, 8, seed=1), logits(8, seed=2))
    )
    with tf.GradientTape() as tape:
        loss = losses.distillation_loss(teacher, student, center, 0.04)
    of_teacher, of_center, of_student = tape.gradient(loss, [teacher, center, student])
    assert of_teacher is None
    assert of_center is None
    assert np.abs(of_student).max() > 0.0


def test_students_gradient_is_softmax_minus_targets():
    teacher, center = logits(2, 3, 8), logits(8, seed=2)
    student = tf.Variable(logits(4, 3, 8, seed=1))
    with tf.GradientTape() as tape:
        loss = losses.distillation_loss(teacher, student, center, 0.04)
    targets = softmax((np.float64(teacher) - center) / 0.04, axis=-1)
    predictions = softmax(np.float64(student.numpy()) / 0.1, axis=-1)
    others = [targets[[1]], targets[[0]], targets, targets]
    expected = np.stack([(predictions[s] - others[s]).sum(axis=0) for s in range(4)]) / (
        0.1 * 6 * 3
    )  # temperature, pairs, images
    np.testing.assert_allclose(tape.gradient(loss, student), expected, atol=1e-5)


def test_distillation_loss_compiles_with_an_unknown_batch():
    function = tf.function(
        losses.distillation_loss,
        input_signature=[
            tf.TensorSpec([2, None, 8]),
            tf.TensorSpec([4, None, 8]),
            tf.TensorSpec([8]),
            tf.TensorSpec([]),
        ],
        jit_compile=True,
    )
    arguments = logits(2, 5, 8), logits(4, 5, 8, seed=1), logits(8, seed=2), 0.04
    assert float(function(*arguments)) == pytest.approx(
        float(losses.distillation_loss(*arguments)), rel=1e-5
    )


def test_a_student_with_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match=r"did not see.*\(1, 3, 8\)"):
        losses.distillation_loss(logits(1, 3, 8), logits(1, 3, 8), np.zeros(8), 0.04)


def test_teacher_probabilities_are_centered_and_sharpened():
    teacher, center = logits(2, 3, 8), logits(8, seed=2)
    probabilities = losses.teacher_probabilities(teacher, center, 0.07)
    np.testing.assert_allclose(
        probabilities, softmax((np.float64(teacher) - center) / 0.07, axis=-1), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(8,), (5, 8), (3, 5, 8)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_uniformity_loss_is_cross_entropy_against_the_uniform_distribution(shape, temperature):
    student = logits(*shape)
    log_probabilities = tf.nn.log_softmax(student / temperature)
    expected = -np.mean(np.sum(log_probabilities, axis=-1) / 8)
    loss = losses.uniformity_loss(student, temperature)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    uniform = np.full(shape, 1 / 8, np.float32)
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    assert float(loss) == pytest.approx(
        float(keras_loss(np.atleast_2d(uniform), np.atleast_2d(student / temperature))), rel=1e-5
    )


@pytest.mark.parametrize(
    ("share", "expected"), [(1.1, 0.0), (1.0, 0.0), (0.98, 0.4), (0.95, 1.0), (0.2, 1.0)]
)
def test_negatives_count_once_the_student_has_an_opinion(share, expected):
    positive = tf.Variable(share * np.log(512), dtype=tf.float32)
    with tf.GradientTape() as tape:
        onset = losses.negative_onset(positive, 512)
    assert float(onset) == pytest.approx(expected, abs=1e-5)
    assert tape.gradient(onset, positive) is None


@pytest.mark.parametrize("constant", [0.0, -3.0, 50.0])
def test_uniformity_loss_is_smallest_without_an_opinion(constant):
    flat = tf.Variable(tf.fill([4, 32], constant))
    with tf.GradientTape() as tape:
        smallest = losses.uniformity_loss(flat)
    assert float(smallest) == pytest.approx(np.log(32), rel=1e-5)
    np.testing.assert_allclose(tape.gradient(smallest, flat), 0.0, atol=1e-6)
    for seed in range(5):
        nudged = flat + logits(4, 32, seed=seed, scale=0.05)
        assert float(losses.uniformity_loss(nudged)) > float(smallest)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_center_moves_toward_the_mean_of_all_teacher_views(shape, momentum):
    center, teacher = logits(8), logits(*shape, seed=1)
    mean = np.float64(teacher).reshape(-1, 8).mean(axis=0)
    np.testing.assert_allclose(
        losses.updated_center(center, teacher, momentum),
        momentum * center + (1 - momentum) * mean,
        atol=1e-6,
    )


def test_centers_default_momentum_is_dinos():
    np.testing.assert_allclose(
        losses.updated_center(np.zeros(3, np.float32), np.ones((2, 4, 3), np.float32)),
        0.1,
        rtol=1e-6,
    )
