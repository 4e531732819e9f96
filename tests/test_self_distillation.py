"""`SelfDistillation`: the step against a plain re-computation, saving, resuming, backbones."""

import functools
import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Brightness, conv

from sddns_tf import image_ops, losses, networks, replicas, schedules, shifts
from sddns_tf.convnet import ConvNet
from sddns_tf.detector import Detector
from sddns_tf.heads import ProjectionHead
from sddns_tf.self_distillation import SelfDistillation
from sddns_tf.views import MultiCrop, Negatives
from sddns_tf.vit import VisionTransformer

BATCH, PROTOTYPES = 8, 24


def upside_down(images, seed):
    del seed
    return tf.reverse(images, [1])


def black(images, seed):
    del seed
    return tf.zeros_like(images)


class FixedViews:
    """Views without a draw: what a replica, a batch size or XLA does cannot change them."""

    sizes = (16,)
    image_size = 16

    def __call__(self, images, seed):
        del seed
        images = tf.cast(images, tf.float32)
        return [tf.stack([images, 255.0 - images, tf.reverse(images, [2])])[:, :, :16, :16]]

    def negative(self, images, seed):
        del seed
        return [tf.cast(images, tf.float32)[tf.newaxis, :, 8:24, 8:24]]

    def get_config(self):
        return {}


class OneView(FixedViews):
    """The same view twice."""

    def __call__(self, images, seed):
        del seed
        return [tf.stack([tf.cast(images, tf.float32)[:, :16, :16]] * 2)]


def tiny_vit(**kwargs):
    return VisionTransformer(16, patch_size=8, hidden_dim=16, depth=2, num_heads=2, **kwargs)


def tiny_head(**kwargs):
    return ProjectionHead(PROTOTYPES, hidden_dim=32, bottleneck_dim=8, **kwargs)


def tiny_model(source="in_distribution", backbone=None, **kwargs):
    keras.utils.set_random_seed(0)
    arguments = {
        "views": Brightness(16, local_size=8),
        "negatives": Negatives("rot90", source=source),
        "negative_weight": 1.0,  # They would hardly count in so few steps.
        "head": tiny_head(),
        **kwargs,
    }
    return SelfDistillation(backbone or conv(), **arguments)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4 * BATCH, 32, 32, 3), np.uint8)


def batches(images, repeat=1):
    return tf.data.Dataset.from_tensor_slices(images).batch(BATCH).repeat(repeat)


def assert_same_weights(model, other):
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)


