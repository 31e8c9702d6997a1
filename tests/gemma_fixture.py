"""What the profile gemma-2-2b reads, without a network: real names and forms, made-up contents.

`write_datasets` makes folders that `datasets.load_dataset` finds by the data sets' real names
when it is called in their parent folder. They have the files, columns, configurations and loading
scripts of the originals, as far as SAE-Bench, SAELens and experiment.py read them.
`write_model` makes a cache of the hub that holds a toy Gemma-2 model as google/gemma-2-2b.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.conftest import toy_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the model's revision in the cache
N_TRAIN, N_TEST = 12, 6  # texts per class and quadrant: enough for probe sizes 40 and 20
GENDERS = ("male", "female")
N_PROFESSIONS = 28
FEW, ONE_SIDED = 8, 23  # a profession with few texts, and one with those of one gender alone
CATEGORIES = (1, 2, 3, 5, 6, 13, 24)  # SAE-Bench probes the first five
NEWS = ("World", "Sports", "Business", "Sci/Tech")
PAIRS = ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt")
EXTENSIONS = {"C": ".c", "C++": ".cpp", "HTML": ".html", "Java": ".java", "PHP": ".php",
              "Python": ".py"}  # fmt: skip

# ------------------------------------------------------------------------------- texts


@functools.cache
def words(theme: str, n: int = 6) -> list[str]:
    """The words of a theme: made up, the same every time."""
    draw = random.Random(theme)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(n)]


def prose(draw: random.Random, *themes: str, n_words: int | None = None) -> str:
    """Sentences of which four words in five are of the themes, and the others common to all."""
    n_words = n_words or draw.randint(5, 40)  # shorter than a context of 32 tokens, or longer
    lists, common = [words(theme) for theme in themes], words("common", 20)
    parts = []
    for at in range(n_words):
        word = draw.choice(draw.choice(lists) if draw.random() < 0.8 else common)
        parts.append(word.capitalize() if at % 9 == 0 else word)
        if at % 9 == 8 or at == n_words - 1:
            parts[-1] += "."
    return " ".join(parts)


def code(draw: random.Random, language: str, n_lines: int = 25) -> str:
    """A file: a licence of 170 characters, which SAE-Bench skips, and lines of calls."""
    own, common = words(language), words("code", 20)
    lines = ["# " + prose(random.Random("licence"), "licence", n_words=60)[:168]]
    for _ in range(n_lines):
        name, call, value = draw.choice(common), draw.choice(own), draw.choice(own)
        lines.append(f"{name} = {call}({value}, {draw.randrange(10)})")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- files


def write_parquet(path: Path, rows: list[dict], shuffled: bool = True) -> None:
    """Rows as a Parquet file, their order drawn at random unless `shuffled` is false."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    if shuffled:
        random.Random(path.name).shuffle(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_card(
    folder: Path, columns: dict[str, list[dict]], rows: dict[str, dict[str, int]], files: str
) -> None:
    """README.md with the configurations, their files, columns and numbers of rows, as on the hub.

    Args:
        columns: {configuration: columns}, a column from `column`.
        rows: {configuration: {split: number of rows}}.
        files: a pattern of files with {config} and {split}.
    """
    card = {
        "configs": [
            {
                "config_name": config,
                "data_files": [
                    {"split": split, "path": files.format(config=config, split=split)}
                    for split in splits
                ],
            }
            for config, splits in rows.items()
        ],
        "dataset_info": [
            {
                "config_name": config,
                "features": columns[config],
                "splits": [{"name": split, "num_examples": n} for split, n in splits.items()],
            }
            for config, splits in rows.items()
        ],
    }
    # JSON is YAML.
    (folder / "README.md").write_text(f"---\n{json.dumps(card, indent=1)}\n---\n\n# Made up\n")


def column(name: str, dtype: object) -> dict:
    return {"name": name, "dtype": dtype}


# ------------------------------------------------------------------------------- data sets


def write_bias_in_bios(folder: Path, text_column: str = "hard_text") -> None:
    """LabHC/bias_in_bios, of which SAE-Bench makes three sets of five professions."""
    n_rows = {}
    for split, n in (("train", N_TRAIN), ("test", N_TEST), ("dev", 1)):
        rows = []
        for profession in range(N_PROFESSIONS):
            for gender, theme in enumerate(GENDERS):
                if profession == ONE_SIDED and gender == 1:
                    continue
                draw = random.Random(f"bios {split} {profession} {gender}")
                rows += [
                    {
                        text_column: prose(draw, f"profession {profession}", theme),
                        "profession": profession,
                        "gender": gender,
                    }
                    for _ in range(2 if profession == FEW else n)
                ]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
        n_rows[split] = len(rows)
    columns = [column(text_column, "string"), column("profession", "int64"),
               column("gender", "int64")]  # fmt: skip
    write_card(folder, {"default": columns}, {"default": n_rows}, "data/{split}-*")


def write_amazon_reviews(folder: Path) -> None:
    """canrager/amazon_reviews_mcauley_1and5, of which SAE-Bench also makes …_sentiment."""
    n_rows = {}
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        rows = []
        for category in CATEGORIES:
            for rating in (1.0, 5.0):
                draw = random.Random(f"amazon {split} {category} {rating}")
                themes = f"category {category}", f"rating {rating}"
                rows += [
                    {
                        "rating": rating,
                        "title": prose(draw, *themes, n_words=4),
                        "text": prose(draw, *themes),
                        "category": category,
                    }
                    for _ in range(n)
                ]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
        n_rows[split] = len(rows)
    columns = [column("rating", "float64"), column("title", "string"), column("text", "string"),
               column("category", "int64")]  # fmt: skip
    write_card(folder, {"default": columns}, {"default": n_rows}, "data/{split}-*")


def write_ag_news(folder: Path, n_train: int = 2 * N_TRAIN) -> None:
    """fancyzhx/ag_news: the labels are classes with names."""
    n_rows = {}
    for split, n in (("train", n_train), ("test", 2 * N_TEST)):
        rows = []
        for label, theme in enumerate(NEWS):
            draw = random.Random(f"news {split} {label}")
            rows += [{"text": prose(draw, theme), "label": label} for _ in range(n)]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
        n_rows[split] = len(rows)
    names = {str(label): name for label, name in enumerate(NEWS)}
    columns = [column("text", "string"), column("label", {"class_label": {"names": names}})]
    write_card(folder, {"default": columns}, {"default": n_rows}, "data/{split}-*")


def write_europarl(folder: Path) -> None:
    """Helsinki-NLP/europarl: a configuration per pair of languages."""
    columns, n_rows = {}, {}
    for pair in PAIRS:
        first, second = pair.split("-")
        draw = random.Random(f"europarl {pair}")
        rows = [
            {"translation": {first: prose(draw, first), second: prose(draw, second)}}
            for _ in range(3 * N_TRAIN)
        ]
        write_parquet(folder / pair / "train-00000-of-00001.parquet", rows)
        languages = {"translation": {"languages": [first, second]}}
        columns[pair], n_rows[pair] = [column("translation", languages)], {"train": len(rows)}
    write_card(folder, columns, n_rows, "{config}/{split}-*")


# As the original: files of all languages, unless the configuration names some.
GITHUB_CODE = """import datasets
import pyarrow as pa
import pyarrow.parquet as pq


class CodeConfig(datasets.BuilderConfig):
    def __init__(self, *args, languages=["all"], **kwargs):
        super().__init__(*args, name="+".join(languages) + "-all", **kwargs)
        self.languages = set(languages)
        # Not of a given `languages`: datasets sets that on the default configuration, made before.
        self.filter_languages = "all" not in languages


class GithubCode(datasets.GeneratorBasedBuilder):
    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = CodeConfig
    BUILDER_CONFIGS = [CodeConfig(languages=[name]) for name in ("all", *EXTENSIONS)]
    DEFAULT_CONFIG_NAME = "all-all"

    def _info(self):
        names = ("code", "repo_name", "path", "language", "license")
        columns = {name: datasets.Value("string") for name in names}
        return datasets.DatasetInfo(
            features=datasets.Features(columns | {"size": datasets.Value("int32")})
        )

    def _split_generators(self, dl_manager):
        names = [f"data/train-{i:05d}-of-{N_FILES:05d}.parquet" for i in range(N_FILES)]
        files = dl_manager.download(names)
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"files": files})]

    def _generate_examples(self, files):
        key = 0
        for file in files:
            with open(file, "rb") as opened:
                for batch in pq.ParquetFile(opened).iter_batches(batch_size=10_000):
                    for row in pa.Table.from_batches([batch]).to_pylist():
                        language = language_of(row["path"])
                        if self.config.filter_languages and language not in self.config.languages:
                            continue
                        code = row.pop("content")
                        yield key, {"code": code, "language": language, **row}
                        key += 1


def language_of(path):
    for language, extension in EXTENSIONS.items():
        if path.endswith(extension):
            return language
"""


def write_github_code(folder: Path) -> None:
    """codeparrot/github-code: a loading script with an option `languages`."""
    n_files = 2
    for number in range(n_files):
        rows = []
        for language, extension in EXTENSIONS.items():
            for at in range(24):
                draw = random.Random(f"github {number} {language} {at}")
                content = code(draw, language, n_lines=2 if at % 6 == 5 else 25)  # some too short
                rows.append({
                    "content": content, "repo_name": f"someone/{words(language)[at % 6]}",
                    "path": f"src/file_{at}{extension}", "license": "mit", "size": len(content),
                })  # fmt: skip
        rows.append(rows[0] | {"path": "src/unknown.xyz"})
        write_parquet(folder / "data" / f"train-{number:05d}-of-{n_files:05d}.parquet", rows)
    constants = f"EXTENSIONS = {EXTENSIONS!r}\nN_FILES = {n_files}\n"
    (folder / "github-code.py").write_text(constants + GITHUB_CODE)


def write_pile(
    folder: Path, texts: Iterable[str] = (), text_column: str = "text", n_shards: int = 30
) -> None:
    """monology/pile-uncopyrighted: shards of JSON lines, compressed, without a configuration."""
    import zstandard

    if not texts:
        draw = random.Random("pile")
        texts = [prose(draw, f"pile {at % 20}", n_words=draw.randint(20, 120)) for at in range(300)]
        texts[7] = "naïve façade, 東京 🙂\n\n" + texts[7]
    shards: dict[str, list[str]] = {f"train/{at:02d}": [] for at in range(n_shards)}
    shards |= {"val": ["validation"], "test": ["test"]}
    for at, text in enumerate(texts):
        shards[f"train/{at % n_shards:02d}"].append(text)
    for name, members in shards.items():
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{text_column: text, "meta": {"pile_set_name": "Made up"}} for text in members]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(zstandard.compress(lines.encode()))


