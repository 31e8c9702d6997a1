"""figures/<profile>/index.html: runs, figures and features on one page. No network, no torch.

The page holds all it needs: its style and script (report.css, report.js), the figures as PNG, and
of each run's features/layer_L.json.gz what fits, packed; the browser unpacks a layer when it is
asked for. Names and tokens are text to it, never markup.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from harness.verdict import ASIDE, BEFORE, as_text, part_of, same, with_current_names

MAX_BYTES = 5_000_000  # of the page: it can be mailed, and opens at once
DENSE = 0.1  # a feature that is active on more of the tokens than this is called dense
TELLING = 5  # features of each probed class that come first where not all fit
VERSION = 1  # of the format of features/layer_L.json.gz
PARTS = Path(__file__).resolve().parent
TAG = '<script type="text/plain" class="layer" data-run="{}" data-layer="{}">{}</script>\n'


def write_report(folder: Path, runs: Sequence[Path], tables: str) -> None:
    """Writes folder/index.html, under `MAX_BYTES`, with the figures (PNG) that lie in folder.

    What can't be read is left out, and named on the page and on standard error.

    Args:
        folder: figures/<profile>.
        runs: the folders of the runs, in the order shown.
        tables: ablation.md's text.
    """
    style, script = ((PARTS / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    filled = {
        "title": html.escape(f"Runs of {folder.name}"), "style": style, "script": script,
        "style_hash": digest(style), "script_hash": digest(script), "dense": DENSE,
        "percent": f"{DENSE:.0%}",
        "tables": tables_html(tables), "figures": "",
        "warnings": warnings_html(runs), "settings": settings_html(runs),
        "features": "", "unread": "", "without": "", "if_features": "", "if_none": "",
    }  # fmt: skip
    page = Template((PARTS / "report.html").read_text("utf-8"))
    room = MAX_BYTES - len(page.substitute(filled).encode()) - 200 * len(runs)
    lacking = [run.name for run in runs if not (run / "features").is_dir()]
    filled["figures"] = figures_html(folder, room if len(lacking) == len(runs) else 2 * room // 3)
    packed, unread = pack_layers(runs, room - len(filled["figures"].encode()))
    for sentence in unread:
        print(f"plot.py: {sentence}", file=sys.stderr)
    filled |= {
        "features": "".join(packed), "unread": items(unread),
        "without": html.escape(f"Without features: {', '.join(lacking)}." if lacking else ""),
        "if_features": "" if packed else "hidden", "if_none": "hidden" if packed else "",
    }  # fmt: skip
    (folder / "index.html").write_text(page.substitute(filled), "utf-8")


# ---- features -------------------------------------------------------------------------------


def pack_layers(runs: Sequence[Path], room: int) -> tuple[list[str], list[str]]:
    """The runs' layers as elements of the page, and a sentence for each that can't be read.

    Every layer gets an equal share of `room`, in bytes; the smallest go first, so that what one
    doesn't need goes to the others.
    """
    paths = [path for run in runs for path in (run / "features").glob("layer_*.json.gz")]
    packed, unread, places = {}, [], {run.name: i for i, run in enumerate(runs)}
    for n, path in enumerate(sorted(paths, key=lambda path: (path.stat().st_size, path))):
        name = path.parent.parent.name
        try:
            data = json.loads(gzip.decompress(path.read_bytes()))
            if data["version"] != VERSION:
                raise ValueError(f"its format is {data['version']}, {VERSION} is known here")
            empty = TAG.format(html.escape(name), int(data["layer"]), "")
            share = room // (len(paths) - n) - len(empty.encode())
            content = fit(data, share, path.stat().st_size)
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            unread.append(unreadable(path, error) + f", so it is not shown: run {name} again.")
            room -= 2 * len(unread[-1])
            continue
        tag = packed[places[name], data["layer"]] = TAG.format(
            html.escape(name), data["layer"], content
        )
        room -= len(tag.encode())
    return [packed[key] for key in sorted(packed)], unread


def fit(data: dict[str, Any], room: int, size: int) -> str:
    """As many features of a layer as fit into `room` bytes, in base64 of gzip of JSON.

    `size`, in bytes, is its file's: it tells how many to try first. The form is that of the file,
    with "id" in each feature, and of all the layer's features their number "n", those dead and
    dense, and a histogram of log10 of the others' densities.
    """
    features = data["features"]
    densities = [feature["density"] for feature in features]
    alive = [math.log10(density) for density in densities if density > 0]
    low = math.floor(min(alive, default=-1))
    bins = Counter(min(int((value - low) * 4), -4 * low - 1) for value in alive)
    head = {name: value for name, value in data.items() if name not in ("features", "tokens")} | {
        "model": without_folders(str(data["model"])),
        "n": len(features), "n_dead": len(features) - len(alive),
        "n_dense": sum(density > DENSE for density in densities),
        "densities": {"low": low, "counts": [bins[i] for i in range(-4 * low)]},
    }  # fmt: skip
    order = by_interest(features)
    held = min(len(features), int(1.2 * len(features) * room / size) + 1)
    while True:
        content = pack(head, data["tokens"], features, sorted(order[: max(0, held)]))
        if len(content) <= room or held <= 0:
            return content
        held = min(held - 1, int(0.98 * held * room / len(content)))


def by_interest(features: Sequence[dict[str, Any]]) -> list[int]:
    """The features, those to keep first: dense ones, those that tell a class, others at random."""
    numbers = range(len(features))
    dense = [i for i in numbers if features[i]["density"] > DENSE]
    telling: dict[int, list[tuple[float, int]]] = {}
    for i in numbers:
        for name, value in features[i]["probe"]:
            telling.setdefault(name, []).append((-abs(value), i))
    first = [i for of_class in telling.values() for _, i in sorted(of_class)[:TELLING]]
    others = random.Random(0).sample(numbers, len(features))
    dense.sort(key=lambda i: -features[i]["density"])
    return list(dict.fromkeys([*dense, *first, *others]))


def pack(
    head: dict[str, Any], tokens: Sequence[str], features: Sequence[dict[str, Any]], ids: list[int]
) -> str:
    """The features `ids`, with the tokens that occur in them, the most frequent numbered first."""
    chosen = [features[i] for i in ids]
    counts = Counter(
        token
        for feature in chosen
        for found in (
            *(context["tokens"] for context in feature["contexts"]),
            *([token for token, _ in feature[side]] for side in ("raises", "lowers")),
        )
        for token in found
    )
    new = {token: i for i, (token, _) in enumerate(counts.most_common())}
    written = [
        feature
        | {"id": i}
        | {side: [[new[token], value] for token, value in feature[side]]
           for side in ("raises", "lowers")}
        | {"contexts": [context | {"tokens": [new[token] for token in context["tokens"]]}
                        for context in feature["contexts"]]}
        for i, feature in zip(ids, chosen)
    ]  # fmt: skip
    data = head | {"tokens": [tokens[token] for token in new], "features": written}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


# ---- the rest of the page -------------------------------------------------------------------


def digest(text: str) -> str:
    """What a Content-Security-Policy names an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def unreadable(path: Path, error: Exception) -> str:
    """The start of a sentence, which names no folder of the machine."""
    within = path.parts[-3:] if path.parent.name == "features" else path.parts[-2:]
    reason = getattr(error, "strerror", None) or error
    return f"{'/'.join(within)} can't be read ({type(error).__name__}: {reason})"


