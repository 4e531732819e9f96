r"""Times the package against the best alternative at hand, both in one run.

    python tools/benchmark.py --benchmarks=views,train_step --json=benchmark.json

Ours and the alternative take turns, on the same images and the same number of threads, and what
is reported is the median of each, the ratio of the medians (above 1 when ours is better) and, as
its spread, the first and third quartile of the ratios of single rounds. Alternatives are written
below, plainly and well. Those that need PyTorch or Pillow say so where it is not installed.

- `views`: all views and negatives of METHOD's size for 32 px images, 28 of each pair of images,
  against the same operations done image by image with Pillow, on one core.
- `train_step`: a step of self-distillation with negatives, equal network, number and size of crops
  and optimizer, against PyTorch eager in float32 (crops made beforehand for either: the time of
  ours with its views is a record of its own).
- `features`: a vision transformer's features, against PyTorch eager in float32.
- `score`: `Detector` with a bank of 50,000 rows, against its own bare feature extraction.
"""

import json
import os
import platform
import statistics
import time

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_list("benchmarks", ["all"], "Names of benchmarks, with commas between, or `all`.")
flags.DEFINE_string("json", None, "File to write the records to.")
flags.DEFINE_bool("quick", False, "Small networks and few rounds: under a minute each.")
flags.DEFINE_integer("threads", 1, "Threads of either side.", 1)
flags.DEFINE_integer("rounds", 7, "Rounds in which the two sides take turns.", 3)


class NoPartnerError(Exception):
    """The library to compare with is not installed."""


def rounds():
    return 3 if FLAGS.quick else FLAGS.rounds


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(ours, theirs):
    """Seconds of either in each round, after one round that is not counted."""
    ours(), theirs()
    pairs = []
    for index in range(rounds()):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        times = {function: seconds(function) for function in order}
        pairs.append((times[ours], times[theirs]))
    return zip(*pairs, strict=True)


def record(name, partner, unit, amount, ours, theirs):
    """A record of rates: `amount` of `unit` was done in each of the seconds given."""
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    own, other = (amount / statistics.median(times) for times in (ours, theirs))
    return {
        "name": name,
        "partner": partner,
        "unit": unit,
        "ours": own,
        "theirs": other,
        "ratio": own / other,
        "spread": [low, high],
        "machine": machine(),
    }


def machine():
    """The processor, the threads used and the versions."""
    import keras
    import tensorflow as tf

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": FLAGS.threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def random_images(count, size, seed=0):
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise NoPartnerError("PyTorch is not installed: pip install torch") from error
    torch.set_num_threads(FLAGS.threads)
    return torch


# --- Views --------------------------------------------------------------------------------------


def views():
    """All views and negatives of pairs of images, against Pillow."""
    import tensorflow as tf

    import sddns_tf

    crops = sddns_tf.MultiCrop(32, local_views=8)
    negatives = sddns_tf.Negatives("rot90", source="both")
    images, auxiliary = random_images(64, 32), random_images(64, 32, 1)

    @tf.function(jit_compile=True)
    def step(images, auxiliary, seed):
        return crops(images, seed), negatives(crops, images, auxiliary, seed + 1)

    arguments = tf.constant(images), tf.constant(auxiliary), tf.constant([0, 1])
    pillow, pillow_pairs = pillow_views(), 8

    def theirs():
        for index in range(pillow_pairs):
            pillow(images[index], auxiliary[index])

    repeats = 4

    def ours():
        for _ in range(repeats):
            tf.nest.map_structure(lambda group: group.numpy(), step(*arguments))

    own, other = take_turns(ours, theirs)
    own = [each / (repeats * len(images)) for each in own]
    other = [each / pillow_pairs for each in other]
    return [record("views", "Pillow, image by image", "image pairs/s", 1, own, other)]


