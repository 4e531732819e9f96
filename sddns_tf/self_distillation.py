"""`SelfDistillation`: student, EMA teacher and centre, trained on images without labels."""

import contextlib
import types
import warnings

import keras
import tensorflow as tf

from sddns_tf import bank, image_ops, losses, schedules
from sddns_tf.heads import ProjectionHead

_LOGGED = (
    "loss",
    "positive_loss",
    "negative_loss",
    "teacher_entropy",
    "mean_output_entropy",
    "feature_std",
    "teacher_spread",
)

# Of the teacher's batch statistics.
_STATISTICS_MOMENTUM = schedules.GrowingMomentum(0.99)

# Below this, facebookresearch/dinov2 issue 298 reports that DINO does not train.
_SMALLEST_BATCH = 32


@keras.saving.register_keras_serializable("sddns_tf")
class SelfDistillation(keras.Model):
    """Self-distillation with negative sampling, trained by `fit` on unlabelled images.

    A student learns to say of every view of an image what a teacher, the moving average of the
    student, says of its global views; and to have no opinion on negatives.

    By default the scale of everything is taken from the batch, so that any backbone trains from
    any start: features are standardized before the heads, and the teacher's targets are
    `losses.balanced_probabilities`. With a `teacher_temperature` the features go to the heads as
    they are and the targets are centered and sharpened as in the paper, whose constants
    `SelfDistillation(backbone, views, head=ProjectionHead(), **SelfDistillation.PAPER)` has.
    Untrained features of different images are nearly the same vector. As they are, they need a
    temperature, momentum and learning rate that suit the backbone, or the center cancels what
    little tells images apart and all outputs become uniform.

    Calling the model gives the teacher backbone's features. Training batches are images
    `(B, H, W, 3)`, uint8 or float in 0-255, or, where `negatives` needs auxiliary images, a
    dictionary `{"images": ..., "auxiliary": ...}` as from `data.with_auxiliary`.

    Where an argument may be a *schedule*, it is a number or a
    `keras.optimizers.schedules.LearningRateSchedule` of the training step, see `schedules`.

    Under a distribution strategy, build the model (its backbone, head and optimizer too) and
    compile it within `strategy.scope()`; batches are global, and so are losses, centre and logs.
    Where the optimizer has `gradient_accumulation_steps`, a step is still a batch, as it is for
    Keras' learning rate schedules; the teacher and the weight decay move when the optimizer does.

    Args:
        backbone: Any Keras model from normalised images `(B, h, w, 3)` to features `(B, D)` that
            takes the sizes of all views. It becomes the student's; the teacher's is a copy, so
            load weights to start from before.
        views: `MultiCrop`.
        negatives: `Negatives`, or `None` to train by self-distillation alone.
        head: `ProjectionHead` of the student. Defaults to one that suits small data: 1024
            prototypes, a hidden layer of 512 and a bottleneck of 128. Its own defaults are the
            paper's.
        student_temperature: Float.
        teacher_temperature: Schedule, or `None` for balanced targets and standardized features.
        teacher_momentum: Schedule; the share of the teacher that stays at each step. Defaults to
            `schedules.GrowingMomentum(0.996)`.
        center_momentum: Float; the share of the center that stays at each step. Balanced targets
            need no center.
        negative_weight: Schedule; lambda, the weight of the negative term.
        weight_decay: Schedule of the decoupled weight decay of all tensors but 1-D ones, or
            `None` for the optimizer's own `weight_decay`, from which 1-D tensors are exempt too.
        gradient_clip_norm: Largest norm of the gradient of each single tensor, or `None`.
        frozen_last_layer_steps: Steps for which the head's last layer does not move.
        mean: Mean of each channel of images scaled to 0-1, for normalisation.
        std: Standard deviation of each channel, likewise.
        seed: Integer; fixes the views and negatives of every step.

    Logs:
        `loss`, `positive_loss`, `negative_loss`; `teacher_entropy`, the mean entropy of the
        teacher's outputs relative to `ln K` (1: uniform, 0: one-hot); `mean_output_entropy`, that
        of their mean over the batch (0: one prototype for all images); `feature_std`, the
        standard deviation of the teacher's normalised features over the batch, relative to that
        of isotropic features (0: all images look alike); `teacher_spread`, the standard deviation
        of the teacher's logits over the batch; `learning_rate`; `teacher_momentum`.

    Example:
        >>> model = SelfDistillation(
        ...     backbone=vit_small(image_size=32, patch_size=4),
        ...     views=MultiCrop(image_size=32, local_views=4),
        ...     negatives=Negatives(shift="rot90", source="both"),
        ... )
        >>> model.compile(optimizer=keras.optimizers.AdamW(1e-3))
        >>> model.fit(data.with_auxiliary(images, auxiliary), epochs=100)
        >>> model.teacher_backbone.save("backbone.keras")

    Reference:
        Rafiee et al., "Self-Supervised Anomaly Detection by Self-Distillation and Negative
        Sampling", arXiv 2201.06378; Caron et al., arXiv 2104.14294, algorithm 1, and, for the
        balanced targets, arXiv 2006.09882.
    """

    PAPER = types.MappingProxyType({"teacher_temperature": 0.04, "teacher_momentum": 0.996})

    def __init__(
        self,
        backbone,
        views,
        negatives=None,
        head=None,
        student_temperature=0.1,
        teacher_temperature=None,
        teacher_momentum=None,
        center_momentum=0.9,
        negative_weight=1.0,
        weight_decay=None,
        gradient_clip_norm=3.0,
        frozen_last_layer_steps=0,
        mean=image_ops.IMAGENET_MEAN,
        std=image_ops.IMAGENET_STD,
        seed=0,
        **kwargs,
    ):
        # Images in 0-255 would lose their last bits if Keras cast them to the global policy.
        super().__init__(**{"autocast": False, **kwargs})
        # Keras remembers a strategy only where there is one, and takes the current one for none.
        self._built_under = tf.distribute.get_strategy()
        for layer in (backbone, head):
            _check_scope(layer)
        feature_dim = _check_backbone(backbone, views)
        self.views = views
        self.negatives = negatives
        self.student_temperature = student_temperature
        self.teacher_temperature = _schedule_or_none(teacher_temperature)
        self.teacher_momentum = _schedule_or_none(teacher_momentum) or schedules.GrowingMomentum(
            0.996
        )
        self.center_momentum = center_momentum
        self.negative_weight = schedules.get(negative_weight)
        self.weight_decay = _schedule_or_none(weight_decay)
        self.gradient_clip_norm = gradient_clip_norm
        self.frozen_last_layer_steps = frozen_last_layer_steps
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed

        self.student_backbone = backbone
        self.student_head = head or ProjectionHead(1024, hidden_dim=512, bottleneck_dim=128)
        if not self.student_head.built:
            self.student_head.build((None, feature_dim))
        self.teacher_backbone = _frozen_copy(self.student_backbone, (None, *_input_shape(views)))
        self.teacher_head = _frozen_copy(self.student_head, (None, feature_dim))
        num_prototypes = self.student_head.compute_output_shape((None, feature_dim))[-1]
        self.center = self.add_weight(
            shape=(num_prototypes,),
            initializer="zeros",
            trainable=False,
            dtype="float32",
            name="center",
        )
        self.step = self.add_weight(
            shape=(), initializer="zeros", trainable=False, dtype="int32", name="step"
        )
        self._teacher_norms = [
            copy
            for layer, copy in zip(
                _batch_norms(self.student_backbone),
                _batch_norms(self.teacher_backbone),
                strict=True,
            )
            if layer.trainable
        ]
        self._trackers = {name: keras.metrics.Mean(name) for name in _LOGGED}
        self.built = True

    def call(self, images):
        """Features of the teacher backbone, L2-normalised.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`; resized to the global views' size.

        Returns:
            Float32 `(B, D)`.
        """
        images = image_ops.resize(images, self.views.image_size, self.views.image_size)
        features = self.teacher_backbone(self._normalize(images), training=False)
        return tf.math.l2_normalize(tf.cast(features, tf.float32), axis=-1)

    def compile(self, optimizer, **kwargs):
        """Choose the optimizer; the losses are the model's own.

        Weight decay never acts on 1-D tensors (biases, norms, the last layer's gain), whether it
        is the optimizer's or the model's `weight_decay` schedule.

        Args:
            optimizer: Keras optimizer, or its name.
            **kwargs: As in `keras.Model.compile`, without `loss` and `metrics`.
        """
        for argument in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if kwargs.get(argument) is not None:
                raise ValueError(
                    "SelfDistillation computes its own losses and metrics. "
                    f"Received: {argument}={kwargs[argument]!r}"
                )
        if tf.distribute.get_strategy() is not self._built_under:
            raise ValueError(
                "The model must be built and compiled within the same `strategy.scope()`. "
                f"Received: built under {_describe_strategy(self._built_under)}, "
                f"compiled under {_describe_strategy(tf.distribute.get_strategy())}"
            )
        super().compile(optimizer=optimizer, **kwargs)
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if self.weight_decay is not None and optimizer.weight_decay:
            raise ValueError(
                "Weight decay was asked for twice: as the model's `weight_decay` schedule and as "
                f"the optimizer's weight_decay={optimizer.weight_decay}. Compile with "
                "keras.optimizers.Adam, which has none, or leave the model's at None."
            )
        if not self.optimizer.built:
            one_dimensional = [v for v in self.trainable_variables if len(v.shape) < 2]
            optimizer.exclude_from_weight_decay(var_list=one_dimensional)
            self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config):
        """Compile a loaded model as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Nothing is left to build, and Keras' way to a batch fails for dictionaries on machines.

        Under `MultiWorkerMirroredStrategy` it would reduce the dictionary as if it were a tensor.
        """

    def fit(self, x=None, *args, **kwargs):
        """`keras.Model.fit` on unlabelled images: see the class. Warns of images in 0-1."""
        bank.warn_if_nearly_black(x, "x")
        return super().fit(x, *args, **kwargs)

    def train_step(self, data):
        """One step on a batch: the algorithm of the paper."""
        images, auxiliary = self._unpack(data)
        views, negatives = self._draw(images, auxiliary)

        teacher_features, teacher_logits = self._teacher_outputs(views[0], training=True)
        targets = self._targets(teacher_logits)
        with tf.GradientTape() as tape:
            positive_logits, negative_logits = self._student_logits(views, negatives, training=True)
            terms = self._loss_terms(targets, positive_logits, negative_logits)
            scaled_loss = self.optimizer.scale_loss(terms["loss"])
        self._update_student(self._gradients(tape, scaled_loss))
        self._update_teacher()
        logs = self._update_trackers(terms, teacher_features, teacher_logits, targets)
        self._update_center(teacher_logits)

        logs["learning_rate"] = tf.cast(self.optimizer.learning_rate, tf.float32)
        logs["teacher_momentum"] = self.teacher_momentum(self.step)
        self.step.assign_add(1)
        return _as_keras_reduces(logs)

    def test_step(self, data):
        """The same losses on held-out images, without any update."""
        images, auxiliary = self._unpack(data)
        views, negatives = self._draw(images, auxiliary)
        teacher_features, teacher_logits = self._teacher_outputs(views[0], training=False)
        targets = self._targets(teacher_logits)
        positive_logits, negative_logits = self._student_logits(views, negatives, training=False)
        terms = self._loss_terms(targets, positive_logits, negative_logits)
        logs = self._update_trackers(terms, teacher_features, teacher_logits, targets)
        return _as_keras_reduces(logs)

    def _unpack(self, data):
        """Images and auxiliary images of a batch, checked while the step is traced."""
        batch, labels, _ = keras.utils.unpack_x_y_sample_weight(data)
        if labels is not None:
            raise ValueError(
                "SelfDistillation trains without labels: pass images alone. Received batches "
                "with two or more parts."
            )
        needs_auxiliary = self.negatives is not None and self.negatives.needs_auxiliary
        if isinstance(batch, dict):
            images, auxiliary = batch.get("images"), batch.get("auxiliary")
        else:
            images, auxiliary = batch, None
        _check_images("images", images)
        if not needs_auxiliary:
            return images, None
        if auxiliary is None:
            raise ValueError(
                f"Negatives with source={self.negatives.source!r} need auxiliary images: train on "
                "data.with_auxiliary(images, auxiliary), which yields dictionaries with the keys "
                f"'images' and 'auxiliary'. Received: a batch of {_describe(batch)}"
            )
        _check_images("auxiliary", auxiliary)
        if None not in (sizes := (images.shape[0], auxiliary.shape[0])) and sizes[0] != sizes[1]:
            raise ValueError(
                "A batch needs as many auxiliary images as in-distribution images. Received: "
                f"images.shape={images.shape}, auxiliary.shape={auxiliary.shape}"
            )
        return images, auxiliary

    def _draw(self, images, auxiliary):
        """Views and negatives, fixed by the seed, the step and the place in the global batch."""
        seed = tf.stack([self.seed, tf.convert_to_tensor(self.step)])
        view_seed, negative_seed = tf.unstack(tf.random.split(seed, 2))
        views = self.views(images, view_seed)
        if self.negatives is None:
            return views, None
        return views, self.negatives(self.views, images, auxiliary, negative_seed)

    def _normalize(self, images):
        return image_ops.normalize(images, self.mean, self.std)

    def _teacher_outputs(self, global_views, training):
        """Features `(G, B, D)` and logits `(G, B, K)` of the positive global views."""
        if training and self._teacher_norms:
            features = self._features_by_batch_statistics(global_views)
        else:
            features = self._features(self.teacher_backbone, global_views, training=False)
        return features, self.teacher_head(self._head_inputs(features, features), training=False)

    def _features_by_batch_statistics(self, global_views):
        """The teacher's features where its backbone has batch normalization.

        It normalizes by its own batch, as DINO's does, and its moving statistics follow that.
        Were they the student's, averaged twice, they would fit the teacher's weights too late:
        the features of a deep network then become constant within the first steps.
        """
        norms = self._teacher_norms
        statistics = [v for norm in norms for v in (norm.moving_mean, norm.moving_variance)]
        before = [tf.identity(variable) for variable in statistics]
        with _batch_becomes_moving_statistics(self.teacher_backbone, norms):
            features = self._features(self.teacher_backbone, global_views, training=True)
        momentum = _STATISTICS_MOMENTUM(self.step)
        for variable, old in zip(statistics, before, strict=True):
            new = _global_mean(tf.convert_to_tensor(variable))
            variable.assign(momentum * old + (1.0 - momentum) * new)
        return features

    def _targets(self, teacher_logits):
        """What the student shall say of other views of the same images, `(G, B, K)`."""
        if self.teacher_temperature is None:
            return losses.balanced_probabilities(teacher_logits, global_mean=_global_mean)
        temperature = self.teacher_temperature(self.step)
        return losses.teacher_probabilities(teacher_logits, self.center, temperature)

    def _student_logits(self, views, negatives, training):
        """Logits of all positive views `(V, B, K)` and all negatives `(N, B, K)`.

        All views of one size go through the backbone in one call, all features through the head
        in one.
        """
        if negatives is None:
            features = self._student_features(views, training)
            return self.student_head(self._head_inputs(features, features), training=training), None
        positive, negative = self._positive_and_negative_features(views, negatives, training)
        features = self._head_inputs(tf.concat([positive, negative], axis=0), positive)
        logits = self.student_head(features, training=training)
        return tf.split(logits, [positive.shape[0], negative.shape[0]])

    def _positive_and_negative_features(self, views, negatives, training):
        """Features `(V, B, D)` and `(N, B, D)`.

        Where the backbone has batch statistics, negatives go apart from the positives and leave
        the moving statistics as the positives made them.
        """
        if self._teacher_norms:
            positive = self._student_features(views, training)
            statistics = self.student_backbone.non_trainable_weights
            values = [tf.identity(variable) for variable in statistics]
            negative = self._student_features(negatives, training)
            for variable, value in zip(statistics, values, strict=True):
                variable.assign(value)
            return positive, negative
        pairs = []
        for pair in zip(views, negatives, strict=True):
            features = self._features(self.student_backbone, tf.concat(pair, axis=0), training)
            pairs.append(tf.split(features, [group.shape[0] for group in pair]))
        positive, negative = zip(*pairs, strict=True)
        return tf.concat(positive, axis=0), tf.concat(negative, axis=0)

    def _student_features(self, groups, training):
        """Features `(V, B, D)` of all views of all groups."""
        features = [self._features(self.student_backbone, group, training) for group in groups]
        return tf.concat(features, axis=0)

    def _head_inputs(self, features, positive):
        """Features as a head takes them: standardized by the moments of the positive views'."""
        if self.teacher_temperature is not None:
            return features
        return losses.standardized(features, losses.batch_moments(positive, _global_mean))

    def _features(self, backbone, group, training):
        """Features `(V, B, D)` of a group of views `(V, B, h, w, 3)`."""
        images = self._normalize(tf.reshape(group, [-1, *group.shape[2:]]))
        features = backbone(images, training=training)
        return tf.reshape(features, [group.shape[0], -1, features.shape[-1]])

    def _loss_terms(self, targets, positive_logits, negative_logits):
        positive = losses.cross_entropy(targets, positive_logits, self.student_temperature)
        if negative_logits is None:
            return {"loss": positive, "positive_loss": positive, "negative_loss": 0.0}
        negative = losses.uniformity_loss(negative_logits, self.student_temperature)
        total = positive + self.negative_weight(self.step) * negative
        return {"loss": total, "positive_loss": positive, "negative_loss": negative}

    def _gradients(self, tape, loss):
        """Zero for a variable that the loss does not depend on."""
        sources = [variable.value for variable in self.trainable_variables]
        return tape.gradient(loss, sources, unconnected_gradients="zero")

    def _update_student(self, gradients):
        """Clip each tensor's gradient, decay, and let the optimizer move the student."""
        variables = self.trainable_variables
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        gradients = _global_mean(gradients)
        if self.gradient_clip_norm is not None:
            largest = self.optimizer.scale_loss(tf.constant(float(self.gradient_clip_norm)))
            gradients = [tf.clip_by_norm(g, tf.cast(largest, g.dtype)) for g in gradients]
        # Keras adds up what the replicas hand over.
        gradients = [gradient / replicas for gradient in gradients]

        frozen = self.student_head.last_layer.weights if self.frozen_last_layer_steps else []
        before = [tf.identity(variable) for variable in frozen]
        if self.weight_decay is not None:
            decay = self.weight_decay(self.step) * self.optimizer.learning_rate
            decay = tf.where(self._optimizer_moves(), decay, 0.0)
            for variable in variables:
                if len(variable.shape) > 1:
                    variable.assign_sub(decay * variable)
        self.optimizer.apply(gradients, variables)
        # Putting the values back, rather than dropping the gradients, leaves Adam's moments warm
        # for the first step that counts, and holds against decay and momentum alike.
        for variable, value in zip(frozen, before, strict=True):
            is_frozen = self.step < self.frozen_last_layer_steps
            variable.assign(tf.where(is_frozen, value, variable))

    def _optimizer_moves(self):
        """Whether this batch is the last of those whose gradients the optimizer accumulates."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        batches = optimizer.gradient_accumulation_steps or 1
        return (self.step + 1) % batches == 0

    def _update_teacher(self):
        """Move every float of the teacher but its batch statistics towards the student."""
        momentum = tf.where(self._optimizer_moves(), self.teacher_momentum(self.step), 1.0)
        own = {
            id(v) for norm in self._teacher_norms for v in (norm.moving_mean, norm.moving_variance)
        }
        for student, teacher in (
            (self.student_backbone, self.teacher_backbone),
            (self.student_head, self.teacher_head),
        ):
            for source, target in zip(student.weights, teacher.weights, strict=True):
                if not keras.backend.is_float_dtype(source.dtype) or id(target) in own:
                    continue
                value = tf.convert_to_tensor(source)
                if not source.trainable:
                    value = _global_mean(value)
                target.assign(momentum * target + (1.0 - momentum) * value)

    def _update_center(self, teacher_logits):
        self._warn_of_a_small_batch(teacher_logits.shape[1])
        if self.teacher_temperature is None:
            return
        center = losses.updated_center(self.center, teacher_logits, self.center_momentum)
        self.center.assign(_global_mean(center))

    def _warn_of_a_small_batch(self, images):
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        batches = optimizer.gradient_accumulation_steps or 1
        if images is not None and images * replicas * batches < _SMALLEST_BATCH:
            warnings.warn(
                f"DINO needs batches of at least {_SMALLEST_BATCH} images, better hundreds: the "
                "centre and the negatives are means over the batch. Received: "
                f"{images} images x {replicas} replicas x {batches} accumulated batches.",
                stacklevel=2,
            )

    def _update_trackers(self, terms, teacher_features, teacher_logits, targets):
        values = {name: tf.convert_to_tensor(value) for name, value in terms.items()}
        values["teacher_entropy"] = tf.reduce_mean(_relative_entropy(targets))
        values = _global_mean(values)
        values["mean_output_entropy"] = _relative_entropy(
            _global_mean(tf.reduce_mean(targets, axis=[0, 1]))
        )
        values["feature_std"] = _relative_std(teacher_features)
        values["teacher_spread"] = losses.spread(teacher_logits, _global_mean)
        for name, tracker in self._trackers.items():
            tracker.update_state(values[name])
        return {name: tracker.result() for name, tracker in self._trackers.items()}

    @property
    def metrics(self):
        """Running means of what is logged; reset at each epoch."""
        return list(self._trackers.values())

    def get_config(self):
        """Constructor arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "backbone": serialize(self.student_backbone),
            "views": serialize(self.views),
            "negatives": serialize(self.negatives),
            "head": serialize(self.student_head),
            "student_temperature": self.student_temperature,
            "teacher_temperature": serialize(self.teacher_temperature),
            "teacher_momentum": serialize(self.teacher_momentum),
            "center_momentum": self.center_momentum,
            "negative_weight": serialize(self.negative_weight),
            "weight_decay": serialize(self.weight_decay),
            "gradient_clip_norm": self.gradient_clip_norm,
            "frozen_last_layer_steps": self.frozen_last_layer_steps,
            "mean": self.mean,
            "std": self.std,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """The model that `get_config` describes, with new weights."""
        parts = ("backbone", "views", "negatives", "head")
        objects = {name: keras.saving.deserialize_keras_object(config[name]) for name in parts}
        return cls(**{**config, **objects})


