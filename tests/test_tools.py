"""The maintainers' scripts, on a small repository of three notebooks, one of which fails."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from tools import cookbook, execute, readme, render, run, sync_canon

HERE = Path(__file__).resolve().parents[1]
PYPROJECT = """[tool.cookbook]
repository = "me/old"
branch = "main"
"""
TITLE = """# {} · Name

It tests.

[![Open In Colab](x)](y)

<!-- headline -->
Not rendered yet.
<!-- /headline -->"""
SETUP = """import json
import os
from pathlib import Path
note = lambda file, value: Path(file).write_text(json.dumps(value))
facts = {"preset": os.environ["COOKBOOK_PRESET"], "device": "a test", "versions": "x 1"}
note("run.json", facts)"""
REPORT = """record = {"name": "loss", "values": [SEED + 0.5], "unit": "nats", "better": "lower", "reference": "none"}
note("results.json", [record])
note("run.json", {**facts, "headline": f"loss {SEED} ± {WIDTH}", "gallery": "A loss."})"""
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
RESULTS = [{"name": "loss", "values": [0.5], "unit": "nats", "better": "lower", "reference": "none"}]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAFElEQVR4nGP8//8/AwwwMSAB3BwAlm4DBfIlvvkAAAAASUVORK5CYII="
FACTS = {"preset": "cpu", "device": "a test", "versions": "x 1", "headline": "loss 0 ± 1.5", "gallery": "A loss."}


def code(source, *tags, **metadata):
    return nbformat.v4.new_code_cell(source, metadata={**({"tags": list(tags)} if tags else {}), **metadata})


def cells(*cells):
    """A notebook of these cells, where a text is the source of a code cell."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    made = [code(cell) if isinstance(cell, str) else cell for cell in cells]
    return nbformat.v4.new_notebook(cells=made, metadata=kernel)


def figure():
    """An output that is a picture, with what it says of itself."""
    facts = {"image/png": {"alt": "a line", "width": 400, "inches": 4, "smallest_text": 10}}
    return nbformat.v4.new_output("display_data", {"image/png": PNG}, metadata=facts)


def notebook(number, body):
    """A small notebook: title, parameters, setup, `body`, three figures and a result."""
    return cells(
        nbformat.v4.new_markdown_cell(TITLE.format(number)),
        code('PRESET = "auto"\nSEED = 0\nWIDTH = 1.5\nBACKBONE = "small"\nDEEP = False\nLIMIT = None', "parameters"),
        SETUP,
        body,
        FIGURE,
        FIGURE,
        code(FIGURE, "picture"),
        code(REPORT),
    )


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with 01_first, 02_second (its third code cell fails) and 08_third."""
    for folder in ("notebooks", "img", "data"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(cookbook, "ROOT", tmp_path)
    monkeypatch.setattr(cookbook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(cookbook, "MINIATURE", tmp_path / "00_none.ipynb")
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(render, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    for name in ("COOKBOOK_PRESET", "COOKBOOK_DATA", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "README.md").write_text("before <!-- gallery -->old<!-- /gallery --> after, on me/old")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    nbformat.write(notebook("01", "x = 1"), tmp_path / "notebooks" / "01_first.ipynb")
    nbformat.write(notebook("02", "1 / 0"), tmp_path / "notebooks" / "02_second.ipynb")
    nbformat.write(notebook("08", "x = 1"), tmp_path / "notebooks" / "08_third.ipynb")
    return tmp_path


def call(module, monkeypatch, *arguments):
    """Run a script's main(); returns its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def saved(folder, notebook):
    """The path of a notebook that is written into `folder`."""
    path = folder / "x.ipynb"
    nbformat.write(notebook, path)
    return path


def printed(notebook):
    """The standard output of each code cell."""
    return [cookbook.text_of(cell) for cell in cookbook.code_cells(notebook)]


# --- execute


def test_execution_leaves_the_copy_and_what_the_notebook_wrote(tmp_path, monkeypatch, capfd):
    """No checkpoints, no log, no clock; nothing on the terminal, nothing changed in this process."""
    before = dict(os.environ)
    write = "from pathlib import Path\nPath('checkpoints').mkdir()\nPath('checkpoints/a.pt').touch()"
    fact = "Path('run.json').write_text('{\"a\": 1}')"
    done = execute.execute(saved(tmp_path, cells(write, "print(1)", fact)), tmp_path / "new" / "run")
    assert done.error is None
    assert done.folder == tmp_path / "new" / "run"
    assert {path.name for path in done.folder.iterdir()} == {"x.ipynb", "run.json"}
    assert json.loads((done.folder / "run.json").read_text()) == {"a": 1, "minutes": round(done.minutes, 2)}
    assert cookbook.read(done.folder / "x.ipynb") == done.notebook
    assert printed(done.notebook)[1] == "1\n"
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


