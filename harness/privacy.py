"""What of a run's records all may read: no path, user name, token or file of its machine."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from harness.errors import redact
from harness.model_card import Source
from harness.start import HERE
from harness.text_files import BUILT_IN, form_of
from harness.verdict import with_current_names

TEXTS = {
    "tinylm": "Python source of packages, listed in the project's tinylm/manifest.tsv",
    "smollm2": "texts of sae-probes 0.4.2, listed in the project's smollm2/manifest.tsv",
}
NOBODY = {"", "root", "user", "admin", "ubuntu", "debian", "runner", "localhost"}  # no one's name


def is_local(name: str) -> bool:
    """Whether a text or a model is a file or folder of this machine, or can't be on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return bool(form_of(name)) or name.endswith(".gguf") or Path(name).exists()


def public_text(config: dict[str, Any], field: str) -> str:
    """What a setting's text is, in words or by its name on the hub; of a local one no name."""
    name = config["settings"][field]
    if name in BUILT_IN:
        return f"held-out {TEXTS[name]}" if field == "core_text" else TEXTS[name]
    if name in config.get("texts", {}) or is_local(name):
        content = config.get("content", {}).get(field)
        return "local texts that are not published" + (f" (digest {content})" if content else "")
    return name


def public_set(name: str) -> str:
    """A probing set: its name, but of one that lies here that it is local."""
    own = name.split("/")[0] not in BUILT_IN and is_local(name)
    return "a local set that is not published" if own else name


def as_all_may_read(
    config: dict[str, Any], named: dict[str, Any], source: Source, warnings: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """All settings under their names of now, and a run's warnings, without what is of its machine.

    Args:
        named: settings' texts and sets, as the card calls them.
    """
    settings, local = with_current_names(config["settings"]), local_names(config)
    others = {at: called for at, called in {**named, "model": source.name}.items()
              if settings[at] not in BUILT_IN}  # fmt: skip
    public = {at: without_names(value, local) for at, value in {**settings, **others}.items()}
    return public, [scrubbed(warning, local) for warning in warnings]


def local_names(config: dict[str, Any]) -> set[str]:
    """What texts and probing sets of this machine are called: as the settings say it, and files."""
    texts = config.get("texts", {})
    names = {*texts, *filter(is_local, config["settings"]["probe_sets"])}
    for text in texts.values():
        names |= {*text.get("read", ()), *text.get("left_out", ())}
    names = {name for name in names if name.split("/")[0] not in BUILT_IN}
    return names | {Path(name).name for name in names}


def scrubbed(text: str, local: Iterable[str] = ()) -> str:
    """A text of the run without paths, names of user and machine, or what looks like a token.

    Args:
        local: names of files and folders that are left out, too.
    """
    text = redact(text)
    for name in sorted(filter(None, local), key=len, reverse=True):
        text = re.sub(rf"(?<![\w/]){re.escape(name)}(?!\w)", "[local text]", text)
    places = {str(HERE), str(Path.home()), str(Path.cwd())} - {"/"}
    for known in sorted(places, key=len, reverse=True):  # with the spaces that one may have
        text = text.replace(known, "/[path]")
    # A slash that begins a word, and all to its end; "and/or", "1 / 2", "</b>", "https://" stay.
    text = re.sub(r"(?<![\w.)\]/<])(?:file://|~)?/(?!/)[^\s'\"`,;)]+", "[path]", text)
    for name, word in ((platform.node(), "[machine]"), (user_name(), "[user]")):
        if name not in NOBODY:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def without_names(value: Any, local: Iterable[str]) -> Any:
    """A setting's value, `scrubbed` where it is a text or holds some."""
    if isinstance(value, list):
        return [without_names(item, local) for item in value]
    return scrubbed(value, local) if isinstance(value, str) else value


def user_name() -> str:
    """Of who publishes; where the system has no name, that of the home folder."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return Path.home().name or "root"
