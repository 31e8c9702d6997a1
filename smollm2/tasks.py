"""Labelled texts for sparse probing: the labels of sae-probes' sets.

    python smollm2/tasks.py            the tasks, their classes and how many texts there are
    python smollm2/tasks.py --check    the language model's probes against an untrained SAE's

No text of a task is in the training text (`corpus`). Train and test texts differ by their
`text_key`. A text with two labels is left out, and one of a single word: of it may be no token that
counts (`first_positions`). Only --check needs torch.
"""

import argparse
import functools
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2 import corpus  # noqa: E402

MAX_CHARS = 160  # of a text, which ends at a word: about 38 tokens
LAYERS = (9, 14, 19)  # at which the tasks were looked at
TEST = 0.4  # part of the texts that probes are tested on


class Class(NamedTuple):
    """A class of a task: the rows of a set that have this label."""

    set: str
    label: str


def classes(name: str, **labels: str) -> dict[str, Class]:
    """The classes of one set, by the names that they get here."""
    return {label: Class(name, target) for label, target in labels.items()}


TASKS: dict[str, dict[str, Class]] = {
    "figure_gender": classes("5_hist_fig_ismale", male="1", female="0"),
    "figure_politician": classes("7_hist_fig_ispolitician", politician="1", other="0"),
    "country": classes("17_world_country", united_kingdom="United_Kingdom", italy="Italy",
                       india="India"),
    "work_of_art": classes("27_art_type", book="book", song="song", movie="movie"),
    "front_page": classes("26_headline_isfrontpage", front_page="1", inside="0"),
    "movie_sentiment": classes("113_movie_sent", positive="1", negative="0"),
    "spam": classes("96_spam_is", spam="1", message="0"),
    "clickbait": classes("105_click_bait", clickbait="clickbait", factual="factual"),
    "news_topic": classes("97_news_class", politics="Politics", technology="Technology",
                          entertainment="Entertainment", sport="Sport"),
    "science": classes("99_sci_cat", physics="Physics", chemistry="Chemistry", biology="Biology"),
    "emotion": classes("102_twt_emotion", happiness="happiness", worry="worry"),
    "review_sentiment": classes("157_amazon_5star", five_stars="1", fewer="0"),
    "ticket": classes("103_it_tick", people="HR Support", hardware="Hardware", access="Access"),
    "written_by": classes("110_aimade_humangpt3", human="0", model="1"),
    "disease": classes("101_disease_class", digestive="digestive system diseases",
                       heart="cardiovascular diseases", nervous="nervous system diseases"),
    "sport": classes("108_athlete_sport", football="football", basketball="basketball",
                     baseball="baseball"),
    "timezone": classes("14_us_timezone", chicago="Chicago", new_york="New_York",
                        los_angeles="Los_Angeles"),
}  # fmt: skip
CLASSES = {name: tuple(of_task) for name, of_task in TASKS.items()}
# A is for choosing (settings, variants), B for reporting: decide on A, then report B.
# README.md says why some tasks are in neither.
TASK_SETS: dict[str, tuple[str, ...]] = {
    "A": ("movie_sentiment", "country", "clickbait", "science", "review_sentiment",
          "emotion"),
    "B": ("news_topic", "figure_gender", "work_of_art", "spam", "ticket", "disease"),
}  # fmt: skip


@functools.cache
def texts_of(name: str) -> dict[str, dict[str, list[str]]]:
    """{split: {class: texts}} of a task, each text once, in the order of the sets' rows."""
    by_label: dict[str, dict[str, str]] = {}
    for label, kind in TASKS[name].items():
        texts = by_label[label] = {}
        for text, target in corpus.rows(kind.set):
            if target == kind.label and (key := corpus.text_key(text)) and len(text.split()) > 1:
                texts.setdefault(key, cut(text))
    n_labels = Counter(key for texts in by_label.values() for key in texts)
    found: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, texts in by_label.items():
        for split in found:
            found[split][label] = [
                text for key, text in texts.items()
                if n_labels[key] == 1 and (corpus.part_of(key, "task") < TEST) == (split == "test")
            ]  # fmt: skip
    return found


def cut(text: str) -> str:
    """The text, or its first 160 characters up to the end of a word."""
    text = text.strip()
    if len(text) <= MAX_CHARS:
        return text
    head = text[: MAX_CHARS + 1]
    return (head.rsplit(maxsplit=1)[0] if len(head.split()) > 1 else head[:MAX_CHARS]).rstrip()


def load_task(
    name: str, n_train: int, n_test: int, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The texts of a task: (train, test), each class label -> list of texts.

    Args:
        name: a key of TASKS.
        n_train, n_test: what SAE-Bench calls train_set_size and test_set_size, the texts of one
            one-against-the-rest probe: each class gets n // 2.
        seed: decides which texts are drawn, and their order.

    Raises:
        ValueError: no such task.
        corpus.CorpusError: there are not so many texts, or the package is not the manifest's.
    """
    if name not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, found {name!r}: choose one")
    corpus.check_package()
    sets = []
    for split, n in (("train", n_train), ("test", n_test)):
        drawn = {}
        for label, texts in texts_of(name)[split].items():
            if not 1 <= n // 2 <= len(texts):
                raise corpus.CorpusError(
                    f"expected 1 to {len(texts)} {split} texts of class {label} of the task "
                    f"{name}, found a demand for {n // 2}: set the size of this split to 2 to "
                    f"{2 * len(texts)}, twice the texts per class"
                )
            # A string seeds random.Random by its SHA-512: the same on every machine.
            drawn[label] = random.Random(f"{seed} {split} {label}").sample(texts, n // 2)
        sets.append(drawn)
    return sets[0], sets[1]


def print_counts() -> None:
    """Prints each task's classes with how many texts they have, in Markdown."""
    print("| task | class | set | texts: train, test | characters, median |")
    print("| --- | --- | --- | --- | --- |")
    for name, of_task in TASKS.items():
        texts = texts_of(name)
        for label, kind in of_task.items():
            train, test = texts["train"][label], texts["test"][label]
            median = sorted(map(len, train))[len(train) // 2]
            print(f"| {name} | {label} | {kind.set} | {len(train)}, {len(test)} | {median} |")


def check(n_train: int, n_test: int, names: list[str]) -> None:
    """`print_margins` of these tasks, at the layers of the profile, in bfloat16."""
    from harness.language_model import load_language_model
    from tinylm.tasks import print_margins

    lm = load_language_model("smollm2", "bfloat16")
    del lm.hf.model.layers[LAYERS[-1] + 2 :]
    heldout = [text[:600] for _, text in zip(range(100), corpus.documents("heldout"), strict=False)]
    tasks = {name: functools.partial(load_task, name, n_train, n_test, seed=42) for name in names}
    print_margins(lm.hf, lm.tokenizer, heldout, tasks, LAYERS, d_sae=4608, k=32)


def main() -> None:
    parser = argparse.ArgumentParser(description="The labelled tasks of smollm2.")
    parser.add_argument("--check", action="store_true", help="probe each task")
    parser.add_argument("--n_train", type=int, default=300, help="twice the texts per class")
    parser.add_argument("--n_test", type=int, default=180, help="twice the texts per class")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="only these tasks")
    args = parser.parse_args()
    try:
        if args.check:
            check(args.n_train, args.n_test, args.tasks)
        else:
            print_counts()
    except corpus.CorpusError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
