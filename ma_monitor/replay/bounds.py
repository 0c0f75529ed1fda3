"""What the Hub's client reads is bounded: the server may be anybody, its answers may not end, or lead elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from ma_monitor.errors import SourceError

ANSWER_LIMIT = 2**26
"""Bytes of an answer that the client reads into memory."""
SPARE = 2**20
"""Bytes that a download may take beyond twice what is listed: parts may have to be sent again."""


def bound_answers() -> None:
    """Has the client of this process end answers that are too long, and follow the Hub's API to no other host."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _bound not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _bound]}


def counter(listed: int) -> type[Any]:
    """A bar that nobody sees and that ends a download of more bytes than are listed."""

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.bytes = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.bytes += int(n or 0)
            if self.bytes > 2 * listed + SPARE:
                raise SourceError(f"the Hub sends more than the {listed} bytes that it lists; the download was ended")
            return super().update(n)

    return Counter


def _bound(response: Any) -> None:
    """Looks at an answer before the client reads its body; downloads are streamed to the disk and counted there."""
    from huggingface_hub import constants

    hub, url = urlsplit(constants.ENDPOINT), response.request.url
    ours = (url.host, url.port) == (hub.hostname, hub.port)
    if ours and response.has_redirect_location and "/resolve/" not in url.path:
        to = urlsplit(str(url.join(response.headers["Location"])))
        if to.netloc != urlsplit(str(url)).netloc:
            raise SourceError(f"the Hub's API sends us to another host, {to.hostname}, where nothing is asked")
    if response.is_success and (not ours or "/resolve/" in url.path):
        return
    stream = sys.modules[type(response).__module__.partition(".")[0]].SyncByteStream
    whole = response.stream

    class Bounded(stream):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in whole:
                size += len(chunk)
                if size > ANSWER_LIMIT:
                    raise SourceError(f"the Hub's answer has more than {ANSWER_LIMIT} bytes and may never end")
                yield chunk

        def close(self) -> None:
            whole.close()

    response.stream = Bounded()
