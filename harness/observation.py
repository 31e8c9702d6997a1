"""What a run's own code does, seen while it does it: what it calls, reads, opens and imports.

A list of what matters is never whole. So the rehearsal is watched, which runs everything in
miniature: by kind of result (`Observer.computing`), which functions of experiment.py and of a
user's modules ran, and which settings were read; and from the first import to the end of the run,
what such code reads itself (`reads`). Keys of the store are made of it (`fingerprint`); a result
that has read what its key doesn't hold is not kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.start import ENVIRON_AT_START, HERE, WATCH

PACKAGE = __name__.split(".")[0]
ANY = ""  # the kind of what is read outside of all kinds: it counts for each of them
LARGE = 2**30  # bytes; of a larger file size and time stand for what it holds
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
    # Tests and benchmarks are ours where they are the program: a user may put a module there.
    path, ours = real(file), (PACKAGE, "tinylm", "smollm2")
    ours += () if WATCH.program else ("tests", "bench")
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
        read: by sort (see `NOW`), what the user's code read itself.
        modules: the files of the user's that it imported.
        in_keys: (sort, name) of both, as far as the last key of a kind holds them.
        imports: by file of the user's, the modules that it imported, under whatever name.
        held: gives digits for what global names of the user's code hold. moved: those that changed
            while a result was computed. started: programs that the user's code started meanwhile,
            and what for.
        home: the file of experiment.py, which may be called otherwise.
    """

    def __init__(self) -> None:
        self.ran: dict[str, dict[str, set[str]]] = {}
        self.settings: dict[str, set[str]] = {}
        self.read: dict[str, dict[str, set[str]]] = {sort: {} for sort in NOW}
        self.modules: dict[str, set[str]] = {}
        self.in_keys: dict[str, set[tuple[str, str]]] = {}
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
            "read": {sort: now({kind: sorted(names) for kind, names in by_kind.items()}, sort)
                     for sort, by_kind in self.read.items()},
        }  # fmt: skip

    def restore(self, record: dict[str, Any]) -> None:
        """Puts back what an earlier rehearsal of the same code observed."""
        self.ran = {kind: {f: {*names} for f, names in files.items()}
                    for kind, files in record["ran"].items()}  # fmt: skip
        self.settings = {kind: {*names} for kind, names in record["settings"].items()}
        for file, names in record["imports"].items():
            self.imports.setdefault(HERE / file, set()).update(names)
        for sort, by_kind in record["read"].items():
            for kind, values in by_kind.items():
                self.read[sort].setdefault(kind, set()).update(values)

    def read_for(self, kind: str) -> dict[str, dict[str, Any]]:
        """By sort, what is there of all that code of the user's reads for results of a kind."""
        found = {}
        for sort, by_kind in self.read.items():
            names = sorted(by_kind.get(ANY, set()) | by_kind.get(kind, set()))
            values = {name: NOW[sort](name) for name in names}
            found[sort] = {name: value for name, value in values.items() if value is not None}
        return found

    def key_made(self, kind: str, *also: tuple[str, str]) -> None:
        """Remembers what a key holds that was made now: all that was seen so far, and these."""
        self.in_keys[kind] = self.seen_by(ANY, kind) | {*also}

    def seen_by(self, *kinds: str) -> set[tuple[str, str]]:
        """(sort, name) of what the user's code read, and imported, for these kinds."""
        sorts = {**self.read, "module imported": self.modules}
        return {(sort, name) for sort, by_kind in sorts.items()
                for kind in kinds for name in by_kind.get(kind, ())}  # fmt: skip

    def learn(self, seen: dict[str, set[tuple[str, str]]]) -> None:
        """Adds what another process has seen, by kind, as `seen_by` gives it."""
        sorts = {**self.read, "module imported": self.modules}
        for kind, names in seen.items():
            for sort, name in names:
                sorts[sort].setdefault(kind, set()).add(name)

    def unforeseen(self, kind: str) -> list[str]:
        """What results of a kind have read that was unknown when their key was made."""
        new = self.seen_by(kind) - self.in_keys[kind] if kind in self.in_keys else ()
        return [f"{sort} {name}".strip() for sort, name in sorted(new)]


def content(file: str) -> str | None:
    """What stands for a file's content; None where there is none."""
    file = str(HERE / file)
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


def is_there(path: str, with_times: bool = False) -> str | None:
    """What is there under a path, and how large; None where nothing is."""
    try:
        status = os.stat(HERE / path)
    except OSError:
        return None
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    changed = f", {status.st_mode:o}, {status.st_mtime_ns}" if with_times else ""
    return f"{stat.S_IFMT(status.st_mode):o} {size}{changed}"


def listed(folder: str) -> list[str] | None:
    """What a folder holds, with sizes; None where there is none."""
    try:
        return [f"{name} {is_there(str(HERE / folder / name))}"
                for name in sorted(os.listdir(HERE / folder))]  # fmt: skip
    except OSError:
        return None


# What stands now for what was read, by what sort of thing it is: None where nothing is there.
NOW: dict[str, Callable[[str], Any]] = {
    "file read": content,
    "path looked at": is_there,
    "time looked at": functools.partial(is_there, with_times=True),
    "folder listed": listed,
    "variable read": os.environ.get,
    "variables listed": lambda _: sorted(ENVIRON_AT_START),  # a library may add to them
}


def now(names: dict[str, Any], sort: str) -> dict[str, dict[str, Any]]:
    """What names of a sort, by kind of result, stand for now."""
    return {kind: {name: NOW[sort](name) for name in of_kind} for kind, of_kind in names.items()}


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
