r"""Scores image files on an edge device, and calibrates there, without TensorFlow.

    pip install ai-edge-litert numpy pillow
    python edge_inference.py parts.tflite photo.png another.jpg

prints for each file its score, its p-value and the decision. This one file is all that a device
needs beside the `.tflite` file that `sddns_tf.export.tflite` wrote.

A camera or a light other than those of the calibration images shifts all scores, and then the
promised false positive rate does not hold. Images of normal parts that the device itself took,
at least `1 / rate - 1` of them and none of them in the bank, calibrate it again, in seconds:

    python edge_inference.py parts.tflite --recalibrate normal/*.png --output parts-here.tflite

A local detector says where as well. Its maps are written over the images, one file for each, with
what lies above the threshold painted from yellow to red and outlined:

    python edge_inference.py parts.tflite photo.png --maps=overlays
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np


def load(path):
    """Return the scorer of a `.tflite` file, its batch size (None for any) and image size."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    batch, height, width, _ = interpreter.get_input_details()[0]["shape_signature"].tolist()
    runner = interpreter.get_signature_runner("serving_default")
    return runner, None if batch < 0 else batch, (height, width)


def read_image(path, size):
    """Return an image file as uint8 `(height, width, 3)`, resized as the detector resizes."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{path} must have 8 bits a channel. Received: mode {image.mode}.")
        image = image.convert("RGB")
        height, width = size
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def score(model, images):
    """Return scores, p-values and decisions of uint8 images `(N, height, width, 3)`.

    Args:
        model: What `load` gave.
        images: The images, as `read_image` reads them.

    Returns:
        Dict of `"ood_score"`, `"p_value"` and `"is_ood"`, arrays `(N,)`; of a local detector also
        `"anomaly_map"`, `(N, h, w)`.
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
    """Return an image with what lies above the threshold painted over it; one scale for all images.

    Args:
        image: uint8 `(height, width, 3)`.
        anomaly_map: Scores of its places, `(h, w)`.
        threshold: Score above which a place is flagged.
        lowest: Score of what is in the bank.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    from PIL import Image

    # 1 is the threshold; 2, where the paint is red, twice as far from the bank.
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
    """Write the overlay of one image as a PNG file of its name; returns the path."""
    from PIL import Image

    picture = overlay(image, answer["anomaly_map"][0], about["threshold"], about["lowest_score"])
    target = pathlib.Path(folder) / f"{pathlib.Path(path).stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(target)
    return target


def _opened(file):
    """Return the file's tables, and its description as bytes that can be rewritten in place."""
    from ai_edge_litert import schema_py_generated as schema

    tables = schema.Model.GetRootAs(file)
    for entry in map(tables.Metadata, range(tables.MetadataLength())):
        if entry.Name() == b"sddns_tf":
            return tables, tables.Buffers(entry.Buffer()).DataAsNumpy()
    raise ValueError("The .tflite file was not written by sddns_tf: it has no description.")


def description(path):
    """Read what a `.tflite` file says about itself: outputs, rate, sizes, version."""
    return json.loads(_opened(bytearray(pathlib.Path(path).read_bytes()))[1].tobytes())


def recalibrate(path, scores, output, false_positive_rate=None):
    """Write a copy of a `.tflite` file that is calibrated with other normal images.

    A p-value is `(1 + number of calibration scores as high) / (1 + number of them)`.

    Args:
        path: The `.tflite` file.
        scores: Its own scores of normal images, `(N,)`, at most `calibration_room` of them.
        output: The file to write, whole or not at all. It may be `path`.
        false_positive_rate: Largest share of normal images to flag. None keeps the file's.
    """
    file = bytearray(pathlib.Path(path).read_bytes())
    tables, text = _opened(file)
    about = json.loads(text.tobytes())
    rate = about["false_positive_rate"] if false_positive_rate is None else false_positive_rate
    scores, room = np.sort(np.asarray(scores, np.float32)), about["calibration_room"]
    if not 0.0 < rate < 1.0 or np.float32(1.0) / np.float32(len(scores) + 1) > np.float32(rate):
        raise ValueError(
            "The false positive rate must be between 0 and 1, and it takes at least 1 / rate - 1 "
            f"calibration images. Received: {rate} and {len(scores)} images."
        )
    if len(scores) > room or not np.isfinite(scores).all():
        raise ValueError(
            f"Expected at most {room} finite scores. Received: {len(scores)}, "
            f"{np.count_nonzero(~np.isfinite(scores))} of them not finite."
        )

    def values(name):
        return tables.Buffers(about["buffers"][name]).DataAsNumpy().view(np.float32)

    values("scores")[:] = -np.inf  # which counts as lower than any score
    values("scores")[: len(scores)] = scores
    ranks = np.arange(1, room + 2, dtype=np.float32)
    values("p_values")[:] = np.minimum(ranks / np.float32(1 + len(scores)), 1.0)
    values("rate")[:] = rate
    p_values = ranks[: len(scores)] / np.float32(1 + len(scores))
    threshold = float(scores[-np.count_nonzero(p_values <= np.float32(rate))])
    changes = {"false_positive_rate": rate, "calibration_images": len(scores)}
    changes["threshold"] = threshold
    new = json.dumps({**about, **changes}).encode().ljust(len(text))
    text[:] = np.frombuffer(new, np.uint8)
    unfinished = f"{output}.{os.getpid()}.tmp"
    try:
        pathlib.Path(unfinished).write_bytes(file)
        os.replace(unfinished, output)
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)


def main(arguments=None):
    """Score the files, or calibrate with them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--recalibrate", nargs="+", metavar="IMAGE", help="normal images")
    parser.add_argument("--false_positive_rate", type=float, help="default: the file's")
    parser.add_argument("--output", help="calibrated file to write; default: the model itself")
    parser.add_argument("--maps", metavar="FOLDER", help="where overlays of anomaly maps go")
    options = parser.parse_args(arguments)
    model = load(options.model)
    if options.recalibrate:
        # One at a time: a device may have little memory.
        normal = [score(model, [read_image(p, model[2])]) for p in options.recalibrate]
        scores = np.concatenate([one["ood_score"] for one in normal])
        output = options.output or options.model
        recalibrate(options.model, scores, output, options.false_positive_rate)
        print(json.dumps({"calibrated": output, "images": len(scores)}))
        model = load(output)
    about = description(options.output or options.model if options.recalibrate else options.model)
    if options.maps and not about.get("map_size"):
        raise ValueError("--maps needs the file of a local detector. Received: one without maps.")
    for path in options.images:
        image = read_image(path, model[2])
        answer = score(model, [image])
        row = {name: values[0].item() for name, values in answer.items() if values.ndim == 1}
        if options.maps:
            row["map"] = str(write_map(options.maps, path, image, answer, about))
        print(json.dumps({"path": path, **row}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"ERROR: {error}")
