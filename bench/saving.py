"""What it costs that training saves itself: the tinylm profile trained with and without, in turns.

    python bench/saving.py [--tokens 524288] [--repetitions 3]

Saves after every filling of the buffer, which is more often than a run does (`SAVE_EVERY`).
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import experiment
from bench.common import settings_of
from harness import training
from harness.fused_gemma import for_harvest
from harness.language_model import LanguageModel, load_language_model
from harness.machine import choose_train_dtype, make_reproducible, processor_name
from harness.text import TokenStream, documents
from harness.training import Checkpoints


def trained(
    settings: experiment.Settings, lm: LanguageModel, key: dict | None, folder: Path
) -> tuple[float, float, int]:
    """Seconds of a training, seconds of them spent in saving, and bytes saved at once."""
    texts = documents(settings.training_text, "train")
    stream = TokenStream(texts, lm.tokenizer, settings.context)
    buffer = experiment.ActivationBuffer(lm, stream, settings.layers, settings.harvest_contexts)
    fixed = {(layer, seed): {} for layer in settings.layers for seed in settings.seeds}
    saving, size = 0.0, 0
    with Checkpoints(key) as checkpoints:
        save = checkpoints.save

        def timed(*arguments: object) -> None:
            nonlocal saving, size
            began = time.monotonic()
            save(*arguments)
            saving += time.monotonic() - began
            if key is not None:
                size = max(file.stat().st_size for file in checkpoints.folder.iterdir())

        checkpoints.save = timed
        began = time.monotonic()
        experiment.train(settings, buffer, fixed, folder / "log.jsonl", checkpoints=checkpoints)
        seconds = time.monotonic() - began
    stream.close()
    return seconds, saving, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    make_reproducible()
    training.SAVE_EVERY, training.SAVE_SHARE = 0.0, 1e9
    settings = settings_of("run_saving", "tinylm")
    settings = dataclasses.replace(settings, training_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        lm = load_language_model(settings.model)
        dtype = choose_train_dtype(settings, lm.hf.device)
        lm = for_harvest(lm, dtype, settings.harvest_contexts, settings.context)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        shares = []
        for repetition in range(options.repetitions):
            for saves in (True, False):
                key = {"repetition": repetition} if saves else None
                took, saving, size = trained(settings, lm, key, Path(folder))
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
    print(f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, "
          f"{time.strftime('%Y-%m-%d')}")  # fmt: skip


if __name__ == "__main__":
    main()
