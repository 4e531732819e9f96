"""A SavedModel's answers for image files, by Beam's `RunInference`.

Beam's own `TFModelHandlerTensor` loads models with Keras, which has not read SavedModels since
Keras 3. This handler uses the signature `serving_bytes` that `export.saved_model` writes.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference

from sddns_tf.beam.reading import File, Unreadable
from sddns_tf.validation import check_int

_DECODED_ALIKE = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class Answer(NamedTuple):
    """A detector's answer for one image file. All but `error` are None if it cannot be scored.

    Attributes:
        ood_score: Float, higher is more out-of-distribution; None also where it is not finite.
        p_value: Float, or None.
        is_ood: Bool, or None.
        error: None, or why there is no score.
    """

    ood_score: float | None = None
    p_value: float | None = None
    is_ood: bool | None = None
    error: str | None = None


class SavedModelHandler(ModelHandler[File, Answer, Any]):
    """Loads a detector's SavedModel once in each process and scores batches of image files.

    Files that the served graph does not decode as the commands do (TIFF, WebP, a turned photograph;
    see docs/serving.md) are decoded with Pillow and passed on as PNG, so that every file gets the
    same answer as from `sddns score`.

    Args:
        path: Folder of a SavedModel, on any file system that TensorFlow knows.
        min_batch_size: Smallest number of files in a batch, or None to let Beam choose. If it
            equals `max_batch_size`, the last bits of answers do not depend on timing.
        max_batch_size: Largest number of files in a batch.
        threads: CPU cores that each process uses, or None for all. It takes effect only in
            processes that have not used TensorFlow before.

    Example:
    >>> handler = SavedModelHandler("exports/parts/1", max_batch_size=64)
    >>> answers = files | RunInference(KeyedModelHandler(handler))
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        min_batch_size: int | None = None,
        max_batch_size: int = 32,
        threads: int | None = None,
    ) -> None:
        check_int("max_batch_size", max_batch_size)
        sizes = {"max_batch_size": max_batch_size}
        if min_batch_size is not None:
            check_int("min_batch_size", min_batch_size, high=max_batch_size)
            sizes["min_batch_size"] = min_batch_size
        names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
        environment = {} if threads is None else dict.fromkeys(names, str(threads))
        super().__init__(**sizes, env_vars=environment)
        self._path = os.fspath(path)

    def load_model(self) -> Callable[..., Any]:
        """Return the signature `serving_bytes`, which keeps the loaded model."""
        import tensorflow as tf

        return tf.saved_model.load(self._path).signatures["serving_bytes"]

    def run_inference(
        self, batch: Sequence[File], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Answer]:
        """Score a batch.

        Args:
            batch: Sequence of `bytes` or `Unreadable`.
            model: From `load_model`.
            inference_args: Not used.

        Returns:
            List of `Answer`, in the order of the batch.
        """
        del inference_args
        read = [as_served(file) for file in batch if not isinstance(file, Unreadable)]
        answers = iter(_answers(model, read))
        return [
            Answer(error=str(file)) if isinstance(file, Unreadable) else next(answers)
            for file in batch
        ]

    def get_num_bytes(self, batch: Sequence[File]) -> int:
        """Return the size of a batch, for Beam's metrics."""
        return sum(map(len, batch))

    def get_metrics_namespace(self) -> str:
        """Return the namespace of Beam's metrics."""
        return "sddns_tf"


class Score(beam.PTransform):
    """Maps keyed image files to keyed answers, with dead letters in a separate output.

    Args:
        handler: `SavedModelHandler`.

    Returns:
        Two collections of pairs `(key, Answer)`: `.scored`, and `.errors` for files without a
        score. Every key is in one of them.

    Example:
    >>> found = files | Score(SavedModelHandler("exports/parts/1"))
    >>> found.scored | beam.Map(print)
    >>> found.errors | beam.Map(print)
    """

    def __init__(self, handler: SavedModelHandler) -> None:
        super().__init__()
        self._handler = handler

    def expand(self, files: Any) -> Any:
        """Map pairs of a key and bytes or `Unreadable`."""
        answers = files | RunInference(KeyedModelHandler(self._handler))
        return answers | "Dead letters" >> beam.ParDo(_DeadLetters()).with_outputs(
            "errors", main="scored"
        )


class _DeadLetters(beam.DoFn):
    def process(self, element: tuple[Any, Answer]) -> Iterator[Any]:
        yield element if element[1].error is None else beam.pvalue.TaggedOutput("errors", element)


def as_served(file: bytes) -> bytes:
    """Return a file that the served graph decodes to the pixels that the commands see.

    Args:
        file: Contents of an image file.

    Returns:
        The same file, or a PNG of its pixels.
    """
    from PIL import Image

    from sddns_tf import pictures

    if file.startswith(_DECODED_ALIKE) and not pictures.may_be_turned(file):
        return file
    try:
        header = pictures.header(file)
        if header.decoder != "pillow" and header.orientation == 1:
            return file
        png = io.BytesIO()
        Image.fromarray(pictures.decode(file)).save(png, "png", compress_level=0)
        return png.getvalue()
    except Exception:  # Damaged: the served graph says what is wrong with it.
        return file


def _answers(model: Any, files: list[bytes]) -> list[Answer]:
    """Score files together, or one at a time if that fails as a whole."""
    import tensorflow as tf

    if not files:
        return []
    try:
        found = model(image_bytes=tf.constant(files))
    except tf.errors.OpError as error:  # Such as a lack of memory for the largest of them.
        if len(files) == 1:
            return [Answer(error=f"{type(error).__name__}: {error.message}".replace("\n", " "))]
        return [answer for file in files for answer in _answers(model, [file])]
    names = ("ood_score", "p_value", "is_ood", "status")
    columns = [found[name].numpy().tolist() for name in names]
    return [
        Answer(error=status.decode()) if status else Answer(_finite(score), p_value, is_ood)
        for score, p_value, is_ood, status in zip(*columns, strict=True)
    ]


def _finite(score: float) -> float | None:
    """Return None for a score that is not finite, as `sddns score` does; the p-value stays."""
    return score if math.isfinite(score) else None