def test_kernel_environment(repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("A_VARIABLE", "1")
    assert execute.kernel_environment()["COOKBOOK_DATA"] == str(repository / "data")
    monkeypatch.setenv("COOKBOOK_DATA", "elsewhere")
    variables = execute.kernel_environment(COOKBOOK_PRESET="cpu")
    assert variables["COOKBOOK_DATA"] == str(repository / "elsewhere")
    assert variables["COOKBOOK_PRESET"] == "cpu"
    assert variables["A_VARIABLE"] == "1"
    assert "MPLBACKEND" not in variables
    assert os.environ["COOKBOOK_DATA"] == "elsewhere"
    look = "import os\nprint(os.environ['COOKBOOK_DATA'], os.environ.get('MPLBACKEND') == 'Agg', os.getcwd())"
    done = execute.execute(saved(repository, cells(look)), "here")
    assert printed(done.notebook)[0].split() == [str(repository / "elsewhere"), "False", str(repository / "here")]


def test_the_copy_is_written_after_every_cell(tmp_path):
    """With the outputs of the cells before, and without those that were in the source."""
    look = "import json\nprint([cell['outputs'] for cell in json.load(open('x.ipynb'))['cells']])"
    source = cells("print('one', 'two')", look, "3")
    source.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="of an earlier run")]
    done = execute.execute(saved(tmp_path, source), tmp_path / "run")
    assert "'text': ['one two\\n']" in printed(done.notebook)[1]
    assert printed(done.notebook)[1].endswith(", [], []]\n")


def test_a_failing_cell_is_named_and_the_next_run_goes_on_there(tmp_path):
    """Checkpoints stay until a run of the same code goes through, and its minutes count the earlier attempts."""
    failing = cells(
        nbformat.v4.new_markdown_cell("# Title"),
        "print(1)",
        "from pathlib import Path\nkept = Path('checkpoints')\nprint(kept.exists())\nkept.mkdir(exist_ok=True)",
        "assert Path('../well').exists(), 'not yet'",
        "print(4)",
    )
    source, folder = saved(tmp_path, failing), tmp_path / "run"
    first = execute.execute(source, folder)
    assert first.error == "cell 3 (In [3]): AssertionError: not yet"
    assert {path.name for path in folder.iterdir()} == {"x.ipynb", "checkpoints", "seconds.txt", "kernel.log"}
    copy = cookbook.read(folder / "x.ipynb")
    assert printed(copy) == ["1\n", "False\n", "", ""]
    assert [cell.execution_count for cell in cookbook.code_cells(copy)] == [1, 2, 3, None]
    assert copy.cells[3].outputs[0].ename == "AssertionError"
    (folder / "seconds.txt").write_text("600.0")
    (tmp_path / "well").touch()
    second = execute.execute(source, folder)
    assert second.error is None
    assert printed(second.notebook) == ["1\n", "True\n", "", "4\n"]
    assert 10 < second.minutes < 11
    assert {path.name for path in folder.iterdir()} == {"x.ipynb"}
    assert execute.execute(source, folder).minutes < 1


def test_what_an_earlier_run_found_does_not_stay(tmp_path):
    for name in ("run.json", "results.json"):
        (tmp_path / name).write_text("{}")
    done = execute.execute(saved(tmp_path, cells("1 / 0")), tmp_path)
    assert done.error == "cell 0 (In [1]): ZeroDivisionError: division by zero"
    assert not list(tmp_path.glob("*.json"))


def test_parameters_shift_no_count(tmp_path):
    source = saved(tmp_path, cells("0", code("SEED = 1\nNAME = ''", "parameters"), "print(SEED, NAME)", "1 / 0"))
    plain = execute.execute(source, tmp_path / "plain")
    done = execute.execute(source, tmp_path / "run", parameters={"SEED": 7, "NAME": 'a "b" \\ ±'})
    assert done.error == plain.error == "cell 3 (In [4]): ZeroDivisionError: division by zero"
    assert printed(plain.notebook)[2] == "1 \n"
    assert printed(done.notebook)[3] == '7 a "b" \\ ±\n'
    assert [cell.execution_count for cell in done.notebook.cells] == [1, 2, None, 3, 4]
    assert set(done.notebook.metadata) <= {"kernelspec", "language_info"}


def test_progress_bars_leave_one_line_each(tmp_path):
    bars = """from tqdm import tqdm
import sys
for i in tqdm(range(30), mininterval=0):
    pass
for i in tqdm(range(30), mininterval=0, leave=False):
    pass
print("between", end="\\rB\\n")
print("a")
print("b", file=sys.stderr)"""
    silent = "for i in tqdm(range(30), mininterval=0, leave=False):\n    pass"
    done = execute.execute(saved(tmp_path, cells(bars, silent)), tmp_path / "run")
    first, second = done.notebook.cells
    assert {output.name: output.text.count("\n") for output in first.outputs} == {"stdout": 2, "stderr": 2}
    text = {output.name: output.text for output in first.outputs}
    assert text["stdout"] == "B\na\n"
    assert text["stderr"].startswith("100%")
    assert text["stderr"].endswith("b\n")
    assert second.outputs == []