@pytest.mark.parametrize(("temperature", "weight"), [(0.04, 0.5), (None, 0.5), (None, None)])
def test_step_equals_plain_recomputation(images, temperature, weight, monkeypatch):
    """One SGD step with clip, decay, teacher and center, each computed again by hand."""
    # Of the loss and K; what it is, is in test_losses.
    monkeypatch.setattr(losses, "negative_onset", lambda x, k: tf.stop_gradient(x) / k)
    model = tiny_model(
        backbone=tiny_vit(),
        teacher_temperature=temperature,
        views=FixedViews(),
        head=tiny_head(norm_last_layer=False),
        weight_decay=0.3,
        teacher_momentum=0.9,
        negatives=Negatives(upside_down, source="in_distribution"),
        negative_weight=weight,
        student_temperature=0.2,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.4, 0.3),
    )
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    student = [*model.student_backbone.trainable_weights, *model.student_head.trainable_weights]
    before = [variable.numpy() for variable in student]
    batch = tf.constant(images[:BATCH])

    views = model.views(batch, None)[0]
    negatives = upside_down(model.views.negative(batch, None)[0][0], None)[tf.newaxis]

    def features(part, group):
        flat = tf.reshape(group, [-1, 16, 16, 3])
        normalized = (flat / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.3]
        return getattr(model, f"{part}_backbone")(normalized)

    def project(part, group):
        x = features(part, group)
        if temperature is None:
            positives = features(part, views)
            variance = tf.math.reduce_variance(positives, axis=0)
            floor = 1e-4 * tf.reduce_mean(variance)
            x = (x - tf.reduce_mean(positives, axis=0)) / tf.sqrt(variance + floor)
        logits = getattr(model, f"{part}_head")(x)
        return tf.reshape(logits, [group.shape[0], BATCH, PROTOTYPES])

    teacher_logits = project("teacher", views)
    if temperature is None:
        targets = losses.balanced_probabilities(teacher_logits)
    else:
        targets = losses.teacher_probabilities(teacher_logits, model.center, temperature)
    with tf.GradientTape() as tape:
        positive = losses.cross_entropy(targets, project("student", views), 0.2)
        negative = losses.uniformity_loss(project("student", negatives), 0.2)
        if weight is None:
            weight = float(positive) / PROTOTYPES
        loss = positive + weight * negative
    gradients = tape.gradient(loss, [variable.value for variable in student])
    center = 0.1 * tf.reduce_mean(teacher_logits, axis=(0, 1)) if temperature else 0.0
    norms = [np.linalg.norm(gradient) for gradient in gradients]
    model.gradient_clip_norm = clip = float(np.median(norms))
    logs = model.train_step(batch)

    np.testing.assert_allclose(logs["positive_loss"], positive, rtol=1e-5)
    np.testing.assert_allclose(logs["negative_loss"], negative, rtol=1e-5)
    np.testing.assert_allclose(logs["negative_weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(model.center, center, atol=1e-6)
    for variable, old, gradient, norm in zip(student, before, gradients, norms, strict=True):
        is_decayed = old.ndim > 1 or variable.path.endswith("gain")
        decay = 0.1 * 0.3 * old if is_decayed else 0.0
        step = 0.1 * gradient.numpy() * min(1.0, clip / max(norm, 1e-12))
        np.testing.assert_allclose(variable, old - decay - step, atol=1e-5, err_msg=variable.path)
    teacher = [*model.teacher_backbone.trainable_weights, *model.teacher_head.trainable_weights]
    assert not teacher
    teacher = [*model.teacher_backbone.weights, *model.teacher_head.weights]
    for target, source, old in zip(teacher, student, before, strict=True):
        np.testing.assert_allclose(target, 0.9 * old + 0.1 * source.numpy(), atol=1e-6)


def test_the_papers_constants_are_one_argument_away():
    model = tiny_model(**SelfDistillation.PAPER)
    config = model.get_config()
    assert schedules.get(config["teacher_temperature"])(7) == np.float32(0.04)
    assert schedules.get(config["teacher_momentum"])(7) == np.float32(0.996)
    assert schedules.get(config["negative_weight"])(7) == 1.0
    assert not model.standardizes_features
    defaults = tiny_model(negative_weight=None).get_config()
    assert defaults["teacher_temperature"] is defaults["negative_weight"] is None
    assert inspect.signature(SelfDistillation).parameters["negative_weight"].default is None
    assert tiny_model().standardizes_features


def test_a_detector_that_ignores_how_features_were_trained_is_warned_of(images, tmp_path):
    def make(model, **options):
        parts = {"bank_images": images[:4], "calibration_images": images[4:], "verbose": 0}
        return Detector.from_images(
            model.teacher_backbone, false_positive_rate=0.5, **parts, **options
        )

    model = tiny_model()
    model.save(tmp_path / "model.keras")
    for one in (model, keras.models.load_model(tmp_path / "model.keras")):
        with pytest.warns(UserWarning, match="pass `standardize=model.standardizes_features`"):
            detector = make(one)
        assert detector.extractor.metric == "cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(model, standardize=False)
        assert make(model, standardize=True).extractor.metric == "euclidean"
        make(tiny_model(**SelfDistillation.PAPER))


def test_targets_do_not_depend_on_the_size_or_mean_of_the_features(images):
    """What makes any backbone trainable: nearly constant features are as good as any."""
    layers = keras.layers
    backbone = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(8, 5, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(8),
        ]
    )
    model = tiny_model(backbone=backbone, views=FixedViews(), negatives=None)
    model.compile(keras.optimizers.SGD(0.0))
    expected = model.evaluate(batches(images[:BATCH]), return_dict=True, verbose=0)
    for part in (model.student_backbone, model.teacher_backbone):
        kernel, bias = part.layers[-1].weights
        kernel.assign(1e-2 * kernel)
        bias.assign(tf.ones_like(bias))
    logs = model.evaluate(batches(images[:BATCH]), return_dict=True, verbose=0)
    assert logs["feature_std"] < 0.02 * expected["feature_std"]
    for name in ("positive_loss", "teacher_entropy", "mean_output_entropy", "teacher_spread"):
        assert logs[name] == pytest.approx(expected[name], rel=1e-2), name
    assert logs["teacher_entropy"] < 0.95


def test_teacher_starts_as_a_disjoint_copy():
    model = tiny_model()
    for student, teacher in (
        (model.student_backbone, model.teacher_backbone),
        (model.student_head, model.teacher_head),
    ):
        assert_same_weights(student, teacher)
        assert not {id(v) for v in student.variables} & {id(v) for v in teacher.variables}
    assert not model.teacher_backbone.trainable_variables


def test_backbone_that_shares_itself_with_its_copy_is_refused():
    shared = tiny_vit()

    class Sharing(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = shared
            self.built = True

        def call(self, images, training=False):
            return self.inner(images, training=training)

        def compute_output_shape(self, input_shape):
            return self.inner.compute_output_shape(input_shape)

        def get_config(self):
            return {}

    with pytest.raises(ValueError, match="must have variables of its own"):
        tiny_model(backbone=Sharing())


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_last_layer_stays_frozen_for_its_steps(images, norm_last_layer):
    model = tiny_model(frozen_last_layer_steps=3, head=tiny_head(norm_last_layer=norm_last_layer))
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    last_layer = model.student_head.last_layer
    start = last_layer.get_weights()
    model.fit(batches(images), steps_per_epoch=3, verbose=0)
    for before, after in zip(start, last_layer.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    model.fit(batches(images), steps_per_epoch=1, verbose=0)
    moved = np.abs(start[0] - last_layer.get_weights()[0]).max()
    # As large as any first step of Adam: its moments are warm, not empty.
    assert 0.002 < moved < 0.03


def test_weight_decay_spares_one_dimensional_tensors(images):
    rate, decay = 1e-2, 0.5

    def after_a_step(weight_decay):
        keras.utils.set_random_seed(0)  # of the head, too
        model = tiny_model(head=tiny_head(norm_last_layer=False))
        before = [variable.numpy() for variable in model.trainable_variables]
        model.compile(keras.optimizers.AdamW(rate, weight_decay=weight_decay))
        model.fit(batches(images[:BATCH]), verbose=0)
        return before, model

    before, decayed = after_a_step(decay)
    same_start, plain = after_a_step(0.0)
    gain = decayed.student_head.last_layer.gain
    for start, same, one, other in zip(
        before, same_start, decayed.trainable_variables, plain.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(start, same)
        # The authors' gain is a matrix of one column, so that it is decayed with the matrices.
        expected = rate * decay * start if len(one.shape) > 1 or one is gain else 0.0 * start
        np.testing.assert_allclose(other - one, expected, atol=1e-6, err_msg=one.path)


@pytest.mark.parametrize("by_name", [False, True])
def test_variables_excluded_from_weight_decay_before_stay_excluded(images, by_name):
    model = tiny_model()
    first, last = (model.student_backbone.layers[i].kernel for i in (0, -1))
    optimizer = keras.optimizers.AdamW(1e-9, weight_decay=1e6)
    if by_name:
        optimizer.exclude_from_weight_decay(var_names=["kernel"])
    else:
        optimizer.exclude_from_weight_decay(var_list=[first])
    before = [first.numpy(), last.numpy(), model.student_backbone.layers[-1].bias.numpy()]
    model.compile(optimizer, run_eagerly=True)
    model.train_on_batch(images[:BATCH])
    np.testing.assert_allclose(first, before[0], atol=1e-6)
    np.testing.assert_allclose(last, before[1] * (1.0 if by_name else 0.999), atol=1e-6)
    np.testing.assert_allclose(model.student_backbone.layers[-1].bias, before[2], atol=1e-6)


@pytest.mark.parametrize("negatives", [None, Negatives("rot90", source="in_distribution")])
def test_weight_regularizers_add_to_the_loss_once(images, negatives):
    def after_a_step(strength):
        keras.utils.set_random_seed(0)
        backbone, head = conv(), tiny_head()
        backbone.layers[0].kernel.regularizer = keras.regularizers.L2(strength)
        head.build((None, 16))
        head.mlp[0].kernel.regularizer = keras.regularizers.L2(strength)
        model = tiny_model(backbone=backbone, head=head, negatives=negatives)
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        model.gradient_clip_norm = None
        kernels = backbone.layers[0].kernel, head.mlp[0].kernel
        before = [kernel.numpy() for kernel in kernels]
        loss = model.train_on_batch(images[:BATCH], return_dict=True)["loss"]
        return model, before, loss, [kernel.numpy() for kernel in kernels]

    model, before, loss, kernels = after_a_step(0.5)
    _, same, plain, unpenalized = after_a_step(0.0)
    np.testing.assert_array_equal(before[0], same[0])
    np.testing.assert_allclose(loss - plain, sum(0.5 * (k**2).sum() for k in before), rtol=1e-4)
    for start, kernel, other in zip(before, kernels, unpenalized, strict=True):
        np.testing.assert_allclose(kernel - other, -0.1 * start, atol=1e-6)
    after = model.evaluate(images[:BATCH], return_dict=True, verbose=0)
    negative = after["negative_loss"] * after["negative_weight"]
    penalty = after["loss"] - after["positive_loss"] - negative
    np.testing.assert_allclose(penalty, sum(0.5 * (k**2).sum() for k in kernels), rtol=1e-4)


@keras.saving.register_keras_serializable("tests")
class AddsALoss(keras.layers.Layer):
    def call(self, inputs):
        self.add_loss(tf.reduce_mean(inputs))
        return inputs


@pytest.mark.parametrize("layer", [keras.layers.ActivityRegularization(l2=0.1), AddsALoss()])
def test_losses_of_outputs_are_refused(layer):
    with pytest.raises(ValueError, match=r"no `activity_regularizer` and no `add_loss`.*Received"):
        tiny_model(backbone=keras.Sequential([keras.Input((None, None, 3)), *conv().layers, layer]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_temperature", 0.0),
        ("teacher_temperature", -0.1),
        ("teacher_momentum", 1.5),
        ("center_momentum", 2.0),
        ("negative_weight", -1.0),
        ("negative_weight", float("nan")),
        ("weight_decay", -0.1),
        ("gradient_clip_norm", 0),
        ("frozen_last_layer_steps", -1),
        ("frozen_last_layer_steps", True),
        ("seed", 1.5),
        ("std", (0.2, 0.0, 0.2)),
        ("mean", (0.5, 0.5)),
    ],
)
def test_numbers_that_cannot_train_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
        tiny_model(**{name: value})


def test_a_save_that_fails_leaves_what_was_there(images, tmp_path):
    with pytest.warns(UserWarning, match=r"'<lambda>' cannot be saved.*register_keras_serial"):
        shift = Negatives(lambda images, seed: images, source="in_distribution")
    path = tmp_path / "model.keras"
    tiny_model().save(path)
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017 (whatever Keras raises)
        tiny_model(negatives=shift, views=Unsavable(16, local_views=0)).save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["model.keras"]


def test_an_export_names_what_is_exported_instead(tmp_path):
    with pytest.raises(
        ValueError, match=r"export\.saved_model\(detector, folder\).*Received: .*ex"
    ):
        tiny_model().export(tmp_path / "exported")


class Unsavable(MultiCrop):
    """Views whose configuration cannot be had."""

    def get_config(self):
        raise RuntimeError("no configuration")


def known_to_nobody(images, seed):
    """A plain function that Keras was never told of."""
    return upside_down(images, seed)


class Scaled:
    """A shift with a number of its own, not registered with Keras."""

    def __call__(self, images, seed):
        return images * 0.5


@pytest.mark.parametrize(
    "shift",
    [lambda images, seed: images, functools.partial(upside_down), Scaled(), known_to_nobody],
)
def test_a_shift_that_cannot_be_saved_is_said_when_it_is_made(shift):
    with pytest.warns(UserWarning, match=r"cannot be saved.*register_keras_serializable.*Received"):
        Negatives(shift, source="in_distribution")


def test_shifts_that_can_be_saved_are_not_warned_of(recwarn):
    Negatives("rot90")
    Negatives(shifts.rot90)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("shift", "received"),
    [
        (lambda images, seed: tf.cast(images, tf.uint8), "uint8 of shape"),
        (lambda images, seed: images[..., :1], r"float32 of shape \(\d+, 16, 16, 1\)"),
        (lambda images, seed: images[:, ::2, ::2], r"float32 of shape \(\d+, 8, 8, 3\)"),
        (lambda images, seed: images[1:], "float32 of shape"),
        (lambda images, seed: None, "NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:The shift")
def test_a_shift_that_changes_shape_or_type_is_named(images, shift, received):
    model = tiny_model(negatives=Negatives(shift, source="in_distribution"))
    model.compile("adam")
    with pytest.raises(ValueError, match=rf"'<lambda>' must return images.*Received: {received}"):
        model.fit(images, batch_size=len(images), verbose=0)


def test_weight_decay_asked_for_twice_is_refused():
    model = tiny_model(weight_decay=schedules.WarmupCosine(0.04, 0.4, 100))
    with pytest.raises(ValueError, match="asked for twice"):
        model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.1))


def test_a_frozen_backbone_is_refused():
    backbone = conv()
    backbone.trainable = False
    with pytest.raises(ValueError, match=r"weights to train.*backbone.trainable = True.*Received"):
        tiny_model(backbone=backbone)


def test_a_saved_teacher_trains_as_the_error_says(tmp_path):
    """A Sequential says that it is trainable, though its layers were saved frozen."""
    tiny_model().teacher_backbone.save(tmp_path / "teacher.keras")
    backbone = keras.saving.load_model(tmp_path / "teacher.keras")
    with pytest.raises(ValueError, match=r"set `backbone.trainable = False`, then `backbone.train"):
        tiny_model(backbone=backbone)
    backbone.trainable = False
    backbone.trainable = True
    assert len(tiny_model(backbone=backbone).student_backbone.trainable_weights) == 4


def freeze_all(model):
    model.trainable = False


def freeze_backbone(model):
    model.student_backbone.trainable = False


def freeze_last_layer(model):
    model.student_head.last_layer.trainable = False


def freeze_first_layer(model):
    # Of a transformer the second is a block, whose own configuration does not reach a file.
    model.student_backbone.layers[1].trainable = False


@pytest.mark.parametrize(
    ("freeze", "backbone"),
    [
        (freeze_all, conv),
        (freeze_backbone, conv),
        (freeze_backbone, lambda: ConvNet((8,))),
        (freeze_last_layer, conv),
        (freeze_first_layer, lambda: ConvNet((8, 16))),
        (freeze_first_layer, tiny_vit),
    ],
)
def test_what_is_frozen_stays_frozen_in_a_file(freeze, backbone, tmp_path):
    model = tiny_model(backbone=backbone())
    freeze(model)
    model.compile("adam")
    model.save(tmp_path / "model.keras")
    copies = keras.saving.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)
    for copy in copies:
        assert [v.trainable for v in copy.weights] == [v.trainable for v in model.weights]
        assert len(copy.trainable_variables) == len(model.trainable_variables)
    assert len(copies[0].optimizer.variables) == len(model.optimizer.variables)
    assert_same_weights(copies[0], model)


def test_the_teacher_stays_frozen_when_the_model_is_trained_again():
    model = tiny_model()
    student = len(model.trainable_variables)
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert len(model.trainable_variables) == student
    assert not model.teacher_backbone.trainable_weights + model.teacher_head.trainable_weights


def test_batch_norms_frozen_later_are_as_those_frozen_before(images, tmp_path):
    def trained(when):
        keras.utils.set_random_seed(0)
        backbone = conv(batch_norm=True)
        backbone.layers[1].trainable = when != "before"
        model = tiny_model(backbone=backbone)
        backbone.layers[1].trainable = False
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        model.train_on_batch(images[:BATCH])
        return model

    before, later = trained("before"), trained("later")
    assert_same_weights(before, later)
    later.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for model in (later, loaded):
        model.train_on_batch(images[:BATCH])
    assert_same_weights(later, loaded)


def test_a_file_that_does_not_say_what_is_frozen_loads():
    model = tiny_model()
    freeze_backbone(model)
    config = model.get_config()
    del config["frozen"]
    assert not SelfDistillation.from_config(config).student_backbone.trainable_weights


def test_schedules_follow_the_step(images):
    model = tiny_model(
        teacher_momentum=schedules.Linear(0.5, 0.9, end_step=4),
        negative_weight=schedules.Linear(0.0, 1.0, start_step=3, end_step=4),
    )
    rate = schedules.WarmupCosine(1e-3, 0.0, 8, 4)
    model.compile(keras.optimizers.Adam(rate))
    history = model.fit(batches(images, repeat=8), steps_per_epoch=1, epochs=6, verbose=0).history
    np.testing.assert_allclose(history["learning_rate"], [rate(step) for step in range(6)])
    np.testing.assert_allclose(history["teacher_momentum"], [0.5, 0.6, 0.7, 0.8, 0.9, 0.9])
    gap = np.subtract(history["loss"], history["positive_loss"])
    np.testing.assert_allclose(gap[:4], 0.0, atol=1e-6)
    np.testing.assert_allclose(gap[4:], history["negative_loss"][4:], rtol=1e-5)
    assert int(model.step) == 6


@pytest.mark.parametrize(
    ("name", "schedule", "constant", "others"),
    [
        ("weight_decay", schedules.Linear(0.0, 0.5, end_step=1), 0.5, {}),
        ("teacher_temperature", schedules.Linear(0.04, 0.4, end_step=1), 0.4, {}),
        (
            "negative_weight",
            schedules.Linear(0.0, 0.7, end_step=1),
            0.7,
            {"teacher_temperature": 0.04},
        ),
    ],
)
def test_a_schedule_at_its_end_is_its_last_value(images, name, schedule, constant, others):
    model, twin = (tiny_model(**{name: value}, **others) for value in (schedule, constant))
    twin.set_weights(model.get_weights())
    for one in (model, twin):
        one.compile(keras.optimizers.SGD(0.1))
        one.step.assign(1)
        one.train_on_batch(images[:BATCH])
    for ours, theirs in zip(model.weights, twin.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=ours.path)


def test_draws_differ_by_step_and_seed_and_between_views_and_negatives(images):
    class Seen(Brightness):
        def _draw(self, images, seed, count):
            seen.append(tuple(np.asarray(seed)))
            return super()._draw(images, seed, count)

    def drawn(seed):
        seen.clear()
        model = tiny_model(views=Seen(16, local_size=8), seed=seed)
        model.compile("sgd", run_eagerly=True)
        for _ in range(3):
            model.train_on_batch(images[:BATCH])
        return list(seen)

    seen = []
    one, again, other = drawn(0), drawn(0), drawn(1)
    assert len(set(one)) == len(one) == 6  # views and negatives of three steps
    assert one == again
    assert not set(one) & set(other)


def test_save_load_continue_equals_not_stopping(images, tmp_path):
    """Schedules, center, optimizer slots, views: all go on where they stood."""

    def make():
        model = tiny_model(
            backbone=tiny_vit(),
            views=MultiCrop(16, local_views=1),
            teacher_temperature=schedules.Linear(0.04, 0.02, end_step=8),
            negative_weight=schedules.Linear(0.0, 1.0, end_step=8),
            weight_decay=schedules.WarmupCosine(0.04, 0.4, 8),
            frozen_last_layer_steps=2,
        )
        model.compile(keras.optimizers.Adam(schedules.WarmupCosine(1e-2, 1e-4, 8, 2)))
        return model

    path, halfway = tmp_path / "model.keras", []

    def save(epoch, logs):
        if epoch == 0:
            unbroken.save(path)
            halfway.extend(unbroken.get_weights())

    unbroken = make()
    saving = keras.callbacks.LambdaCallback(on_epoch_end=save)
    unbroken.fit(batches(images), epochs=2, verbose=0, callbacks=[saving])
    second = keras.models.load_model(path)
    for saved, loaded in zip(halfway, second.get_weights(), strict=True):
        np.testing.assert_array_equal(saved, loaded)
    assert int(second.step) == 4
    second.fit(batches(images), verbose=0)
    assert_same_weights(unbroken, second)
    for ours, theirs in zip(unbroken.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)


def test_weights_file_carries_teacher_center_and_step(images, tmp_path):
    model, other = (tiny_model(teacher_temperature=0.04) for _ in range(2))
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(batches(images), verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(model, other)
    assert np.abs(other.center).max() > 0
    assert int(other.step) == 4


def test_negatives_go_apart_from_positives_where_there_are_batch_statistics(images):
    """Moving statistics are those of positive views; the teacher's are those of its own batch."""
    layers = keras.layers
    backbone = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(momentum=0.5),
            layers.GlobalAveragePooling2D(),
        ]
    )
    model = tiny_model(backbone=backbone, views=FixedViews(), negatives=None, teacher_momentum=0.8)
    twin = tiny_model(
        backbone=keras.models.clone_model(backbone),
        views=FixedViews(),
        negatives=Negatives(black, source="in_distribution"),
        teacher_momentum=0.8,
    )
    twin.student_backbone.set_weights(model.student_backbone.get_weights())
    for each in (model, twin):
        each.compile(keras.optimizers.SGD(0.0))
        each.fit(batches(images[:BATCH]), verbose=0)
    ours, theirs = (m.student_backbone.layers[1].non_trainable_weights for m in (model, twin))
    for variable, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(variable, other, rtol=1e-5)
    moved = model.student_backbone.layers[1].moving_mean.numpy()
    assert np.abs(moved).max() > 1e-3
    # The student's momentum is 0.5; that of the teacher's statistics is 0.1 in the first step.
    norm = model.teacher_backbone.layers[1]
    np.testing.assert_allclose(norm.moving_mean, 0.9 * 2 * moved, rtol=1e-4)
    assert not norm.trainable
    assert norm.momentum == 0.5


def test_teacher_drops_nothing_where_there_are_batch_statistics(images):
    layers = keras.layers
    backbone = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Dropout(0.9),
            layers.GlobalAveragePooling2D(),
        ]
    )
    teacher = networks.copy_of(backbone, (16, 16, 3), trainable=False)
    norms = networks.trained_batch_norms(backbone, teacher)
    pixels = tf.cast(images[:BATCH, :16, :16], tf.float32)
    whole = replicas.part_of(pixels)
    with networks.normalizing_by_batch(teacher, norms, whole, momentum=0.9):
        first, second = (teacher(pixels, training=True) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.all(first != 0)
    assert teacher.layers[2].rate == 0.9
    assert not teacher.trainable_variables
    batch_mean = tf.reduce_mean(teacher.layers[0](pixels), axis=(0, 1, 2))
    np.testing.assert_allclose(norms[0].moving_mean, 0.1 * batch_mean, rtol=1e-4)


def test_evaluate_reports_the_losses_and_changes_nothing(images):
    model = tiny_model(backbone=conv(dropout=0.5, batch_norm=True), negative_weight=0.5)
    model.compile(keras.optimizers.Adam(1e-3))
    before = model.get_weights()
    logs, again = (
        model.evaluate(batches(images[:BATCH]), return_dict=True, verbose=0) for _ in range(2)
    )
    assert logs == again  # No unit is dropped.
    assert logs["loss"] == pytest.approx(logs["positive_loss"] + 0.5 * logs["negative_loss"])
    assert set(logs) >= {"loss", "positive_loss", "negative_loss", "teacher_entropy"}
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_predict_gives_unit_features_of_the_teacher(images):
    model = tiny_model()
    student = model.student_backbone
    student.set_weights([0.1 + weight for weight in student.get_weights()])
    features = model.predict(images, verbose=0)
    assert features.shape == (len(images), 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    seen = image_ops.normalize(image_ops.resize(tf.cast(images, tf.float32), 16, 16))
    expected = tf.math.l2_normalize(model.teacher_backbone(seen), axis=-1)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_collapse_metrics_at_their_ends(images):
    model = tiny_model(views=OneView(), negatives=None)
    model.compile(keras.optimizers.SGD(0.0))
    same = np.repeat(images[:1], BATCH, axis=0)
    logs = model.evaluate(batches(same), return_dict=True, verbose=0)
    assert logs["feature_std"] < 1e-3
    logs = model.evaluate(batches(images), return_dict=True, verbose=0)
    assert 0.01 < logs["feature_std"] < 1.5
    assert 0.0 < logs["teacher_entropy"] < 1.0


@pytest.mark.parametrize(
    ("batch", "source", "message"),
    [
        (
            np.zeros((8, 32, 32), np.uint8),
            "in_distribution",
            r"of shape \(batch, height, width, 3\)",
        ),
        (
            np.zeros((8, 32, 32, 1), np.uint8),
            "in_distribution",
            r"of shape \(batch, height, width, 3\)",
        ),
        (np.zeros((8, 32, 32, 3), np.uint8), "auxiliary", "data.with_auxiliary"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, source, message):
    model = tiny_model(source=source)
    model.compile(keras.optimizers.Adam(1e-3))
    with pytest.raises(ValueError, match=message):
        model.fit(batch, batch_size=BATCH, verbose=0)


def test_labels_are_refused(images):
    model = tiny_model()
    model.compile(keras.optimizers.Adam(1e-3))
    with pytest.raises(ValueError, match="trains without labels"):
        model.fit(images, np.zeros(len(images)), batch_size=BATCH, verbose=0)
    with pytest.raises(ValueError, match=r"trains without labels.*Received: 2 parts in `x`"):
        model.fit((images, np.zeros(len(images))), batch_size=BATCH, verbose=0)


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return np.full((BATCH, 16, 16, 3), index, np.uint8)


@pytest.mark.filterwarnings("error:.*shuffle")
@pytest.mark.parametrize("endless", [False, True])
def test_batches_that_cannot_be_shuffled_are_not_warned_of(images, endless):
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        model = tiny_model()
        model.compile("adam")
    distributed = strategy.experimental_distribute_dataset(batches(images))
    model.fit(Endless() if endless else distributed, steps_per_epoch=1, verbose=0)
    assert int(model.step) == 1


def test_losses_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="computes its own losses"):
        tiny_model().compile(keras.optimizers.Adam(1e-3), loss="mse")


def test_backbones_that_do_not_fit_are_refused():
    layers = keras.layers
    maps = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3)])
    with pytest.raises(ValueError, match="one vector"):
        tiny_model(backbone=maps)
    fixed = keras.Sequential([keras.Input((16, 16, 3)), layers.Flatten(), layers.Dense(4)])
    with pytest.raises(ValueError, match=r"takes only inputs of shape \(None, 16, 16, 3\)"):
        tiny_model(backbone=fixed)
    with pytest.raises(ValueError, match="does not take views of 4 px"):
        tiny_model(backbone=tiny_vit(), views=MultiCrop(16, local_size=4))
    with pytest.raises(ValueError, match=r"must be a keras\.Model"):
        tiny_model(backbone=lambda x: x)
    images = keras.Input((None, None, 3))
    features = layers.GlobalAveragePooling2D()(images)
    with pytest.raises(ValueError, match=r"further outputs.*shape \[\(None, 3\), \(None, 3\)\]"):
        tiny_model(backbone=keras.Model(images, [features, features]))


