"""Vision transformer whose position embedding follows the size of its input.

One long file on purpose: a reader can follow an image from its patches to the feature.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from sddns_tf.gelu import gelu
from sddns_tf.keras_private import layers_of
from sddns_tf.tracing import run_block
from sddns_tf.types import Array
from sddns_tf.validation import check_bool, check_int, check_number, check_size


def _initializer():
    # DINO cuts its normal at +-2, a hundred standard deviations, so it is a plain normal. Keras'
    # `TruncatedNormal` cuts at two, which shrinks 0.02 to 0.0176. A fresh one for each weight: a
    # shared Keras initializer draws the same values twice.
    return keras.initializers.RandomNormal(stddev=0.02)


def bicubic_matrix(size: Any, source_size: int, xp: Any = np) -> Any:
    """Return the matrix that resamples `source_size` samples to `size` samples, bicubically.

    Keys' kernel with a = -0.75, half-pixel centers, no antialiasing and clamped edges: the rule of
    `torch.nn.functional.interpolate(mode="bicubic")`, by which DINO resizes position embeddings.

    Args:
        size: Length of the result: an integer or, with `xp=keras.ops`, an integer tensor.
        source_size: Length of what is resampled, a Python integer.
        xp: `numpy` or `keras.ops`.

    Returns:
        float array or tensor `(size, source_size)`, whose rows sum to one.
    """
    centers = (xp.arange(size, dtype="float32") + 0.5) * xp.true_divide(source_size, size) - 0.5
    # The four taps about a center reach two samples beyond either end.
    samples = np.arange(-2, source_size + 2)
    distance = xp.abs(xp.expand_dims(centers, 1) - samples.astype("float32"))
    near = (1.25 * distance - 2.25) * distance * distance + 1.0
    far = ((-0.75 * distance + 3.75) * distance - 6.0) * distance + 3.0
    weights = xp.where(distance <= 1.0, near, xp.where(distance < 2.0, far, 0.0))
    # What falls beyond an end counts for the sample at that end.
    clamp = np.eye(source_size, dtype="float32")[np.clip(samples, 0, source_size - 1)]
    return xp.matmul(weights, clamp)


@keras.saving.register_keras_serializable("sddns_tf")
class PatchEmbedding(layers.Layer):
    """Cuts images into square patches and projects each to a token.

    It is a convolution whose stride is its kernel's size, carried out as one matrix product, which
    is two to eight times as fast on a CPU.

    Args:
        patch_size: Side of a patch in pixels.
        hidden_dim: Length of a token.
    """

    def __init__(self, patch_size: int, hidden_dim: int, **kwargs) -> None:
        super().__init__(**kwargs)
        check_int("patch_size", patch_size)
        check_int("hidden_dim", hidden_dim)
        self.patch_size = patch_size
        self.hidden_dim = hidden_dim

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        # Uniform in +-1/sqrt(fan in): DINO leaves this kernel at the convolution's own default.
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.patch_size, self.patch_size, input_shape[-1], self.hidden_dim),
            initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
        )
        self.bias = self.add_weight(name="bias", shape=(self.hidden_dim,), initializer="zeros")

    def call(self, images: Array) -> tf.Tensor:
        """Map images `(B, H, W, C)` to tokens `(B, N, hidden_dim)`, patches in row-major order."""
        _, height, width, channels = ops.shape(images)
        patch = self.patch_size
        rows, columns = height // patch, width // patch
        # (row of patches, line, patch, its pixels of that line): rank 4 is all it takes.
        x = ops.reshape(images, (-1, patch, columns, patch * channels))
        x = ops.transpose(x, (0, 2, 1, 3))
        x = ops.reshape(x, (-1, rows * columns, patch * patch * channels))
        return ops.matmul(x, ops.reshape(self.kernel, (-1, self.hidden_dim))) + self.bias

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        sides = [side and side // self.patch_size for side in input_shape[1:3]]
        return (input_shape[0], None if None in sides else math.prod(sides), self.hidden_dim)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update({"patch_size": self.patch_size, "hidden_dim": self.hidden_dim})
        return config


@keras.saving.register_keras_serializable("sddns_tf")
class SelfAttention(layers.Layer):
    """Multi-head self-attention with one projection for queries, keys and values.

    Tensors have rank 4 at most, so that TFLite runs them with built-in operations. The softmax is
    taken in float32 whatever the dtype policy.

    Args:
        num_heads: Number of heads; divides the length of a token.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    def __init__(self, num_heads: int, qkv_bias: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        check_int("num_heads", num_heads)
        check_bool("qkv_bias", qkv_bias)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        dim = input_shape[-1]
        self.qkv = layers.Dense(
            3 * dim,
            use_bias=self.qkv_bias,
            kernel_initializer=_initializer(),
            dtype=self.dtype_policy,
            name="qkv",
        )
        self.projection = layers.Dense(
            dim, kernel_initializer=_initializer(), dtype=self.dtype_policy, name="projection"
        )
        self.qkv.build(input_shape)
        self.projection.build(input_shape)

    def call(self, tokens: Array, wanted: Any = None) -> tf.Tensor:
        """Map tokens `(B, N, D)` to tokens `(B, N, D)`, or to the first `wanted` of them."""
        _, length, dim = ops.shape(tokens)
        weights, value = self._weights_and_value(tokens, wanted)
        x = ops.matmul(ops.cast(weights, value.dtype), value)
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, wanted or length, dim))
        return self.projection(x)

    def weights_of(self, tokens: Array) -> tf.Tensor:
        """Tell how much each token attends to each other one: float32 `(B, num_heads, N, N)`."""
        return self._weights_and_value(tokens)[0]

    def _weights_and_value(self, tokens, wanted=None):
        _, length, dim = ops.shape(tokens)
        head_dim = dim // self.num_heads
        x = ops.reshape(self.qkv(tokens), (-1, length, 3 * self.num_heads, head_dim))
        query, key, value = ops.split(ops.transpose(x, (0, 2, 1, 3)), 3, axis=1)
        query = query[:, :, :wanted]
        # Scaling the queries rather than the product keeps float16 from overflowing.
        logits = tf.matmul(query * head_dim**-0.5, key, transpose_b=True)
        return ops.softmax(ops.cast(logits, "float32"), axis=-1), value

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update({"num_heads": self.num_heads, "qkv_bias": self.qkv_bias})
        return config


