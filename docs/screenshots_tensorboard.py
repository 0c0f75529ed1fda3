"""Takes the picture of TensorBoard's custom-scalars page that docs/dashboards.md shows, of the packaged run.

    python docs/screenshots_tensorboard.py

Needs Chromium without a window (Debian: `apt-get install chromium-headless-shell`) and `pip install 'ma_monitor[all]'`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ma_monitor.cli.__main__ import main as command

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
SIZE = (1100, 800)
PATIENCE = 60.0
"""Seconds until the server answers."""
SETTLED = 20_000
"""Milliseconds of the page's own time until its charts are drawn."""


@contextmanager
def server(logdir: Path) -> Iterator[str]:
    """A TensorBoard server over event files; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*argv, "--host", "127.0.0.1"], cwd=logdir.parent, **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/data/plugin/custom_scalars/layout")
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str) -> None:
    """Waits until a page is served that is not empty.

    Raises:
        TimeoutError: If it is not within ``PATIENCE``.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if len(answer.read()) > 2:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} was not served within {PATIENCE:.0f} s")


def screenshot(url: str, file: Path, size: tuple[int, int] = SIZE) -> None:
    """A picture of a page as Chromium draws it.

    Raises:
        FileNotFoundError: If there is no Chromium.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"a picture of a page needs one of {', '.join(BROWSERS)}; install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    options += [f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={SETTLED}", f"--screenshot={file}"]
    subprocess.run([browser, *options, url], check=True, capture_output=True, timeout=180)


def custom_scalars(file: Path) -> None:
    """The custom-scalars page of the packaged run, in few colours so that the picture stays small."""
    with tempfile.TemporaryDirectory() as folder:
        command(["demo", "--out", f"{folder}/run"])
        command(["log", f"{folder}/run", "--to", "tensorboard", "--dir", f"{folder}/events/run"])
        with server(Path(folder, "events")) as address:
            screenshot(f"{address}/#custom_scalars", Path(folder, "page.png"))
        with Image.open(Path(folder, "page.png")) as page:
            file.parent.mkdir(exist_ok=True)
            page.convert("RGB").quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    custom_scalars(IMAGES / "tensorboard.png")
