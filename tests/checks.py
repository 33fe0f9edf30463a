"""Checks that hold for definitions that several notebooks write out for themselves."""

import time
import types

import numpy as np
import pytest
import torch


def check_no_leak(model, size, length):
    """Another token at t changes the logits from t on and none before; tokens in [0, size)."""
    tokens = torch.randint(size, (1, length))
    for t in range(length):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % size
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-12
        assert not moved[:t].any()
        assert moved[t:].all()


def check_amp_dtype(notebook, monkeypatch):
    """bfloat16 only where it is native: a T4 (7.5) emulates it."""
    assert notebook.amp_dtype(types.SimpleNamespace(type="cpu")) == torch.float32
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert notebook.amp_dtype(types.SimpleNamespace(type="cuda")) == dtype


def check_statistics(notebook):
    """Mean and standard deviation of the sample, and their table in Markdown."""
    mean, std = notebook.mean_std([1.0, 2.0, 4.0])
    assert (mean, std) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert notebook.mean_std([5.0])[1] == 0
    assert notebook.mean_and_std([1000.0, 2000.0], 1) == "1,500.0 ± 707.1"
    assert notebook.markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def check_peak_memory(notebook):
    """Two blocks of a MiB at once, a third after one is gone."""

    def case():
        first, second = torch.empty(2**18), torch.empty(2**18)
        del first
        return second + torch.empty(2**18)[0]

    assert notebook.peak_memory(case, "cpu") / 2**20 == pytest.approx(3, abs=0.1)


def check_seconds_in_turns(notebook):
    """The first turn warms up; the cases alternate."""
    calls = []
    seconds = notebook.seconds_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert all(0 <= s < 0.1 for s in seconds.values())


def check_kill_while_saving(save, path, monkeypatch):
    """A kill while save() writes a checkpoint leaves the one before at `path`."""
    before = path.read_bytes()

    def torn(state, target):
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert path.read_bytes() == before


def check_error_ends_the_rest(notebook, monkeypatch, run):
    """run(function, items) on two cores: after an error nothing begins, and nothing runs on behind the cell."""
    monkeypatch.setattr(notebook.os, "cpu_count", lambda: 2)
    begun, ended = [], []

    def work(number):
        begun.append(number)
        if number == 1:
            raise KeyError("seed 1")
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(KeyError, match="seed 1"):
        run(work, range(50))
    assert len(begun) < 10
    assert sorted(ended) == sorted(set(begun) - {1})
