#!/usr/bin/env bash
# transformers 5.23.0: of a saved Gemma 3 that sees, AutoModelForCausalLM.from_pretrained(folder, config=its text_config) gives a
# language model with random weights: nothing is raised. The names in the file begin with "language_model.", and are not mapped.
# output_loading_info names them all as missing. Without config= the weights are those of the file, in the model that sees.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - "$folder/model" 2> "$folder/err" <<'PY' || { cat "$folder/err"; exit 1; }
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

text = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16)
vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
whole.save_pretrained(sys.argv[1])


def first_weight(model):
    return model.get_decoder().layers[0].mlp.up_proj.weight


config = AutoConfig.from_pretrained(sys.argv[1]).text_config
loaded, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config, output_loading_info=True)
without = AutoModelForCausalLM.from_pretrained(sys.argv[1])
equal = [torch.equal(first_weight(model), first_weight(whole)) for model in (loaded, without)]
print(transformers.__version__, type(loaded).__name__, type(without).__name__, *equal, len(report["missing_keys"]))
assert equal == [False, True] and len(report["missing_keys"]) >= 20
PY
