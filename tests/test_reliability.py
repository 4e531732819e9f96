"""Runs that are killed, disks that are full, numbers that are not finite, collapses."""

import errno
import os
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Brightness, conv

import sddns_tf
from sddns_tf import image_ops
from sddns_tf.callbacks import Checkpoint, CollapseMonitor, NotFinite
from sddns_tf.callbacks import training_state as checkpoint

STEPS_PER_EPOCH, EPOCHS, BATCH = 7, 3, 4


def make_model(dropout=0.1, learning_rate=None, **kwargs):
    keras.utils.set_random_seed(0)
    schedules = sddns_tf.schedules
    arguments = {
        "views": Brightness(8),
        "negatives": sddns_tf.Negatives("rot90", source="in_distribution"),
        "negative_weight": schedules.Linear(0.0, 1.0, end_step=20),
        "teacher_momentum": schedules.Linear(0.9, 1.0, end_step=21),
        **kwargs,
    }
    model = sddns_tf.SelfDistillation(
        conv(8, dropout),
        head=sddns_tf.ProjectionHead(16, hidden_dim=8, bottleneck_dim=4),
        **arguments,
    )
    rate = learning_rate or schedules.WarmupCosine(1e-2, 1e-4, 21, 3)
    model.compile(keras.optimizers.Adam(rate), jit_compile=False)
    return model


def make_images(count=30):
    return np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)


def train(folder, every=2):
    """As a user's script does it: the same command starts a run and goes on with it."""
    model = make_model()
    kept = Checkpoint(folder, every=every)
    step = kept.restore(model)
    for first, part in checkpoint.parts_left(step, STEPS_PER_EPOCH, EPOCHS):
        batches = sddns_tf.data.load(
            make_images(), batch_size=BATCH, shuffle=True, seed=1, first_batch=first
        )
        model.fit(batches, callbacks=[kept], verbose=0, **part)
    return model


def state(model):
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


class Slow:
    """A file that gets its bytes in small pieces, so that a kill often meets a half of it."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        written = self._file.write(data)
        self._file.flush()
        time.sleep(2e-4)
        return written

    def __getattr__(self, name):
        return getattr(self._file, name)


def run_slowly(folder, result, every=2):
    """Train, write states slowly, and keep what training has made."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Tests in the background ignore it.
    savez = np.savez
    checkpoint.np.savez = lambda file, **arrays: savez(Slow(file), **arrays)
    print("ready", flush=True)
    model = train(folder, every)
    savez(result, *state(model))


def wait_for(condition, process, seconds=120):
    limit = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)


