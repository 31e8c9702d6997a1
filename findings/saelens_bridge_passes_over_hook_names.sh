#!/usr/bin/env bash
# sae-lens 6.54.12 with transformer-lens 3.9.0: SAETransformerBridge, made from TransformerBridge to run SAEs inside a model, doesn't know
# a residual stream by the name that the bridge beneath it, SAELens' own configurations and most code have for it,
# blocks.L.hook_resid_post: a hook that is put there by `hooks` or `run_with_hooks` never runs, and `run_with_cache` returns an empty
# cache. Nothing is said. By blocks.L.hook_out the same point is found.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 \
  sae-lens==6.54.12 datasets==3.6.0 pandas==2.3.3 pyarrow==21.0.0 i2==0.1.91 dol==0.3.100 py2store==0.1.24 \
  graze==0.1.46 babe==0.0.7 config2py==0.1.76 beartype==0.14.1 jaxtyping==0.3.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - "$folder/tokenizer" 2> "$folder/err" <<'PY' || { cat "$folder/err"; exit 1; }
import importlib.metadata
import sys

import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "one", "two"])}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(sys.argv[1])
tokens, found = torch.tensor([[0, 3, 4, 3]]), {}
for kind in (TransformerBridge, SAETransformerBridge):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.config.architectures = ["GPT2LMHeadModel"]
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], add_bos_token=True)
    bridge = kind.boot_transformers("mine", hf_model=model, tokenizer=tokenizer, device="cpu")
    for name in ("blocks.0.hook_resid_post", "blocks.0.hook_out"):
        ran = []
        note = [(name, lambda x, hook: ran.append(hook))]
        with torch.no_grad():
            bridge.run_with_hooks(tokens, fwd_hooks=note)
            with bridge.hooks(fwd_hooks=note):
                bridge(tokens)
            _, cache = bridge.run_with_cache(tokens, names_filter=[name])
        found[kind.__name__, name] = len(ran), name in cache
print(*(importlib.metadata.version(name) for name in ("sae-lens", "transformer-lens")))
for (kind, name), (n, cached) in found.items():
    print(f"{kind}, {name}: a hook runs {n} times in two passes; it is in the cache: {cached}")
assert list(found.values()) == [(2, True), (2, True), (0, False), (2, True)]
PY
