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
        zeros = [(name, lambda x, hook: torch.zeros_like(x))]
        with torch.no_grad():
            plain, by_hooks = bridge(tokens), bridge.run_with_hooks(tokens, fwd_hooks=zeros)
            with bridge.hooks(fwd_hooks=zeros):
                in_context = bridge(tokens)
            _, cache = bridge.run_with_cache(tokens, names_filter=[name])
        moved = [not torch.equal(plain, other) for other in (by_hooks, in_context)]
        found[kind.__name__, name] = (*moved, len(cache.keys()))
print(*(importlib.metadata.version(name) for name in ("sae-lens", "transformer-lens")))
for (kind, name), (by_hooks, in_context, cached) in found.items():
    print(f"{kind}, {name}: a hook moves the logits {by_hooks}, {in_context}; {cached} in the cache")
assert list(found.values()) == [(True, True, 1), (True, True, 1), (False, False, 0), (True, True, 1)]
PY
