"""Labelled passages for sparse probing: the label is where in the corpus a passage stands.

    python tinylm/tasks.py            the tasks, their classes and how many passages there are
    python tinylm/tasks.py --check    the language model's probes against an untrained SAE's

All passages are of the manifest's probing files, which the language model was not trained on; train
passages are of its probe_train files, test passages of its probe_test files. Only --check needs
torch.
"""

import argparse
import ast
import functools
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinylm import corpus  # noqa: E402

MIN_CHARS, MAX_CHARS = 300, 480  # of a passage: about 128 tokens, where SAE-Bench cuts
MAX_PER_FILE = 60  # passages of one file, so that no file is most of a class


class Class(NamedTuple):
    """A class of a task: which files, and which part of them."""

    paths: str  # regular expression, matched at the start of the path
    part: str = "any"  # any, code, docstring or comment


TEST = r"(?:.*/)?tests?/"
LIBRARY = r"(?!.*tests?[/_])"
CODE_OF = r"(?:pandas|scipy|sympy|sklearn|statsmodels|networkx|numpy|matplotlib|nltk)/"
TASKS: dict[str, dict[str, Class]] = {
    "package": {
        "sympy": Class("sympy/"), "pandas": Class("pandas/"), "scipy": Class("scipy/"),
        "matplotlib": Class("matplotlib/")},
    "docstring_package": {
        "sympy": Class("sympy/", "docstring"), "scipy": Class("scipy/", "docstring"),
        "sklearn": Class("sklearn/", "docstring")},
    "test_package": {
        "sympy": Class("sympy/" + TEST), "pandas": Class("pandas/" + TEST),
        "scipy": Class("scipy/" + TEST)},
    "code_docstring_comment": {
        "code": Class("", "code"), "docstring": Class("", "docstring"),
        "comment": Class("", "comment")},
    "scipy_field": {
        "stats": Class("scipy/stats/"), "optimize": Class("scipy/optimize/"),
        "linalg": Class("scipy/(?:linalg|sparse)/")},
    "subject": {
        "statistics": Class("(?:scipy/stats|sympy/stats|statsmodels/(?:stats|distributions))/"),
        "linear_algebra": Class("(?:scipy/linalg|scipy/sparse|sympy/matrices|numpy/linalg)/"),
        "plotting": Class("(?:matplotlib|seaborn|plotly|pandas/plotting|pandas/tests/plotting"
                          "|sympy/plotting|statsmodels/graphics)/")},
    # In neither set; README.md says why.
    "test_or_library": {
        "test": Class(CODE_OF + TEST, "code"), "library": Class(CODE_OF + LIBRARY, "code")},
    "sympy_field": {
        "polys": Class("sympy/polys/"), "physics": Class("sympy/physics/"),
        "functions": Class("sympy/(?:functions|core|assumptions)/")},
    "statsmodels_field": {
        "tsa": Class("statsmodels/tsa/"), "stats": Class("statsmodels/stats/"),
        "models": Class("statsmodels/(?:regression|genmod|discrete|base|robust|gam)/")},
}
CLASSES = {name: tuple(classes) for name, classes in TASKS.items()}
# A is for choosing (settings, variants), B for reporting: decide on A, then report B.
TASK_SETS: dict[str, tuple[str, ...]] = {
    "A": ("package", "code_docstring_comment", "scipy_field"),
    "B": ("test_package", "docstring_package", "subject"),
}

# Not in a passage: imports, licences and authors, and the packages' own names, which give the label
# away without a language model.
IMPORT = re.compile(r"^\s*(?:>>> |\.\.\. )?(?:import|from)\s+[\w.]+")
TELLING = re.compile(r"licen[sc]e|copyright|authors?:|\b(?:sympy|scipy|pandas|matplotlib|seaborn|"
                     r"plotly|statsmodels|sklearn|scikit-learn|networkx|numpy|nltk)\b|https?://",
                     re.I)


@functools.lru_cache(maxsize=512)
def _parts(text: str) -> list[str]:
    """For each line of a Python file: code, docstring or comment ("" for a line that is blank)."""
    lines = text.split("\n")
    # Not splitlines(): a form feed starts no line for ast.
    part = ["comment" if line.lstrip().startswith("#") else "code" if line.strip() else ""
            for line in lines]
    nodes = list(ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for i in range(node.lineno - 1, min(node.end_lineno, len(lines))):
                part[i] = "code"  # a number sign within a string starts no comment
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                    and isinstance(first.value.value, str)):
                for i in range(first.lineno - 1, min(first.end_lineno, len(lines))):
                    part[i] = "docstring"
    return part


