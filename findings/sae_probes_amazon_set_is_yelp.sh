#!/usr/bin/env bash
# sae-probes 0.4.2: sets 111 (Yelp reviews) and 112 (by its name, Amazon reviews) hold the same 5,000 rows: the same texts with
# the same labels. A mean over all sets counts Yelp's twice and Amazon's never; and where one trains and the other tests, every
# test text was seen. 18 of the texts stand there more than once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pandas==2.3.3 zstandard==0.25.0
"$folder/venv/bin/pip" install --quiet --no-deps sae-probes==0.4.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import importlib.util
import io
from pathlib import Path

import pandas
import zstandard

root = Path(importlib.util.find_spec("sae_probes").submodule_search_locations[0])


def rows(number: int) -> pandas.DataFrame:
    (file,) = (root / "data" / "cleaned_data").glob(f"{number}_*.csv.zst")
    print(file.name)
    with zstandard.ZstdDecompressor().stream_reader(file.open("rb")) as stream:
        return pandas.read_csv(io.BytesIO(stream.read()))


yelp, amazon = rows(111), rows(112)
of_yelp, of_amazon = (sorted(zip(of.prompt, of.target)) for of in (yelp, amazon))
print(importlib.metadata.version("sae-probes"), len(yelp), len(amazon), of_yelp == of_amazon, yelp.prompt.nunique())
assert len(yelp) == len(amazon) == 5000 and of_yelp == of_amazon and yelp.prompt.nunique() == 4982
PY