def pillow_views():
    """Function from an image and an auxiliary one to their 28 views, by Pillow."""
    try:
        from PIL import Image, ImageEnhance, ImageFilter, ImageOps
    except ImportError as error:
        raise NoPartnerError("Pillow is not installed: pip install pillow") from error
    import numpy as np

    draw = np.random.default_rng(0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def crop(image, area, size):
        for _ in range(10):
            target = draw.uniform(*area) * image.width * image.height
            ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                break
        else:
            width, height = image.size
        left = draw.integers(image.width - width + 1)
        top = draw.integers(image.height - height + 1)
        box = (left, top, left + width, top + height)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)

    def shift_hue(image, turns):
        hue, saturation, value = image.convert("HSV").split()
        hue = Image.fromarray(np.asarray(hue) + np.uint8(int(turns * 255) % 256))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    def jitter(image):
        changes = [
            (ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4),
            (ImageEnhance.Color, 0.2), (None, 0.1),
        ]  # fmt: skip
        for index in draw.permutation(4):
            enhancer, change = changes[index]
            amount = draw.uniform(-change, change)
            image = enhancer(image).enhance(1 + amount) if enhancer else shift_hue(image, amount)
        return image

    def view(image, area, size, blur, solarize):
        image = crop(image, area, size)
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        if draw.random() < 0.8:
            image = jitter(image)
        if draw.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if draw.random() < blur:
            image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.1, 2.0) * size / 224))
        if draw.random() < solarize:
            image = ImageOps.solarize(image, 128)
        return image

    def normalized(image):
        return (np.asarray(image, np.float32) / 255 - mean) / std

    def all_views(image, auxiliary):
        image, auxiliary = Image.fromarray(image), Image.fromarray(auxiliary)
        found = [view(image, (0.4, 1), 32, 1.0, 0.0), view(image, (0.4, 1), 32, 0.1, 0.2)]
        found += [view(image, (0.05, 0.4), 16, 0.5, 0.0) for _ in range(8)]
        for source in (image, auxiliary):
            recipe = [(1.0, 0.0), (0.1, 0.2)][draw.integers(2)]
            shifted = [view(source, (0.4, 1), 32, *recipe)]
            shifted += [view(source, (0.05, 0.4), 16, 0.5, 0.0) for _ in range(8)]
            found += [one.rotate(90 * draw.integers(1, 4)) for one in shifted]
        return [normalized(one) for one in found]

    return all_views


# --- Networks -----------------------------------------------------------------------------------


def torch_vit(torch, size, patch, dim, depth, heads):
    """The same vision transformer, with PyTorch's own fused attention."""
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


def network():
    """Size of images, patch, dim, depth, heads: of ViT-S/4 at 32 px, or a small one."""
    return (32, 4, 192, 6, 3) if FLAGS.quick else (32, 4, 384, 12, 6)


def our_vit(size, patch, dim, depth, heads):
    import sddns_tf

    return sddns_tf.VisionTransformer(
        image_size=size, patch_size=patch, hidden_dim=dim, depth=depth, num_heads=heads
    )


def train_step():
    """One step with 2 global and 2 local views and negatives of one source, against PyTorch."""
    import keras
    import tensorflow as tf

    import sddns_tf

    torch = import_torch()
    batch = 16
    shape = network()
    model = sddns_tf.SelfDistillation(
        backbone=our_vit(*shape),
        views=sddns_tf.MultiCrop(32, local_views=2),
        negatives=sddns_tf.Negatives("rot90", source="auxiliary"),
        head=sddns_tf.ProjectionHead(num_prototypes=4096),
    )
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.04))
    images = tf.constant(random_images(batch, 32))
    data = {"images": images, "auxiliary": images}
    whole = tf.function(model.train_step, autograph=False)
    views, negatives = model._draw(images, images)
    # Equal work for either: from crops on.
    model._draw, draw = lambda *_: (views, negatives), model._draw
    step = tf.function(model.train_step, autograph=False)
    step(data)
    model._draw = draw

    torch_step = torch_train_step(torch, shape, batch)
    own, other = take_turns(lambda: step(data)["loss"].numpy(), torch_step)
    records = [record("train_step", "PyTorch eager float32", "images/s", batch, own, other)]
    own, other = take_turns(lambda: whole(data)["loss"].numpy(), torch_step)
    name = "PyTorch eager float32, its crops ready made"
    records.append(record("train_step with views", name, "images/s", batch, own, other))
    return records


