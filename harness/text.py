"""From a data set to packed contexts of token ids."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.console import print_line
from harness.errors import ExperimentError, first_line, is_connection_error
from harness.ranks import RANKS
from harness.store import cache_dir, pinned, sha256_file
from harness.text_files import (
    BUILT_IN,
    local_rows,
    local_text,
    no_column,
    read_zstd_whole,
    stamps,
)

STREAM_RETRIES = 6  # of a broken connection in a row: a minute in all
POOL_FILES = 512  # files of a built-in corpus from which passages are drawn at a time
MAY_RUN_CODE = (  # the named data sets: a loading script of theirs, and of no other, may run
    "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5", "codeparrot/github-code",
    "fancyzhx/ag_news", "Helsinki-NLP/europarl", "Skylion007/openwebtext",
    "monology/pile-uncopyrighted",
)  # fmt: skip
LOADING = threading.Lock()  # `datasets` has one place for loading scripts, which load_dataset moves


def passages(text: str, n_chars: int = 2000) -> list[str]:
    """The text cut at ends of lines into passages of about `n_chars` characters (600 tokens)."""
    parts: list[str] = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= n_chars:
            parts.append("")
        parts[-1] += line
    return parts


def documents(name: str, split: str) -> Callable[[], Iterator[str]]:
    """A function that starts an iterator over the texts of a data set, or of a built-in corpus.

    A built-in corpus comes as passages, drawn at random from `POOL_FILES` files at a time: tinylm's
    are long (7,000 tokens), and in their own order a buffer of 262,144 tokens holds some 40 of
    them, to which SAEs then overfit (FVU jumped by a third with each new buffer).
    """

    def corpus() -> Iterator[str]:
        draw = random.Random(0)
        pool: list[list[str]] = []  # the passages left of each file
        with corpus_errors():
            for text in corpus_of(name).documents(split):
                pool.append(passages(text))
                draw.shuffle(pool[-1])
                while len(pool) >= POOL_FILES:
                    yield take_passage(pool, draw)
            while pool:
                yield take_passage(pool, draw)

    def take_passage(pool: list[list[str]], draw: random.Random) -> str:
        at = draw.randrange(len(pool))
        passage = pool[at].pop()
        if not pool[at]:
            pool[at] = pool[-1]
            pool.pop()
        return passage

    return corpus if name in BUILT_IN else StreamedTexts(name)


def corpus_of(name: str) -> Any:
    """The module that reads a built-in corpus."""
    if name == "smollm2":
        from smollm2 import corpus
    else:
        from tinylm import corpus
    return corpus


class StreamedTexts(NamedTuple):
    """Starts `streamed_texts` of a data set."""

    name: str

    def __call__(self) -> Iterator[str]:
        return streamed_texts(self.name)

    def key_parts(self) -> tuple[Any, ...]:
        """What texts of this name are: see `harness.identity`."""
        return self.name, stamps(self.name)


def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, which takes what it reads for data.

    A data set of `MAY_RUN_CODE` that can't be loaded without its own loading script runs it: at
    the revision of its first use, ever after; a line in the log names both. Arguments and result
    are those of `datasets.load_dataset`, but for `trust_remote_code`, which is ignored.

    Raises:
        ExperimentError: another data set that can't be loaded without a script.
    """
    import datasets

    read_zstd_whole()
    with LOADING:
        # In an empty folder: a script that `datasets` finds where it keeps them, it runs unasked.
        with tempfile.TemporaryDirectory() as empty, scripts_in(empty):
            try:
                options["trust_remote_code"] = False  # not None, which asks on the terminal
                return datasets.load_dataset(name, *arguments, **options)
            except ValueError as error:
                if "trust_remote_code=True" not in str(error):
                    raise
                if name not in MAY_RUN_CODE:
                    raise ExperimentError(
                        f"the data set {name!r} must load without code of its own, but has a "
                        "loading script, which is not run: choose another, or store its rows as "
                        "Parquet or JSON lines"
                    ) from error
        options["trust_remote_code"] = True
        script = Path(name, f"{Path(name).name}.py")
        if script.is_file():
            which = f"of SHA-256 {sha256_file(script)}"
        else:
            options["revision"] = pinned("revisions", {"dataset": name}, hub_revision, name)
            which = f"at revision {options['revision']}"
        print(f"the data set {name} runs its own loading script, {which}", flush=True)
        # Of our own: where the hub fails, `datasets` runs the latest script that it finds there.
        with scripts_in(cache_dir() / "scripts"):
            return datasets.load_dataset(name, *arguments, **options)


