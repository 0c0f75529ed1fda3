"""Runs whose pages are looked at, and a reader of HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ma_monitor.runs.records import Measurements, ModelShape, Plan, ProbeInfo, RunMeta
from ma_monitor.runs.store import Run

HOSTILE = (
    "</script></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;{{7*7}}"
    "\x1b[31m\u202eabc\u2066\0\ud800שלום"
)
LONG = HOSTILE + "x" * 10_240
SEQUENCES, RANKS, WIDTH = 4, 3, 32
STEPS = np.unique(np.concatenate([[0, 1, 2, 4, 8, 16, 32], np.arange(50, 1001, 50)]))


def ratios(layers: int, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ratios ``[L, T]`` that rise the more the deeper the layer, the first one with a peak."""
    t = steps / 100.0
    rise = 6 + 40 * np.arange(1, layers + 1)[:, None] * np.log1p(t)
    rise[0] = 6 + 60 * np.exp(-0.4 * t) * np.log1p(4 * t)
    return np.asarray(rise * (1 + 0.02 * np.random.default_rng(3).standard_normal(rise.shape)))


def make_page_run(
    path: Path,
    *,
    layers: int = 3,
    steps: NDArray[np.int64] = STEPS,
    total: int | None = 2000,
    values: NDArray[np.float64] | None = None,
    name: str = "made",
    **meta: Any,
) -> Run:
    """A run with places: the largest entry is in channel 5 of position 0 from step 100 on, anywhere before."""
    shape = ModelShape(name, "llama", layers, WIDTH, 2, 40, 1000)
    facts = RunMeta(shape, ProbeInfo("ab" * 32, SEQUENCES, 12, "token ids"), RANKS, 1, "ratio_of_means", "float32")
    lr = None if total is None else 1e-3 * (0.55 + 0.45 * np.cos(np.pi * np.arange(total + 1) / total))
    rng = np.random.default_rng(7)
    values = ratios(layers, steps) if values is None else values
    spread = np.linspace(0.9, 1.1, SEQUENCES)
    with Run.create(path, replace(facts, **meta), Plan(0, total, lr, 8, meta.get("schedule", "cosine"))) as run:
        for step, column in zip(steps.tolist(), values.T, strict=True):
            top = -column[:, None, None] * spread[None, :, None] * 0.5 ** np.arange(RANKS)
            place = rng.integers(0, 12, top.shape).astype(np.int32)
            place[..., 0] = 5 if step >= 100 else place[..., 0]
            at = np.zeros_like(place) if step >= 100 else place
            none = np.zeros((layers, SEQUENCES), dtype=np.int64)
            run.append(Measurements(step, top, at, place % 3, place, np.broadcast_to(spread, none.shape), none, none))
    return Run.open(path)


def hostile_run(path: Path, text: str) -> Run:
    """A run in which every text of other people is this one, its tokens' too."""
    surrogates = text.encode("utf-8", "replace").decode()  # what a JSON file can hold
    run = make_page_run(
        path,
        name=surrogates,
        probe=ProbeInfo(surrogates, SEQUENCES, 12, surrogates),
        precision=surrogates,
        versions={"torch": surrogates},
    )
    with Run.open(path, writable=True) as writer:
        writer.event("fault", surrogates)
        writer.event("alert", f"key {surrogates}")
        writer.event(surrogates, surrogates)
        writer.add_plan(Plan(1000, 2000, None, 8, surrogates))
    vocabulary = {surrogates + str(i): i for i in range(3)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": surrogates + "0"}
    keys = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    document: dict[str, Any] = {"version": "1.0", "added_tokens": [], **dict.fromkeys(keys), "model": model}
    (run.path / "tokenizer.json").write_text(json.dumps(document))
    return Run.open(path)


class Page(HTMLParser):
    """The elements of a page, its text, and what its scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open = tag if tag in ("script", "style") else ""
        if self._open:
            self.raw.append((dict(attrs).get("type") or tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            kind, before = self.raw[-1]
            self.raw[-1] = (kind, before + data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> list[dict[str, Any]]:
        return [json.loads(raw) for kind, raw in self.raw if kind == "application/json"]
