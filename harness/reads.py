"""What tells the observer of all that code of the user's reads: hooks in Python, from the start.

Audit events tell of files that are opened and folders that are listed. Where there is none, what is
called is wrapped: `os.stat`, `os.environ`, `safetensors.safe_open`, the finder of modules.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import linecache
import multiprocessing.process
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from harness.observation import OBSERVED, STANDARD, is_known, is_of_a_library, is_own, name_of, real
from harness.start import HERE, SOURCES_AT_START

# Audit events of other programs that are started, of folders, and all that are looked at.
PROGRAMS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec", "os.fork"}
LISTS = {"os.listdir", "os.scandir"}
WATCHED = frozenset({"open", "sqlite3.connect", *LISTS, *PROGRAMS})
METADATA = os.path.dirname(importlib.metadata.__file__)
COMPILERS = ("torch/_dynamo", "torch/_functorch", "torch/_inductor", "triton")
# Functions of os.path and pathlib that call os.stat and tell nothing of times.
WITHOUT_TIMES = {"exists", "isfile", "isdir", "getsize", "is_file", "is_dir"}


def own_caller(
    beneath: Callable[[str], bool] = lambda file: not is_known(file), thread: bool = False
) -> str | None:
    """The file of the innermost frame that is not beneath, where it is the user's.

    Args:
        beneath: whether to look on, from the name of a frame's file; all of libraries.
        thread: whether a thread that runs a library's code alone, such as a pool's, counts as what
            is being computed, which has sent it.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and beneath(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return str(OBSERVED.home) if thread and OBSERVED.kinds else None
    return frame.f_code.co_filename if is_own(frame.f_code.co_filename) else None


def serves(file: str) -> bool:
    """Whether a file is of a library that may read for the user; not of one being imported."""
    return not is_known(file) and not looks_for_code(file)


@functools.cache
def looks_for_code(file: str) -> bool:
    """Whether what a file opens is code, or tells of it: modules, their versions, their lines."""
    of_compiler = any(f"{os.sep}{part}{os.sep}" in file for part in COMPILERS)
    code = file.startswith(("<frozen importlib", METADATA)) or file == linecache.__file__
    return code or of_compiler


@functools.cache
def of_python(file: str) -> bool:
    """Whether a file is of Python's own library, and doesn't look for code."""
    standard = file.startswith(STANDARD + os.sep) and "-packages" not in file
    return (standard or file.startswith("<frozen ")) and not looks_for_code(file)


@functools.cache
def folders_of_others() -> tuple[str, ...]:
    """What lies below them is the system's, or a cache: data where the user's code itself reads."""
    caches = [os.environ.get(name) for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE")]
    caches += [str(Path.home() / ".cache")]
    return ("/etc/", "/usr/", sys.base_prefix, *filter(None, caches))


def note_path(sort: str, path: Any) -> None:
    """Notes that the user's code, or a library for it, reads a file or folder, if it is data."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(path))
    memory = path.startswith("/dev/") and not path.startswith("/dev/shm/")
    if memory or path.startswith(("/proc/", "/sys/")) or path.endswith((".pyc", ".so")):
        return
    others = path.startswith(folders_of_others()) or is_of_a_library(path + os.sep)
    if own_caller(of_python) if others else own_caller(serves, thread=sort == "file read"):
        OBSERVED.note(OBSERVED.read[sort], name_of(Path(path)))


def on_event(event: str, arguments: tuple) -> None:
    """sys.addaudithook: what the user's code opens to read, lists, and which programs it starts."""
    if event not in WATCHED or sys.is_finalizing():
        return
    if event == "sqlite3.connect":
        note_path("file read", arguments[0])
    elif event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else 0
        if not writes:
            note_path("file read", path)
    elif event in LISTS:
        note_path("folder listed", arguments[0] or ".")
    elif OBSERVED.kinds and own_caller(starts_programs):
        what = f"{arguments[0]!r:.60}" if arguments else "a copy of itself"
        OBSERVED.started.add(f"{OBSERVED.kinds[-1]} starts {what}")


def starts_programs(file: str) -> bool:
    """Whether a file is of Python's own that starts other programs."""
    return file.startswith("<frozen ") or file in (os.__file__, subprocess.__file__)


def note_processes() -> None:
    """Has processes noted that multiprocessing, joblib or torch start for the user's code."""
    start = multiprocessing.process.BaseProcess.start

    @functools.wraps(start)
    def started(process: Any) -> None:
        if OBSERVED.kinds and own_caller():
            OBSERVED.started.add(f"{OBSERVED.kinds[-1]} starts a process")
        start(process)

    multiprocessing.process.BaseProcess.start = started


def note_variables() -> None:
    """Has a look-up in os.environ by code of the user's, or a library for it, noted."""

    def noting(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def encoded(name: Any) -> Any:
            if own_caller(serves):
                OBSERVED.note(OBSERVED.read["variable read"], os.fsdecode(name))
            return encode(name)

        return encoded

    class Listed(dict):
        """What holds the variables; a loop over all of them tells which are not set."""

        def __iter__(self) -> Iterator[bytes]:
            if own_caller(serves):
                OBSERVED.note(OBSERVED.read["variables listed"], "")
            return super().__iter__()

    held = Listed(os.environ._data)
    for variables in (os.environ, os.environb):
        variables._data = held
        variables.encodekey = noting(variables.encodekey)


def note_status() -> None:
    """Has paths noted whose status the user's code asks for: no audit event tells of them."""

    def noting(asked: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(asked)
        def answered(path: Any, *given: Any, **more: Any) -> Any:
            with_time = asked is stat and asks_for_time(sys._getframe(1))
            note_path("time looked at" if with_time else "path looked at", path)
            return asked(path, *given, **more)

        return answered

    stat = os.stat
    for name in ("stat", "access"):
        asked = getattr(os, name)
        setattr(os, name, noting(asked))
        for functions in (os.supports_dir_fd, os.supports_fd, os.supports_effective_ids,
                          os.supports_follow_symlinks):  # fmt: skip
            if asked in functions:
                functions.add(getattr(os, name))


def asks_for_time(frame: types.FrameType) -> bool:
    """Whether what calls os.stat may look at times: not os.path.exists, Path.is_file, …"""
    if frame.f_code.co_filename == pathlib.__file__ and frame.f_code.co_name == "stat":
        frame = frame.f_back
    of_paths = frame.f_code.co_filename in ("<frozen genericpath>", pathlib.__file__)
    return not (of_paths and frame.f_code.co_name in WITHOUT_TIMES)


def note_safetensors() -> None:
    """Has files of safetensors noted, which Rust opens, so that no audit event tells of them."""
    safe_open = safetensors.safe_open

    def noted(filename: Any, *given: Any, **more: Any) -> Any:
        note_path("file read", filename)
        return safe_open(filename, *given, **more)

    for module in [*sys.modules.values()]:  # others may have imported it before
        if getattr(module, "__dict__", {}).get("safe_open") is safe_open:
            module.safe_open = noted


@functools.cache
def is_own_module(top: str, folders: tuple[str, ...]) -> bool:
    """Whether a module or package, by the first part of its name, is the user's."""
    spec = importlib.machinery.PathFinder.find_spec(top, [*folders])
    places = [spec.origin] if spec and spec.has_location else []
    if spec and spec.origin is None:  # without an __init__.py
        places = [os.path.join(place, "x.py") for place in spec.submodule_search_locations or ()]
    return any(is_own(place) for place in places)


class AsAtStart(importlib.machinery.SourceFileLoader):
    """Imports what `SOURCES_AT_START` has read, though the file be edited in the meantime.

    Imports take seconds; what ran would not be what keys and records say.
    """

    def get_code(self, fullname: str) -> types.CodeType | None:
        """The module's code: from its file, or the compiler's cache of it, where it is as read."""
        text = SOURCES_AT_START.get(Path(self.path).resolve())
        if text is None or text == Path(self.path).read_text(encoding="utf-8"):
            return super().get_code(fullname)
        return compile(text, self.path, "exec", dont_inherit=True)


class OwnModules(importlib.machinery.PathFinder):
    """Finds modules as ever; those of the project are loaded by `AsAtStart`.

    Notes what code of the user's imports: of importlib.import_module no audit event tells.
    """

    tops = {file.relative_to(HERE).parts[0].removesuffix(".py") for file in SOURCES_AT_START}

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """See importlib.abc.MetaPathFinder."""
        top, spec = name.split(".")[0], None
        if is_own_module(top, tuple(sys.path)) or top in cls.tops:
            spec = super().find_spec(name, path, target)
        own = spec and spec.has_location and is_own(spec.origin)
        if own and (file := own_caller()):
            OBSERVED.imports.setdefault(Path(file).resolve(), set()).add(name)
            OBSERVED.note(OBSERVED.modules, name_of(Path(real(spec.origin))))
        loader = getattr(spec, "loader", None)
        ours = type(loader) is importlib.machinery.SourceFileLoader
        if ours and Path(loader.path).resolve() in SOURCES_AT_START:
            spec.loader = AsAtStart(loader.name, loader.path)
            return spec
        return None  # the next finder's


sys.meta_path.insert(0, OwnModules)
sys.addaudithook(on_event)
note_status()
note_processes()
note_variables()
note_safetensors()
