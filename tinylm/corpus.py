"""The text tinylm is trained and probed on: Python source of packages that constraints.txt pins.

Nothing of that text is in the repository. `manifest.tsv` lists, for every file, its distribution,
its split, the SHA-256 of its bytes and its path below site-packages; the text is read from where
the packages are installed, and only files whose hash agrees are used.

    python tinylm/corpus.py                    check the installed packages against the manifest
    python tinylm/corpus.py --stats            the corpus table and the line overlap of each split
    python tinylm/corpus.py --write_manifest   make manifest.tsv anew from the installed packages
    python tinylm/corpus.py --write_sums       write SHA256SUMS of the shipped files

This module needs the standard library only.
"""

import argparse
import functools
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "manifest.tsv"
SUMS = HERE / "SHA256SUMS"
SHIPPED = ("config.json", "generation_config.json", "manifest.tsv", "model.safetensors",
           "tokenizer.json", "tokenizer_config.json")

SPLITS = ("train", "heldout", "probe_train", "probe_test")
MAX_MISSING = 0.005  # share of the manifest's files that may be missing or different

# Distribution -> top-level folders. torch is left out: its CPU and CUDA builds differ in places.
PACKAGES = {
    "accelerate": ["accelerate"], "aiohttp": ["aiohttp"], "datasets": ["datasets"],
    "fonttools": ["fontTools"], "fsspec": ["fsspec"], "joblib": ["joblib"],
    "matplotlib": ["matplotlib", "mpl_toolkits"], "mpmath": ["mpmath"],
    "narwhals": ["narwhals"], "networkx": ["networkx"], "nltk": ["nltk"], "numpy": ["numpy"],
    "pandas": ["pandas"], "patsy": ["patsy"], "plotly": ["plotly"], "pydantic": ["pydantic"],
    "rich": ["rich"], "sae-lens": ["sae_lens"], "scikit-learn": ["sklearn"], "scipy": ["scipy"],
    "seaborn": ["seaborn"], "statsmodels": ["statsmodels"], "sympy": ["sympy"],
    "transformer-lens": ["transformer_lens"], "transformers": ["transformers"],
}

MIN_BYTES, MAX_BYTES = 500, 400_000
# Of two files that share this part of their long lines, one is dropped; a held-out or probing file
# may share less with the training files (the bar of the design).
NEAR_COPY, MAX_OVERLAP = 0.5, 0.3
LONG_LINE = 25  # characters, stripped; shorter lines are common to all code and say nothing

# What a build writes (platform, compiler, version), vendored copies of other packages, generated
# code, tables of data.
SKIP_PATH = re.compile(
    r"(?:^|/)(?:_?version|__config__|_distributor_init|conftest|setup)\.py$"
    r"|_pb2(?:_grpc)?\.py$"
    r"|(?:^|/)(?:_vendor|vendored?|externals?|array_api_compat|array_api_extra|_uarray|_highspy"
    r"|pyprima|deprecated)/"
    r"|(?:^|/)(?:_antlr|graph_objs|graph_objects|validators|package_data|_unicode_data)/"
    r"|numpy/distutils/"  # not built for Python 3.12
    r"|transformers/utils/dummy_|_generated|/generated"
    r"|resolvent_lookup|unicodedata/|/_emoji_codes|_cell_widths|agl(?:fn)?\.py")
GENERATED = re.compile(
    r"auto(?:matically|-)?[ -]?generated|generated (?:by|from|automatically)"
    r"|do not (?:edit|modify)|this file was (?:created|generated)", re.I)
NUMERIC_LINE = re.compile(r"^[\s\d.,eE+\-*/\[\]()jnaif'\"xX:]*\d[\s\d.,eE+\-*/\[\]()jnaif'\"xX:]*$")


class CorpusError(RuntimeError):
    """The corpus, or a shipped file of tinylm, is missing or is not what the manifest says."""


class Entry(NamedTuple):
    """One line of the manifest."""

    package: str  # the distribution's name, as pinned in constraints.txt
    split: str
    sha256: str
    path: str  # relative to site-packages, with forward slashes


