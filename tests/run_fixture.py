"""Runs' folders with plausible numbers, for the tests of figures and tables."""

import functools
import gzip
import json
import math
import re
from pathlib import Path

import numpy as np

KS = (1, 2, 5, 10, 20, 50)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def make_run(root, name, *, profile="tinylm", layers=(1, 2, 4), seeds=(0,), tests="", gain=0.0,
             fixed=None, curriculum=True, steps=30, total=1_000_000, log=True,
             probe_sets=("tinylm/B",)):
    """A run's folder as experiment.py leaves one, with plausible numbers; returns its info."""
    fixed = fixed or {}
    folder = root / name
    folder.mkdir(parents=True)
    info, lines = {}, []
    for i, layer in enumerate(layers):
        per_seed = {}
        for seed in seeds:
            rng = np.random.default_rng([seed, layer, round(1e4 * abs(gain))])
            for step in range(1, steps + 1):
                done = step / steps
                theta = [1.2 * done, -2.5 * done, -3.0 * done + 0.1 * rng.normal()]
                tau_sel = fixed.get("tau_sel", 0.1 + 0.4 * sigmoid(theta[0]))
                tau_pen = fixed.get("tau_pen", 0.05 + 0.2 * sigmoid(theta[1]))
                gamma = fixed.get("gamma", 0.3 * sigmoid(theta[2]))
                k_t = 16 * 4 ** max(0.0, 1 - done / 0.3) if curriculum else None
                fvu = 0.2 + 0.03 * i + 0.5 * math.exp(-6 * done) + 0.004 * rng.normal() - gain / 4
                parts = {"loss_reconstruction": fvu, "loss_reg": 0.01 * sum(t * t for t in theta),
                         "loss_penalty": gamma * tau_pen * 9 * math.exp(-3 * done)}
                entry = {"step": step, "tokens": round(total * done), "layer": layer, "seed": seed,
                         "loss": sum(parts.values()), **parts, "tau_sel": tau_sel,
                         "tau_pen": tau_pen, "gamma": gamma, "w": gamma * tau_pen,
                         "k_t": k_t, "l0": k_t or 300 * math.exp(-2 * done) + rng.normal(),
                         "fvu": fvu, "dead_fraction": 0.15 * math.exp(-4 * done), "lr": 2e-3,
                         "tokens_per_second": 9000.0}
                for n, key in enumerate(("tau_sel", "tau_pen", "gamma"), 1):
                    entry[f"theta_{n}"] = None if key in fixed else theta[n - 1]
                lines.append(entry)
            base = {"l0": entry["l0"], "mse": 0.4, "ce_loss_score": 0.93 - 0.01 * i,
                    "frac_alive": 0.97, "fvu": fvu, "dead_fraction": entry["dead_fraction"],
                    "explained_variance": 0.8, "tau_sel": tau_sel, "tau_pen": tau_pen,
                    "gamma": gamma, "w": gamma * tau_pen, "llm_test_accuracy": 0.93 + 0.01 * i,
                    "training_tokens": total, "n_seeds": len(seeds)}
            base |= {"untrained_l0": base["l0"] + 0.1, "untrained_fvu": 0.61}
            for n, k in enumerate(KS):
                sae = 0.70 + 0.035 * n + 0.01 * i + gain + 0.006 * rng.normal()
                base[f"sae_top_{k}_test_accuracy"] = sae
                base[f"untrained_top_{k}_test_accuracy"] = 0.62 + 0.035 * n + 0.005 * i
                base[f"llm_top_{k}_test_accuracy"] = 0.63 + 0.045 * n + 0.005 * i
            for key, value in base.items():
                per_seed.setdefault(key, []).append(float(value))
        info[f"layer_{layer}"] = {
            "means": {key: float(np.mean(v)) for key, v in per_seed.items()},
            "stderrs": {key: float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else 0.0
                        for key, v in per_seed.items()},
            "final_info_dict": per_seed}
    info["verdict"] = {"means": {"primary": 0.0}, "stderrs": {"primary": 0.0},
                       "final_info_dict": {"primary": [0.0]}}
    settings = {"tau_sel": None, "tau_pen": None, "gamma": None, **fixed, "k_min": 16,
                "curriculum": curriculum, "layers": list(layers), "seeds": list(seeds),
                "description": tests, "probe_sets": list(probe_sets), "compare_to": "run_1"}
    (folder / "config.json").write_text(json.dumps({"profile": profile, "settings": settings}))
    if log:
        with (folder / "train_log.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    (folder / "final_info.json").write_text(json.dumps(info))
    return info


@functools.cache
def source_tokens():
    """Python source in pieces like a tokenizer's: their strings, and the text by index."""
    pieces = re.findall(r" ?\w+|\n[ ]*|[^\w\s]| +", Path(json.decoder.__file__).read_text())
    strings = sorted(set(pieces))
    index = {piece: i for i, piece in enumerate(strings)}
    return strings, [index[piece] for piece in pieces]


def make_features(folder, layer, d_sae, *, n_contexts=8, tokens=(), **header):
    """features/layer_L.json.gz of a run: plausible features of Python source.

    Feature 0 is dead, feature 1 dense. `tokens` replaces the strings of the first tokens.
    Returns what was written.
    """
    rng = np.random.default_rng([layer, d_sae])
    strings, text = source_tokens()
    strings = [*tokens, *strings[len(tokens):]]
    places = {}
    for place, token in enumerate(text):
        places.setdefault(token, []).append(place)
    usual = [token for token, where in places.items() if len(where) >= 3]
    probed = [f"tinylm/B: {name}" for name in ("docstring", "library", "plotting")]
    edges = [round(0.05 * 1.25 ** i, 4) for i in range(31)]
    features = []
    for i in range(d_sae):
        dead = i == 0 or rng.random() < 0.02
        density = 0 if dead else 0.31 if i == 1 else round(float(10 ** rng.normal(-2.2, 0.5)), 5)
        largest, contexts = round(float(rng.uniform(2, 30)), 2), []
        token = usual[int(rng.integers(len(usual)))]
        for n, at in enumerate([] if dead else places[token][:n_contexts]):
            start = max(0, at - 12)
            window = text[start:at + 7]
            acts = [0] * len(window)
            acts[at - start] = round(largest * 0.93 ** n, 2)
            for near in rng.integers(0, len(window), 3).tolist():
                acts[near] = acts[near] or round(float(rng.uniform(0.1, 0.7)) * largest, 2)
            contexts.append({"tokens": window, "acts": acts, "at": at - start, "passage": n})
        counts = rng.poisson(200 * np.exp(-0.5 * ((np.arange(30) - 18) / 5) ** 2)).tolist()
        sides = rng.integers(0, len(strings), (2, 10)).tolist()
        near = rng.integers(0, d_sae, 5).tolist()
        features.append({
            "density": density, "mean": 0 if dead else round(largest / 3, 2),
            "max": 0 if dead else largest, "histogram": [0] * 30 if dead else counts,
            "contexts": contexts,
            "raises": [[t, round(3.1 - 0.2 * n, 2)] for n, t in enumerate(sides[0])],
            "lowers": [[t, round(0.2 * n - 2.9, 2)] for n, t in enumerate(sides[1])],
            "nearest": [[f, round(0.61 - 0.07 * n, 3)] for n, f in enumerate(near)],
            "probe": [] if dead else [[int(c), round(float(rng.normal()), 3)]
                                      for c in rng.permutation(3)[:2]]})
    data = {"version": 1, "model": "tinylm", "hook_name": f"blocks.{layer}.hook_resid_post",
            "layer": layer, "seed": 0, "d_sae": d_sae, "n_tokens": 98_304, "tokens": strings,
            "edges": edges, "probed": probed, "features": features, **header}
    (folder / "features").mkdir(exist_ok=True)
    path = folder / "features" / f"layer_{layer}.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))
    return data


def table(text, heading_of_first_column, section=0):
    """{first cell: {heading: cell}} of the section-th Markdown table in text."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")]
             for line in blocks[section].strip().splitlines()]
    assert lines[0][0] == heading_of_first_column
    assert all(len(line) == len(lines[0]) for line in lines)
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