@keras.saving.register_keras_serializable("sddns_tf")
class StochasticDepth(layers.Layer):
    """Drops a residual branch for some samples during training.

    What remains is scaled by `1 / (1 - rate)`, so that the expectation does not change.

    Args:
        rate: Probability that a sample loses the branch, at least 0 and less than 1. Nothing is
            drawn or computed at 0.

    Reference:
        Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """

    def __init__(self, rate: float, **kwargs) -> None:
        super().__init__(**kwargs)
        check_number("rate", rate, 0.0, below=1.0)
        self.rate = float(rate)
        if self.rate > 0:
            self.seed_generator = keras.random.SeedGenerator()
        self.built = True

    def call(self, inputs: Array, training: bool = False) -> tf.Tensor:
        """Return the branch `(B, ...)`, or zeros for the samples that lose it."""
        return self.scaled(inputs, self.draw(inputs, training))

    def draw(self, inputs: Array, training: bool) -> tf.Tensor:
        """Return what each sample's branch is multiplied by, `(B, 1, ...)`; `None` for 1."""
        if not training or self.rate == 0:
            return None
        keep = 1.0 - self.rate
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        uniform = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        return ops.where(uniform < keep, 1.0 / keep, 0.0)

    def scaled(self, inputs: Array, scale: Any) -> tf.Tensor:
        """Return the branch multiplied by what was drawn for it."""
        return inputs if scale is None else inputs * ops.cast(scale, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update({"rate": self.rate})
        return config


@keras.saving.register_keras_serializable("sddns_tf")
class TransformerBlock(layers.Layer):
    """Pre-norm transformer block: self-attention, then an MLP, each with a residual connection.

    Args:
        num_heads: Number of attention heads.
        mlp_dim: Width of the MLP's hidden layer.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Probability that a sample loses either branch during training.
        layer_norm_epsilon: Added to the variance in layer normalization.
    """

    def __init__(
        self,
        num_heads: int,
        mlp_dim: int,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_int("num_heads", num_heads)
        check_int("mlp_dim", mlp_dim)
        check_bool("qkv_bias", qkv_bias)
        check_number("drop_path_rate", drop_path_rate, 0.0, below=1.0)
        check_number("layer_norm_epsilon", layer_norm_epsilon, above=0.0)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.qkv_bias = qkv_bias
        self.drop_path_rate = float(drop_path_rate)
        self.layer_norm_epsilon = layer_norm_epsilon

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        dtype = self.dtype_policy
        epsilon = self.layer_norm_epsilon
        dim = input_shape[-1]
        self.attention_norm = layers.LayerNormalization(
            epsilon=epsilon, dtype=dtype, name="attention_norm"
        )
        self.attention = SelfAttention(
            self.num_heads, qkv_bias=self.qkv_bias, dtype=dtype, name="attention"
        )
        self.mlp_norm = layers.LayerNormalization(epsilon=epsilon, dtype=dtype, name="mlp_norm")
        self.mlp_hidden = layers.Dense(
            self.mlp_dim, kernel_initializer=_initializer(), dtype=dtype, name="mlp_hidden"
        )
        self.mlp_output = layers.Dense(
            dim, kernel_initializer=_initializer(), dtype=dtype, name="mlp_output"
        )
        self.drop_path = StochasticDepth(self.drop_path_rate, dtype=dtype, name="drop_path")
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp_hidden):
            layer.build(input_shape)
        self.mlp_output.build((*input_shape[:-1], self.mlp_dim))

    def call(
        self, tokens: Array, training: bool = False, wanted: Any = None, recompute: bool = False
    ) -> tf.Tensor:
        """Map tokens `(B, N, D)` to tokens `(B, N, D)`.

        Args:
            tokens: Float tensor `(B, N, D)`.
            training: Whether stochastic depth is on.
            wanted: Number of first tokens to compute; `None` for all.
            recompute: Whether to recompute activations for the gradient rather than keep them.
        """
        # Drawn here, so that a recomputation uses the same draws.
        scales = [self.drop_path.draw(tokens, training) for _ in range(2)]

        def branches(tokens, scales):
            x = self.attention(self.attention_norm(tokens), wanted=wanted)
            tokens = tokens[:, :wanted] + self.drop_path.scaled(x, scales[0])
            x = self.mlp_hidden(self.mlp_norm(tokens))
            x = self.mlp_output(gelu(x))
            return tokens + self.drop_path.scaled(x, scales[1])

        if recompute:
            return keras.remat(lambda tokens: branches(tokens, scales))(tokens)
        return run_block(self, (self._likeness(), wanted), branches, tokens, scales)

    def _likeness(self):
        """Return all that tells blocks apart except their weights and their drop rate."""
        parts = [layer for layer in layers_of(self) if layer not in (self, self.drop_path)]
        return repr([{**layer.get_config(), "name": None} for layer in parts])

    def attention_weights(self, tokens: Array) -> tf.Tensor:
        """Tell how much each token attends to each other one: float32 `(B, num_heads, N, N)`."""
        return self.attention.weights_of(self.attention_norm(tokens))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update(
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "qkv_bias": self.qkv_bias,
                "drop_path_rate": self.drop_path_rate,
                "layer_norm_epsilon": self.layer_norm_epsilon,
            }
        )
        return config


