#!/usr/bin/env bash
# fsspec 2025.3.0 with zstandard 0.25.0: a .zst file that was cut short reads as a shorter text, without an
# error. The same read of .gz, .bz2 and .xz is an EOFError. A corpus whose download broke off is then used as if whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2025.3.0 zstandard==0.25.0
mkdir "$folder/work" && cd "$folder/work"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PY'
import bz2
import gzip
import lzma

import fsspec
import zstandard

text = b"".join(b"line %d of a corpus\n" % n for n in range(200_000))
seen = {}
for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress),
                         ("zst", zstandard.compress)):
    whole = compress(text)
    with open(f"cut.{suffix}", "wb") as file:
        file.write(whole[: len(whole) // 2])
    try:
        with fsspec.open(f"cut.{suffix}", "rb", compression="infer") as file:
            read = file.read()
        seen[suffix] = "a part, no error" if 0 < len(read) < len(text) else "something else"
    except EOFError:
        seen[suffix] = "EOFError"
print(seen)
assert seen == {"gz": "EOFError", "bz2": "EOFError", "xz": "EOFError", "zst": "a part, no error"}
PY
