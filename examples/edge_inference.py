r"""Score image files on an edge device, recalibrate and extend there, without TensorFlow.

    pip install ai-edge-litert numpy pillow
    python edge_inference.py parts.tflite photo.png another.jpg

This prints the score, the p-value and the decision for each file, or an error for one that cannot
be read; the exit code is then 2. A device needs only this script and a `.tflite` file that
`sddns_tf.export.tflite` wrote.

If the camera or light differs from the calibration images, all scores shift, and the promised
false positive rate does not hold. Recalibrate the file in seconds with images of normal parts that
the device itself took, at least `1 / rate - 1` of them and none of them in the bank:

    python edge_inference.py parts.tflite --recalibrate normal/*.png --output parts-here.tflite

A local detector also says where an image is anomalous. `--maps` writes a picture of each image to
`FOLDER/PATH.png`, in which places above the threshold are outlined and colored from yellow to red:

    python edge_inference.py parts.tflite photo.png --maps=overlays

If it flags what is normal after all, and the file was exported with `extension_room`, `--extend`
makes such images count as normal from then on. Their conspicuous places join the bank. Scores can
only fall, so the promise still holds; several runs add up:

    python edge_inference.py parts.tflite --extend false_alarm.png --output parts-here.tflite
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np


def load(path, threads=1):
    """Load a `.tflite` file: its runner, its batch size (None for any) and its image size."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    batch, height, width, _ = interpreter.get_input_details()[0]["shape_signature"].tolist()
    runner = interpreter.get_signature_runner("serving_default")
    return runner, None if batch < 0 else batch, (height, width)


