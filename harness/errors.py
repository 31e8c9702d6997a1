"""What a user can act on: the one exception whose message is the whole story, and last words."""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
TRY_TINYLM = "SAE_PROFILE=tinylm make run OUT=run_try works now"
LAST_WORDS = 1500  # characters of standard error that a driver shows of a run that failed
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
    return full or "No space left on device" in text_of(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text_of(error)
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
    text = text_of(error).strip()
    return redact(text.splitlines()[0] if text else type(error).__name__)[:300]


def text_of(error: BaseException) -> str:
    """str(error), whatever an edit's own exception makes of it; every encoding can write it."""
    try:
        text = str(error)
    except Exception as another:
        text = f"(its __str__ raised {type(another).__name__})"
    return text.encode(errors="backslashreplace").decode()


def redact(text: str) -> str:
    """The text on one line, without anything that looks like a token."""
    return re.sub(r"hf_\w{8,}|(?i:bearer)\s+\S+", "[token]", " ".join(text.split()))


def place_of(error: BaseException) -> str:
    """The line of experiment.py that an error passed last, and where it came from below that."""
    if isinstance(error, SyntaxError) and error.filename:  # no line of it has run
        return redact(f"{Path(error.filename).name}, line {error.lineno}: {error.text or ''}")[:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).name == "experiment.py"]
    if not frames:
        return ""
    frame = (ours or frames)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line}"
    if frames[-1] is not frame:
        deepest = frames[-1]
        place += f" -> {Path(deepest.filename).name}, line {deepest.lineno}, in {deepest.name}"
    return redact(place)[:300]


def last_words(stage: str, cause: str, **more: str) -> str:
    """What failed, why, what to do and where the log is: at most `LAST_WORDS` characters.

    Args:
        more: "at", "to_do" and "log", where there is something to say.
    """
    # Room for the labels, and for the line that make adds.
    room = LAST_WORDS - 200 - len(stage) - sum(map(len, more.values()))
    said = more | {"cause": shortened(cause, max(room, 100))}
    lines = [f"{what.replace('_', ' ')}: {said[what]}" for what in ("at", "cause", "to_do", "log")
             if said.get(what)]  # fmt: skip
    return "\n".join([f"experiment.py failed during {stage}", *lines])
