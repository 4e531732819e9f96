r"""Score image files: one row of CSV or JSON per file, written as soon as it is scored.

    sddns score --model=parts.tflite --images=folder:camera > scores.csv
    find camera -name '*.png' | sddns score --model=exports/parts/1 --images=-

A row has the columns path, ood_score (higher is more out-of-distribution), p_value, is_ood and
error. A file that cannot be read gets an error instead of a score; the others are still scored.
Memory use does not depend on the number of files. A .tflite file is run without TensorFlow. Rows
are written to OUTPUT.partial, which is renamed to OUTPUT at the end.

If one process is not enough, --runner scores in shards with Apache Beam. It also reads TFRecord and
Parquet files of image files. OUTPUT is then a folder: rows in OUTPUT/scores, those with an error in
OUTPUT/errors. After a failure, run the same command again to score the missing shards.

    sddns score --model=exports/parts/1 --images='camera/*.png' --output=scores.parquet \
        --runner=DirectRunner --threads=1 \
        --runner_options='--direct_num_workers=4 --direct_running_mode=multi_processing'

The exit code is 0 if all images were scored, 2 if some were not, and 1 if nothing could be done.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO

import numpy as np

from sddns_tf import files, pictures
from sddns_tf.cli import overlays
from sddns_tf.cli.console import Parser, positive_int, require, say
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.scorers import Scorer, open_model

ANSWERS = ("ood_score", "p_value", "is_ood")
FIELDS = ("path", *ANSWERS, "error")
# Resizing takes about 30 bytes of memory per pixel.
_PIXELS_AT_ONCE = 16_000_000


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("score", __doc__)
    group = parser.group("what most people need")
    group.add_argument(
        "--model",
        metavar="FILE",
        help="A .tflite file, a .keras file or the folder of a SavedModel.",
    )
    group.add_argument(
        "--images",
        metavar="PATHS",
        help="folder:PATH (with its subfolders), list:FILE (one path per line) or - (such a list "
        "on stdin). With --runner also a pattern of image, TFRecord or Parquet files, such as "
        "'camera/*.png' or gs://bucket/**.",
    )
    group.add_argument(
        "--output",
        metavar="FILE",
        help="File to write to. Default: stdout. With --runner a folder.",
    )
    group.add_argument(
        "--format",
        choices=("csv", "jsonl", "parquet"),
        help="Default: jsonl or parquet if --output has that extension, otherwise csv. parquet "
        "needs --runner, and jsonl does not work with it.",
    )
    group.add_argument(
        "--maps",
        metavar="FOLDER",
        help="Folder to write overlays of anomaly maps to, as FOLDER/PATH.png. "
        "Needs a local detector.",
    )
    group = parser.group("speed")
    group.add_argument(
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=32,
        help="Images per batch.",
    )
    group.add_argument(
        "--threads",
        metavar="N",
        type=positive_int,
        help="CPU cores to use for a .tflite file, or with --runner in each process. Default: all.",
    )
    group = parser.group("more than one process: Apache Beam, pip install 'sddns_tf[beam]'")
    group.add_argument(
        "--runner",
        metavar="NAME",
        help="DirectRunner (this machine), FlinkRunner, SparkRunner, DataflowRunner. The model "
        "must then be the folder of a SavedModel.",
    )
    group.add_argument(
        "--runner_options",
        metavar="TEXT",
        default="",
        help="Options of Beam and the runner, in one string.",
    )
    group.add_argument(
        "--images_per_shard",
        metavar="N",
        type=positive_int,
        default=4096,
        help="Images that are written together. Each TFRecord or Parquet file is its own shard.",
    )
    return parser


def main(argv: list[str]) -> int:
    """Score the images that the options name."""
    options = parser().parse_args(argv)
    require(options, "model", "images")
    kind = options.format or format_of(options.output)
    if options.runner:
        if options.maps:
            raise UsageError(f"--maps goes without --runner. Received: {options.maps}")
        from sddns_tf.cli import score_in_shards

        return score_in_shards.run(options, kind)
    if kind == "parquet":
        raise UsageError("--format must be csv or jsonl without --runner. Received: parquet")
    paths = image_paths(options.images)
    if options.maps:
        check_apart(options.images, options.maps)
    scorer = open_model(options.model, options.threads)
    write_map = overlays.writer(scorer, options.maps) if options.maps else None
    counts = {"images": 0, "flagged": 0, "failed": 0}
    # Of stdout `cli.main` tells, where it is flushed.
    named = functools.partial(user_input, "output", OSError)
    writing = named if options.output else contextlib.nullcontext
    with opened_output(options.output) as output:
        with writing():
            write = row_writer(output, kind)
        last_told = started = time.monotonic()
        for rows in scored(scorer, paths, options.batch_size, write_map):
            for row in rows:
                counts["images"] += 1
                counts["flagged"] += bool(row["is_ood"])
                counts["failed"] += bool(row["error"])
            with writing():
                for row in rows:
                    write(row)
                output.flush()
            if time.monotonic() - last_told > 2:
                last_told = time.monotonic()
                rate = counts["images"] / (last_told - started)
                say(f"{counts['images']} images, {rate:.1f}/s")
    say(summary(**counts))
    return 2 if counts["failed"] else 0


def check_apart(images: str, maps: str) -> None:
    """Raise a `UsageError` if overlays would be written among the images, and scored next time."""
    kind, _, name = images.partition(":")
    folder, inside = pathlib.Path(name).expanduser(), pathlib.Path(maps).expanduser()
    if kind == "folder" and inside.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "--maps must not lie in the folder of --images, or the next run would score the "
            f"overlays. Received: {maps}, in {folder}"
        )


def format_of(output: str | None) -> str:
    """Return the format of rows that the name of an output implies."""
    ending = pathlib.Path(output or "").suffix
    return ending[1:] if ending in (".jsonl", ".parquet") else "csv"


def summary(images: int, flagged: int, failed: int) -> str:
    """Return the last line that a run prints."""
    return f"{images} images, {flagged} of them out of distribution, {failed} not scored"


def image_paths(text: str) -> Iterator[str]:
    """Return an iterator over the paths of the images that `--images` names.

    Args:
        text: `folder:PATH`, `list:FILE` or `-`.

    Returns:
        Iterator of strings.

    Raises:
        UsageError: If the text has another form, or there are no images.
    """
    kind, _, name = text.partition(":")
    if text == "-":
        if hasattr(sys.stdin, "reconfigure"):  # Names of files may hold any bytes.
            sys.stdin.reconfigure(errors="surrogateescape")
        return _listed(sys.stdin)
    place = pathlib.Path(name).expanduser()
    if kind == "list" and place.is_file():
        return _in_list(place)
    if kind == "folder" and name and place.is_dir():
        paths = _in_folder(place)
        first = next(paths, None)
        if first is None:
            raise UsageError(
                f"--images must be a folder that holds images ({', '.join(pictures.EXTENSIONS)}). "
                f"Received: {place}, which has none"
            )
        return itertools.chain([first], paths)
    raise UsageError(
        f"--images must be an existing folder:PATH or list:FILE, or -. Received: {text}"
    )


def _in_list(place: pathlib.Path) -> Iterator[str]:
    """Yield the paths in a file."""
    with (
        user_input("images", OSError),
        place.open(encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield from _listed(file)


def _listed(lines: Iterable[str]) -> Iterator[str]:
    """Yield the paths in a list, without empty lines."""
    with user_input("images", OSError):
        for line in lines:
            line = line.removeprefix("\ufeff")  # with which Windows begins a file
            if "\0" in line:
                raise UsageError(
                    "--images must list one path per line, as UTF-8. Received: a line with a zero "
                    "byte, as in UTF-16 or a list that zero bytes divide"
                )
            if line.strip():
                yield line.rstrip("\r\n")


def _in_folder(folder: pathlib.Path) -> Iterator[str]:
    """Yield the image files in a folder and its subfolders, except hidden ones.

    At the end, yield folders that cannot be read, as if they were such files, and say how many
    other files and links to folders were skipped.
    """
    others: list[str] = []
    links: list[str] = []
    unreadable: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=lambda e: unreadable.append(e.filename)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += filter(os.path.islink, (os.path.join(parent, name) for name in folders))
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = os.path.join(parent, name)
            if name.lower().endswith(pictures.EXTENSIONS):
                yield path
            else:
                others.append(path)
    yield from sorted(unreadable)
    if others:
        say(f"Skipped {len(others)} files that are not images, such as {others[0]}")
    if links:
        say(f"Skipped {len(links)} links to folders, such as {links[0]}")


def scored(
    scorer: Scorer, paths: Iterator[str], batch_size: int, write_map: Callable | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch, in the order of the paths.

    Args:
        scorer: `Scorer`.
        paths: Iterator of strings.
        batch_size: Images per batch.
        write_map: What `overlays.writer` returns, or None.

    Yields:
        List of dictionaries with the keys `FIELDS`.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(paths, batch_size)):
            images = list(pool.map(lambda path: read_image(path, scorer), some))
            rows = [dict.fromkeys(FIELDS) | {"path": path} for path in some]
            by_size: dict[tuple[int, ...], list[tuple[dict[str, Any], np.ndarray]]] = {}
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, str):
                    row["error"] = image
                else:
                    by_size.setdefault(image.shape, []).append((row, image))
            for alike in _few_at_once(by_size.values()):
                found = scorer.answer(np.stack([image for _, image in alike]))
                for number, (row, image) in enumerate(alike):
                    row.update({name: found[name][number].item() for name in ANSWERS})
                    if write_map is not None:
                        write_map(row["path"], image, found["anomaly_map"][number])
            yield rows


def _few_at_once(groups: Iterable[list]) -> Iterator[list]:
    """Yield parts of groups of rows and images that are small enough for a graph to resize."""
    for group in groups:
        pixels = group[0][1].shape[0] * group[0][1].shape[1]
        step = max(1, _PIXELS_AT_ONCE // pixels)
        yield from (group[start : start + step] for start in range(0, len(group), step))


def read_image(path: str, scorer: Scorer) -> np.ndarray | str:
    """Read an image file in the form that the scorer takes.

    Args:
        path: String.
        scorer: `Scorer`.

    Returns:
        uint8 `(H, W, 3)`, or a string that says why the file cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=pictures.FORMATS) as picture:
            if picture.height * picture.width > pictures.MAX_PIXELS:
                announced = f"{picture.height} x {picture.width}"
                return f"{announced} is more than {pictures.MAX_PIXELS} pixels"
            image = pictures.pixels(picture)
        return image if scorer.size is None else _fitted(image, *scorer.size, scorer.resize)
    # A damaged file can make a decoder raise anything; the other files must still be scored.
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")


