"""Small trainings of the notebooks for tests to interrupt.

    python -m tests.faults NN PATH

trains that of notebook NN with a checkpoint at PATH, says which steps it reports, and after step 20 waits to be killed.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from tools import cookbook
from tools.lift import lift


@dataclass(frozen=True)
class Training:
    """A training of 40 steps with a point in its log every ten."""

    number: str  # of the notebook
    settings: dict  # of its Run
    arguments: Callable  # of the notebook: what train() takes after the run
    columns: tuple  # of the log, that a resumed training repeats to the last bit; seconds differ
    misfits: tuple  # changes to its Run after which its checkpoint does not fit
    identities: Callable  # of the notebook, run and arguments: what checkpoint_path() takes, for runs that all differ
    reports_all: bool = False  # whether a resumed training reports its log from the start
    seconds_add_up: bool = False  # whether log["seconds"] counts from the start, not from the point before
    notebook: ModuleType | None = None  # its definitions

    def run(self, changes=None):
        """Its Run with some fields changed."""
        return self.notebook.Run(**{**self.settings, **(changes or {})})

    def __call__(self, changes=None, **options):
        """Train with changes to the run and further options of train(); returns (model, log)."""
        run = self.run(changes)
        return self.notebook.train(run, *self.arguments(self.notebook), eval_every=10, **options)

    def checkpoint_paths(self, folder):
        """Paths of checkpoints in the folder that should all differ."""
        identities = self.identities(self.notebook, self.run(), *self.arguments(self.notebook))
        return [self.notebook.checkpoint_path(folder, *identity) for identity in identities]


def arguments_01(notebook):
    """Random pictures, the seed."""
    source = np.random.default_rng(0)

    def part(count):
        pictures = source.integers(0, 256, (count, 3, 16, 16)).astype(np.uint8)
        return pictures, source.integers(0, 10, count).astype(np.uint8)

    return notebook.Pictures({"train": part(120), "test": part(20)}), 3


def identities_01(notebook, run, data, seed):
    """By data, settings, seed, points of the log; those of courses by each of their settings."""
    return [
        ("data", run, seed, 10),
        ("other", run, seed, 10),
        ("data", replace(run, centre=True), seed, 10),
        ("data", replace(run, cg_steps=5), seed, 10),
        ("data", run, seed + 1, 10),
        ("data", run, seed, 20),
        ("course", "data", True, 1.0, 50, 2, 3),
        ("course", "data", False, 1.0, 50, 2, 3),
        ("course", "data", True, 1.0, 50, 3, 3),
    ]


TRAININGS = (
    Training(
        number="01",
        settings={"widths": (8, 6), "batch_size": 16, "steps": 40},  # an epoch ends in the middle
        arguments=arguments_01,
        columns=("step", "loss", "accuracy"),
        misfits=({"widths": (8, 7)}, {"optimizer": "muon"}),
        identities=identities_01,
        reports_all=True,
        seconds_add_up=True,
    ),
)


def main(number, path):
    (training,) = (training for training in TRAININGS if training.number == number)
    training = replace(training, notebook=lift(cookbook.find(number)[0]))

    def report(series, value, step):
        print(step, flush=True)
        time.sleep(30 if step > 20 else 0)

    training(checkpoint=Path(path), save_every=0, report=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