def without_folders(text: str) -> str:
    """A text of a run without the folders of its machine: the page may be sent to others."""
    return re.sub(r"(?<![\w.:/<])~?/(?:[^\s/'\"`,;)]+/)+", "…/", text)


def items(sentences: Sequence[str]) -> str:
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{listed}</ul>" if listed else ""


def table(name: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself; the first column names the rows."""
    def cell(text: str, column: int) -> str:
        tag = "th scope=row" if column == 0 else "td"
        number = re.match(r"[+\-−]?\d|-$", text) is not None and column > 0
        verdict = header[column] == "verdict"
        kind = f"verdict {text.split()[0]}" if verdict else "number" * number  # its first word
        return f'<{tag} class="{html.escape(kind)}">{html.escape(text)}</{tag[:2]}>'

    heads = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in header)
    rows = "".join(
        f"<tr>{''.join(cell(text, i) for i, text in enumerate(line))}</tr>" for line in lines
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(name)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def tables_html(text: str) -> str:
    """ablation.md as HTML: its tables, without columns that hold nothing, and what it says.

    What stands under a heading of its own is folded: it is long.
    """
    made, name, folded = [], "Runs", False
    for block in without_folders(text).split("\n\n"):
        if block.startswith("#"):
            made.append("</details>" * folded)
            if folded := block.startswith("## "):
                name = block.removeprefix("## ").strip()
                made.append(f"<details><summary>{html.escape(name)}</summary>")
        elif block.startswith("|"):
            cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]
            header, _, *lines = [[c.replace("\\|", "|").strip() for c in row] for row in cells]
            kept = [i for i in range(len(header)) if any(line[i] != "-" for line in lines)]
            header, *lines = [[row[i] for i in kept] for row in (header, *lines)]
            made.append(table(name, header, lines))
        elif block.strip():
            made.append(f"<p>{html.escape(block)}</p>")
    return "\n".join([*made, "</details>" * folded])


def figures_html(folder: Path, room: int) -> str:
    """The figures in folder, in at most `room` bytes: the largest are left out, and named.

    A palette makes a chart a third as large and changes nothing seen.
    """
    from PIL import Image  # matplotlib requires it

    made = {}
    for path in sorted(folder.glob("*.png")):
        buffer = io.BytesIO()
        with Image.open(path) as image:
            width, height = image.size
            drawn = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            drawn.save(buffer, "PNG")
        name = html.escape(path.stem.replace("_", " ").capitalize())
        made[path.name] = (
            f'<figure><figcaption>{name}</figcaption><div class="scroll" role="region" tabindex="0"'
            f' aria-label="Figure: {name}"><img loading="lazy" width="{width}" height="{height}" '
            f'alt="Figure: {name}" src="data:image/png;base64,'
            f'{base64.b64encode(buffer.getvalue()).decode()}"></div></figure>'
        )
    if not made:
        return "<p>No figures were drawn.</p>"
    left_out = []
    while sum(len(figure.encode()) + 200 for figure in made.values()) > room:
        left_out.append(max(made, key=lambda file: len(made[file])))
        del made[left_out[-1]]
    said = f" Left out here, to keep the page small: {', '.join(left_out)}." if left_out else ""
    return "\n".join([f"<p>Each lies beside this page as PDF, too.{html.escape(said)}</p>",
                      *made.values()])  # fmt: skip


def warnings_html(runs: Sequence[Path]) -> str:
    """What each run's warnings.json says."""
    made = []
    for path in (run / "warnings.json" for run in runs):
        try:
            found = json.loads(path.read_text("utf-8"))
            sentences = [without_folders(str(sentence)) for sentence in found]
        except FileNotFoundError:  # older runs, and the given baseline
            continue
        except (OSError, ValueError, TypeError) as error:
            sentences = [unreadable(path, error) + "."]
        if sentences:
            made.append(f"<h3>{html.escape(path.parent.name)}</h3>{items(sentences)}")
    return "\n".join(made) or "<p>No run has any.</p>"


def settings_html(runs: Sequence[Path]) -> str:
    """A row for each setting that is not the same in all runs, as the verdict has it.

    A record may lack one for its age, or since an edit of another run added it.
    """
    found = {}
    for run in runs:
        config = json.loads((run / "config.json").read_text("utf-8"))
        if given := part_of(config, "settings"):
            found[run.name] = BEFORE | with_current_names(given)
    names = dict.fromkeys(name for settings in found.values() for name in settings)
    lines = []
    for name in names:
        values = [s.get(name) for s in found.values() if name in s or name not in ASIDE]
        if name != "description" and not all(same(value, values[0]) for value in values):
            texts = (without_folders(as_text(s[name])) if name in s else "-"
                     for s in found.values())  # fmt: skip
            lines.append([name, *texts])
    if not lines:
        return "<p>None.</p>"
    return "<p>A dash: the run’s record doesn’t have the setting.</p>" + table(
        "Settings that differ", ["setting", *found], lines
    )
