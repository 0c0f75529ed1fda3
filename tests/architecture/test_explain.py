"""Explanations of a target whose causes are known, and their figures."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.inspection import partial_dependence as reference
from sklearn.preprocessing import PowerTransformer
from xgboost import XGBRegressor

from ma_monitor.architecture import figures
from ma_monitor.architecture.explain import Explanation, explain, partial_dependence, reading
from ma_monitor.architecture.features import FEATURES, layer_features
from ma_monitor.architecture.parameters import Samples
from ma_monitor.architecture.sweep import Training

CAUSES = {"log width": 1.0, "MLP / width": -0.5}


@pytest.fixture(scope="module")
def samples(sweep: list[Training]) -> Samples:
    features = np.concatenate([layer_features(one.shape) for one in sweep])
    shapes = list(dict.fromkeys(one.shape for one in sweep))
    model = np.concatenate([np.full(one.shape.layers, shapes.index(one.shape)) for one in sweep])
    target = sum(weight * features[:, FEATURES.index(name)] for name, weight in CAUSES.items())
    noise = 0.02 * np.random.default_rng(0).normal(size=len(model))
    return Samples(features, {"K": np.asarray(target) + noise}, model, PowerTransformer())


@pytest.fixture(scope="module")
def explained(samples: Samples) -> Explanation:
    return explain(samples, "K")


def test_contributions_add_up_and_find_the_causes(explained: Explanation, samples: Samples) -> None:
    predicted = explained.base + explained.contributions.sum(axis=1)
    y = samples.targets["K"]
    assert ((predicted - y) ** 2).sum() < 0.1 * ((y - y.mean()) ** 2).sum()
    # What moves with a cause among these shapes shares its part: the width's goes to the parameters for the most part.
    causes = explained.size[[FEATURES.index(name) for name in (*CAUSES, "log parameters")]]
    assert causes.sum() > 0.6 * explained.size.sum()
    for name, weight in CAUSES.items():
        i = FEATURES.index(name)
        assert explained.direction[i] * weight > 0.4 * abs(weight)
    assert explained.importance.sum() == pytest.approx(1, abs=1e-5)
    assert explained.models == 14
    still = [FEATURES.index(name) for name in ("log vocabulary", "log rotary base")]
    assert not explained.contributions[:, still].any()
    assert not explained.direction[still].any()


def test_partial_dependence_is_the_library_s(samples: Samples, explained: Explanation) -> None:
    model = XGBRegressor(n_estimators=10, n_jobs=1).fit(samples.features, samples.targets["K"])
    i = FEATURES.index("log width")
    grid = np.linspace(4.2, 5.5, 5)
    found = partial_dependence(model.predict, samples.features, i, grid)
    expected = reference(model, samples.features, [i], custom_values={i: grid}, kind="average")
    np.testing.assert_allclose(found, expected["average"][0], rtol=1e-5)
    rises = explained.dependence[i]
    assert rises[-1] > rises[0]


def test_what_cannot_be_told_apart(explained: Explanation) -> None:
    """Powers of one number have one order; norm and rotary share go together in the families of this sweep."""
    assert "layer position²" in explained.alike[FEATURES.index("layer position")]
    assert "RMS norm" in explained.alike[FEATURES.index("rotary share")]
    assert "RMS norm" not in explained.alike[FEATURES.index("log width")]


def test_reading(explained: Explanation) -> None:
    words = reading(explained)
    assert words.startswith(f"K, from {len(explained.values)} layers of 14 models, which are 14 samples and not ")
    assert "% of the variance" in words
    assert "raises it by" in words
    doubtful = reading(replace(explained, r2=-0.3))
    assert "it explains nothing (R² below 0): what follows describes these models, no others" in doubtful


@pytest.mark.parametrize("kind", ["summary", "waterfall", "dependence"])
def test_figures(explained: Explanation, kind: str) -> None:
    made: dict[str, Figure] = {
        "summary": figures.summary(explained),
        "waterfall": figures.waterfall(explained, 3),
        "dependence": figures.dependence(explained),
    }
    figure = made[kind]
    figure.savefig(BytesIO())
    words = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
    assert any(f"K: {len(explained.values)} layers of 14 models" in word for word in words)
    axes = figure.axes[0]
    if kind == "summary":
        first = axes.collections[-1].get_offsets()  # the largest feature is drawn last, on top
        top = int(np.argmax(explained.size))
        np.testing.assert_allclose(np.asarray(first)[:, 0], explained.contributions[:, top])
    if kind == "waterfall":
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
        assert ends[-1] == pytest.approx(explained.base + explained.contributions[3].sum())
    if kind == "dependence":
        largest = np.argsort(-explained.size)[:6]
        assert [one.get_xlabel() for one in figure.axes] == [FEATURES[i] for i in largest]