def _blocks(text: str, part: str) -> Iterator[list[str]]:
    """Runs of lines of one part of a file, ended by imports; comments lose their number sign."""
    lines = text.split("\n")
    parts = _parts(text) if part != "any" else ["any"] * len(lines)
    block: list[str] = []
    for line, kind in zip(lines, parts, strict=True):
        if IMPORT.match(line) or (kind not in (part, "") and part != "comment"):
            yield block
            block = []
        elif kind == part == "comment":
            # Comments are short: those of a file are read on as one text.
            block.append(line.lstrip().lstrip("#!:").removeprefix(" "))
        elif kind == part == "docstring":
            block.append(line.replace('"""', "").replace("'''", ""))
        elif kind == part or (kind == "" and part != "comment"):
            block.append(line)
    yield block


def passages(text: str, part: str) -> list[str]:
    """Disjoint passages of 300 to 480 characters, whole lines, of one part of a file."""
    found = []
    for block in _blocks(text, part):
        passage = ""
        for line in block:
            if TELLING.search(line) or len(line) > MAX_CHARS:
                passage = ""
                continue
            if len(passage) + len(line) + 1 > MAX_CHARS:
                if len(passage) >= MIN_CHARS:
                    found.append(passage)
                passage = ""
            if passage or line.strip():
                passage += line + "\n"
        if len(passage) >= MIN_CHARS:
            found.append(passage)
    return [p.rstrip() for p in found if len(p.rstrip()) >= MIN_CHARS]


@functools.cache
def _files(split: str) -> list[tuple[str, str]]:
    return [(entry.path, text) for entry, text in corpus.files(split)]


def _draw(kind: Class, split: str, seed: int, n: int | None = None) -> list[str]:
    """Passages of a class in random order, a first one of each file before any second one.

    With n, files are opened until they hold 3 n passages. Classes that differ in the part only
    (code or docstring) open the same files, so that the file says nothing about the class.
    """
    # A string seeds random.Random by its SHA-512: the same on every machine.
    rng = random.Random(f"{seed} {split}")
    texts = [text for path, text in _files(split) if re.match(kind.paths, path)]
    rng.shuffle(texts)
    by_file: list[list[str]] = []
    for text in texts:
        if n is not None and sum(map(len, by_file)) >= 3 * n:
            break
        of_file = passages(text, kind.part)
        rng.shuffle(of_file)
        by_file.append(of_file[:MAX_PER_FILE])
    rounds = max(map(len, by_file), default=0)
    drawn = [of_file[i] for i in range(rounds) for of_file in by_file if i < len(of_file)]
    return list(dict.fromkeys(drawn))


