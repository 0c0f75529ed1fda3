"""Checkpoints that are revisions of a model on the Hub."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.errors import SourceError
from ma_monitor.replay.asking import asked, nearest
from ma_monitor.replay.bounds import counter
from ma_monitor.replay.sources import TOKENIZER_FILES, Checkpoint, Part, Source, complete_ones, one_per_step, step_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

FILES: dict[Part, tuple[re.Pattern[str], ...]] = {
    "model": (
        re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
        re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
    ),
    "record": (re.compile(r"config\.json|trainer_state\.json|ma_monitor/\w[\w.-]*"),),
    "tokenizer": (TOKENIZER_FILES,),
}
"""What a part consists of besides ``config.json``: the files of the first pattern that any file has."""

PAPER_STEPS = (0, *(2**i for i in range(10)), *(1000 * round(1 + 142 * i / 25) for i in range(26)))
PAPER_REVISIONS = tuple(f"step{step}" for step in PAPER_STEPS)
"""37 of Pythia's 154 revisions. The paper plots 37 checkpoints of a model (Figure 4) and fits 27 or more "regularly
spaced" ones, without printing which. Here: the released early steps 0, 1, 2, 4 … 512, where most happens, and 26 even
steps from 1000 to 143000, rounded to the released thousands."""


@dataclass(frozen=True)
class HubSource:
    """Revisions of a model on the Hub; with ``keep`` they are downloaded into that folder."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    problems: tuple[str, ...]
    keep: Path | None = None

    def size(self, checkpoint: Checkpoint) -> int:
        """Bytes of a revision's weights, as the Hub lists them.

        Raises:
            SourceError: If the revision cannot be reached or has no weights.
        """
        _, files = asked(lambda: self._files(checkpoint, "model"), self.name, checkpoint.name)
        return sum(file.size or 0 for file in files if file.rfilename != "config.json")

    def fetch(self, checkpoint: Checkpoint, into: Path, part: Part = "model") -> Path:
        """Downloads a part of one revision: safetensors, `.bin` only where there are none.

        Raises:
            SourceError: If it cannot be downloaded, or not as the Hub lists it, or is not there.
        """
        from huggingface_hub import snapshot_download

        folder = self.keep / checkpoint.name.replace("/", "-") if self.keep and part == "model" else into

        def download() -> Path:
            commit, files = self._files(checkpoint, part)
            names = [file.rfilename for file in files]
            # The commit instead of the branch: one state for all files, and no reference left in the user's cache.
            snapshot_download(
                self.name,
                revision=commit,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=counter(sum(file.size or 0 for file in files)),
            )
            # A client that loses the network may give what it has, and it compares no checksums.
            broken = [file.rfilename for file in files if not _intact(folder / file.rfilename, file)]
            for broken_name in broken:
                (folder / broken_name).unlink(missing_ok=True)
            if broken:
                raise OSError(f"{', '.join(broken)} came with another size or SHA-256 than the Hub lists")
            return folder

        return asked(download, self.name, checkpoint.name)

    def _files(self, checkpoint: Checkpoint, part: Part) -> tuple[str | None, list[RepoSibling]]:
        """A revision's commit, and the files of a part.

        Raises:
            SourceError: If the configuration, or what the part is about, is not there.
        """
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.name, revision=checkpoint.name, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings or ()}
        for pattern in FILES[part] if "config.json" in listed else ():
            if names := [name for name in listed if pattern.fullmatch(name)]:
                return info.sha, [listed[name] for name in dict.fromkeys(["config.json", *names])]
        raise SourceError(f"{self.name} holds no configuration, weights or tokenizer to use")


def hub_source(repo: str, revisions: str, *, keep: Path | None = None) -> Source:
    """The revisions of a model on the Hub; of its copy in the Hub's cache where offline mode is on.

    Args:
        repo: Hub id.
        revisions: ``all`` (every one whose name tells a step), ``paper`` (`PAPER_REVISIONS`), ``log`` (step 0, the
            last, and the nearest to each power of two), or names with commas between.
        keep: Where downloads stay; None deletes each after use.

    Raises:
        SourceError: If the model cannot be reached, is gated or unknown, or has none of the revisions.
    """
    from huggingface_hub import HfApi, constants

    problems: list[str] = []
    if constants.HF_HUB_OFFLINE:
        folders = _cached(repo)
        checkpoints = _chosen(repo, revisions, tuple(folders), problems)
        return complete_ones(repo, {checkpoint: folders[checkpoint.name] for checkpoint in checkpoints}, problems)
    refs = asked(lambda: HfApi().list_repo_refs(repo), repo)
    asked(lambda: HfApi().auth_check(repo), repo)  # else a gated model would be refused at each revision
    known = tuple(ref.name for ref in (*refs.branches, *refs.tags))
    return HubSource(repo, _chosen(repo, revisions, known, problems), tuple(problems), keep)


def _cached(repo: str) -> dict[str, Path]:
    """The revisions of a model that the Hub's cache on this machine holds under their names, and their folders.

    Raises:
        SourceError: If there is none.
    """
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = [r for r in scan_cache_dir(constants.HF_HUB_CACHE).repos if (r.repo_type, r.repo_id) == ("model", repo)]
    except CacheNotFound:
        repos = []
    folders = {ref: state.snapshot_path for cached in repos for state in cached.revisions for ref in state.refs}
    if not folders:
        raise SourceError(
            f"{repo} cannot be read: offline mode is on, and the Hub's cache holds none of its revisions; unset "
            "HF_HUB_OFFLINE, or give a folder of step<N> folders that you downloaded before"
        )
    return folders


def _chosen(repo: str, revisions: str, known: Sequence[str], problems: list[str]) -> tuple[Checkpoint, ...]:
    """The revisions that a user means, in step order; what is wrong with the others goes to the problems.

    Raises:
        SourceError: If none is left.
    """
    if revisions in ("all", "log"):
        names = [name for name in known if step_of(name) is not None]
    else:
        names = [*PAPER_REVISIONS] if revisions == "paper" else revisions.replace(",", " ").split()
    found = []
    for name in names:
        step = step_of(name)
        if name not in known:
            problems.append(f"{name} left out: no such revision{nearest(name, known)}")
        elif step is None:
            problems.append(f"{name} left out: its name does not tell a step, as step1000 does")
        else:
            found.append(Checkpoint(step, name))
    checkpoints = one_per_step(found, problems)
    if not checkpoints:
        raise SourceError(
            f"revisions must be `all`, `log`, `paper` or names such as step0,step1000, and {repo} has none of "
            f"{revisions!r} among {', '.join(known[:5])}{''.join(f'; {problem}' for problem in problems[:3])}"
        )
    return _spread(checkpoints) if revisions == "log" else checkpoints


def _spread(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Those nearest to the powers of two, step 0 and the last."""
    kept = {checkpoints[-1], *(checkpoint for checkpoint in checkpoints[:1] if checkpoint.step == 0)}
    later = [checkpoint for checkpoint in checkpoints if checkpoint.step > 0]
    for power in range(checkpoints[-1].step.bit_length()):
        kept.add(min(later, key=lambda checkpoint: abs(math.log2(checkpoint.step) - power)))
    return tuple(sorted(kept))


def _intact(file: Path, listed: RepoSibling) -> bool:
    """Whether a file is there with the size and, where it is a large one, the SHA-256 that the Hub lists."""
    from huggingface_hub.utils.sha import sha_fileobj

    if not file.is_file() or listed.size not in (None, file.stat().st_size):
        return False
    with file.open("rb") as data:
        return listed.lfs is None or sha_fileobj(data).hex() == listed.lfs.sha256
