"""DINO's parameters give DINO's outputs, whatever their prefixes, and misfits are named."""

import argparse
import os

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import erf
from skimage import data

from sddns_tf import dino_weights, heads, vit
from sddns_tf.cli import convert_dino
from sddns_tf.cli.errors import UsageError


def photographs(height, width):
    """Four normalized crops of photographs, float32 (4, height, width, 3)."""
    crops = [x[100 : 100 + height, 150 : 150 + width] for x in (data.astronaut(), data.coffee())]
    crops += [crop[::-1] for crop in crops]
    return ((np.stack(crops) / 255.0 - 0.45) / 0.225).astype("float32")


def backbone_state(grid=(4, 4), patch=4, dim=24, depth=1, hidden=48):
    """Random parameters under DINO's names, of a size where each of them matters."""
    generator = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + grid[0] * grid[1], dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for i in range(depth):
        shapes |= {f"blocks.{i}.{norm}.weight": (dim,) for norm in ("norm1", "norm2")}
        shapes |= {f"blocks.{i}.{norm}.bias": (dim,) for norm in ("norm1", "norm2")}
        for layer, (fan_out, fan_in) in {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (hidden, dim),
            "mlp.fc2": (dim, hidden),
        }.items():
            shapes[f"blocks.{i}.{layer}.weight"] = (fan_out, fan_in)
            shapes[f"blocks.{i}.{layer}.bias"] = (fan_out,)
    return {
        name: (0.3 * generator.normal(size=shape) + ("norm" in name)).astype("float32")
        for name, shape in shapes.items()
    }


def head_state(dim=24, hidden=32, bottleneck=8, prototypes=40):
    """Random parameters of a head under DINO's names."""
    generator = np.random.default_rng(1)
    shapes = {
        "mlp.0.weight": (hidden, dim),
        "mlp.0.bias": (hidden,),
        "mlp.2.weight": (hidden, hidden),
        "mlp.2.bias": (hidden,),
        "mlp.4.weight": (bottleneck, hidden),
        "mlp.4.bias": (bottleneck,),
        "last_layer.weight_g": (prototypes, 1),
        "last_layer.weight_v": (prototypes, bottleneck),
    }
    return {
        name: (0.5 * generator.normal(size=shape)).astype("float32")
        for name, shape in shapes.items()
    }


def tiny_backbone(**kwargs):
    config = {"image_size": 16, "patch_size": 4, "hidden_dim": 24, "depth": 1, "num_heads": 3}
    return vit.VisionTransformer(**{**config, "mlp_ratio": 2, **kwargs})


def tiny_head(**kwargs):
    config = {"num_prototypes": 40, "hidden_dim": 32, "bottleneck_dim": 8, **kwargs}
    head = heads.ProjectionHead(**config)
    head.build((None, 24))
    return head


