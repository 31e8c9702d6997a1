"""What was reused and kept in this attempt, and what is odd: said once, and remembered."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from harness.console import print_line


class Ledger:
    """What the store has given to this attempt and holds of it, and the key of its training.

    Attributes:
        kept: what an attempt that fails goes on from. reused: what was not repeated.
        key: all that the training of this attempt depends on, or of the attempt before.
        warnings: what is odd but may be meant, for warnings.json. said: other sentences, once each.
        rehearsing: nothing is found or kept, whatever its key.
    """

    def __init__(self) -> None:
        self.rehearsing = False
        self.begin()

    def begin(self, key: dict[str, Any] | None = None) -> None:
        """A new attempt. `key`: of the training of the one before."""
        self.kept: list[str] = []
        self.reused: list[str] = []
        self.warnings: list[str] = []
        self.said: set[str] = set()
        self.key = key

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, the store gives and keeps nothing; `pinned` does."""
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False

    def keeps(self, what: str) -> None:
        """Remembers what the store holds of this attempt, for its last words."""
        if what != "rehearsal":  # nothing goes on from it
            first = what.split(" up to ")[0]
            self.kept = [w for w in self.kept if not w.startswith(first)] + [what]

    def reuses(self, what: str, quietly: bool = False, part: str = "") -> None:
        """Says once that something is not repeated, and remembers it for config.json."""
        if what not in self.reused:
            self.reused.append(what)
            self.keeps(what)
            if not quietly:
                unchanged = "as all that it depends on is unchanged"
                print_line(f"{what}{part}: kept, {unchanged}; not repeated")

    def warns(self, sentence: str) -> None:
        """Says once what is odd but may be meant, and remembers it for warnings.json."""
        if not self.rehearsing and sentence not in self.warnings:
            self.warnings.append(sentence)
            print_line(f"warning: {sentence}")

    def says(self, sentence: str) -> None:
        """Says something once."""
        if sentence not in self.said:
            self.said.add(sentence)
            print_line(sentence)

    def changed(self, key: dict[str, Any]) -> str:
        """In what the key of this training differs from the attempt's before: at most six names."""
        def parts(key: dict[str, Any]) -> dict[str, str]:
            return {
                f"{kind} {name}".strip(): json.dumps(part)
                for kind, value in key.items()
                for name, part in (value if isinstance(value, dict) else {"": value}).items()
            }

        old, new = parts(self.key or {}), parts(key)
        self.key = key
        names = [n for n in {**new, **old} if new.get(n) != old.get(n)] if old else []
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


LEDGER = Ledger()