@keras.saving.register_keras_serializable("sddns_tf")
class VisionTransformer(keras.Model):
    """Vision transformer that takes images of any size its patches tile.

    The feature of an image is its class token after the last layer normalization. The position
    embedding is learned on the grid of patches of `image_size` and resampled to the grid of each
    other input by DINO's bicubic rule, so that one network takes crops of several sizes. The
    weights exist as soon as the model does.

    Args:
        image_size: Integer or `(height, width)` in pixels, multiples of `patch_size`: the size at
            which the position embedding is learned.
        patch_size: Side of a patch in pixels.
        hidden_dim: Length of a token and of the feature.
        depth: Number of transformer blocks.
        num_heads: Number of attention heads; divides `hidden_dim`.
        mlp_ratio: Width of a block's MLP, as a multiple of `hidden_dim`.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Stochastic depth of the last block, at least 0 and less than 1. It grows
            linearly from 0 at the first block and acts during training only.
        layer_norm_epsilon: Added to the variance in layer normalization.
        recompute: Whether training keeps only what passes between blocks and computes the rest
            again for the gradient: a fraction of the memory for about a third more time.
        **kwargs: `name`, `dtype` and `trainable` of the model.

    Call arguments:
        images: Normalized float images `(B, height, width, 3)`; both sides are multiples of
            `patch_size`. `height` and `width` may be unknown when the graph is made.
        training: Whether stochastic depth is on.

    Returns:
        Features `(B, hidden_dim)` in the compute dtype.

    Raises:
        ValueError: If `image_size` or an input's size is not a multiple of `patch_size`, or if the
            images are not float or not of rank 4 with 3 channels.

    Example:
    >>> backbone = VisionTransformer(32, patch_size=4, hidden_dim=192, depth=12, num_heads=3)
    >>> backbone(np.zeros((8, 32, 32, 3), "float32")).shape
    TensorShape([8, 192])
    >>> backbone(np.zeros((8, 16, 16, 3), "float32")).shape
    TensorShape([8, 192])

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; Caron et al.,
        "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        hidden_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        layer_norm_epsilon: float = 1e-6,
        recompute: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (
            ("patch_size", patch_size),
            ("hidden_dim", hidden_dim),
            ("depth", depth),
            ("num_heads", num_heads),
        ):
            check_int(name, number)
        if hidden_dim % num_heads:
            raise ValueError(
                "`hidden_dim` must be a multiple of `num_heads`. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}"
            )
        check_number("drop_path_rate", drop_path_rate, 0.0, below=1.0)
        check_number("mlp_ratio", mlp_ratio, low=1.0 / hidden_dim)
        check_number("layer_norm_epsilon", layer_norm_epsilon, above=0.0)
        check_bool("qkv_bias", qkv_bias)
        check_bool("recompute", recompute)
        sides = check_size("image_size", image_size)
        if any(side % patch_size for side in sides):
            raise ValueError(
                "`image_size` must be an integer or a pair (height, width) of multiples of "
                f"`patch_size`. Received: image_size={image_size}, patch_size={patch_size}"
            )
        self.image_size = sides[0] if np.ndim(image_size) == 0 else sides
        self.patch_size = patch_size
        self.hidden_dim = hidden_dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.drop_path_rate = float(drop_path_rate)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.recompute = recompute
        self.grid_size = tuple(side // patch_size for side in sides)

        dtype = self.dtype_policy
        self.patch_embedding = PatchEmbedding(
            patch_size, hidden_dim, dtype=dtype, name="patch_embedding"
        )
        self.blocks = [
            TransformerBlock(
                num_heads,
                int(hidden_dim * mlp_ratio),
                qkv_bias=qkv_bias,
                drop_path_rate=rate,
                layer_norm_epsilon=layer_norm_epsilon,
                dtype=dtype,
                name=f"blocks_{i}",
            )
            for i, rate in enumerate(np.linspace(0.0, drop_path_rate, depth))
        ]
        self.norm = layers.LayerNormalization(epsilon=layer_norm_epsilon, dtype=dtype, name="norm")
        self.build((None, *sides, 3))

    def build(self, input_shape: Any) -> None:
        """Create the weights."""
        # Keras builds a loaded model again.
        if self.built:
            return
        tokens_shape = (None, 1 + math.prod(self.grid_size), self.hidden_dim)
        self.class_token = self.add_weight(
            name="class_token", shape=(1, 1, self.hidden_dim), initializer=_initializer()
        )
        # Resampled in float32 under every policy.
        self.position_embedding = self.add_weight(
            name="position_embedding",
            shape=(1, *tokens_shape[1:]),
            initializer=_initializer(),
            autocast=False,
        )
        self.patch_embedding.build(input_shape)
        for layer in (*self.blocks, self.norm):
            layer.build(tokens_shape)

    def call(self, images: Array, training: bool = False) -> tf.Tensor:
        """Map normalized images `(B, height, width, 3)` to features `(B, hidden_dim)`."""
        tokens = self.embed(images)
        recompute = bool(self.recompute and training)
        for block in self.blocks[:-1]:
            tokens = block(tokens, training=training, recompute=recompute)
        # Of the last block, only the class token is needed: it becomes the feature.
        tokens = self.blocks[-1](tokens, training=training, wanted=1, recompute=recompute)
        return self.norm(tokens[:, 0])

    def token_maps(self, images: Array, passed: Any = None) -> Any:
        """Return tokens of patches, as maps.

        Args:
            images: Normalized float images `(B, height, width, 3)`, of known height and width.
            passed: Ints from 0 to `depth`, one for each map: after how many blocks to take the
                tokens. Defaults to all blocks but the last, which the feature of an image needs as
                well.

        Returns:
            List of tensors `(B, height / patch_size, width / patch_size, hidden_dim)`.
        """
        passed = (self.depth - 1,) if passed is None else passed
        images = ops.convert_to_tensor(images)
        grid = [side // self.patch_size for side in images.shape[1:3]]
        tokens, found = self.embed(images), {}
        for count in range(max(passed) + 1):
            if count:
                tokens = self.blocks[count - 1](tokens, training=False)
            found[count] = tokens
        return [ops.reshape(found[n][:, 1:], (-1, *grid, self.hidden_dim)) for n in passed]

    def attention_weights(self, images: Array) -> tf.Tensor:
        """Return attention of the last block, as shown in the DINO paper's figures.

        Args:
            images: Normalized float images `(B, height, width, 3)`.

        Returns:
            float32 `(B, num_heads, 1 + N, 1 + N)` for N patches in row-major order; index 0 is the
            class token, so `[:, :, 0, 1:]` is what the class token attends to. Rows sum to one.
        """
        tokens = self.embed(ops.convert_to_tensor(images))
        for block in self.blocks[:-1]:
            tokens = block(tokens, training=False)
        return self.blocks[-1].attention_weights(tokens)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return the shape of the output."""
        self._check_shape(input_shape)
        return (input_shape[0], self.hidden_dim)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        config = super().get_config()
        config.update(
            {
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "hidden_dim": self.hidden_dim,
                "depth": self.depth,
                "num_heads": self.num_heads,
                "mlp_ratio": self.mlp_ratio,
                "qkv_bias": self.qkv_bias,
                "drop_path_rate": self.drop_path_rate,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "recompute": self.recompute,
            }
        )
        return config

    def embed(self, images: Array) -> tf.Tensor:
        """Map normalized images to the tokens that enter the first block, `(B, 1 + N, D)`."""
        self._check_shape(images.shape)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(images.dtype)):
            raise ValueError(
                "`images` must be normalized float images, not pixels. "
                f"Received: images of dtype {keras.backend.standardize_dtype(images.dtype)}"
            )
        batch, height, width, _ = ops.shape(images)
        if not (isinstance(height, int) and isinstance(width, int)):
            # The images depend on the assertions, or an error of the reshape may come first.
            with tf.control_dependencies(self._size_assertions(height, width)):
                images = tf.identity(images)
        images = ops.cast(images, self.compute_dtype)
        patches = self.patch_embedding(images)
        class_token = ops.cast(self.class_token, patches.dtype)
        class_token = ops.broadcast_to(class_token, (batch, 1, self.hidden_dim))
        tokens = ops.concatenate([class_token, patches], axis=1)
        positions = self.positions(height // self.patch_size, width // self.patch_size)
        return tokens + ops.cast(positions, tokens.dtype)

    def positions(self, rows: Any, columns: Any) -> tf.Tensor:
        """Return the position embedding of a grid of patches, `(1, 1 + rows * columns, D)`."""
        known = isinstance(rows, int) and isinstance(columns, int)
        if known and (rows, columns) == self.grid_size:
            return self.position_embedding
        xp = np if known else ops
        to_rows = ops.cast(bicubic_matrix(rows, self.grid_size[0], xp), "float32")
        to_columns = ops.cast(bicubic_matrix(columns, self.grid_size[1], xp), "float32")
        class_position = self.position_embedding[:, :1]
        grid = ops.reshape(self.position_embedding[:, 1:], (self.grid_size[0], -1))
        grid = ops.matmul(to_rows, grid)
        grid = ops.reshape(grid, (rows, self.grid_size[1], self.hidden_dim))
        grid = tf.matmul(to_columns, grid)
        grid = ops.reshape(grid, (1, rows * columns, self.hidden_dim))
        return ops.concatenate([class_position, grid], axis=1)

    def _check_shape(self, shape):
        expected = (
            f"`images` must have shape (batch, height, width, 3) with a height and a width that "
            f"are multiples of the patch size, {self.patch_size}. "
        )
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"{expected}Received: images of shape {tuple(shape)}")
        if any(side is not None and (side < 1 or side % self.patch_size) for side in shape[1:3]):
            raise ValueError(f"{expected}Received: images of shape {tuple(shape)}")

    def _size_assertions(self, height, width):
        assertions = [
            tf.debugging.assert_equal(
                side % self.patch_size,
                0,
                message=(
                    f"The {name} of `images` must be a multiple of the patch size, "
                    f"{self.patch_size}."
                ),
            )
            for name, side in (("height", height), ("width", width))
        ]
        return [one for one in assertions if one is not None]  # None: it holds while tracing.


