#!/usr/bin/env bash
# transformer-lens 3.9.0: TransformerBridge.boot_transformers(…, hf_model=…, tokenizer=…) doesn't use the tokenizer that it is given,
# but loads another from that one's name_or_path, unless its init_kwargs have add_bos_token. Tokens that were added to the first are
# missing in the second, so that the same text has other ids; nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 \
  datasets==3.6.0 pandas==2.3.3 pyarrow==21.0.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - "$folder/tokenizer" 2> "$folder/err" <<'PY' || { cat "$folder/err"; exit 1; }
import importlib.metadata
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformer_lens.model_bridge import TransformerBridge

words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "one", "two"])}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(sys.argv[1])
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2))
model.config.architectures = ["GPT2LMHeadModel"]
found = []
for more in ({}, {"add_bos_token": True}):
    given = AutoTokenizer.from_pretrained(sys.argv[1], **more)
    given.add_tokens(["three"])
    bridge = TransformerBridge.boot_transformers("mine", hf_model=model, tokenizer=given, device="cpu")
    ids = [t("one three", add_special_tokens=False)["input_ids"] for t in (given, bridge.tokenizer)]
    found.append((bridge.tokenizer is given, *ids))
print(importlib.metadata.version("transformer-lens"), found)
assert found == [(False, [3, 5], [3, 2]), (True, [3, 5], [3, 5])]
PY
