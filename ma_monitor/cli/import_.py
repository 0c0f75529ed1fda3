"""``ma-monitor import``: published measurements as runs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ma_monitor.cli.common import RATIOS, Commands, add_command, add_ratio, emit_json, note, say
from ma_monitor.errors import ConfigError, SourceError
from ma_monitor.report.words import count


def add(commands: Commands) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "import",
        run,
        help="make runs of published measurements",
        text=(
            "Reads the published data's layout (pythia_<size>/stats/exp2_<model>_step<N>, one model or a folder of\n"
            "several) or an .npz with `steps`, `stats` and optionally `lr`. Several models give RUN/<model> each.\n"
            "--hub downloads such a folder first: the paper's is Aimpoint-Digital/pythia-massive-activations.\n"
            "What is malformed is named on stderr and left out; the exit code is 0 if anything was read."
        ),
        example="ma-monitor import published/pythia_14m --out runs/pythia-14m",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="folder or .npz file")
    parser.add_argument("--hub", metavar="REPO", help="data set on the Hub to download in place of PATH")
    parser.add_argument("--revision", metavar="NAME", help="of the data set: branch, tag or commit (default: main)")
    parser.add_argument("--out", required=True, metavar="RUN", help="directory of the new run")
    add_ratio(parser, default=RATIOS[0])


def run(args: argparse.Namespace) -> int:
    """Does it."""
    from ma_monitor.runs.published import import_run

    if (args.path is None) == (args.hub is None):
        raise ConfigError("measurements come from PATH or from --hub REPO; give one of them")
    if args.hub is None:
        if args.revision is not None:
            raise ConfigError("--revision is of a data set on the Hub; give it with --hub")
        imported = import_run(args.path, args.out, ratio=args.ratio)
    else:
        with from_hub(args.hub, args.revision) as (folder, source):
            imported = import_run(folder, args.out, ratio=args.ratio, source=source)
    for model in imported:
        for problem in model.problems:
            note(f"ma-monitor: {model.name}: left out: {problem}")
    if args.json:
        runs = [
            {
                "name": model.name,
                "run": None if model.path is None else str(model.path),
                "steps": model.steps,
                "problems": list(model.problems),
            }
            for model in imported
        ]
        emit_json({"runs": runs})
        return 0
    for model in imported:
        left_out = f", {len(model.problems)} left out" if model.problems else ""
        say(f"{model.path or 'no run'}: {model.name}, {count(model.steps, 'step')}{left_out}")
    return 0


@contextmanager
def from_hub(repo: str, revision: str | None) -> Iterator[tuple[Path, str]]:
    """Downloads the measurements of a data set on the Hub for as long as they are read.

    Args:
        repo: Id of the data set.
        revision: Branch, tag or commit; None for ``main``.

    Yields:
        The folder to import, and where it is from: repository and commit.

    Raises:
        SourceError: If the data set cannot be downloaded or holds no measurements.
    """
    from huggingface_hub import HfApi, snapshot_download
    from tqdm.auto import tqdm

    from ma_monitor.replay.asking import asked
    from ma_monitor.runs.published import published_files

    class OnTerminals(tqdm):  # type: ignore[type-arg]  # not generic at run time
        """The client draws its bars into files too."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": None})

    def fetch(folder: Path) -> tuple[Path, str]:
        info = HfApi().dataset_info(repo, revision=revision)
        root, files = published_files(sibling.rfilename for sibling in info.siblings or ())
        if not files:
            raise SourceError(f"{repo} holds no exp2_<model>_step<N> files at {revision or 'main'}; check both")
        # The commit instead of the branch: one state for all files.
        snapshot_download(
            repo,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            allow_patterns=files,
            tqdm_class=OnTerminals,
        )
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:  # a client that loses the network may lend what it has
            raise OSError(f"the download ended without {', '.join(absent[:3])}")
        return folder / root, f"{repo} at {info.sha}"

    with tempfile.TemporaryDirectory(prefix="ma_monitor-") as scratch:
        folder = Path(scratch, repo.rpartition("/")[2])
        yield asked(lambda: fetch(folder), repo, revision, kind="data set")
