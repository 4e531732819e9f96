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
  ours with its views is a record of its own), and the fastest mode of either (XLA, bfloat16,
  `torch.compile`), which a few steps choose.
- `features`: a vision transformer's features, against PyTorch eager in float32, and the fastest
  mode of either.
- `score`: `Detector` with a bank of 50,000 rows, against its own bare feature extraction.
- `growth`: training steps with more prototypes, local views, images and pixels, each in a process
  of its own, against what the count of multiplications alone would make of the smallest; with the
  peak of the memory.
- `startup`: `import sddns_tf` against `import tensorflow`; the first training step, with tracing,
  against PyTorch's first.
- `input`: training steps fed from a folder of PNG files and, where `TFDS_DATA_DIR` holds it, from
  `cifar10`, against the same step on one batch in memory.
- `saved_model`: the exported decision against `Detector.predict` and against the bare backbone.
- `tflite`: latency of one image, `.tflite` in float32 and with int8 weights, against ONNX Runtime
  on the same network without the score, exported by PyTorch.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_list("benchmarks", ["all"], "Names of benchmarks, with commas between, or `all`.")
flags.DEFINE_string("json", None, "File to write the records to.")
flags.DEFINE_bool("quick", False, "Small networks and few rounds: under a minute each.")
flags.DEFINE_integer("threads", 1, "Threads of either side.", 1)
flags.DEFINE_integer("rounds", 7, "Rounds in which the two sides take turns.", 3)
flags.DEFINE_string("growth_setting", None, "Of `growth` itself, for the processes it starts.")


class NoPartnerError(Exception):
    """The library to compare with is not installed."""


def rounds():
    return 3 if FLAGS.quick else FLAGS.rounds


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(ours, theirs, count=None, warm_up=True):
    """Seconds of either in each round, after one round that is not counted."""
    if warm_up:
        ours(), theirs()
    pairs = []
    for index in range(count or rounds()):
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


def record_seconds(name, partner, ours, theirs):
    """A record of durations: less is better."""
    found = record(name, partner, "s", 1, ours, theirs)
    return {**found, "ours": 1 / found["ours"], "theirs": 1 / found["theirs"]}


def fastest(candidates):
    """Name and function of the candidate that is fastest in two of three calls; the rest go."""
    times = {}
    for name, function in candidates.items():
        try:
            times[name] = min([seconds(function) for _ in range(3)][1:])
        except Exception as error:  # A mode that a library or processor lacks is no candidate.
            print(f"{name}: left out. {type(error).__name__}: {str(error)[:100]}", flush=True)
    name = min(times, key=times.get)
    return name, candidates[name]


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


def our_model(shape, prototypes=4096, local_views=2):
    """Self-distillation with negatives of auxiliary images, compiled."""
    import keras

    import sddns_tf

    model = sddns_tf.SelfDistillation(
        backbone=our_vit(*shape),
        views=sddns_tf.MultiCrop(shape[0], local_views=local_views),
        negatives=sddns_tf.Negatives("rot90", source="auxiliary"),
        head=sddns_tf.ProjectionHead(num_prototypes=prototypes),
        # What the PyTorch step computes.
        **sddns_tf.SelfDistillation.PAPER,
    )
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.04))
    return model


def our_train_steps(shape, batch, jit_compile=False, policy="float32"):
    """A step on crops made beforehand, and one that makes its own; each returns the loss."""
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy(policy)
    try:
        model = our_model(shape)
    finally:
        keras.config.set_dtype_policy("float32")
    images = tf.constant(random_images(batch, shape[0]))
    data = {"images": images, "auxiliary": images}
    options = {"autograph": False, "jit_compile": jit_compile}
    whole = tf.function(model.train_step, **options)
    crops = model._draw(images, images)
    model._draw, draw = lambda *_: crops, model._draw
    step = tf.function(model.train_step, **options)
    step(data)
    model._draw = draw
    return lambda: step(data)["loss"].numpy(), lambda: whole(data)["loss"].numpy()


