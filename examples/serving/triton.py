r"""Serve an exported detector with NVIDIA Triton: KServe's protocol v2 over HTTP and gRPC.

    python3 -m venv triton && . triton/bin/activate
    pip install nvidia-pytriton "numpy<2" tensorflow-cpu
    python examples/serving/triton.py --exports=exports/parts --model=parts

`nvidia-pytriton` includes the server's binary. It needs Linux with glibc 2.35 or newer and NumPy 1,
so it gets an environment of its own; TensorFlow alone loads the export.

The server waits up to `--delay_ms` for the files of several requests and hands them to the
signature `serving_bytes` as one batch. A request holds `image_bytes`, BYTES `(B, 1)`: the contents
of B image files of any size. The answer has `ood_score`, `p_value`, `is_ood` and `status`, each
`(B, 1)`; with a local detector also `anomaly_map` `(B, h, w)`. `status` is empty for a good
file. To ask with NVIDIA's `tritonclient`, which comes with it:

    import numpy as np
    import tritonclient.grpc

    files = np.array([[open("photo.png", "rb").read()]], dtype=object)
    image_bytes = tritonclient.grpc.InferInput("image_bytes", files.shape, "BYTES")
    image_bytes.set_data_from_numpy(files)
    server = tritonclient.grpc.InferenceServerClient("localhost:8001")
    answer = server.infer("parts", [image_bytes])
    answer.as_numpy("ood_score"), answer.as_numpy("is_ood")
"""

import argparse
import os
import pathlib
import sys
import sysconfig


def latest_version(exports):
    """Return the SavedModel of the highest version in a folder of exports."""
    versions = [path.parent for path in pathlib.Path(exports).glob("*/saved_model.pb")]
    versions = [path for path in versions if path.name.isdecimal()]
    if not versions:
        raise FileNotFoundError(f"--exports must hold numbered versions. Received: {exports}")
    return max(versions, key=lambda path: int(path.name))


def serve(flags):
    """Serve until SIGTERM or Ctrl-C."""
    # Here, so that options are looked at first: TensorFlow takes seconds.
    import tensorflow as tf
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    # The server starts a Python too: the same one, wherever it is installed, not the system's.
    paths = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    model = tf.saved_model.load(str(latest_version(flags.exports)))
    signature = model.signatures["serving_bytes"]
    # Without the axis of the batch; Triton wants at least one more.
    shapes = {
        name: tuple(output.shape[1:]) or (1,)
        for name, output in signature.structured_outputs.items()
    }

    @batch
    def score(image_bytes):
        answers = signature(image_bytes=tf.constant(image_bytes[:, 0]))
        return {name: answers[name].numpy().reshape(-1, *shape) for name, shape in shapes.items()}

    def described(name):
        dtype = signature.structured_outputs[name].dtype
        kind = bytes if dtype == tf.string else dtype.as_numpy_dtype
        return Tensor(name=name, dtype=kind, shape=shapes[name])

    config = TritonConfig(
        http_port=flags.http_port, grpc_port=flags.grpc_port, metrics_port=flags.metrics_port
    )
    with Triton(config=config) as server:
        server.bind(
            flags.model,
            score,
            inputs=[Tensor(name="image_bytes", dtype=bytes, shape=(1,))],
            outputs=[described(name) for name in shapes],
            config=ModelConfig(
                max_batch_size=flags.batch_size,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(1000 * flags.delay_ms)),
            ),
            strict=True,
        )
        server.serve()


def main(arguments=None):
    """Read the options, and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exports", required=True, help="folder of numbered SavedModels")
    parser.add_argument("--model", required=True, help="name of the served model")
    parser.add_argument("--batch_size", type=int, default=32, help="largest batch")
    parser.add_argument("--delay_ms", type=float, default=2.0, help="longest wait for a batch")
    parser.add_argument("--http_port", type=int, default=8000)
    parser.add_argument("--grpc_port", type=int, default=8001)
    parser.add_argument("--metrics_port", type=int, default=8002, help="for Prometheus")
    serve(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"ERROR: {error}")