# As the original: archives of compressed archives of text files.
OPENWEBTEXT = """import re

import datasets

FILES = [f"subsets/urlsf_subset{i:02d}.tar" for i in range(N_FILES)]


class Openwebtext(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIGS = [
        datasets.BuilderConfig(name="plain_text", version=datasets.Version("1.0.0"))
    ]

    def _info(self):
        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager):
        archives = [dl_manager.iter_archive(file) for file in dl_manager.download(FILES)]
        kwargs = {"archives": archives, "iter_archive": dl_manager.iter_archive}
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs=kwargs)]

    def _generate_examples(self, archives, iter_archive):
        for archive in archives:
            for outer, compressed in archive:
                if outer.endswith(".xz"):
                    for inner, file in iter_archive(compressed):
                        if inner.endswith(".txt"):
                            text = re.sub("\\n\\n\\n+", "\\n\\n", file.read().decode("utf-8"))
                            yield f"{outer}/{inner}", {"text": text.strip()}
"""


def write_openwebtext(folder: Path, n_files: int = 3) -> None:
    """Skylion007/openwebtext: a loading script and archives within archives."""
    draw = random.Random("web")
    texts = [
        prose(draw, f"web {at % 20}", n_words=draw.randint(40, 120)) + "\n\n\n\n"
        for at in range(150)
    ]
    for number in range(n_files):
        inner = {
            f"{number:07d}-{at:03d}.txt": text.encode()
            for at, text in enumerate(texts[number::n_files])
        }
        path = folder / "subsets" / f"urlsf_subset{number:02d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        outer = {f"openwebtext/urlsf_subset{number:02d}-1_data.xz": archive(inner, "w:xz")}
        path.write_bytes(archive(outer, "w"))
    (folder / "openwebtext.py").write_text(f"N_FILES = {n_files}\n" + OPENWEBTEXT)


