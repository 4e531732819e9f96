"""Several replicas and several processes equal one device; traps on the way there."""

import functools
import json
import socket

import keras
import numpy as np
import pytest
import tensorflow as tf
from forks import divide_the_cpu
from tiny import Brightness, conv

import sddns_tf

STEPS, BATCH = 20, 8


def make_model(backbone=None, **kwargs):
    keras.utils.set_random_seed(0)
    arguments = {
        "views": Brightness(8, local_size=4),
        "negatives": sddns_tf.Negatives("perm4", source="both"),
        "weight_decay": 0.1,
        "gradient_clip_norm": 0.05,
        "frozen_last_layer_steps": 2,
        **kwargs,
    }
    model = sddns_tf.SelfDistillation(
        conv(8) if backbone is None else backbone(),
        head=sddns_tf.ProjectionHead(16, hidden_dim=8, bottleneck_dim=4),
        **arguments,
    )
    # SGD with momentum: its step is in proportion to the gradient, so that a wrong scale shows.
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    return model


def batches(steps=STEPS, batch=BATCH):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, steps * batch, 12, 12, 3), dtype=np.uint8)
    both = {"images": images[0], "auxiliary": images[1]}
    dataset = tf.data.Dataset.from_tensor_slices(both).batch(batch, drop_remainder=True)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options)


def onset(positive_loss, num_prototypes):
    """A weight of negatives that follows the whole batch's loss from the first step on."""
    return tf.stop_gradient(positive_loss) / num_prototypes


class Record(keras.callbacks.Callback):
    """What is logged after each step."""

    def on_train_begin(self, logs=None):
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({name: float(value) for name, value in logs.items()})


def state(model, record):
    """Everything that training has made: weights, optimizer slots and logs."""
    parts = {
        "student": [*model.student_backbone.weights, *model.student_head.weights],
        "teacher": [*model.teacher_backbone.weights, *model.teacher_head.weights],
        "optimizer": model.optimizer.variables,
        "center": [model.center],
    }
    found = {f"{part} {i}": v.numpy() for part, vs in parts.items() for i, v in enumerate(vs)}
    for name in record.logs[0]:
        found[f"log of {name}"] = np.array([log[name] for log in record.logs])
    return found


def uneven_batches():
    """Batches of 8, 5, 8 and 1 images: on two replicas the last leaves one of them without any."""
    whole = batches(4).unbatch()
    parts = [whole.skip(8 * i).take(size).batch(8) for i, size in enumerate((8, 5, 8, 1))]
    return parts[0].concatenate(parts[1]).concatenate(parts[2]).concatenate(parts[3])


def train(strategy, steps=STEPS, data=None, **arguments):
    record = Record()
    with strategy.scope():
        model = make_model(**arguments)
    data = batches(steps) if data is None else data
    found = model.fit(data, validation_data=data if steps == 0 else None, verbose=0,
                      callbacks=[record])  # fmt: skip
    values = state(model, record)
    if steps == 0:
        values |= {name: np.array(v) for name, v in found.history.items() if "val_" in name}
    return model, values


def real_networks():
    """What a user trains, small: a vision transformer, and multi-crop views with local ones."""
    return {
        "backbone": lambda: sddns_tf.VisionTransformer(8, 4, hidden_dim=8, depth=1, num_heads=2),
        "views": sddns_tf.MultiCrop(8, local_views=2, local_size=4),
        "negative_weight": 1.0,
    }


def batch_norm_model():
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(4, 3, 2, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model = sddns_tf.SelfDistillation(
        backbone,
        Brightness(8),
        sddns_tf.Negatives("rot90", "in_distribution"),
        sddns_tf.ProjectionHead(16, hidden_dim=8, bottleneck_dim=4),
        negative_weight=1.0,
    )
    model.compile(keras.optimizers.Adam(1e-2))
    return model


def resumed(strategy, folder):
    """Largest difference of a run that goes on from its checkpoint to one that was not stopped."""
    images = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), np.uint8)

    def run(name, epochs):
        with strategy.scope():
            model = batch_norm_model()
        checkpoint = sddns_tf.callbacks.Checkpoint(f"{folder}/{name}", 1)
        watching = [sddns_tf.callbacks.CollapseMonitor(),
                    sddns_tf.callbacks.NotFinite(checkpoint), checkpoint]  # fmt: skip
        done = checkpoint.restore(model) // 2
        model.fit(images, batch_size=8, shuffle=False, initial_epoch=done, epochs=epochs,
                  verbose=0, callbacks=watching)  # fmt: skip
        return model

    unbroken = run("unbroken", 2)
    run("stopped", 1)
    stopped = run("stopped", 2)
    pairs = zip(unbroken.weights, stopped.weights, strict=True)
    return max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in pairs)


