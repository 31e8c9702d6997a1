#!/usr/bin/env bash
# torch 2.13.0: a step that draws from a generator of its own can be traced without values, under FakeTensorMode or on the meta device,
# only by some of the in-place draws. normal_, uniform_, bernoulli_ and random_ take `generator=`, as do randn and multinomial;
# exponential_, cauchy_, geometric_ and log_normal_ raise an AssertionError ("generator is not supported in refs"). On real tensors all
# take it, and without a generator all can be traced. (torch.multinomial itself draws by exponential_, and can be traced.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 torch==2.13.0
"$folder/venv/bin/python" -W ignore - 2> "$folder/err" <<'PY' || { cat "$folder/err"; exit 1; }
import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DRAWS = {"normal_": (), "uniform_": (), "bernoulli_": (0.5,), "random_": (),
         "exponential_": (), "cauchy_": (), "geometric_": (0.5,), "log_normal_": ()}


def takes(name: str, fake: bool, device: str = "cpu", **generator: torch.Generator) -> bool:
    with FakeTensorMode() if fake else contextlib.nullcontext():
        try:
            getattr(torch.empty(4, device=device), name)(*DRAWS[name], **generator)
        except AssertionError:
            return False
    return True


print(torch.__version__)
for name in DRAWS:
    given = dict(generator=torch.Generator())
    row = (takes(name, False, **given), takes(name, True, **given),
           takes(name, False, "meta", **given), takes(name, True))
    print(name, "with a generator: real, fake, meta; fake without:", *row)
    refuses = name in ("exponential_", "cauchy_", "geometric_", "log_normal_")
    assert row == (True, not refuses, not refuses, True)
with FakeTensorMode():
    torch.multinomial(torch.ones(4), 2, generator=torch.Generator())
    torch.randn(4, generator=torch.Generator())
PY
