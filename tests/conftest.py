"""What all tests share: the shared data, fixed seeds, and Hypothesis without a clock."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SEED = 20240607

# Two test processes and their children share two cores; threads that wait for one another there cost several times what
# they gain. Read by OpenMP when it is loaded, so before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ma_monitor", deadline=None, derandomize=True)
# to test mutants with, many times in one process
again = [HealthCheck.differing_executors]
settings.register_profile("few", settings.get_profile("ma_monitor"), max_examples=8, suppress_health_check=again)
settings.load_profile("ma_monitor")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data: ``$MA_MONITOR_SHARED/data``, else ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    data = Path(os.environ.get("MA_MONITOR_SHARED", beside)) / "data"
    if not data.is_dir():
        pytest.skip(f"no shared data at {data}; set MA_MONITOR_SHARED to the folder that holds `data`")
    return data


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same state of Python's and numpy's global generators (torch's: where it is used)."""
    random.seed(SEED)
    np.random.seed(SEED)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in every run of a test."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium (``$CHROMIUM``, or ``chromium`` on the path) that asks nobody for anything on its own account."""
    from playwright.sync_api import sync_playwright

    quiet = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
    with sync_playwright() as playwright:
        where = os.environ.get("CHROMIUM") or shutil.which("chromium")
        chromium = playwright.chromium.launch(executable_path=where, args=list(quiet))
        yield chromium
        chromium.close()
