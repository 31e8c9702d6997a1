#!/usr/bin/env bash
# datasets 3.6.0: strings in a JSON Lines file come back as datetime objects where all of them look like dates, streamed too;
# one row that is no date keeps all of them strings. So the type of a text depends on the other rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==3.6.0 pandas==2.3.3 pyarrow==21.0.0
mkdir "$folder/work" && cd "$folder/work"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import datetime
import json
import pathlib

import datasets

kinds = {}
for name, texts in (("dates", ["2020-01-01", "2021-05-05"]), ("mixed", ["2020-01-01", "a word"])):
    pathlib.Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    for streaming in (False, True):
        rows = datasets.load_dataset(
            "json", data_files=f"{name}.jsonl", split="train", streaming=streaming, cache_dir="cache"
        )
        kinds[name, streaming] = {type(row["text"]) for row in rows}
print(kinds)
assert all(kinds["dates", s] == {datetime.datetime} for s in (False, True))
assert all(kinds["mixed", s] == {str} for s in (False, True))
PY
