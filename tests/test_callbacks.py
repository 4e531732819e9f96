"""`CollapseMonitor` on made-up logs and real collapses, `OODProbe` against a plain computation."""

import csv
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Brightness, conv

from sddns_tf import image_ops, metrics, shifts
from sddns_tf.callbacks import Checkpoint, CollapseMonitor, OODProbe
from sddns_tf.callbacks.pictures import TrainingPictures
from sddns_tf.heads import ProjectionHead
from sddns_tf.self_distillation import SelfDistillation
from sddns_tf.views import MultiCrop, Negatives
from sddns_tf.vit import VisionTransformer

LN_K = float(np.log(64))
HEALTHY = {
    "loss": 1.0,
    "positive_loss": 0.8 * LN_K,
    "negative_loss": 0.0,
    "teacher_entropy": 0.5,
    "mean_output_entropy": 0.7,
    "feature_std": 0.3,
    "teacher_spread": 0.1,
}


class Stub:
    """What the monitor asks of a model."""

    step = keras.Variable(7, dtype="int32")
    stop_training = False
    center = np.zeros(64)


def watch(monitor, steps, epoch_length=10**6):
    """Feed per-step values as Keras does: running means since the start of the epoch."""
    monitor.set_model(Stub())
    monitor.on_train_begin()
    values = np.array([[step[name] for name in HEALTHY] for step in steps])
    for start in range(0, len(values), epoch_length):
        epoch = values[start : start + epoch_length]
        means = np.cumsum(epoch, axis=0) / np.arange(1, len(epoch) + 1)[:, np.newaxis]
        monitor.on_epoch_begin(start // epoch_length)
        for batch, row in enumerate(means):
            logs = dict(zip(HEALTHY, row, strict=True))
            monitor.on_train_batch_end(batch, logs)
        monitor.on_epoch_end(start // epoch_length, logs)
    return monitor.model.stop_training


UNIFORM = {"teacher_entropy": 0.999, "mean_output_entropy": 0.999, "positive_loss": LN_K}


@pytest.mark.parametrize("epoch_length", [10**6, 25, 5])
@pytest.mark.parametrize(
    ("later", "collapse", "advice"),
    [
        # No negatives, so that only the center can have done it.
        (UNIFORM, "constant features", "the center cancels what"),
        # Negatives that the student still has an opinion on.
        ({**UNIFORM, "negative_loss": 1.1 * LN_K}, "constant features", "the center cancels what"),
        ({**UNIFORM, "negative_loss": LN_K}, "uniform by negatives", "lower `negative_weight`"),
        (
            {**UNIFORM, "negative_loss": LN_K, "feature_std": 0.1},
            "constant features",
            "standardizes features",
        ),
        # Balanced targets have an opinion whatever the student does.
        (
            {"positive_loss": LN_K, "negative_loss": LN_K},
            "uniform by negatives",
            "lower `negative_weight`",
        ),
        ({"positive_loss": 1.01 * LN_K, "negative_loss": 1.2 * LN_K}, None, "higher learning rate"),
        (
            {"teacher_entropy": 0.001, "mean_output_entropy": 0.001},
            "one prototype",
            "balances prototypes",
        ),
        ({"loss": float("nan")}, "not finite", "learning rate"),
        ({"teacher_entropy": 0.9, "mean_output_entropy": 0.95}, None, None),
        ({"teacher_entropy": 0.001, "mean_output_entropy": 0.6}, None, None),
    ],
)
def test_each_collapse_is_told_apart(caplog, later, collapse, advice, epoch_length):
    # Healthy steps first: a mean since the start of the epoch would hide what follows.
    monitor = CollapseMonitor(window=10, patience=3, stop_training=True)
    stopped = watch(monitor, [HEALTHY] * 200 + [{**HEALTHY, **later}] * 60, epoch_length)
    assert monitor.collapse == collapse
    assert stopped == (collapse is not None)
    printed = caplog.text
    assert printed.count("Collapse (") == (collapse is not None)
    assert advice is None or advice in printed
    assert printed.count("Not started") == (collapse is None and advice is not None)


def test_short_visits_to_the_edge_are_no_collapse():
    steps = ([{**HEALTHY, **UNIFORM}] * 20 + [HEALTHY] * 20) * 10
    monitor = CollapseMonitor(window=10, patience=3)
    watch(monitor, steps)
    assert monitor.collapse is None


def test_a_rollback_begins_the_windows_again():
    """Keras' running means begin again after it, and the windows with them."""
    monitor = CollapseMonitor(window=10, patience=1)
    monitor.set_model(Stub())
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    for batch in range(60):
        rolled_back = batch >= 35
        monitor.model.step = keras.Variable(batch - 5 * rolled_back, dtype="int32")
        bad = float("nan") if batch == 35 else 1.0
        monitor.on_train_batch_end(
            batch, {**HEALTHY, "loss": bad, "feature_std": 0.3 + 0.2 * rolled_back}
        )
        assert monitor._widest <= 0.5 + 1e-9
    assert monitor.collapse is None


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    shades = np.linspace(0, 255, 16)[:, np.newaxis]
    ramp = np.tile(shades, (64, 1, 16))[..., np.newaxis] * generator.uniform(0.2, 1, (64, 1, 1, 3))
    return ramp.astype(np.uint8)


def make_model(backbone=conv, views=None, **kwargs):
    keras.utils.set_random_seed(1)
    return SelfDistillation(
        backbone(),
        views or Brightness(16),
        head=ProjectionHead(32, hidden_dim=32, bottleneck_dim=8),
        **kwargs,
    )


def test_uniform_collapse_of_a_real_run_is_caught(images):
    """A teacher no sharper than the student has nothing to hold on to."""
    model = make_model(teacher_temperature=0.3, teacher_momentum=0.9)
    model.compile(keras.optimizers.Adam(5e-3))
    monitor = CollapseMonitor(window=10, patience=2, stop_training=True)
    model.fit(images, batch_size=16, epochs=60, callbacks=[monitor], verbose=0)
    assert monitor.collapse == "constant features"
    assert int(model.step) < 240


def test_uniform_collapse_by_negatives_of_a_real_run_is_caught(images):
    """Negatives that are the images themselves leave the student nothing to say."""
    size = {"patch_size": 8, "hidden_dim": 16, "depth": 1, "num_heads": 2}
    model = make_model(
        backbone=lambda: VisionTransformer(16, **size),
        views=MultiCrop(16, local_views=0),
        negatives=Negatives(lambda batch, seed: batch, source="in_distribution"),
        negative_weight=20.0,
    )
    model.compile(keras.optimizers.Adam(5e-3))
    monitor = CollapseMonitor(window=10, patience=2, stop_training=True)
    model.fit(images, batch_size=16, epochs=60, callbacks=[monitor], verbose=0)
    assert monitor.collapse == "uniform by negatives"
    assert int(model.step) < 240


@pytest.mark.parametrize("teacher_temperature", [None, 0.04])
def test_probe_writes_the_aurocs_of_the_teacher_into_the_history(
    images, tmp_path, teacher_temperature
):
    noise = np.random.default_rng(2).integers(0, 256, (24, 20, 20, 3), np.uint8)
    probe = OODProbe(
        images[:32], images[32:], shifts=("rot90", upside_down), ood={"noise": noise}, every=2
    )
    log = tmp_path / "log.csv"
    model = make_model(teacher_temperature=teacher_temperature)
    model.compile(keras.optimizers.Adam(1e-3))
    history = model.fit(
        images[:32],
        batch_size=16,
        epochs=3,
        callbacks=[probe, keras.callbacks.CSVLogger(log)],
        verbose=0,
    ).history
    assert len(history["auroc_noise"]) == len(history["auroc_rot90"]) == 2

    def features(batch):
        resized = image_ops.resize(image_ops.resize(batch, 16, 16), 16, 16)
        raw = model.teacher_backbone(image_ops.normalize(resized), training=False).numpy()
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def scores(batch):
        rows, known = features(batch), features(images[:32])
        if teacher_temperature is None:  # As the head saw them.
            rows, known = ((x - known.mean(axis=0)) / known.std(axis=0) for x in (rows, known))
            squares = np.square(rows[:, np.newaxis] - known).mean(axis=-1)
            return -np.log(np.mean(np.exp((0.9 - squares / 2) / 0.04), axis=1))
        cosines = rows @ known.T
        return -np.log(np.mean(np.exp((cosines - 0.1) / 0.04), axis=1))

    normal = scores(images[32:])
    turned = shifts.get("rot90")(tf.constant(images[32:]), [0, 0])
    for name, ood in (
        ("noise", noise),
        ("rot90", turned),
        ("upside_down", images[32:, ::-1]),
    ):
        expected = metrics.ood_metrics(normal, scores(ood))["auroc"]
        assert history[f"auroc_{name}"][-1] == pytest.approx(expected, abs=2e-3)
    assert "auroc_rot90" in log.read_text().splitlines()[0]


def upside_down(batch, seed):
    del seed
    return tf.reverse(batch, [1])


def test_sigterm_is_given_back_when_fit_fails(images, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("in the middle of an epoch")

    model = make_model()
    model.compile("adam")
    for watching in ([Checkpoint(tmp_path, 1), Fails()], [Checkpoint(tmp_path, 1)]):
        try:
            model.fit(images, batch_size=16, verbose=0, callbacks=watching)
        except RuntimeError:
            assert len(watching) == 2
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_log_that_takes_its_columns_from_the_first_epoch_has_those_of_the_probe(images, tmp_path):
    model = make_model()
    model.compile("adam")
    path = tmp_path / "log.csv"
    probe = OODProbe(images[:32], images[32:], every=2)
    watching = [probe, keras.callbacks.CSVLogger(path)]
    model.fit(images[:32], batch_size=16, verbose=0, initial_epoch=1, epochs=3, callbacks=watching)
    rows = list(csv.DictReader(path.open()))
    assert [0.0 <= float(row["auroc_rot90"]) <= 1.0 for row in rows] == [True, True]


def test_probe_does_not_change_the_training(images):
    def train(callbacks):
        model = make_model()
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(images[:32], batch_size=16, epochs=2, callbacks=callbacks, verbose=0)
        return model.get_weights()

    probe = OODProbe(images[:32], images[32:])
    for plain, probed in zip(train([]), train([probe]), strict=True):
        np.testing.assert_array_equal(plain, probed)


def test_a_probe_sees_the_central_squares_of_oblong_images(images):
    side = images.shape[1]

    def oblong(squares):
        return np.pad(squares, [(0, 0), (0, 0), (3, 3), (0, 0)], constant_values=255)

    def aurocs(bank_images, held_out, noise):
        probe = OODProbe(bank_images, held_out, ood={"noise": noise})
        model = make_model()
        model.compile(keras.optimizers.Adam(1e-3))
        history = model.fit(images[:32], batch_size=16, callbacks=[probe], verbose=0).history
        return {key: value for key, value in history.items() if key.startswith("auroc")}

    noise = np.random.default_rng(2).integers(0, 256, (24, side, side, 3), np.uint8)
    sets = images[:32], images[32:], noise
    assert aurocs(*map(oblong, sets)) == aurocs(*sets)


@pytest.mark.parametrize(
    "callback",
    [
        CollapseMonitor(window=3, stop_training=True),
        OODProbe(np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 8, 8, 3), np.uint8), ("perm4",)),
    ],
)
def test_callbacks_survive_serialization(callback):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(callback))
    for key, value in callback.get_config().items():
        np.testing.assert_array_equal(copy.get_config()[key], value)


