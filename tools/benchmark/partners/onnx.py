"""PyTorch's vision transformer in ONNX Runtime, in float32 and with int8 weights."""

from tools.benchmark.harness import NoPartnerError
from tools.benchmark.partners import pytorch


def sessions(torch, shape, image, folder, threads):
    """Return the name of each variant and a function that runs it on one image.

    Args:
        torch: The module, from `pytorch.imported`.
        shape: Image size, patch, width, depth and heads.
        image: uint8 `(1, H, W, 3)`.
        folder: `pathlib.Path` to write the networks to.
        threads: Number of threads.
    """
    try:
        import onnx  # noqa: F401  (torch.onnx and the quantization need it)
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise NoPartnerError(f"{error}: pip install onnx onnxruntime") from error
    normalized = image.transpose(0, 3, 1, 2).astype("float32") / 255
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1

    def scored_by(path):
        session = onnxruntime.InferenceSession(str(path), options)
        inputs = {session.get_inputs()[0].name: normalized}
        return lambda: session.run(None, inputs)

    plain, int8 = folder / "float32.onnx", folder / "int8.onnx"
    network = pytorch.vit(torch, *shape).eval()
    torch.onnx.export(network, (torch.tensor(normalized),), plain, dynamo=False)
    quantize_dynamic(plain, int8, weight_type=QuantType.QInt8)
    return [
        ("ONNX Runtime float32", scored_by(plain)),
        ("ONNX Runtime dynamic int8", scored_by(int8)),
    ]
