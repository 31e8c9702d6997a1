"""What a run's own code does, seen while it does it: what it calls, reads, opens and imports.

A list of what matters is never whole. So the rehearsal is watched, which runs everything in
miniature: by kind of result (`Observer.computing`), which functions of experiment.py and of a
user's modules ran, and which settings were read; and from the first import on, which environment
variables and which files such code read itself. Keys of the store are made of it (`fingerprint`).
"""

from __future__ import annotations

import _collections_abc
import contextlib
import functools
import hashlib
import importlib.machinery
import os
import subprocess
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from harness.start import HERE, SOURCES_AT_START

PACKAGE = __name__.split(".")[0]
ANY = ""  # the kind of what is read outside of all kinds: it counts for each of them
LARGE = 2**30  # bytes; of a larger file size and time stand for what it holds
# Audit events of other programs that are started, and all that are looked at.
PROGRAMS = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.spawn", "os.exec"}
WATCHED = frozenset({"open", *PROGRAMS})


STANDARD = os.path.realpath(sysconfig.get_path("stdlib"))
real_folder = functools.cache(os.path.realpath)  # a start looks at thousands of files


def real(file: str) -> str:
    """A file's path without links on its way."""
    if os.path.islink(file):
        return os.path.realpath(file)
    return os.path.join(real_folder(os.path.dirname(os.path.abspath(file))), os.path.basename(file))


def is_of_a_library(file: Path | str) -> bool:
    """Whether a file, without links, came with Python or a package, whose version is in keys."""
    file = str(file)
    of_package = f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}"
    return any(folder in file for folder in of_package) or file.startswith(STANDARD + os.sep)


@functools.cache
def is_own(file: str) -> bool:
    """Whether code of a file is the user's: experiment.py, or a module that is no library's."""
    if file.startswith("<"):
        return False
    path, ours = real(file), (PACKAGE, "tinylm", "smollm2", "tests", "bench")
    of_ours = tuple(str(HERE / folder) + os.sep for folder in ours)
    return not path.startswith(of_ours) and not is_of_a_library(path)


@functools.cache
def is_known(file: str) -> bool:
    """Whether code of a file is the user's or the harness's."""
    return not file.startswith("<") and not is_of_a_library(real(file))


def name_of(file: Path) -> str:
    """A file's name in keys and records: below the project's folder, or its whole path."""
    return str(file.relative_to(HERE) if file.is_relative_to(HERE) else file)


