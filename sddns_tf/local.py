"""Feature maps of a network's inner layers: places of an image instead of the image as a whole."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.image_ops import center_crop
from sddns_tf.types import Array

# Register tokens and the class token come before patch tokens; there are at most this many.
_MOST_PREFIX_TOKENS = 8
_AUTO_STRIDES = (8, 16)
# Dividing by less would blow up the rounding of channels that hardly vary over the bank.
_SMALLEST_DEVIATION = 0.01


def inner_maps(
    backbone: keras.Model, layers: Any, image_size: tuple[int, int]
) -> tuple[tuple[str, ...], Callable, list[tuple[int, ...]]]:
    """Return the requested layers of a network, and how to compute their maps.

    Args:
        backbone: Built functional Keras model (others may be nested in it), or a
            `VisionTransformer`.
        layers: `"auto"`, the last layers at strides 8 and 16, or at the largest stride of a network
            that does not reach these; `"tokens"`, the patch tokens that enter the last block of a
            vision transformer; or one or more names of layers. A layer of a nested model is
            `"model/layer"`, or `"layer"` if it is the only one of that name.
        image_size: Height and width in pixels of the network's input.

    Returns:
        Tuple of the layers' names; a function from normalized images `(B, H, W, 3)` to a list of
        maps `(B, h, w, C)`; and their shapes `(h, w, C)`.

    Raises:
        ValueError: If there is no such layer, or one gives no map.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            '`layers` must be "auto", "tokens" or names of layers of the backbone. '
            f"Received: layers={layers!r}"
        )
    if hasattr(backbone, "token_maps"):
        return _of_transformer(backbone, names, image_size)
    if not _is_graph(backbone):
        raise ValueError(
            "`layers` needs a backbone whose inner layers can be reached: a functional or "
            "sequential Keras model, or a VisionTransformer. "
            f"Received: {type(backbone).__name__} {backbone.name!r}"
        )
    known = _layer_names(backbone)
    if names not in (("auto",), ("tokens",)):
        known = [_full_name(backbone, known, name) for name in names]
        names = tuple(known)
    specs = _model_of(backbone, known).compute_output_spec(
        keras.KerasTensor((None, *image_size, 3))
    )
    shapes = {
        name: getattr(spec, "shape", None)
        for name, spec in zip(known, _as_list(specs), strict=True)
    }
    if names == ("auto",):
        names = _auto_names(backbone, shapes, image_size)
    elif names == ("tokens",):
        names = _tokens_name(shapes, image_size)
    grids = [_grid(name, shapes[name], image_size) for name in names]
    model = _model_of(backbone, names)

    def maps(images):
        outputs = _as_list(model(images, training=False))
        return [_as_map(output, *grid) for output, grid in zip(outputs, grids, strict=True)]

    return tuple(names), maps, grids