def assert_close(received, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(received, expected, atol=1e-4 * scale)


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def numpy_backbone(state, images, num_heads):
    """DINO's vision transformer of one block in NumPy, float64, at its own resolution."""
    state = {name: np.float64(value) for name, value in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    dim, _, patch, _ = kernel.shape
    patches = [
        np.einsum("byxc,dcyx->bd", images[:, i : i + patch, j : j + patch], kernel)
        for i in range(0, images.shape[1], patch)
        for j in range(0, images.shape[2], patch)
    ]
    x = np.stack(patches, 1) + state["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(state["cls_token"], len(images), 0), x], 1)
    x = x + state["pos_embed"]
    batch, length, _ = x.shape
    qkv = linear("blocks.0.attn.qkv", norm("blocks.0.norm1", x))
    q, k, v = qkv.reshape(batch, length, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    weights = np.exp(np.einsum("bhnd,bhmd->bhnm", q, k) / np.sqrt(dim // num_heads))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bhmd->bnhd", weights, v).reshape(batch, length, dim)
    x = x + linear("blocks.0.attn.proj", mixed)
    hidden = gelu(linear("blocks.0.mlp.fc1", norm("blocks.0.norm2", x)))
    x = x + linear("blocks.0.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def torch_backbone(state, num_heads, patch, depth):
    """DINO's vision transformer in PyTorch, which holds `state`.

    DINO itself resamples the position embedding by `scale_factor=(n + 0.1) / N`, where the 0.1 is
    there to keep the result from rounding to n - 1 samples. PyTorch then places the samples by that
    factor, up to a tenth of a patch off. Ours, and this one, resample to the size itself.
    """
    torch = pytest.importorskip("torch")
    from torch import nn
    from torch.nn import functional

    dim = state["cls_token"].shape[-1]
    hidden = state["blocks.0.mlp.fc1.bias"].shape[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
            self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

        def forward(self, x):
            batch, length, _ = x.shape
            qkv = self.attn["qkv"](self.norm1(x))
            q, k, v = qkv.reshape(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, length, dim))
            return x + self.mlp["fc2"](nn.GELU()(self.mlp["fc1"](self.norm2(x))))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(state["cls_token"].shape))
            self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = nn.LayerNorm(dim, eps=1e-6)

        def forward(self, images):
            x = self.patch_embed["proj"](images)
            side = round((self.pos_embed.shape[1] - 1) ** 0.5)
            grid = self.pos_embed[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
            if x.shape[2:] != grid.shape[2:]:
                grid = functional.interpolate(
                    grid, size=x.shape[2:], mode="bicubic", align_corners=False
                )
            x = (x + grid).flatten(2).transpose(1, 2)
            token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([token, x], 1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)[:, 0]

    model = Backbone().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})

    def features(images):
        with torch.no_grad():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return features


def test_backbone_equals_a_numpy_transformer():
    state = backbone_state()
    backbone = tiny_backbone()
    assert dino_weights.load_backbone(backbone, state) is backbone
    images = photographs(16, 16)
    assert_close(backbone(images), numpy_backbone(state, images, num_heads=3))


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 48)])
def test_backbone_equals_a_torch_transformer(size):
    state = backbone_state(grid=(8, 8), depth=3)
    reference = torch_backbone(state, num_heads=3, patch=4, depth=3)
    backbone = dino_weights.load_backbone(tiny_backbone(image_size=32, depth=3), state)
    images = photographs(*size)
    assert_close(backbone(images), reference(images))


def test_head_equals_dinos_formula():
    state = head_state()
    head = tiny_head()
    assert dino_weights.load_head(head, state) is head
    x = np.random.default_rng(2).normal(size=(6, 24)).astype("float32")
    hidden = gelu(x @ state["mlp.0.weight"].T + state["mlp.0.bias"])
    hidden = gelu(hidden @ state["mlp.2.weight"].T + state["mlp.2.bias"])
    code = hidden @ state["mlp.4.weight"].T + state["mlp.4.bias"]
    code /= np.linalg.norm(code, axis=1, keepdims=True)
    v = state["last_layer.weight_v"]
    weight = state["last_layer.weight_g"] * v / np.linalg.norm(v, axis=1, keepdims=True)
    assert_close(head(x), code @ weight.T)


def test_head_equals_a_torch_head():
    torch = pytest.importorskip("torch")
    from torch import nn

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)
            )
            self.last_layer = nn.utils.weight_norm(nn.Linear(8, 40, bias=False))

        def forward(self, x):
            return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))

    state = head_state()
    reference = Head()
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x = np.random.default_rng(2).normal(size=(6, 24)).astype("float32")
    head = dino_weights.load_head(tiny_head(), state)
    assert_close(head(x), reference(torch.from_numpy(x)).detach().numpy())


def test_head_of_one_layer():
    state = head_state(hidden=8)
    state = {name: value for name, value in state.items() if not name.startswith("mlp")}
    state |= {"mlp.weight": np.ones((8, 24), "float32"), "mlp.bias": np.ones(8, "float32")}
    head = dino_weights.load_head(tiny_head(num_layers=1), state)
    assert np.all(np.asarray(head.mlp[0].kernel) == 1)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_whole_checkpoint_gives_each_network_its_part(wrapper):
    full = {f"{wrapper}backbone.{name}": value for name, value in backbone_state().items()}
    full |= {f"{wrapper}head.{name}": value for name, value in head_state().items()}
    backbone = dino_weights.load_backbone(tiny_backbone(), full)
    head = dino_weights.load_head(tiny_head(), full)
    expected = dino_weights.load_backbone(tiny_backbone(), backbone_state())
    for received, weight in zip(backbone.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(received, weight)
    np.testing.assert_array_equal(
        head.last_layer.gain, full[f"{wrapper}head.last_layer.weight_g"][:, 0]
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("cls_token", (None, "cls_token")),
        ("module.cls_token", (None, "cls_token")),
        ("module.backbone.norm.weight", ("backbone", "norm.weight")),
        ("backbone.module.norm.weight", ("backbone", "norm.weight")),
        ("head.mlp.0.weight", ("head", "mlp.0.weight")),
        ("blocks.0.attn.head.weight", (None, "blocks.0.attn.head.weight")),
    ],
)
def test_prefixes_are_split_off(name, split):
    assert dino_weights.split_prefix(name) == split


def test_misfits_are_all_named_and_nothing_is_assigned():
    state = backbone_state()
    del state["blocks.0.attn.qkv.bias"]
    state["fc.weight"] = np.zeros((10, 24))
    state["norm.weight"] = np.zeros(23)
    state["patch_embed.proj.weight"] = np.zeros((24, 3, 8, 4))
    backbone = tiny_backbone()
    before = backbone.get_weights()
    with pytest.raises(ValueError) as error:
        dino_weights.load_backbone(backbone, state)
    for part in (
        "no blocks.0.attn.qkv.bias, expected with shape (72,)",
        "fc.weight of shape (10, 24), not expected",
        "norm.weight of shape (23,), expected (24,)",
        "patch_embed.proj.weight of shape (24, 3, 8, 4), expected (24, 3, 4, 4)",
    ):
        assert part in str(error.value)
    for weight, old in zip(backbone.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)

    state = head_state()
    state["last_layer.weight_g"] = np.ones(40)
    with pytest.raises(ValueError, match=r"weight_g of shape \(40,\), expected \(40, 1\)"):
        dino_weights.load_head(tiny_head(), state)


