"""Write the rows of a shard to one Parquet or CSV file, completely or not at all.

Beam's own sinks make files visible only when the whole job is done. Here each shard appears as soon
as it is done. Its name is fixed, so a second attempt replaces it, and a second run of a job sees
which shards are missing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

from sddns_tf import files
from sddns_tf.beam.scoring import Answer

FORMATS = ("csv", "parquet")
FIELDS = ("path", *Answer._fields)


class Item(NamedTuple):
    """The place of an image file in a job.

    Attributes:
        shard: Name of its shard.
        place: Its place in the shard.
        is_last: Whether it is the shard's last one.
        path: Key of the file.
    """

    shard: str
    place: int
    is_last: bool
    path: str


class WriteShards(beam.DoFn):
    """Collects the rows of shards and writes each shard as soon as it is complete.

    The rows of a shard must arrive in one bundle, as they do if reading, scoring and writing are
    one stage. Otherwise the job fails and nothing of that shard is written.

    Args:
        scores: Folder for rows with a score.
        errors: Folder for rows with an error; a shard without any has no file there.
        format: One of `FORMATS`.
    """

    def __init__(self, scores: str, errors: str, format: str) -> None:
        super().__init__()
        self._scores, self._errors, self._format = scores, errors, format
        self._counters = {
            name: Metrics.counter("sddns_tf", name) for name in ("images", "flagged", "failed")
        }

    def start_bundle(self) -> None:
        """Start with no rows."""
        self._rows: dict[str, list[tuple[Item, Answer]]] = {}
        self._sizes: dict[str, int] = {}

    def process(self, element: tuple[Item, Answer]) -> Iterator[str]:
        """Add the answer for one file; yield the shard's name if that completes it."""
        shard, place, is_last, _ = element[0]
        rows = self._rows.setdefault(shard, [])
        rows.append(element)
        if is_last:
            self._sizes[shard] = place + 1
        if len(rows) == self._sizes.get(shard):
            self._write(shard, sorted(self._rows.pop(shard)))
            yield shard

    def finish_bundle(self) -> None:
        """Check that nothing is left."""
        if self._rows:
            raise RuntimeError(
                "Rows of a shard must come in one bundle. Received: a part of shards "
                f"{sorted(self._rows)[:3]}"
            )

    def _write(self, shard: str, answers: list[tuple[Item, Answer]]) -> None:
        rows = [(item.path, *answer) for item, answer in answers]
        failed = [row for row in rows if row[-1] is not None]
        name = f"{shard}.{self._format}"
        # Errors first, because a file of scores marks the shard as done.
        errors = FileSystems.join(self._errors, name)
        if failed:
            write_rows(errors, failed, self._format)
        elif FileSystems.exists(errors):  # of an earlier try
            FileSystems.delete([errors])
        scored = [row for row in rows if row[-1] is None]
        write_rows(FileSystems.join(self._scores, name), scored, self._format)
        self._counters["images"].inc(len(rows))
        self._counters["flagged"].inc(sum(bool(answer.is_ood) for _, answer in answers))
        self._counters["failed"].inc(len(failed))


def _printable(path: str) -> str:
    """Return a path that UTF-8 can encode; file names may hold any bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_rows(path: str, rows: list[tuple], format: str) -> None:
    """Write rows with the columns `FIELDS`.

    Args:
        path: Path on any file system that Beam knows.
        rows: List of tuples.
        format: One of `FORMATS`.
    """
    with replacing(path) as file:
        if format == "csv":
            text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(FIELDS)
            writer.writerows(rows)
            text.flush()
            text.detach()
            return
        import pyarrow
        import pyarrow.parquet

        types = (pyarrow.string(), pyarrow.float32(), pyarrow.float32(), pyarrow.bool_())
        schema = pyarrow.schema(zip(FIELDS, (*types, pyarrow.string()), strict=True))
        rows = [(_printable(path), *answer) for path, *answer in rows]
        columns = zip(*rows, strict=True) if rows else [[] for _ in FIELDS]
        arrays = [
            pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), file)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[Any]:
    """`files.replacing` on any file system that Beam knows, as an open file.

    Args:
        path: Path of the file to write.

    Yields:
        Binary file.
    """
    if FileSystems.get_scheme(path) is None:
        with files.replacing(path) as unfinished, unfinished.open("wb") as file:
            yield file
        return
    folder, name = FileSystems.split(path)
    unfinished = FileSystems.join(folder, f".{uuid.uuid4().hex[:12]}.{name}")
    try:
        with FileSystems.create(unfinished) as file:
            yield file
    except BaseException:
        with contextlib.suppress(BeamIOError):  # It may not be there.
            FileSystems.delete([unfinished])
        raise
    FileSystems.rename([unfinished], [path])
