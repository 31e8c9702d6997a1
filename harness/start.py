"""What has to be read before the libraries: imports take seconds, in which files may be edited."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if sys.platform == "win32":
    sys.exit("experiment.py needs Linux or macOS: on Windows, run it in WSL")

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent.parent

# Read when the libraries start: the same seed on the same machine gives the same weights.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that wait don't spin: beside other jobs a run took half to a third of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ENVIRON_AT_START = dict(os.environ)  # scikit-learn, for one, adds to it when it is imported


def _sources() -> dict[Path, str]:
    """The project's own Python files, and those a user has put beside them."""
    files = [*HERE.glob("*.py"), *HERE.glob("[a-z]*/*.py"), *HERE.glob("[a-z]*/*/*.py")]
    left_out = ("tests", "bench", "findings", "figures", "run_")
    return {
        file: file.read_text(encoding="utf-8")
        for file in files
        if not file.relative_to(HERE).parts[0].startswith(left_out)
    }


SOURCES_AT_START = _sources()


def source_at_start(file: Path) -> str:
    """What stood in a file when the command began; of one that came later, what stands there."""
    return SOURCES_AT_START.get(file) or file.read_text(encoding="utf-8")
