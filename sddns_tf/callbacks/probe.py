"""`OODProbe`: measures every few epochs how well scores separate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from sddns_tf import building, metrics, shifts
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.shifts import name_of
from sddns_tf.types import Array
from sddns_tf.validation import check_int, image_array


@keras.saving.register_keras_serializable("sddns_tf")
class OODProbe(keras.callbacks.Callback):
    """Measures every few epochs how well the teacher's score separates normal images from others.

    Held-out in-distribution images are scored against the same images put through each shift
    (this needs no OOD data) and against any OOD sets given. The AUROCs go into the logs as
    `auroc_<name>`, so that `History`, `CSVLogger` and `TensorBoard` record them; put the probe
    before those in the list of callbacks. Of images that are not square, or whose side no grid of
    patches divides, the central square is used, of all sets alike.

    Args:
        bank_images: In-distribution training images `(M, H, W, 3)`, uint8 or float in 0-255; a few
            thousand are enough.
        held_out: In-distribution images that are not trained on, `(N, H, W, 3)`.
        shifts: Names, or callables: see `shifts.get`.
        ood: Dictionary from names to OOD images `(N', H', W', 3)`.
        every: Epochs between two measurements. The first epoch of each `fit` is always measured,
            because log files take their columns from it.
        batch_size: Images per forward pass.

    Example:
        >>> probe = OODProbe(train[:2000], held_out, shifts=("rot90", "perm4"), every=5)
        >>> history = model.fit(batches, epochs=50, callbacks=[probe])
        >>> history.history["auroc_rot90"]
    """

    def __init__(
        self,
        bank_images: Array,
        held_out: Any,
        shifts: Sequence[str | Callable] = ("rot90", "perm4"),
        ood: Any = None,
        every: int = 1,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_int("every", every)
        check_int("batch_size", batch_size)
        self.bank_images = image_array(bank_images, "bank_images")
        self.held_out = image_array(held_out, "held_out")
        self.shifts = (shifts,) if isinstance(shifts, str) else tuple(shifts)
        self.ood = {name: image_array(x, f"ood[{name!r}]") for name, x in (ood or {}).items()}
        self.every = every
        self.batch_size = batch_size
        names = [*self.ood, *map(name_of, self.shifts)]
        if len(set(names)) < len(names):
            raise ValueError(
                "`shifts` and `ood` must have names of their own, by which they are logged. "
                f"Received: {', '.join(names)}"
            )

    def on_train_begin(self, logs: Any = None) -> None:
        """Shift the held-out images once, so that every epoch is measured on the same ones."""
        del logs
        self._is_first = True
        central = shifts.central_squares
        self._bank, self._normal = central(self.bank_images), central(self.held_out)
        self._sets = {name: central(images) for name, images in self.ood.items()}
        for index, shift in enumerate(self.shifts):
            name = shifts.name_of(shift)
            shifted = shifts.get(shift)(tf.convert_to_tensor(self._normal), [index, 0])
            self._sets[name] = shifted.numpy()
        self._extractor = FeatureExtractor(
            self.model.teacher_backbone,
            image_size=self.model.views.image_size,
            resolution=self._bank.shape[1:3],
            mean=self.model.mean,
            std=self.model.std,
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Measure, and add the AUROCs to the logs."""
        if epoch % self.every and not self._is_first:
            return
        self._is_first = False
        normal, *others = building.scores_against(
            self._features(self._bank),
            [self._features(images) for images in (self._normal, *self._sets.values())],
            standardize=self.model.standardizes_features,
        )
        for name, scores in zip(self._sets, others, strict=True):
            logs[f"auroc_{name}"] = metrics.ood_metrics(normal, scores)["auroc"]

    def _features(self, images):
        return extract_features(self._extractor, images, batch_size=self.batch_size, verbose=0)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "bank_images": self.bank_images,
            "held_out": self.held_out,
            "shifts": self.shifts,
            "ood": self.ood,
            "every": self.every,
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the callback that `get_config` describes."""
        return cls(**keras.saving.deserialize_keras_object(config))
