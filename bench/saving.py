"""What it costs that training saves itself: the tinylm profile trained with and without, in turns.

    python bench/saving.py [--tokens 524288] [--repetitions 3]

Saves after every filling of the buffer, which is more often than a run does (see `Checkpoints`).
Prints seconds of training, seconds within saves, their share, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment
from bench.common import settings_of
from harness.checkpoints import Checkpoints
from harness.fused_model import for_harvest
from harness.language_model import load_language_model
from harness.machine import choose_train_dtype, make_reproducible, n_cores, processor_name
from harness.startup import Run
from harness.text import TokenStream, documents


def trained(run: Run, key: dict | None) -> tuple[float, float, int]:
    """Seconds of a training, seconds of them spent in saving, and bytes saved at once."""
    checkpoints = Checkpoints(key, every=0.0, share=1e9)
    save, saving, size = checkpoints.save, 0.0, 0

    def timed(*arguments: object, **things: object) -> None:
        nonlocal saving, size
        began = time.monotonic()
        save(*arguments, **things)
        saving += time.monotonic() - began
        if key is not None:
            size = max(file.stat().st_size for file in checkpoints.shelf.folder.iterdir())

    checkpoints.save = timed
    texts, tokenizer = documents(run.settings.training_text, "train"), run.language_model.tokenizer
    with (
        mock.patch.object(Run, "checkpoints", return_value=checkpoints),
        TokenStream(texts, tokenizer, run.settings.context) as stream,
    ):
        began = time.monotonic()
        experiment.train(run, experiment.ActivationBuffer(run, stream))
        return time.monotonic() - began, saving, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    make_reproducible()
    settings = settings_of("run_saving", "tinylm")
    settings = dataclasses.replace(settings, training_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        lm = load_language_model(settings.model)
        dtype = choose_train_dtype(settings, lm.hf.device)
        lm = for_harvest(lm, dtype, settings.harvest_contexts, settings.context)
        run = Run(settings, lm, train_dtype=dtype, out_dir=Path(folder))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        shares = []
        for repetition in range(options.repetitions):
            for saves in (True, False):
                key = {"repetition": repetition} if saves else None
                took, saving, size = trained(run, key)
                seconds[saves].append(took)
                if saves:
                    shares.append(saving / (took - saving))
                    print(f"saved: {took:.1f} s, of them {saving:.2f} s in saves of "
                          f"{size / 1e6:.1f} MB, {100 * shares[-1]:.2f}%", flush=True)  # fmt: skip
                else:
                    print(f"not saved: {took:.1f} s", flush=True)
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    print(f"share of the time in saves, median: {100 * statistics.median(shares):.2f}%")
    print(f"ratio of the medians, saved / not saved: {ratio:.3f}")
    print(f"{processor_name()}, {n_cores()} cores, "
          f"{time.strftime('%Y-%m-%d')}")  # fmt: skip


if __name__ == "__main__":
    main()
