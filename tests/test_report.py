"""harness/report.py: the page of runs and features that plot.py writes, as a reader has it."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser_fixture import BROWSER, Browser
from PIL import Image
from run_fixture import make_features, make_run

import plot
from harness import report

HOSTILE = ("</script><script>hacked = 1</script>", "<img src=x onerror='hacked = 1'>", '"&\\u003c',
           " \n\t", "", "<!--", "def")


class Page(HTMLParser):
    """A page's elements as (tag, attributes), texts of the script elements, and what is visible."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self.inside = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data
        elif not self.inside:
            self.text += data

    def layers(self):
        """{(run, layer): what the browser unpacks}"""
        return {(given["data-run"], given["data-layer"]):
                json.loads(gzip.decompress(base64.b64decode(text)))
                for given, text in self.scripts if given.get("class") == "layer"}


def page_of(root, profile="tinylm"):
    return (root / "figures" / profile / "index.html").read_text("utf-8")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Two runs of three layers, one with features, drawn by plot.py; and what was written."""
    root = tmp_path_factory.mktemp("report")
    for n, name in enumerate(("run_1", "run_2")):
        make_run(root, name, seeds=(0, 1, 2), gain=0.02 * n, tests=f"<b>test</b> {n} | more")
    odd = json.dumps(["layer_1: <i>over</i> half are dead"])
    (root / "run_1" / "warnings.json").write_text(odd)
    config = json.loads((root / "run_2" / "config.json").read_text())
    config["settings"] |= {"k_min": 32, "lr": "<script>hacked = 1</script>"}
    (root / "run_2" / "config.json").write_text(json.dumps(config))
    written = {layer: make_features(root / "run_2", layer, 96, tokens=HOSTILE)
               for layer in (1, 2, 4)}
    assert plot.main(root, ("forest",)) == 0
    return root, written


# ---- without a browser ----------------------------------------------------------------------


def test_the_page_has_tables_figures_warnings_and_settings(shown):
    root, _ = shown
    page = Page(page_of(root))
    assert page.text.count("Runs of tinylm") == 2  # title and heading
    for text in ("<b>test</b> 1 | more", "run_1", "+0.02", "layer_1: <i>over</i> half are dead",
                 "k_min", "<script>hacked = 1</script>", "Without features: run_1.", "By layer"):
        assert text in page.text, text
    assert ("td", {"class": "verdict better"}) in page.elements
    assert "tau_sel" not in page.text.split("Settings that differ")[1].split("Figures")[0]
    pictures = [given for tag, given in page.elements if tag == "img"]
    assert [picture["alt"] for picture in pictures] == ["Figure: Forest"]
    for picture in pictures:
        png = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        assert png.startswith(b"\x89PNG") and int(picture["width"]) >= 1400


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(shown):
    root, _ = shown
    text = page_of(root)
    page = Page(text)
    for tag, given in page.elements:
        for name in ("src", "href"):
            assert given.get(name, "#").startswith(("#", "data:image/png")), (tag, given)
        assert tag != "link" and not any(name.startswith("on") for name in given), (tag, given)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "url(" not in text and "@import" not in text and str(root) not in text
    policy = next(given["content"] for tag, given in page.elements
                  if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    ((_, script),) = [each for each in page.scripts if "type" not in each[0]]
    assert f"script-src '{report.digest(script)}'" in policy


def test_what_the_browser_unpacks_is_what_the_run_left(shown):
    root, written = shown
    layers = Page(page_of(root)).layers()
    assert set(layers) == {("run_2", str(layer)) for layer in written}
    for layer, data in written.items():
        held = layers["run_2", str(layer)]
        assert held["n"] == len(held["features"]) == 96
        densities = [feature["density"] for feature in data["features"]]
        assert held["n_dead"] == densities.count(0) > 0
        assert held["n_dense"] == sum(density > 0.1 for density in densities) > 0
        assert sum(held["densities"]["counts"]) == 96 - held["n_dead"]
        for i, (own, feature) in enumerate(zip(held["features"], data["features"])):
            assert own.pop("id") == i

            def words(source, one):
                named = json.loads(json.dumps(one))
                for context in named["contexts"]:
                    context["tokens"] = [source["tokens"][t] for t in context["tokens"]]
                for side in ("raises", "lowers"):
                    named[side] = [[source["tokens"][t], value] for t, value in named[side]]
                return named

            assert words(held, own) == words(data, feature)


def test_ten_runs_of_wide_saes_stay_below_the_bound(tmp_path):
    """10 runs of 3 layers of 4608 features: each layer gets as much of the page."""
    runs = [tmp_path / f"run_{i}" for i in range(1, 11)]
    for run in runs:
        run.mkdir()
        (run / "config.json").write_text("{}")
    data = make_features(runs[0], 1, 512, n_contexts=1)
    short = [f | {key: [] for key in ("histogram", "raises", "lowers", "nearest")}
             | {"contexts": f["contexts"] * (i % 2)}  # the test is done sooner
             for i, f in enumerate(data["features"])]
    data["features"], data["d_sae"] = short * 9, 4608
    for layer in (1, 2, 4):
        packed = gzip.compress(json.dumps(data | {"layer": layer}).encode(), 1)
        for run in runs:
            (run / "features").mkdir(exist_ok=True)
            (run / "features" / f"layer_{layer}.json.gz").write_bytes(packed)
    folder = tmp_path / "tinylm"
    folder.mkdir()
    report.write_report(folder, runs, "# Ablation")
    text = (folder / "index.html").read_text()
    assert 4_500_000 < (folder / "index.html").stat().st_size < 5_000_000
    layers = Page(text).layers()
    assert len(layers) == 30
    counts = {len(held["features"]) for held in layers.values()}
    assert min(counts) > 50 and max(counts) - min(counts) <= 0.1 * max(counts)
    for held in layers.values():
        assert held["n"] == 4608
        assert sum(f["density"] > 0.1 for f in held["features"]) == held["n_dense"] > 0


def test_figures_that_alone_pass_the_bound_are_left_out_and_named(tmp_path, monkeypatch):
    """The largest first, so that the others, and features, have room."""
    make_run(tmp_path, "run_1", log=False)
    folder = tmp_path / "figures" / "tinylm"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, height in (("cost", 40), ("density", 300), ("forest", 60), ("probing", 140)):
        pixels = noise.integers(0, 256, (height, 1000), dtype=np.uint8)  # a byte each, and 4/3
        Image.fromarray(pixels).save(folder / f"{name}.png")
    monkeypatch.setattr(report, "MAX_BYTES", 400_000)
    data = None
    for drawn, left_out in ((["Cost", "Forest", "Probing"], "density.png"),
                            (["Cost", "Forest"], "density.png, probing.png")):
        if left_out.endswith("probing.png"):  # features have a share
            data = make_features(tmp_path / "run_1", 1, 600)
        report.write_report(folder, [tmp_path / "run_1"], "# Ablation")
        assert (folder / "index.html").stat().st_size < 400_000
        page = Page(page_of(tmp_path))
        assert [each["alt"] for tag, each in page.elements if tag == "img"] == [
            f"Figure: {name}" for name in drawn]
        assert f"Left out here, to keep the page small: {left_out}." in page.text
    ((_, layer),) = page.layers().items()
    assert 30 < len(layer["features"]) < len(data["features"])


def test_no_folder_of_the_machine_is_on_the_page(tmp_path):
    """It can be sent as it is: of a text or model that lies here its own name is enough."""
    for name, text in (("run_1", "/home/alice/texts/mine.jsonl"), ("run_2", "tinylm")):
        make_run(tmp_path, name, log=False)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["settings"]["training_text"] = text
        path.write_text(json.dumps(config))
    warning = "/home/alice/texts/mine.jsonl: 3 rows (1/2 of all) have no text, see https://a.b/c/d"
    (tmp_path / "run_1" / "warnings.json").write_text(json.dumps([warning]))
    make_features(tmp_path / "run_1", 1, 8, model="~/models/gemma/mine")
    assert plot.main(tmp_path, ()) == 0
    page = Page(page_of(tmp_path))
    assert "…/mine.jsonl: 3 rows (1/2 of all) have no text, see https://a.b/c/d" in page.text
    assert page.text.count("…/mine.jsonl") == 3 and "alice" not in page.text  # also in the table
    assert page.layers()["run_1", "1"]["model"] == "…/mine"


def test_what_stands_under_a_tables_heading_is_folded_with_it():
    text = report.tables_html(
        "# Ablation\n\nprimary: a mean\n\n| run | verdict |\n| --- | --- |\n| run_2 | better at "
        "equal L0 |\n\n## What it took\n\nminutes\n\n| run | total |\n| --- | --- |\n| run_2 | 3 |")
    assert '<td class="verdict better">better at equal L0</td>' in text  # in its colour
    before, folded = text.split("<details><summary>What it took</summary>")
    assert "primary: a mean" in before and "<details>" not in before
    assert folded.index("minutes") < folded.index("<table>") < folded.index("</details>")
    assert folded.endswith("</details>") and text.count("</details>") == 1


def test_what_can_not_be_read_is_named(tmp_path, capsys):
    for name in ("run_1", "run_2"):
        make_run(tmp_path, name, log=False)
    folder = tmp_path / "run_2"
    make_features(folder, 1, 8)
    make_features(folder, 2, 8, version=9)
    (folder / "features" / "layer_4.json.gz").write_bytes(gzip.compress(b"{}")[:-9])
    (folder / "features" / "layer_5.json.gz").mkdir()
    (folder / "warnings.json").write_text("no JSON")
    assert plot.main(tmp_path, ()) == 0
    page, said = Page(page_of(tmp_path)), capsys.readouterr().err
    assert set(page.layers()) == {("run_2", "1")}
    for text in (page.text, said):
        assert "run_2/features/layer_2.json.gz can't be read (ValueError: its format is 9" in text
        assert "run_2/features/layer_4.json.gz can't be read (EOFError" in text
        assert "layer_5.json.gz can't be read (IsADirectoryError: Is a directory), so" in text
    assert str(tmp_path) not in page.text
    assert "run_2/warnings.json can't be read (JSONDecodeError" in page.text


def test_without_features_the_page_says_how_to_get_some(tmp_path):
    make_run(tmp_path, "run_1", log=False)
    assert plot.main(tmp_path, ()) == 0
    page = Page(page_of(tmp_path))
    (browser,) = [given for _, given in page.elements if given.get("id") == "browser"]
    assert "hidden" in browser and not page.layers()
    assert "make run OUT=run_try" in page.text and "No figures were drawn." in page.text


# ---- in a browser ---------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium at hand")
LISTED = "[...document.querySelectorAll('#list > div')].map((row) => Number(row.id.slice(4)))"
TITLE = "document.querySelector('#view h3').firstChild.data"
WIDE = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chromium")
    try:
        opened = Browser(folder / "profile")
    except (EOFError, TimeoutError) as error:  # a container may forbid it
        pytest.skip(f"Chromium doesn't start here: {error}")
    page = folder / "page.html"
    page.write_text("<title>seen</title>")
    opened.open(page)
    if opened.js("document.title") != "seen":  # as a snap it may not
        opened.end()
        pytest.skip("Chromium can't read this machine's temporary files")
    yield opened
    opened.end()


@pytest.fixture
def features(shown, browser):
    """The page open at its features, and what the runs left of them, by layer."""
    root, written = shown
    browser.complaints.clear()
    browser.size(1280, 900)
    browser.open(root / "figures" / "tinylm" / "index.html")
    browser.wait(f"{LISTED}.length === 96")
    yield browser, written
    assert browser.complaints == [] and browser.js("typeof hacked") == "undefined"


@in_a_browser
def test_features_are_found_sorted_and_opened_by_keyboard_alone(features):
    browser, written = features
    browser.press("/")
    browser.press(*"42")
    assert browser.js(LISTED) == [42]
    assert browser.js("document.querySelector('#count').textContent") == "1 of 96 features"
    browser.press("Enter", "Enter")  # to the list, and open
    browser.wait(f"{TITLE} === 'Feature 42'")
    assert browser.js("document.activeElement.textContent").startswith("Feature 42")
    assert browser.js("location.hash") == "#/run_2/1/42"
    feature = written[1]["features"][42]
    shaded = browser.js("[...document.querySelectorAll('.contexts li')].map((line) => "
                        "[...line.querySelectorAll('mark')].map((m) => Number(m.dataset.value)))")
    assert [max(values) for values in shaded] == [
        pytest.approx(max(context["acts"]), rel=0.01) for context in feature["contexts"]]
    browser.press("Escape")
    browser.wait("opened === null")
    assert browser.js("document.activeElement.id") == "list"
    browser.press("Enter")  # the keys are where they were
    browser.wait(f"{TITLE} === 'Feature 42'")
    browser.press("Escape")
    browser.wait("opened === null")
    browser.press("/", "Escape")  # empties the search
    assert browser.js(f"{LISTED}.length") == 96
    browser.press("Escape", "j", "j", "ArrowDown", "k", "Enter")  # 0 is where the list begins
    browser.wait(f"{TITLE} === 'Feature 2'")
    browser.press("j")
    browser.wait(f"{TITLE} === 'Feature 3'")
    browser.js("history.back()")
    browser.wait(f"{TITLE} === 'Feature 2'")
    browser.js("document.querySelector('.context').focus()")
    browser.press("ArrowRight")
    value = browser.js("getComputedStyle(document.activeElement, '::after').content")
    assert value == '"' + browser.js("document.activeElement.dataset.value") + '"'


@in_a_browser
def test_features_are_sorted_and_filtered_by_what_the_run_left(features):
    browser, written = features

    def chosen(name, value, event="change"):
        browser.js(f"document.getElementById({name!r}).value = {value!r}; "
                   f"document.getElementById({name!r}).dispatchEvent(new Event({event!r}))")
        return browser.js(LISTED)

    of_layer, strings, ids = written[1]["features"], written[1]["tokens"], range(96)
    assert chosen("sort", "dense") == sorted(ids, key=lambda i: -of_layer[i]["density"])
    assert chosen("sort", "max") == sorted(ids, key=lambda i: -of_layer[i]["max"])
    weights = [dict(feature["probe"]) for feature in of_layer]
    assert chosen("sort", "probe:2") == sorted(ids, key=lambda i: -abs(weights[i].get(2, 0)))
    assert chosen("sort", "probe:largest") == sorted(
        ids, key=lambda i: -max(map(abs, weights[i].values()), default=0))
    first = chosen("sort", "random")
    assert sorted(first) == [*ids] != first
    browser.js("document.querySelector('#shuffle').click()")
    second = browser.js(LISTED)
    assert sorted(second) == [*ids] and second not in (first, [*ids])
    chosen("sort", "number")
    dead = [i for i in ids if of_layer[i]["density"] == 0]
    dense = [i for i in ids if of_layer[i]["density"] > 0.1]
    assert chosen("kind", "dead") == dead and chosen("kind", "dense") == dense
    assert browser.js("document.querySelector('#list .flag').textContent") == "dense"
    chosen("kind", "all")

    def has(feature, wanted, places):
        tokens = [t for context in feature["contexts"]
                  for t, act in zip(context["tokens"], context["acts"])
                  if "any" in places or act and "active" in places]
        raised = [t for t, _ in feature["raises"]] if {"any", "raises"} & places else []
        return any(wanted(strings[t]) for t in [*tokens, *raised])

    for where in ("any", "active", "raises"):
        chosen("where", where)
        for query, wanted in (("DeF", lambda text: "def" in text.lower()),
                              ('"def"', lambda text: text == "def"),
                              ("</script", lambda text: "</script" in text)):
            found = [i for i in ids if has(of_layer[i], wanted, {where})]
            assert chosen("query", query, "input") == found, (where, query)
    chosen("query", "", "input")
    layer = chosen("layer", "4")
    browser.wait("current.layer === 4")
    assert browser.js("location.hash") == "#/run_2/4" and len(layer) == 96


@in_a_browser
def test_where_not_all_features_fit_the_page_says_which_it_holds(tmp_path, browser, monkeypatch):
    make_run(tmp_path, "run_1", log=False)
    data = make_features(tmp_path / "run_1", 1, 600)
    folder = tmp_path / "figures" / "tinylm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "MAX_BYTES", 120_000)
    report.write_report(folder, [tmp_path / "run_1"], "# Ablation")
    ((_, layer),) = Page(page_of(tmp_path)).layers().items()
    held = [feature["id"] for feature in layer["features"]]
    assert 30 < len(held) < 590 and held == sorted(held)
    browser.open(folder / "index.html")
    browser.wait(f"{LISTED}.length === {len(held)}")
    said = browser.js("document.querySelector('#count').textContent")
    assert f"This page holds {len(held)} of the layer’s 600" in said
    assert said.endswith("All are in features/layer_1.json.gz of run_1.")
    dense = [i for i, feature in enumerate(data["features"]) if feature["density"] > 0.1]
    assert dense and set(dense) <= set(held)
    left_out = next(i for i in range(600) if i not in held)
    browser.js(f"location.hash = '#/run_1/1/{left_out}'")
    browser.wait(f"{TITLE} === 'Feature {left_out}'")
    assert "This page doesn’t hold it" in browser.js("document.querySelector('#view').textContent")
    number, near = next((i, f) for i in held for f, _ in data["features"][i]["nearest"]
                        if f not in held)
    browser.js(f"location.hash = '#/run_1/1/{number}'")
    browser.wait(f"{TITLE} === 'Feature {number}'")
    said = browser.js("document.querySelector('#view').textContent")
    assert f"{near} (not in this page)" in said


@in_a_browser
def test_an_address_opens_its_feature_at_the_width_of_a_phone(features):
    browser, _ = features
    browser.size(360, 740)
    path = browser.js("location.pathname")
    browser.do("Page.navigate", url="about:blank")
    browser.do("Page.navigate", url=f"file://{path}#/run_2/4/7")
    browser.wait("typeof opened !== 'undefined' && opened === 7")
    assert browser.js("current.layer") == 4 and browser.js(WIDE)
    assert not browser.js("document.querySelector('#list').offsetHeight")  # the feature has it all
    browser.js("document.querySelector('.back').click()")
    browser.wait("opened === null && document.querySelector('#list').offsetHeight > 0")
    assert browser.js(WIDE)
    browser.js("location.hash = '#/run_2/4/960'")
    browser.wait(f"{TITLE} === 'Feature 960'")
    assert "has 96 features" in browser.js("document.querySelector('#view').textContent")
    browser.scheme("dark")
    assert browser.js("matchMedia('(prefers-color-scheme: dark)').matches")
    assert browser.js("getComputedStyle(document.body).backgroundColor") != "rgb(252, 252, 251)"
    browser.scheme("light")


@in_a_browser
def test_the_list_stands_at_the_feature_of_the_address(tmp_path, browser):
    """Rows out of view are not laid out, so their height must not depend on what is in them."""
    make_run(tmp_path, "run_1", log=False)
    make_features(tmp_path / "run_1", 1, 900)
    folder = tmp_path / "figures" / "tinylm"
    folder.mkdir(parents=True)
    report.write_report(folder, [tmp_path / "run_1"], "# Ablation")
    browser.size(1280, 900)
    browser.do("Page.navigate", url="about:blank")
    browser.do("Page.navigate", url=f"file://{folder}/index.html#/run_1/1/870")
    browser.wait("typeof opened !== 'undefined' && opened === 870")
    above, below = browser.js(
        "(() => { const [box, row] = ['#list', '#row-870'].map("
        "(at) => document.querySelector(at).getBoundingClientRect());"
        " return [row.top - box.top, box.bottom - row.bottom]; })()"
    )
    assert above >= 0 and below >= 0, (above, below)