def read_image(path, size, resize="squash"):
    """Read an image file as uint8 `(height, width, 3)`, turned and resized as by the detector.

    Args:
        path: The image file.
        size: Height and width.
        resize: What the file's `description` calls `resize`: `"crop"` cuts off two sides first.
    """
    from PIL import Image, ImageOps

    height, width = size
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"expected 8 bits per channel. Received: mode {image.mode}")
            image = ImageOps.exif_transpose(image).convert("RGB")
    # A damaged file makes Pillow raise all kinds of errors, most of which do not name it.
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if resize == "crop":
        columns = min(image.width, max(1, image.height * width // height))
        rows = min(image.height, max(1, image.width * height // width))
        left, top = (image.width - columns) // 2, (image.height - rows) // 2
        image = image.crop((left, top, left + columns, top + rows))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def score(model, images):
    """Return scores, p-values and decisions for uint8 images `(N, height, width, 3)`.

    Args:
        model: Result of `load`.
        images: Images from `read_image`.

    Returns:
        Dict of `"ood_score"`, `"p_value"` and `"is_ood"`, arrays `(N,)`; for a local detector also
        `"anomaly_map"`, `(N, h, w)`, and with room for an extension what `places_of` needs.
    """
    runner, batch, _ = model
    batch = batch or 1
    answers = []
    for start in range(0, len(images), batch):
        part = np.asarray(images[start : start + batch])
        full = np.resize(part, (batch, *part.shape[1:]))
        answers.append({k: v[: len(part)] for k, v in runner(images=full).items()})
    return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}


def overlay(image, anomaly_map, threshold, lowest):
    """Return an image with places above the threshold colored, on the same scale for all images.

    Args:
        image: uint8 `(height, width, 3)`.
        anomaly_map: Scores of places in the image, `(h, w)`.
        threshold: Score above which a place is flagged.
        lowest: Score of a place that is in the bank.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    from PIL import Image

    # 1 is at the threshold; 2, drawn red, is twice as far from the bank.
    heat = Image.fromarray(((anomaly_map - lowest) / (threshold - lowest)).astype(np.float32))
    size = image.shape[1::-1]
    smooth = np.asarray(heat.resize(size, Image.Resampling.BILINEAR))[..., np.newaxis]
    flagged = np.asarray(heat.resize(size, Image.Resampling.NEAREST)) > 1
    strength = np.clip(smooth - 1, 0, 1)
    color = (1 - strength) * np.array([240, 228, 66]) + strength * np.array([213, 20, 0])
    opacity = np.where(smooth > 1, 0.35 + 0.3 * strength, 0)
    painted = np.round((1 - opacity) * image + opacity * color).astype(np.uint8)
    around = np.pad(flagged, 1, constant_values=True)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    painted[flagged & ~inside] = (213, 20, 0)
    return painted


def write_map(folder, path, image, answer, about):
    """Write the overlay of an image to `FOLDER/PATH.png`, and return that path."""
    from PIL import Image

    path = pathlib.Path(path)
    picture = overlay(image, answer["anomaly_map"][0], about["threshold"], about["lowest_score"])
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    target = pathlib.Path(folder, *parts)
    target = target.with_name(f"{target.name}.png")  # Never the image itself.
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(target)
    return target


def _opened(file):
    """Return the tables of a file, and its description as an array that can be rewritten."""
    from ai_edge_litert import schema_py_generated as schema

    tables = schema.Model.GetRootAs(file)
    for entry in map(tables.Metadata, range(tables.MetadataLength())):
        if entry.Name() == b"sddns_tf":
            return tables, tables.Buffers(entry.Buffer()).DataAsNumpy()
    raise ValueError(
        "The .tflite file must have been written by sddns_tf. Received: a file without description"
    )


def description(path):
    """Return the description in a `.tflite` file: outputs, rate, sizes, version."""
    return json.loads(_opened(bytearray(pathlib.Path(path).read_bytes()))[1].tobytes())


def recalibrate(path, scores, output, false_positive_rate=None):
    """Write a copy of a `.tflite` file, calibrated with other normal images.

    A p-value is `(1 + number of calibration scores at least as high) / (1 + number of them)`.

    Args:
        path: The `.tflite` file.
        scores: Scores that this file gives normal images, `(N,)`, at most `calibration_room`.
        output: The file to write. It may be `path`, and is replaced only if writing succeeds.
        false_positive_rate: Largest share of normal images to flag. None keeps the file's rate.
    """
    file = bytearray(pathlib.Path(path).read_bytes())
    tables, text = _opened(file)
    about = json.loads(text.tobytes())
    rate = about["false_positive_rate"] if false_positive_rate is None else false_positive_rate
    scores, room = np.sort(np.asarray(scores, np.float32)), about["calibration_room"]
    if not 0.0 < rate < 1.0 or np.float32(1.0) / np.float32(len(scores) + 1) > np.float32(rate):
        raise ValueError(
            "The false positive rate must be between 0 and 1, and needs at least 1 / rate - 1 "
            f"calibration images. Received: {rate} and {len(scores)} images"
        )
    if len(scores) > room or not np.isfinite(scores).all():
        raise ValueError(
            f"Expected at most {room} finite scores. Received: {len(scores)}, "
            f"{np.count_nonzero(~np.isfinite(scores))} of them not finite"
        )

    def values(name):
        return _values(tables, about, name)

    values("scores")[:] = -np.inf  # below every score, so never counted
    values("scores")[: len(scores)] = scores
    ranks = np.arange(1, room + 2, dtype=np.float32)
    values("p_values")[:] = np.minimum(ranks / np.float32(1 + len(scores)), 1.0)
    values("rate")[:] = rate
    p_values = ranks[: len(scores)] / np.float32(1 + len(scores))
    threshold = float(scores[-np.count_nonzero(p_values <= np.float32(rate))])
    changes = {"false_positive_rate": rate, "calibration_images": len(scores)}
    changes["threshold"] = threshold
    _write(file, text, {**about, **changes}, output)


def places_of(path, answer):
    """Return the features of places of false alarms that stand out, `(N, C)`.

    Args:
        path: The `.tflite` file, exported with room for an extension.
        answer: What `score` returns for these images.
    """
    tables, text = _opened(bytearray(pathlib.Path(path).read_bytes()))
    about = json.loads(text.tobytes())
    _check_room(about)
    scores = _values(tables, about, "scores")
    # Lower places are no reason for an alarm. Minus infinity is no score but free space.
    return answer["features"][answer["place_scores"] > scores[np.isfinite(scores)].min()]


def extend(path, places, output):
    """Write a copy of a `.tflite` file in whose bank are more places; its calibration stays.

    Args:
        path: The `.tflite` file, exported with room for an extension.
        places: Features of places, `(N, C)`, from `places_of`.
        output: The file to write. It may be `path`, and is replaced only if writing succeeds.
    """
    file = bytearray(pathlib.Path(path).read_bytes())
    tables, text = _opened(file)
    about = json.loads(text.tobytes())
    _check_room(about)
    room, used = about["extension_room"], about["extension_rows"]
    if len(places) > room - used:
        raise ValueError(
            f"There must be a free row for each place. Received: {len(places)} places, but "
            f"{room - used} of {room} rows are free. Export with more extension_room"
        )
    if not np.isfinite(places).all():
        raise ValueError("The features of places must be finite. Received: some that are not")
    # A row is the features of a place, then minus half of their squared length.
    rows = _values(tables, about, "extension").reshape(room, -1)[used : used + len(places)]
    rows[:, :-1], rows[:, -1] = places, -np.square(places).sum(axis=1) / 2
    _write(file, text, {**about, "extension_rows": used + len(places)}, output)


def _values(tables, about, name):
    """Return the numbers in a buffer of a file, to be rewritten in place."""
    return tables.Buffers(about["buffers"][name]).DataAsNumpy().view(np.float32)


def _check_room(about):
    if not about.get("extension_room"):
        raise ValueError(
            "--extend needs the file of a local detector that was exported with extension_room. "
            "Received: one without"
        )


def _write(file, text, about, output):
    """Write a file with another description, whole or not at all."""
    new = json.dumps(about).encode().ljust(len(text))
    text[:] = np.frombuffer(new, np.uint8)
    unfinished = f"{output}.{os.getpid()}.tmp"
    try:
        pathlib.Path(unfinished).write_bytes(file)
        os.replace(unfinished, output)
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)


def options_of(arguments):
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument(
        "--recalibrate", nargs="+", metavar="IMAGE", help="normal images to recalibrate with"
    )
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        help="with --recalibrate, largest share of normal images to flag; default: the file's",
    )
    parser.add_argument(
        "--extend", nargs="+", metavar="IMAGE", help="false alarms that are normal from now on"
    )
    parser.add_argument(
        "--output", help="file to write with --recalibrate or --extend; default: replace the model"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads to compute with; default: 1"
    )
    parser.add_argument(
        "--maps", metavar="FOLDER", help="folder to write overlays of anomaly maps to"
    )
    options = parser.parse_args(arguments)
    if options.extend and options.recalibrate:
        raise ValueError("--extend and --recalibrate take two runs. Received: both")
    if options.false_positive_rate is not None and not options.recalibrate:
        raise ValueError("--false_positive_rate needs --recalibrate. Received: none")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1. Received: {options.threads}")
    if options.output and not (options.recalibrate or options.extend):
        raise ValueError("--output needs --recalibrate or --extend. Received: neither")
    return options


def main(arguments=None):
    """Extend or recalibrate the file if asked to, score the images, and return the exit code."""
    options = options_of(arguments)
    file, model = options.model, load(options.model, options.threads)
    about = description(file)

    def read(path):
        return read_image(path, model[2], about.get("resize", "squash"))

    output = options.output or file
    # Images one at a time: a device may have little memory.
    if options.recalibrate:
        normal = [score(model, [read(path)]) for path in options.recalibrate]
        scores = np.concatenate([one["ood_score"] for one in normal])
        recalibrate(file, scores, output, options.false_positive_rate)
        print(json.dumps({"calibrated": output, "images": len(scores)}))
    elif options.extend:
        alarms = [places_of(file, score(model, [read(path)])) for path in options.extend]
        extend(file, np.concatenate(alarms), output)
        print(json.dumps({"extended": output, "rows": sum(map(len, alarms))}))
    if options.recalibrate or options.extend:
        file, model = output, load(output, options.threads)
        about = description(file)
    if options.maps and not about.get("map_size"):
        raise ValueError("--maps needs the file of a local detector. Received: one without maps")
    failed = False
    for path in options.images:
        try:
            image = read(path)
        except ValueError as error:  # The other images are still scored.
            failed = True
            print(json.dumps({"path": path, "error": str(error)}), flush=True)
            continue
        answer = score(model, [image])
        row = {name: values[0].item() for name, values in answer.items() if values.ndim == 1}
        if options.maps:
            row["map"] = str(write_map(options.maps, path, image, answer, about))
        print(json.dumps({"path": path, **row}), flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"ERROR: {error}")
