"""`SelfDistillation`: student, EMA teacher and center, trained on images without labels.

Longer than other modules because it is one class: its arguments, its entry points, and the training
step, which reads like the algorithm and belongs next to what it calls.
"""

from __future__ import annotations

import functools
import os
import types
import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import (
    batches,
    files,
    freezing,
    image_ops,
    losses,
    networks,
    optimization,
    replicas,
    schedules,
    shifts,
    tracing,
    validation,
)
from sddns_tf.heads import ProjectionHead
from sddns_tf.image_sources import can_be_shuffled, image_batch, image_source, validation_source
from sddns_tf.types import Array
from sddns_tf.views import MultiCrop

_LOGGED = (
    "loss",
    "positive_loss",
    "negative_loss",
    "negative_weight",
    "teacher_entropy",
    "mean_output_entropy",
    "feature_std",
    "teacher_spread",
)

# For the teacher's batch statistics.
_STATISTICS_MOMENTUM = schedules.GrowingMomentum(0.99)

# Below this, facebookresearch/dinov2 issue 298 reports that DINO does not train.
_SMALLEST_BATCH = 32


@keras.saving.register_keras_serializable("sddns_tf")
class SelfDistillation(keras.Model):
    """Self-distillation with negative sampling, trained by `fit` on unlabeled images.

    From every view of an image, a student learns to predict the outputs of a teacher, its own
    moving average, for the global views; for negatives it learns uniform outputs.

    By default all scales are taken from the batch, whatever the scale of the backbone's features
    and however alike they are: features are standardized before the heads, and the targets are
    `losses.balanced_probabilities`. With a `teacher_temperature` the features go to the heads as
    they are, and the targets are centered and sharpened as in the paper;
    `SelfDistillation(backbone, views, head=ProjectionHead(norm_last_layer=False),
    **SelfDistillation.PAPER)` has its head, and its constants, which are the first values of its
    schedules. In small convolutional networks, untrained features of different images
    are nearly the same vector. Without standardization they need a temperature, momentum and
    learning rate that suit the backbone, or the center cancels what little tells images apart and
    all outputs become uniform.

    Calling the model gives the teacher backbone's features. Training batches are images
    `(B, H, W, 3)`, uint8 or float in 0-255, or, where `negatives` needs auxiliary images, a
    dictionary `{"images": ..., "auxiliary": ...}` as from `data.with_auxiliary`.

    Where an argument may be a *schedule*, it is a number or a
    `keras.optimizers.schedules.LearningRateSchedule` of the training step, see `schedules`.

    Weight regularizers of the student's layers, such as `kernel_regularizer`, add to the loss;
    `activity_regularizer` and `add_loss` are refused.

    Under a distribution strategy, build the model (its backbone, head and optimizer too) and
    compile it within `strategy.scope()`; batches are global, and so are losses, center and logs.
    Where the optimizer has `gradient_accumulation_steps`, on one device, a step is still a batch,
    as it is for Keras' learning rate schedules; the teacher moves and weights decay only when the
    optimizer updates.

    Args:
        backbone: Any Keras model from normalized images `(B, h, w, 3)` to features `(B, D)` that
            takes the sizes of all views. It becomes the student's; the teacher's is a copy, so load
            initial weights first.
        views: `MultiCrop`.
        negatives: `Negatives`, or `None` to train by self-distillation alone.
        head: `ProjectionHead` of the student. Defaults to one that suits small data: 1024
            prototypes, a hidden layer of 512 and a bottleneck of 128. Its own defaults are of the
            paper's sizes.
        student_temperature: Float.
        teacher_temperature: Schedule, or `None` for balanced targets and standardized features.
        teacher_momentum: Schedule; the share of the teacher that stays at each step. Defaults to
            `schedules.GrowingMomentum(0.996)`.
        center_momentum: Float; the share of the center that stays at each step. Balanced targets
            need no center.
        negative_weight: Schedule; lambda, the weight of the negative term. `None` lets it follow
            the positive loss: 0 until the student has an opinion, then 1, see
            `losses.negative_onset`.
        weight_decay: Schedule of the decoupled weight decay of all tensors but biases and
            normalizations, or `None` for the optimizer's own `weight_decay`, from which those are
            exempt too: see `compile`.
        gradient_clip_norm: Largest norm of each tensor's gradient, or `None`.
        frozen_last_layer_steps: Steps for which the head's last layer does not move.
        mean: Mean of each channel of images scaled to 0-1, for normalization.
        std: Standard deviation of each channel of images scaled to 0-1.
        seed: Integer; fixes the views and negatives of every step.

    Logs:
        `loss`, `positive_loss`, `negative_loss`, `negative_weight`; `teacher_entropy`, the mean
        entropy of the teacher's outputs relative to `ln K` (1: uniform, 0: one-hot);
        `mean_output_entropy`, that of their mean over the batch (0: one prototype for all images);
        `feature_std`, the standard deviation of the teacher's normalized features over the batch,
        relative to that of isotropic features (0: all images look alike); `teacher_spread`, the
        standard deviation of the teacher's logits over the batch; `learning_rate`;
        `teacher_momentum`.

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

    PAPER = types.MappingProxyType(
        {"teacher_temperature": 0.04, "teacher_momentum": 0.996, "negative_weight": 1.0}
    )

    train_function: Any  # Keras'

    def __init__(
        self,
        backbone: keras.Model,
        views: MultiCrop,
        negatives: Any = None,
        head: keras.Model | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: Any = None,
        teacher_momentum: Any = None,
        center_momentum: float = 0.9,
        negative_weight: Any = None,
        weight_decay: Any = None,
        gradient_clip_norm: float | None = 3.0,
        frozen_last_layer_steps: int = 0,
        mean: Sequence[float] = image_ops.IMAGENET_MEAN,
        std: Sequence[float] = image_ops.IMAGENET_STD,
        seed: int = 0,
        **kwargs,
    ) -> None:
        # Images in 0-255 would lose their last bits if Keras cast them to the global policy.
        super().__init__(**{"autocast": False, **kwargs})
        # Keras stores a strategy only if there is one, and otherwise uses the current one.
        self._built_under = tf.distribute.get_strategy()
        replicas.number_apart(self._built_under)
        for layer in (backbone, head):
            networks.check_scope(layer)
        _check_views(views, negatives)
        feature_dim = networks.check_backbone(backbone, views.sizes)
        if negatives is not None:
            shifts.check_sides(negatives.shift, views.sizes)
        if backbone.weights and not backbone.trainable_weights:
            raise ValueError(
                "`backbone` must have weights to train. A teacher is saved frozen: to go on from "
                "one, set `backbone.trainable = False`, then `backbone.trainable = True`, which "
                "Keras ignores in a Sequential that was loaded. Received: "
                f"{len(backbone.weights)} weights, none of them trainable"
            )
        validation.check_number("student_temperature", student_temperature, above=0.0)
        validation.check_number("center_momentum", center_momentum, 0.0, 1.0)
        validation.check_int("frozen_last_layer_steps", frozen_last_layer_steps, low=0)
        if frozen_last_layer_steps and head is not None and not hasattr(head, "last_layer"):
            raise ValueError(
                "`frozen_last_layer_steps` takes a head with a `last_layer`, such as a "
                f"ProjectionHead. Received: head={head}"
            )
        validation.check_int("seed", seed, low=-(2**31), high=2**31 - 1)
        if gradient_clip_norm is not None:
            validation.check_number("gradient_clip_norm", gradient_clip_norm, above=0.0)
        self.views = views
        self.negatives = negatives
        self.student_temperature = student_temperature
        self.teacher_temperature = _schedule("teacher_temperature", teacher_temperature, above=0.0)
        if teacher_momentum is None:
            teacher_momentum = schedules.GrowingMomentum(0.996)
        self.teacher_momentum = _schedule("teacher_momentum", teacher_momentum, 0.0, 1.0)
        self.center_momentum = center_momentum
        self.negative_weight = _schedule("negative_weight", negative_weight, 0.0)
        self.weight_decay = _schedule("weight_decay", weight_decay, 0.0)
        self.gradient_clip_norm = gradient_clip_norm
        self.frozen_last_layer_steps = frozen_last_layer_steps
        self.mean = validation.check_numbers("mean", mean, 3)
        self.std = validation.check_numbers("std", std, 3, above=0.0)
        self.seed = seed

        self.student_backbone = backbone
        self.student_head = head or ProjectionHead(1024, hidden_dim=512, bottleneck_dim=128)
        num_prototypes = networks.check_head(self.student_head, feature_dim)
        networks.check_float32(backbone, self.student_head)
        size = views.image_size
        self.teacher_backbone = networks.copy_of(backbone, (size, size, 3), trainable=False)
        self.teacher_head = networks.copy_of(self.student_head, (feature_dim,), trainable=False)
        networks.weight_losses(self.student_backbone, self.student_head)  # Refuses other losses.
        if self.standardizes_features:
            networks.remember_standardized(self.teacher_backbone)
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
        self._has_warned = False
        self._trackers = {name: keras.metrics.Mean(name) for name in _LOGGED}
        self.built = True

    def call(self, images: Array) -> tf.Tensor:
        """Return features of the teacher backbone, L2-normalized.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`; resized to the global views' size.

        Returns:
            Float32 `(B, D)`.
        """
        images = validation.check_images(images)
        images = image_ops.resize(images, self.views.image_size, self.views.image_size)
        network = functools.partial(self.teacher_backbone, training=False)
        features = replicas.applied(network, self._normalize(images))
        return tf.math.l2_normalize(tf.cast(features, tf.float32), axis=-1)

    def compile(self, optimizer: Any, **kwargs) -> None:
        """Choose the optimizer; the losses are the model's own.

        Weight decay never acts on biases and normalizations, the 1-D tensors, whether it is the
        optimizer's or the model's `weight_decay` schedule. It acts on the last layer's gain if that
        is trained, as in the authors' code, where the gain is a matrix of one column. What
        `optimizer.exclude_from_weight_decay` was told before is excluded too; files do not keep it.

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
        self._check_scope("compiled")
        super().compile(optimizer=optimizer, **kwargs)
        replicas_in_sync = self._built_under.num_replicas_in_sync
        has_schedule = self.weight_decay is not None
        optimization.check_optimizer(self.optimizer, replicas_in_sync, has_schedule)
        optimization.build(self.optimizer, self.trainable_variables, self._is_decayed)

    def _check_scope(self, done):
        """Raise a `ValueError` in the scope of another strategy than the model was built in."""
        here = tf.distribute.get_strategy()
        if here is not self._built_under:
            raise ValueError(
                f"The model must be built and {done} within the same `strategy.scope()`. "
                f"Received: built under {networks.describe_strategy(self._built_under)}, "
                f"{done} under {networks.describe_strategy(here)}"
            )

    def _refuse_replicas(self, instead):
        """Raise a `ValueError` on several replicas, each of which would get the whole batch."""
        if self._built_under.num_replicas_in_sync > 1:
            raise ValueError(
                f"Use `{instead}` on several replicas: Keras gives each of them the whole of a "
                "single batch, so that results would be others than on one device. "
                f"Received: {networks.describe_strategy(self._built_under)}"
            )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a loaded model as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Build nothing: all is built, and Keras' way to get a batch fails for dictionaries.

        Under `MultiWorkerMirroredStrategy` it would reduce the dictionary as if it were a tensor.
        """

    def make_train_function(self, force: bool = False) -> None:
        """`keras.Model.make_train_function`, whose first call warns if batches are small.

        Where the size of batches is not static, only then it is known.
        """
        super().make_train_function(force=force)
        train_function = self.train_function

        def first_call(iterator):
            before = self._steps_and_images()
            logs = train_function(iterator)
            steps, images = self._steps_and_images() - before
            if steps:
                self._warn_of_a_small_batch(round(images / steps))
            self.train_function = train_function
            return logs

        if not self._has_warned:
            self.train_function = first_call

    def _steps_and_images(self):
        """Return how many steps and images there were since the start of the epoch."""
        step, images = (
            np.asarray(tf.convert_to_tensor(variable.value))
            for variable in (self.step, self._trackers["loss"].count)
        )
        # Each replica counts the whole batch.
        return np.array([step, images / self.distribute_strategy.num_replicas_in_sync])

    def fit(
        self,
        x: Array | None = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[Any, float] | None = None,
        sample_weight: Any = None,
        **kwargs,
    ) -> keras.callbacks.History:
        """`keras.Model.fit` on unlabeled images.

        Args:
            x: Images `(N, H, W, 3)`, uint8 or float in 0-255, or a list of images of one size;
                where `negatives` needs auxiliary images, a dictionary with the keys `"images"` and
                `"auxiliary"`, which are repeated if there are fewer. Or batches of either: a
                `tf.data.Dataset`, a generator or a `keras.utils.PyDataset`.
            y: None: there are no labels.
            batch_size: As in Keras.
            epochs: As in Keras.
            verbose: As in Keras.
            callbacks: As in Keras.
            validation_split: As in Keras.
            validation_data: Like `x`.
            shuffle: As in Keras.
            class_weight: None: there are no classes.
            sample_weight: None.
            **kwargs: As in Keras.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: If `x` is not images in 0-255, or labels are passed.
        """
        batches.refuse_labels(y=y, class_weight=class_weight, sample_weight=sample_weight)
        if tf.distribute.has_strategy():  # Outside of any scope, Keras enters the model's own.
            self._check_scope("trained")
        x = image_source(x, "x", trains=True)
        shuffle = shuffle and can_be_shuffled(x)
        if validation_data is not None:
            validation_data = (validation_source(validation_data),)
        try:
            return super().fit(
                x,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                **kwargs,
            )
        finally:
            # Keras tells callbacks about the end, not about errors.
            for callback in tf.nest.flatten(getattr(callbacks, "callbacks", callbacks) or []):
                if hasattr(callback, "release"):
                    callback.release()

    def evaluate(
        self, x: Array | None = None, y: Any = None, *args, sample_weight: Any = None, **kwargs
    ) -> Any:
        """`keras.Model.evaluate` on unlabeled images, as for `fit`."""
        if not kwargs.get("_use_cached_eval_dataset"):  # `fit` has checked its validation data.
            batches.refuse_labels(y=y, sample_weight=sample_weight)
            x = image_source(x, "x", trains=True)
        return super().evaluate(x, None, *args, **kwargs)

    def predict(self, x: Array, *args, **kwargs) -> np.ndarray:
        """`keras.Model.predict`: features `(N, D)` of a whole set of images."""
        return super().predict(image_source(x, "x", allow_nan=True), *args, **kwargs)

    def predict_on_batch(self, x: Array) -> np.ndarray:
        """`keras.Model.predict_on_batch`: features `(B, D)` of one batch of images."""
        return super().predict_on_batch(validation.image_array(x, "x", allow_nan=True))

    def train_on_batch(
        self,
        x: Array,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict[Any, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """`keras.Model.train_on_batch` on one batch, as for `fit`."""
        batches.refuse_labels(y=y, sample_weight=sample_weight, class_weight=class_weight)
        self._refuse_replicas("fit")
        return super().train_on_batch(image_batch(x), return_dict=return_dict)

    def test_on_batch(
        self, x: Array, y: Any = None, sample_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """`keras.Model.test_on_batch` on one batch, as for `fit`."""
        batches.refuse_labels(y=y, sample_weight=sample_weight)
        self._refuse_replicas("evaluate")
        return super().test_on_batch(image_batch(x), return_dict=return_dict)

    def save(self, filepath: str | os.PathLike, *args, **kwargs) -> None:
        """`keras.Model.save`, whole or not at all: a failed save leaves what was there."""
        files.save_keras(super().save, filepath, *args, **kwargs)

    def export(self, filepath: str | os.PathLike, *args, **kwargs) -> None:
        """Refuse `keras.Model.export`: what is served is a detector."""
        raise ValueError(
            "A SelfDistillation is not exported: make a Detector from its `teacher_backbone`, and "
            "call `sddns_tf.export.saved_model(detector, folder)`, or export the backbone itself. "
            f"Received: filepath={str(filepath)!r}"
        )

    @tracing.repeats_once()
    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Train on one batch: the algorithm of the paper."""
        images, auxiliary, part = batches.unpack(data, self.negatives)
        views, negatives = self._draw(images, auxiliary, part)

        teacher_features, teacher_logits = self._teacher_outputs(views[0], part, training=True)
        targets = self._targets(teacher_logits, part)
        with tf.GradientTape() as tape:
            positive_logits, negative_logits = self._student_logits(
                views, negatives, part, training=True
            )
            terms = self._loss_terms(targets, positive_logits, negative_logits, part)
            scaled_loss = self.optimizer.scale_loss(part.share(terms["loss"]))
        # Read before the update, after which it is that of the next step.
        learning_rate = tf.cast(self.optimizer.learning_rate, tf.float32)
        student_moves = self._update_student(self._gradients(tape, scaled_loss, part))
        self._update_teacher(student_moves)
        logs = self._update_trackers(terms, teacher_features, teacher_logits, targets, part)
        self._update_center(teacher_logits, part)

        logs["learning_rate"] = learning_rate
        logs["teacher_momentum"] = self.teacher_momentum(self.step)
        self.step.assign_add(1)
        return _as_keras_reduces(logs)

    @tracing.repeats_once()
    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Compute the same losses on held-out images, without any update.

        The step does not change meanwhile, so images in the same place of their batches are cropped
        and shifted alike.
        """
        images, auxiliary, part = batches.unpack(data, self.negatives)
        views, negatives = self._draw(images, auxiliary, part)
        teacher_features, teacher_logits = self._teacher_outputs(views[0], part, training=False)
        targets = self._targets(teacher_logits, part)
        positive_logits, negative_logits = self._student_logits(
            views, negatives, part, training=False
        )
        terms = self._loss_terms(targets, positive_logits, negative_logits, part)
        logs = self._update_trackers(terms, teacher_features, teacher_logits, targets, part)
        return _as_keras_reduces(logs)

    def _draw(self, images, auxiliary, part):
        """Draw views and negatives, fixed by seed, step and place in the global batch."""
        seed = tf.stack([self.seed, tf.convert_to_tensor(self.step)])
        view_seed, negative_seed = tf.unstack(tf.random.split(seed, 2))
        with replicas.holding(part):
            views = self.views(images, view_seed)
            if self.negatives is None:
                return views, None
            return views, self.negatives(self.views, images, auxiliary, negative_seed)

    def _normalize(self, images):
        return image_ops.normalize(images, self.mean, self.std)

    def _teacher_outputs(self, global_views, part, training):
        """Return features `(G, B, D)` and logits `(G, B, K)` of the positive global views."""
        if training and self._norms:
            # Its moving statistics follow its own batches, as DINO's teacher's do.
            momentum = _STATISTICS_MOMENTUM(self.step)
            with networks.normalizing_by_batch(self.teacher_backbone, self._norms, part, momentum):
                features = self._features(self.teacher_backbone, global_views, training=True)
        else:
            features = self._features(self.teacher_backbone, global_views, training=False)
        inputs = self._head_inputs(features, features, part)
        return features, networks.projected(self.teacher_head, inputs, training=False)

    def _targets(self, teacher_logits, part):
        """Return the student's targets for other views of the same images, `(G, B, K)`."""
        if self.teacher_temperature is None:
            return losses.balanced_probabilities(teacher_logits, global_mean=part.mean)
        temperature = self.teacher_temperature(self.step)
        return losses.teacher_probabilities(teacher_logits, self.center, temperature)

    def _student_logits(self, views, negatives, part, training):
        """Return logits of all positive views `(V, B, K)` and all negatives `(N, B, K)`.

        All views of one size go through the backbone in one call, all features through the head
        in one.
        """
        if negatives is None:
            features = self._student_features(views, training, part)
            inputs = self._head_inputs(features, features, part)
            return networks.projected(self.student_head, inputs, training), None
        positive, negative = self._positive_and_negative_features(views, negatives, part, training)
        inputs = self._head_inputs(tf.concat([positive, negative], axis=0), positive, part)
        logits = networks.projected(self.student_head, inputs, training)
        return tf.split(logits, [positive.shape[0], negative.shape[0]])

    def _positive_and_negative_features(self, views, negatives, part, training):
        """Return features `(V, B, D)` and `(N, B, D)`.

        If the backbone has batch statistics, negatives go through it separately and leave the
        moving statistics as the positives made them.
        """
        if self._norms:
            positive = self._student_features(views, training, part)
            return positive, self._student_features(negatives, training, part=None)
        pairs = []
        for pair in zip(views, negatives, strict=True):
            features = self._features(self.student_backbone, tf.concat(pair, axis=0), training)
            pairs.append(tf.split(features, [group.shape[0] for group in pair]))
        positive, negative = zip(*pairs, strict=True)
        return tf.concat(positive, axis=0), tf.concat(negative, axis=0)

    def _student_features(self, groups, training, part):
        """Return features `(V, B, D)` of all views of all groups.

        Moving statistics follow the images of `part`, or stay as they were if it is None.
        """
        with networks.moving_statistics_of(self.student_backbone, part):
            features = [self._features(self.student_backbone, group, training) for group in groups]
        return tf.concat(features, axis=0)

    def _head_inputs(self, features, positive, part):
        """Return a head's inputs: features standardized by the moments of the positive views."""
        if not self.standardizes_features:
            return features
        return losses.standardized(features, losses.batch_moments(positive, part.mean))

    def _features(self, backbone, group, training):
        """Return features `(V, B, D)` of a group of views `(V, B, h, w, 3)`."""
        images = self._normalize(tf.reshape(group, [-1, *group.shape[2:]]))
        features = backbone(images, training=training)
        return tf.reshape(features, [group.shape[0], -1, features.shape[-1]])

    def _loss_terms(self, targets, positive_logits, negative_logits, part):
        positive = losses.cross_entropy(targets, positive_logits, self.student_temperature)
        terms = {"positive_loss": positive}
        penalties = networks.weight_losses(self.student_backbone, self.student_head)
        if negative_logits is None:
            total = sum(penalties, start=positive)
            return {**terms, "loss": total, "negative_loss": 0.0, "negative_weight": 0.0}
        negative = losses.uniformity_loss(negative_logits, self.student_temperature)
        if self.negative_weight is None:
            weight = losses.negative_onset(part.mean(positive), positive_logits.shape[-1])
        else:
            weight = self.negative_weight(self.step)
        total = sum(penalties, start=positive + weight * negative)
        return {**terms, "loss": total, "negative_loss": negative, "negative_weight": weight}

    def _gradients(self, tape, loss, part):
        """Return gradients of the global batch's mean loss, given this replica's share of the loss.

        They are zero for variables that the loss does not depend on.
        """
        sources = [variable.value for variable in self.trainable_variables]
        gradients = tape.gradient(loss, sources, unconnected_gradients="zero")
        return part.mean_of_shares(gradients)

    def _update_student(self, gradients):
        """Clip each tensor's gradient, decay weights, and let the optimizer move the student.

        Returns:
            Whether the student moves: not while gradients accumulate, nor if they overflowed.
        """
        if self.gradient_clip_norm is not None:
            gradients = optimization.clipped(self.optimizer, gradients, self.gradient_clip_norm)
        moves = optimization.will_move(self.optimizer, gradients)
        variables = self.trainable_variables
        frozen = self.student_head.last_layer.weights if self.frozen_last_layer_steps else []
        with optimization.frozen(frozen, self.step < self.frozen_last_layer_steps):
            if self.weight_decay is not None:
                share = self.weight_decay(self.step) * self.optimizer.learning_rate
                decayed = [variable for variable in variables if self._is_decayed(variable)]
                optimization.decay(decayed, tf.where(moves, share, 0.0))
            optimization.move(self.optimizer, gradients, variables)
        return moves

    def _is_decayed(self, variable):
        gain = getattr(getattr(self.student_head, "last_layer", None), "gain", None)
        return len(variable.shape) > 1 or variable is gain

    def _update_teacher(self, student_moves):
        """If the student moved, move every float of the teacher toward it.

        Its batch statistics are left out; they follow its own batches: see `_teacher_outputs`.
        """
        share = tf.where(student_moves, 1.0 - self.teacher_momentum(self.step), 0.0)
        own = {id(variable) for variable in networks.moving_statistics(self._norms)}
        for student, teacher in (
            (self.student_backbone, self.teacher_backbone),
            (self.student_head, self.teacher_head),
        ):
            for source, target in zip(student.weights, teacher.weights, strict=True):
                if keras.backend.is_float_dtype(source.dtype) and id(target) not in own:
                    target.value.assign_sub(share * (target.value - source.value))

    def _update_center(self, teacher_logits, part):
        if (held := teacher_logits.shape[1]) is not None:
            count = tf.distribute.get_replica_context().num_replicas_in_sync
            self._warn_of_a_small_batch(held * count)
        if self.teacher_temperature is None:
            return
        center = losses.updated_center(self.center, teacher_logits, self.center_momentum)
        self.center.assign(part.mean(center))

    def _warn_of_a_small_batch(self, images):
        if images < _SMALLEST_BATCH and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"DINO needs batches of at least {_SMALLEST_BATCH} images, better hundreds: the "
                "center and the balanced targets depend on the whole batch, and "
                "accumulating gradients does not change that. "
                f"Received: a batch of {images} images",
                stacklevel=2,
            )

    def _update_trackers(self, terms, teacher_features, teacher_logits, targets, part):
        values = {name: tf.convert_to_tensor(value) for name, value in terms.items()}
        values["teacher_entropy"] = tf.reduce_mean(losses.relative_entropy(targets))
        values = part.mean(values)
        values["mean_output_entropy"] = losses.relative_entropy(
            part.mean(tf.reduce_mean(targets, axis=[0, 1]))
        )
        values["feature_std"] = losses.relative_spread(teacher_features, part.mean)
        values["teacher_spread"] = losses.spread(teacher_logits, part.mean)
        images = tf.cast(part.total, tf.float32)
        for name, tracker in self._trackers.items():
            tracker.update_state(values[name], sample_weight=images)
        return {name: tracker.result() for name, tracker in self._trackers.items()}

    @property
    def trainable(self) -> bool:
        """Whether the student is trained. The teacher only follows it and stays frozen."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.fset(self, value)
        for teacher in (self.teacher_backbone, self.teacher_head):
            teacher.trainable = False

    @property
    def _norms(self):
        """The teacher's batch normalizations that follow its own batches, as of now."""
        return networks.trained_batch_norms(self.student_backbone, self.teacher_backbone)

    @property
    def standardizes_features(self) -> bool:
        """Whether the heads see features standardized by the batch: with balanced targets.

        Then a detector of its teacher should compare them so too:
        `Detector.from_images(..., standardize=model.standardizes_features)`.
        """
        return self.teacher_temperature is None

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Running means of what is logged; reset at each epoch."""
        return list(self._trackers.values())

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments, and which layers of the student are frozen."""
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
            # The networks' own configurations say this of their outermost layer only.
            "frozen": freezing.frozen_layers(self.student_backbone, self.student_head),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the model that `get_config` describes, with new weights."""
        parts = ("backbone", "views", "negatives", "head")
        objects = {name: keras.saving.deserialize_keras_object(config[name]) for name in parts}
        arguments = {**config, **objects}
        frozen = arguments.pop("frozen", None)  # Older files lack it.
        with freezing.thawed(objects["backbone"]):
            model = cls(**arguments)
        if frozen is not None:
            freezing.freeze_layers(frozen, model.student_backbone, model.student_head)
        return model


def _as_keras_reduces(logs):
    """Add an axis to logs on several machines: Keras averages over one, which scalars lack."""
    resolver = getattr(tf.distribute.get_strategy(), "cluster_resolver", None)
    if resolver is None or not resolver.cluster_spec().as_dict():
        return logs
    return {name: tf.reshape(value, [1]) for name, value in logs.items()}


def _schedule(name, value, low=None, high=None, above=None):
    """Return a schedule from what was passed for an argument, or None; a number is checked."""
    if value is None:
        return None
    if not isinstance(value, (dict, keras.optimizers.schedules.LearningRateSchedule)):
        validation.check_number(name, value, low, high, above=above)
    return schedules.get(value)


def _check_views(views, negatives):
    """Raise a `ValueError` unless `views` is like `MultiCrop`."""
    needed = ["image_size", "sizes", *(["negative"] if negatives is not None else [])]
    missing = [name for name in needed if not hasattr(views, name)]
    if missing or not callable(views):
        raise ValueError(
            "`views` must be a MultiCrop, or a callable (images, seed) with the attributes "
            f"{', '.join(needed)}. Received: views={views!r}"
        )
