"""The miniature: its numbers, its resuming, its cells run twice, and the notebook that `make new` makes of it."""

import itertools
import json
import re
import sys

import nbformat
import numpy as np
import pytest
import torch

from tests.clearml_server import ClearMLServer
from tests.rules import RULES
from tests.stranger import environment
from tools import cookbook, new
from tools.execute import execute
from tools.lift import lift

NEEDS_OUTPUTS = {"executed_in_order", "exercises", "figures", "figures_to_read", "not_stale", "rendered_facts", "results_record"}


@pytest.fixture(scope="module")
def miniature():
    """The definitions of the miniature."""
    return lift(cookbook.MINIATURE)


def points(count=30):
    x, y = torch.randn(2, count, dtype=torch.float64)
    return x, 2 * x + y


def test_slope(miniature):
    """Against autograd, in float64."""
    x, y = points()
    line = torch.randn(2, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(miniature.loss(line, x, y), line)[0]
    assert torch.allclose(miniature.slope(line.detach(), x, y), expected, atol=1e-12)


def test_closed_form(miniature):
    x, y = points()
    assert np.allclose(miniature.closed_form(x, y), np.polyfit(x, y, 1))


def test_steps_to(miniature):
    """After the last time above the level, not the first below."""
    log = {"step": [0, 1, 2, 3, 4], "loss": [5.0, 1.0, 3.0, 1.0, 1.0]}
    assert miniature.steps_to(log, 2.0) == 3
    assert miniature.steps_to(log, 9.0) == 0
    assert miniature.steps_to(log, 0.5) == 4


def test_training_finds_the_closed_form(miniature):
    data = miniature.load_points("cpu")
    log, line = miniature.train(miniature.Config(steps=2000), data, 0)
    assert torch.allclose(line, miniature.closed_form(*data["train"]), atol=1e-3)
    assert log["loss"][-1] == pytest.approx(miniature.loss(line, *data["validation"]).item())


def test_an_interrupted_training_resumes_to_the_same_numbers(miniature, tmp_path, monkeypatch):
    """Killed in its thirteenth step, the run goes on there."""
    data, config = miniature.load_points("cpu"), miniature.Config(steps=30, momentum=0.9)
    whole = miniature.train(config, data, 3)
    monkeypatch.setattr(miniature.time, "monotonic", itertools.count(0, 100).__next__)  # a checkpoint is due at every step
    step, steps = torch.optim.SGD.step, []

    def interrupted(self):
        steps.append(step(self))
        if len(steps) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        miniature.train(config, data, 3, tmp_path)
    log, line = miniature.train(config, data, 3, tmp_path)
    assert len(steps) == 13 + 18  # twelve were kept
    assert log == whole[0]
    assert torch.equal(line, whole[1])


# --- cells run twice


GOES_ONLINE = """import os
os.environ.update({variables!r})"""


def twice(variables):
    """The miniature offline with every code cell run twice in a row, then, online by `variables`, once more from top to bottom."""
    notebook = cookbook.read(cookbook.MINIATURE)
    sources = [cell.source for cell in cookbook.code_cells(notebook)]
    sources = [*(source for source in sources for _ in range(2)), GOES_ONLINE.format(variables=variables), *sources]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return notebook


def test_cells_and_the_whole_notebook_run_twice_in_one_kernel(tmp_path):
    path = tmp_path / "00_twice.ipynb"
    with ClearMLServer() as server:
        variables = {"CLEARML_API_ACCESS_KEY": "key", "CLEARML_API_SECRET_KEY": "secret"}
        variables |= {f"CLEARML_{kind}_HOST": server.url for kind in ("API", "WEB", "FILES")}
        nbformat.write(twice(variables), path)
        execution = execute(path, tmp_path / "run", environment(COOKBOOK_PRESET="smoke"), timeout=300)
    assert execution.error is None
    calls = [call for call, _ in server.requests]
    assert calls.count("tasks.create") == calls.count("tasks.completed") == 1
    assert len(list((tmp_path / "run").glob("clearml/offline/*.zip"))) == 2
    records = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len({record["name"] for record in records}) == len(records)


# --- make new


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Calls `make new` in a repository of its own; returns the path of the new notebook."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text((cookbook.ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(cookbook, "ROOT", tmp_path)
    monkeypatch.setattr(cookbook, "NOTEBOOKS", tmp_path / "notebooks")

    def call(number, name):
        monkeypatch.setattr(sys, "argv", ["new", "--nb", number, "--name", name])
        new.main()
        return tmp_path / "notebooks" / f"{number}_{name}.ipynb"

    return call


def test_a_new_notebook_keeps_the_rules_and_has_no_outputs(begin):
    path = begin("09", "batch_normalization")
    notebook = cookbook.read(path)
    complaints = {name: list(rule(notebook, path)) for name, rule in RULES.items() if name not in NEEDS_OUTPUTS}
    assert {name: found for name, found in complaints.items() if found} == {}
    title = notebook.cells[0].source
    assert title.startswith("# 09 · Batch normalization\n")
    assert "blob/main/notebooks/09_batch_normalization.ipynb" in title
    assert "main/img/09_batch_normalization.png" in title
    assert "Not rendered yet." in title
    assert 'start_tracking("09 batch normalization"' in "".join(cell.source for cell in notebook.cells)
    assert not re.search(r"00[ _]least", nbformat.writes(notebook))
    assert "cookbook" not in notebook.metadata
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cookbook.code_cells(notebook))


def test_a_new_notebook_overwrites_nothing(begin):
    begin("09", "batch_normalization")
    with pytest.raises(SystemExit, match=r"there is 09_batch_normalization\.ipynb already"):
        begin("09", "other")


@pytest.mark.parametrize(("number", "name"), [("9", "a"), ("00", "a"), ("ab", "a"), ("09", "Batch"), ("09", "batch-norm"), ("09", "")])
def test_wrong_names_are_refused(begin, number, name):
    with pytest.raises(SystemExit, match="it takes"):
        begin(number, name)
