"""What sparse probing's data sets are: SAE-Bench's own, tasks that ship here, files with labels."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness.console import print_line
from harness.errors import ExperimentError, first_line
from harness.interfaces import SettingsLike
from harness.ledger import LEDGER
from harness.text import corpus_errors
from harness.text_files import form_of, rows_of

LABELLED = (("text", "prompt"), ("label", "target"))  # the columns, by the names they may have
FORMS = ("json", "csv", "parquet")  # of files with labels: keys of text_files.FORMS' values
FEWEST = 5  # texts of a class that train its probe, and that test it, where a file has no more

Texts = dict[str, list[str]]  # by class


def _tinylm() -> Any:
    from tinylm import tasks

    return tasks


def _smollm2() -> Any:
    from smollm2 import tasks

    return tasks


# By the beginning of their names, what gives tasks that ship here: a module with TASK_SETS, CLASSES
# and load_task. tinylm/A and tinylm/B stand for several tasks each, tinylm/A/package for one.
SHIPPED: dict[str, Callable[[], Any]] = {"tinylm": _tinylm, "smollm2": _smollm2}


class ProbeSet(NamedTuple):
    """A data set that SAE-Bench doesn't know.

    Attributes:
        classes: their labels. load: called with SAE-Bench's train and test size and a seed; gives
            train and test.
        package: whose task it is; None: it is a file's, and `load` gives what was read from it.
    """

    classes: list[str]
    load: Callable[[int, int, int], tuple[Texts, Texts]]
    package: str | None


def package_of(name: str) -> str | None:
    """The package whose tasks a probing set is, by its name; None: it is no such."""
    first, *rest = name.split("/")
    return first if rest and first in SHIPPED else None


def task_names(package: str) -> dict[str, list[str]]:
    """By the name that stands for several tasks, such as "tinylm/A", the names of its tasks."""
    sets = SHIPPED[package]().TASK_SETS
    return {f"{package}/{at}": [f"{package}/{at}/{task}" for task in sets[at]] for at in sets}


def known_to_sae_bench() -> dict[str, list[str]]:
    """The classes of the data sets that SAE-Bench knows, by their names."""
    from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

    return chosen_classes_per_dataset


def check_probe_sets(settings: SettingsLike) -> None:
    """ExperimentError where a probing set is none that there is, or one stands there twice."""
    for name in settings.probe_sets:
        if package := package_of(name):
            groups = task_names(package)
            tasks = sum(groups.values(), [])
            if name not in groups and name not in tasks:
                raise ExperimentError(
                    f"of {package}, probe_sets must name {' or '.join(groups)}, or one of their "
                    f"tasks ({', '.join(tasks)}), but names {name!r}: choose among these"
                )
        elif name in known_to_sae_bench() or Path(name).exists():
            continue
        elif form_of(name) or len(Path(name).parts) > 2:
            raise ExperimentError(
                f"the probing set {name!r} must be there, but there is no such file or folder: "
                "look at probe_sets at the top of experiment.py"
            )
        else:
            shipped = ", ".join(f"{package}/A, {package}/B" for package in SHIPPED)
            raise ExperimentError(
                "probe_sets must be data sets whose classes SAE-Bench knows "
                f"({', '.join(known_to_sae_bench())}), {shipped}, or files and folders of texts "
                f"with labels that are there, but one is {name!r}: choose among these"
            )
    if again := [name for name, n in Counter(probe_names(settings)).items() if n > 1]:
        raise ExperimentError(
            f"probe_sets must be all different, but has {again[0]!r} twice: name it once"
        )


def is_file(name: str) -> bool:
    """Whether a probing set is a file or folder of the user's, by its name."""
    return not package_of(name) and name not in known_to_sae_bench()


def file_names(settings: SettingsLike) -> dict[str, str]:
    """By the paths of the user's own sets their names in records: what tells a path from others.

    That is the file's name, and where several have that the folders above it, too.
    """
    parts = {name: Path(name).resolve().parts for name in settings.probe_sets if is_file(name)}
    n = 1
    while len({path[-n:] for path in parts.values()}) < len({*parts.values()}):
        n += 1
    return {name: "/".join(path[-n:]) for name, path in parts.items()}


def probe_names(settings: SettingsLike) -> list[str]:
    """The data sets of sparse probing, as records name them; of a group of tasks each one."""
    of_file, names = file_names(settings), []
    for name in settings.probe_sets:
        package = package_of(name)
        tasks = task_names(package).get(name) if package else None
        names += tasks or [of_file.get(name, name)]
    return names


