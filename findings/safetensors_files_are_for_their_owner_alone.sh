#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes a file that only its owner can read (0600), whatever the umask says, and also where a file
# with wider rights stood. It puts a new file in the old one's place: a symbolic link is replaced and not followed, a hard link
# goes on to hold the old weights. 0.5.3 wrote into the file that is there, with the umask's rights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/look.py" <<'PY'
import os
import sys
import tempfile

import numpy
import safetensors
from safetensors.numpy import load_file, save_file

os.umask(0o022)
os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
save_file({"w": numpy.zeros(2)}, "new")
open("old", "w").close()
os.chmod("old", 0o664)
os.symlink("old", "link")
os.link("old", "hard")
save_file({"w": numpy.zeros(2)}, "link")  # through the link
followed = os.path.islink("link") and os.path.getsize("old") > 0
if os.path.islink("link"):
    os.unlink("link")
save_file({"w": numpy.ones(2)}, "old")
kept = os.path.getsize("hard") > 0 and bool(load_file("hard")["w"].all())
found = [oct(os.stat(name).st_mode & 0o777) for name in ("new", "old")]
print(safetensors.__version__, "modes", *found, "| link followed:", followed, "| hard link has it:", kept)
new = safetensors.__version__ == "0.8.0"
assert found == (["0o600", "0o600"] if new else ["0o644", "0o664"])
assert followed == kept == (not new)
PY
for version in 0.5.3 0.8.0; do
  "$folder/venv/bin/pip" install --quiet numpy==2.3.5 "safetensors==$version"
  "$folder/venv/bin/python" "$folder/look.py" "$folder"
done
