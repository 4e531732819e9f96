"""Schedules against their formulas, saving, and as Keras sees them."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from sddns_tf import schedules
from sddns_tf.schedules import Constant, GrowingMomentum, Linear, WarmupCosine

EXAMPLES = [
    Constant(0.3),
    Linear(0.04, 0.01, end_step=100),
    Linear(0.0, 1.0, start_step=30, end_step=60),
    WarmupCosine(0.04, 0.4, total_steps=100),
    WarmupCosine(2e-3, 1e-6, total_steps=100, warmup_steps=10),
    GrowingMomentum(0.9),
]
STEPS = (0, 1, 5, 10, 11, 45, 55, 99, 100, 101, 10**6)


def test_constant():
    assert [float(Constant(3)(step)) for step in STEPS] == [3.0] * len(STEPS)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.1), (8, 0.5), (90, 0.91), (2_240, 0.996), (10**6, 0.996)]
)
def test_growing_momentum(step, value):
    assert float(GrowingMomentum()(step)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 2.0), (300, 2.0), (375, 1.75), (450, 1.5), (600, 1.0), (9999, 1.0)]
)
def test_linear(step, value):
    ramp = Linear(2.0, 1.0, start_step=300, end_step=600)
    assert float(ramp(step)) == pytest.approx(value, rel=1e-6)


@given(
    start=st.floats(-2, 2),
    end=st.floats(-2, 2),
    start_step=st.integers(0, 50),
    length=st.integers(1, 100),
    step=st.integers(0, 200),
)
def test_linear_is_numpys_interpolation(start, end, start_step, length, step):
    ramp = Linear(start, end, start_step=start_step, end_step=start_step + length)
    expected = np.interp(step, [start_step, start_step + length], [start, end])
    assert float(ramp(step)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("step", [0, 5])
def test_a_change_of_no_length_is_done_at_its_step(step):
    jump = Linear(2.0, 1.0, start_step=step, end_step=step)
    assert [float(jump(step + there)) for there in (-1, 0, 1)] == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.996),
        (25, 1.0 - 0.002 * (1 + math.sqrt(0.5))),
        (50, 0.998),
        (75, 1.0 - 0.002 * (1 - math.sqrt(0.5))),
        (100, 1.0),
        (101, 1.0),
    ],
)
def test_cosine_of_the_teacher_momentum(step, value):
    momentum = WarmupCosine(0.996, 1.0, total_steps=100)
    assert float(momentum(step)) == pytest.approx(value, abs=2e-7)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.0),
        (1, 0.0002),
        (5, 0.001),
        (10, 0.002),
        (55, (0.002 + 1e-6) / 2),
        (100, 1e-6),
        (500, 1e-6),
    ],
)
def test_warmup_then_cosine(step, value):
    rate = WarmupCosine(2e-3, 1e-6, total_steps=100, warmup_steps=10)
    assert float(rate(step)) == pytest.approx(value, rel=1e-4, abs=1e-9)


def test_warmup_cosine_agrees_with_keras():
    ours = WarmupCosine(2e-3, 0.0, total_steps=100, warmup_steps=10)
    theirs = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=90, warmup_target=2e-3, warmup_steps=10
    )
    for step in STEPS[:-1]:
        assert float(ours(step)) == pytest.approx(float(theirs(step)), rel=1e-4, abs=1e-8)


def test_warmup_alone_ends_at_the_start_value():
    rate = WarmupCosine(1.0, 0.0, total_steps=10, warmup_steps=10)
    assert [float(rate(step)) for step in (5, 10, 11)] == pytest.approx([0.5, 1.0, 0.0])


@pytest.mark.parametrize("schedule", EXAMPLES)
def test_a_saved_schedule_has_the_same_values(schedule):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(schedule)
    assert restored.get_config() == schedule.get_config()
    assert [float(restored(s)) for s in STEPS] == [float(schedule(s)) for s in STEPS]
    assert [float(schedules.get(config)(s)) for s in STEPS] == [float(schedule(s)) for s in STEPS]


@pytest.mark.parametrize("schedule", EXAMPLES)
def test_schedules_trace_with_an_integer_step(schedule):
    traced = tf.function(schedule, input_signature=[tf.TensorSpec([], tf.int64)])
    for step in STEPS:
        value = traced(tf.constant(step, tf.int64))
        assert value.dtype == tf.float32
        assert value.shape == ()
        assert float(value) == pytest.approx(float(schedule(step)), rel=1e-6)


def test_schedules_are_learning_rates():
    schedule = Linear(1.0, 0.0, end_step=4)
    weight = keras.Variable(np.zeros((), np.float32))
    optimizer = keras.optimizers.SGD(schedule)
    positions = []
    for _ in range(6):
        optimizer.apply([tf.constant(-1.0)], [weight])
        positions.append(float(weight))
    assert positions == pytest.approx([1.0, 1.75, 2.25, 2.5, 2.5, 2.5])
    restored = keras.optimizers.get(keras.optimizers.serialize(optimizer))
    assert restored.get_config()["learning_rate"] == optimizer.get_config()["learning_rate"]


def test_get_takes_numbers_and_schedules():
    for number in (0.25, 1, np.float64(0.5)):
        schedule = schedules.get(number)
        assert isinstance(schedule, Constant)
        assert float(schedule(7)) == number
    assert schedules.get(EXAMPLES[1]) is EXAMPLES[1]
    keras_schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert schedules.get(keras_schedule) is keras_schedule


@pytest.mark.parametrize("value", [None, True, "cosine", [0.1], lambda step: 0.1])
def test_get_refuses_what_is_no_schedule(value):
    with pytest.raises(ValueError, match=r"Expected a number or a .*Schedule.* Received: "):
        schedules.get(value)


def test_impossible_steps_are_refused():
    with pytest.raises(ValueError, match=r"start_step=10, end_step=9"):
        Linear(0.0, 1.0, start_step=10, end_step=9)
    with pytest.raises(ValueError, match=r"warmup_steps=11, total_steps=10"):
        WarmupCosine(1.0, 0.0, total_steps=10, warmup_steps=11)