@contextlib.contextmanager
def scripts_in(folder: Path | str) -> Iterator[None]:
    """Makes `folder` the place where `datasets` keeps, and looks for, loading scripts."""
    from datasets import config

    stock, config.HF_MODULES_CACHE = config.HF_MODULES_CACHE, str(folder)
    try:
        yield
    finally:
        config.HF_MODULES_CACHE = stock
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def hub_revision(name: str) -> str:
    """The newest commit of a data set: the hub's, or the local cache's where that can't be had."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return huggingface_hub.HfApi().dataset_info(name).sha
    except Exception:
        repository = f"datasets--{name.replace('/', '--')}"
        main = Path(constants.HF_HUB_CACHE) / repository / "refs" / "main"
        if not main.is_file():
            raise
        return main.read_text().strip()


def text_stream(name: str) -> Any:
    """The split "train" of a local file or folder, or of a data set of the hub, streamed."""
    if (text := local_text(name)) is not None:
        return local_rows(name, text, load_dataset)
    return load_dataset(name, split="train", streaming=True)


def streamed_texts(name: str) -> Iterator[str]:
    """The column "text" of a data set's split "train", streamed; texts of white space left out.

    A broken connection is tried again, after 1, 2, 4, … seconds, and the stream goes on where it
    stopped.

    Raises:
        ExperimentError: it can't be read, has no such column, or the connection stays broken.
    """
    stream, failures = None, 0
    while True:
        try:
            if stream is None:
                stream = text_stream(name)
            for row in text_rows(name, stream):
                failures = 0
                yield row["text"]
            return
        except ExperimentError:
            raise
        except Exception as error:
            failures += 1
            if not is_connection_error(error) or failures > STREAM_RETRIES:
                raise text_error(name, error, failures) from error
            time.sleep(2.0 ** (failures - 1))
            if stream is not None:
                state = stream.state_dict()
                stream = text_stream(name)
                stream.load_state_dict(state)


def text_rows(name: str, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows that have a text of more than white space, for training and core evaluation alike.

    Raises:
        ExperimentError: a row has no such column, or none of strings.
    """
    for number, row in enumerate(rows, 1):
        if text := text_of(name, row, number):
            yield {"text": text}  # alone: SAELens would take a column of tokens instead


def text_of(name: str, row: dict, number: int) -> str:
    """A row's text; empty where it has none but white space. See `text_rows`."""
    if "text" not in row:
        raise no_column(name, row)
    text = row["text"]
    if not isinstance(text, str | None):
        raise ExperimentError(
            f"the text {name!r} must have strings in its column 'text', but row {number} has "
            f"{text!r:.60} ({type(text).__name__}): make each row one string"
        )
    return text if text and text.strip() else ""


def text_error(name: str, error: Exception, failures: int = 1) -> ExperimentError:
    """What is wrong with a text, from what reading it has raised, `failures` times in a row."""
    found = type(error).__name__
    if is_connection_error(error):
        times = f" {failures} times in a row" if failures > 1 else ""
        return ExperimentError(
            f"the connection to the text {name!r} broke{times} ({found}): try again when the "
            "network is back"
        )
    if isinstance(error, UnicodeDecodeError):
        return ExperimentError(
            f"the text {name!r} must be UTF-8, but is not ({error}): convert it"
        )
    return ExperimentError(
        f"the text {name!r} must be a data set with whole files, but can't be read "
        f"({found}: {first_line(error)}): check its name, and fetch its files again"
    )