class Observer:
    """See the top of this file. Each dict is by kind of result.

    Attributes:
        ran: {file, as `name_of` has it: names of the definitions at its top level that ran}.
        settings: names of the fields that were read.
        files, variables: what the user's code opened and looked up itself.
        imports: by file of the user's, the modules that it imported, under whatever name.
        held: gives digits for what global names of the user's code hold. moved: those that changed
            while a result was computed. started: programs that the user's code started meanwhile,
            and what for.
        home: the file of experiment.py, which may be called otherwise.
    """

    def __init__(self) -> None:
        self.ran: dict[str, dict[str, set[str]]] = {}
        self.settings: dict[str, set[str]] = {}
        self.files: dict[str, set[str]] = {}
        self.variables: dict[str, set[str]] = {}
        self.imports: dict[Path, set[str]] = {}
        self.base: tuple[str, ...] = ()
        self.of_thread = threading.local()
        self.watches = False
        self.held: Callable[[], dict[str, str]] = dict
        self.moved: set[str] = set()
        self.started: set[str] = set()
        self.home = HERE / "experiment.py"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is being computed, in a thread that computes nothing itself what the main one is."""
        return getattr(self.of_thread, "kinds", self.base)

    @contextlib.contextmanager
    def computing(self, kind: str) -> Iterator[None]:
        """Inside, a result of this kind is computed, and all that is read is read for it."""
        before = self.kinds
        in_main = threading.current_thread() is threading.main_thread()
        place, name = (self, "base") if in_main else (self.of_thread, "kinds")
        setattr(place, name, (*before, kind))
        if self.watches:
            self.ran.setdefault(kind, {})
        looks = self.watches and in_main and not before
        held = self.held() if looks else {}
        try:
            yield
        finally:
            setattr(place, name, before)
            if looks:
                now = self.held()
                self.moved |= {n for n in {**held, **now} if held.get(n) != now.get(n)}

    def note(self, found: dict[str, set[str]], name: str) -> None:
        """Adds a name to those of each kind that is being computed."""
        for kind in self.kinds or (ANY,):
            found.setdefault(kind, set()).add(name)

    @contextlib.contextmanager
    def watching(self, settings_class: type) -> Iterator[None]:
        """Inside, what runs and which settings are read is observed, in new threads too."""
        observer, read = self, settings_class.__getattribute__
        fields = frozenset(getattr(settings_class, "__dataclass_fields__", ()))

        def recording(self: Any, name: str) -> Any:
            if name in fields:
                observer.note(observer.settings, name)
            return read(self, name)

        before = sys.gettrace(), threading.gettrace(), self.base
        self.base, self.watches = (), True
        settings_class.__getattribute__ = recording
        trace = self.tracer()
        sys.settrace(trace)
        threading.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before[0])
            threading.settrace(before[1])
            self.base, self.watches = before[2], False
            del settings_class.__getattribute__

    def forget(self) -> None:
        """Before a rehearsal."""
        self.ran.clear()
        self.settings.clear()
        self.moved.clear()
        self.started.clear()

    def tracer(self) -> Callable[[types.FrameType, str, Any], None]:
        """What sys.settrace calls at the beginning of each function: a library's cost a look-up.

        A library's is told by the file of its globals: `id` and `frame.f_code` raise an audit event
        each, for which `on_event` is called, and took five times as long.
        """
        foreign: set[str] = set()
        seen: dict[tuple[str, ...], dict[int, types.CodeType]] = {}  # kept: an id stays its own

        def trace(frame: types.FrameType, event: str, argument: Any) -> None:
            if (of_module := frame.f_globals.get("__file__")) in foreign:
                return
            code = frame.f_code
            if not is_own(code.co_filename):
                if isinstance(of_module, str) and not is_own(of_module):
                    foreign.add(of_module)
                return
            kinds = self.kinds
            of_kinds = seen.setdefault(kinds, {})
            if id(code) in of_kinds:
                return
            of_kinds[id(code)] = code
            path, name = Path(code.co_filename).resolve(), code.co_qualname.split(".")[0]
            file = "experiment.py" if path == self.home else name_of(path)
            if name.startswith("<"):
                name = f"{name}:{code.co_firstlineno}"
            for kind in kinds or (ANY,):
                self.ran.setdefault(kind, {}).setdefault(file, set()).add(name)

        return trace

    def record(self) -> dict[str, Any]:
        """All that was observed, as JSON; files and variables with what they hold now."""
        return {
            "ran": {kind: {f: sorted(names) for f, names in files.items()}
                    for kind, files in self.ran.items()},
            "settings": {kind: sorted(names) for kind, names in self.settings.items()},
            "moved": sorted(self.moved),
            "started": sorted(self.started),
            "imports": {name_of(file): sorted(names) for file, names in self.imports.items()},
            "read": self.values({kind: sorted(names) for kind, names in self.files.items()},
                                {kind: sorted(names) for kind, names in self.variables.items()}),
        }  # fmt: skip

    def restore(self, record: dict[str, Any]) -> None:
        """Puts back what an earlier rehearsal of the same code observed."""
        self.ran = {kind: {f: {*names} for f, names in files.items()}
                    for kind, files in record["ran"].items()}  # fmt: skip
        self.settings = {kind: {*names} for kind, names in record["settings"].items()}
        for file, names in record["imports"].items():
            self.imports.setdefault(HERE / file, set()).update(names)
        for found, name in ((self.files, "file"), (self.variables, "variable")):
            for kind, values in record["read"][name].items():
                found.setdefault(kind, set()).update(values)

    @staticmethod
    def values(
        files: dict[str, list[str]], variables: dict[str, list[str]]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """What files and variables hold now, by kind."""
        return {
            "file": {kind: {f: content(str(HERE / f)) for f in names}
                     for kind, names in files.items()},
            "variable": {kind: {v: os.environ.get(v) for v in names}
                         for kind, names in variables.items()},
        }  # fmt: skip

    def unchanged(self, read: dict[str, dict[str, dict[str, Any]]]) -> bool:
        """Whether files and variables still hold what `record` has noted."""
        return self.values(*(read[name] for name in ("file", "variable"))) == read

    def read_for(self, kind: str) -> dict[str, Any]:
        """What results of a kind depend on: files and variables that code of the user's reads."""
        found = self.values(*({ANY: sorted(by_kind.get(ANY, set()) | by_kind.get(kind, set()))}
                              for by_kind in (self.files, self.variables)))  # fmt: skip
        return {name: values[ANY] for name, values in found.items()}