LINES = [("ab\rX", "Xb"), ("abc\r   \r", ""), ("a  ", "a  "), ("a\rbc", "bc"), ("abc\r", "abc"), ("", "")]


@pytest.mark.parametrize(("line", "shown"), LINES)
def test_what_a_terminal_shows(line, shown):
    assert execute.on_screen(line) == shown


def test_pretended_gpu_is_installed_unseen(repository):
    """Cells count from 1, no name and no path of the repository is left behind."""
    (repository / "tools").mkdir()
    (repository / "tools" / "pretended_cuda.py").write_text(
        "import builtins\ndef install():\n    builtins.pretended = 'yes'\n    print('hello')"
    )
    look = f"import sys\nprint(pretended, {str(repository)!r} in sys.path, 'pretended_cuda' in globals())"
    source = saved(repository, cells("x = 1", look))
    done = execute.execute(source, repository / "run", pretended_gpu=True)
    assert done.error is None
    assert printed(done.notebook) == ["", "yes False False\n"]
    assert [cell.execution_count for cell in done.notebook.cells] == [1, 2]
    assert "pretended" in execute.execute(source, repository / "run").error
    (repository / "tools" / "pretended_cuda.py").write_text("def install():\n    raise OSError('no such thing')")
    done = execute.execute(source, repository / "run", pretended_gpu=True)
    assert done.error == "before the first cell: OSError: no such thing"
    assert (repository / "run" / "x.ipynb").exists()


def test_a_cell_that_takes_too_long_and_a_kernel_that_dies(tmp_path, capfd):
    done = execute.execute(saved(tmp_path, cells("1", "import time\ntime.sleep(60)")), tmp_path / "run", timeout=2)
    assert done.error == "cell 1 (In [2]): TimeoutError: the cell took too long"
    done = execute.execute(saved(tmp_path, cells("1", "import os\nos._exit(1)")), tmp_path / "run")
    assert done.error.startswith("cell 1 (In [2]): the kernel died")
    assert (tmp_path / "run" / "kernel.log").exists()
    assert capfd.readouterr().err == ""


# --- run


def test_run_reports_each_notebook_and_goes_on(repository, monkeypatch, capsys):
    assert call(run, monkeypatch) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    code = {path.name[:2]: cookbook.code_hash(cookbook.read(path))[:8] for path in cookbook.find()}
    assert lines == [
        "01_first: ok (0.0 minutes)".replace("0.0", lines[0].split("(")[1].split()[0]),
        f"  executed copy: runs/01_first-smoke-{code['01']}/01_first.ipynb",
        "  ClearML session: none",
        "02_second: FAILED in cell 3 (In [3]): ZeroDivisionError: division by zero" + f" ({lines[3].split('(')[-1]}",
        f"  executed copy: runs/02_second-smoke-{code['02']}/02_second.ipynb",
        "  ClearML session: none",
        f"08_third: ok ({lines[6].split('(')[1]}",
        f"  executed copy: runs/08_third-smoke-{code['08']}/08_third.ipynb",
        "  ClearML session: none",
    ]
    assert last.startswith("3 notebooks: 2 ok, 1 failed, 0.")
    facts = json.loads((repository / f"runs/01_first-smoke-{code['01']}/run.json").read_text())
    assert facts["headline"] == "loss 0 ± 1.5"


def test_run_passes_parameters_and_shows_the_headline(repository, monkeypatch, capsys):
    assert call(run, monkeypatch, "--nb", "8", "--preset", "cpu", "--seed", "7", "WIDTH=2") == 0
    assert capsys.readouterr().out.splitlines()[3] == "  loss 7 ± 2.0"
    (folder,) = (repository / "runs").iterdir()
    assert "-cpu-SEED=7-WIDTH=2.0-" in folder.name


@pytest.fixture
def executed(monkeypatch):
    """Replaces execution: each notebook "runs" at once, and `executed` holds (name, folder, preset, parameters)."""
    calls = []

    def pretend(path, folder, environment, parameters):
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((path.stem, folder, environment["COOKBOOK_PRESET"], parameters))
        (folder / "run.json").write_text(json.dumps({"headline": "a loss of 0.5 ± 0.1 nats " * 6}))
        return execute.Execution(cookbook.read(path), folder, 0.1, None)

    monkeypatch.setattr(run, "execute", pretend)
    return calls


