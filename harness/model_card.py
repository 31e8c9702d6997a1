"""The card of a published run: README.md, as the Hugging Face hub shows it.

What it says is read from the run's records and from its SAEs as SAELens stores them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from harness.verdict import PRIMARY, SELECTING, with_current_names

CORE = {  # the table's columns: metric, heading, digits
    "l0": ("L0", 1), "fvu": ("FVU", 3), "ce_loss_score": ("CE loss score", 3),
    "dead_fraction": ("dead", 3),
}  # fmt: skip
READERS = {"sae": "SAE", "untrained": "untrained SAE", "llm": "language model"}
BEST = (1, 2, 5)
SELECTED = {  # by SAELens' architecture: what S holds
    "topk": "the k largest features of a token", "jumprelu": "the features above a threshold",
    "standard": "all active features",
}  # fmt: skip
OF_SAELENS = {  # by the setting `trainer`
    "standard": "a standard SAE with an L1 penalty", "topk": "TopK", "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "Matryoshka BatchTopK", "gated": "a gated SAE",
    "jumprelu": "JumpReLU with a step loss",
    "jumprelu_tanh": "JumpReLU with Anthropic's tanh loss",
}  # fmt: skip


class Source(NamedTuple):
    """A language model, as others get it.

    name: cfg.json's model_name. hub: its name on the hub, or None. licence: the hub's identifier,
    or None where it isn't known. load: what its name or folder is, as a Python expression.
    note: sentences for the card, or "".
    """

    name: str
    hub: str | None
    licence: str | None
    load: str
    note: str = ""


class Published(NamedTuple):
    """What a card tells of.

    name: the run's. repo: the hub's. config, info: config.json and final_info.json.
    saes: cfg.json of each SAE, by its sub-folder. texts: what the settings' texts are, by setting,
    in words or by the hub's name; probe_sets likewise. public, warnings: all settings under their
    names of now, and the run's warnings, as all may read them. form: "saelens" or "sparsify".
    """

    name: str
    repo: str
    source: Source
    config: dict[str, Any]
    info: dict[str, Any]
    saes: dict[str, dict[str, Any]]
    texts: dict[str, str]
    probe_sets: list[str]
    public: dict[str, Any]
    warnings: list[str]
    form: str = "saelens"

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings under their names of now."""
        return with_current_names(self.config["settings"])

    @property
    def architecture(self) -> str:
        """SAELens' name of the SAEs' form."""
        return next(iter(self.saes.values()))["architecture"]


