"""The tests of measuring, training, resuming and phenomena under other versions of Python, torch, transformers, numpy.

    python -m benchmarks.compatibility [NAME …] [--keep FOLDER]

Makes a virtual environment for each combination (several GB where torch comes with CUDA), installs the package into it
and runs ``TESTS`` there; the result goes to ``results/compatibility.json``. Needs the Pythons on the path as
``python3.10`` and so on; one that is missing is said and left out. Tests of optional packages (PEFT, TRL, the packaged
encoder) are left out, because those ask for later versions themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compatibility.json"
PACKAGES = (
    "accelerate huggingface_hub safetensors scipy pillow tqdm rich tensorboard wandb wandb-workspaces xgboost "
    "scikit-learn pandas pyarrow matplotlib jinja2 shtab datasets pytest pytest-xdist hypothesis mpmath"
).split()
TESTS = (
    "tests/test_public_api.py tests/test_callback.py tests/test_neutrality.py tests/test_monitor.py "
    "tests/measure/test_layers_and_forward.py tests/test_resume.py tests/phenomena tests/test_schedule.py"
).split()
LEFT_OUT = [
    "tests/phenomena/test_encoder.py",
    "tests/phenomena/test_super_weights.py::test_lora_leaves_the_weight_where_it_was",
]
SHOWN = ("torch", "transformers", "numpy", "scipy", "accelerate", "huggingface_hub", "safetensors")


class Combination(NamedTuple):
    """Versions that are installed together; what is not named is pip's choice."""

    python: str
    torch: str
    transformers: str
    numpy: str


COMBINATIONS = {
    "oldest": Combination("3.10", "2.6.0", "4.57.6", "1.26.4"),
    "transformers-4": Combination("3.11", "2.13.0", "4.57.6", "2.*"),
    "newest-python": Combination("3.13", "2.13.0", "5.23.0", "2.*"),
}


def tried(name: str, folder: Path) -> dict[str, object]:
    """What came of a combination: versions, pytest's summary, and the tests that failed."""
    wanted, environment = COMBINATIONS[name], folder / name
    interpreter = shutil.which(f"python{wanted.python}")
    if interpreter is None:
        return {"left out": f"no python{wanted.python} here"}
    python = environment / "bin" / "python"
    variables = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")}

    def run(*command: str) -> str:
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
        return done.stdout + done.stderr

    if not python.exists():
        run(interpreter, "-m", "venv", str(environment))
        pinned = [f"torch=={wanted.torch}", f"transformers=={wanted.transformers}", f"numpy=={wanted.numpy}"]
        run(str(python), "-m", "pip", "install", *pinned, *PACKAGES)
    run(str(python), "-m", "pip", "install", "--no-deps", "-e", ".")
    listed = json.loads(run(str(python), "-m", "pip", "list", "--format=json").splitlines()[0])
    versions = {row["name"]: row["version"] for row in listed if row["name"] in SHOWN}
    skipped = [f"--deselect={test}" for test in LEFT_OUT]
    lines = run(str(python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *skipped, *TESTS).splitlines()
    failing = sorted({match[1] for line in lines if (match := re.match(r"(?:FAILED|ERROR) (\S+)", line))})
    return {"python": wanted.python, "versions": versions, "summary": lines[-1].strip("= "), "failing": failing}


def main() -> None:
    """Tries the combinations and writes what came of them beside earlier results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMBINATIONS))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where environments are made and found again")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names or COMBINATIONS:
            found[name] = tried(name, options.keep or Path(scratch))
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
            print(name, json.dumps(found[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
