"""Runs of PLAN, one after the other here or on a Ray cluster: `python plan.py run_1 'run_k_*'`.

Each is `python experiment.py --out_dir=run_i` in its own process. What dies, by a signal or with a
machine, is started again; what fails by its own error is not. docs/operations.md, Several runs
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRIES = 4  # starts of a run that dies
GIVEN = ("SAE_", "HF_", "XDG_CACHE_HOME", "WANDB_", "OMP_")  # variables that go along


def attempt(run, folder, given):
    """Starts a run until it ends by itself: (its status, minutes, its last words)."""
    began = time.monotonic()
    # Ray sets OMP_NUM_THREADS in its tasks, and it is in every key of the store.
    variables = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    command = [sys.executable, "experiment.py", f"--out_dir={run}"]
    for _ in range(TRIES):
        ended = subprocess.run(command, cwd=folder, env=variables, stderr=subprocess.PIPE,
                               text=True, errors="replace", preexec_fn=end_with_this)  # fmt: skip
        if not died(ended.returncode):
            break
        print(f"{run} died (status {ended.returncode})", flush=True)
    return ended.returncode, (time.monotonic() - began) / 60, ended.stderr[-1500:].strip()


def end_with_this():
    """In a run's process: it is killed when this one dies, so that no second is beside it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def died(status):
    """Whether a signal ended it, but for Ctrl-C: the command says 128 + its number."""
    return status < 0 or status > 128 and status != 128 + signal.SIGINT


def starter(gpus):
    """A function that starts a run, here or on the cluster, and gives its Future of `attempt`."""
    given = {name: value for name, value in os.environ.items() if name.startswith(GIVEN)}
    if not os.environ.get("RAY_ADDRESS"):
        pool = ThreadPoolExecutor(1)
        return lambda run: pool.submit(attempt, run, HERE, given)
    import ray

    ray.init()
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    if gpus > max(machine.get("GPU", 0) for machine in machines):
        print(f"no machine of the cluster has {gpus} GPU yet: runs wait (--gpus=0 needs none)")
    cores = 1 if gpus else min(m["CPU"] for m in machines if m.get("CPU"))  # a whole machine
    remote = ray.remote(num_gpus=gpus, num_cpus=cores, max_retries=TRIES - 1)(attempt)
    return lambda run: remote.remote(run, HERE, given).future()


def run_all(needs, start):
    """Each run after those that it needs: {run: (how it ended, minutes)}."""
    order, running, ended = TopologicalSorter(needs), {}, {}
    order.prepare()
    while order.is_active():
        running |= {start(run): run for run in order.get_ready()}
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            try:
                status, minutes, words = future.result()
            except Exception as error:  # Ray's, where a machine is lost too often
                status, minutes, words = -9, None, f"{type(error).__name__}: {error}"
            how = "died" if died(status) else "failed" if status else "complete"
            print(f"{run}: {how}" + (f"\n{words}" if status else ""), flush=True)
            ended[run] = how, minutes
            order.done(run)
    return ended


if __name__ == "__main__":
    import experiment
    from harness.plans import planned

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="names or patterns, also in a profile's folder "
                        "('smollm2/run_*'); none, or all: the whole plan")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="of each run, on Ray")
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and by that the run
    there = "gemma-2-2b" if os.environ.get("RAY_ADDRESS") and asked.gpus else None  # with a GPU
    plan = planned(experiment, HERE, asked.runs, there)
    os.environ["SAE_PROFILE"] = plan.profile
    ended = plan.complete | run_all(plan.needs, starter(asked.gpus))
    print(plan.table(ended))
    sys.exit(any(not how.startswith("complete") for how, _ in ended.values()))
