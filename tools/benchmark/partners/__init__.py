"""Alternatives to compare with: the same work done by Pillow, PyTorch and ONNX Runtime."""