def own_sets(settings: SettingsLike) -> dict[str, ProbeSet]:
    """Those of a run's probing sets that SAE-Bench doesn't know; files are read, and drawn from."""
    sets = {}
    for package in {package_of(name) for name in settings.probe_sets} - {None}:
        tasks = SHIPPED[package]()
        for name in sum(task_names(package).values(), []):
            task = name.split("/")[-1]
            load = functools.partial(load_task, tasks, task)
            sets[name] = ProbeSet(list(tasks.CLASSES[task]), load, package)
    for path, name in file_names(settings).items():
        split = draw(path, settings)
        sets[name] = ProbeSet(list(split[0]), lambda *sizes_and_seed, split=split: split, None)
    return sets


def load_task(tasks: Any, task: str, n_train: int, n_test: int, seed: int) -> tuple[Texts, Texts]:
    """The texts of a task that ships here, of train and of test."""
    with corpus_errors():
        return tasks.load_task(task, n_train, n_test, seed)


# ---- files with labels --------------------------------------------------------------------------


def draw(path: str, settings: SettingsLike) -> tuple[Texts, Texts]:
    """Train and test texts of a file, or of a folder, as many of each class, in a random order.

    As SAE-Bench draws from its own: half of `probe_train` and of `probe_test` of each class, for
    probes that tell it from the rest. Where a class has fewer, all get as few. No text stands in
    both, nor under two labels. What was left out is said.

    Raises:
        ExperimentError: a file that can't be read, lacks a column, a text or a label; one class
            alone; too few texts of a class.
    """
    import pandas
    from sae_bench.sae_bench_utils.dataset_utils import gather_dataset_from_df

    rows = {split: sum(map(labelled_rows, files), []) for split, files in split_files(path).items()}
    pools, left_out = distinct(path, rows)
    wanted = {"train": settings.probe_train // 2, "test": settings.probe_test // 2}
    sizes = sizes_of(path, pools, wanted)

    def drawn(split: str, n: int) -> Texts:
        texts = [(text, label) for label, texts in pools[split].items() for text in texts]
        table = pandas.DataFrame(texts, columns=["text", "label"])
        labels = list(pools[split])
        return gather_dataset_from_df(table, labels, n, "label", "text", settings.probe_seed)

    if "test" in pools:
        train, test = drawn("train", sizes["train"]), drawn("test", sizes["test"])
    else:
        both, n = drawn("train", sum(sizes.values())), sizes["train"]
        train = {label: texts[:n] for label, texts in both.items()}
        test = {label: texts[n:] for label, texts in both.items()}
    print_line(line_of(path, pools, sizes, left_out))
    if sizes != wanted:
        LEDGER.warns(
            f"the probing set {path!r} has fewer texts of a class than probe_train = "
            f"{settings.probe_train} and probe_test = {settings.probe_test} ask for, which is "
            f"{wanted['train']} and {wanted['test']}: all its classes are cut to "
            f"{sizes['train']} and {sizes['test']}"
        )
    return train, test


def split_files(path: str) -> dict[str, list[str]]:
    """The files of a set by split: "train", and "test" where a folder has files named so."""
    import datasets

    if Path(path).is_file():
        files = {"train": [path]}
    else:
        whole = str(Path(path).resolve())  # "csv" alone is a reader of `datasets`
        try:
            found = datasets.load_dataset_builder(whole, trust_remote_code=False).config.data_files
        except Exception as error:
            raise unreadable(path, error) from error
        files = {split: [*map(os.path.relpath, found[split])] for split in ("train", "test")
                 if split in (found or {})}  # fmt: skip
    for file in sum(files.values(), []):
        if form_of(file) not in FORMS:
            raise ExperimentError(
                f"the probing set {path!r} must be of files in one of the forms CSV, TSV, JSON, "
                f"JSON lines and Parquet, but {file!r} is another: convert it"
            )
    if "train" not in files:
        raise ExperimentError(
            f"the probing set {path!r} must have a file of which the name says that it is the "
            "split 'train', or files without names of splits, but has none: rename one"
        )
    return files


def unreadable(path: str, error: Exception) -> ExperimentError:
    """What to raise where a file can't be read."""
    if isinstance(error, UnicodeDecodeError):
        return ExperimentError(
            f"the probing set {path!r} must be UTF-8, but is not ({error}): convert it"
        )
    return ExperimentError(
        f"the probing set {path!r} can't be read ({type(error).__name__}: "
        f"{first_line(error)}): look at its files, or take it out of probe_sets"
    )


def labelled_rows(file: str) -> list[tuple[str, str]]:
    """The texts of a file, each with its label: a number's is what is written.

    Raises:
        ExperimentError: it can't be read, or has no such columns; a row has no text, or no label.
    """
    found, wrong = [], ""
    try:
        for number, row in enumerate(rows_of([file], file, LABELLED), 1):
            (of_text, text), (of_label, label) = row.items()
            is_label = isinstance(label, (str, int, float)) and label == label
            place = ""
            if not isinstance(text, str) or not text.strip():
                place, value = f"text in its column {of_text!r}", text
            elif not is_label or not str(label).strip():
                place, value = f"label in its column {of_label!r}", label
            if place and not wrong:
                wrong = f"{place}, but row {number} has {value!r:.60}"
            found.append((text, str(label)))
    except ExperimentError:
        raise
    except Exception as error:
        raise unreadable(file, error) from error
    if wrong:
        raise ExperimentError(
            f"each row of {file!r} must have a {wrong}: give it one, or leave the row out"
        )
    return found


def distinct(
    path: str, rows: dict[str, list[tuple[str, str]]]
) -> tuple[dict[str, Texts], dict[str, int]]:
    """By split and class the texts, each once; and how many were left out, by why."""
    labels_of: dict[str, set[str]] = {}
    for text, label in sum(rows.values(), []):
        labels_of.setdefault(text, set()).add(label)
    classes = sorted(set().union(*labels_of.values()))
    if len(classes) < 2:
        raise ExperimentError(
            f"the probing set {path!r} must have texts of two classes or more, but has "
            f"{f'{classes[0]!r} alone' if classes else 'no rows'}: look at its column of labels"
        )
    tested = {text for text, _ in rows.get("test", ())}
    pools: dict[str, dict[str, dict[str, None]]] = {}
    left_out: Counter[str] = Counter()
    for split, pairs in rows.items():
        pools[split] = {label: {} for label in classes}
        for text, label in pairs:
            texts = pools[split][label]
            if len(labels_of[text]) > 1:
                left_out["that stand under two labels"] += 1
            elif split == "train" and text in tested:
                left_out["of train that stand in test, too"] += 1
            elif text in texts:
                left_out["that repeat another"] += 1
            else:
                texts[text] = None
    return {split: {label: [*texts] for label, texts in pool.items()}
            for split, pool in pools.items()}, left_out  # fmt: skip


def sizes_of(path: str, pools: dict[str, Texts], wanted: dict[str, int]) -> dict[str, int]:
    """How many texts of each class are drawn for train and for test: what is wanted, or fewer.

    Raises:
        ExperimentError: a class has less than `FEWEST` for one of them.
    """
    fewest = {split: min(FEWEST, n) for split, n in wanted.items()}
    alone = "test" not in pools
    sizes = {}
    for split, pool in pools.items():
        label = min(pool, key=lambda label: len(pool[label]))
        n, least = len(pool[label]), sum(fewest.values()) if alone else fewest[split]
        if n < least:
            raise ExperimentError(
                f"the probing set {path!r} must have {least} different texts or more of each class"
                f"{'' if alone else f' in {split}'}, but has {n} of {label!r}: add some, or leave "
                "out the rows of that class"
            )
        sizes[split] = min(n, wanted[split])
    if not alone:
        return sizes
    if n >= sum(wanted.values()):
        return wanted
    n_test = max(n * wanted["test"] // sum(wanted.values()), fewest["test"])
    n_test = min(n_test, n - fewest["train"])
    return {"train": n - n_test, "test": n_test}


def line_of(
    path: str, pools: dict[str, Texts], sizes: dict[str, int], left_out: dict[str, int]
) -> str:
    """A line that says what is drawn from a set, and what is not."""
    parts = []
    for split, pool in pools.items():
        some = [f"{len(texts)} {label}" for label, texts in pool.items()]
        more = f" and {len(some) - 5} classes more" if len(some) > 5 else ""
        of_split = f"{split}: " if "test" in pools else ""
        parts.append(f"{of_split}{', '.join(some[:5])}{more}")
    without = "".join(f"; without {n} texts {why}" for why, n in left_out.items())
    return (
        f"the probing set {path!r} has texts by class, {', '.join(parts)}; of each "
        f"{sizes['train']} train probes and {sizes['test']} test them{without}"
    )