def _batch_norms(backbone):
    layers = backbone._flatten_layers(include_self=True, recursive=True)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


@contextlib.contextmanager
def _batch_becomes_moving_statistics(backbone, norms):
    """Called in training, these layers of a frozen backbone normalize by the batch and keep it.

    Layers that drop something, known by their `rate`, drop nothing meanwhile.
    """
    layers = backbone._flatten_layers(include_self=True, recursive=True)
    drops = [layer for layer in layers if getattr(layer, "rate", None)]
    rates, momenta = [drop.rate for drop in drops], [norm.momentum for norm in norms]
    for drop in drops:
        drop.rate = 0.0
    for norm in norms:
        norm.trainable, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for drop, rate in zip(drops, rates, strict=True):
            drop.rate = rate
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.trainable, norm.momentum = False, momentum


def _schedule_or_none(value):
    return None if value is None else schedules.get(value)


def _global_mean(values):
    """Mean over the replicas, of a tensor or each of a structure of them."""
    context = tf.distribute.get_replica_context()
    # A tensor of no device, such as the gradient of nothing, cannot be sent to other machines.
    values = tf.nest.map_structure(tf.identity, values)
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


def _as_keras_reduces(logs):
    """Of several machines Keras takes the mean of logs over an axis, which scalars lack."""
    resolver = getattr(tf.distribute.get_strategy(), "cluster_resolver", None)
    if resolver is None or not resolver.cluster_spec().as_dict():
        return logs
    return {name: tf.reshape(value, [1]) for name, value in logs.items()}


