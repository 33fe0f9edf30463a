"""Runs that are interrupted, data that are missing or damaged: nothing is lost, and the error says what to do."""

import functools
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import execute
from tests.web import serving
from tools import cookbook

FULL_TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(params=["nb03", "nb07"])
def shakespeare(request, monkeypatch):
    """A notebook on Shakespeare with a short text in the place of tiny-shakespeare, and its sha256."""
    notebook = request.getfixturevalue(request.param)
    monkeypatch.setitem(notebook.TEXT_SHA256, "tinyshakespeare.txt", hashlib.sha256(FULL_TEXT).hexdigest())
    monkeypatch.setitem(notebook.TEXT_SHA256, "shakespeare.txt", hashlib.sha256(FULL_TEXT.upper()).hexdigest())
    return notebook


@pytest.fixture
def web():
    """URL of a server: /right sends the text, /wrong a part, /cut too but announces it all, else 404."""
    pages = {"/right": FULL_TEXT, "/wrong": FULL_TEXT[:20], "/cut": FULL_TEXT[:20]}
    with serving(pages, {"/cut": len(FULL_TEXT)}) as (url, _):
        yield url


# --- the text of notebooks 03 and 07


def test_mirrors_are_tried_in_order_and_checked(shakespeare, web, tmp_path, capsys):
    path = tmp_path / "new" / "tinyshakespeare.txt"
    assert shakespeare.download(path, (f"{execute.NOWHERE}/x", f"{web}/gone", f"{web}/cut", f"{web}/wrong", f"{web}/right"))
    assert path.read_bytes() == FULL_TEXT
    said = capsys.readouterr().out
    assert said.count("could not download") == 3
    assert "sent something else (20 bytes)" in said


