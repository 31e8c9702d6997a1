"""Training watched while it goes on: the values of train_log.jsonl, in W&B or TensorBoard.

Nothing of it may change or end a run: where a tracker fails, one line says so and the run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

from harness.console import print_line
from harness.errors import first_line
from harness.observation import unwatched
from harness.store import place_for

PROJECT = "parametric-contrastive-sae"  # W&B's, unless WANDB_PROJECT says another
PLACES = ("step", "layer", "seed")  # of a record: where it is shown, no values
Log = Callable[[dict[str, float], int], None]  # values by name, at a step


class Tracker:
    """Where values go: nowhere, until `watching` has begun."""

    def __init__(self) -> None:
        self.log: Log | None = None

    @contextlib.contextmanager
    def watching(self, kind: str, name: str, config: Any) -> Iterator[None]:
        """Inside, what `records` and `summary` are given is logged.

        Args:
            kind: of STARTS; "": nowhere. name: of the run, with its profile. config: its settings.
        """
        with contextlib.ExitStack() as ends:
            ends.callback(setattr, self, "log", None)
            if kind:
                with self.failing(kind), unwatched():
                    self.log, end = STARTS[kind](name, dataclasses.asdict(config))
                    ends.callback(self.ended, kind, end)
            yield

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Ends the tracking where something inside fails; the run goes on."""
        try:
            yield
        except Exception as error:
            self.log = None
            print_line(f"{what} has failed, the run goes on without: {first_line(error)}")

    def ended(self, kind: str, end: Callable[[], None]) -> None:
        """Closes the tracker."""
        with self.failing(kind), unwatched():
            end()

    def records(self, records: list[dict[str, Any]]) -> None:
        """Logs lines of train_log.jsonl: layer_1/seed_0/fvu and so on, at their step."""
        steps: dict[int, dict[str, float]] = {}
        for record in records if self.log is not None else ():
            place = f"layer_{record['layer']}/seed_{record['seed']}"
            values = steps.setdefault(record["step"], {})
            values |= {f"{place}/{name}": float(value) for name, value in record.items()
                       if name not in PLACES and isinstance(value, (int, float))}  # fmt: skip
        for step, values in steps.items():
            self.write(values, step)

    def summary(self, info: dict[str, dict[str, Any]], step: int) -> None:
        """Logs the means of final_info.json, as final/layer_1/fvu and so on, after all steps."""
        values = {f"final/{of}/{name}": float(value) for of, entry in info.items()
                  for name, value in entry["means"].items()}  # fmt: skip
        self.write(values, step)

    def write(self, values: dict[str, float], step: int) -> None:
        """Logs values at a step."""
        if self.log is not None:
            with self.failing("tracking"), unwatched():
                self.log(values, step)


TRACKER = Tracker()


def lacks_login() -> bool:
    """Whether W&B is to send values to its server, and has no key for it.

    By itself it would ask for one, on a terminal, and wait.
    """
    import wandb

    known = wandb.setup(wandb.Settings(silent=True)).settings  # silent: it asks nobody
    online = known.mode not in ("offline", "dryrun", "disabled")
    return online and not (wandb.api.api_key or known.identity_token_file)


def start_wandb(name: str, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    """Weights & Biases; WANDB_MODE=offline writes to the folder of the cache alone.

    A server that doesn't answer holds up a run for 30 seconds at its start, and 60 at its end.
    """
    import wandb

    place = place_for("wandb")
    quiet = wandb.Settings(
        console="off", silent=True, disable_git=True, disable_code=True, init_timeout=30,
        finish_timeout=60, finish_timeout_raises=True,
    )  # fmt: skip
    wandb.setup(wandb.Settings(silent=True))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=config,
        dir=str(place), settings=quiet,
    )  # fmt: skip
    folder = os.path.dirname(run.dir)
    print_line(f"wandb: offline: wandb sync {folder}" if run.offline else f"wandb: {run.url}")
    return lambda values, step: run.log(values, step=step), run.finish


def start_tensorboard(name: str, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    """TensorBoard, by PyTorch's own writer; each attempt in a folder of its own."""
    from torch.utils.tensorboard import SummaryWriter

    place = place_for("tensorboard")
    began = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    writer = SummaryWriter(str(place / name / f"{began}-{os.getpid()}"))
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in config.items()))
    print_line(f"tensorboard: tensorboard --logdir {place}")

    def log(values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    return log, writer.close


STARTS: dict[str, Any] = {"": None, "wandb": start_wandb, "tensorboard": start_tensorboard}