@contextlib.contextmanager
def text_errors(name: str) -> Iterator[None]:
    """Makes what reading a text raises an ExperimentError."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        raise text_error(name, error) from error


@contextlib.contextmanager
def corpus_errors() -> Iterator[None]:
    """Makes what built-in corpora raise an ExperimentError: its messages are whole sentences."""
    from tinylm.corpus import CorpusError

    try:
        yield
    except CorpusError as error:
        raise ExperimentError(str(error)) from error


class ReadAhead:
    """The items of an iterator, made in a thread before they are asked for.

    Args:
        items: runs in the thread; what it raises is raised where the next item is asked for.
        ahead: items that are made ahead at most.
    """

    def __init__(self, items: Iterator[Any], ahead: int) -> None:
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items,), name="text", daemon=True)
        self._thread.start()

    def _make(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._ready.put((item, None))
                if self._over.is_set():
                    return
        except BaseException as error:
            self._ready.put((None, error))

    def __next__(self) -> Any:
        item, error = self._ready.get()
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
            self._thread.join(0.05)


class TokenStream:
    """Packs texts into contexts of token ids: BOS, then text; BOS also stands between two texts.

    Where there is no BOS token (see `harness.tokenizer`) it is text alone. It holds no padding. A
    corpus that runs out starts again, with a line that says so after 1, 2, 4, 8, … times. Texts are
    read and tokenized ahead, so that the language model needn't wait.

    Args:
        texts: starts an iterator over the corpus.
        tokenizer: prepared by `prepare_tokenizer`.
        context: tokens per context, L.
        ahead: batches of 32 texts that are read ahead at most.
    """

    def __init__(
        self,
        texts: Callable[[], Iterator[str]],
        tokenizer: Any,
        context: int,
        ahead: int = 64,
    ) -> None:
        self.texts, self.tokenizer, self.context, self.ahead = texts, tokenizer, context, ahead
        self.epoch = 0
        self.n_texts = 0  # of this epoch, in what was handed out or is pending
        self._pending: list[int] = []
        self._reader: ReadAhead | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for `load_state_dict` of a new one on the same texts."""
        pending = torch.tensor(self._pending, dtype=torch.int64)
        return {"epoch": self.epoch, "n_texts": self.n_texts, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another stream stood. To be called before the first contexts are taken."""
        self.epoch, self.n_texts = state["epoch"], state["n_texts"]
        self._pending = state["pending"].tolist()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        if self._reader is not None:
            self._reader.close()

    def contexts(self, n: int) -> Tensor:
        """The next n contexts, (n, L) int64, the corpus in its own order.

        Of several ranks the first reads the text, and the others get them from it.
        """
        return RANKS.by_first(self._contexts, n)

    def _contexts(self, n: int) -> Tensor:
        bos = self.tokenizer.bos_token_id
        width = self.context - (bos is not None)
        rows = torch.full((n, self.context), bos or 0)
        start = 0
        for row in range(n):
            while len(self._pending) - start < width + 1:
                del self._pending[:start]
                start = 0
                self._take_texts()
            start += self._pending[start] == bos  # the context's own BOS separates already
            rows[row, -width:] = torch.tensor(self._pending[start : start + width])
            start += width
        del self._pending[:start]
        return rows

    def _take_texts(self) -> None:
        """Adds the next texts to the end of what is pending."""
        if self._reader is None:
            self._reader = ReadAhead(self._tokenized(skip=self.n_texts), self.ahead)
        try:
            ids, n_texts = next(self._reader)
        except BaseException:
            self._reader = None  # another try reads anew from here
            raise
        self._pending += ids
        self.n_texts += n_texts
        if not n_texts:
            self.epoch += 1
            self.n_texts = 0
            if self.epoch & (self.epoch - 1) == 0:
                times = "once" if self.epoch == 1 else f"{self.epoch} times"
                print_line(f"training text: all of it used {times}, starting again")

    def _tokenized(self, skip: int, n_texts: int = 32) -> Iterator[tuple[list[int], int]]:
        """Token ids of the next texts and their number, from `skip` on; ([], 0) at each end."""
        bos = self.tokenizer.bos_token_id
        begin = () if bos is None else (bos,)
        while True:
            texts = iter(self.texts())
            some = sum(1 for _ in itertools.islice(texts, skip))
            skip = 0
            while batch := list(itertools.islice(texts, n_texts)):
                ids = self.tokenizer(batch, add_special_tokens=False)["input_ids"]
                yield [token for text in ids if text for token in (*begin, *text)], len(batch)
                some += sum(map(bool, ids))
            if not some:
                raise ExperimentError("the training text holds no text: check training_text")
            yield [], 0
