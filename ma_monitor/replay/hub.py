"""Checkpoints that are revisions of a model on the Hub."""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ma_monitor.errors import SourceError
from ma_monitor.replay.asking import asked, nearest
from ma_monitor.replay.sources import TOKENIZER_FILES, Checkpoint, Source, complete_ones, one_per_step, step_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SAFE_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
PICKLED_WEIGHTS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
RECORD = re.compile(r"config\.json|trainer_state\.json|ma_monitor/\w[\w.-]*")

PAPER_STEPS = (0, *(2**i for i in range(10)), *(1000 * round(1 + 142 * i / 25) for i in range(26)))
PAPER_REVISIONS = tuple(f"step{step}" for step in PAPER_STEPS)
"""37 of Pythia's 154 revisions. The paper plots 37 checkpoints of a model (Figure 4) and fits 27 or more "regularly
spaced" ones, without printing which. Here: the released early steps 0, 1, 2, 4 … 512, where most happens, and 26 even
steps from 1000 to 143000, rounded to the released thousands."""


@dataclass(frozen=True)
class HubSource:
    """Revisions of a model on the Hub, each on disk only while it is lent, unless ``keep`` says where they stay."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    problems: tuple[str, ...]
    revisions: tuple[str, ...]
    keep: Path | None = None

    def size(self, checkpoint: Checkpoint) -> int:
        """Bytes of a revision's weights, as the Hub lists them.

        Raises:
            SourceError: If the revision cannot be reached, has no weights, or the Hub does not tell.
        """
        revision = checkpoint.name
        _, files = asked(lambda: self._files(revision, _model_files), self.name, revision, self.revisions)
        sizes = [file.size for file in files if file.rfilename != "config.json"]
        if None in sizes:
            raise SourceError(f"the Hub does not tell the size of {self.name} at {revision}")
        return sum(size or 0 for size in sizes)

    def open(self, checkpoint: Checkpoint, scratch: Path) -> AbstractContextManager[Path]:
        """Downloads the configuration and weights of one revision: safetensors, `.bin` only where there are none.

        Raises:
            SourceError: If the revision cannot be downloaded or holds no weights.
        """
        return self._download(checkpoint.name, scratch, _model_files, self.keep)

    def open_tokenizer(self, scratch: Path) -> AbstractContextManager[Path]:
        """Downloads the tokenizer of the last revision.

        Raises:
            SourceError: If it cannot be downloaded or there is none.
        """
        return self._download(self.checkpoints[-1].name, scratch, _tokenizer_files)

    def open_record(self, scratch: Path) -> AbstractContextManager[Path]:
        """Downloads what the last revision tells of itself.

        Raises:
            SourceError: If it cannot be downloaded or has no configuration.
        """
        return self._download(self.checkpoints[-1].name, scratch, _record_files)

    def _files(self, revision: str, choose: Callable[[list[str]], list[str]]) -> tuple[str, list[RepoSibling]]:
        """A revision's commit, and the files of it that are wanted."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.name, revision=revision, files_metadata=True)
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = choose(list(listed))
        if not names:
            raise SourceError(f"{self.name} holds no configuration, weights or tokenizer to use at {revision}")
        return str(info.sha), [listed[name] for name in names]

    @contextmanager
    def _download(
        self, revision: str, scratch: Path, choose: Callable[[list[str]], list[str]], keep: Path | None = None
    ) -> Iterator[Path]:
        from huggingface_hub import snapshot_download

        def fetch(folder: Path) -> Path:
            # The commit instead of the branch: one state for all files, and no reference left in the user's cache.
            commit, files = self._files(revision, choose)
            for _ in range(2):
                snapshot_download(
                    self.name, revision=commit, local_dir=folder, allow_patterns=[file.rfilename for file in files]
                )
                absent = [file.rfilename for file in files if not (folder / file.rfilename).is_file()]
                if absent:  # a client that loses the network may lend what it has
                    raise OSError(f"the download ended without {', '.join(absent)}")
                corrupt = [file.rfilename for file in files if not _intact(folder / file.rfilename, file)]
                if not corrupt:
                    return folder
                for file_name in corrupt:
                    (folder / file_name).unlink()
            raise SourceError(f"{', '.join(corrupt)} came twice with another size or SHA-256 than the Hub lists")

        name = revision.replace("/", "-")
        with ExitStack() as place:
            try:
                if keep is None:
                    scratch.mkdir(parents=True, exist_ok=True)
                    folder = Path(place.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=f"{name}-")))
                else:
                    folder = keep / name
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SourceError(f"nothing can be downloaded into {keep or scratch} ({error.strerror})") from error
            yield asked(lambda: fetch(folder), self.name, revision, self.revisions)


