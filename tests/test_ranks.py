"""One run as several processes: what it leaves is what one process leaves, and it ends as one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.errors import ExperimentError
from harness.evaluation import probe_texts
from harness.identity import describe
from harness.object_parts import place_of
from harness.observation import Observer
from harness.ranks import RANKS, Ranks
from harness.startup import check_equal, check_sharable
from tests import forked
from tests.conftest import settings_of
from tests.test_loop import Driver

TOLD = {"SAE_PROFILE": "tinylm"}
FAILS = """        settings, sae = self.settings, self.sae
        if at.lr and sae.cfg.hook_layer == 2 and len(self.seen) > 20:
            raise ValueError("not on this rank")
        self.seen.append(1)
"""


@pytest.fixture(scope="module")
def driver(toy_model: Path, hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """With what one process leaves: 4 SAEs, `alone`."""
    made = Driver(tmp_path_factory.mktemp("ranks"), toy_model, hf_home)
    file = made.folder / "experiment.py"
    old, new = "'training_tokens': 40960", "'training_tokens': 12288, 'seeds': (0, 1)"
    text = file.read_text()
    assert text.count(old) == 3
    file.write_text(text.replace(old, new))
    status, _, error = made.run("run_a")
    assert status == 0, error
    made.alone = results(made, "run_a")
    return made


def results(driver: Driver, run: str) -> tuple:
    """Weights, what is shown of features, figures but for times, and the log."""
    folder = driver.folder / run
    files = [*(folder / "sae").rglob("*.safetensors"), *(folder / "features").iterdir()]
    assert len(files) == 4 + 2
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return contents, driver.figures(run), driver.log_lines(run)


def ranks_of(
    driver: Driver, n: int, run: str, cache: str, script: str = "experiment.py"
) -> list[forked.Forked]:
    """What torchrun starts, without the seconds in which libraries import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **TOLD}
    given |= {"XDG_CACHE_HOME": str(driver.folder / cache), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(n):
        one = given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = forked.environment(driver.hf_home, **one)
        arguments = driver.folder, script, f"--out_dir={run}"
        started.append(forked.Forked(*arguments, environment=environment))
    return started


def store_names(driver: Driver, cache: str) -> set[str]:
    """What the store holds, by the digits that stand for keys."""
    store = driver.folder / cache / "parametric-sae" / "store"
    kinds = ("training", "activations", "core_evaluation", "sparse_probing", "rehearsal")
    return {"/".join(file.relative_to(store).parts[:2]).split(".")[0]
            for kind in kinds for file in (store / kind).rglob("*") if file.is_file()}  # fmt: skip


@pytest.mark.parametrize("n", [2, 3])
def test_several_ranks_leave_what_one_process_leaves(driver: Driver, n: int) -> None:
    """Bit for bit, under the same keys in the store; all but the first are silent."""
    started = ranks_of(driver, n, f"run_{'abc'[n - 1]}", f"{n} ranks")
    said = [process.communicate(120) for process in started]
    assert [process.returncode for process in started] == [0] * n, said
    assert f"profile: tinylm on cpu, {n} ranks" in said[0][0] and said[0][1] == ""
    assert said[1:] == [("", "")] * (n - 1)
    assert results(driver, f"run_{'abc'[n - 1]}") == driver.alone
    assert store_names(driver, f"{n} ranks") == store_names(driver, "cache")


def test_a_rank_that_fails_is_named_by_the_first(driver: Driver) -> None:
    source = (driver.folder / "experiment.py").read_text()
    broken = source.replace("        settings, sae = self.settings, self.sae\n", FAILS, 1)
    broken = broken.replace("        self.threshold_started = ", "        self.seen = []\n"
                            "        self.threshold_started = ", 1)  # fmt: skip
    assert "len(self.seen) > 20" in broken and "self.seen = []" in broken
    (driver.folder / "broken.py").write_text(broken)
    started = ranks_of(driver, 2, "run_c", "failing", "broken.py")
    (_, first), (out, second) = [process.communicate(120) for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert "failed during train (layer 2, seed 0) on rank 1 of 2" in second and out == ""
    assert "cause: ValueError: not on this rank" in second
    named = re.search(r"cause: rank 1 of 2 \(process \d+ on \S+\) has failed during (.*)", first)
    assert named[1].startswith("train (layer 2, seed 0): ValueError: not on this rank, at broken.")
    assert len(first) <= 1500


def test_a_rank_is_killed_and_the_same_command_goes_on(driver: Driver) -> None:
    """All end within seconds with words that name it; then to the weights of one process."""
    environment = forked.environment(
        driver.hf_home, **TOLD, XDG_CACHE_HOME=str(driver.folder / "killed")
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2", "saving_often.py", "--out_dir=run_b"]  # fmt: skip
    place = driver.folder / "killed" / "parametric-sae"

    def start() -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(torchrun, cwd=driver.folder, env=environment, **pipes)

    process, until = start(), time.monotonic() + 120
    while not [*place.glob("store/training/*/state.*.pt")]:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    (record,) = place.glob("attempts/*-rank-1.json")
    killed = json.loads(record.read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 20 and process.returncode == 1
    assert f"cause: rank 1 of 2 (process {killed} on " in error
    assert "has ended without a word: killed? out of memory?" in error
    assert "rank      : 1" in error[-1500:] and "SIGKILL" in error[-1500:]
    process = start()
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    assert "training: goes on at " in out
    assert "the last attempt at run_b on rank 1 of 2" in error
    assert results(driver, "run_b") == driver.alone


def test_what_torchrun_has_not_set_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ExperimentError, match="start the run by `torchrun .*`, or unset WORLD_"):
        Ranks().begin()
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = Ranks()
    ranks.begin()
    assert ranks.of == 1 and ranks.first


def test_more_ranks_than_gpus_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    ranks.rank, ranks.of, ranks.size, ranks.local = 2, 4, 4, 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ExperimentError, match="a GPU of its own, .* has 2 for 3 and more: lower"):
        ranks.use(torch.device("cuda"))
    ranks.use(torch.device("cpu"))


def test_what_the_first_reads_comes_to_each_rank_s_own_device(
    toy, toy_lm, own_cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpickled, what is on cuda:0 would be there on all of a machine's ranks."""
    given = []

    def by_first(function, *args):
        given.append(function(*args))
        return given[-1]

    def devices(texts: dict) -> set[str]:
        return {of["input_ids"].device.type for split in texts.values() for part in split
                for of in part.values()}  # fmt: skip

    monkeypatch.setattr(RANKS, "by_first", by_first)
    settings, meta = settings_of(toy, "run_1"), torch.device("meta")
    read = probe_texts.read_probe_texts(settings, toy_lm.tokenizer, meta)
    assert [devices(texts) for texts in (*given, read)] == [{"cpu"}, {"meta"}]


def test_what_is_on_a_rank_s_gpu_goes_on_on_another_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer's moments are made anew where a trainer goes on: beside its weights."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    places = [place_of(torch.device(device)) for device in ("cuda:1", "cuda:0", "cpu")]
    assert places == ["cuda", "cuda:0", "cpu"]


def test_which_of_a_machine_s_gpus_it_is_is_in_no_key() -> None:
    first, second, cpu = (describe([torch.device(of)]) for of in ("cuda:0", "cuda:1", "cpu"))
    assert first == second != cpu


def test_an_edit_that_ranks_can_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"unresumable": "this edit can't be resumed", "started": "a program"}
    check_sharable(problems)
    monkeypatch.setattr(RANKS, "of", 2)
    with pytest.raises(ExperimentError, match="can't share this run, .* but this edit can't be re"):
        check_sharable(problems)
    check_sharable({"started": "a program", "irreproducible": "a clock"})


def test_ranks_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"code of": {}, "setting": {"lr": 1.0}, "model": "m", "version of": {"torch": "1"}}
    seen = {}
    monkeypatch.setattr(RANKS, "by_first", lambda function: seen.setdefault("first", function()))
    check_equal(key)
    check_equal(key)
    other = key | {"setting": {"lr": 2.0}, "version of": {"torch": "2"}}
    with pytest.raises(ExperimentError, match="rank 0 differ in setting and version: give each"):
        check_equal(other)


def test_what_another_rank_has_read_counts_for_what_the_first_keeps() -> None:
    observer = Observer()
    observer.key_made("training")
    observer.learn({"training": {("file read", "notes.json")}})
    assert observer.unforeseen("training") == ["file read notes.json"]


def test_each_item_has_one_rank_and_neighbours_stay_together() -> None:
    for n in (1, 2, 5, 12):
        for size in (1, 2, 3, 8):
            shares = []
            for rank in range(size):
                ranks = Ranks()
                ranks.rank, ranks.of, ranks.size = rank, size, size
                shares.append([*ranks.own(dict.fromkeys(range(n)))])
            assert sum(shares, []) == [*range(n)] and shares[0]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