def manifest_entries() -> list[Entry]:
    """The manifest's files, in its own order (shuffled, so that any prefix mixes the packages)."""
    try:
        lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CorpusError(f"expected {MANIFEST}, found nothing: bring it back with "
                          "`git checkout -- tinylm`") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 4 or fields[1] not in SPLITS or len(fields[2]) != 64:
            raise CorpusError(f"expected package, split, SHA-256 and path on line {number} of "
                              f"{MANIFEST}, found {line[:60]!r}: bring the file back with "
                              "`git checkout -- tinylm`")
        entries.append(Entry(*fields))
    return entries


def manifest_sha256() -> str:
    """SHA-256 of manifest.tsv, in hex: it names the corpus in a run's records."""
    if not MANIFEST.is_file():
        manifest_entries()  # raises, with the sentence for a missing manifest
    return hashlib.sha256(MANIFEST.read_bytes()).hexdigest()


@functools.cache
def _root(package: str) -> Path | None:
    """The folder that holds a distribution's files, or None where it is not installed."""
    try:
        return Path(str(metadata.distribution(package).locate_file("")))
    except metadata.PackageNotFoundError:
        return None


def _pinned(package: str) -> str:
    """`name==version` of constraints.txt, or the name where constraints.txt does not say."""
    constraints = HERE.parent / "constraints.txt"
    if constraints.is_file():
        for line in constraints.read_text(encoding="utf-8").splitlines():
            name, _, version = line.split("#")[0].strip().partition("==")
            if name.strip().lower().replace("_", "-") == package and version:
                return f"{package}=={version.strip()}"
    return package


def _installed(package: str) -> str:
    try:
        return f"version {metadata.version(package)} is installed"
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(entry: Entry) -> str | None:
    """The text of a manifest file, or None where it is missing or its hash differs."""
    root = _root(entry.package)
    if root is None:
        return None
    try:
        data = (root / entry.path).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return None
    return data.decode("utf-8")


def _error(missing: list[Entry], n_files: int) -> CorpusError:
    counts: dict[str, int] = defaultdict(int)
    for entry in missing:
        counts[entry.package] += 1
    packages = ", ".join(
        f"{_pinned(p)} ({n} files; {_installed(p)})"
        for p, n in sorted(counts.items(), key=lambda item: -item[1])[:6])
    return CorpusError(
        f"expected the {n_files} files of tinylm/manifest.tsv in the installed packages, found "
        f"{len(missing)} missing or different, of {packages}: install exactly the pinned versions "
        "with `pip install -r requirements.txt`, adding --force-reinstall for a package that is "
        "at its version already")


def check_packages() -> None:
    """Compares every file of the manifest with what is installed (about two seconds).

    Raises:
        CorpusError: over 0.5% of the files, or a whole package, missing or different.
    """
    entries = manifest_entries()
    _raise_if_too_many([e for e in entries if _read(e) is None], entries)


def _raise_if_too_many(missing: list[Entry], entries: list[Entry]) -> None:
    absent = [e for e in missing if _root(e.package) is None]
    if absent or len(missing) > MAX_MISSING * len(entries):
        raise _error(missing, len(entries))


