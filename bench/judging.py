"""Does a short phrase cover what a feature fires on? Features of two runs, judged unseen whose.

    python bench/judging.py draw smollm2/run_10 smollm2/run_b --layer 14 --to judged
    python bench/judging.py count judged

`draw` takes features of each run's features/ at random, among those with five contexts, mixes them,
and writes judged/sheet.txt, which doesn't say whose they are, and judged/key.json, which does. Who
judges, a person or a program, reads the sheet alone and writes judged/answers.tsv: a line for each
number, with the number, how many contexts are covered, and the phrase, between tabs. `count` joins
the two into judged/judged.jsonl and prints the table.

**The rule.** From the five contexts alone, write one phrase of at most six words that names what
the marked tokens, or what leads up to them, have in common. It is no list ("a or b"), no part of
speech alone, and false of most tokens of the sheet. A context is covered if the phrase is true of
its marked token. A feature *has a phrase* if at least four of its five contexts are covered.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from harness.tables import markdown

N_CONTEXTS, N_COVERED = 5, 4  # of a feature; covered ones at which it has a phrase


def features_of(run: Path, layer: int) -> dict[str, Any]:
    """What a run left of a layer's features (docs/operations.md, What a run leaves)."""
    return json.loads(gzip.decompress((run / "features" / f"layer_{layer}.json.gz").read_bytes()))


def in_brackets(context: dict[str, Any], strings: list[str]) -> str:
    """A context's text: its strongest token in [[ ]], others at half of that or more in [ ]."""
    peak, parts = context["acts"][context["at"]], []
    for place, (token, act) in enumerate(zip(context["tokens"], context["acts"])):
        text = strings[token].replace("\n", "⏎")
        n = 2 if place == context["at"] else int(act >= peak / 2)
        parts.append("[" * n + text + "]" * n)
    return "".join(parts)


def draw(runs: list[Path], layer: int, n: int, seed: int, to: Path) -> None:
    """Writes the sheet and its key."""
    generator, entries = random.Random(seed), []
    for run in runs:
        data = features_of(run, layer)
        whole = [i for i, f in enumerate(data["features"]) if len(f["contexts"]) == N_CONTEXTS]
        print(f"{run}: {len(whole)} of {data['d_sae']} features have {N_CONTEXTS} contexts")
        for feature in generator.sample(whole, n):
            contexts = data["features"][feature]["contexts"]
            texts = [in_brackets(context, data["tokens"]) for context in contexts]
            entries.append(({"run": str(run), "layer": layer, "feature": feature}, texts))
    generator.shuffle(entries)
    to.mkdir(parents=True)
    numbered = list(enumerate(entries, 1))
    sheet = [f"{number}\n" + "".join(f"  {t}\n" for t in texts) for number, (_, texts) in numbered]
    (to / "sheet.txt").write_text("\n".join(sheet), encoding="utf-8")
    key = {number: whose for number, (whose, _) in numbered}
    (to / "key.json").write_text(json.dumps(key))
    print(f"{to / 'sheet.txt'}: {len(entries)} features")


def judged(folder: Path) -> list[dict[str, Any]]:
    """Each feature with its answer.

    Raises:
        ValueError: the answers are not one for each feature of the sheet.
    """
    key = json.loads((folder / "key.json").read_text())
    lines = (folder / "answers.tsv").read_text(encoding="utf-8").splitlines()
    answers = {number: rest for number, *rest in (line.split("\t") for line in lines)}
    if answers.keys() != key.keys() or len(lines) != len(key):
        wrong = ", ".join(sorted(answers.keys() ^ key.keys())) or "one comes twice"
        raise ValueError(f"answers.tsv must have a line for each feature of the sheet: {wrong}")
    found = []
    for number, whose in key.items():
        covered, phrase = answers[number]
        if not 0 <= int(covered) <= N_CONTEXTS:
            raise ValueError(f"{number}: {covered} of {N_CONTEXTS} contexts are covered")
        found.append(whose | {"covered": int(covered), "phrase": phrase})
    return found


def count(features: list[dict[str, Any]]) -> str:
    """The part of each run's features that have a phrase, with 95% intervals: Wilson's, and
    Newcombe's for the difference to the last run."""
    runs, lines = sorted({feature["run"] for feature in features}), []
    has = {run: [f["covered"] >= N_COVERED for f in features if f["run"] == run] for run in runs}
    for run in runs:
        given = sum(has[run]), len(has[run]), sum(has[runs[-1]]), len(has[runs[-1]])
        low, high = proportion_confint(*given[:2], method="wilson")
        part, of_last = given[0] / given[1], given[2] / given[3]
        own = f"{given[0]} of {given[1]}: {part:.2f} [{low:.2f}, {high:.2f}]"
        low, high = confint_proportions_2indep(*given, method="newcomb")
        more = f"{part - of_last:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append([run, own, more if run != runs[-1] else "-"])
    return markdown(["run", "features with a phrase", f"more than {runs[-1]}"], lines)


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing, counting = commands.add_parser("draw"), commands.add_parser("count")
    drawing.add_argument("runs", nargs="+", type=Path)
    drawing.add_argument("--layer", type=int, required=True)
    drawing.add_argument("--n", type=int, default=50, help="features of each run")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--to", type=Path, required=True, help="a folder, to be made")
    counting.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "draw":
        draw(args.runs, args.layer, args.n, args.seed, args.to)
        return
    features = judged(args.folder)
    lines = [json.dumps(feature, ensure_ascii=False) for feature in features]
    (args.folder / "judged.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(count(features))


if __name__ == "__main__":
    main()
