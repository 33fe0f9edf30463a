"""Runs that are interrupted, data that are missing or damaged: nothing is lost, and the error says what to do."""

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.checks import check_kill_while_saving
from tests.faults import TRAININGS
from tools import cookbook

# --- interrupted trainings of notebook 01

NOT_OF_THIS_MODEL = r"run.pt is damaged or not of this model: delete it"


@pytest.fixture(params=[training.number for training in TRAININGS])
def training(request):
    """The small training of a notebook."""
    (training,) = (training for training in TRAININGS if training.number == request.param)
    return replace(training, notebook=request.getfixturevalue(f"nb{request.param}"))


def check_same(training, first, second):
    """Two (model, log) are the same to the last bit, seconds aside."""
    (model, log), (other_model, other_log) = first, second
    for column in training.columns:
        assert log[column] == other_log[column], column
    weights, other_weights = model.state_dict(), other_model.state_dict()
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


def interrupt_at(step):
    """A report that stops the training where it reports a later step."""

    def report(series, value, now):
        if now > step:
            raise KeyboardInterrupt

    return report


METHODS = (("explicit", "nesterov"), ("exact", "nesterov"), ("cg", "adam"), ("explicit", "muon"))
VARIANTS = [  # (notebook, changes to its Run, options of train)
    *(("01", {"method": method, "optimizer": name, "learning_rate": 0.02}, {}) for method, name in METHODS),
]


@pytest.mark.parametrize(("training", "changes", "options"), VARIANTS, indirect=["training"], ids=str)
def test_interrupted_training_resumes_to_the_same_numbers(training, changes, options, tmp_path):
    """Batches, dropout, optimisers, loss scaler and curves included."""
    path, points, resumed_points = tmp_path / "c" / "run.pt", [], []
    whole = training(changes, report=lambda *point: points.append(point), **options)
    with pytest.raises(KeyboardInterrupt):
        training(changes, checkpoint=path, save_every=0, report=interrupt_at(20), **options)
    kept = torch.load(path, weights_only=True)["log"]
    torch.rand(7)  # whatever the restarted notebook has drawn before
    resumed = training(changes, checkpoint=path, report=lambda *point: resumed_points.append(point), **options)
    assert kept["step"] == [10, 20]
    assert resumed[1]["seconds"][:2] == kept["seconds"]
    if training.seconds_add_up:
        assert all(before < after for before, after in itertools.pairwise(resumed[1]["seconds"]))
    assert resumed_points == [point for point in points if training.reports_all or point[2] > 20]
    check_same(training, whole, resumed)
    check_same(training, whole, training(changes, checkpoint=path, **options))  # finished: nothing left to do


def test_killed_training_resumes_to_the_same_numbers(training, tmp_path):
    path = tmp_path / "run.pt"
    command = [sys.executable, "-m", "tests.faults", training.number, str(path)]
    with subprocess.Popen(command, cwd=cookbook.ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "30":
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["log"]["step"] == [10, 20]
    check_same(training, training(), training(checkpoint=path))


def test_a_kill_while_saving_leaves_the_old_checkpoint(training, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        training(checkpoint=path, save_every=0, report=interrupt_at(20))
    check_kill_while_saving(lambda: training(checkpoint=path, save_every=0), path, monkeypatch)


def test_checkpoints_hold_data_only(training, tmp_path):
    """They load without unpickling code; nothing else lies beside them."""
    path = tmp_path / "c" / "run.pt"
    training(checkpoint=path)
    log = torch.load(path, weights_only=True)["log"]
    assert log["step"] == [10, 20, 30, 40]
    assert all(np.isfinite(log[column]).all() for column in training.columns)
    assert list(path.parent.iterdir()) == [path]


def test_each_run_has_its_own_checkpoint(training, tmp_path, monkeypatch):
    """Settings, seed, data and number format count."""
    paths = training.checkpoint_paths(tmp_path)
    assert training.checkpoint_paths(tmp_path) == paths
    if hasattr(training.notebook, "amp_dtype"):
        monkeypatch.setattr(training.notebook, "amp_dtype", lambda device: torch.float16)
        paths.append(training.checkpoint_paths(tmp_path)[0])
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_damaged_checkpoint_is_named(training, tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
        training(checkpoint=path)


def test_a_checkpoint_of_another_model_is_named(training, tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=NOT_OF_THIS_MODEL):
        training(checkpoint=path)
    path.unlink()
    training(checkpoint=path)
    for changes in training.misfits:
        with pytest.raises(ValueError, match=NOT_OF_THIS_MODEL):
            training(changes, checkpoint=path)


def test_a_finished_run_of_01_is_remembered(nb01, tmp_path):
    path, calls = tmp_path / "c" / "run.pt", []
    compute = lambda: calls.append(1) or {"accuracy": [0.5, 0.25], "seconds": 1.5}
    assert nb01.remembered(path, compute) == nb01.remembered(path, compute) == {"accuracy": [0.5, 0.25], "seconds": 1.5}
    assert calls == [1]
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
        nb01.remembered(path, compute)
