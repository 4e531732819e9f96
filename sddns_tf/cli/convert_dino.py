r"""Convert a PyTorch DINO checkpoint to Keras weights.

    sddns convert-dino --checkpoint=dino_deitsmall16_pretrain.pth --output=dino_vits16.weights.h5

Prints the constructor call of a model whose `load_weights` takes the file. Needs PyTorch to read
the checkpoint. Sizes are inferred from the shapes of the parameters. Two things cannot be inferred
and may be given: the aspect ratio of the images and the number of attention heads.
"""

from __future__ import annotations

import argparse
import pickle
from typing import Any

import numpy as np

from sddns_tf import files
from sddns_tf.cli import starting
from sddns_tf.cli.console import Parser, positive_int, require, size
from sddns_tf.cli.errors import UsageError, user_input


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("convert-dino", __doc__)
    group = parser.group("what most people need")
    group.add_argument("--checkpoint", metavar="FILE", help="Checkpoint to read (.pth).")
    group.add_argument(
        "--output", metavar="FILE", help="File to write the backbone's weights to (.weights.h5)."
    )
    group.add_argument(
        "--head_output",
        metavar="FILE",
        help="File to write the projection head's weights to (.weights.h5).",
    )
    group.add_argument(
        "--key",
        metavar="NAME",
        default="teacher",
        help="Network to take from a checkpoint that holds several. Default: teacher.",
    )
    group.add_argument(
        "--image_size",
        metavar="SIZE",
        type=size,
        help="SIDE or HEIGHT,WIDTH in pixels of the images that the network was trained on.",
    )
    group.add_argument(
        "--num_heads",
        metavar="N",
        type=positive_int,
        help="Number of attention heads. Default: hidden_dim / 64.",
    )
    return parser


def read_state(path: str, key: str) -> dict[str, np.ndarray]:
    """Return the parameters in a checkpoint.

    Args:
        path: Path of a `.pth` file.
        key: Entry to take if the file holds several networks.

    Returns:
        Dictionary of DINO's parameter names to NumPy arrays.
    """
    try:
        import torch
    except ImportError as e:
        raise UsageError(
            f"--checkpoint needs PyTorch, which reads it: pip install torch. Received: {path}"
        ) from e

    try:
        # DINO's training checkpoints also hold the parsed command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UsageError(f"--checkpoint must be an existing file. Received: {path}") from e
    except OSError as e:
        raise UsageError(
            f"--checkpoint must be a file that can be read. Received: {path} ({e.strerror})"
        ) from e
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise UsageError(
            f"--checkpoint must be a PyTorch checkpoint. Received: {path} ({e})"
        ) from e
    if not isinstance(checkpoint, dict):
        raise UsageError(
            "--checkpoint must hold a dictionary of parameters. "
            f"Received: a {type(checkpoint).__name__}"
        )
    if not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        if not isinstance(checkpoint.get(key), dict):
            raise UsageError(
                f"--key must be one of the checkpoint's networks {sorted(checkpoint)}. "
                f"Received: {key}"
            )
        checkpoint = checkpoint[key]
    return {
        name: value.float().numpy()
        for name, value in checkpoint.items()
        if isinstance(value, torch.Tensor)
    }


def infer_backbone(
    shapes: dict[str, tuple[int, ...]],
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Return arguments of the `VisionTransformer` whose parameters have these shapes.

    Args:
        shapes: Dictionary of DINO's parameter names, without prefixes, to shapes.
        image_size: Side or (height, width) in pixels, or None if the image is square.
        num_heads: Number of attention heads, or None for `hidden_dim / 64`.

    Returns:
        Dictionary of arguments.
    """
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UsageError(
            f"--checkpoint must be of a DINO vision transformer, with {', '.join(needed)}. "
            f"Received: {', '.join(sorted(shapes)[:10])} ..."
        )
    hidden_dim, _, patch_size, _ = shapes["patch_embed.proj.weight"]
    patches = shapes["pos_embed"][1] - 1
    if image_size is None:
        side = round(patches**0.5)
        if side * side != patches:
            raise UsageError(
                f"--image_size is needed, as HEIGHT,WIDTH: the checkpoint's {patches} patches do "
                "not form a square. Received: none"
            )
        image_size = side * patch_size
    if num_heads is None:
        if hidden_dim % 64:
            raise UsageError(
                f"--num_heads is needed: the width {hidden_dim} is not a multiple of 64. "
                "Received: none"
            )
        num_heads = hidden_dim // 64
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / hidden_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
    }


def infer_head(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return arguments of the `ProjectionHead` whose parameters have these shapes.

    Args:
        shapes: Dictionary of DINO's parameter names, without prefixes, to shapes.

    Returns:
        Dictionary of arguments.
    """
    kernels = [name for name in shapes if name.startswith("mlp.") and name.endswith("weight")]
    if "last_layer.weight_v" not in shapes or not kernels:
        raise UsageError(
            "--head_output needs a checkpoint with a projection head. Received: one without"
        )
    num_prototypes, bottleneck_dim = shapes["last_layer.weight_v"]
    return {
        "num_prototypes": num_prototypes,
        # Has no effect without hidden layers.
        "hidden_dim": shapes["mlp.0.weight"][0] if len(kernels) > 1 else bottleneck_dim,
        "bottleneck_dim": bottleneck_dim,
        "num_layers": len(kernels),
    }


def convert(
    checkpoint: str,
    key: str,
    output: str,
    head_output: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> None:
    """Write the weights of a checkpoint's backbone and, on request, of its projection head.

    Args:
        checkpoint: Path of a `.pth` file.
        key: Entry to take if the file holds several networks.
        output: Path to write the backbone's weights to.
        head_output: Path to write the head's weights to, or None to skip the head.
        image_size: Side or (height, width) in pixels, or None to infer it.
        num_heads: Number of attention heads, or None to infer it.
    """
    state = read_state(checkpoint, key)

    # Imported after reading the checkpoint, so that a wrong file fails at once.
    starting.import_tensorflow()
    from sddns_tf import dino_weights, heads, vit

    shapes: dict[str, dict[str, tuple[int, ...]]] = {"backbone": {}, "head": {}}
    for full_name, value in state.items():
        part, name = dino_weights.split_prefix(full_name)
        for wanted in shapes if part is None else [part]:
            shapes[wanted][name] = value.shape
    config = infer_backbone(shapes["backbone"], image_size, num_heads)
    with user_input("checkpoint"):
        backbone = dino_weights.load_backbone(vit.VisionTransformer(**config), state)
    converted = [("output", backbone, config, output)]
    if head_output:
        config = infer_head(shapes["head"])
        head = heads.ProjectionHead(**config)
        head.build((None, backbone.hidden_dim))
        head = dino_weights.load_head(head, state)
        converted.append(("head_output", head, config, head_output))
    for option, model, config, path in converted:
        with user_input(option), files.replacing(path) as unfinished:
            model.save_weights(unfinished)
        arguments = ", ".join(f"{name}={value!r}" for name, value in config.items())
        print(f"{path}: sddns_tf.{type(model).__name__}({arguments})")


def main(argv: list[str]) -> None:
    """Convert the checkpoint that the options name."""
    options = parser().parse_args(argv)
    require(options, "checkpoint", "output")
    for name in ("output", "head_output"):
        path = getattr(options, name)
        if path and not path.endswith(".weights.h5"):
            raise UsageError(f"--{name} must end in .weights.h5. Received: {path}")
    convert(
        options.checkpoint,
        options.key,
        options.output,
        options.head_output,
        tuple(options.image_size) if isinstance(options.image_size, list) else options.image_size,
        options.num_heads,
    )