def test_nothing_is_written_without_the_right_bytes(shakespeare, web, tmp_path):
    path = tmp_path / "tinyshakespeare.txt"
    assert not shakespeare.download(path, (f"{web}/wrong", f"{execute.NOWHERE}/x"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(shakespeare, web, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert not shakespeare.download(tmp_path / "file" / "tinyshakespeare.txt", (f"{web}/right",))
    assert "could not download" in capsys.readouterr().out


def test_full_text_comes_first(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "download", lambda path: pytest.fail("asked the network"))
    (tmp_path / "tinyshakespeare.txt").write_bytes(FULL_TEXT)
    (tmp_path / "shakespeare.txt").write_bytes(FULL_TEXT.upper())
    assert shakespeare.load_text(tmp_path, "cpu") == FULL_TEXT.decode()


def test_embedded_text_without_a_network(shakespeare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, "download", lambda path: False)
    (tmp_path / "shakespeare.txt").write_bytes(FULL_TEXT.upper())
    assert shakespeare.load_text(tmp_path, "cpu") == FULL_TEXT.decode().upper()
    assert "EMBEDDED TEXT" in capsys.readouterr().out


def test_smoke_with_embedded_text_asks_no_network(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "download", lambda path: pytest.fail("asked the network"))
    (tmp_path / "shakespeare.txt").write_bytes(FULL_TEXT.upper())
    assert shakespeare.load_text(tmp_path, "smoke") == FULL_TEXT.decode().upper()


def test_no_text_at_all(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "download", lambda path: False)
    with pytest.raises(FileNotFoundError, match=r"save https://.* as .*tinyshakespeare.txt, or point COOKBOOK_DATA"):
        shakespeare.load_text(tmp_path, "smoke")


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "shakespeare.txt"])
def test_a_truncated_text_is_named(shakespeare, tmp_path, monkeypatch, name):
    monkeypatch.setattr(shakespeare, "download", lambda path: False)
    (tmp_path / name).write_bytes(FULL_TEXT[:30])
    with pytest.raises(ValueError, match=rf"{name} is corrupt or incomplete \(30 bytes\): delete it"):
        shakespeare.load_text(tmp_path, "cpu")


# --- interrupted runs of notebook 07


@pytest.fixture(scope="module")
def run07(nb07):
    return nb07.Run(n_layer=2, n_head=2, d_model=16, context=16, batch_size=4, steps=40, warmup=5, dropout=0.2)


@pytest.fixture(scope="module")
def corpus07(nb07):
    return nb07.make_corpus("to be, or not to be: that is the question. " * 60)


def equal(first, second):
    """Whether two (model, log) pairs are the same to the last bit; seconds aside."""
    weights = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(first[1][key] == second[1][key] for key in ("step", "train", "validation"))


def interrupt_at(step):
    def report(series, value, now):
        if now > step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_interrupted_training_resumes_to_the_same_numbers(nb07, run07, corpus07, tmp_path, dtype):
    """Dropout, batches, optimiser, loss scaler and curves included."""
    whole = nb07.train(run07, corpus07, 3, eval_every=10, dtype=dtype)
    path = tmp_path / "c" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        nb07.train(run07, corpus07, 3, eval_every=10, checkpoint=path, save_every=0, report=interrupt_at(20), dtype=dtype)
    torch.rand(7)  # whatever the restarted notebook has drawn before
    steps = []
    resumed = nb07.train(run07, corpus07, 3, eval_every=10, checkpoint=path, report=lambda *point: steps.append(point[2]), dtype=dtype)
    assert min(steps) == 30
    assert equal(whole, resumed)
    assert equal(whole, nb07.train(run07, corpus07, 3, eval_every=10, checkpoint=path, dtype=dtype))  # finished: nothing left to do


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.lift import lift
from tools import cookbook
nb07 = lift(cookbook.find("07")[0])
run = nb07.Run(n_layer=2, n_head=2, d_model=16, context=16, batch_size=4, steps=40, warmup=5, dropout=0.2)
corpus = nb07.make_corpus("to be, or not to be: that is the question. " * 60)
def report(series, value, step):
    print(step, flush=True)
    time.sleep(30 if step > 20 else 0)
nb07.train(run, corpus, 3, eval_every=10, checkpoint=Path({path!r}), save_every=0, report=report)
"""


def test_killed_training_resumes_to_the_same_numbers(nb07, run07, corpus07, tmp_path):
    path = tmp_path / "run.pt"
    script = KILLED.format(root=str(cookbook.ROOT), path=str(path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "30":
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert equal(nb07.train(run07, corpus07, 3, eval_every=10), nb07.train(run07, corpus07, 3, eval_every=10, checkpoint=path))


def check_torn_save(train, path, monkeypatch):
    """A kill while train(checkpoint, save_every, ...) writes a checkpoint leaves the one before."""
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, save_every=0, report=interrupt_at(20))
    before = path.read_bytes()

    def torn(state, target):
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, save_every=0)
    assert path.read_bytes() == before


def test_a_kill_while_saving_leaves_the_old_checkpoint(nb07, run07, corpus07, tmp_path, monkeypatch):
    check_torn_save(functools.partial(nb07.train, run07, corpus07, 3, eval_every=10), tmp_path / "run.pt", monkeypatch)


def test_another_run_does_not_take_up_the_checkpoint(nb07, run07, corpus07, tmp_path):
    paths = [
        nb07.checkpoint_path(tmp_path, run, corpus07, seed, 10) for run, seed in ((run07, 3), (replace(run07, dropout=0.0), 3), (run07, 4))
    ]
    assert len(set(paths)) == 3


def test_a_damaged_checkpoint_is_named(nb07, run07, corpus07, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
        nb07.train(run07, corpus07, 3, eval_every=10, checkpoint=path)


def test_a_checkpoint_of_another_model_is_named(nb07, run07, corpus07, tmp_path):
    path = tmp_path / "run.pt"
    nb07.train(run07, corpus07, 3, eval_every=40, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
        nb07.train(replace(run07, position="learned"), corpus07, 3, eval_every=40, checkpoint=path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
        nb07.train(run07, corpus07, 3, eval_every=40, checkpoint=path)


def test_checkpoints_hold_data_only(nb07, run07, corpus07, tmp_path):
    """They load without unpickling code."""
    path = tmp_path / "run.pt"
    nb07.train(run07, corpus07, 3, eval_every=40, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert state["log"]["step"] == [40]
    assert np.isfinite(state["log"]["train"]).all()
    assert not path.with_suffix(".tmp").exists()
    assert time.time() - path.stat().st_mtime < 600


# --- interrupted runs of notebook 03


@pytest.fixture(scope="module")
def task03(nb03):
    """(run, data, score) of a small training."""
    run = nb03.Run(n_layer=2, d_model=16, n_head=4, context=16, batch_size=4, steps=40, warmup=5)
    data = nb03.Text("to be, or not to be: that is the question. " * 60)
    return run, data, lambda model: nb03.text_loss(model, data.validation, 16)


def same(first, second):
    """Whether two (model, log) pairs are the same to the last bit; seconds aside."""
    weights = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(
        first[1][key] == second[1][key] for key in ("step", "loss", "score", "lambda")
    )


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_interrupted_training_of_03_resumes_to_the_same_numbers(nb03, task03, tmp_path, kind, dtype):
    """Batches, optimiser, loss scaler, lambda and curves included."""
    run, data, score = task03
    train = lambda **options: nb03.train(replace(run, kind=kind), data, 3, score, eval_every=10, dtype=dtype, **options)
    whole, path = train(), tmp_path / "c" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, save_every=0, report=interrupt_at(20))
    torch.rand(7)  # whatever the restarted notebook has drawn before
    steps = []
    resumed = train(checkpoint=path, report=lambda *point: steps.append(point[2]))
    assert min(steps) == 30
    assert same(whole, resumed)
    assert same(whole, train(checkpoint=path))  # finished: nothing left to do
    assert torch.load(path, weights_only=True)["log"]["step"] == [10, 20, 30, 40]
    assert not path.with_suffix(".tmp").exists()


def test_a_kill_while_saving_leaves_the_old_checkpoint_of_03(nb03, task03, tmp_path, monkeypatch):
    run, data, score = task03
    check_torn_save(functools.partial(nb03.train, run, data, 3, score, eval_every=10), tmp_path / "run.pt", monkeypatch)


def test_each_run_of_03_has_its_own_checkpoint(nb03, task03, tmp_path, monkeypatch):
    """Settings, seed, data and number format count."""
    run, data, cpu = *task03[:2], torch.device("cpu")
    recall, other = nb03.Recall((8,), (2,)), nb03.Recall((8, 9), (2,))
    variants = [(data, run, 3, 10), (data, replace(run, initial=0.8), 3, 10), (data, run, 4, 10), (data, run, 3, 20), (recall, run, 3, 10),
                (other, run, 3, 10), (nb03.Text("another text " * 9), run, 3, 10), (nb03.Recurrence(), run, 3, 10),
                (nb03.Recurrence(p=0.2), run, 3, 10)]  # fmt: skip
    paths = {nb03.checkpoint_path(tmp_path, *variant, cpu) for variant in variants}
    assert nb03.checkpoint_path(tmp_path, *variants[0], cpu) in paths
    monkeypatch.setattr(nb03, "amp_dtype", lambda device: torch.float16)
    paths.add(nb03.checkpoint_path(tmp_path, *variants[0], cpu))
    assert len(paths) == 10


def test_a_damaged_checkpoint_of_03_is_named(nb03, task03, tmp_path):
    run, data, score = task03
    path = tmp_path / "run.pt"
    for content in (b"not a checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
            nb03.train(run, data, 3, score, checkpoint=path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
        nb03.train(run, data, 3, score, checkpoint=path)
    path.unlink()
    nb03.train(run, data, 3, score, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
        nb03.train(replace(run, kind="ordinary"), data, 3, score, checkpoint=path)


# --- interrupted runs of notebook 01


@pytest.fixture(scope="module")
def pictures01(nb01):
    source = np.random.default_rng(0)
    part = lambda count: (source.integers(0, 256, (count, 3, 16, 16)).astype(np.uint8), source.integers(0, 10, count).astype(np.uint8))
    return nb01.Pictures({"train": part(120), "test": part(20)})


def alike(first, second):
    """Whether two (model, log) pairs are the same to the last bit; seconds aside."""
    weights = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(first[1][key] == second[1][key] for key in ("step", "loss", "accuracy"))


@pytest.mark.parametrize(("method", "optimizer"), [("explicit", "nesterov"), ("exact", "nesterov"), ("cg", "adam"), ("explicit", "muon")])
def test_interrupted_training_of_01_resumes_to_the_same_numbers(nb01, pictures01, tmp_path, method, optimizer):
    """In the middle of an epoch; batches, momenta, several optimisers and curves included."""
    run = nb01.Run(widths=(8, 6), method=method, optimizer=optimizer, learning_rate=0.02, batch_size=16, steps=40)
    train = lambda **options: nb01.train(run, pictures01, 3, eval_every=10, **options)
    whole, path = train(), tmp_path / "c" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, save_every=0, report=interrupt_at(20))
    torch.rand(7)  # whatever the restarted notebook has drawn before
    first, points = torch.load(path, weights_only=True)["log"], []
    resumed = train(checkpoint=path, report=lambda *point: points.append(point))
    assert first["step"] == [10, 20]
    assert resumed[1]["seconds"][:2] == first["seconds"]
    assert alike(whole, resumed)
    for series in ("loss", "accuracy"):  # the curves are whole again
        assert [point[1:] for point in points if point[0] == series] == list(zip(whole[1][series], whole[1]["step"], strict=True))
    assert alike(whole, train(checkpoint=path))  # finished: nothing left to do
    assert all(a < b for a, b in itertools.pairwise(resumed[1]["seconds"]))
    assert torch.load(path, weights_only=True)["log"]["step"] == [10, 20, 30, 40]
    assert not path.with_suffix(".tmp").exists()


def test_a_kill_while_saving_leaves_the_old_checkpoint_of_01(nb01, pictures01, tmp_path, monkeypatch):
    run = nb01.Run(widths=(8, 6), batch_size=16, steps=40)
    check_torn_save(functools.partial(nb01.train, run, pictures01, 3, eval_every=10), tmp_path / "run.pt", monkeypatch)


def test_each_run_of_01_has_its_own_checkpoint(nb01, tmp_path):
    run = nb01.Run()
    variants = [("data", run, 3, 10), ("data", replace(run, centre=True), 3, 10), ("data", run, 4, 10), ("data", run, 3, 20),
                ("other", run, 3, 10), ("data", replace(run, cg_steps=5), 3, 10), ("course", "data", True, 1.0, 50, 2, 3),
                ("course", "data", False, 1.0, 50, 2, 3), ("course", "data", True, 1.0, 50, 3, 3)]  # fmt: skip
    assert len({nb01.checkpoint_path(tmp_path, *variant) for variant in variants}) == len(variants)
    assert nb01.checkpoint_path(tmp_path, *variants[0]) == nb01.checkpoint_path(tmp_path, *variants[0])


def test_a_finished_run_of_01_is_remembered(nb01, tmp_path):
    path, calls = tmp_path / "c" / "run.pt", []
    compute = lambda: calls.append(1) or {"accuracy": [0.5, 0.25], "seconds": 1.5}
    assert nb01.remembered(path, compute) == nb01.remembered(path, compute) == {"accuracy": [0.5, 0.25], "seconds": 1.5}
    assert calls == [1]
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
        nb01.remembered(path, compute)


def test_a_damaged_checkpoint_of_01_is_named(nb01, pictures01, tmp_path):
    run, path = nb01.Run(widths=(8, 6), batch_size=16, steps=10), tmp_path / "run.pt"
    for content in (b"not a checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.pt is damaged.*delete it"):
            nb01.train(run, pictures01, 3, checkpoint=path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
        nb01.train(run, pictures01, 3, checkpoint=path)
    path.unlink()
    nb01.train(run, pictures01, 3, checkpoint=path)
    for other in (replace(run, widths=(8, 7)), replace(run, optimizer="muon")):
        with pytest.raises(ValueError, match=r"run.pt is damaged or not of this model: delete it"):
            nb01.train(other, pictures01, 3, checkpoint=path)
