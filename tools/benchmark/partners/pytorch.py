"""The same networks and training step in PyTorch."""

from tools.benchmark.harness import NoPartnerError

# Modes that are faster than eager float32 on some machines.
MODES = {
    "bfloat16 autocast": {"bfloat16": True},
    "compiled": {"compiled": True},
    "compiled, bfloat16 autocast": {"bfloat16": True, "compiled": True},
}


def imported(threads):
    """Return the module `torch`, with its number of threads set."""
    try:
        import torch
    except ImportError as error:
        raise NoPartnerError("PyTorch is not installed: pip install torch") from error
    torch.set_num_threads(threads)
    return torch


def vit(torch, size, patch, dim, depth, heads):
    """Return the same vision transformer, with PyTorch's own fused attention."""
    functional = torch.nn.functional

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
            self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
            self.fc1, self.fc2 = torch.nn.Linear(dim, 4 * dim), torch.nn.Linear(4 * dim, dim)

        def forward(self, x):
            batch, tokens, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, heads, dim // heads)
            attended = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
            return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, dim, patch, patch)
            self.token = torch.nn.Parameter(torch.zeros(1, 1, dim))
            side = size // patch
            self.position = torch.nn.Parameter(torch.zeros(1, dim, side, side))
            self.blocks = torch.nn.Sequential(*[Block() for _ in range(depth)])
            self.norm = torch.nn.LayerNorm(dim, eps=1e-6)

        def forward(self, images):
            x = self.patches(images)
            position = self.position
            if x.shape[-1] != position.shape[-1]:
                position = functional.interpolate(position, x.shape[-2:], mode="bicubic")
            x = (x + position).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            return self.norm(self.blocks(x))[:, 0]

    return Network()


def convnet(torch, *shape):
    """Return the same convolutional network, with its maps laid out as they are faster."""
    del shape
    nn, layers, width = torch.nn, [], 3
    for channels in (32, 64, 128):
        strides = 2 if layers else 1
        layers += [nn.Conv2d(width, channels, 3, strides, 1, bias=False)]
        layers += [nn.GroupNorm(8, channels, eps=1e-3), nn.ReLU()]
        width = channels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network.to(memory_format=torch.channels_last)

        def forward(self, images):
            return self.network(images.contiguous(memory_format=torch.channels_last))

    return Network()


def features(torch, shape, images, bfloat16=False, compiled=False):
    """Return a function that computes the features of normalized images `(B, H, W, 3)`."""
    network = vit(torch, *shape).eval()
    function = torch.compile(network) if compiled else network
    tensor = torch.tensor(images).permute(0, 3, 1, 2)

    def call():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return function(tensor.contiguous()).float().numpy()

    return call


def train_step(torch, shape, batch, bfloat16=False, compiled=False, make_backbone=vit):
    """Return a function that does one training step in PyTorch, with the same math as ours."""
    functional = torch.nn.functional
    dim = shape[2]

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.utils.parametrizations.weight_norm(
                torch.nn.Linear(256, 4096, bias=False)
            )

        def forward(self, x):
            return self.layer(functional.normalize(x, dim=-1))

    def make():
        sizes = [dim, 2048, 2048, 256]
        layers = []
        for index in range(3):
            layers += [torch.nn.Linear(sizes[index], sizes[index + 1]), torch.nn.GELU()]
        return make_backbone(torch, *shape), torch.nn.Sequential(*layers[:-1], Last())

    (backbone, head), (teacher, teacher_head) = make(), make()
    student = [*backbone.parameters(), *head.parameters()]
    frozen = [*teacher.parameters(), *teacher_head.parameters()]
    optimizer = torch.optim.AdamW(student, 1e-4, weight_decay=0.04, foreach=True)
    center = torch.zeros(4096)
    positives = torch.randn(2 * batch, 3, 32, 32), torch.randn(2 * batch, 3, 16, 16)
    negatives = torch.randn(batch, 3, 32, 32), torch.randn(2 * batch, 3, 16, 16)

    wrap = torch.compile if compiled else lambda function: function

    @wrap
    def teach(images):
        return teacher_head(teacher(images))

    @wrap
    def project(groups):
        return head(torch.cat([backbone(group) for group in groups]))

    def step():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            target = teach(positives[0]).float()
            shares = functional.softmax((target - center) / 0.04, -1).view(2, batch, -1)
        groups = [torch.cat(pair) for pair in zip(positives, negatives, strict=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = project(groups).float() / 0.1
        first, negative, local, negative_local = logits.split(
            [2 * batch, batch, 2 * batch, 2 * batch]
        )
        logs = functional.log_softmax(torch.cat([first, local]), -1).view(4, batch, -1)
        cross = -torch.einsum("tbk,sbk->ts", shares, logs) / batch
        positive = (cross.sum() - cross.diagonal().sum()) / 6
        apart = torch.cat([negative, negative_local])
        loss = positive + (torch.logsumexp(apart, -1) - apart.mean(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in student:
            torch.nn.utils.clip_grad_norm_([parameter], 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(frozen, student, 0.004)
            center.lerp_(target.mean(0), 0.1)
        return loss.item()

    return step
