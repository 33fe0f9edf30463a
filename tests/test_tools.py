"""The maintainers' scripts, on a small repository of two notebooks, one of which fails."""

import io
import os
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from PIL import Image

from tools import cookbook, readme, render, run, sync_canon

RUNTIME = '# canon: runtime\nimport os\nprint("preset:", os.environ["COOKBOOK_PRESET"])\nprint("device: a test")\nprint("versions: x 1")'
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def notebook(body):
    """A small notebook: title, parameters, runtime, `body`, three figures and a headline."""
    code, markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    title = "# 01 · First\n\nIt tests.\n\n[![Open In Colab](x)](y)\n\n<!-- headline -->\nNot rendered yet.\n<!-- /headline -->"
    cells = [
        markdown(title),
        code("SEED = 0\nWIDTH = 1.5", metadata={"tags": ["parameters"]}),
        code(RUNTIME),
        code(body),
        *(code(FIGURE, metadata={"tags": ["picture"]} if i == 2 else {}) for i in range(3)),
        code('print("loss", SEED, WIDTH)', metadata={"tags": ["headline"]}),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with 01_first (good) and 02_second (its third code cell fails)."""
    for folder in ("notebooks", "img", "data"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(cookbook, "ROOT", tmp_path)
    monkeypatch.setattr(cookbook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    for name in ("COOKBOOK_PRESET", "COOKBOOK_DATA", "MPLBACKEND"):  # the tools set them; put them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "README.md").write_text("before <!-- gallery -->old<!-- /gallery --> after, on me/old")
    (tmp_path / "pyproject.toml").write_text('[tool.cookbook]\nrepository = "me/old"\nbranch = "main"\n')
    nbformat.write(notebook("open('log.txt', 'a').write('x')"), tmp_path / "notebooks" / "01_first.ipynb")
    nbformat.write(notebook("1 / 0"), tmp_path / "notebooks" / "02_second.ipynb")
    return tmp_path


def call(module, monkeypatch, *arguments):
    """Run a script's main(); returns its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_run_reports_the_failing_cell_and_goes_on(repository, monkeypatch, capsys):
    assert call(run, monkeypatch) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["notebook", "preset", "device", "minutes", "headline", "executed", "copy"]
    assert table[1].startswith("01_first   smoke   a test")
    assert "loss 0 1.5" in table[1]
    assert table[1].endswith("runs/01_first-smoke.ipynb")
    assert "FAILED in cell 3 (In [3]): ZeroDivisionError: division by zero" in table[2]


def test_run_passes_parameters(repository, monkeypatch, capsys):
    assert call(run, monkeypatch, "--nb", "1", "--seed", "7", "WIDTH=2.5") == 0
    assert "loss 7 2.5" in capsys.readouterr().out
    assert (repository / "runs" / "01_first-smoke-WIDTH=2.5-SEED=7.ipynb").exists()


def test_run_refuses_what_is_not_there(repository, monkeypatch):
    assert call(run, monkeypatch, "--nb", "1", "DEPTH=3") == "01_first.ipynb has no parameter DEPTH; it has: SEED, WIDTH"
    assert call(run, monkeypatch, "--nb", "09") == "no notebook 09; there are: 01_first.ipynb, 02_second.ipynb"
    assert call(run, monkeypatch, "--preset", "fast") == 2  # argparse lists the right ones


def test_an_interrupted_run_leaves_its_folder_to_the_next(repository):
    """Checkpoints stay until a run of the same code goes through, and its minutes count the earlier attempts."""
    target = repository / "runs" / "x.ipynb"
    target.parent.mkdir()
    source = repository / "notebooks" / "02_second.ipynb"
    cookbook.execute(source, target, "smoke")
    (folder,) = [path for path in target.parent.iterdir() if path.is_dir()]
    (folder / "seconds.txt").write_text("600.0")
    minutes, error = cookbook.execute(source, target, "smoke")
    assert minutes > 10
    assert error.startswith("cell 3")
    minutes, error = cookbook.execute(repository / "notebooks" / "01_first.ipynb", target, "smoke")
    assert error is None
    assert minutes < 10
    assert [path for path in target.parent.iterdir() if path.is_dir()] == [folder]


def test_render_writes_outputs_facts_title_picture_and_gallery(repository, monkeypatch):
    assert call(render, monkeypatch, "--nb", "01", "--preset", "cpu") == 0
    done = cookbook.read(repository / "notebooks" / "01_first.ipynb")
    facts = done.metadata["cookbook"]
    assert {key: facts[key] for key in ("preset", "device", "versions", "headline")} == {
        "preset": "cpu", "device": "a test", "versions": "x 1", "headline": "loss 0 1.5",
    }  # fmt: skip
    assert facts["code_sha256"] == cookbook.code_hash(done)
    assert "**Result:** loss 0 1.5 (preset `cpu`, a test, 0 minutes)" in done.cells[0].source
    assert "papermill" not in str(done.metadata) + str([cell.metadata for cell in done.cells])
    assert (repository / "img" / "01_first.png").read_bytes()[:4] == b"\x89PNG"
    text = (repository / "README.md").read_text()
    assert text.startswith("before <!-- gallery -->\n| |")
    assert "loss 0 1.5" in text
    assert "old<" not in text
    assert not list((repository / "runs").iterdir())


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


def test_stale_guard(repository, monkeypatch):
    from tests.rules import RULES

    path = repository / "notebooks" / "01_first.ipynb"
    call(render, monkeypatch, "--nb", "01", "--preset", "cpu")
    done = cookbook.read(path)
    assert list(RULES["not_stale"](done, path)) == []
    done.cells[0].source += "\nProse may change."
    assert list(RULES["not_stale"](done, path)) == []
    done.cells[3].source += "\nx = 1"
    assert list(RULES["not_stale"](done, path)) != []


@pytest.mark.parametrize("number", ["02", "03"])
def test_render_changes_nothing_where_a_cell_fails_or_figures_lack(repository, monkeypatch, number):
    bare = notebook("1")
    bare.cells = [cell for cell in bare.cells if cell.source != FIGURE]
    nbformat.write(bare, repository / "notebooks" / "03_bare.ipynb")
    (path,) = cookbook.find(number)
    before = path.read_bytes()
    assert "is unchanged" in call(render, monkeypatch, "--nb", number)
    assert path.read_bytes() == before


def test_render_refuses_smoke(repository, monkeypatch):
    assert call(render, monkeypatch, "--preset", "smoke") == 2


def test_badges_follow_the_repository(repository, monkeypatch):
    assert call(readme, monkeypatch, "--repository", "you/fork") == 0
    title = cookbook.read(repository / "notebooks" / "02_second.ipynb").cells[0].source
    assert "github/you/fork/blob/main/notebooks/02_second.ipynb" in title
    assert "me/old" not in (repository / "README.md").read_text() + (repository / "pyproject.toml").read_text()
    assert "no owner/name" in call(readme, monkeypatch, "--repository", "fork")


def test_canon_is_written_into_notebooks(repository, monkeypatch, capsys):
    assert call(sync_canon, monkeypatch, "--check") == 1
    assert "01_first.ipynb: # canon: runtime differs" in capsys.readouterr().out
    assert call(sync_canon, monkeypatch) == 0
    assert call(sync_canon, monkeypatch, "--check") == 0
    assert cookbook.read(repository / "notebooks" / "01_first.ipynb").cells[2].source == sync_canon.blocks()["# canon: runtime"]


def test_unknown_canon_is_named(repository, monkeypatch):
    path = repository / "notebooks" / "01_first.ipynb"
    broken = cookbook.read(path)
    broken.cells[3].source = "# canon: runtim"
    nbformat.write(broken, path)
    assert "there is no '# canon: runtim'; there are:" in call(sync_canon, monkeypatch)


def test_relative_data_folder_is_resolved(repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("COOKBOOK_DATA", "data")
    cookbook.execute(repository / "notebooks" / "01_first.ipynb", repository / "x.ipynb", "smoke")
    assert os.environ["COOKBOOK_DATA"] == str(repository / "data")


@pytest.mark.parametrize(("given", "names"), [([], None), (["--sweep"], ["a", "b"]), (["--sweep", "b"], ["b"])])
def test_what_a_benchmark_sweeps(monkeypatch, given, names):
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    assert cookbook.swept("text", {"a": 1, "b": 2}, "a minute") == names


def test_a_sweep_over_something_unknown_lists_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--sweep", "c"])
    with pytest.raises(SystemExit):
        cookbook.swept("text", {"a": 1}, "a minute")
    assert "choose from" in capsys.readouterr().err