def differences(one, other):
    """Largest difference of each thing, relative to its largest value."""
    assert one.keys() == other.keys()
    # A bias before features are standardized has no gradient but rounding: it stays near 0.
    return {
        name: np.abs(value - other[name]).max() / max(np.abs(value).max(), 1e-2)
        for name, value in one.items()
    }


def finish(process):
    """Wait for a process; what it printed, if it ended well."""
    assert process.wait() == 0, process.errors[-4000:]
    return process.out


def assert_copies_are_equal(strategy, variables, count):
    for variable in variables:
        copies = strategy.experimental_local_results(variable.value)
        assert len(copies) == count
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0], err_msg=variable.path)


def message(call):
    """What a call's error says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def print_replicas(count):
    """Differences of a run on so many replicas to one device, and what mistakes are told."""
    divide_the_cpu(4)
    sddns_tf.losses.negative_onset = onset
    arguments = {}
    if count == 2:
        crops = sddns_tf.MultiCrop(8, local_views=0)
        arguments = {**sddns_tf.SelfDistillation.PAPER, "views": crops}
    _, one = train(tf.distribute.get_strategy(), **arguments)
    # Collective operations allow one group of devices in a process.
    reduction = tf.distribute.ReductionToOneDevice() if count == 4 else None
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)], reduction)
    model, several = train(strategy, **arguments)
    print(json.dumps({name: float(v) for name, v in differences(one, several).items()}))
    assert_copies_are_equal(strategy, [*model.weights, *model.optimizer.variables], count)

    outside = sddns_tf.VisionTransformer(8, 4, hidden_dim=8, depth=1, num_heads=2)
    with strategy.scope():
        views = sddns_tf.MultiCrop(8, local_views=0)
        print(message(lambda: sddns_tf.SelfDistillation(outside, views)))
    model = make_model()
    with strategy.scope():
        print(message(lambda: model.compile("sgd")))
        print(message(lambda: model.fit(np.zeros((8, 12, 12, 3), np.uint8))))
        print(message(lambda: make_model().compile("sgd", jit_compile="auto")))
        print(make_model().jit_compile)
        model = make_model()
        sgd = keras.optimizers.SGD
        print(message(lambda: model.compile(sgd(gradient_accumulation_steps=2))))
        print(message(lambda: model.compile(sgd(use_ema=True, ema_overwrite_frequency=2))))
    for call in (model.train_on_batch, model.test_on_batch):
        print(message(lambda: call(np.zeros((8, 12, 12, 3), np.uint8))))  # noqa: B023


@pytest.fixture(scope="module")
def replicas(fork):
    """A function that gives what `print_replicas` found, and what mistakes were told."""

    @functools.cache
    def replicas(count):
        lines = finish(fork(print_replicas, count)).splitlines()[-10:]
        return json.loads(lines[0]), lines[1:]

    return replicas


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_equal_one_device(replicas, count):
    """Student, teacher, center, slots and all logs after 20 steps, to float32 round-off."""
    found, _ = replicas(count)
    for part in ("student", "teacher", "optimizer", "center", "log of loss", "log of feature_std"):
        assert any(name.startswith(part) for name in found)
    # A slot holds gradients, which amplify the rounding of the weights; a wrong scale is 1 or more.
    allowed = {name: 2e-3 if name.startswith("optimizer") else 2e-4 for name in found}
    if count == 4:  # Features are standardized: what this bias gets is the rounding of a machine.
        allowed |= {"student 3": 1e-3, "teacher 3": 1e-3}
    wrong = {name: value for name, value in found.items() if value > allowed[name]}
    assert not wrong


def print_uneven(folder):
    """Differences of uneven batches on two replicas to one device, and of a run that resumes."""
    divide_the_cpu(2)
    sddns_tf.losses.negative_onset = onset
    # Two strategies in one process: their collectives must not be taken for each other's.
    first, second = (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) for _ in range(2))
    _, one = train(tf.distribute.get_strategy(), 0, uneven_batches())
    _, two = train(first, 0, uneven_batches())
    print(json.dumps({name: float(v) for name, v in differences(one, two).items()}))
    with second.scope():
        model = batch_norm_model()
    with pytest.warns(UserWarning, match="Received: a batch of 8 images"):
        model.fit(uneven_batches().map(lambda both: both["images"]), verbose=0)
    assert_copies_are_equal(second, model.weights, 2)
    for variable in model.weights:
        assert np.isfinite(variable.numpy()).all(), variable.path
    print(resumed(second, folder))


@pytest.fixture(scope="module")
def uneven(fork, tmp_path_factory):
    process = fork(print_uneven, tmp_path_factory.mktemp("run"))
    differences, resumed = finish(process).splitlines()[-2:]
    return json.loads(differences), float(resumed)


@pytest.mark.slow
def test_uneven_batches_on_two_replicas_equal_one_device(uneven):
    found, _ = uneven
    assert {"val_loss", "center 0", "log of loss"} <= found.keys()
    # Features are standardized: the bias of the backbone's last layer has no gradient but rounding,
    # and stays near 0.
    rounding = {"student 3", "teacher 3"}
    wrong = {
        name: value
        for name, value in found.items()
        if not value <= (1e-4 if name in rounding else 2e-5)
    }
    assert not wrong


@pytest.mark.slow
def test_a_run_on_two_replicas_resumes_bit_for_bit(uneven):
    assert uneven[1] == 0.0


def test_what_was_built_outside_the_scope_is_named(replicas):
    _, (backbone, compiled, trained, inside, *_) = replicas(2)
    assert "must be built within the same `strategy.scope()`" in backbone
    assert "built outside of MirroredStrategy (2 replicas)" in backbone
    assert "built under" in compiled and "compiled under MirroredStrategy" in compiled
    assert "built under" in trained and "trained under MirroredStrategy" in trained
    assert inside == "nothing was raised"


def test_xla_stays_off_under_a_strategy(replicas):
    assert replicas(2)[1][4] == "False"


def test_what_keras_cannot_do_on_several_replicas_is_refused(replicas):
    accumulation, overwriting, train, test = replicas(2)[1][5:]
    assert "gradient_accumulation_steps=2, use_ema=False" in accumulation
    assert "use_ema=True, ema_overwrite_frequency=2" in overwriting
    assert "Use `fit` on several replicas" in train
    assert "Use `evaluate` on several replicas" in test
    assert "Received: MirroredStrategy (2 replicas)" in test


def save_what_a_worker_found(path):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    _, found = train(strategy, steps=2, **real_networks())
    np.savez(path, **found)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def print_synchronized():
    """A step with synchronized batch statistics on two replicas, and a plain one on one device."""
    divide_the_cpu(2)
    layers = keras.layers

    def backbone(**kwargs):
        return keras.Sequential(
            [
                keras.Input((None, None, 3)),
                layers.Conv2D(4, 3, 2),
                layers.BatchNormalization(**kwargs),
                layers.Dropout(0.5, seed=0),
                layers.GlobalAveragePooling2D(),
            ]
        )

    def teacher_after_a_step(strategy, **kwargs):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = make_model(lambda: backbone(**kwargs), views=Brightness(12), negatives=None)
            model.compile("sgd", run_eagerly=True)
        model.fit(batches(1).map(lambda both: both["images"]), verbose=0)
        inner = model.teacher_backbone.layers
        print(json.dumps([inner[1].momentum, inner[1].trainable, inner[2].rate]))
        return inner[1].moving_mean.numpy(), inner[1].moving_variance.numpy()

    one = teacher_after_a_step(tf.distribute.get_strategy())
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    two = teacher_after_a_step(mirrored, synchronized=True)
    print(max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True)))


@pytest.mark.slow
def test_synchronized_batch_statistics_follow_the_whole_batch(fork):
    """Replicas share the layers, and take turns in the middle of a network."""
    *_, one, two, difference = finish(fork(print_synchronized)).splitlines()
    assert json.loads(one) == json.loads(two) == [0.99, False, 0.5]
    assert float(difference) < 1e-5


@pytest.mark.slow
def test_two_processes_equal_one(fork, tmp_path):
    workers = [f"localhost:{port}" for port in free_ports(2)]
    files = [tmp_path / f"{index}.npz" for index in range(2)]
    processes = []
    for index, file in enumerate(files):
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        one = fork(save_what_a_worker_found, file, TF_CONFIG=json.dumps(task))
        processes.append(one)
    _, alone = train(tf.distribute.get_strategy(), steps=2, **real_networks())
    for process in processes:
        finish(process)
    first, second = ({name: found[name] for name in found} for found in map(np.load, files))
    assert max(differences(first, second).values()) == 0
    wrong = {name: value for name, value in differences(alone, first).items() if value > 2e-4}
    assert not wrong


@pytest.mark.parametrize("shift", (*sddns_tf.shifts.NAMES, "cut_paste"))
def test_draws_of_a_replica_are_those_of_its_part_of_the_batch(monkeypatch, shift):
    """A stand-in for the replica's context, so that no strategy is needed."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    shifted = sddns_tf.shifts.get(shift)

    class Context:
        num_replicas_in_sync = 3
        replica_id_in_sync_group = 1

    whole = shifted(tf.constant(images), [3, 4])
    monkeypatch.setattr(tf.distribute, "get_replica_context", Context)
    np.testing.assert_array_equal(shifted(tf.constant(images[2:4]), [3, 4]), whole[2:4])


