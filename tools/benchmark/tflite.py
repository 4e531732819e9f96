"""A `.tflite` file, one image at a time, in float32 and with int8 weights, against ONNX Runtime.

ONNX Runtime runs the same network without the score, exported by PyTorch.
"""

import pathlib
import tempfile

import sddns_tf
from tools.benchmark import harness, models
from tools.benchmark.partners import onnx, pytorch

IMAGES = 10


def run(settings):
    """Yield two records."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise harness.NoPartnerError(f"{error}: pip install ai-edge-litert") from error
    torch = pytorch.imported(settings.threads)
    shape = (64, 16, 192, 4, 3) if settings.quick else (224, 16, 192, 12, 3)
    image = models.random_images(1, shape[0])
    with tempfile.TemporaryDirectory() as folder:
        sessions = onnx.sessions(torch, shape, image, pathlib.Path(folder), settings.threads)
        detector = models.detector(shape, bank_size=1_000)
        for quantization, (partner, theirs) in zip((None, "dynamic"), sessions, strict=True):
            name = quantization or "float32"
            path = sddns_tf.export.tflite(
                detector,
                pathlib.Path(folder) / f"{name}.tflite",
                quantization=quantization,
                calibration_images=models.random_images(40, shape[0]),
                verbose=0,
            )
            interpreter = Interpreter(str(path), num_threads=settings.threads)
            runner = interpreter.get_signature_runner()
            times = harness.take_turns(
                lambda runner=runner: [runner(images=image) for _ in range(IMAGES)],
                lambda theirs=theirs: [theirs() for _ in range(IMAGES)],
                settings.rounds,
            )
            yield harness.rates(f"tflite, {name}", partner, times, IMAGES)