def test_headlines_fit_the_terminal(repository, executed, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert call(run, monkeypatch, "--nb", "8", "--preset", "gpu") == 0
    lines = capsys.readouterr().out.splitlines()[3:-1]
    assert len(lines) > 3
    assert all(len(line) < 40 and line.startswith("  ") for line in lines)
    assert " ".join(" ".join(lines).split()) == ("a loss of 0.5 ± 0.1 nats " * 6).strip()
    assert call(run, monkeypatch, "--nb", "8") == 0
    assert "nats" not in capsys.readouterr().out


def test_a_terminal_without_unicode_shows_the_rest(repository, executed, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert call(run, monkeypatch, "--preset", "cpu") == 0
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "0.5 ? 0.1 nats" in text
    assert "3 notebooks: 3 ok, 0 failed, 0.3 minutes" in text


def test_run_refuses_what_is_not_there(repository, executed, monkeypatch):
    names = "PRESET, SEED, WIDTH, BACKBONE, DEEP, LIMIT"
    assert call(run, monkeypatch, "--nb", "1", "DEPTH=3") == f"01_first.ipynb has no parameter DEPTH; it has: {names}"
    there = "01_first.ipynb, 02_second.ipynb, 08_third.ipynb"
    assert call(run, monkeypatch, "--nb", "09") == f"no notebook 09; there are: {there}"
    assert call(run, monkeypatch, "--preset", "fast") == 2  # argparse lists the right ones
    changed = cookbook.read(repository / "notebooks" / "08_third.ipynb")
    changed.cells[1].source = "SEED = 0"
    cookbook.write(changed, repository / "notebooks" / "08_third.ipynb")
    assert "08_third.ipynb has no parameter WIDTH" in call(run, monkeypatch, "WIDTH=3")
    assert executed == []  # not the first one either


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("SEED=010", 10), ("SEED=-3", -3), ("SEED=+3", 3), ("WIDTH=1", 1.0), ("WIDTH=1e-3", 0.001), ("WIDTH=007", 7.0),
        ("BACKBONE=resnet18", "resnet18"), ("BACKBONE='a b'", "a b"), ('BACKBONE="3"', "3"), ("BACKBONE=3", "3"),
        ("BACKBONE=", ""), ("BACKBONE=true", "true"), ("BACKBONE=a=b", "a=b"), ("BACKBONE='", "'"),
        ("BACKBONE=https://x/y?z", "https://x/y?z"), ("DEEP=true", True), ("DEEP=False", False), ("LIMIT=None", None),
        ("LIMIT=3", 3), ("BACKBONE=None", "None"),
    ],
)  # fmt: skip
def test_values_of_parameters(repository, executed, monkeypatch, pair, value):
    assert call(run, monkeypatch, "--nb", "8", pair) == 0
    ((_, folder, _, parameters),) = executed
    assert parameters == {pair.partition("=")[0]: value}
    assert type(parameters[pair.partition("=")[0]]) is type(value)
    assert folder.parent == run.RUNS


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["SEED=abc"], "SEED=abc: abc is text, but SEED is a whole number in 08_third.ipynb (0 by default)"),
        (["SEED=1.5"], "SEED=1.5: 1.5 is a number, but SEED is a whole number"),
        (["SEED=true"], "true is true or false, but SEED is a whole number"),
        (["SEED='3'"], "'3' is text, but SEED is a whole number"),
        (["SEED="], "nothing stands behind =, but SEED is a whole number"),
        (["WIDTH=wide"], "wide is text, but WIDTH is a number"),
        (["WIDTH=true"], "true is true or false, but WIDTH is a number"),
        (["SEED=None"], "None is None, but SEED is a whole number"),
        (["DEEP=1"], "1 is a whole number, but DEEP is true or false"),
        (["PRESET=gpu"], "use PRESET=gpu by itself, outside PARAMS, as in: make run PRESET=gpu"),
        (["WIDTH=1", "WIDTH=2"], "WIDTH is set twice, to 1 and to 2"),
        (["SEED=1", "--seed", "2"], "SEED is set twice, to 2 and to 1"),
        (["=3"], "'=3' is no NAME=VALUE"),
        (["WIDTH"], "'WIDTH' is no NAME=VALUE: a parameter is set as in PARAMS='WIDTH=64 DEPTH=3'"),
        (["--seed", "x"], "SEED=x: x is text"),
        (["--seed", ""], "nothing stands behind ="),
    ],
)
def test_run_refuses_parameters(repository, executed, monkeypatch, pairs, message):
    assert message in call(run, monkeypatch, "--nb", "8", *pairs)
    assert executed == []


def test_each_setting_has_its_folder(repository, executed, monkeypatch):
    """Also where a value cannot stand in a name, and another code."""
    long = "x" * 300
    for pair in ("SEED=1", "BACKBONE=a/b", "BACKBONE=a:b", f"BACKBONE={long}", f"BACKBONE={long}y", "WIDTH=1"):
        call(run, monkeypatch, "--nb", "8", pair)
        call(run, monkeypatch, "--nb", "8", pair, "--preset", "cpu")
    changed = cookbook.read(repository / "notebooks" / "08_third.ipynb")
    changed.cells[3].source += "\ny = 2"
    cookbook.write(changed, repository / "notebooks" / "08_third.ipynb")
    call(run, monkeypatch, "--nb", "8", "WIDTH=1")
    folders = [folder for _, folder, _, _ in executed]
    assert len(set(folders)) == len(folders) == 13
    assert all(folder.parent == run.RUNS and len(folder.name) < 150 for folder in folders)