def vit_tiny(
    image_size: int | tuple[int, int] = 224, patch_size: int = 16, **kwargs
) -> VisionTransformer:
    """Make ViT-Ti: a `VisionTransformer` of width 192 with 12 blocks of 3 heads.

    Args:
        image_size: Integer or `(height, width)` in pixels, multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        **kwargs: Further arguments of `VisionTransformer`, such as `drop_path_rate`.

    Returns:
        A `VisionTransformer` with random weights.

    Example:
    >>> backbone = vit_tiny(image_size=32, patch_size=4, drop_path_rate=0.1)
    """
    kwargs = {"hidden_dim": 192, "depth": 12, "num_heads": 3, "name": "vit_tiny", **kwargs}
    return VisionTransformer(image_size=image_size, patch_size=patch_size, **kwargs)


def vit_small(
    image_size: int | tuple[int, int] = 224, patch_size: int = 16, **kwargs
) -> VisionTransformer:
    """Make ViT-S: a `VisionTransformer` of width 384 with 12 blocks of 6 heads.

    Args:
        image_size: Integer or `(height, width)` in pixels, multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        **kwargs: Further arguments of `VisionTransformer`, such as `drop_path_rate`.

    Returns:
        A `VisionTransformer` with random weights.

    Example:
    >>> backbone = vit_small(image_size=32, patch_size=4, drop_path_rate=0.1)
    """
    kwargs = {"hidden_dim": 384, "depth": 12, "num_heads": 6, "name": "vit_small", **kwargs}
    return VisionTransformer(image_size=image_size, patch_size=patch_size, **kwargs)


def vit_base(
    image_size: int | tuple[int, int] = 224, patch_size: int = 16, **kwargs
) -> VisionTransformer:
    """Make ViT-B: a `VisionTransformer` of width 768 with 12 blocks of 12 heads.

    Args:
        image_size: Integer or `(height, width)` in pixels, multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        **kwargs: Further arguments of `VisionTransformer`, such as `drop_path_rate`.

    Returns:
        A `VisionTransformer` with random weights.

    Example:
    >>> backbone = vit_base(image_size=32, patch_size=4, drop_path_rate=0.1)
    """
    kwargs = {"hidden_dim": 768, "depth": 12, "num_heads": 12, "name": "vit_base", **kwargs}
    return VisionTransformer(image_size=image_size, patch_size=patch_size, **kwargs)