def archive(members: dict[str, bytes], mode: str) -> bytes:
    """A tar archive as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


WRITERS = {
    "LabHC/bias_in_bios": write_bias_in_bios,
    "canrager/amazon_reviews_mcauley_1and5": write_amazon_reviews,
    "codeparrot/github-code": write_github_code,
    "fancyzhx/ag_news": write_ag_news,
    "Helsinki-NLP/europarl": write_europarl,
    "monology/pile-uncopyrighted": write_pile,
    "Skylion007/openwebtext": write_openwebtext,
}


def write_datasets(folder: Path) -> None:
    """Every data set that the profile reads, under its name in `folder`."""
    for name, write in WRITERS.items():
        write(folder / name)


# ------------------------------------------------------------------------------- the model


def write_model(hf_home: Path, n_layers: int = 20) -> Path:
    """google/gemma-2-2b in the cache of HF_HOME: Gemma's tokenizer and architecture, toy sizes.

    Like the original, the tokenizer adds BOS and pads on the left.

    Returns:
        the folder of its files.
    """
    import torch
    from transformers import Gemma2ForCausalLM

    repository = hf_home / "hub" / "models--google--gemma-2-2b"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    vocab_size = write_tokenizer(folder)
    torch.manual_seed(0)
    config = toy_config(vocab_size, n_layers)
    model = Gemma2ForCausalLM(config)
    for block in model.model.layers:  # small steps: deep layers still tell one token from another
        block.post_attention_layernorm.weight.data.fill_(-0.8)  # the factor is 1 + weight
        block.post_feedforward_layernorm.weight.data.fill_(-0.8)
    model.save_pretrained(folder, max_shard_size="400KB")
    return folder


def write_tokenizer(folder: Path) -> int:
    """A GemmaTokenizer trained on texts of `write_datasets`; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    draw = random.Random("tokenizer")
    themes = ["common", *NEWS, *GENDERS, "en", "fr", *EXTENSIONS]
    texts = [prose(draw, theme, n_words=200) for theme in themes]
    texts += [code(draw, language) for language in EXTENSIONS]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    # Between words for training alone: merges don't cross spaces, as in the original.
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