def torch_train_step(torch, shape, batch):
    """A function that does one step in PyTorch, of the same arithmetic as ours."""
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
        return torch_vit(torch, *shape), torch.nn.Sequential(*layers[:-1], Last())

    (backbone, head), (teacher, teacher_head) = make(), make()
    student = [*backbone.parameters(), *head.parameters()]
    frozen = [*teacher.parameters(), *teacher_head.parameters()]
    optimizer = torch.optim.AdamW(student, 1e-4, weight_decay=0.04, foreach=True)
    center = torch.zeros(4096)
    positives = torch.randn(2 * batch, 3, 32, 32), torch.randn(2 * batch, 3, 16, 16)
    negatives = torch.randn(batch, 3, 32, 32), torch.randn(2 * batch, 3, 16, 16)

    def step():
        with torch.no_grad():
            target = teacher_head(teacher(positives[0]))
            shares = functional.softmax((target - center) / 0.04, -1).view(2, batch, -1)
        groups = [torch.cat(pair) for pair in zip(positives, negatives, strict=True)]
        logits = head(torch.cat([backbone(group) for group in groups])) / 0.1
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


def features():
    """Features of a batch of 16 images, against PyTorch."""
    import tensorflow as tf

    torch = import_torch()
    shape = (64, 16, 192, 6, 3) if FLAGS.quick else (256, 16, 384, 12, 6)
    images = random_images(16, shape[0]).astype("float32") / 255
    ours = tf.function(our_vit(*shape), jit_compile=False)
    theirs = torch_vit(torch, *shape).eval()
    tensor, torch_tensor = tf.constant(images), torch.tensor(images).permute(0, 3, 1, 2)

    def torch_features():
        with torch.inference_mode():
            return theirs(torch_tensor.contiguous())

    own, other = take_turns(lambda: ours(tensor).numpy(), torch_features)
    return [record("features", "PyTorch eager float32", "images/s", 16, own, other)]


# --- Score --------------------------------------------------------------------------------------


def score():
    """The whole decision with a bank of 50,000 rows, against the features alone."""
    import numpy as np
    import tensorflow as tf

    import sddns_tf
    from sddns_tf.bank import FeatureExtractor

    shape = (64, 16, 192, 6, 3) if FLAGS.quick else (256, 16, 384, 12, 6)
    size, dim = shape[0], shape[2]
    backbone = our_vit(*shape)
    backbone(tf.zeros([1, size, size, 3]))
    extractor = FeatureExtractor(backbone, size, (size, size))
    detector = sddns_tf.Detector(extractor, bank_size=50_000, calibration_size=1_000)
    bank = np.random.default_rng(0).normal(size=(50_000, dim)).astype(np.float32)
    detector.bank.assign(bank / np.linalg.norm(bank, axis=1, keepdims=True))
    images = random_images(32, size)

    def predict(model):
        return lambda: model.predict(images, batch_size=16, verbose=0)

    own, other = take_turns(predict(detector), predict(extractor))
    return [record("score", "features alone", "images/s", len(images), own, other)]


BENCHMARKS = {"views": views, "train_step": train_step, "features": features, "score": score}


def pin_threads():
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    tf.config.threading.set_inter_op_parallelism_threads(FLAGS.threads)


def write(path, records):
    """Write a JSON file at once and whole."""
    with open(f"{path}.partial", "w") as file:
        json.dump(records, file, indent=1)
    os.replace(f"{path}.partial", path)


def main(argv):
    """Run the benchmarks named, print a line for each record, write them all."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {' '.join(argv[1:])}")
    names = list(BENCHMARKS) if FLAGS.benchmarks == ["all"] else FLAGS.benchmarks
    for name in names:
        if name not in BENCHMARKS:
            raise app.UsageError(
                f"--benchmarks takes {', '.join(BENCHMARKS)} or all. Received: {name}"
            )
    pin_threads()
    records = []
    for name in names:
        try:
            found = BENCHMARKS[name]()
        except NoPartnerError as error:
            print(f"{name}: left out. {error}", flush=True)
            continue
        for one in found:
            print(
                "{name}: {ours:.4g} {unit}, {partner}: {theirs:.4g}, ratio {ratio:.2f} "
                "({spread[0]:.2f} to {spread[1]:.2f})".format(**one),
                flush=True,
            )
        records += found
    if FLAGS.json:
        write(FLAGS.json, records)


if __name__ == "__main__":
    app.run(main)