OBSERVED = Observer()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside, in this thread, what runs is not observed: nothing but the harness's, or a library's.

    Each call costs, while it is watched, and walks through objects are millions of them.
    """
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def content(file: str) -> str | None:
    """What stands for a file's content; None where there is none."""
    try:
        status = os.stat(file)
        return content_of(file, status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@functools.cache
def content_of(file: str, size: int, mtime_ns: int) -> str:
    """See `content`; a file of that size and time is read once."""
    if size > LARGE:
        return f"{size} {mtime_ns}"
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def own_caller(beneath: Callable[[str], bool]) -> str | None:
    """The file of the innermost frame that is not beneath, where it is the user's.

    Args:
        beneath: whether to look on, from the name of a frame's file.
    """
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and beneath(frame.f_code.co_filename):
        frame = frame.f_back
    file = "<none>" if frame is None else frame.f_code.co_filename
    return file if is_own(file) else None


def imports(file: str) -> bool:
    """Whether a file is of Python's own machinery of imports."""
    return file.startswith("<frozen ") or file == importlib.__file__


@functools.cache
def system_folders() -> tuple[str, ...]:
    """What lies below them is no data of the user's: the system, Python, caches."""
    caches = [os.environ.get(name) for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE")]
    caches += [str(Path.home() / ".cache")]
    return ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/", sys.base_prefix, *filter(None, caches))


def is_data(path: Any) -> bool:
    """Whether a path is that of data: not of code, a library, the system or a cache."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    path = os.path.abspath(os.fsdecode(path))
    code = path.endswith((".py", ".pyc", ".so"))
    return not (code or path.startswith(system_folders()) or is_of_a_library(path))


def on_event(event: str, arguments: tuple) -> None:
    """sys.addaudithook: what files code of the user's opens to read, what programs it starts."""
    if event not in WATCHED:
        return
    if event == "open" and not sys.is_finalizing():
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else 0
        if not writes and is_data(path) and own_caller(lambda file: not is_known(file)):
            note_file(path)
    elif event in PROGRAMS and OBSERVED.kinds and own_caller(starts_programs):
        OBSERVED.started.add(f"{OBSERVED.kinds[-1]} starts {arguments[0]!r:.60}")


def note_file(path: Any) -> None:
    """Notes that the user's code reads a file."""
    OBSERVED.note(OBSERVED.files, name_of(Path(os.path.abspath(os.fsdecode(path)))))


def starts_programs(file: str) -> bool:
    """Whether a file is of Python's own that starts other programs."""
    return file.startswith("<frozen ") or file in (os.__file__, subprocess.__file__)


def note_variables() -> None:
    """Has a look-up in os.environ by code of the user's noted, whatever its spelling."""

    def looks_up(file: str) -> bool:
        return file.startswith("<frozen ") or file in (os.__file__, _collections_abc.__file__)

    def noting(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def encoded(name: Any) -> Any:
            if own_caller(looks_up):
                OBSERVED.note(OBSERVED.variables, os.fsdecode(name))
            return encode(name)

        return encoded

    for variables in (os.environ, os.environb):
        variables.encodekey = noting(variables.encodekey)


def note_safetensors() -> None:
    """Has files of safetensors noted, which Rust opens, so that no audit event tells of them."""
    safe_open = safetensors.safe_open

    def noted(filename: Any, *given: Any, **more: Any) -> Any:
        if is_data(filename) and own_caller(lambda file: not is_known(file)):
            note_file(filename)
        return safe_open(filename, *given, **more)

    for module in [*sys.modules.values()]:  # others may have imported it before
        if getattr(module, "__dict__", {}).get("safe_open") is safe_open:
            module.safe_open = noted


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
        if file := own_caller(imports):
            OBSERVED.imports.setdefault(Path(file).resolve(), set()).add(name)
        spec = super().find_spec(name, path, target) if name.split(".")[0] in cls.tops else None
        loader = getattr(spec, "loader", None)
        ours = type(loader) is importlib.machinery.SourceFileLoader
        if ours and Path(loader.path).resolve() in SOURCES_AT_START:
            spec.loader = AsAtStart(loader.name, loader.path)
            return spec
        return None  # the next finder's


sys.meta_path.insert(0, OwnModules)
sys.addaudithook(on_event)
note_variables()
note_safetensors()
