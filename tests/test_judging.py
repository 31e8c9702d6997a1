"""bench/judging.py: features of two runs, judged unseen whose they are."""

import json
import re

import pytest
from run_fixture import make_features, make_run

from bench import judging


@pytest.fixture
def drawn(tmp_path, capsys):
    """A folder with a sheet of two runs' features, and the two runs."""
    runs = [tmp_path / name for name in ("run_1", "run_2")]
    for run in runs:
        make_run(tmp_path, run.name, log=False)
        make_features(run, 2, 150, n_contexts=5)
    judging.draw(runs, 2, 30, 0, tmp_path / "judged")
    return tmp_path / "judged", runs


def test_the_sheet_shows_the_contexts_and_hides_whose_they_are(drawn):
    folder, runs = drawn
    sheet, key = (folder / "sheet.txt").read_text(), json.loads((folder / "key.json").read_text())
    assert "run_" not in sheet
    entries = re.split(r"\n(?=\d+\n)", sheet)
    assert len(entries) == len(key) == 60
    of = [key[str(i)]["run"] for i in range(1, 61)]
    assert all(of.count(str(run)) == 30 for run in runs)
    assert of[:30].count(str(runs[0])) not in (0, 30)  # mixed
    for number, entry in enumerate(entries, 1):
        whose = key[str(number)]
        data = judging.features_of(runs[0].parent / whose["run"], 2)
        contexts = data["features"][whose["feature"]]["contexts"]
        first, *lines = entry.rstrip("\n").split("\n")
        assert int(first) == number and len(lines) == len(contexts) == 5
        for line, context in zip(lines, contexts):
            strongest = data["tokens"][context["tokens"][context["at"]]].replace("\n", "⏎")
            assert line.count(f"[[{strongest}]]") >= 1


def test_answers_are_counted_for_each_run(drawn, monkeypatch, capsys):
    folder, (first, last) = drawn
    key = json.loads((folder / "key.json").read_text())
    own = [number for number, whose in key.items() if whose["run"] == str(first)]
    covered = {number: 4 if number in own[:24] else 3 for number in key}
    (folder / "answers.tsv").write_text("".join(f"{n}\t{c}\ta word\n" for n, c in covered.items()))
    monkeypatch.setattr("sys.argv", ["judging.py", "count", str(folder)])
    judging.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if "of 30" in line]
    # 24 of 30 by Wilson; against 0 of 30 by Newcombe, worked out by hand.
    assert "24 of 30: 0.80 [0.63, 0.90] | +0.80 [+0.59, +0.90]" in rows[0]
    assert "0 of 30: 0.00 [0.00, 0.11] | -" in rows[1]
    lines = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and lines[0].keys() == {"run", "layer", "feature", "covered", "phrase"}


@pytest.mark.parametrize("answers", ["1\t5\ta\n", "", "1\t9\ta\n"])
def test_answers_that_do_not_fit_the_sheet_are_refused(drawn, answers):
    folder, _ = drawn
    if "9" in answers:
        answers += "".join(f"{i}\t5\ta\n" for i in range(2, 61))
    (folder / "answers.tsv").write_text(answers)
    with pytest.raises(ValueError, match="a line for each feature|9 of 5 contexts"):
        judging.judged(folder)