def load_task(name: str, n_train: int, n_test: int,
              seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The passages of a task: (train, test), each class label -> list of texts.

    Args:
        name: a key of TASKS.
        n_train, n_test: what SAE-Bench calls train_set_size and test_set_size, the passages of one
            one-against-the-rest probe: each class gets n // 2.
        seed: decides which passages are drawn, and their order.

    Raises:
        ValueError: no such task.
        corpus.CorpusError: there are not so many passages, or the packages are not those of the
            manifest.
    """
    if name not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, found {name!r}: choose one of "
                         "these")
    sets = []
    for split, n in (("probe_train", n_train), ("probe_test", n_test)):
        n_class = n // 2
        texts = {}
        for label, kind in TASKS[name].items():
            drawn = _draw(kind, split, seed, n_class)
            if not 1 <= n_class <= len(drawn):
                raise corpus.CorpusError(
                    f"expected 1 to {len(drawn)} {split} passages of class {label} of the task "
                    f"{name}, found a demand for {n_class}: set the size of this split to 2 to "
                    f"{2 * len(drawn)}, twice the passages per class")
            texts[label] = drawn[:n_class]
        sets.append(texts)
    return sets[0], sets[1]


def print_counts() -> None:
    """Prints each task's classes with their files and passages, in Markdown."""
    print("| task | class | train: files, passages | test: files, passages |")
    print("| --- | --- | --- | --- |")
    for name, classes in TASKS.items():
        for label, kind in classes.items():
            cells = []
            for split in ("probe_train", "probe_test"):
                n_files = sum(bool(re.match(kind.paths, path)) for path, _ in _files(split))
                cells.append(f"{n_files}, {len(_draw(kind, split, 0))}")
            print(f"| {name} | {label} | " + " | ".join(cells) + " |")


# ---- is a task fit for use? ----------------------------------------------------------------------


def residual_means(hf, tokenizer, texts: list[str], layers: tuple[int, ...],
                   encoders: dict | None = None) -> dict:
    """Mean over tokens, as SAE-Bench takes it, of the residual stream and of SAE features.

    Args:
        hf: a Hugging Face model. Its last block's output is not to be had: it is normed.
        layers: L for blocks.L.hook_resid_post, which is hidden_states[L + 1].
        encoders: layer -> function from activations (N, D) to features (N, F).

    Returns:
        {("llm", layer): (B, D), ("sae", layer): (B, F)}, without BOS and padding.
    """
    import torch

    found: dict = {}
    for i in range(0, len(texts), 32):
        batch = tokenizer(texts[i:i + 32], padding=True, truncation=True, max_length=128,
                          return_tensors="pt")
        with torch.no_grad():
            hidden = hf.model(**batch, output_hidden_states=True).hidden_states
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        mask = ~torch.isin(batch["input_ids"], torch.tensor(special))
        for layer in layers:
            x_BLD = hidden[layer + 1].float()
            kinds = {"llm": x_BLD}
            if encoders is not None:
                kinds["sae"] = encoders[layer](x_BLD.flatten(0, 1)).view(*mask.shape, -1)
            for kind, acts in kinds.items():
                mean = (acts * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                found.setdefault((kind, layer), []).append(mean)
    return {key: torch.cat(parts) for key, parts in found.items()}


def untrained_encoder(mean_D, d_sae: int = 1024, k: int = 16, seed: int = 0):
    """TopK SAE with unit-norm random rows, b_dec the mean activation: x (N, D) -> f (N, F)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, len(mean_D), generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)

    def encode(x_ND):
        pre = torch.relu((x_ND - mean_D) @ rows.T)
        top = pre.topk(k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    return encode


def print_margins(hf, tokenizer, heldout: list[str], tasks: dict, layers: tuple[int, ...],
                  d_sae: int = 1024, k: int = 16) -> None:
    """Prints, per task and mean over the layers, the accuracy of SAE-Bench's probes, in Markdown.

    Args:
        hf, layers: see `residual_means`. heldout: texts that give the untrained SAE its b_dec.
        tasks: by name, a function that gives its train and its test texts, as `load_task` does.
        d_sae, k: the untrained SAE's width and L0.
    """
    import contextlib
    import os
    import warnings

    import torch
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    means = residual_means(hf, tokenizer, heldout, layers)
    encoders = {layer: untrained_encoder(means["llm", layer].mean(0), d_sae, k) for layer in layers}
    print("| task | LM, all | LM, best 5 | untrained SAE, best 5 | margin (least of the layers) |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name, load in tasks.items():
        sets = [{label: residual_means(hf, tokenizer, texts, layers, encoders)
                 for label, texts in texts_of.items()}
                for texts_of in load()]
        rows = []
        torch.manual_seed(42)
        for layer in layers:
            llm = [{label: acts["llm", layer] for label, acts in s.items()} for s in sets]
            sae = [{label: acts["sae", layer] for label, acts in s.items()} for s in sets]
            full = dict(use_sklearn=False, batch_size=250, epochs=100, lr=1e-2)
            with (open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink),
                  warnings.catch_warnings()):
                warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, of a keyword
                accuracies = [train_probe_on_activations(*acts, **settings)[1]
                              for acts, settings in ((llm, full), (llm, {"select_top_k": 5}),
                                                     (sae, {"select_top_k": 5}))]
            rows.append([sum(a.values()) / len(a) for a in accuracies])
        all_, best, untrained = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        margin = min(row[0] - row[2] for row in rows)
        print(f"| {name} | {all_:.3f} | {best:.3f} | {untrained:.3f} | "
              f"{all_ - untrained:.3f} ({margin:.3f}) |", flush=True)


def check(model: str, n_train: int, n_test: int, names: list[str]) -> None:
    """`print_margins` of these tasks, at layers 1, 2 and 4 of tinylm."""
    import torch
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    hf = Gemma2ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    heldout = [text[:600] for _, text in zip(range(100), corpus.documents("heldout"), strict=False)]
    tasks = {name: functools.partial(load_task, name, n_train, n_test, seed=42) for name in names}
    print_margins(hf, AutoTokenizer.from_pretrained(model), heldout, tasks, layers=(1, 2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description="The labelled tasks of tinylm.")
    parser.add_argument("--check", action="store_true", help="probe each task")
    parser.add_argument("--model", default=str(corpus.HERE), help="folder of the model to probe")
    parser.add_argument("--n_train", type=int, default=300, help="twice the passages per class")
    parser.add_argument("--n_test", type=int, default=180, help="twice the passages per class")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="only these tasks")
    args = parser.parse_args()
    try:
        if args.check:
            check(args.model, args.n_train, args.n_test, args.tasks)
        else:
            print_counts()
    except corpus.CorpusError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
