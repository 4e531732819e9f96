"""Sources of images on the command line: `tfds:NAME`, `tfds:NAME@SPLIT`, `folder:PATH`, `npz:PATH`.

In a list of sources, `NAME=SOURCE` sets the name that tables show for a set. `mvtec:PATH` is
a folder in the layout of MVTec AD: its good parts, to train or to test on, depending on the option.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from sddns_tf.cli.errors import UsageError, user_input

KINDS = ("tfds", "folder", "npz")
_LAYOUT = "mvtec:"
_GOOD_PARTS = {"data": "train/good", "test": "test/good"}


class Source(NamedTuple):
    """A source of images.

    Attributes:
        name: Name of the set in tables.
        location: `"tfds:NAME"`, `"folder:PATH"` or `"npz:PATH"`, as `sddns_tf.data.load` takes it.
        split: TFDS split; not used by other sources.
    """

    name: str
    location: str
    split: str


def add_on_error(group: Any) -> None:
    """Add the option that says what to do with files that cannot be read."""
    group.add_argument(
        "--on_error",
        choices=("raise", "skip"),
        help="What to do if files of a folder cannot be read: raise stops with a list of them (the "
        "default), skip leaves them out and lists them.",
    )


def parse(option: str, text: str | None, split: str) -> Source:
    """Parse the value of an option as a source.

    Args:
        option: Name of the option, for error messages.
        text: `SOURCE` or `NAME=SOURCE`.
        split: TFDS split if the text names none.

    Returns:
        `Source`.

    Raises:
        UsageError: If the text is None or has another form.

    Example:
    >>> parse("ood", "scratched=folder:photos/scratched", "test")
    Source(name='scratched', location='folder:photos/scratched', split='test')
    """
    if text is None:
        raise UsageError(f"--{option} is needed. Received: none")
    start, equals, rest = text.partition("=")
    name, location = (start, rest) if equals and ":" not in start else (None, text)
    if location.startswith(_LAYOUT):
        location = _good_parts(option, location.removeprefix(_LAYOUT))
    kind, _, place = location.partition(":")
    if kind not in KINDS or not place or name == "":
        is_folder = os.path.isdir(os.path.expanduser(location))
        hint = f" (did you mean folder:{location}?)" if is_folder else ""
        raise UsageError(
            f"--{option} must be tfds:NAME, tfds:NAME@SPLIT, folder:PATH or npz:PATH. "
            f"Received: {text}{hint}"
        )
    if kind == "tfds":
        place, at, given = place.partition("@")
        split = given if at else split
    path = pathlib.Path(place).expanduser().resolve()
    default_name = {"tfds": place, "folder": path.name}.get(kind, path.stem)
    return Source(name or default_name, f"{kind}:{place}", split)


def _good_parts(option: str, path: str) -> str:
    if option not in _GOOD_PARTS:
        raise UsageError(
            f"--{option} takes no mvtec:PATH, which stands for the good parts of --data and of "
            f"--test: name a folder, as in folder:{path}/train/good. Received: mvtec:{path}"
        )
    return f"folder:{os.path.join(path, _GOOD_PARTS[option])}"


def damaged_parts(text: str) -> tuple[list[Source], pathlib.Path | None]:
    """Return sources of the damaged parts of a folder in the layout of MVTec AD.

    Args:
        text: Text of the option `--test`.

    Returns:
        List of `Source`, one for each folder of `test` except the good parts, and the folder of
        the masks; an empty list and None if the text names no such layout.

    Raises:
        UsageError: If the folder holds no damaged parts.
    """
    if not text.startswith(_LAYOUT):
        return [], None
    root = pathlib.Path(text.removeprefix(_LAYOUT)).expanduser()
    kinds = sorted(path for path in root.glob("test/*") if path.is_dir() and path.name != "good")
    if not kinds:
        raise UsageError(
            "--test=mvtec:PATH must hold test/good and folders of damaged parts beside it. "
            f"Received: {text}"
        )
    return [Source(path.name, f"folder:{path}", "test") for path in kinds], root / "ground_truth"


def parse_list(option: str, texts: list[str], split: str) -> list[Source]:
    """Parse the values of an option that takes several sources.

    Args:
        option: Name of the option, for error messages.
        texts: List of strings, each one source or several separated by commas.
        split: TFDS split if a text names none.

    Returns:
        List of `Source`.

    Raises:
        UsageError: If a text has another form, or two sources have the same name.
    """
    texts = [text for several in texts for text in several.split(",") if text]
    found = [parse(option, text, split) for text in texts]
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"--{option} must give each set a name of its own, as in NAME=SOURCE. "
                f"Received: {','.join(texts)}"
            )
    return found


def stream(option: str, source: Source, **options: Any) -> Any:
    """Return batches of the images of a source, read as they are needed.

    Args:
        option: Name of the option, for error messages.
        source: `Source`.
        **options: Arguments of `sddns_tf.data.load`: `batch_size`, `image_size`, `resize`, ...

    Returns:
        `tf.data.Dataset` of uint8 `(B, H, W, 3)`.

    Raises:
        UsageError: If the source cannot be read.
    """
    from sddns_tf import data

    with user_input(option):
        return data.load(source.location, split=source.split, **options)


def read(option: str, source: Source, **options: Any) -> Any:
    """Read all images of a source into memory.

    Args:
        option: Name of the option, for error messages.
        source: `Source`.
        **options: Arguments of `sddns_tf.data.load_arrays`: `data_dir`, `image_size`, `limit`, ...

    Returns:
        uint8 `(N, H, W, 3)`; with `with_labels=True` a pair of that and int64 `(N,)`.

    Raises:
        UsageError: If the source cannot be read.
    """
    from sddns_tf import data

    with user_input(option):
        return data.load_arrays(source.location, split=source.split, **options)


def file_names(
    option: str, source: Source, limit: int | None = None, on_error: str = "raise"
) -> list[pathlib.Path] | None:
    """Return the paths of the files that `read` reads from a folder, or None for other sources."""
    if not source.location.startswith("folder:"):
        return None
    from sddns_tf import data

    with user_input(option):
        found = data.image_files(source.location, limit=limit, on_error=on_error)
        return [pathlib.Path(path) for path in found]


def read_labeled(
    option: str, source: Source, **options: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read images and their labels, int64 `(N,)`, or None instead of labels if there are none."""
    from sddns_tf.data import NoLabelsError

    try:
        return read(option, source, with_labels=True, **options)
    except UsageError as error:
        if not isinstance(error.__cause__, NoLabelsError):
            raise
        return read(option, source, **options), None


def seen_by(detector: Any) -> dict[str, Any]:
    """Return options with which `read` and `stream` resize images as a detector does.

    Args:
        detector: `Detector`.

    Returns:
        Dictionary of `image_size` and `resize`.
    """
    extractor = detector.extractor
    size = extractor.resolution or extractor.image_size
    return {"image_size": tuple(size), "resize": extractor.resize}


def read_class_names(path: str) -> list[str]:
    """Read names of classes from a text file: the first word of each line, comments skipped."""
    with user_input("auxiliary_exclude"):
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip() and line[0] != "#"]
