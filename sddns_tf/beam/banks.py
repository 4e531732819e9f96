"""Banks from any number of images on any number of machines: a coreset of coresets.

Features are compressed as they arrive, and compressed banks of equal rank are merged in pairs, like
carries in a binary counter. So no feature is compressed more than about log2(n / rows at once)
times, for n features. Each center records how far the features that it stands for may lie from it,
which bounds the error of a score without the whole bank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference

from sddns_tf import bank, pictures
from sddns_tf.beam.reading import File, Unreadable
from sddns_tf.types import Array
from sddns_tf.validation import check_choice, check_int, check_number


class Bank(NamedTuple):
    """A compressed bank.

    Attributes:
        features: Centers, float32 `(M, D)`, with cosines of L2 norm 1.
        weights: Float32 `(M,)`: each center's share of the features. They sum to 1.
        radius: Float32 `(M,)`: largest distance of a center from a feature that it stands for.
        total: Number of features that were compressed.
        metric: `"cosine"` or `"euclidean"`: see `bank.ood_score`.
    """

    features: np.ndarray
    weights: np.ndarray
    radius: np.ndarray
    total: int
    metric: str = "cosine"

    def score_error(self, temperature: float = 0.04) -> float:
        """Return how much a score may differ from the score over the whole bank, for any image.

        A feature f of norm 1 has `|f b - f c| <= |b - c|`, so each term of the score changes by a
        factor between `exp(-r / temperature)` and `exp(r / temperature)`, where r is the largest
        radius, and so does their mean. This is the worst case: differences measured in
        docs/scaling.md are some forty times smaller.

        Args:
            temperature: Positive float, the temperature of the score.

        Returns:
            Float, the largest radius over the temperature. It holds for scores over the whole bank
            but not for scores over the `k` nearest rows.

        Raises:
            ValueError: If the metric is not `"cosine"`: with distances the error grows with the
                image's own distance, so no number holds for any image.
        """
        if self.metric != "cosine":
            raise ValueError(
                "Only a bank of L2-normalized features bounds the error for any image. "
                f"Received: a bank with metric={self.metric!r}"
            )
        check_number("temperature", temperature, above=0.0)
        return float(self.radius.max()) / temperature


class BankSketch:
    """A bank that is compressed as features arrive, and can be merged with others.

    Args:
        size: Largest number of centers in the final bank. Until then it keeps twice as many for
            each doubling of the number of features.
        method: `"kmeans"` or `"kcenter"`: see `bank.compress`.
        seed: Int, seed of the compression.
        metric: How the score compares features: `extractor.metric`.

    Raises:
        ValueError: From `add`, if features are not finite, or those to compare by cosines do not
            have L2 norm 1.

    Example:
    >>> sketch = BankSketch(size=1000, metric=extractor.metric)
    >>> for features in stream_features(extractor, images):
    ...     sketch.add(features)
    >>> bank = sketch.bank()
    >>> detector = Detector.from_features(
    ...     extractor, bank.features, calibration_features, bank_weights=bank.weights
    ... )

    References:
        Har-Peled and Mazumdar, "On coresets for k-means and k-median clustering", 2004, section 7
        (a coreset of a union of coresets); Bentley and Saxe, "Decomposable searching problems",
        1980 (carrying).
    """

    def __init__(
        self, size: int, method: str = "kmeans", seed: int = 0, *, metric: str = "cosine"
    ) -> None:
        check_int("size", size)
        check_choice("method", method, bank.METHODS)
        check_int("seed", seed, low=0, high=2**32 - 1)
        check_choice("metric", metric, bank.METRICS)
        self._size, self._method, self._seed, self._metric = size, method, seed, metric
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._levels: dict[int, _Part] = {}

    @property
    def rows_at_once(self) -> int:
        """Number of features that are compressed together."""
        return 8 * self._size

    def add(self, features: Array) -> None:
        """Add features.

        Args:
            features: As the extractor gives them, float `(D,)` or `(N, D)`.
        """
        rows = np.atleast_2d(np.asarray(features, np.float32))
        if bad := np.count_nonzero(~np.isfinite(rows).all(axis=1)):
            raise ValueError(
                f"Features must be finite. Received: {bad} of {len(rows)} that are not"
            )
        if self._metric == "cosine":
            _check_norms(rows)
        self._pending.append(rows)
        self._pending_rows += len(rows)
        while self._pending_rows >= self.rows_at_once:
            rows = np.concatenate(self._pending)
            self._carry(0, self._compressed(_raw(rows[: self.rows_at_once]), 2 * self._size))
            self._pending = [rows[self.rows_at_once :]]
            self._pending_rows = len(self._pending[0])

    def merge(self, other: BankSketch) -> None:
        """Add the contents of another sketch with the same arguments."""
        for rows in other._pending:
            if len(rows):
                self.add(rows)
        for level, part in other._levels.items():
            self._carry(level, part)

    def bank(self) -> Bank:
        """Return the bank of the features added so far.

        Raises:
            ValueError: If there are none.
        """
        parts = [*self._levels.values(), *(_raw(rows) for rows in self._pending if len(rows))]
        if not parts:
            raise ValueError("A bank needs at least one feature. Received: none")
        whole = self._compressed(_union(parts), self._size)
        total = whole.counts.sum()
        weights = (whole.counts / total).astype(np.float32)
        return Bank(whole.centers, weights, whole.radius, int(total), self._metric)

    def _carry(self, level: int, part: _Part) -> None:
        while level in self._levels:
            part = self._compressed(_union([self._levels.pop(level), part]), 2 * self._size)
            level += 1
        self._levels[level] = part

    def _compressed(self, part: _Part, size: int) -> _Part:
        if len(part.centers) <= size:
            return part
        from sklearn.metrics import pairwise_distances_argmin_min

        centers, _ = bank.compress(
            part.centers,
            size,
            self._method,
            self._seed,
            metric=self._metric,
            weights=part.counts,
        )
        nearest, distance = pairwise_distances_argmin_min(part.centers, centers)
        radius = np.zeros(len(centers), np.float32)
        np.maximum.at(radius, nearest, (part.radius + distance).astype(np.float32))
        counts = np.bincount(nearest, part.counts, len(centers))
        taken = counts > 0  # Of equal centers the first takes all.
        return _Part(centers[taken], counts[taken], radius[taken])


class _Part(NamedTuple):
    """Centers, the number of features each stands for, and how far these may lie from it."""

    centers: np.ndarray
    counts: np.ndarray
    radius: np.ndarray


def _check_norms(rows: np.ndarray) -> None:
    norms = np.linalg.norm(rows, axis=1)
    if np.abs(norms - 1.0).max(initial=0.0) > 0.01:
        raise ValueError(
            "Features that are compared by cosines have L2 norm 1; for those of an extractor that "
            "standardizes them pass `metric=extractor.metric`. "
            f"Received: metric='cosine' and norms from {norms.min():.3g} to {norms.max():.3g}"
        )


def _raw(rows: np.ndarray) -> _Part:
    return _Part(rows, np.ones(len(rows)), np.zeros(len(rows), np.float32))


def _union(parts: list[_Part]) -> _Part:
    return _Part(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class CompressFeatures(beam.CombineFn):
    """Combines features with `BankSketch`, one by one or in batches, on many machines.

    Args:
        size: As for `BankSketch`.
        method: As for `BankSketch`.
        seed: As for `BankSketch`.
        metric: As for `BankSketch`.

    Example:
    >>> found = files | ExtractFeatures("extractor.keras")
    >>> bank = found.features | beam.Values() | beam.CombineGlobally(CompressFeatures(1000))
    """

    def __init__(
        self, size: int, method: str = "kmeans", seed: int = 0, *, metric: str = "cosine"
    ) -> None:
        super().__init__()
        self._arguments = size, method, seed
        self._metric = metric
        self.create_accumulator()  # Checks them.

    def create_accumulator(self) -> BankSketch:
        """Return an empty sketch."""
        return BankSketch(*self._arguments, metric=self._metric)

    def add_input(self, sketch: BankSketch, features: Array) -> BankSketch:
        """Add features `(D,)` or `(N, D)`."""
        sketch.add(features)
        return sketch

    def merge_accumulators(self, sketches: Iterable[BankSketch]) -> BankSketch:
        """Merge sketches."""
        merged = self.create_accumulator()
        for sketch in sketches:
            merged.merge(sketch)
        return merged

    def extract_output(self, sketch: BankSketch) -> Bank:
        """Return the bank."""
        return sketch.bank()


class ExtractorHandler(ModelHandler[File, Any, Any]):
    """Loads a `FeatureExtractor` once in each process and extracts features of image files.

    Args:
        path: `.keras` file of a `FeatureExtractor`, or of a `Detector`, whose extractor is used.
            One that standardizes features goes on doing so as its bank has them.
        max_batch_size: Largest number of files in a batch.
    """

    def __init__(self, path: str | os.PathLike, max_batch_size: int = 64) -> None:
        check_int("max_batch_size", max_batch_size)
        super().__init__(max_batch_size=max_batch_size)
        self._path = os.fspath(path)

    def load_model(self) -> Any:
        """Return the extractor as one function for images of all sizes."""
        import keras
        import tensorflow as tf

        model = keras.saving.load_model(self._path, compile=False)
        extractor = getattr(model, "extractor", model)
        _check_extractor(extractor, self._path)
        spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
        return tf.function(lambda x: extractor(x), input_signature=[spec], autograph=False)

    def run_inference(
        self, batch: Sequence[File], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Any]:
        """Return features `(D,)`, or `Unreadable`, for each file of a batch."""
        del inference_args
        images = [_pixels(file) for file in batch]
        found: list[Any] = list(images)
        sizes = {image.shape for image in images if isinstance(image, np.ndarray)}
        for size in sizes:
            alike = [i for i, image in enumerate(images) if getattr(image, "shape", None) == size]
            for i, row in zip(alike, model(np.stack([images[i] for i in alike])), strict=True):
                found[i] = row.numpy()
        return found

    def get_num_bytes(self, batch: Sequence[File]) -> int:
        """Return the size of a batch, for Beam's metrics."""
        return sum(map(len, batch))