def files(split: str) -> Iterator[tuple[Entry, str]]:
    """(manifest entry, text) of each file of a split, in manifest order, read when asked for.

    Raises:
        CorpusError: a package of the split is not installed (at once), or over 0.5% of the
            manifest's files turn out missing or different (as soon as that many are found).
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, found {split!r}: "
                         "choose one of these")
    entries = manifest_entries()
    _raise_if_too_many([e for e in entries if _root(e.package) is None], entries)
    missing = []
    for entry in entries:
        if entry.split != split:
            continue
        text = _read(entry)
        if text is None:
            missing.append(entry)
            _raise_if_too_many(missing, entries)
        else:
            yield entry, text


def documents(split: str) -> Iterator[str]:
    """The text of each file of a split ("train" or "heldout"), in manifest order.

    Raises:
        CorpusError: see `files`.
    """
    for _, text in files(split):
        yield text


def verify_files() -> None:
    """Compares the shipped files of tinylm with SHA256SUMS.

    Raises:
        CorpusError: a file is missing or damaged.
    """
    remedy = "bring it back with `git checkout -- tinylm`"
    if not SUMS.is_file():
        raise CorpusError(f"expected {SUMS}, found nothing: {remedy}")
    expected = {}
    for line in SUMS.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        expected[name] = digest
    for name in SHIPPED:
        path = HERE / name
        if name not in expected:
            raise CorpusError(f"expected a line for {name} in {SUMS}, found none: {remedy}")
        if not path.is_file():
            raise CorpusError(f"expected {path}, found nothing: {remedy}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected[name]:
            raise CorpusError(f"expected {path} as in {SUMS.name}, found other contents (a "
                              f"damaged or edited file): {remedy}")


def write_sums() -> None:
    """Writes SHA256SUMS for the shipped files."""
    lines = [f"{hashlib.sha256((HERE / n).read_bytes()).hexdigest()}  {n}\n" for n in SHIPPED]
    SUMS.write_text("".join(lines), encoding="utf-8")


# ---- making the manifest -------------------------------------------------------------------------


def long_lines(text: str) -> set[str]:
    """The distinct lines of at least 25 characters, stripped."""
    return {s for line in text.splitlines() if len(s := line.strip()) >= LONG_LINE}


def overlap(lines: set[str], others: set[str]) -> float:
    """The share of `lines` that occur in `others` (0 for no lines)."""
    return len(lines & others) / len(lines) if lines else 0.0


def _wanted_path(path: str) -> bool:
    """Whether a path holds hand-written Python that is the same on every platform."""
    if not path.endswith(".py") or SKIP_PATH.search("/" + path):
        return False
    if path.startswith("transformers/models/"):
        # One file per family: the hand-written modular file, else the modeling file.
        parts = path.split("/")
        return len(parts) == 4 and parts[3].startswith(("modular_", "modeling_"))
    return True


def _is_prose_or_code(text: str) -> bool:
    """False for generated files, tables of numbers or characters, and data in long lines."""
    if GENERATED.search(text[:1500]):
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or max(map(len, lines)) > 1000 or len(text) / len(lines) > 90:
        return False
    if sum(bool(NUMERIC_LINE.match(line)) for line in lines) > 0.15 * len(lines):
        return False
    solid = "".join(text.split())
    if sum(c.isdigit() for c in solid) > 0.15 * len(solid):
        return False
    return sum(ord(c) > 127 for c in solid) <= 0.03 * len(solid)


def _split_of(path: str) -> str:
    """The split of a file, by a hash of its path: 4% held-out, 16% for probing, else training."""
    u = int(hashlib.sha256(("split:" + path).encode()).hexdigest()[:8], 16) / 16**8
    for bound, split in ((0.04, "heldout"), (0.14, "probe_train"), (0.20, "probe_test")):
        if u < bound:
            return split
    return "train"


def _candidates() -> Iterator[tuple[str, str, bytes, str]]:
    """(package, path, bytes, text) of every file that the rules let in, before deduplication."""
    for package, folders in PACKAGES.items():
        root = _root(package)
        if root is None:
            raise CorpusError(f"expected {_pinned(package)}, found it not installed: install it "
                              "with `pip install -r requirements.txt`")
        paths = []
        for folder in folders:
            paths += [p.relative_to(root).as_posix() for p in (root / folder).rglob("*.py")]
        modular = {p.rsplit("/", 1)[0] for p in paths if p.rsplit("/", 1)[1].startswith("modular_")}
        families = set()
        for path in sorted(paths):
            if not _wanted_path(path):
                continue
            folder, name = path.rsplit("/", 1)
            if path.startswith("transformers/models/"):
                if folder in families or (folder in modular and not name.startswith("modular_")):
                    continue
                families.add(folder)
            data = (root / path).read_bytes()
            if not MIN_BYTES <= len(data) <= MAX_BYTES:
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if _is_prose_or_code(text):
                yield package, path, data, text


def write_manifest() -> None:
    """Makes manifest.tsv from the installed packages by the rules of this file."""
    found = sorted(_candidates(), key=lambda c: hashlib.sha256(("order:" + c[1]).encode()).digest())
    kept: dict[str, list[tuple[str, str, str, set[str]]]] = {split: [] for split in SPLITS}
    hashes, seen = set(), set()
    for package, path, data, text in found:  # exact copies and near copies, over all splits
        digest, lines = hashlib.sha256(data).hexdigest(), long_lines(text)
        if digest in hashes or overlap(lines, seen) > NEAR_COPY:
            continue
        hashes.add(digest)
        seen |= lines
        kept[_split_of(path)].append((package, path, digest, lines))
    train = set().union(*(lines for *_, lines in kept["train"]))
    probe_train = set().union(*(lines for *_, lines in kept["probe_train"]))
    rows = []
    for split in SPLITS:
        others = train | probe_train if split == "probe_test" else train
        for package, path, digest, lines in kept[split]:
            if split == "train" or overlap(lines, others) <= MAX_OVERLAP:
                rows.append(f"{package}\t{split}\t{digest}\t{path}\n")
    MANIFEST.write_text("# distribution, split, SHA-256, path (python tinylm/corpus.py "
                        "--write_manifest)\n" + "".join(rows), encoding="utf-8")


# ---- figures about it ----------------------------------------------------------------------------


def line_overlap(split: str) -> tuple[float, float]:
    """What a split shares with the training files, over its lines of 25 characters or more.

    Returns:
        (share of all such lines of the split that occur in a training file, largest share of
        distinct lines for a single file of the split).
    """
    train: set[str] = set()
    for text in documents("train"):
        train |= long_lines(text)
    shared = total = 0
    largest = 0.0
    for _, text in files(split):
        lines = [s for line in text.splitlines() if len(s := line.strip()) >= LONG_LINE]
        shared += sum(s in train for s in lines)
        total += len(lines)
        largest = max(largest, overlap(set(lines), train))
    return shared / max(total, 1), largest


def print_stats() -> None:
    """Prints the corpus table and the line overlap of each split, in Markdown."""
    table: dict[str, dict[str, list[int]]] = defaultdict(lambda: {s: [0, 0] for s in SPLITS})
    for split in SPLITS:
        for entry, text in files(split):
            for name in (entry.package, "all"):
                table[name][split][0] += 1
                table[name][split][1] += len(text.encode())
    print("| package | " + " | ".join(f"{s}: files, MB" for s in SPLITS) + " |")
    print("| --- " * (len(SPLITS) + 1) + "|")
    for name in sorted(table, key=lambda n: (n == "all", -table[n]["train"][1])):
        cells = [f"{n}, {b / 1e6:.2f}" for n, b in (table[name][s] for s in SPLITS)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    for split in SPLITS[1:]:
        share, largest = line_overlap(split)
        print(f"{split}: {100 * share:.1f}% of the lines of 25 characters or more occur in "
              f"training files; at most {100 * largest:.1f}% of one file's distinct lines")


def main() -> None:
    parser = argparse.ArgumentParser(description="The corpus of tinylm.")
    parser.add_argument("--write_manifest", action="store_true", help="make manifest.tsv anew")
    parser.add_argument("--write_sums", action="store_true", help="write SHA256SUMS")
    parser.add_argument("--stats", action="store_true", help="print the corpus table")
    args = parser.parse_args()
    try:
        if args.write_manifest:
            write_manifest()
        if args.write_sums:
            write_sums()
        check_packages()
        if args.stats:
            print_stats()
    except CorpusError as error:
        sys.exit(str(error))
    entries = manifest_entries()
    print(f"{len(entries)} files in the manifest, "
          + ", ".join(f"{sum(e.split == s for e in entries)} {s}" for s in SPLITS)
          + "; the installed packages agree")


if __name__ == "__main__":
    main()