def test_the_clearml_session_of_this_run_is_named(repository):
    folder = repository / "runs" / "a"
    offline = folder / "clearml" / "offline"
    offline.mkdir(parents=True)
    text = "ClearML results page: https://app/projects/p/output/log\n"
    page = nbformat.v4.new_output("stream", name="stdout", text=text)
    done = execute.Execution(cells("1"), folder, 0.1, None)
    assert run.session(done, 0) is None
    done.notebook.cells[0].outputs = [page]
    assert run.session(done, 0) == "on the server, https://app/projects/p/output/log"
    for age, name in ((300, "old"), (100, "first"), (50, "second")):
        (offline / f"{name}.zip").touch()
        os.utime(offline / f"{name}.zip", (time.time() - age,) * 2)
    assert run.session(done, time.time() - 200) == "runs/a/clearml/offline/second.zip"
    assert run.session(done, time.time()) == "on the server, https://app/projects/p/output/log"


SCRIPT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {here!r})
from tools import cookbook, run
cookbook.ROOT = Path({root!r})
cookbook.NOTEBOOKS, run.RUNS = cookbook.ROOT / "notebooks", cookbook.ROOT / "runs"
sys.argv = ["run"]
run.main()
"""
WAITS = """import os, time
from pathlib import Path
Path("checkpoints").mkdir(exist_ok=True)
print("resumed:", Path("checkpoints/a").exists())
Path("checkpoints/a").touch()
Path("pid").write_text(str(os.getpid()))
while not Path("../../go").exists():
    time.sleep(0.1)"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupted_run_ends_its_kernel_and_is_continued(repository):
    nbformat.write(cells("print('here')", WAITS), repository / "notebooks" / "02_second.ipynb")
    command = [sys.executable, "-c", SCRIPT.format(here=str(HERE), root=str(repository))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(repository.glob("runs/02*/pid")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    (folder,) = repository.glob("runs/02*")
    assert process.returncode == 130
    assert out.startswith("01_first: ok")
    assert "1 notebook: 1 ok, 0 failed" in out
    assert out.splitlines()[-1] == "interrupted in 02_second; the same command goes on there, from its last checkpoint"
    assert err == ""
    assert not alive(int((folder / "pid").read_text()))
    assert printed(cookbook.read(folder / "02_second.ipynb"))[0] == "here\n"
    assert float((folder / "seconds.txt").read_text()) > 0
    (repository / "go").touch()
    done = execute.execute(cookbook.find("02")[0], folder)
    assert printed(done.notebook)[1] == "resumed: True\n"
    assert not (folder / "checkpoints").exists()


# --- render


def test_render_writes_outputs_facts_title_picture_and_gallery(repository, monkeypatch, capsys):
    path = repository / "notebooks" / "08_third.ipynb"
    before = [cell.source for cell in cookbook.read(path).cells]
    assert call(render, monkeypatch, "--nb", "8", "--preset", "cpu") == 0
    done = cookbook.read(path)
    facts = done.metadata["cookbook"]
    assert facts == {
        **FACTS,
        "results": RESULTS,
        "minutes": facts["minutes"],
        "date": facts["date"],
        "code_sha256": cookbook.code_hash(done, "cpu"),
    }
    assert facts["minutes"] >= 0
    assert f"<!-- headline -->\n{readme.result_line(done)}\n<!-- /headline -->" in done.cells[0].source
    assert [cell.source for cell in done.cells[1:]] == before[1:]
    assert [cell.execution_count for cell in done.cells[1:]] == list(range(1, 8))
    assert (repository / "img" / "08_third.png").read_bytes() == render.pictures(done.cells)[-1]
    text = (repository / "README.md").read_text()
    assert text.startswith("before <!-- gallery -->\n")
    assert "old<" not in text
    (folder,) = (repository / "runs").iterdir()
    assert folder.name.startswith("render-08_third-cpu-")


@pytest.fixture
def elsewhere(repository):
    """(path of 08_third, an executed copy, the folder of its run), as another machine would leave them."""
    path = repository / "notebooks" / "08_third.ipynb"
    executed = cookbook.read(path)
    for count, cell in enumerate(cookbook.code_cells(executed), 1):
        cell.execution_count = count
        if cell.source == FIGURE:
            cell.outputs = [figure()]
    folder = repository / "gpu"
    folder.mkdir()
    cookbook.write(executed, folder / "08_third.ipynb")
    (folder / "run.json").write_text(json.dumps({**FACTS, "preset": "gpu", "minutes": 12.34}))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return path, executed, folder


def state(repository):
    """All that render may write."""
    paths = [*repository.glob("notebooks/*"), *repository.glob("img/*"), repository / "README.md"]
    return {path: path.read_bytes() for path in paths}


def test_render_takes_a_run_from_elsewhere(elsewhere, repository, monkeypatch):
    """Also after the prose and the metadata of the notebook have changed."""
    path, executed, folder = elsewhere
    changed = cookbook.read(path)
    changed.cells[0].source += "\n\nMore prose."
    hidden = {"jupyter": {"source_hidden": True}, "cellView": "form"}
    changed.cells[4].metadata = {"alt": "a line", "collapsed": True, **hidden}
    cookbook.write(changed, path)
    assert call(render, monkeypatch, "--nb", "08", "--executed", str(folder / "08_third.ipynb")) == 0
    done = cookbook.read(path)
    assert done.metadata["cookbook"]["preset"] == "gpu"
    assert done.metadata["cookbook"]["minutes"] == 12.3
    assert done.cells[0].source.endswith("More prose.")
    assert set(done.cells[4].metadata) == {"alt", "jupyter", "cellView"}
    assert done.cells[6].outputs[0].metadata == executed.cells[6].outputs[0].metadata
    copy = folder.rename(repository / "run") / "08_third.ipynb"
    moved = copy.rename(repository / "copy.ipynb")
    there = ("--executed", str(moved), "--run", str(repository / "run"))
    assert call(render, monkeypatch, "--nb", "8", *there, "--minutes", "3") == 0
    assert cookbook.read(path).metadata["cookbook"]["minutes"] == 3
    assert call(render, monkeypatch, "--executed", str(moved)) == 2
    assert call(render, monkeypatch, "--nb", "8", "--minutes", "3") == 2


def without(key):
    """A fault of a run: its run.json lacks a key."""
    return lambda executed, facts, results: facts.pop(key)


FAULTS = [
    ("it needs three figures and has 2", lambda executed, facts, results: executed.cells[4].outputs.clear()),
    ("the cell tagged picture shows none", lambda executed, facts, results: executed.cells[6].metadata.clear()),
    ("its run.json has no headline", without("headline")),
    ("its run.json has no gallery", without("gallery")),
    ("its run.json has no preset, device, versions, headline, gallery", lambda executed, facts, results: facts.clear()),
    ("its results.json is empty or not there", lambda executed, facts, results: results.clear()),
    ("it ran with preset smoke", lambda executed, facts, results: facts.update(preset="smoke")),
    ("add --minutes", without("minutes")),
    ("has other code", lambda executed, facts, results: executed.cells[3].update(source="x = 2")),
    ("a cell of it failed", lambda executed, facts, results: executed.cells[3].outputs.append(failure())),
    ("not all of its cells have run", lambda executed, facts, results: executed.cells[7].update(execution_count=None)),
]


def failure():
    return nbformat.v4.new_output("error", ename="E", evalue="")


@pytest.mark.parametrize(("message", "break_it"), FAULTS, ids=[message for message, _ in FAULTS])
def test_render_refuses_a_run_that_lacks_something(elsewhere, repository, monkeypatch, message, break_it):
    path, executed, folder = elsewhere
    facts, results = (execute.read_json(folder / name) for name in ("run.json", "results.json"))
    break_it(executed, facts, results)
    cookbook.write(executed, folder / "08_third.ipynb")
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "results.json").write_text(json.dumps(results))
    if "picture" in message:  # the tag is the notebook's own
        cookbook.write(executed, path)
    before = state(repository)
    said = call(render, monkeypatch, "--nb", "8", "--executed", str(folder / "08_third.ipynb"))
    assert said.startswith("08_third.ipynb is unchanged")
    assert message in said
    assert state(repository) == before


def test_render_refuses_a_copy_without_its_files(elsewhere, repository, monkeypatch):
    _, _, folder = elsewhere
    before = state(repository)
    for name, lack in (("results.json", "is empty or not there"), ("run.json", "has no preset")):
        (folder / name).unlink()
        said = call(render, monkeypatch, "--nb", "8", "--executed", str(folder / "08_third.ipynb"))
        assert f"its {name} {lack}" in said
    assert state(repository) == before


def test_render_changes_nothing_where_a_cell_fails(repository, monkeypatch):
    before = state(repository)
    said = call(render, monkeypatch, "--nb", "02")
    error = "cell 3 (In [3]): ZeroDivisionError: division by zero"
    assert said.startswith(f"02_second.ipynb is unchanged; it failed in {error}; see runs/render-02_second-cpu-")
    assert state(repository) == before


def test_render_refuses_smoke(repository, monkeypatch):
    assert call(render, monkeypatch, "--preset", "smoke") == 2


def bars():
    """What real progress bars write, each as it stands in the end."""
    kinds = (
        {"total": 3}, {"total": 3, "desc": "epoch 1: train", "unit": "step"}, {}, {"total": 3, "ascii": True},
        {"total": 4e6, "unit": "B", "unit_scale": True}, {"total": 3, "initial": 3},
    )  # fmt: skip
    for options in kinds:
        stream = io.StringIO()
        with tqdm(file=stream, mininterval=0, **options) as bar:
            for step in range(3):
                bar.set_postfix(loss=0.5, step=step)
                bar.update()
        yield execute.on_screen(stream.getvalue().rstrip("\n"))


CLEARML = """ClearML goes offline: no keys
ClearML Task: created new task id=offline-ca2d9118abe64f3880ec98294b666250
2026-11-21 05:54:26,625 - clearml.Task - INFO - No repository found, storing script code instead
ClearML running in offline mode, session stored in clearml/offline/offline-ca2d9118abe64f3880ec98294b666250
ClearML results page: https://app.clear.ml/projects/p/experiments/e/output/log
ClearML Task: Offline session stored in clearml/offline/offline-ca2d9118abe64f3880ec98294b666250.zip
ClearML: task closed
"""


IDLE = """runs:   0%|          | 0/60 [00:01<?, ?it/s]/x/loky/process_executor.py:787: UserWarning: A worker stopped while some \
jobs were given to the executor. This can be caused by a too short worker timeout or by a memory leak.
  warnings.warn(
"""


def test_render_drops_noise_only():
    stream = lambda name, text: nbformat.v4.new_output("stream", name=name, text=text)
    all_bars = "\n".join(bars()) + "\n"
    assert all_bars.count("\n") == 6
    mixed = "UserWarning: 3 of 10 [odd]\n" + all_bars + "\x1b[A\n  2/3 done\n"
    dirty = cells("1", "2", "3", "4")
    dirty.cells[0].outputs = [stream("stderr", all_bars), stream("stdout", "loss 0.5\n")]
    dirty.cells[1].outputs = [stream("stderr", mixed + IDLE + "x.py:1: UserWarning: odd\n  warnings.warn(\n")]
    dirty.cells[2].outputs = [stream("stdout", CLEARML)]
    dirty.cells[3].outputs = [stream("stdout", CLEARML.splitlines()[1]), stream("stdout", "\nClearML tasks\n\nlast")]
    done = render.clean(dirty)
    assert [[output.text for output in cell.outputs] for cell in done.cells] == [
        ["loss 0.5\n"],
        ["UserWarning: 3 of 10 [odd]\n  2/3 done\nx.py:1: UserWarning: odd\n  warnings.warn(\n"],
        ["ClearML goes offline: no keys\nClearML: task closed\n"],
        ["\nClearML tasks\n\nlast"],
    ]
    assert [cell.source for cell in done.cells] == ["1", "2", "3", "4"]


def picture(draw, **options):
    """PNG of a figure on white that `draw` drew into its axes."""
    figure, axes = plt.subplots(figsize=(6, 3), facecolor="white")
    draw(axes)
    target = io.BytesIO()
    figure.savefig(target, format="png", **options)
    plt.close(figure)
    return target.getvalue()


def test_render_compresses_figures_but_keeps_what_they_show():
    noise = np.random.default_rng(0)
    lines = picture(lambda axes: axes.plot(noise.normal(size=(100, 2)).cumsum(0)))
    photograph = picture(lambda axes: axes.imshow(noise.random((60, 60, 3)), interpolation="bicubic"))
    for png, least, palette in ((lines, 1.5, True), (photograph, 1.0, False)):
        small = render.compress(png)
        assert len(small) * least < len(png)
        assert (Image.open(io.BytesIO(small)).mode == "P") == palette
        before, after = (np.asarray(Image.open(io.BytesIO(x)).convert("RGB"), dtype=int) for x in (png, small))
        assert (np.abs(before - after).max(-1) > 12).mean() < 1 / 3000
        assert palette or (before == after).all()
        assert (after[0, 0] == 255).all()
    transparent = picture(lambda axes: axes.plot([1, 2]), transparent=True)
    assert render.compress(transparent) == transparent
    film = io.BytesIO()
    frames = [Image.new("L", (50, 50), color) for color in (0, 100, 255)]
    frames[0].save(film, "gif", save_all=True, append_images=frames[1:])
    assert render.compress(film.getvalue()) == film.getvalue()


def test_stale_guard(elsewhere, monkeypatch):
    from tests.rules import RULES

    path, _, folder = elsewhere
    call(render, monkeypatch, "--nb", "8", "--executed", str(folder / "08_third.ipynb"))
    done = cookbook.read(path)
    assert list(RULES["not_stale"](done, path)) == []
    done.cells[0].source += "\nProse may change."
    assert list(RULES["not_stale"](done, path)) == []
    done.cells[3].source += "\nx = 1"
    assert list(RULES["not_stale"](done, path)) != []


def test_stale_guard_lets_other_presets_change(elsewhere, monkeypatch):
    from tests.rules import RULES

    path, executed, folder = elsewhere
    executed.cells[3].source += "\nx = choose(smoke=1, cpu=2, gpu=3)"
    cookbook.write(executed, path)
    cookbook.write(executed, folder / "08_third.ipynb")
    call(render, monkeypatch, "--nb", "8", "--executed", str(folder / "08_third.ipynb"))
    done = cookbook.read(path)
    for old, new, stale in (("smoke=1", "smoke=5", False), ("cpu=2", "cpu=5", False), ("gpu=3", "gpu=5", True)):
        done.cells[3].source = done.cells[3].source.replace(old, new)
        assert bool(list(RULES["not_stale"](done, path))) == stale


def test_code_hash_of_a_preset_forgets_what_others_choose():
    """The outputs of a run stay valid where only sizes of another preset change; all else counts, comments too."""
    notebook = nbformat.v4.new_notebook()
    source = 'é = choose(smoke=(1, 2), cpu=3, gpu=choose(smoke=0, cpu=1, gpu=4)) + 5  # "as"\nf(choose(\n    smoke=6, cpu=7, gpu=8), 9)'

    def hashed(preset, old="", new=""):
        assert old in source
        notebook.cells = [nbformat.v4.new_code_cell(source.replace(old, new))]
        return cookbook.code_hash(notebook, preset)

    assert cookbook.in_preset(source, "cpu") == 'é = (3) + 5  # "as"\nf((7), 9)'
    assert cookbook.in_preset(source, "gpu") == 'é = ((4)) + 5  # "as"\nf((8), 9)'
    assert cookbook.in_preset("%magic\nx = choose(cpu=1)", "cpu") == "%magic\nx = choose(cpu=1)"
    for kept in ("choose(smoke=1)", "choose(smoke=torch.rand(1), gpu=2)", "choose(smoke=(x := 1), gpu=2)"):
        assert cookbook.in_preset(kept, "gpu") == kept
    assert cookbook.in_preset("choose(smoke=choose(smoke=1, gpu=2), gpu=f(3))", "gpu") == "(f(3))"
    assert hashed("cpu", "smoke=(1, 2)", "smoke=(7, 8, 9)") == hashed("cpu") != hashed("gpu")
    assert hashed("cpu", "cpu=3", "cpu=2") != hashed("cpu")
    assert hashed("cpu", "cpu=7", "cpu=8") != hashed("cpu")
    assert hashed("cpu", "as", "was") != hashed("cpu")
    assert hashed("gpu", "gpu=4", "gpu=5") != hashed("gpu")
    assert hashed(None, "smoke=6", "smoke=7") != hashed(None)


# --- names, canon, benchmarks


def test_badges_follow_the_repository(repository, monkeypatch):
    assert call(readme, monkeypatch, "--repository", "you/fork") == 0
    title = cookbook.read(repository / "notebooks" / "02_second.ipynb").cells[0].source
    assert "github/you/fork/blob/main/notebooks/02_second.ipynb" in title
    assert "me/old" not in (repository / "README.md").read_text() + (repository / "pyproject.toml").read_text()
    assert "no owner/name" in call(readme, monkeypatch, "--repository", "fork")


def test_canon_is_written_into_notebooks(repository, monkeypatch, capsys):
    """The blocks, and nothing else changes."""
    path = repository / "notebooks" / "08_third.ipynb"
    third = cookbook.read(path)
    third.cells[3].source = "# canon: setup"
    cookbook.write(third, path)
    assert call(sync_canon, monkeypatch, "--check") == 1
    said = capsys.readouterr().out
    assert "08_third.ipynb: canon block setup differs" in said
    assert cookbook.read(path) == third
    assert call(sync_canon, monkeypatch) == 0
    assert call(sync_canon, monkeypatch, "--check") == 0
    done = cookbook.read(path)
    assert done.cells[3].source == sync_canon.blocks()["setup"]
    assert done.cells[:3] + done.cells[4:] == third.cells[:3] + third.cells[4:]


def test_unknown_canon_is_named(repository, monkeypatch):
    path = repository / "notebooks" / "01_first.ipynb"
    broken = cookbook.read(path)
    broken.cells[3].source = "# canon: runtim"
    nbformat.write(broken, path)
    assert "there is no canon block 'runtim'; there are:" in call(sync_canon, monkeypatch)


@pytest.mark.parametrize(("given", "names"), [([], None), (["--sweep"], ["a", "b"]), (["--sweep", "b"], ["b"])])
def test_what_a_benchmark_sweeps(monkeypatch, given, names):
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    assert cookbook.swept("text", {"a": 1, "b": 2}, "a minute") == names


def test_a_sweep_over_something_unknown_lists_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--sweep", "c"])
    with pytest.raises(SystemExit):
        cookbook.swept("text", {"a": 1}, "a minute")
    assert "choose from" in capsys.readouterr().err
