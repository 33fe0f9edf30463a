"""Every notebook from top to bottom in the smoke preset, alone in an empty folder, offline, on the embedded data."""

import json
import re
import zipfile

import nbclient
import pytest

from tests import execute
from tests.rules import pictures
from tools import cookbook

PATHS = cookbook.find()
DATA = str(cookbook.ROOT / "data")
NO_DATA = {"04"}  # their data are made by a package


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem)
def smoke(request, tmp_path_factory):
    """(path, folder, executed notebook)"""
    folder = tmp_path_factory.mktemp(request.param.stem)
    return request.param, folder, execute.run(request.param, folder, COOKBOOK_PRESET="smoke", COOKBOOK_DATA=DATA)


def session_of(folder):
    """(task, events, names of files) of the ClearML session that a run left."""
    (path,) = folder.glob("clearml/offline/*.zip")
    with zipfile.ZipFile(path) as archive:
        task = json.loads(archive.read("task.json"))
        events = [event for line in archive.read("metrics.jsonl").splitlines() for event in json.loads(line)]
        return task, events, archive.namelist()


def test_runs_and_shows(smoke):
    _, _, notebook = smoke
    assert cookbook.runtime(notebook)["preset"] == "smoke"
    assert len(pictures(notebook.cells)) >= 3
    assert len(pictures(cookbook.tagged(notebook, "picture"))) == 1
    assert cookbook.headline(notebook)


def test_warns_of_nothing(smoke):
    warnings = [o.text for c in cookbook.code_cells(smoke[2]) for o in c.outputs if o.get("name") == "stderr"]
    assert warnings == []


def test_clearml_session_is_complete(smoke):
    """Configuration, curves, figures and the final table."""
    task, events, files = session_of(smoke[1])
    kinds = {event["type"] for event in events}
    settings = task["hyperparams"]["config"]
    assert settings["preset"]["value"] == "smoke"
    assert len(settings) > 5
    assert "training_stats_scalar" in kinds
    assert len([event for event in events if event["type"] == "training_stats_scalar"]) > 20
    tables = [event for event in events if event["type"] == "plot" and '"table"' in event["plot_str"]]
    assert "results" in {event["variant"] for event in tables}
    images = [name for name in files if name.endswith((".png", ".jpeg", ".jpg"))]
    plots = [event for event in events if event["type"] == "plot" and event not in tables]
    assert len(plots) + len(images) >= 3


def test_leaves_nothing_elsewhere(smoke):
    """What a run writes stays in its folder, under the three names that the README states."""
    assert {path.name for path in smoke[1].iterdir()} <= {"checkpoints", "clearml", "data"}


def test_runs_again_to_the_same_numbers(smoke):
    """A second run in the same folder takes up the finished checkpoints."""
    path, folder, first = smoke
    if not (folder / "checkpoints").exists():
        pytest.skip("keeps no checkpoints")
    second = execute.run(path, folder, COOKBOOK_PRESET="smoke", COOKBOOK_DATA=DATA)
    measure = r"(?:validation (?:loss|accuracy)|AUROC|PRO|success) (?:[A-Za-z_ ]+ )?[\d.]+(?: ± [\d.]+)?"
    numbers = lambda notebook: re.findall(measure, cookbook.headline(notebook))
    assert numbers(second)
    assert numbers(second) == numbers(first)


@pytest.mark.parametrize("path", [path for path in PATHS if path.name[:2] not in NO_DATA], ids=lambda path: path.stem)
def test_without_data_says_where_it_is(path, tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"https://\S+.*COOKBOOK_DATA"):
        execute.run(path, tmp_path, COOKBOOK_PRESET="smoke", COOKBOOK_DATA=str(tmp_path / "nothing"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_wrong_preset_lists_the_right_ones(path, tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="'fast' is unknown; choose one of: auto, smoke, cpu, gpu"):
        execute.run(path, tmp_path, COOKBOOK_PRESET="fast")