def _fitted(image: np.ndarray, height: int, width: int, resize: str) -> np.ndarray:
    """Return an image resized as by `image_ops.fit`, without TensorFlow."""
    from PIL import Image

    if resize == "crop":
        # Crop first, so that pixels outside the crop do not bleed in at the edges.
        image = overlays.cropped(image, height, width)
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


@contextlib.contextmanager
def opened_output(path: str | None) -> Iterator[TextIO]:
    """Open stdout or a file, which is called `PATH.partial` until it is complete.

    After an interruption the partial file is kept, until the next run begins.

    Args:
        path: String, or None for stdout.

    Yields:
        Text file.

    Raises:
        UsageError: If the file cannot be written, or another process is writing it.
    """
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
        return
    target = pathlib.Path(path).expanduser()
    partial = target.with_name(f"{target.name}.partial")
    if target.is_dir():
        raise UsageError(f"--output must be a file without --runner. Received: {target}, a folder")
    with user_input("output", OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("a", encoding="utf-8", errors="surrogateescape", newline="")
    with file:
        if not files.lock(file.fileno()) or not _is_at(file, partial):
            raise UsageError(
                "--output must be a file that no other run is writing. "
                f"Received: {target}, for which one is writing {partial}"
            )
        if file.tell():
            say(f"Replacing {partial}, the rows of a run that did not end")
            file.truncate(0)
        try:
            yield file
        except BaseException:
            say(f"The rows written so far are in {partial}")
            raise
        with user_input("output", OSError):
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # While the lock is held; Windows has none, nor renames open files.
                os.replace(partial, target)
    if os.name == "nt":
        with user_input("output", OSError):
            os.replace(partial, target)


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
    """Return whether an open file has this path, and was not renamed before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def row_writer(output: TextIO, kind: str) -> Callable[[dict[str, Any]], Any]:
    """Return a function that writes one row, as `"csv"` or `"jsonl"`."""
    if kind == "jsonl":
        return lambda row: output.write(json.dumps(_as_json(row)) + "\n")
    writer = csv.DictWriter(output, FIELDS, lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow(_as_json(row))


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    """Replace a score that is not finite with None, because JSON has no such numbers."""
    finite = row["ood_score"] is None or math.isfinite(row["ood_score"])
    return row if finite else {**row, "ood_score": None}
