"""Boosted trees: XGBoost's, read from its JSON and followed here, so that a training never imports XGBoost.

Its import takes a second or more, holds 150 MB, starts a thread and draws from Python's own random numbers. Training
trees needs it, using them does not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.errors import MissingExtraError

NODES = 10**7
"""Far more than any trees here have: all are kept as large as the largest."""


def import_xgboost() -> ModuleType:
    """XGBoost, to train trees. What its import draws from Python's own random numbers is put back.

    Raises:
        MissingExtraError: If it is not installed.
    """
    state = random.getstate()
    try:
        import xgboost
    except ImportError as error:
        raise MissingExtraError("xgboost", "predict") from error
    finally:
        random.setstate(state)
    return xgboost


@dataclass(frozen=True, eq=False)
class Trees:
    """Trees of ``T``, nodes padded to ``N``; children of a leaf are the leaf itself.

    Attributes:
        left: Next node where the input is below the threshold, ``[T, N]``.
        right: Next node otherwise, ``[T, N]``.
        split: Which input is asked, ``[T, N]``.
        threshold: Against what; a leaf's is its value, ``[T, N]``.
        target: Which output each tree adds to, ``[T]``.
        base: What every output begins with, ``[targets]``.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    split: NDArray[np.int64]
    threshold: NDArray[np.float32]
    target: NDArray[np.int64]
    base: NDArray[np.float64]

    def predict(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Outputs ``[rows, targets]`` of inputs ``[rows, inputs]``."""
        x = np.asarray(values, dtype=np.float32)
        first = np.arange(len(self.left))[:, None] * self.left.shape[1]  # nodes are numbered through all trees
        left, right = (self.left + first).ravel(), (self.right + first).ravel()
        split, threshold, inputs = self.split.ravel(), self.threshold.ravel(), x.ravel()
        row = np.arange(len(x)) * x.shape[1]
        node = np.repeat(first, len(x), axis=1)
        while True:
            below = inputs.take(split.take(node) + row) < threshold.take(node)
            after = np.where(below, left.take(node), right.take(node))
            if (after == node).all():
                break
            node = after
        leaves = np.ascontiguousarray(threshold.take(node).T, dtype=np.float64)
        return np.asarray(self.base + leaves @ (self.target[:, None] == np.arange(self.base.size)))


def read_trees(document: Mapping[str, Any], inputs: int) -> Trees:
    """Trees over so many ``inputs`` from XGBoost's JSON.

    Raises:
        ValueError: If a tree leads nowhere, asks for an input that there is not, or holds what is not finite.
    """
    learner = document["learner"]
    model = learner["gradient_booster"]["model"]
    found, size = model["trees"], max(len(tree["left_children"]) for tree in model["trees"])
    shape = (len(found), size)
    if len(found) * size > NODES:
        raise ValueError(f"its trees must have at most {NODES} nodes, as many for each as the largest has")
    left, right = (np.tile(np.arange(size), (len(found), 1)) for _ in range(2))
    split, threshold = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    for number, tree in enumerate(found):
        own = np.arange(len(tree["left_children"]))
        for kept, name in ((left, "left_children"), (right, "right_children")):
            children = np.array(tree[name], dtype=np.int64)
            if children.shape != own.shape or ((children != -1) & ((children <= own) | (children >= own.size))).any():
                raise ValueError("its trees lead nowhere")
            kept[number, : own.size] = np.where(children == -1, own, children)
        split[number, : own.size] = tree["split_indices"]
        threshold[number, : own.size] = tree["split_conditions"]
    base = np.atleast_1d(np.array(json.loads(learner["learner_model_param"]["base_score"]), dtype=np.float64))
    target = np.array(model["tree_info"], dtype=np.int64)
    if split.min() < 0 or split.max() >= inputs or target.min() < 0 or target.max() >= base.size:
        raise ValueError("its trees ask for inputs or give outputs that there are not")
    if not np.isfinite(threshold).all() or not np.isfinite(base).all():
        raise ValueError("the numbers of its trees must be finite")
    return Trees(left, right, split, threshold, target, base)