def test_names_that_a_probe_would_log_twice_are_refused(images):
    for names, ood in ((("perm4", "rot90"), {"rot90": images}), (("rot90", "rot90"), None)):
        with pytest.raises(ValueError, match=r"names of their own.*Received: rot90, .*rot90"):
            OODProbe(images[:32], images[32:], names, ood)


def test_pictures_of_few_auxiliary_images(images, tmp_path):
    """As many negatives of each source as there are auxiliary images."""
    model = SelfDistillation(
        conv(), Brightness(16), Negatives("rot90", "both"), head=ProjectionHead(8, 8, 4)
    )
    model.compile("sgd")
    pictures = TrainingPictures(tmp_path, images[:20], images[20:30], images[:5], shift="rot90")
    both = {"images": images[:20], "auxiliary": images[:20]}
    model.fit(both, callbacks=[pictures], verbose=0)
    assert list((tmp_path / "pictures").iterdir())


def test_pictures_of_images_that_are_nearly_black(images, tmp_path):
    model = make_model()
    model.compile("sgd")
    dark = images[:32] // 128
    pictures = TrainingPictures(tmp_path, dark[:20], dark[20:30], shift="rot90")
    model.fit(dark, batch_size=16, callbacks=[pictures], verbose=0)
    assert list((tmp_path / "pictures").iterdir())


def test_pictures_are_closed_when_training_fails(images, tmp_path):
    def fail(batch, logs):
        raise RuntimeError("stopped")

    model = make_model()
    model.compile("sgd")
    pictures = TrainingPictures(tmp_path, images[:20], images[20:30], shift="rot90")
    failing = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    with pytest.raises(RuntimeError, match="stopped"):
        model.fit(images[:32], batch_size=16, callbacks=[pictures, failing], verbose=0)
    assert pictures._writer is None
