"""What corrects the forecasts of a run: what past runs teach, and what its architecture let expect beforehand.

Both are files: ``combiner.json`` in the run's directory or in the package (``learned.combiner``), and ``prior.json`` in
the run's directory (``learned.prior``), which a monitor writes when it makes the run. What cannot be used corrects
nothing, and the forecast's words say why: a forecast without it is better than none.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ma_monitor.learned.combiner import knots_of, load
from ma_monitor.learned.prior import LEVELS, Prior, combined, conditioned
from ma_monitor.numerics.members import ANCHOR, horizon
from ma_monitor.numerics.mixture import Correction, Mixture
from ma_monitor.numerics.values import LARGEST, interpolate
from ma_monitor.runs.documents import COMBINER, PRIOR
from ma_monitor.runs.files import read_json, replace_file
from ma_monitor.runs.log import SCHEMA_VERSION

if TYPE_CHECKING:
    from ma_monitor.learned.combiner import Combiner

STRANGE = 0.7
"""A run whose first ln ratios lie this far from what was expected (a factor of two) is not what the sweep trained."""
LOW, MIDDLE, HIGH = (LEVELS.index(level) for level in (0.1, 0.5, 0.9))


class Corrections:
    """What corrects the forecasts of one run."""

    def __init__(self, folder: Path, *, expected: bool = True) -> None:
        """Of the run in ``folder``; if ``expected``, with what its architecture let expect (of the first rank)."""
        own = folder / COMBINER
        self._combiner = own if own.is_file() else packaged_path()
        self._prior = folder / PRIOR if expected and (folder / PRIOR).is_file() else None

    def __call__(self, mixture: Mixture, end: int | None) -> Correction:
        """The correction of a mixture of all of the run's layers, or of some."""
        try:
            correction = _combiner(self._combiner, self._combiner.stat().st_mtime_ns).correct(mixture, end)
        except Exception as error:
            correction = Correction.none(f"the in-run mixture alone: {_line(error)}")
        if not _finite(correction):
            correction = Correction.none(f"the in-run mixture alone: {COMBINER} gives what is not finite")
        if self._prior is None or end is None or mixture.clock.name != "learning_rate" or end <= mixture.steps[-1]:
            return correction
        try:
            prior, planned, span = _prior(self._prior, self._prior.stat().st_mtime_ns)
            if planned != end or abs(float(mixture.clock.time(np.array([float(end)]))[0]) - span) > 1e-6 * span:
                return _saying(correction, "the plan has changed since the architecture was asked")
            if len(prior.quantiles) != len(mixture.values):
                return _saying(correction, "a layer is missing, so that the architecture is not asked")
            if not _as_expected(prior, mixture, span):
                return _saying(correction, "it did not start as its architecture lets expect")
            weighed = with_prior(correction, mixture, end, prior)
        except Exception as error:
            return _saying(correction, f"{PRIOR} cannot be used: {_line(error)}")
        return weighed if _finite(weighed) else _saying(correction, f"{PRIOR} gives what is not finite")


def with_prior(correction: Correction, mixture: Mixture, end: int, prior: Prior) -> Correction:
    """A correction that also weighs in what was expected beforehand of every layer, the less the more has been seen."""
    clock, now = mixture.clock, mixture.steps[-1:]
    knots = knots_of(float(now[0]), end)
    ahead = horizon(clock, float(now[0]), knots)
    alone = mixture.sample(knots)
    said = np.quantile(correction.apply(alone, ahead), LEVELS, axis=2).transpose(1, 0, 2)
    own = np.quantile(alone, (LEVELS[LOW], 0.5, LEVELS[HIGH]), axis=2)
    whole = clock.time(np.array([float(end)]))
    share, later = float((clock.time(now) / whole)[0]), clock.time(knots) / whole
    recent = np.log(mixture.values[:, -ANCHOR:]).mean(axis=1)
    doubt = "" if prior.trust == 1 else ", which counts less: such a training was not seen"
    both = combined(conditioned(prior, share, recent, later), said, share, prior.trust)
    return Correction(
        ahead=ahead,
        shift=both[:, MIDDLE] - own[1],
        below=(both[:, MIDDLE] - both[:, LOW]) / np.maximum(own[1] - own[0], 1 / LARGEST),
        above=(both[:, HIGH] - both[:, MIDDLE]) / np.maximum(own[2] - own[1], 1 / LARGEST),
        weight=correction.weight,
        words=correction.words.replace(" alone", "") + "; with what the architecture let expect" + doubt,
    )


def packaged_path() -> Path:
    """The combiner that comes with the package."""
    return Path(__file__).parent / "data" / COMBINER


def save_prior(prior: Prior, planned: int, span: float, folder: Path) -> None:
    """Writes what is expected of a run of so many ``planned`` updates, worth ``span`` at the highest rate."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "planned": planned,
        "span": span,
        "trust": prior.trust,
        "time": prior.time.tolist(),
        "quantiles": prior.quantiles.round(5).tolist(),
    }
    text = json.dumps(document)
    replace_file(folder / PRIOR, lambda new: new.write_text(text, encoding="utf-8"))


@lru_cache(maxsize=4)
def _combiner(path: Path, changed: int) -> Combiner:
    return load(path)


@lru_cache(maxsize=4)
def _prior(path: Path, changed: int) -> tuple[Prior, int, float]:
    document = read_json(path)
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {document['schema_version']!r}, this ma_monitor reads {SCHEMA_VERSION}")
    trust = float(document.get("trust", 1.0))  # runs of before have none, and their forecasts stay what they were
    prior = Prior(np.array(document["time"], dtype=float), np.array(document["quantiles"], dtype=float), trust)
    shaped = prior.time.ndim == 1 and prior.time.size > 1 and prior.quantiles.ndim == 3
    if not shaped or prior.quantiles.shape[1:] != (len(LEVELS), prior.time.size):
        raise ValueError(f"quantiles must be [layers, {len(LEVELS)}, times], got {prior.quantiles.shape}")
    ordered = (np.diff(prior.time) > 0).all() and (np.diff(prior.quantiles, axis=1) > 0).all()
    if not ordered or not np.isfinite(prior.quantiles).all():
        raise ValueError("times and quantiles must be finite and ascend")
    if not 0 <= trust <= 1:
        raise ValueError(f"trust must lie between 0 and 1, got {trust}")
    return prior, int(document["planned"]), float(document["span"])


def _as_expected(prior: Prior, mixture: Mixture, span: float) -> bool:
    """Whether the run's first ratios are what the architecture gives at that time: a trained model's are not."""
    time = mixture.clock.time(mixture.steps[:1]) / span
    first = interpolate(time, prior.time, prior.quantiles[:, MIDDLE])[:, 0]
    return bool(np.median(np.abs(np.log(mixture.values[:, 0]) - first)) < STRANGE)


def _finite(correction: Correction) -> bool:
    parts = (correction.ahead, correction.shift, correction.below, correction.above)
    return all(np.isfinite(part).all() for part in parts)


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0][:200]


def _saying(correction: Correction, words: str) -> Correction:
    return replace(correction, words=f"{correction.words}; {words}")
