"""What the package is compared with: the same work in Pillow, PyTorch and ONNX Runtime."""