@pytest.mark.parametrize("views", [None, lambda images, seed: [images]])
def test_what_is_no_views_is_named(views):
    with pytest.raises(ValueError, match=r"`views` must be a MultiCrop.*negative\. Received: vi"):
        tiny_model(views=views)


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "float64"])
def test_weights_in_other_types_than_float32_are_refused(policy):
    keras.config.set_dtype_policy(policy)
    try:
        with pytest.raises(
            ValueError, match=r"'mixed_bfloat16' or.*Received: .*kernel of " + policy
        ):
            tiny_model()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("negatives", [None, Negatives("rot90", source="in_distribution")])
def test_a_head_made_for_one_vector_per_image_takes_all_views(images, negatives):
    layers = keras.layers
    inputs = keras.Input((16,))
    head = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dense(PROTOTYPES)])
    functional = keras.Model(inputs, head(inputs))
    dense = layers.Dense(PROTOTYPES)
    for_any_rank = keras.models.clone_model(head)
    for one in (functional, head, dense, for_any_rank):
        model = tiny_model(head=one, negatives=negatives)
        model.compile("adam", run_eagerly=True)
        loss = model.train_on_batch(images[:BATCH], return_dict=True)["loss"]
        assert np.isfinite(loss)

    # One that takes any rank, and the same one made for (B, D), give the same loss.
    def loss_with(one, weights):
        model = tiny_model(head=one, negatives=negatives)
        model.student_head.set_weights(weights)
        model.teacher_head.set_weights(weights)
        model.compile("sgd", run_eagerly=True)
        return model.train_on_batch(images[:BATCH], return_dict=True)["loss"]

    made = keras.Sequential([inputs, layers.Dense(PROTOTYPES)])
    weights = made.get_weights()
    expected = loss_with(layers.Dense(PROTOTYPES), weights)
    assert loss_with(made, weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("head", "received"),
    [
        (lambda: keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]), "expected shape"),
        (
            lambda: keras.Sequential([keras.layers.Reshape((4, 4))]),
            r"outputs of shape \(None, 4, 4",
        ),
        (lambda: "a head", "head='a head'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(head, received):
    with pytest.raises(ValueError, match=rf"must map features \(B, 16\).*Received: .*{received}"):
        tiny_model(head=head())


def test_keras_applications_backbone_trains(images):
    network = keras.applications.MobileNetV3Small(
        input_shape=(None, None, 3),
        alpha=0.35,
        minimalistic=True,
        include_top=False,
        weights=None,
        include_preprocessing=False,
    )
    # Its first blocks; `test_backbones` trains all of it.
    features = network.get_layer("expanded_conv_2_project_bn").output
    features = keras.layers.GlobalAveragePooling2D()(features)
    backbone = keras.Model(network.input, features)
    model = tiny_model(backbone=backbone, views=Brightness(32))
    model.compile(keras.optimizers.Adam(1e-3))
    logs = model.fit(batches(images[: 2 * BATCH]), verbose=0).history
    assert np.isfinite(logs["loss"]).all()


def test_keras_cv_backbone_and_augmentation_plug_in(images):
    keras_cv = pytest.importorskip("keras_cv")
    backbone = keras.Sequential(
        [
            keras_cv.models.ResNetV2Backbone(
                stackwise_filters=[8],
                stackwise_blocks=[2],
                stackwise_strides=[2],
                include_rescaling=False,
                input_shape=(None, None, 3),
            ),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    grid_mask = keras_cv.layers.GridMask()
    model = tiny_model(
        backbone=backbone,
        negatives=Negatives(
            lambda batch, seed: grid_mask(batch, training=True), source="in_distribution"
        ),
    )
    model.compile(keras.optimizers.Adam(1e-3))
    logs = model.fit(batches(images[: 2 * BATCH]), verbose=0).history
    assert np.isfinite(logs["loss"]).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_what_must_be_float32(images, policy):
    backbone = tiny_vit(dtype=policy)
    model = tiny_model(backbone=backbone, head=tiny_head(dtype=policy), gradient_clip_norm=0.5)
    optimizer = keras.optimizers.Adam(1e-3)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=128.0)
    model.compile(optimizer)
    before = model.get_weights()
    logs = model.fit(batches(images), verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert {str(weight.dtype) for weight in model.weights} == {"float32", "int32"}
    changed = [(a != b).any() for a, b in zip(before, model.get_weights(), strict=True)]
    assert np.mean(changed) > 0.9
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
