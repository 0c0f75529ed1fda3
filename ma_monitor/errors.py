"""The exceptions of ma_monitor.

    MaMonitorError
    ├── ConfigError         an argument, a probe or a schedule breaks a rule (also a ValueError)
    ├── ModelError          a model has no residual stream that can be measured
    ├── StoreError          a run directory cannot be read, written or continued
    ├── SourceError         a checkpoint or published data cannot be found or read
    └── MissingExtraError   an optional package is not installed (also an ImportError)

Every message says the rule, what came, and what to do.
"""

from __future__ import annotations

import re

_SECRETS = (
    re.compile(r"(:/+)[^/\s'\"]+(?=@)"),  # user and password; taken for a path, a URL has one slash
    re.compile(r"(:/+[^\s'\"?]*\?)[^\s'\"<>)]+"),  # what is asked, which may be signed
    re.compile(r"\b(hf_)\w{8,}"),
)


class MaMonitorError(Exception):
    """Base of every exception that ma_monitor raises on purpose."""


class ConfigError(MaMonitorError, ValueError):
    """An argument, a probe or a schedule breaks a rule."""


class ModelError(MaMonitorError):
    """A model has no residual stream that can be measured."""


class StoreError(MaMonitorError):
    """A run directory cannot be read, written or continued."""


class SourceError(MaMonitorError):
    """A checkpoint or published data cannot be found or read."""


def redacted(text: str) -> str:
    """Text of an error as it may be shown and kept: without the secrets in URLs, and without tokens of the Hub."""
    for secret in _SECRETS:
        text = secret.sub(r"\1…", text)
    return text


def is_fault(error: BaseException) -> bool:
    """Whether an error is one, and no wish to stop; what a library in Rust raises when it panics is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class MissingExtraError(MaMonitorError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Names the package that is missing and the extra that brings it."""
        super().__init__(f"{package} is not installed; run: pip install 'ma_monitor[{extra}]'")
