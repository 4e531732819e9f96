"""Loads DINO's published parameters into `VisionTransformer` and `ProjectionHead`.

The parameters are NumPy arrays under their names in PyTorch (`blocks.0.attn.qkv.weight`), with or
without the prefixes `module.`, `backbone.` and `head.` that wrappers add. To read a `.pth` file,
see `sddns convert-dino`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def load_backbone(backbone: keras.Model, state: Any) -> keras.Model:
    """Assign DINO's parameters to a vision transformer.

    Everything is checked before anything is assigned. At `image_size` the features are DINO's. At
    other sizes DINO's own code samples the position embedding up to a tenth of a patch off, because
    it enlarges the scale to keep a size from being rounded down; here the samples are where the
    patches are.

    Args:
        backbone: `VisionTransformer` of the same sizes.
        state: Dictionary of DINO's parameter names to arrays. Entries with the prefix `head.` are
            ignored; every other entry must belong to the backbone.

    Returns:
        `backbone`.

    Raises:
        ValueError: If an entry is missing, unexpected, or of a different shape than the backbone's.

    Example:
    ```python
    backbone = load_backbone(vit_small(image_size=224), dict(np.load("dino_vits16.npz")))
    ```
    """
    state = _part(state, "backbone")
    _check_grid(backbone, state)
    _assign(backbone, _backbone_entries(backbone), state)
    return backbone


def load_head(head: keras.Model, state: Any) -> keras.Model:
    """Assign DINO's parameters to a projection head.

    Everything is checked before anything is assigned.

    Args:
        head: `ProjectionHead` of the same sizes, built.
        state: Dictionary of DINO's parameter names to arrays. Entries with the prefix `backbone.`
            are ignored; every other entry must belong to the head.

    Returns:
        `head`.

    Raises:
        ValueError: If the head is not built, or if an entry is missing, unexpected, or of a
            different shape than the head's.

    Example:
    ```python
    head = ProjectionHead(num_prototypes=65536)
    head.build((None, 384))
    load_head(head, state)
    ```
    """
    if not head.built:
        raise ValueError(
            "`head` must be built: call `head.build((None, D))` with the length D of a feature. "
            f"Received: {head.name}, not built"
        )
    _assign(head, _head_entries(head), _part(state, "head"))
    return head


def split_prefix(name: str) -> tuple[str | None, str]:
    """Split a parameter's name into the part that it belongs to and its own name.

    Args:
        name: Parameter's name, such as `"module.head.mlp.0.weight"`.

    Returns:
        `("backbone" or "head" or None, name without prefixes)`.
    """
    part = None
    while True:
        first, _, rest = name.partition(".")
        if first not in ("module", "backbone", "head"):
            return part, name
        part = part if first == "module" else first
        name = rest


def _part(state, wanted):
    """Return the entries that belong to `wanted` or name no part, without prefixes."""
    entries = {}
    for full_name, value in state.items():
        part, name = split_prefix(full_name)
        if part not in (None, wanted):
            continue
        if name in entries:
            raise ValueError(f"`state` has more than one entry for {name}. Received: {full_name}")
        entries[name] = np.asarray(value)
    return entries


# An entry is (name in DINO, Keras variable, shape in DINO, axes of DINO's array in Keras' order).
def _same(name, variable):
    shape = tuple(variable.shape)
    return name, variable, shape, tuple(range(len(shape)))


def _transposed(name, kernel):
    return name, kernel, tuple(kernel.shape)[::-1], (1, 0)


def _dense_entries(name, layer):
    yield _transposed(f"{name}.weight", layer.kernel)
    if layer.bias is not None:
        yield _same(f"{name}.bias", layer.bias)


def _norm_entries(name, layer):
    yield _same(f"{name}.weight", layer.gamma)
    yield _same(f"{name}.bias", layer.beta)


def _backbone_entries(backbone):
    yield _same("cls_token", backbone.class_token)
    yield _same("pos_embed", backbone.position_embedding)
    kernel = backbone.patch_embedding.kernel
    height, width, channels, dim = kernel.shape
    yield "patch_embed.proj.weight", kernel, (dim, channels, height, width), (2, 3, 1, 0)
    yield _same("patch_embed.proj.bias", backbone.patch_embedding.bias)
    for i, block in enumerate(backbone.blocks):
        yield from _norm_entries(f"blocks.{i}.norm1", block.attention_norm)
        yield from _dense_entries(f"blocks.{i}.attn.qkv", block.attention.qkv)
        yield from _dense_entries(f"blocks.{i}.attn.proj", block.attention.projection)
        yield from _norm_entries(f"blocks.{i}.norm2", block.mlp_norm)
        yield from _dense_entries(f"blocks.{i}.mlp.fc1", block.mlp_hidden)
        yield from _dense_entries(f"blocks.{i}.mlp.fc2", block.mlp_output)
    yield from _norm_entries("norm", backbone.norm)


def _head_entries(head):
    for i, layer in enumerate(head.mlp):
        # Between two linear layers of DINO's MLP is an activation, which takes up a number too.
        yield from _dense_entries(f"mlp.{2 * i}" if len(head.mlp) > 1 else "mlp", layer)
    yield _transposed("last_layer.weight_v", head.last_layer.kernel)
    yield "last_layer.weight_g", head.last_layer.gain, (head.num_prototypes, 1), (0, 1)


def _check_grid(backbone, state):
    """Raise a `ValueError` with advice if the position embedding has another grid."""
    own = tuple(backbone.position_embedding.shape)
    received = state["pos_embed"].shape if "pos_embed" in state else own
    if len(received) != 3 or received[2] != own[2] or received == own:
        return
    side = round(max(received[1] - 1, 0) ** 0.5)
    advice = (
        f"image_size={side * backbone.patch_size}"
        if side * side == received[1] - 1
        else f"an `image_size` of {received[1] - 1} patches"
    )
    raise ValueError(
        f"`pos_embed` belongs to another grid of patches than the backbone's: build the backbone "
        f"with {advice} (patch_size={backbone.patch_size}); it takes images of other sizes all the "
        f"same. Expected: shape {own}. Received: shape {received}"
    )


def _assign(model, entries, state):
    """Assign `state` to the variables of `entries`; raise a `ValueError` unless all fit."""
    entries = {name: entry for name, *entry in entries}
    problems = [
        f"no {name}, expected with shape {shape}"
        for name, (_, shape, _) in entries.items()
        if name not in state
    ]
    for name, value in state.items():
        if name not in entries:
            problems.append(f"{name} of shape {value.shape}, not expected at all")
        elif value.shape != entries[name][1]:
            problems.append(f"{name} of shape {value.shape}, expected {entries[name][1]}")
    if problems:
        raise ValueError(
            f"`state` must fit `{model.name}`; nothing was assigned. Received: "
            + "; ".join(problems)
        )
    for name, (variable, _, axes) in entries.items():
        variable.assign(np.reshape(np.transpose(state[name], axes), variable.shape))