def _as_list(outputs):
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _of_transformer(backbone, names, image_size):
    """Return maps of the tokens that leave some blocks of a `VisionTransformer`."""
    if set(names) & {"auto", "tokens"}:
        if len(names) > 1:
            raise ValueError(f'"auto" and "tokens" stand alone. Received: layers={names}')
        names = (f"blocks_{backbone.depth - 2}",) if backbone.depth > 1 else ("patch_embedding",)
    known = {"patch_embedding": 0, **{f"blocks_{i}": i + 1 for i in range(backbone.depth)}}
    for name in names:
        if name not in known:
            raise ValueError(
                f"{backbone.name!r} gives maps of {list(known)}. Received: layers={name!r}"
            )
    passed = [known[name] for name in names]
    rows, columns = (side // backbone.patch_size for side in image_size)

    def maps(images):
        with tf.name_scope(backbone.name):  # As in a call: exports find it by its name.
            return backbone.token_maps(images, passed)

    return names, maps, [(rows, columns, backbone.hidden_dim)] * len(names)


def _is_graph(layer):
    """Tell whether a layer is a functional or sequential model, whose layers can be reached."""
    return isinstance(layer, keras.Model) and bool(getattr(layer, "inputs", None))


def _layer_names(model, prefix=""):
    """Return names of the layers of a model; those of nested models as `"model/layer"`."""
    names = []
    for layer in model.layers:
        if not isinstance(layer, keras.layers.InputLayer):
            names.append(prefix + layer.name)
            names += _layer_names(layer, f"{names[-1]}/") if _is_graph(layer) else []
    return names


def _full_name(backbone, known, name):
    """Return the known name that `name` stands for."""
    if name in known:
        return name
    found = [one for one in known if one.endswith(f"/{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"Several layers of {backbone.name!r} have that name: {found}. "
            f"Received: layers={name!r}"
        )
    near = difflib.get_close_matches(name, known, 5, 0.4) or known[-5:]
    raise ValueError(
        f"{backbone.name!r} has no layer of that name; some that it has: {near}. "
        f"Received: layers={name!r}"
    )


def _model_of(backbone, names):
    """Return a model of the same layers with the outputs of the named ones."""
    given = backbone.inputs[0]
    images = keras.Input(given.shape[1:], dtype=given.dtype, name=given.name)
    found = {}
    _run(backbone, images, found)
    return keras.Model(images, [found[name] for name in names], name=backbone.name)


def _run(model, inputs, found, prefix=""):
    """Run a model on symbolic inputs, and store the output of each layer in `found`."""

    def call(layer, *args, **kwargs):
        found[prefix + layer.name] = output = layer(*args, **kwargs)
        if _is_graph(layer):
            _run(layer, args[0], found, f"{prefix}{layer.name}/")
        return output

    if isinstance(model, keras.Sequential):
        for layer in model.layers:
            inputs = call(layer, inputs)
    else:
        # Inputs may have names, as in KerasHub: {"images": ...}.
        inputs = keras.tree.pack_sequence_as(model.input, keras.tree.flatten(inputs))
        keras.models.clone_model(
            model, inputs, clone_function=lambda layer: layer, call_function=call
        )


def _auto_names(backbone, shapes, image_size):
    """Return the last layers at strides 8 and 16, skipping the widened insides of blocks.

    A shallow network gives those at its largest stride.
    """
    names, strides = [], {_stride(one, image_size) for one in shapes.values() if _is_map(one)}
    shallow = strides and max(strides) < _AUTO_STRIDES[0]
    for stride in (max(strides),) if shallow else _AUTO_STRIDES:
        at_stride = {
            name: shape[-1]
            for name, shape in shapes.items()
            if _is_map(shape)
            and _stride(shape, image_size) == stride
            and min(shape[1:3]) > 1
            and not isinstance(_layer(backbone, name), keras.layers.ZeroPadding2D)
        }
        # A block ends in a sum; wider and narrower layers are inside the next block.
        sums = [
            channels
            for name, channels in at_stride.items()
            if isinstance(_layer(backbone, name), keras.layers.Add)
        ]
        ends = [name for name, channels in at_stride.items() if not sums or channels == sums[-1]]
        names += ends[-1:]
    if not names:
        raise ValueError(
            f'"auto" takes the last layers at strides {_AUTO_STRIDES} with maps of at least 2 x 2 '
            f"places, and there are none for images of {image_size[0]} x {image_size[1]} px: the "
            f"maps have strides {sorted(strides)}. Name layers. Received: layers='auto'"
        )
    return tuple(names)


def _layer(model, name):
    first, _, rest = name.partition("/")
    return _layer(model.get_layer(first), rest) if rest else model.get_layer(first)


def _tokens_name(shapes, image_size):
    """Return the last layer that gives patch tokens."""
    for name, shape in reversed(shapes.items()):
        if shape is not None and len(shape) == 3 and _token_grid(shape, image_size):
            return (name,)
    raise ValueError(
        'The backbone has no layer of tokens of patches, (batch, tokens, dimension). Use "auto" '
        "or names of layers. Received: layers='tokens'"
    )


def _is_map(shape):
    return shape is not None and len(shape) == 4 and None not in shape[1:]


def _stride(shape, image_size):
    return 2 ** round(np.log2(max(1.0, image_size[0] / shape[1])))


def _token_grid(shape, image_size):
    """Return rows and columns of the patches that tokens `(B, T, D)` stand for, or None."""
    height, width = image_size
    for patch in range(2, min(height, width) + 1):
        if height % patch or width % patch:
            continue
        rows, columns = height // patch, width // patch
        if rows * columns <= (shape[1] or 0) <= rows * columns + _MOST_PREFIX_TOKENS:
            return rows, columns
    return None


def _grid(name, shape, image_size):
    """Return the rows, columns and channels of a layer's output."""
    grid = None
    if _is_map(shape):
        grid = shape[1:3]
    elif shape is not None and len(shape) == 3:
        grid = _token_grid(shape, image_size)
    if grid is None:
        raise ValueError(
            "`layers` must give maps (batch, height, width, channels), or tokens of patches. "
            f"Received: layer {name!r}, which gives shape {shape} for images of {image_size[0]} x "
            f"{image_size[1]} px"
        )
    return (*grid, shape[-1])


def _as_map(output, rows, columns, channels):
    """Return maps as they are, and tokens as maps of the patch tokens, which come last."""
    if len(output.shape) == 4:
        return output
    return tf.reshape(output[:, -rows * columns :], [-1, rows, columns, channels])


def check_grids(
    names: Sequence[str], grids: Sequence[tuple[int, ...]], image_size: tuple[int, int]
) -> None:
    """Raise a `ValueError` unless the first map has several places."""
    rows, columns, _ = grids[0]
    if rows < 2 or columns < 2:
        raise ValueError(
            "The image is hardly larger than one place of the map: take a larger `image_size` or "
            f"an earlier layer. Received: layer {names[0]!r}, which gives {rows} x {columns} "
            f"places for images of {image_size[0]} x {image_size[1]} px"
        )


def combined(maps: Sequence[tf.Tensor]) -> tf.Tensor:
    """Combine the maps of several layers: averaged over 3 x 3 places, on the grid of the first.

    Args:
        maps: List of maps `(B, h_i, w_i, C_i)`, any float dtype.

    Returns:
        Float32 `(B, h_0, w_0, sum of C_i)`.

    Reference:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), CVPR 2022,
        section 3.1.
    """
    grid, found = maps[0].shape[1:3], []
    for one in maps:
        # Padding does not count: places at the border average over fewer.
        pooled = tf.nn.avg_pool2d(tf.cast(one, tf.float32), 3, 1, "SAME")
        if pooled.shape[1:3] != grid:
            pooled = tf.image.resize(pooled, grid, "bilinear")
        found.append(pooled)
    return tf.concat(found, axis=-1) if len(found) > 1 else found[0]


def smoothed(maps: Array, counted: Array, side: int) -> tf.Tensor:
    """Average maps of scores over squares of places.

    Args:
        maps: Float32 `(B, h, w)`.
        counted: Float32 `(h, w)`, 1 for places that count and 0 for those that do not. Like the
            padding, these are in no mean.
        side: Odd int, places on a side of a square.

    Returns:
        Float32 `(B, h, w)`; 0 where no place of the square counts.
    """

    def pooled(x):
        return tf.nn.avg_pool2d(x[..., tf.newaxis], side, 1, "SAME")[..., 0]

    sums = pooled(tf.where(counted > 0.5, maps, 0.0))
    # At the least one place of a square: TFLite has no division that leaves out zeros.
    return sums / tf.maximum(pooled(counted[tf.newaxis]), 1.0 / side**2)


class Moments:
    """Mean and deviation of each channel over all places of a stream of maps."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, rows: np.ndarray) -> None:
        """Add rows `(N, C)`.

        Reference:
            Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
            sample variances", 1979.
        """
        if not len(rows):
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        # Around their own mean, float32 is enough: what a square loses is far below the deviation.
        centered = rows - mean.astype(np.float32)
        squares = np.einsum("nc,nc->c", centered, centered, dtype=np.float64, casting="same_kind")
        total = self.count + len(rows)
        self._squares += squares + (mean - self.mean) ** 2 * self.count * len(rows) / total
        self.mean += (mean - self.mean) * len(rows) / total
        self.count = total

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation `(C,)`; for channels that hardly vary, a small share of the median."""
        return safe_deviation(self._squares / max(self.count, 1))


def safe_deviation(variance: np.ndarray) -> np.ndarray:
    """Return deviations `(C,)` to divide by: those of channels that hardly vary are raised."""
    deviation = np.sqrt(variance)
    varying = deviation[deviation > 0]
    typical = np.median(varying) if len(varying) else 1.0
    return np.maximum(deviation, _SMALLEST_DEVIATION * typical)


def counted_places(ignore: Any, extractor: Any) -> np.ndarray:
    """Return the places of a map that count, given a mask of those that do not.

    Args:
        ignore: None, a bool array `(h, w)` or `(H, W)`, true where nothing counts, or the path of
            an image file that is not black there. A place does not count if at least half of it is
            masked. A mask of an image is cropped as images are.
        extractor: `FeatureExtractor` with feature maps.

    Returns:
        NumPy bool `(h, w)`.

    Raises:
        ValueError: If the mask does not have the map's proportions, or leaves no place.
    """
    grid = extractor.map_size
    if ignore is None:
        return np.ones(grid, bool)
    if isinstance(ignore, (str, pathlib.Path)):
        from PIL import Image

        with Image.open(ignore) as image:
            mask = np.asarray(image.convert("L")) > 0
    else:
        mask = np.asarray(ignore)
    is_mask = mask.ndim == 2 and min(mask.shape) > 0
    if is_mask and extractor.resize == "crop" and mask.shape != grid:
        sides = extractor.resolution or extractor.image_size
        mask = center_crop(mask[np.newaxis, ..., np.newaxis], *sides)[0, ..., 0]
    rows, columns = grid
    fits = is_mask and mask.dtype == bool
    if fits:
        # The same proportions, up to rounding a side to whole places.
        height, width = extractor.resolution or grid
        ratios = [(mask.shape[0] / mask.shape[1]) * w / h for h, w in (grid, (height, width))]
        fits = mask.shape[0] >= rows and mask.shape[1] >= columns
        fits = fits and any(0.8 < ratio < 1.25 for ratio in ratios)
    if not fits:
        raise ValueError(
            f"`ignore` must be a bool mask of the map's {rows} x {columns} places or a larger one "
            "of the proportions of the map or of the images, as they are read. "
            f"Received: shape={mask.shape}, dtype={mask.dtype}"
        )
    cells = tf.image.resize(mask[np.newaxis, ..., np.newaxis].astype(np.float32), grid, "area")
    counted = cells.numpy()[0, ..., 0] < 0.5
    if not counted.any():
        raise ValueError(
            "`ignore` leaves no place that counts. Received: a mask of "
            f"{mask.mean():.0%} of {mask.shape}"
        )
    return counted
