"""README and docs/: links, names and numbers that a reader follows."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from harness.verdict import OLD_NAMES, PRIMARY, mean, paired_difference, stderr, with_current_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "RESULTS.md"]
NOT_SETTINGS = {"trust_remote_code"}  # keywords of other libraries


def headings(page: Path) -> list[str]:
    """The titles of a page's sections; lines within fenced code are none."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor(title: str) -> str:
    """What GitHub makes of a title in an address."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def settings_fields() -> set[str]:
    """The settings' names, read without importing experiment.py."""
    tree = ast.parse((ROOT / "experiment.py").read_text())
    (settings,) = [node for node in tree.body if getattr(node, "name", None) == "Settings"]
    return {node.target.id for node in settings.body if isinstance(node, ast.AnnAssign)}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, section = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.is_file(), link
        assert not section or section in map(anchor, headings(target)), link


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Each path that it names exists; it names each folder and module at the root."""
    text = (ROOT / "README.md").read_text().split("## Where everything is")[1]
    lines = text.split("```")[1].strip("\n").splitlines()
    named = {path.strip("/") for line in lines
             for path in re.split(r", | … ", re.split(r"\s{2,}", line)[0])}  # fmt: skip
    assert [path for path in named if not (ROOT / path).exists()] == []
    listing = ["git", "ls-files"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    tops = {top for top in tops if top.endswith(".py") or (ROOT / top).is_dir()}
    assert {top for top in tops if not top.startswith((".", "run_"))} <= named


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)
def test_settings_are_called_what_they_are_called(page: Path) -> None:
    """In `name=value` and in entries of PLAN. Old names stand in the table of old names alone."""
    text = page.read_text().split("## Old names")[0]
    code = " ".join(re.findall(r"`[^`\n]+`|dict\(.*\)", text))
    named = set(re.findall(r"(?<![\w-])([a-z]\w*)=", code)) - NOT_SETTINGS
    assert named <= settings_fields(), named - settings_fields()


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)
def test_names_in_the_text_are_names_of_the_code(page: Path) -> None:
    """A name in backticks stands somewhere in the code or in a record of a run."""
    text = page.read_text().split("## Old names")[0]
    files = [*ROOT.glob("*.py"), *(ROOT / "harness").rglob("*.py"), *(ROOT / "tinylm").glob("*.py")]
    files += [ROOT / "run_10" / "final_info.json", ROOT / "Makefile"]
    known = set(re.findall(r"\w+", " ".join(file.read_text() for file in files)))
    assert (named := set(re.findall(r"`([a-zA-Z]+_\w*)`", text)))
    assert named <= known, named - known


def test_old_names_are_listed() -> None:
    rows = (ROOT / "docs" / "operations.md").read_text().split("## Old names")[1]
    for old, new in OLD_NAMES.items():
        assert re.search(rf"^\| `{old}(=\S+)?` \| `{new}(=\S+)?` \|$", rows, re.MULTILINE), old


def test_what_the_code_cites_is_there() -> None:
    """Comments cite a page and a section: "docs/method.md, The loss"."""
    files = [*ROOT.glob("*.py"), *(ROOT / "harness").rglob("*.py")]
    files += [*(ROOT / "bench").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    files.remove(Path(__file__).resolve())
    cited = 0
    for file in files:
        for page, rest in re.findall(r"docs/(\w+\.md), ([A-Z][^\n]*)", file.read_text()):
            assert any(rest.startswith(title) for title in headings(ROOT / "docs" / page)), rest
            cited += 1
    assert cited


@pytest.mark.parametrize("title, folder", [
    ("## On tinylm: the runs of the plan\n", ROOT), ("## On SmolLM2-135M\n", ROOT / "smollm2"),
])  # fmt: skip
def test_the_table_of_results_holds_the_records(title: str, folder: Path) -> None:
    """The rows of docs/results.md, against the committed runs of the plan."""
    rows = (ROOT / "docs" / "results.md").read_text().split(title)[1].split("\n## ")[0]
    runs = [run for run in range(1, 11) if (folder / f"run_{run}").is_dir()]
    assert folder != ROOT or len(runs) == 10

    def of(run: int) -> dict[str, dict[int, float]]:
        info = json.loads((folder / f"run_{run}" / "final_info.json").read_text())
        overall = with_current_names(info.pop("verdict")["final_info_dict"])
        layers = [entry["final_info_dict"]["fvu"] for entry in info.values()]
        per_seed = {**overall, "fvu": [mean(values) for values in zip(*layers)]}
        seeds = [int(seed) for seed in per_seed.pop("seed")]
        return {metric: dict(zip(seeds, values)) for metric, values in per_seed.items()}

    first = of(1)
    for run in runs:
        own = of(run)
        ((_, _, primary, difference, _, l0, fvu, fvu_difference, seeds),) = [
            re.split(r" \| ", line.strip("| "))
            for line in rows.splitlines()
            if line.startswith(f"| run_{run} |") and line.count("|") == 10
        ]
        values = list(own[PRIMARY].values())
        assert primary == f"{mean(values):.4f} ± {stderr(values):.4f}"
        assert l0 == f"{mean(list(own['l0'].values())):.1f}"
        assert fvu == f"{mean(list(own['fvu'].values())):.3f}"
        assert int(seeds) == len(values)
        for shown, metric in ((difference, PRIMARY), (fvu_difference, "fvu")):
            found = paired_difference(own[metric], first[metric])
            centre = f"{found['difference']:+.4f}"
            interval = f"{centre} [{found['ci95_low']:+.4f}, {found['ci95_high']:+.4f}]"
            assert shown == "-" if run == 1 else shown in (interval, f"raw: {centre}") or (
                shown == f"raw: {centre}, another L0"
            )
