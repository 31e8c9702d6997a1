#!/usr/bin/env bash
# datasets 3.6.0: load_dataset("json"), with a folder of that name here and no data_files, reads that folder and every
# other JSON file beneath the working directory, as one data set. "./json" reads the folder alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==3.6.0 pandas==2.3.3 pyarrow==21.0.0
mkdir "$folder/work" && cd "$folder/work"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import pathlib

import datasets

pathlib.Path("json").mkdir()
pathlib.Path("elsewhere").mkdir()
pathlib.Path("json/rows.jsonl").write_text('{"text": "of the folder"}\n')
pathlib.Path("elsewhere/other.jsonl").write_text('{"text": "of another one"}\n')
texts = {}
for name in ("json", "./json"):
    texts[name] = sorted(datasets.load_dataset(name, split="train", cache_dir=f"cache{len(name)}")["text"])
print(texts)
assert texts == {"json": ["of another one", "of the folder"], "./json": ["of the folder"]}
PY
