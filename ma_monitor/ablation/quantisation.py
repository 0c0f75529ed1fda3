"""What a massive activation costs in precision: the error of simulated quantisation of a layer's output.

Symmetric absmax rounding: x̂ = s·round(x/s) with s = max|x|/(2^(b−1) − 1), over a whole tensor (one sequence) or over
each token. One entry far above the rest takes the grid from all others. A rotation of the channels first (QuaRot,
arXiv:2404.00456) spreads it over all of them; after DFRot (arXiv:2412.00648) massive tokens are where a random Hadamard
and a random orthogonal rotation differ: the first spreads one entry evenly, the second by Gaussian weights.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from torch import Tensor

Scale = Literal["tensor", "token"]
BITS = (8, 4)
SCALES: tuple[Scale, ...] = ("tensor", "token")
ROTATIONS = ("none", "hadamard", "orthogonal")


def quantised(values: Tensor, bits: int, scale: Scale) -> Tensor:
    """``[S, d]`` rounded to the grid of so many bits, in the same type; of zeros nothing changes."""
    largest = values.abs().amax() if scale == "tensor" else values.abs().amax(dim=1, keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, torch.round(values / step) * step, values)


def random_hadamard(width: int, generator: np.random.Generator) -> Tensor:
    """A random Hadamard rotation ``[d, d]`` in float32: random signs, then a Hadamard matrix over √d.

    Of a width 2^a·m with odd m > 1 the Kronecker product of a Hadamard matrix of 2^a with the orthonormal cosine
    transform of m, which spreads one channel over all others, at most √2 times as unevenly.
    """
    power = width & -width
    matrix = np.kron(hadamard(power) / np.sqrt(power), dct(np.eye(width // power), norm="ortho", axis=0))
    return torch.from_numpy((matrix * generator.choice([-1.0, 1.0], width)).astype(np.float32))


def random_orthogonal(width: int, generator: np.random.Generator) -> Tensor:
    """A rotation ``[d, d]`` in float32 drawn evenly from all (Haar): Q of a Gaussian matrix, R's diagonal positive."""
    q, r = np.linalg.qr(generator.standard_normal((width, width)))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


def rotations(width: int, seed: int) -> dict[str, Tensor | None]:
    """The rotations that are compared, by name; None for none. A row vector is rotated by ``x @ R.T``."""
    generator = np.random.default_rng(seed)
    return {
        "none": None,
        "hadamard": random_hadamard(width, generator),
        "orthogonal": random_orthogonal(width, generator),
    }


def errors(hidden: Tensor, massive: Tensor, rotation: Tensor | None, bits: int, scale: Scale) -> dict[str, float]:
    """Relative errors of a layer's output ``[S, d]`` after quantisation, with and without its massive entries.

    Args:
        hidden: The output.
        massive: Flat indices of its massive entries.
        rotation: ``[d, d]`` applied to the channels before, and undone after; None for none.
        bits: Of the grid, with the sign.
        scale: What shares one grid.

    Returns:
        ``error``: ‖x̂ − x‖/‖x‖ of everything; ``rest``: of the other entries alone; ``error_apart`` and ``rest_apart``:
        where the massive entries are kept in full precision and left out of the grid. NaN where nothing is not zero.
    """
    hidden = hidden.float()
    marked = torch.zeros(hidden.numel(), dtype=torch.bool, device=hidden.device)
    marked[massive] = True
    marked = marked.view_as(hidden)

    def there_and_back(values: Tensor) -> Tensor:
        if rotation is None:
            return quantised(values, bits, scale)
        return quantised(values @ rotation.T, bits, scale) @ rotation

    off = there_and_back(hidden) - hidden
    others = hidden.masked_fill(marked, 0)
    apart = (there_and_back(others) - others).masked_fill(marked, 0)
    whole, rest = hidden.norm(), others.norm()
    return {
        "error": float(off.norm() / whole),
        "rest": float(off.masked_fill(marked, 0).norm() / rest),
        "error_apart": float(apart.norm() / whole),
        "rest_apart": float(apart.norm() / rest),
    }