def _check_scope(layer):
    """A layer built outside the scope would fail in `fit`, with an assertion that says nothing."""
    if layer is None or not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    for variable in layer.variables:
        if not strategy.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                f"{layer.name!r} must be built within the same `strategy.scope()` as the model. "
                f"Received: {variable.path}, built outside of {_describe_strategy(strategy)}"
            )


def _describe_strategy(strategy):
    return f"{type(strategy).__name__} ({strategy.num_replicas_in_sync} replicas)"


def _input_shape(views):
    return (views.image_size, views.image_size, 3)


def _frozen_copy(layer, input_shape):
    """The teacher's part: same class, configuration and values, variables of its own."""
    if isinstance(layer, keras.Model):
        copy = keras.models.clone_model(layer)
    else:
        copy = type(layer).from_config(layer.get_config())
    if not copy.built:
        copy.build(input_shape)
    copy.set_weights(layer.get_weights())
    copy.trainable = False
    if {id(v) for v in copy.variables} & {id(v) for v in layer.variables}:
        raise ValueError(
            "The teacher must not share variables with the student, but the copy that "
            f"get_config and from_config make of {layer.name!r} ({type(layer).__name__}) does."
        )
    return copy


def _check_backbone(backbone, views):
    """Number of features of the backbone, which must take every size of view."""
    if not isinstance(backbone, keras.Model):
        raise ValueError(
            "`backbone` must be a keras.Model from normalised images (B, h, w, 3) to features "
            f"(B, D). Received: {backbone!r}"
        )
    for size in views.sizes:
        fixed = getattr(backbone, "input_shape", None)
        if fixed is not None and any(side not in (None, size) for side in tuple(fixed)[1:3]):
            raise ValueError(
                f"`backbone` takes inputs of shape {fixed} only, but the views have the sides "
                f"{views.sizes}. Build it with an input shape of (None, None, 3), or use "
                "MultiCrop(local_views=0) with its image_size."
            )
        try:
            shape = backbone.compute_output_shape((None, size, size, 3))
        except Exception as error:
            raise ValueError(
                f"`backbone` does not take views of {size} px; the views have the sides "
                f"{views.sizes}, see MultiCrop's `image_size` and `local_size`."
            ) from error
        if len(shape) != 2:
            raise ValueError(
                "`backbone` must give one vector (B, D) per image; add "
                "keras.layers.GlobalAveragePooling2D() to one that gives feature maps. "
                f"Received: output shape {shape} for images of {size} px"
            )
    if not backbone.built:
        backbone.build((None, *_input_shape(views)))
    return shape[-1]


def _check_images(name, images):
    if images is None or images.shape.rank != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"`{name}` must be RGB images (B, H, W, 3), uint8 or float in 0-255. "
            f"Received: {_describe(images)}"
        )
    if None in images.shape[1:3]:
        raise ValueError(
            f"`{name}` must all have one size, known before training; resize them first, as "
            f"data.load(..., image_size=...) does. Received: shape {images.shape}"
        )


def _describe(value):
    if isinstance(value, dict):
        return f"dict with keys {sorted(value)}"
    return f"shape {value.shape}, dtype {value.dtype}" if hasattr(value, "shape") else repr(value)


def _relative_entropy(probabilities):
    log_probabilities = tf.math.log(tf.maximum(probabilities, 1e-30))
    entropy = -tf.reduce_sum(probabilities * log_probabilities, axis=-1)
    return entropy / tf.math.log(float(probabilities.shape[-1]))


def _relative_std(features):
    normalized = tf.math.l2_normalize(tf.cast(features, tf.float32), axis=-1)
    _, variance = losses.batch_moments(normalized, _global_mean)
    return tf.reduce_mean(tf.sqrt(variance)) * features.shape[-1] ** 0.5