def card(run: Published) -> str:
    """README.md: front matter and text."""
    text = run.texts["training_text"]
    front = ModelCardData(
        library_name=run.form, license=run.source.licence, base_model=run.source.hub,
        datasets=[text] if text == run.settings["training_text"] else None,  # a name on the hub
        tags=["sparse-autoencoder", "interpretability", run.form, run.architecture],
    )  # fmt: skip
    use = loading_by_sparsify(run) if run.form == "sparsify" else loading(run)
    parts = (
        f"---\n{front.to_yaml()}\n---", heading(run), use, figures(run), measured(run),
        method(run), data(run), origin(run), listed_warnings(run), all_settings(run),
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def listed(items: Sequence[Any]) -> str:
    """1, 2 and 4."""
    words = [str(item) for item in items]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def heading(run: Published) -> str:
    s, cfg = run.settings, next(iter(run.saes.values()))
    hook = cfg["metadata"]["hook_name"].split("hook_")[-1]
    layers, seeds = listed(s["layers"]), listed(s["seeds"])
    note = f"\n\n{run.source.note}" if run.source.note else ""
    model = run.source.name.split(" (")[0]
    where = f"{cfg['d_in']} dimensions at `blocks.L.hook_{hook}`"
    form, place = f"SAELens' form `{run.architecture}`", "layer_L/seed_S"
    if run.form == "sparsify":
        seed, _, module = next(iter(run.saes)).rpartition("/")
        place = f"{'seed_S/' if seed else ''}{module.rpartition('.')[0]}.L"
        form = "the form of EleutherAI's sparsify"
    return (
        f"# {run.name}: sparse autoencoders on {model}\n\n"
        f"{len(run.saes)} sparse autoencoders (SAEs) of {cfg['d_sae']:,} features each, in "
        f"{form}. They read {where}: "
        f"layers L = {layers}, with seed{'s' * (len(s['seeds']) > 1)} S = {seeds}. Each lies in "
        f"`{place}`. The run's own description: {run.public['description']}.{note}"
    )


def loading(run: Published) -> str:
    """Lines that load an SAE with its language model, and that change a feature."""
    first = int(run.settings.get("first_positions", 1))
    skipped = "position" if first == 1 else f"{first} positions"
    name, download = next(iter(run.saes)), ""
    if "snapshot_download" in run.source.load:
        download = "from huggingface_hub import snapshot_download\n"
    return f"""## Use

With sae-lens {run.config["versions"]["sae-lens"]} and transformer-lens \
{run.config["versions"]["transformer-lens"]}. Load an SAE and its language model:

```python
{download}from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge

sae = SAE.from_pretrained("{run.repo}", "{name}")
lm = TransformerBridge.boot_transformers(
    {run.source.load}, device="cpu"
)
```

Read the features of a text:

```python
tokens = lm.to_tokens("A text to look at")
hook = sae.cfg.metadata.hook_name
logits, cache = lm.run_with_cache(tokens, names_filter=[hook])
features = sae.encode(cache[hook])  # (1, tokens, {next(iter(run.saes.values()))["d_sae"]})
```

Steer with a feature: add its direction to the activations.

```python
feature = int(features[0, {first}:].sum(0).argmax())
strength = cache[hook][0, {first}:].norm(dim=-1).mean() / 2
steer = lambda x, hook: x + strength * sae.W_dec[feature]
with lm.hooks(fwd_hooks=[(hook, steer)]):
    steered = lm(tokens)
```

Ablate a feature: take away what it alone adds to the reconstruction.

```python
ablate = lambda x, hook: x - sae.encode(x)[..., feature, None] * sae.W_dec[feature]
with lm.hooks(fwd_hooks=[(hook, ablate)]):
    ablated = lm(tokens)
```

Activations are taken as they are, in raw units. The first {skipped} of a context, BOS, EOS and \
padding were left out in training: features mean nothing there."""


def loading_by_sparsify(run: Published) -> str:
    """Lines that load an SAE by sparsify with its language model, and read the features."""
    first, name = int(run.settings.get("first_positions", 1)), next(iter(run.saes))
    skipped = "position" if first == 1 else f"{first} positions"
    return f"""## Use

With eai-sparsify 1.3.3 and transformers. Load an SAE and its language model:

```python
import torch
from sparsify import SparseCoder
from transformers import AutoModelForCausalLM, AutoTokenizer

sae = SparseCoder.load_from_hub("{run.repo}", "{name}")
model = AutoModelForCausalLM.from_pretrained({run.source.load})
tokenizer = AutoTokenizer.from_pretrained({run.source.load})
```

Read the features of a text: of each token the values of its k features, and which they are.

```python
tokens, seen = tokenizer("A text to look at", return_tensors="pt").input_ids, {{}}
module = model.base_model.get_submodule("{name.rpartition("/")[2]}")
module.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
logits = model(tokens).logits
values, features, _ = sae.encode(seen["x"])
```

Activations are taken as they are, in raw units. The first {skipped} of a context, BOS, EOS and \
padding were left out in training: features mean nothing there."""


def shown(entry: dict[str, Any], metric: str, digits: int) -> str:
    """A figure as the card has it: the mean, with its standard error where there are seeds.

    The language model's own figures have none.
    """
    if metric not in entry["means"]:
        return "–"
    value = f"{entry['means'][metric]:.{digits}f}"
    several = len(entry["final_info_dict"][metric]) > 1 and not metric.startswith("llm_")
    return f"{value} ± {entry['stderrs'][metric]:.{digits}f}" if several else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(run: Published) -> str:
    """The tables of metrics, a row per layer."""
    layers = {f"{layer}": run.info[f"layer_{layer}"] for layer in run.settings["layers"]}
    n = len(run.settings["seeds"])
    core = [
        [layer, *(shown(entry, metric, digits) for metric, (_, digits) in CORE.items())]
        for layer, entry in layers.items()
    ]
    probing = [
        [layer, words, *(shown(entry, f"{who}_top_{k}_test_accuracy", 3) for k in BEST)]
        for layer, entry in layers.items() for who, words in READERS.items()
    ]  # fmt: skip
    seeds = f"The mean over {n} seeds, ± its standard error."
    if n == 1:
        seeds = "One seed, so there are no standard errors."
    return "\n\n".join((
        "## Figures", seeds,
        table(["layer", *(title for title, _ in CORE.values())], core),
        table(["layer", "probe reads", *(f"best {k}" for k in BEST)], probing),
        "The mean over layers of best 1, best 2 and best 5 of the SAE: "
        f"{shown(run.info['verdict'], PRIMARY, 4)}.",
    ))  # fmt: skip


def measured(run: Published) -> str:
    """What each figure is, and on how much text."""
    s, means = run.settings, run.info[f"layer_{run.settings['layers'][0]}"]["means"]
    bench = f"SAE-Bench {run.config['versions']['sae-bench']}"
    rebuilt, sparse = (
        f"{int(means[f'total_tokens_eval_{part}']):,}"
        for part in ("reconstruction", "sparsity_variance")
    )
    return f"""## How they were measured

- **L0** is the number of active features per token, in the mean. {bench}, core: {sparse} tokens \
of {run.texts["core_text"]}.
- **FVU** is the fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², on the same tokens: 0 \
is perfect, 1 a constant prediction. It is 1 − SAELens' explained variance, not 1 − SAE-Bench's.
- **CE loss score** is 1 where the language model predicts as well from the reconstruction, and 0 \
where it does as with zeros in its place. {bench}, core: {rebuilt} tokens of the same text.
- **dead** is the part of the features that reconstructed nothing for the last \
{s["dead_feature_window"]:,} tokens of training.
- **best k** is the test accuracy of a linear probe that reads k features, or k dimensions of the \
language model: those whose means differ most between a class and the others. It is the mean over \
classes and data sets. {bench}, sparse probing: {listed(run.probe_sets)}; {s["probe_train"]} texts \
to train a probe and {s["probe_test"]} to test it.
- The **untrained SAE** was never trained, and has the same width and L0.

The numbers of tokens are of those that were read. BOS, padding and the first positions of a \
context are among them, and enter no figure."""


def method_of_saelens(run: Published) -> str:
    """The method of a run with one of SAELens' trainers."""
    s = run.settings
    given = s["sparsity_coefficient"]
    if s["trainer"] in SELECTING:
        sparsity = f"k = {s['k_min']}"
    elif isinstance(given, list):
        sparsity = f"sparsity coefficients by layer: {listed(given)}"
    else:
        sparsity = f"sparsity coefficient {given or 'as SAELens has it'}"
    if s["density_penalty"]:
        sparsity += f", with an L1 penalty on features that fire often ({s['density_penalty']})"
    return f"""## Method

1. Trained by SAELens' own trainer: {OF_SAELENS[s["trainer"]]}, {sparsity}. Stored in \
the form `{run.architecture}`, for raw activations, with rows of W_dec of unit norm.
2. Adam, learning rate {s["lr"]:g}, {s["batch"]} tokens per step.
3. docs/method.md of the project, at the commit below, says what else was set. It holds as far as \
`experiment.py` was not changed."""


def method(run: Published) -> str:
    """The method in four lines, as the settings have it."""
    s = run.settings
    if s.get("trainer") in OF_SAELENS:
        return method_of_saelens(run)
    learned = [name for name in ("tau_sel", "tau_pen", "gamma") if s.get(name) is None]
    learned = [] if s.get("constants_from_run") else learned
    loss = "the mean squared error"
    if s.get("loss_variant") == "as_written":
        loss = "the mean norm of the error, with a penalty on all features"
    elif s.get("gamma") != 0:
        penalised = "active features that are not in S"
        if run.architecture == "standard":  # no selection
            penalised = "all active features but a token's strongest"
        loss += f", with a penalty on {penalised}"
    if s.get("density_penalty"):
        loss += f", with an L1 penalty on features in S that fire often ({s['density_penalty']})"
    k = f", k = {s['k_min']}" if run.architecture == "topk" else ""
    if run.architecture == "jumprelu":
        k = f", which training moves so that L0 is near {s['k_min']}"
    elif s.get("activation") == "relu" and "gamma" in learned:
        k = f", and training moves `gamma` so that L0 is near {s['k_min']}"
    names = f" Learned with it: {listed([f'`{name}`' for name in learned])}." if learned else ""
    again = "brought back" if s.get("resample") else "left as they are"
    return f"""## Method

1. f = ReLU((x − b_dec) W_enc + b_enc) and x̂ = Σ_{{i ∈ S}} f_i W_dec[i] + b_dec, with rows of \
W_dec of unit norm. S holds {SELECTED.get(run.architecture, "the selected features")}{k}.
2. The loss is {loss}.{names}
3. Adam, learning rate {s["lr"]:g}, {s["batch"]} tokens per step. Dead features are {again}.
4. The equations are in docs/method.md of the project, at the commit below. They hold as far as \
`experiment.py` was not changed."""


def data(run: Published) -> str:
    """What the SAEs were trained on."""
    means = run.info[f"layer_{run.settings['layers'][0]}"]["means"]
    metadata = next(iter(run.saes.values()))["metadata"]
    begins = "that begin with BOS" if metadata["prepend_bos"] else "without BOS"
    return f"""## Data

Trained on {int(means["training_tokens"]):,} tokens of {run.texts["training_text"]}, in contexts \
of {run.settings["context"]} tokens {begins}, with the matrix products of language model and SAE \
in {run.config["train_dtype"]}. The figures are of the language model in \
{run.settings["lm_dtype"]}. None of that text is in this repository."""


def origin(run: Published) -> str:
    """Which code and which versions made it."""
    git = run.config.get("git", {})
    commit = f"commit `{git['commit']}`" if git.get("commit") else "no commit: there was no git"
    changed = ", with changes that are in no commit" if git.get("commit") and git["dirty"] else ""
    packages = ("torch", "transformers", "sae-lens", "sae-bench", "transformer-lens")
    versions = {name: run.config["versions"][name] for name in packages}
    licence = f"{run.source.licence}, that of the language model"
    if run.source.licence is None:
        licence = "not stated; look up that of the language model"
    return f"""## Origin

- Project: parametric contrastive sparse autoencoders, {commit}{changed}.
- `experiment.py` has the SHA-256 `{run.config["sha256"]["experiment.py"]}`.
- Made with {", ".join(f"{name} {version}" for name, version in versions.items())}, on \
{run.config["device"]}.
- Licence: {licence}."""


def listed_warnings(run: Published) -> str:
    """The run's own warnings."""
    lines = [f"- {warning}" for warning in run.warnings] or ["None."]
    return "## Warnings of the run\n\n" + "\n".join(lines)


def all_settings(run: Published) -> str:
    """Every setting, as JSON, so that the run can be made again."""
    lines = [f"  {json.dumps(field)}: {json.dumps(value, ensure_ascii=False)}"
             for field, value in run.public.items()]  # fmt: skip
    return "## Settings\n\n```json\n{\n" + ",\n".join(lines) + "\n}\n```"