def train_step():
    """One step with 2 global and 2 local views and negatives of one source, against PyTorch."""
    torch = import_torch()
    batch = 16
    shape = network()
    step, whole = our_train_steps(shape, batch)
    torch_step = torch_train_step(torch, shape, batch)
    own, other = take_turns(step, torch_step)
    records = [record("train_step", "PyTorch eager float32", "images/s", batch, own, other)]
    own, other = take_turns(whole, torch_step)
    name = "PyTorch eager float32, its crops ready made"
    records.append(record("train_step with views", name, "images/s", batch, own, other))
    own, other = take_turns(step, matrix_products(multiplications(shape, 4096, 2, batch)))
    name = "as many multiplications in matrix products of side 1,024"
    records.append(record("train_step, share of the peak", name, "images/s", batch, own, other))

    def made_when_called(**options):
        """A compilation that fails is then a mode left out."""
        made = functools.cache(lambda: our_train_steps(shape, batch, **options)[0])
        return lambda: made()()

    ours = {
        "float32": step,
        "bfloat16": made_when_called(policy="mixed_bfloat16"),
        "XLA": made_when_called(jit_compile=True),
        "bfloat16, XLA": made_when_called(jit_compile=True, policy="mixed_bfloat16"),
    }
    theirs = {"eager float32": torch_step}
    theirs["bfloat16 autocast"] = torch_train_step(torch, shape, batch, bfloat16=True)
    theirs["compiled"] = torch_train_step(torch, shape, batch, compiled=True)
    theirs["compiled, bfloat16 autocast"] = torch_train_step(
        torch, shape, batch, bfloat16=True, compiled=True
    )
    (mode, ours), (torch_mode, theirs) = fastest(ours), fastest(theirs)
    own, other = take_turns(ours, theirs)
    name = f"train_step, fastest mode ({mode})"
    records.append(record(name, f"PyTorch {torch_mode}", "images/s", batch, own, other))
    return records


def matrix_products(count):
    """A function that does `count` multiplications the fastest way: large float32 products."""
    import tensorflow as tf

    side = 1024
    matrix = tf.random.uniform((side, side))
    return lambda: [tf.matmul(matrix, matrix).numpy() for _ in range(round(count / side**3))]


def torch_train_step(torch, shape, batch, bfloat16=False, compiled=False):
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


def features():
    """Features of a batch of 16 images, against PyTorch."""
    import keras
    import tensorflow as tf

    torch = import_torch()
    shape = (64, 16, 192, 6, 3) if FLAGS.quick else (256, 16, 384, 12, 6)
    images = random_images(16, shape[0]).astype("float32") / 255
    tensor, torch_tensor = tf.constant(images), torch.tensor(images).permute(0, 3, 1, 2)

    def ours(jit_compile, policy):
        keras.config.set_dtype_policy(policy)
        try:
            backbone = our_vit(*shape)
            function = tf.function(backbone, jit_compile=jit_compile, autograph=False)
            function(tensor)
        finally:
            keras.config.set_dtype_policy("float32")
        return lambda: tf.cast(function(tensor), tf.float32).numpy()

    def theirs(bfloat16, compiled):
        backbone = torch_vit(torch, *shape).eval()
        function = torch.compile(backbone) if compiled else backbone

        def call():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                return function(torch_tensor.contiguous()).float().numpy()

        return call

    plain, torch_plain = ours(False, "float32"), theirs(False, False)
    own, other = take_turns(plain, torch_plain)
    records = [record("features", "PyTorch eager float32", "images/s", 16, own, other)]
    mode, best = fastest(
        {
            "float32": plain,
            "XLA": ours(True, "float32"),
            "bfloat16": ours(False, "mixed_bfloat16"),
            "bfloat16, XLA": ours(True, "mixed_bfloat16"),
        }
    )
    torch_mode, torch_best = fastest(
        {
            "eager float32": torch_plain,
            "bfloat16 autocast": theirs(True, False),
            "compiled": theirs(False, True),
            "compiled, bfloat16 autocast": theirs(True, True),
        }
    )
    own, other = take_turns(best, torch_best)
    name = f"features, fastest mode ({mode})"
    records.append(record(name, f"PyTorch {torch_mode}", "images/s", 16, own, other))
    return records


# --- Score --------------------------------------------------------------------------------------


def make_detector(shape, bank_size=50_000, resolution=None):
    """A detector of random weights and a random bank: its speed does not depend on either."""
    import numpy as np
    import tensorflow as tf

    import sddns_tf
    from sddns_tf.features import FeatureExtractor

    size, dim = shape[0], shape[2]
    backbone = our_vit(*shape)
    backbone(tf.zeros([1, size, size, 3]))
    extractor = FeatureExtractor(backbone, size, resolution or (size, size))
    detector = sddns_tf.Detector(extractor, bank_size=bank_size, calibration_size=1_000)
    bank = np.random.default_rng(0).normal(size=(bank_size, dim)).astype(np.float32)
    detector.bank.assign(bank / np.linalg.norm(bank, axis=1, keepdims=True))
    images = random_images(200, size, 2)
    detector.recalibrate(images, false_positive_rate=0.05, verbose=0)
    return detector


