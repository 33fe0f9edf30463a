"""Every notebook from top to bottom in the smoke preset, alone in an empty folder, offline, on the embedded data."""

import copy
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from tests import stranger
from tools import cookbook, sync_canon
from tools.execute import read_json
from tools.render import clean_output, pictures

PATHS = cookbook.find() + cookbook.miniatures()
SMOKE = {"COOKBOOK_PRESET": "smoke", "COOKBOOK_DATA": str(cookbook.ROOT / "data")}
LEFT = {"checkpoints", "clearml", "data", "results.json", "run.json", "kernel.log"}
MEASURED_UNIT = re.compile(r"[nµum]?s|(milli|micro)?seconds?|minutes?|hours?|[kKMGT]?i?B|.+/ ?s(econd)?|times as fast")


def each(paths):
    """Parameters, one notebook each, whose tests share what is made for the notebook, and so run in one process."""
    return [pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)) for path in paths]


def asks_for_data(path):
    """Whether a notebook cannot do without data: one that only fetches, and raises nothing where that fails, has a way out."""
    notebook = cookbook.read(path)
    names = {name for name, _ in sync_canon.canon_cells(notebook)}
    own = "".join(cell.source for cell in cookbook.code_cells(notebook) if sync_canon.name_of(cell) is None)
    if "fetch" in names and not names & {"images", "folders"} and "missing(" not in own:
        return False
    return "COOKBOOK_DATA" in "".join(cell.source for cell in cookbook.code_cells(notebook))


@dataclass(frozen=True)
class Run:
    """A notebook's path, the folder in which it ran, its executed copy, what it says of the run, and its results."""

    path: Path
    folder: Path
    notebook: nbformat.NotebookNode
    facts: dict
    results: list | None


def run(path, folder, **options):
    notebook = stranger.run(path, folder, **SMOKE, **options)
    return Run(path, folder, notebook, read_json(folder / "run.json"), read_json(folder / "results.json"))


@pytest.fixture(scope="module", params=each(PATHS))
def smoke(request, tmp_path_factory):
    return run(request.param, tmp_path_factory.mktemp(request.param.stem))


def check_result(run, device=""):
    """It ran in smoke, drew its figures, and told its result."""
    assert len(pictures(run.notebook.cells)) >= 3
    assert len(pictures(cookbook.tagged(run.notebook, "picture"))) == 1
    assert run.facts["preset"] == "smoke"
    assert run.facts["device"].startswith(device)
    assert run.facts["headline"]
    assert all(record["values"] for record in run.results)


def numbers(run):
    """The measured quantities, but for those of time and memory, which differ from run to run."""
    hidden = lambda record: {"values": "measured"} if MEASURED_UNIT.fullmatch(record["unit"]) else {}
    return [{**record, **hidden(record)} for record in run.results]


def session_of(folder):
    """(task, events, names of files) of the ClearML session that a run left."""
    (path,) = folder.glob("clearml/offline/*.zip")
    with zipfile.ZipFile(path) as archive:
        task = json.loads(archive.read("task.json"))
        events = [event for line in archive.read("metrics.jsonl").splitlines() for event in json.loads(line)]
        return task, events, archive.namelist()


def test_runs_and_shows(smoke):
    check_result(smoke)


def test_warns_of_nothing(smoke):
    """Nothing on stderr but progress bars."""
    outputs = [clean_output(copy.deepcopy(o)) for c in cookbook.code_cells(smoke.notebook) for o in c.outputs if o.get("name") == "stderr"]
    assert [output.text for output in outputs if output] == []


def test_clearml_session_is_complete(smoke):
    """Configuration, curves, figures and the final table."""
    task, events, files = session_of(smoke.folder)
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
    """What a run writes stays in its folder, under the names that the README states."""
    assert {path.name for path in smoke.folder.iterdir()} <= LEFT | {smoke.path.name}


def test_runs_again_to_the_same_numbers(smoke, forked):
    """A second run in the same folder takes up the finished checkpoints."""
    if not (smoke.folder / "checkpoints").exists():
        pytest.skip("keeps no checkpoints")
    assert numbers(smoke)
    assert numbers(run(smoke.path, smoke.folder)) == numbers(smoke)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_on_a_pretended_gpu(path, tmp_path, forked):
    """Tensors on two devices in one operation, a CUDA tensor read as NumPy and the like raise as they do on a GPU."""
    check_result(run(path, tmp_path, pretended_gpu=True), device="pretended")


@pytest.mark.parametrize("path", [path for path in PATHS if asks_for_data(path)], ids=lambda path: path.stem)
def test_without_data_says_where_it_is(path, tmp_path, forked):
    with pytest.raises(RuntimeError, match=r"https://\S+.*COOKBOOK_DATA"):
        stranger.run(path, tmp_path, COOKBOOK_PRESET="smoke", COOKBOOK_DATA=str(tmp_path / "nothing"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_wrong_preset_lists_the_right_ones(path, tmp_path, forked):
    with pytest.raises(RuntimeError, match="'fast' is unknown; choose one of: auto, smoke, cpu, gpu"):
        stranger.run(path, tmp_path, COOKBOOK_PRESET="fast")
