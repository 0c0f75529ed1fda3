"""Asking the Hub: again while it is busy, and in the user's words where it does not answer."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from ma_monitor.errors import SourceError, redacted
from ma_monitor.replay.bounds import bound_answers

Result = TypeVar("Result")

ATTEMPTS = 5
FIRST_WAIT = 1.0
"""Seconds before the second attempt, doubled before each further one; a server's Retry-After goes before it."""
LONGEST_WAIT = 60.0
LISTED = 1000
"""Models that are looked through for one of a like name."""


def asked(question: Callable[[], Result], repo: str, revision: str | None = None, *, kind: str = "model") -> Result:
    """The Hub's answer, asked again while the server is busy or cannot be reached.

    Args:
        question: Asks the client.
        repo: Which repository it is about.
        revision: Which revision, where it is about one.
        kind: What the repository holds, in words.

    Raises:
        SourceError: If there is no answer, in the user's words.
    """
    bound_answers()
    wait, left = FIRST_WAIT, ATTEMPTS
    while True:
        try:
            return question()
        except SourceError:
            raise
        except Exception as error:  # the client lets its HTTP library's errors through, and changes the library
            left -= 1
            pause = _pause(error, wait) if left else None
            if pause is None:
                raise SourceError(_explained(error, repo, revision, kind)) from error
        time.sleep(pause)
        wait *= 2


def _pause(error: Exception, wait: float) -> float | None:
    """Seconds to wait before asking again, None where asking again cannot help."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, (OfflineModeIsEnabled, HFValidationError)):
            return None
        if isinstance(cause, HfHubHTTPError):
            if cause.response.status_code != 429 and cause.response.status_code < 500:
                return None
            return _told(cause.response.headers.get("Retry-After", ""), wait)
    return wait


def _told(after: str, wait: float) -> float:
    """Seconds that a Retry-After tells, as a number or as a date (RFC 9110), within reason; else the seconds given."""
    if after.isdecimal():
        return min(float(after), LONGEST_WAIT)
    try:
        until = parsedate_to_datetime(after).timestamp()
    except (ValueError, OverflowError):
        return wait
    return min(max(until - time.time(), 0.0), LONGEST_WAIT)


def _explained(error: Exception, repo: str, revision: str | None, kind: str) -> str:
    """What went wrong on the Hub, and what to do."""
    from huggingface_hub import errors

    for cause in _chain(error):
        # A gated repository's error is a subclass of the missing one's, so it must be asked for first.
        if isinstance(cause, errors.GatedRepoError):
            return f"{repo} is gated: accept its terms on its page, then log in with `hf auth login`"
        if isinstance(cause, errors.RepositoryNotFoundError):
            near = _like_it(repo) if kind == "model" else ""
            return (
                f"there is no folder and no public {kind} {repo!r}{near}: check the spelling, or log in if it is "
                "private"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repo} has no revision {revision}"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"{repo} cannot be read: offline mode is on; unset HF_HUB_OFFLINE, or give a folder"
    at = f" at {revision}" if revision else ""
    words = redacted(" ".join(str(error).split()))[:200]
    return (
        f"{repo}{at} cannot be read from the Hub ({type(error).__name__}: {words}); "
        "check network and disk and run the same command again"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from; the client wraps a status in an error of its cache."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest existing names as the end of a sentence."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


def _like_it(repo: str) -> str:
    """Models of nearly that name, the owner's before others', as the end of a sentence; nothing if there is no list."""
    from huggingface_hub import HfApi

    owner, _, name = repo.rpartition("/")
    try:
        own = HfApi().list_models(author=owner, limit=LISTED) if owner else ()
        near = nearest(name, [model.id.rpartition("/")[2] for model in own])
        return near or nearest(repo, [model.id for model in HfApi().list_models(search=name, limit=LISTED)])
    except Exception:  # this only helps to explain another fault
        return ""
