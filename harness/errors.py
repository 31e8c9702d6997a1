"""What a user can act on: the one exception whose message is the whole story, and texts for it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
TRY_TINYLM = "SAE_PROFILE=tinylm make run OUT=run_try works now"
GET_ACCESS = f"accept its licence on its Hugging Face page and {LOG_IN}; {TRY_TINYLM}"


class ExperimentError(Exception):
    """A failure whose message is the whole story: what was expected, what was found, what to do."""


@contextlib.contextmanager
def error_context(what: str) -> Iterator[None]:
    """Has an error that comes from within say where: a layer, a seed, a data set."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and its end."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} … {text[-(length // 2 - 3) :]}"


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def is_connection_error(error: BaseException) -> bool:
    """Whether the network is behind it: worth another try."""
    seen: BaseException | None = error
    while seen is not None:
        library = type(seen).__module__.split(".")[0]
        if isinstance(seen, (ConnectionError, TimeoutError)) or library in NETWORK_LIBRARIES:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name; without anything that looks like a token."""
    text = str(error).strip()
    return redact(text.splitlines()[0] if text else type(error).__name__)[:300]


def redact(text: str) -> str:
    """The text on one line, without anything that looks like a token."""
    return re.sub(r"hf_\w{8,}|(?i:bearer)\s+\S+", "[token]", " ".join(text.split()))