def scorer_shape():
    """ViT-S/16 at 256 px, or a small one."""
    return (64, 16, 192, 6, 3) if FLAGS.quick else (256, 16, 384, 12, 6)


def score():
    """The whole decision with a bank of 50,000 rows, against the features alone."""
    detector = make_detector(scorer_shape())
    images = random_images(32, scorer_shape()[0])

    def predict(model):
        return lambda: model.predict(images, batch_size=16, verbose=0)

    own, other = take_turns(predict(detector), predict(detector.extractor))
    return [record("score", "features alone", "images/s", len(images), own, other)]


def saved_model():
    """What a server runs, against the detector in Python and against the bare backbone."""
    import tensorflow as tf

    import sddns_tf

    detector = make_detector(scorer_shape())
    images = random_images(32, scorer_shape()[0])
    with tempfile.TemporaryDirectory() as folder:
        path = sddns_tf.export.saved_model(detector, folder)
        loaded = tf.saved_model.load(str(path))
    served = loaded.signatures["serving_default"]
    halves = [tf.constant(images[:16]), tf.constant(images[16:])]

    def ours():
        return [served(images=half)["ood_score"].numpy() for half in halves]

    def predict():
        return detector.predict(images, batch_size=16, verbose=0)

    backbone = tf.function(detector.extractor, autograph=False)

    def bare():
        return [backbone(half).numpy() for half in halves]

    records = []
    for partner, theirs in (("Detector.predict", predict), ("features alone", bare)):
        own, other = take_turns(ours, theirs)
        records.append(record("saved_model", partner, "images/s", len(images), own, other))
    return records


