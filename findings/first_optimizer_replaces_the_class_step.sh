#!/usr/bin/env bash
# torch 2.13.0: making the first optimizer of a class replaces the method `step` of the class itself, by a wrapper. A reference
# to Adam.step that was taken before is another function afterwards, and a comparison sees a patch that nobody made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.3.5 torch==2.13.0
mkdir "$folder/work" && cd "$folder/work"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import torch

before = torch.optim.Adam.step
weights = [torch.nn.Parameter(torch.zeros(1))]
torch.optim.Adam(weights)
first = torch.optim.Adam.step
torch.optim.Adam(weights)
print(torch.__version__, first is before, torch.optim.Adam.step is first)
assert first is not before and torch.optim.Adam.step is first
PY