def test_an_optimizer_that_accumulates_moves_teacher_and_decay_once():
    model = make_model(frozen_last_layer_steps=0, teacher_momentum=0.9)
    model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=3))
    images = next(iter(batches()))
    train_step = tf.function(model.train_step, autograph=False)
    for step in range(1, 7):
        before = [v.numpy() for v in model.weights]
        train_step(images)
        named = zip(model.weights, before, strict=True)
        moved = {v.path: bool((v.numpy() != old).any()) for v, old in named}
        networks = [m for path, m in moved.items() if "center" not in path and "step" not in path]
        assert any(networks) == (step % 3 == 0)
        assert int(model.step) == step
    assert int(model.optimizer.iterations) == 2


def test_batches_whose_gradients_overflow_move_neither_student_nor_teacher():
    """Loss scaling skips them, so that the batches accumulated are not every third."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(frozen_last_layer_steps=0, teacher_momentum=0.5, weight_decay=0.1)
        sgd = keras.optimizers.SGD(0.05, gradient_accumulation_steps=3)
        model.compile(keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**30))
    finally:
        keras.config.set_dtype_policy("float32")
    images = next(iter(batches()))
    train_step = tf.function(model.train_step, autograph=False)
    together = []
    for _ in range(40):
        parts = model.student_backbone, model.teacher_backbone
        before = [part.get_weights() for part in parts]
        train_step(images)
        moved = [
            any((a != b).any() for a, b in zip(old, part.get_weights(), strict=True))
            for old, part in zip(before, parts, strict=True)
        ]
        together.append(tuple(moved))
    assert set(together) == {(True, True), (False, False)}
    updates = int(sgd.iterations)
    assert together.count((True, True)) == updates
    assert updates < 40 // 3  # some batches were skipped, or nothing was tested


def test_compiling_anew_in_the_middle_of_an_accumulation_begins_another():
    model = make_model(frozen_last_layer_steps=0, teacher_momentum=0.5)
    images = next(iter(batches()))
    moved = []
    for steps in (2, 4):
        model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=3))
        train_step = tf.function(model.train_step, autograph=False)
        for _ in range(steps):
            before = model.teacher_backbone.get_weights()
            train_step(images)
            after = model.teacher_backbone.get_weights()
            moved.append(any((a != b).any() for a, b in zip(before, after, strict=True)))
    assert moved == [False, False, False, False, True, False]


@pytest.mark.parametrize("accumulated", [None, 4])
def test_small_batches_are_warned_of(accumulated):
    """Targets and center are of a batch, however many are accumulated for the gradient."""
    model = make_model()
    model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulated))
    images = next(iter(batches(1, 8)))
    with pytest.warns(UserWarning, match=r"at least 32 images.*Received: a batch of 8 images"):
        tf.function(model.train_step, autograph=False).get_concrete_function(images)


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_small_batches_of_unknown_size_are_warned_of_once(steps_per_execution, recwarn):
    model = make_model(negatives=None)
    model.compile("sgd", steps_per_execution=steps_per_execution)
    images = np.zeros((63, 12, 12, 3), np.uint8)
    for _ in range(2):
        model.fit(sddns_tf.data.load(images, batch_size=16), epochs=2, verbose=0)
    found = [str(w.message) for w in recwarn if "at least 32" in str(w.message)]
    assert len(found) == 1
    assert found[0].endswith("Received: a batch of 16 images")


def test_a_small_last_batch_is_not_warned_of(recwarn):
    make_model(negatives=None).fit(np.zeros((33, 12, 12, 3), np.uint8), verbose=0)
    assert not [w for w in recwarn if "at least 32" in str(w.message)]


def test_large_batches_are_not_warned_of(recwarn):
    step = tf.function(make_model().train_step, autograph=False)
    step.get_concrete_function(next(iter(batches(1, 32))))
    assert not [w for w in recwarn if "images" in str(w.message)]