def tflite():
    """One image at a time on a device's runtime, against ONNX Runtime."""
    import sddns_tf

    try:
        import onnx  # noqa: F401
        import onnxruntime
        from ai_edge_litert.interpreter import Interpreter
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise NoPartnerError(f"{error}: pip install onnx onnxruntime ai-edge-litert") from error
    torch = import_torch()
    shape = (64, 16, 192, 4, 3) if FLAGS.quick else (224, 16, 192, 12, 3)
    detector = make_detector(shape, bank_size=1_000)
    image = random_images(1, shape[0])
    normalized = image.transpose(0, 3, 1, 2).astype("float32") / 255

    def device(path):
        runner = Interpreter(str(path), num_threads=FLAGS.threads).get_signature_runner()
        return lambda: [runner(images=image) for _ in range(10)]

    def onnx_session(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = FLAGS.threads, 1
        session = onnxruntime.InferenceSession(str(path), options)
        name = session.get_inputs()[0].name
        return lambda: [session.run(None, {name: normalized}) for _ in range(10)]

    records = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        network = torch_vit(torch, *shape).eval()
        example = torch.zeros(1, 3, shape[0], shape[0])
        torch.onnx.export(network, (example,), folder / "float.onnx", dynamo=False)
        quantize_dynamic(folder / "float.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
        for ours, theirs, name in (
            (None, "float", "ONNX Runtime float32"),
            ("dynamic", "int8", "ONNX Runtime dynamic int8"),
        ):
            path = sddns_tf.export.tflite(
                detector,
                folder / f"{ours}.tflite",
                quantization=ours,
                calibration_images=random_images(40, shape[0]),
            )
            own, other = take_turns(device(path), onnx_session(folder / f"{theirs}.onnx"))
            records.append(record(f"tflite, {ours or 'float32'}", name, "images/s", 10, own, other))
    return records


# --- Growth, start-up, input --------------------------------------------------------------------


def multiplications(shape, prototypes, local_views, batch):
    """Multiplications of the matrix products of one step, forward and backward.

    Teacher: 2 global views forward. Student: 3 global and twice the local views, forward and back,
    which costs three times the forward. The last block computes one token, from keys and values of
    all.
    """
    size, patch, dim, depth, _ = shape

    def one(side):
        tokens = (side // patch) ** 2 + 1
        block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
        last_block = (2 * tokens + 10) * dim**2 + 2 * tokens * dim
        head = dim * 2048 + 2048**2 + 2048 * 256 + 256 * prototypes
        return (depth - 1) * block + last_block + 3 * patch**2 * dim * tokens + head

    return batch * (2 * one(size) + 9 * one(size) + 6 * local_views * one(size // 2))


def growth():
    """Steps of growing size, each in a process of its own."""
    shape = (32, 4, 96, 3, 3) if FLAGS.quick else (32, 4, 192, 6, 3)
    base = {"prototypes": 1024, "local_views": 0, "batch": 16, "size": 32}
    steps = {
        "prototypes": (16_384, 65_536),
        "local_views": (2, 10),
        "batch": (64, 256),
        "size": (64, 128, 256),
    }
    if FLAGS.quick:
        steps = {"prototypes": (16_384,), "batch": (64,)}
    settings = [base, *({**base, name: x} for name, xs in steps.items() for x in xs)]
    records, first = [], None
    for one in settings:
        image_shape = (one["size"], one["size"] // 8, *shape[2:])
        work = multiplications(image_shape, one["prototypes"], one["local_views"], one["batch"])
        command = [sys.executable, __file__, f"--threads={FLAGS.threads}", "--growth_setting"]
        command[-1] += "=" + json.dumps({**one, "shape": image_shape, "rounds": rounds()})
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(result.stdout.splitlines()[-1])
        first = first or (measured["seconds"], work)
        expected = [each * work / first[1] for each in first[0]]
        name = "growth, " + ", ".join(f"{key} {value}" for key, value in one.items())
        found = record_seconds(name, "multiplications", measured["seconds"], expected)
        records.append({**found, "peak_memory_mb": measured["peak_memory_mb"]})
    return records


def measure_growth(setting):
    """Seconds of steps of one size and the peak of the memory, as a line of JSON."""
    import tensorflow as tf

    model = our_model(tuple(setting["shape"]), setting["prototypes"], setting["local_views"])
    images = tf.constant(random_images(setting["batch"], setting["size"]))
    data = {"images": images, "auxiliary": images}
    step = tf.function(model.train_step, autograph=False)
    step(data)
    found = [seconds(lambda: step(data)["loss"].numpy()) for _ in range(setting["rounds"])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": found, "peak_memory_mb": round(peak)}), flush=True)


def startup():
    """Imports in fresh processes, and the first training step of a new model."""
    import keras
    import tensorflow as tf

    def fresh(program):
        command = [sys.executable, "-c", program]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    own, other = take_turns(fresh("import tensorflow, sddns_tf"), fresh("import tensorflow"))
    records = [record_seconds("startup, import", "import tensorflow", own, other)]
    torch = import_torch()
    shape = (32, 4, 96, 3, 3) if FLAGS.quick else network()

    def our_first_step():
        keras.utils.clear_session()
        model = our_model(shape)
        images = tf.constant(random_images(16, shape[0]))
        data = {"images": images, "auxiliary": images}
        return tf.function(model.train_step, autograph=False)(data)["loss"].numpy()

    # Three are enough of what takes many seconds; each is a first one.
    own, other = take_turns(
        our_first_step, lambda: torch_train_step(torch, shape, 16)(), count=3, warm_up=False
    )
    records.append(record_seconds("startup, first step", "PyTorch eager first step", own, other))
    return records


def fed_by(step, batches):
    """Three steps on the next batches of an iterator."""

    def run():
        for _ in range(3):
            images = next(batches)
            step({"images": images, "auxiliary": images})["loss"].numpy()

    return run


def input_pipeline():
    """Steps fed by readers of files, against the same step on a batch in memory."""
    import numpy as np
    import tensorflow as tf

    import sddns_tf

    batch = 64
    model = our_model((32, 4, 96, 3, 3))
    step = tf.function(model.train_step, autograph=False)
    count = 640 if FLAGS.quick else 6_400
    sources = {}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        smooth = tf.image.resize(random_images(count, 8), (32, 32)).numpy().astype(np.uint8)
        for index, image in enumerate(smooth):
            (folder / f"{index}.png").write_bytes(tf.io.encode_png(image).numpy())
        sources["a folder of PNG files"] = {"source": f"folder:{folder}", "image_size": 32}
        if os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")):
            sources["TFDS cifar10"] = {"source": "tfds:cifar10"}
        records = []
        for name, source in sources.items():
            batches = sddns_tf.data.load(
                **source, batch_size=batch, shuffle=True, drop_remainder=True
            )
            read = iter(batches.repeat())
            own, other = take_turns(fed_by(step, read), fed_by(step, itertools.repeat(next(read))))
            records.append(
                record(f"input, {name}", "a batch in memory", "images/s", 3 * batch, own, other)
            )
    return records


BENCHMARKS = {
    "views": views,
    "train_step": train_step,
    "features": features,
    "score": score,
    "growth": growth,
    "startup": startup,
    "input": input_pipeline,
    "saved_model": saved_model,
    "tflite": tflite,
}


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
    if FLAGS.growth_setting:
        measure_growth(json.loads(FLAGS.growth_setting))
        return
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