def hub_source(repo: str, revisions: str, *, keep: Path | None = None) -> Source:
    """The revisions of a model on the Hub; of its copy in the Hub's cache where offline mode is on.

    Args:
        repo: Hub id.
        revisions: ``all`` (every ``step<N>`` branch), ``paper`` (`PAPER_REVISIONS`), ``log`` (step 0, the last, and
            the nearest to each power of two), names with commas between, or a file that holds a name a line.
        keep: Where downloads stay; None deletes each after use.

    Raises:
        SourceError: If the model cannot be reached, is gated or unknown, or has none of the revisions.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached_source(repo, revisions)
    refs = asked(lambda: HfApi().list_repo_refs(repo), repo, None, ())
    asked(lambda: HfApi().auth_check(repo), repo, None, ())  # else a gated model would be refused at each revision
    branches = tuple(ref.name for ref in refs.branches)
    known = (*branches, *(ref.name for ref in refs.tags))
    problems: list[str] = []
    checkpoints = _chosen(repo, revisions, branches, known, problems)
    return HubSource(repo, checkpoints, tuple(problems), known, keep)


def _cached_source(repo: str, revisions: str) -> Source:
    """The revisions of a model that the Hub's cache on this machine holds under their names."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        found = frozenset()
    repos = [cached for cached in found if (cached.repo_type, cached.repo_id) == ("model", repo)]
    folders = {ref: state.snapshot_path for cached in repos for state in cached.revisions for ref in state.refs}
    if not folders:
        raise SourceError(
            f"{repo} cannot be read: offline mode is on, and the Hub's cache holds none of its revisions; unset "
            "HF_HUB_OFFLINE, or give a folder of step<N> folders that you downloaded before"
        )
    problems: list[str] = []
    checkpoints = _chosen(repo, revisions, tuple(folders), tuple(folders), problems)
    source = complete_ones(repo, {checkpoint: folders[checkpoint.name] for checkpoint in checkpoints}, problems)
    if not source.checkpoints:
        raise SourceError(f"the Hub's cache holds no whole revision of {repo}: {'; '.join(source.problems)}")
    return source


def _chosen(
    repo: str, revisions: str, branches: Sequence[str], known: Sequence[str], problems: list[str]
) -> tuple[Checkpoint, ...]:
    """The revisions that a user means, in step order; what is wrong with the others goes to the problems.

    Raises:
        SourceError: If none is left.
    """
    if revisions in ("all", "log"):
        telling = [name for name in branches if step_of(name) is not None]
        names = [name for name in telling if name.startswith("step")] or telling
        if not names:
            raise SourceError(
                f"`{revisions}` means step<N> branches, and {repo} has none among {', '.join(known) or 'none'}"
            )
    else:
        names = [name for name in _asked_for(revisions) if _usable(name, known, problems)]
    checkpoints = one_per_step([Checkpoint(step_of(name) or 0, name) for name in names], problems)
    if not checkpoints:
        details = "; ".join(problems) or f"got {revisions!r}"
        raise SourceError(
            f"revisions must be `all`, `log`, `paper` or names such as step0,step1000 that {repo} has: {details}"
        )
    return _spread(checkpoints) if revisions == "log" else checkpoints


def _asked_for(revisions: str) -> Sequence[str]:
    """The names that a user wrote, or a file of them holds."""
    if revisions == "paper":
        return PAPER_REVISIONS
    if "," not in revisions and Path(revisions).is_file():
        revisions = Path(revisions).read_text(encoding="utf-8", errors="replace").replace("\n", ",")
    return tuple(filter(None, map(str.strip, revisions.split(","))))


def _spread(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Those nearest to the powers of two, step 0 and the last."""
    kept = {checkpoints[-1], *(checkpoint for checkpoint in checkpoints[:1] if checkpoint.step == 0)}
    later = [checkpoint for checkpoint in checkpoints if checkpoint.step > 0]
    for power in range(checkpoints[-1].step.bit_length()):
        kept.add(min(later, key=lambda checkpoint: abs(math.log2(checkpoint.step) - power)))
    return tuple(sorted(kept))


def _usable(name: str, known: Sequence[str], problems: list[str]) -> bool:
    """Whether a revision that was asked for exists and tells its step; if not, why is added to the problems."""
    if name not in known:
        problems.append(f"{name} left out: no such revision{nearest(name, known)}")
    elif step_of(name) is None:
        problems.append(f"{name} left out: its name does not tell a step, as step1000 does")
    else:
        return True
    return False


def _intact(file: Path, listed: RepoSibling) -> bool:
    """Whether a file has the size and, where it is a large one, the SHA-256 that the Hub lists."""
    if listed.size is not None and file.stat().st_size != listed.size:
        return False
    if listed.lfs is None:
        return True
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**20):
            digest.update(block)
    return digest.hexdigest() == listed.lfs.sha256


def _model_files(names: list[str]) -> list[str]:
    """What of a revision is needed to measure it; empty if configuration or weights are not there."""
    weights = [name for name in names if SAFE_WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in names if PICKLED_WEIGHTS.fullmatch(name)]
    return ["config.json", *weights] if weights and "config.json" in names else []


def _record_files(names: list[str]) -> list[str]:
    """Configuration, Trainer's state and the copy of a run."""
    return [name for name in names if RECORD.fullmatch(name)]


def _tokenizer_files(names: list[str]) -> list[str]:
    """The tokenizer's files and the configuration that names its class; empty if there is no tokenizer."""
    found = [name for name in names if "/" not in name and TOKENIZER_FILES.fullmatch(name)]
    return [*found, *(name for name in names if name == "config.json")] if found else []
