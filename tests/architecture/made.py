"""A made sweep whose trajectories follow known rules: what a shape, a seed and a layer's place do is decided here."""

from __future__ import annotations

import numpy as np

from ma_monitor.architecture.features import Shape
from ma_monitor.architecture.sweep import Training

TOTAL = 2000
STEPS = np.unique(np.concatenate([[0], 2 ** np.arange(8), np.arange(0, TOTAL + 1, 50)]))
LR = 1e-3 * np.interp(np.arange(TOTAL + 1), [0, 20, TOTAL], [0, 1, 0.1])
SHAPE = Shape(4, 128, 4, 512, 32, 4096, 2_000_000, 0.25, 10_000.0, False)


def make_shape(layers: int, width: int, heads: int, ratio: int = 4, *, rms: bool = False) -> Shape:
    """A shape of GPT-NeoX's or Llama's kind."""
    parameters = 12 * layers * width**2 + 2 * 4096 * width
    share = 1.0 if rms else 0.25
    return Shape(layers, width, heads, ratio * width, width // heads, 4096, parameters, share, 10_000.0, rms)


def level(shape: Shape) -> float:
    """What of the last ln ratio the shape decides."""
    return 2.0 + 0.6 * float(np.log(shape.width / 128)) - 0.4 * float(np.log(shape.mlp / shape.width / 4))


def make_training(shape: Shape, seed: int, *, noise: float = 0.05, kind: str = "gpu") -> Training:
    """A training whose layers rise to `level`, more in the middle of the depth; seeds differ by ``noise``."""
    rng = np.random.default_rng((seed, shape.layers, shape.width, shape.mlp, shape.heads))
    share = np.cumsum(LR)[STEPS] / np.cumsum(LR)[-1]
    place = np.arange(1, shape.layers + 1) / shape.layers
    height = level(shape) - 2 * (place - 0.5) ** 2 + noise * rng.normal() + noise * rng.normal(size=shape.layers)
    rise = np.outer(height, 1 - np.exp(-5 * share)) - 0.3 * np.outer(place, share)
    ratio = np.exp(1.7 + rise + 0.02 * rng.normal(size=rise.shape)).T
    means = np.stack([ratio, 0.8 * ratio, 0.7 * ratio, np.ones_like(ratio)], axis=1)
    return Training(f"{kind}-{shape.width}x{shape.layers}-{seed}", kind, shape, seed, "made", 8192, LR, STEPS, means)


def make_sweep(count: int = 14) -> list[Training]:
    """Trainings of as many shapes, the first of them with three seeds."""
    rng = np.random.default_rng(3)
    shapes: dict[Shape, None] = {}
    while len(shapes) < count:
        layers, width, heads, ratio = (
            int(rng.choice(values)) for values in ((3, 4, 6, 8), (64, 128, 256), (2, 4), (2, 4, 8))
        )
        shapes.setdefault(make_shape(layers, width, heads, ratio, rms=bool(rng.random() < 0.4)))
    first, *_ = shapes
    return [make_training(shape, 0) for shape in shapes] + [make_training(first, seed) for seed in (1, 2)]
