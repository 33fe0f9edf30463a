"""What the maintainers' scripts and the tests share: finding, reading and executing notebooks, and what a notebook says of itself."""

import argparse
import hashlib
import os
import re
import shutil
import time
import tomllib
from pathlib import Path

import nbformat
import papermill
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PRESETS = ("smoke", "cpu", "gpu")
HEADLINE = re.compile(r"(<!-- headline -->).*?(<!-- /headline -->)", re.DOTALL)


def find(number=None):
    """Paths of all notebooks, or of the one with this number; exits with a list of them where there is none."""
    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in paths if not number or path.name[:2] == f"{number:0>2}"]
    if not chosen:
        raise SystemExit(f"no notebook {number}; there are: {', '.join(path.name for path in paths)}")
    return chosen


def read(path):
    return nbformat.read(path, as_version=4)


def write(notebook, path):
    """Write a valid notebook, replacing the file at once."""
    nbformat.validate(notebook)
    temporary = Path(path).with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    """Cells that carry the tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_hash(notebook):
    """Hash of what is executed: the sources of the code cells, in order."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def text_of(cell):
    """What a code cell printed on standard output."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def headline(notebook):
    """The result in one line, as the cell tagged `headline` printed it; empty before a run."""
    return " ".join("".join(text_of(cell) for cell in tagged(notebook, "headline")).split())


def runtime(notebook):
    """What the canon runtime cell printed: {"preset": ..., "device": ..., "versions": ...}."""
    lines = [line for cell in code_cells(notebook) if cell.source.startswith("# canon: runtime") for line in text_of(cell).splitlines()]
    return {key: value.strip(" ,") for key, _, value in (line.partition(":") for line in lines)}


def title(notebook):
    """(heading, one-sentence description) from the first cell."""
    heading, _, rest = notebook.cells[0].source.partition("\n")
    return heading.lstrip("# "), rest.strip().partition("\n\n")[0].replace("\n", " ")


def settings():
    """The table [tool.cookbook] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cookbook"]


def badge(path):
    """Markdown of the Colab badge for a notebook."""
    where = f"https://colab.research.google.com/github/{settings()['repository']}/blob/{settings()['branch']}/notebooks/{Path(path).name}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({where})"


def parse_parameters(path, pairs):
    """{"name": value} from NAME=VALUE pairs (values as YAML); exits where the notebook has no such parameter."""
    parameters = {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    known = papermill.inspect_notebook(str(path))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise SystemExit(f"{path.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known)}")
    return parameters


def swept(description, choices, duration):
    """Which of the choices a benchmark is to sweep over learning rates: those named after --sweep, all where none is; None without it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="*", choices=choices, help=f"train at several learning rates instead (about {duration})")
    names = parser.parse_args().sweep
    return names if names is None else names or list(choices)


def execute(source, target, preset, parameters=None):
    """Run a notebook into `target` by papermill; returns (minutes, error), where error is None or names the cell that failed.

    The run has a folder of its own beside `target`. An interrupted or failed run leaves it, checkpoints included, and the next run
    of the same code continues there; the minutes are those of all attempts.
    """
    if preset not in PRESETS:
        raise SystemExit(f"no preset {preset}; there are: {', '.join(PRESETS)}")
    folder = target.with_name(f"{target.stem}-{code_hash(read(source))[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / "seconds.txt"
    before = float(clock.read_text()) if clock.exists() else 0.0
    os.environ["COOKBOOK_PRESET"] = preset
    os.environ["COOKBOOK_DATA"] = str(Path(os.environ.get("COOKBOOK_DATA") or ROOT / "data").resolve())
    os.environ.pop("MPLBACKEND", None)  # Agg would drop the figures
    start, error = time.perf_counter(), None
    try:
        papermill.execute_notebook(
            str(source), str(target), parameters=parameters or {}, cwd=str(folder), kernel_name="python3",
            progress_bar={"desc": source.stem, "unit": "cell"}, coalesce_streams=True,
        )  # fmt: skip
    except papermill.PapermillExecutionError as failure:
        error = f"cell {failure.cell_index} (In [{failure.exec_count}]): {failure.ename}: {failure.evalue}"
    finally:
        seconds = before + time.perf_counter() - start
        clock.write_text(f"{seconds:.1f}")
    if error is None:
        shutil.rmtree(folder)
    return seconds / 60, error
