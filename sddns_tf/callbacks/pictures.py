"""Pictures of the training for TensorBoard: what the network sees, and how scores separate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import building, plots, shifts
from sddns_tf.callbacks import training_state
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.types import Array
from sddns_tf.validation import check_int, image_array


@keras.saving.register_keras_serializable("sddns_tf")
class TrainingPictures(keras.callbacks.Callback):
    """Writes pictures alongside the scalars of `keras.callbacks.TensorBoard`.

    At the start: the views of some images, and the negatives. Every few epochs: histograms
    of the scores of held-out images against those of the same images put through a shift, which
    needs no OOD data.

    Args:
        log_dir: Folder of the event files, the same as for `keras.callbacks.TensorBoard`.
        bank_images: In-distribution training images `(M, H, W, 3)`, uint8 or float in 0-255; a
            thousand are enough.
        held_out: In-distribution images that are not trained on, `(N, H, W, 3)`. Of these and of
            the bank's, the central squares are compared.
        auxiliary: Auxiliary images `(B, H', W', 3)`, to show the negatives of up to eight; `None`
            if there are none.
        every: Epochs between histograms, starting with the first epoch.
        shift: Name, or a callable: see `shifts.get`.

    Example:
        >>> pictures = TrainingPictures("logs", train[:1000], held_out[:500], every=5)
        >>> model.fit(batches, callbacks=[pictures, keras.callbacks.TensorBoard("logs")])
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        bank_images: Array,
        held_out: Any,
        auxiliary: Array | None = None,
        every: int = 5,
        shift: str | Callable = "rot90",
    ) -> None:
        super().__init__()
        self.log_dir = os.path.expanduser(log_dir)
        self._writer: Any = None
        check_int("every", every)
        self.bank_images = image_array(bank_images, "bank_images")
        self.held_out = image_array(held_out, "held_out")
        self.auxiliary = None if auxiliary is None else image_array(auxiliary, "auxiliary")
        self.every = every
        self.shift = shift

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the event file, write the views, and shift the held-out images once."""
        del logs
        self._writer = tf.summary.create_file_writer(f"{self.log_dir}/pictures")
        squares = shifts.central_squares(self.held_out)
        self._bank = shifts.central_squares(self.bank_images)
        self._sets = squares, shifts.get(self.shift)(tf.constant(squares), [0, 0]).numpy()
        self._extractor = FeatureExtractor(
            self.model.teacher_backbone,
            image_size=self.model.views.image_size,
            resolution=squares.shape[1:3],
            mean=self.model.mean,
            std=self.model.std,
        )
        if training_state.step_of(self.model) == 0:
            self._show_views()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Every few epochs, write how well scores separate."""
        del logs
        if epoch % self.every:
            return
        normal, shifted = building.scores_against(
            self._features(self._bank),
            [self._features(images) for images in self._sets],
            standardize=self.model.standardizes_features,
        )
        name = shifts.name_of(self.shift)
        with self._writer.as_default(step=epoch):
            tf.summary.histogram("scores/held_out", normal)
            tf.summary.histogram(f"scores/{name}", shifted)
            self._show("separation", plots.score_histograms(normal, {name: shifted}))
        self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the event file."""
        del logs
        self.release()

    def release(self) -> None:
        """Close the event file. `fit` calls this, whether it succeeds or fails."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _features(self, images):
        return extract_features(self._extractor, images, verbose=0)

    def _show_views(self):
        images, negatives = tf.constant(self.bank_images[:8]), self.model.negatives
        groups = {"views": self.model.views(images, [0, 0])}
        if negatives is not None and (self.auxiliary is not None or not negatives.needs_auxiliary):
            auxiliary = self.auxiliary[: len(images)] if negatives.needs_auxiliary else None
            alike = images if auxiliary is None else images[: len(auxiliary)]
            groups["negatives"] = negatives(self.model.views, alike, auxiliary, [0, 1])
        with self._writer.as_default(step=0):
            for name, group in groups.items():
                for views in group:
                    # Of dark images, too, which a contact sheet takes for images in 0-1.
                    sheet = np.concatenate(np.asarray(views), axis=0)
                    sheet = np.clip(np.round(sheet), 0, 255).astype(np.uint8)
                    title = f"{name} of {views.shape[2]} px"
                    self._show(title, plots.contact_sheet(sheet, columns=8, title=title))
        self._writer.flush()

    def _show(self, name, figure):
        tf.summary.image(name, _pixels(figure)[np.newaxis])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "log_dir": self.log_dir,
            "bank_images": self.bank_images,
            "held_out": self.held_out,
            "auxiliary": self.auxiliary,
            "every": self.every,
            "shift": self.shift,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the callback that `get_config` describes."""
        return cls(**keras.saving.deserialize_keras_object(config))


def _pixels(figure):
    """Return a figure as uint8 `(H, W, 4)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