def finish(process):
    assert process.wait(240) == 0, process.errors[-3000:]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return state(train(tmp_path_factory.mktemp("unbroken")))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(fork, tmp_path, unbroken):
    """SIGKILL three times: while a state is being written, and at two random moments."""
    folder, result = tmp_path / "run", tmp_path / "result.npz"
    generator = np.random.default_rng(0)
    half_written = 0
    for kill in range(3):
        before = {path.name for path in checkpoint.saved(folder)}
        process = fork(run_slowly, folder, result)
        wait_for(lambda process=process: process.out, process)

        def news(before=before):
            return {path.name for path in checkpoint.saved(folder)} - before

        if kill == 0:  # in the middle of the very first file
            wait_for(lambda: [*folder.glob(".*.step-*.npz")], process)
        else:
            wait_for(news, process)
            time.sleep(generator.uniform(0.0, 0.5))
        process.kill()
        half_written += bool([*folder.glob(".*.step-*.npz")])
    assert half_written
    process = fork(run_slowly, folder, result)
    finish(process)
    assert not [*folder.glob(".*.step-*.npz")]
    ended = np.load(result)
    for old, name in zip(unbroken, ended.files, strict=True):
        np.testing.assert_array_equal(old, ended[name])


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(fork, tmp_path, unbroken):
    folder, result = tmp_path / "run", tmp_path / "result.npz"
    process = fork(run_slowly, folder, result)
    wait_for(lambda: len(checkpoint.saved(folder)) > 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert not result.exists()
    for old, new in zip(unbroken, state(train(folder)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_from_there(fork, tmp_path, unbroken):
    folder, result = tmp_path / "run", tmp_path / "result.npz"
    process = fork(run_slowly, folder, result, 1_000)
    wait_for(lambda: checkpoint.saved(folder), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 1
    assert process.errors.endswith("KeyboardInterrupt\n")
    stopped = int(checkpoint.saved(folder)[-1].stem.removeprefix("step-"))
    assert 0 < stopped < STEPS_PER_EPOCH * EPOCHS
    assert f"SIGINT: saved step {stopped}" in process.errors
    for old, new in zip(unbroken, state(train(folder)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_state_is_written_after_ten_minutes_however_few_the_steps(tmp_path, monkeypatch):
    kept, now = Checkpoint(tmp_path, every=1_000), iter(range(0, 10**6, 250))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    kept.set_model(make_model())
    kept.save()  # at 0 s
    written = []
    for batch in range(6):
        kept.model.step.assign(batch + 1)
        kept.on_train_batch_begin(batch)
        kept.on_train_batch_end(batch)
        written.append(checkpoint.saved(tmp_path)[-1].stem)
    # 250 and 500 s have passed after two steps, 750 after the third.
    assert written[:3] == ["step-00000000", "step-00000000", "step-00000003"]
    assert len(set(written)) == 3


@pytest.fixture
def on_ctrl_c():
    """A function that says what Ctrl-C does, which stays so for this test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(tmp_path, on_ctrl_c):
    on_ctrl_c(signal.default_int_handler)
    kept = Checkpoint(tmp_path)
    kept.set_model(make_model())
    kept.on_train_begin()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        kept.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_in_the_background_still_ignores_ctrl_c(tmp_path, on_ctrl_c):
    on_ctrl_c(signal.SIG_IGN)
    kept = Checkpoint(tmp_path)
    kept.set_model(make_model())
    kept.on_train_begin()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    kept.release()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


class Stop(keras.callbacks.Callback):
    """Ends a run as a crash would, after so many steps."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.step) == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [7, 12])
def test_every_step_is_a_place_to_go_on_from(tmp_path, unbroken, after):
    model = make_model()
    kept = Checkpoint(tmp_path, every=1)
    batches = sddns_tf.data.load(
        make_images(), batch_size=BATCH, shuffle=True, seed=1, first_batch=0
    )
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            batches,
            epochs=EPOCHS,
            steps_per_epoch=STEPS_PER_EPOCH,
            callbacks=[kept, Stop(after)],
            verbose=0,
        )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert kept.last().name == f"step-{after:08d}.npz"
    for old, new in zip(unbroken, state(train(tmp_path)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_parts_left_are_all_of_the_run():
    for step in range(12):
        parts = checkpoint.parts_left(step, 3, epochs=4)
        count = sum(p["steps_per_epoch"] * (p["epochs"] - p["initial_epoch"]) for _, p in parts)
        assert count == 12 - step
        assert parts[0][0] == step
    assert checkpoint.parts_left(12, 3, epochs=4) == []


def test_endless_batches_begin_anywhere(tmp_path):
    def take(first, count):
        batches = sddns_tf.data.load(
            make_images(10), batch_size=4, shuffle=True, seed=3, first_batch=first
        )
        return [batch.numpy() for batch in batches.take(count)]

    unbroken = take(0, 9)
    for first in (0, 1, 2, 5):
        for old, new in zip(unbroken[first:], take(first, 9 - first), strict=True):
            np.testing.assert_array_equal(old, new)
    # Each image once in each epoch, in an order of its own.
    seen = np.concatenate(unbroken).reshape(36, -1)[:30]
    epochs = [sorted(map(bytes, seen[i : i + 10])) for i in (0, 10, 20)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(set(epochs[0])) == 10
    assert (seen[:10] != seen[10:20]).any()


# --- Disks -------------------------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(file, **arrays):
    file.write(b"PK")
    no_space()


def test_a_write_that_fails_halfway_leaves_the_previous_state(tmp_path, monkeypatch):
    model = make_model()
    good = checkpoint.save(model, tmp_path)
    before = good.read_bytes()
    model.step.assign(5)
    for target, name, broken in (
        (np, "savez", half_a_file),
        (os, "fsync", no_space),
        (os, "replace", no_space),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            with pytest.raises(OSError, match=f"cannot be written to {tmp_path}: .*No space left"):
                checkpoint.save(model, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [good.name]
        assert good.read_bytes() == before


def steps_of_a_run_that_fails(folder, message):
    steps = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(1))
    with pytest.raises(OSError, match=message):
        make_model().fit(
            make_images(8), batch_size=4, callbacks=[count, Checkpoint(folder)], verbose=0
        )
    return len(steps)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "run"
    assert steps_of_a_run_that_fails(folder, f"cannot be written to {folder}") == 0


def test_a_disk_without_room_is_found_before_the_first_step(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert steps_of_a_run_that_fails(tmp_path, f"{tmp_path} needs room") == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_state_is_passed_over(tmp_path, damage, caplog):
    model = make_model()
    checkpoint.save(model, tmp_path)
    expected = state(model)
    for variable in model.weights:
        variable.assign(variable + 1)
    newest = checkpoint.save(model, tmp_path)
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        data[data.find(model.teacher_head.weights[0].numpy().tobytes()) + 9] ^= 1
    newest.write_bytes({"cut": data[:-99], "flipped": data, "empty": b""}[damage])
    assert checkpoint.restore(model, tmp_path).name == "step-00000000.npz"
    assert str(newest) in caplog.text
    for old, new in zip(expected, state(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_run_in_the_folder_of_a_longer_one_is_refused_and_removes_nothing(tmp_path):
    """Its states would be passed over for the other's."""
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"no states of later steps.*a model that has done 0 steps"
    ):
        make_model().fit(make_images(), callbacks=[Checkpoint(tmp_path)], verbose=0)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    kept = Checkpoint(tmp_path)
    kept.restore(make_model())
    with pytest.raises(ValueError, match="no states of later steps"):  # of another model
        make_model().fit(make_images(), callbacks=[kept], verbose=0)
    first = checkpoint.save(make_model(), tmp_path, keep=1)
    assert first.exists() and set(tmp_path.iterdir()) == {first, *before}


def test_the_state_just_written_is_kept_beside_a_damaged_later_one(tmp_path):
    train(tmp_path, every=1)
    older, newest = checkpoint.saved(tmp_path)
    newest.write_bytes(b"")
    model, kept = make_model(), Checkpoint(tmp_path, keep=1)
    assert f"step-{kept.restore(model):08d}" == older.stem
    kept.set_model(model)
    assert kept.save() == older and older.exists()
    assert checkpoint.restore(make_model(), tmp_path) == older
    model.fit(make_images(4), batch_size=4, callbacks=[kept], verbose=0)
    assert checkpoint.restore(make_model(), tmp_path) == newest  # written again


def test_a_state_of_another_model_is_refused(tmp_path):
    checkpoint.save(make_model(), tmp_path)
    other = make_model(dropout=0.0)
    other.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"step-00000000\.npz must be the training state of"):
        checkpoint.restore(other, tmp_path)


# --- Numbers that are not finite -----------------------------------------------------------------


class Poison(keras.callbacks.Callback):
    """Makes one weight infinite before a step, the first time or always."""

    def __init__(self, step, always=False):
        super().__init__()
        self.step, self.always, self.done = step, always, False

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.step) == self.step and not (self.done and not self.always):
            self.done = True
            kernel = self.model.student_head.last_layer.kernel
            kernel.assign(tf.fill(kernel.shape, np.inf))


def fit_poisoned(model, callbacks):
    images = np.tile(make_images(32), (2, 1, 1, 1))
    model.fit(images, batch_size=4, callbacks=callbacks, verbose=0)


def test_training_stops_at_the_step_that_is_not_finite(tmp_path):
    model = make_model(learning_rate=0.004)
    kept = Checkpoint(tmp_path, every=3)
    with pytest.raises(RuntimeError) as caught:
        fit_poisoned(model, [Poison(7), NotFinite(kept), kept])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = str(caught.value)
    assert "Not finite at step 8, learning rate 0.004" in said
    assert "first positive_loss (logged)" in said
    assert f"Last good state: {tmp_path / 'step-00000006.npz'}" in said


def test_the_weight_that_is_not_finite_is_named():
    model = make_model()
    watch = NotFinite()
    watch.set_model(model)
    watch.on_train_begin()
    logs = {"positive_loss": 1.0, "negative_loss": 1.0, "loss": 2.0, "learning_rate": 0.1}
    watch.on_train_batch_end(0, logs)
    bias = model.teacher_head.weights[1]
    bias.assign(tf.fill(bias.shape, np.nan))
    with pytest.raises(RuntimeError, match=f"first {bias.path}; 1 of"):
        watch.on_train_batch_end(1, logs)


@pytest.mark.parametrize("scheduled", [False, True])
def test_rolling_back_goes_on_at_half_the_learning_rate(tmp_path, scheduled, caplog):
    rate = keras.optimizers.schedules.ExponentialDecay(0.004, 1, 1.0) if scheduled else 0.004
    model = make_model(learning_rate=rate)
    kept = Checkpoint(tmp_path, every=3)
    fit_poisoned(model, [Poison(7), NotFinite(kept, rollbacks=1), kept])
    assert "Continuing from step 6 at half the learning rate" in caplog.text
    assert float(model.optimizer.learning_rate) == pytest.approx(0.002)
    assert int(model.step) == 16 - 2
    assert all(np.isfinite(value).all() for value in state(model))
    again = make_model(learning_rate=rate)
    assert kept.restore(again) == 14
    assert float(again.optimizer.learning_rate) == pytest.approx(0.002)


@pytest.mark.parametrize("scheduled", [False, True])
def test_two_machines_that_roll_back_halve_the_learning_rate_alike(tmp_path, scheduled):
    # The second one reads the state that the first one has halved and written back.
    rate = keras.optimizers.schedules.ExponentialDecay(0.004, 1, 1.0) if scheduled else 0.004
    models = [make_model(learning_rate=rate) for _ in range(2)]
    logs = {"positive_loss": np.nan, "negative_loss": 1.0, "loss": 2.0, "learning_rate": 0.004}
    for model in models:
        kept = Checkpoint(tmp_path)
        kept.set_model(model)
        if model is models[0]:
            kept.save()
        watch = NotFinite(kept, rollbacks=1)
        watch.set_model(model)
        watch.on_train_begin()
        watch.on_train_batch_end(0, logs)
    for model in models:
        assert float(model.optimizer.learning_rate) == pytest.approx(0.002)


def test_a_state_holds_what_an_adapted_layer_has_learned(tmp_path):
    def made(mean):
        normalization = keras.layers.Normalization()
        normalization.adapt(np.float32([[mean], [mean + 2.0]]) * np.ones((1, 3), np.float32))
        pooled = keras.layers.GlobalAveragePooling2D()
        layers = [normalization, keras.layers.Conv2D(4, 3), pooled]
        model = sddns_tf.SelfDistillation(
            keras.Sequential([keras.Input((None, None, 3)), *layers]),
            sddns_tf.MultiCrop(16, local_views=0),
            head=sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4),
        )
        model.compile("adam")
        return model

    model, fresh = made(5.0), made(0.0)
    checkpoint.save(model, tmp_path)
    assert checkpoint.restore(fresh, tmp_path)
    images = make_images(8)
    np.testing.assert_array_equal(fresh(images), model(images))


def test_rolling_back_ends_after_so_many_times(tmp_path):
    model = make_model(learning_rate=0.004)
    kept = Checkpoint(tmp_path, every=3)
    with pytest.raises(RuntimeError, match=r"learning rate 0\.001: first"):
        fit_poisoned(model, [Poison(7, always=True), NotFinite(kept, rollbacks=2), kept])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_rolling_back_needs_a_learning_rate_that_can_be_scaled(tmp_path):
    model = make_model(learning_rate=lambda: 0.004)
    kept = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"must be a number or .* Received: <function"):
        fit_poisoned(model, [NotFinite(kept, rollbacks=1), kept])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_the_states_of_a_run_stay_when_early_stopping_goes_back(tmp_path, caplog):
    model, kept = make_model(), Checkpoint(tmp_path, every=1)
    # Nothing is ever better than the first epoch.
    stop = keras.callbacks.EarlyStopping(
        "loss", min_delta=1e9, patience=1, mode="min", restore_best_weights=True
    )
    model.fit(make_images(8), batch_size=4, epochs=5, callbacks=[stop, kept], verbose=0)
    assert int(model.step) == 2 and kept.last().name == "step-00000004.npz"
    assert "The model went back to step 2 when training ended" in caplog.text


def test_a_folder_may_be_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = Checkpoint("~/run")
    make_model().fit(make_images(8), batch_size=4, callbacks=[kept], verbose=0)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == [
        "step-00000000.npz",
        "step-00000002.npz",
    ]


@pytest.mark.parametrize(
    ("task", "jobs", "writes"),
    [
        (("chief", 0), ["chief", "worker"], True),
        (("worker", 0), ["chief", "worker"], False),
        (("worker", 0), ["worker"], True),
        (("worker", 1), ["worker"], False),
    ],
)
def test_one_of_several_machines_writes_states(task, jobs, writes, tmp_path, monkeypatch):
    from types import SimpleNamespace

    model, kept = make_model(), Checkpoint(tmp_path)
    spec = SimpleNamespace(jobs=jobs)
    resolver = SimpleNamespace(task_type=task[0], task_id=task[1], cluster_spec=lambda: spec)
    model._distribute_strategy = SimpleNamespace(cluster_resolver=resolver)
    kept.set_model(model)
    assert (kept.save() is not None) == writes


def test_rolling_back_needs_a_checkpoint():
    with pytest.raises(ValueError, match="Rolling back needs `checkpoint`"):
        NotFinite(rollbacks=1)
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-3))
    with pytest.raises(ValueError, match=r"among the callbacks of `fit`.*Received: rollbacks=1"):
        model.fit(np.zeros((8, 16, 16, 3), np.uint8), callbacks=[NotFinite(Checkpoint("f"), 1)])


@pytest.mark.parametrize("callback", [Checkpoint("folder", 7, 3), NotFinite(Checkpoint("f"), 2)])
def test_callbacks_survive_serialization(callback):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(callback))
    assert copy.get_config() == callback.get_config()


# --- Collapse ------------------------------------------------------------------------------------


class CollapseAt(keras.callbacks.Callback):
    """When the teacher's outputs first look collapsed, by the entropies of single steps."""

    def __init__(self, name, limit, above):
        super().__init__()
        self.name, self.limit, self.above, self.step = name, limit, above, None

    def on_epoch_end(self, epoch, logs=None):
        """An epoch is one step, so that the logged mean is that step's."""
        over = logs[self.name] > self.limit if self.above else logs[self.name] < self.limit
        if self.step is None and over:
            self.step = epoch + 1


def provoke(steps, monitor, callbacks=(), **kwargs):
    images = np.linspace(0, 255, 16)[:, np.newaxis] * np.ones((32, 1, 16))
    tint = np.random.default_rng(0).uniform(0.2, 1, (32, 1, 1, 3))
    images = (images[..., np.newaxis] * tint).astype(np.uint8)
    model = make_model(
        dropout=0.0, learning_rate=5e-3, negatives=None, teacher_momentum=0.9, **kwargs
    )
    batches = tf.data.Dataset.from_tensor_slices(images).batch(32, drop_remainder=True).repeat()
    model.fit(batches, epochs=steps, steps_per_epoch=1, callbacks=[*callbacks, monitor], verbose=0)
    return int(model.step)


@pytest.mark.parametrize(
    ("collapse", "kwargs", "at"),
    [
        ("constant features", {"teacher_temperature": 0.3}, ("teacher_entropy", 0.995, True)),
        (
            "one prototype",
            {"teacher_temperature": 0.04, "center_momentum": 1.0},
            ("mean_output_entropy", 0.02, False),
        ),
    ],
)
def test_a_provoked_collapse_is_caught_within_200_steps(collapse, kwargs, at):
    monitor, began = CollapseMonitor(window=1, patience=100, stop_training=True), CollapseAt(*at)
    stopped = provoke(1500, monitor, [began], **kwargs)
    assert monitor.collapse == collapse
    assert stopped - began.step < 200


def test_a_healthy_run_of_the_same_length_is_not_accused():
    monitor = CollapseMonitor(window=1, patience=100, stop_training=True)
    assert provoke(600, monitor) == 600
    assert monitor.collapse is None


# --- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_features_of_mixed_precision_are_those_of_float32(policy, photos):
    """The same weights, trained a little, in either precision."""
    keras.utils.set_random_seed(0)
    sizes = {"hidden_dim": 32, "depth": 3, "num_heads": 2}
    mixed = sddns_tf.VisionTransformer(16, 4, dtype=policy, **sizes)
    head = sddns_tf.ProjectionHead(32, hidden_dim=32, bottleneck_dim=16, dtype=policy)
    model = sddns_tf.SelfDistillation(mixed, Brightness(16), head=head, teacher_momentum=0.5)
    optimizer = keras.optimizers.Adam(1e-3)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer)
    losses = model.fit(photos, batch_size=8, epochs=10, callbacks=[NotFinite()], verbose=0).history[
        "loss"
    ]
    assert np.isfinite(losses).all()
    plain = sddns_tf.VisionTransformer(16, 4, **sizes)
    plain.build((None, 16, 16, 3))
    plain.set_weights(model.teacher_backbone.get_weights())
    images = image_ops.resize(photos, 16, 16)
    exact = plain(image_ops.normalize(images)).numpy()
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    features = model.predict(photos, verbose=0)
    assert features.dtype == np.float32
    assert 0 < np.abs(features - exact).max() < 2e-2
