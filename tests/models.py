"""Models as people write them, narrow: a ResNet-18 and a transformer block, in Linen and NNX, of the norms of Flax or of jnorm."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

WIDTHS, CLASSES = (4, 8, 8, 16), 3


class ResNet(nn.Module):
    """ResNet-18, narrow: four stages of two basic blocks."""

    norms: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        wide = {"param_dtype": self.param_dtype}
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False, **wide)
        # Flax keeps running statistics in param_dtype with force_float32_reductions=False only
        options = {"use_running_average": not train, "momentum": 0.9, "force_float32_reductions": False, **wide}
        norm = functools.partial(self.norms.BatchNorm, **options)
        x = nn.relu(norm()(conv(WIDTHS[0])(x)))
        for stage, width in enumerate(WIDTHS):
            for block in range(2):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, strides=strides)(x)))
                y = norm(scale_init=nn.initializers.constant(0.5))(conv(width)(y))
                if x.shape != y.shape:
                    x = norm()(conv(width, kernel_size=(1, 1), strides=strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(CLASSES, **wide)(x.mean((1, 2)))


class Transformer(nn.Module):
    """One block, and the norm that follows the last."""

    norms: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        wide = {"param_dtype": self.param_dtype}
        y = self.norms.LayerNorm(**wide)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, **wide)(y)
        y = self.norms.RMSNorm(**wide)(x)
        x = x + nn.Dense(8, **wide)(nn.gelu(nn.Dense(16, **wide)(y)))
        return nn.Dense(CLASSES, **wide)(self.norms.LayerNorm(**wide)(x).mean(1))


class NNXBlock(nnx.Module):
    def __init__(self, norms, before, width, strides, rngs, param_dtype):
        wide = {"rngs": rngs, "param_dtype": param_dtype}
        conv = functools.partial(nnx.Conv, use_bias=False, **wide)
        norm = functools.partial(norms.BatchNorm, width, momentum=0.9, **wide)
        self.conv1, self.norm1 = conv(before, width, (3, 3), strides=strides), norm()
        self.conv2, self.norm2 = conv(width, width, (3, 3)), norm(scale_init=nnx.initializers.constant(0.5))
        self.shortcut = nnx.Sequential(conv(before, width, (1, 1), strides=strides), norm()) if (before, strides) != (width, 1) else None

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu((x if self.shortcut is None else self.shortcut(x)) + y)


class NNXResNet(nnx.Module):
    def __init__(self, norms, rngs, param_dtype=jnp.float32):
        wide = {"rngs": rngs, "param_dtype": param_dtype}
        self.conv = nnx.Conv(3, WIDTHS[0], (3, 3), use_bias=False, **wide)
        self.norm = norms.BatchNorm(WIDTHS[0], momentum=0.9, **wide)
        widths = [WIDTHS[0], *(w for w in WIDTHS for _ in range(2))]
        strides = [2 if i and i % 2 == 0 else 1 for i in range(8)]
        blocks = zip(widths[:-1], widths[1:], strides, strict=True)
        self.blocks = nnx.List([NNXBlock(norms, *block, rngs, param_dtype) for block in blocks])
        self.dense = nnx.Linear(WIDTHS[-1], CLASSES, **wide)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2)))


class NNXTransformerBlock(nnx.Module):
    def __init__(self, norms, rngs, param_dtype=jnp.float32):
        wide = {"rngs": rngs, "param_dtype": param_dtype}
        self.norm1, self.norm2 = norms.LayerNorm(8, **wide), norms.RMSNorm(8, **wide)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, **wide)
        self.up, self.down = nnx.Linear(8, 16, **wide), nnx.Linear(16, 8, **wide)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXTransformer(nnx.Module):
    def __init__(self, norms, rngs, param_dtype=jnp.float32):
        wide = {"rngs": rngs, "param_dtype": param_dtype}
        self.block = NNXTransformerBlock(norms, rngs, param_dtype)
        self.norm, self.dense = norms.LayerNorm(8, **wide), nnx.Linear(8, CLASSES, **wide)

    def __call__(self, x):
        return self.dense(self.norm(self.block(x)).mean(1))


def with_values(tree, rng):
    """The variables with others of their shapes and dtypes, as a training leaves them: variances and scales are positive."""

    def drawn(path, a):
        name = jax.tree_util.keystr(path, simple=True, separator="/").replace("/value", "").split("/")[-1]
        value = (
            rng.uniform(0.5, 1.5, a.shape)
            if name in ("var", "scale")
            else rng.normal(size=a.shape) * (0.5 if a.ndim < 2 else 1 / math.prod(a.shape[:-1]) ** 0.5)
        )
        return jnp.asarray(value, a.dtype)

    return jax.tree_util.tree_map_with_path(drawn, tree)