def _check_extractor(extractor: Any, path: str) -> None:
    if extractor.layer_names is not None:
        raise ValueError(
            "Banks of places are not made here: the extractor must give one feature vector per "
            f"image. Received: {path}, with layers={extractor.layer_names}"
        )
    if extractor.standardized and np.all(extractor.channel_deviation == 1.0):
        raise ValueError(
            "An extractor that standardizes features needs their mean and standard deviation: pass "
            "a detector, whose extractor has those of its bank, or call `standardize` first. "
            f"Received: {path}, with standard deviations of 1"
        )


class ExtractFeatures(beam.PTransform):
    """Maps keyed image files to keyed features, with dead letters in a separate output.

    Args:
        path: `.keras` file of a `FeatureExtractor` or a `Detector`, on a file system that workers
            can read.
        max_batch_size: Largest number of files in a batch.

    Returns:
        Two collections: `.features`, pairs of a key and float32 `(D,)`, and `.errors`, pairs of a
        key and `Unreadable`, which is a string.

    Example:
    >>> found = pipeline | beam.Create(["photos/**"]) | ReadFiles() | ExtractFeatures("e.keras")
    """

    def __init__(self, path: str | os.PathLike, max_batch_size: int = 64) -> None:
        super().__init__()
        self._handler = ExtractorHandler(path, max_batch_size)

    def expand(self, files: Any) -> Any:
        """Map pairs of a key and bytes or `Unreadable`."""
        found = files | RunInference(KeyedModelHandler(self._handler))
        return found | "Dead letters" >> beam.ParDo(_DeadLetters()).with_outputs(
            "errors", main="features"
        )


class _DeadLetters(beam.DoFn):
    def process(self, element: tuple[Any, Any]) -> Iterator[Any]:
        features = element[1]
        if isinstance(features, Unreadable):
            yield beam.pvalue.TaggedOutput("errors", element)
        elif not np.isfinite(features).all():
            reason = Unreadable("the backbone gives features that are not finite")
            yield beam.pvalue.TaggedOutput("errors", (element[0], reason))
        else:
            yield element


def _pixels(file: File) -> Any:
    """Return uint8 `(H, W, 3)`, or the reason why there is none."""
    if isinstance(file, Unreadable):
        return file
    try:
        return pictures.decode(file)
    except Exception as error:  # A damaged file can make a decoder raise anything.
        return Unreadable(f"{type(error).__name__}: {error}".replace("\n", " "))