def test_ambiguous_entries_and_an_unbuilt_head_are_refused():
    state = backbone_state()
    state["module.cls_token"] = state["cls_token"]
    with pytest.raises(ValueError, match="more than one entry for cls_token"):
        dino_weights.load_backbone(tiny_backbone(), state)
    with pytest.raises(ValueError, match="must be built"):
        dino_weights.load_head(heads.ProjectionHead(), head_state())


def test_another_grid_says_how_to_build_the_backbone():
    with pytest.raises(ValueError, match=r"image_size=32 .*\(1, 17, 24\).*\(1, 65, 24\)"):
        dino_weights.load_backbone(tiny_backbone(), backbone_state(grid=(8, 8)))
    with pytest.raises(ValueError, match="of 24 patches"):
        dino_weights.load_backbone(tiny_backbone(), backbone_state(grid=(6, 4)))
    dino_weights.load_backbone(tiny_backbone(image_size=(24, 16)), backbone_state(grid=(6, 4)))


def test_sizes_are_inferred_from_shapes():
    shapes = {n: v.shape for n, v in backbone_state((3, 3), dim=128, depth=2, hidden=512).items()}
    config = convert_dino.infer_backbone(shapes)
    assert config == {
        "image_size": 12,
        "patch_size": 4,
        "hidden_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
    }
    model = vit.VisionTransformer(**config)
    assert model.count_params() == sum(np.prod(shape) for shape in shapes.values())
    oblong = {**shapes, "pos_embed": (1, 7, 128)}
    with pytest.raises(UsageError, match="6 patches do not form a square"):
        convert_dino.infer_backbone(oblong)
    assert convert_dino.infer_backbone(oblong, image_size=(8, 12))["image_size"] == (8, 12)
    with pytest.raises(UsageError, match="--num_heads"):
        convert_dino.infer_backbone({n: v.shape for n, v in backbone_state().items()})
    with pytest.raises(UsageError, match="must be of a DINO vision transformer, with pos_embed"):
        convert_dino.infer_backbone({"conv1.weight": (64, 3, 7, 7)})
    with pytest.raises(UsageError, match=r"with a projection head. Received: one without"):
        convert_dino.infer_head(shapes)
    assert convert_dino.infer_head({n: v.shape for n, v in head_state().items()}) == {
        "num_prototypes": 40,
        "hidden_dim": 32,
        "bottleneck_dim": 8,
        "num_layers": 3,
    }


def test_converter_writes_what_keras_loads(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    network = {f"backbone.{name}": value for name, value in backbone_state().items()}
    network |= {f"head.{name}": value for name, value in head_state().items()}
    network = {name: torch.from_numpy(value) for name, value in network.items()}
    checkpoint = {
        "teacher": network,
        "student": {f"module.{name}": torch.zeros_like(v) for name, v in network.items()},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small"),  # DINO's training program leaves it there
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    written = tmp_path / "new" / "backbone.weights.h5"
    head_written = tmp_path / "head.weights.h5"
    convert_dino.main(
        [
            f"--checkpoint={path}",
            f"--output={written}",
            f"--head_output={head_written}",
            "--num_heads=3",
        ]
    )
    assert "sddns_tf.VisionTransformer(image_size=16, patch_size=4" in capsys.readouterr().out
    assert os.listdir(written.parent) == [written.name]
    backbone, head = tiny_backbone(), tiny_head()
    backbone.load_weights(written)
    head.load_weights(head_written)
    images = photographs(16, 16)
    features = numpy_backbone(backbone_state(), images, num_heads=3)
    assert_close(backbone(images), features)
    expected = dino_weights.load_head(tiny_head(norm_last_layer=False), head_state())
    features = tf.cast(features, "float32")
    np.testing.assert_array_equal(head(features), expected(features))


def test_converter_names_what_is_wrong(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(UsageError, match="must be an existing file"):
        convert_dino.read_state(path, "teacher")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="must be a PyTorch checkpoint"):
        convert_dino.read_state(path, "teacher")
    torch.save({"student": {"cls_token": torch.zeros(1, 1, 4)}, "epoch": 3}, path)
    with pytest.raises(UsageError, match=r"\['epoch', 'student'\]. Received: teacher"):
        convert_dino.read_state(path, "teacher")
    assert convert_dino.read_state(path, "student")["cls_token"].shape == (1, 1, 4)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UsageError, match="must hold a dictionary"):
        convert_dino.read_state(path, "teacher")

    torch.save({"conv1.weight": torch.zeros(4, 3, 7, 7)}, path)
    with pytest.raises(UsageError, match="--checkpoint must be of a DINO vision transformer"):
        convert_dino.main([f"--checkpoint={path}", f"--output={tmp_path / 'x.weights.h5'}"])
    assert not (tmp_path / "x.weights.h5").exists()
