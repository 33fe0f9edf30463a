"""Execute notebooks and put the outputs, those of the committed code, into them: `make render NB=08 PRESET=cpu`.

    python -m tools.render [--nb 08] [--preset cpu|gpu]
    python -m tools.render --nb 08 --executed COPY.ipynb [--run FOLDER] [--minutes 25]

Writes the outputs, in the metadata what they belong to (preset, device, minutes, versions, results, hash of the code
cells as that preset runs them), the headline into the title, the picture into img/, and the gallery of the README. --executed takes all that
from a run on another machine: the executed copy, and the folder with its run.json and results.json, by default that of
the copy. Where anything lacks, all stays as it is.
"""

import argparse
import base64
import datetime
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tools import cookbook, readme
from tools.execute import execute, kernel_environment, read_json
from tools.run import RUNS, relative

RENDERED_PRESETS = tuple(preset for preset in cookbook.PRESETS if preset != "smoke")
FACTS = ("preset", "device", "versions", "headline", "gallery")
KEPT_CELL_METADATA = ("tags", "cellView", "jupyter", "alt")
ESCAPE = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
# tqdm's: "epoch: 30%|███       | 3/10 [00:01<00:03, 2.1it/s, loss=0.3]" or, of unknown length, "3it [00:01, 2.1it/s]"
PROGRESS_BAR = re.compile(r"\d\S* \[\d+:\d\d(:\d\d)?(<[\d:?]+)?, *(\?|[\d.]+)[^\s\]]*/[^\]]+\]\s*$")
# loky's, where a process had nothing to do while others worked on
IDLE_WORKER = re.compile(r"[^\n]*UserWarning: A worker stopped while some jobs were given[^\n]*\n +warnings\.warn\(\n")
CLEARML_LINE = re.compile(
    r"ClearML (Task:|running in offline mode|results page:|Monitor:|new version available)"
    r"|\d{4}-\d\d-\d\d [\d:,]+ - clearml\."
)


def compress(png):
    """An opaque picture without its alpha channel; with 256 colours where hardly a pixel (1 in 500) changes visibly.

    What is no PNG (a moving GIF shown as one) stays as it is.
    """
    image = Image.open(io.BytesIO(png))
    if image.format != "PNG" or image.convert("RGBA").getextrema()[3][0] < 255:
        return png
    image = image.convert("RGB")
    few = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    change = np.abs(np.asarray(few.convert("RGB"), dtype=int) - np.asarray(image)).max(-1)  # of 255 levels
    alike = (change > 24).mean() < 1 / 500 and (change**2).mean() < 4**2
    target = io.BytesIO()
    (few if alike else image).save(target, "png", optimize=True)
    return min(png, target.getvalue(), key=len)


def is_noise(name, line):
    """Whether a line of the stream `name` is a progress bar, or what ClearML says of its ids and folders."""
    plain = ESCAPE.sub("", line)
    if name == "stderr" and (not plain.strip() or PROGRESS_BAR.search(plain)):
        return True
    return CLEARML_LINE.match(plain) is not None


def clean_output(output):
    """An output without noise and with its picture compressed; None where nothing is left."""
    if output.output_type == "stream":
        lines = IDLE_WORKER.sub("", output.text).splitlines(keepends=True)
        output.text = "".join(line for line in lines if not is_noise(output.name, line))
        return output if output.text else None
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = base64.b64encode(compress(base64.b64decode(output.data["image/png"]))).decode()
    return output


def clean(notebook):
    """Drop what execution leaves in the metadata (timings, widgets' state), and noise in the outputs; sources stay."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(clean_output, cell.outputs) if output is not None]
    return notebook


def pictures(cells):
    """The PNG images among the outputs of cells, as bytes."""
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


def with_outputs(notebook, executed):
    """The notebook with the outputs and counts of `executed`, a copy of the same code."""
    for cell, done in zip(cookbook.code_cells(notebook), cookbook.code_cells(executed), strict=True):
        cell.outputs = done.outputs
        cell.execution_count = done.execution_count
    return notebook


def lacking(notebook, facts, results):
    """What an executed notebook lacks to be shown, in words; None where it lacks nothing."""
    cells = [cell for cell in cookbook.code_cells(notebook) if cell.source.strip()]
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return "a cell of it failed"
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        return "not all of its cells have run, in their order"
    if len(pictures(notebook.cells)) < 3:
        return f"it needs three figures and has {len(pictures(notebook.cells))}"
    if not pictures(cookbook.tagged(notebook, "picture")):
        return "the cell tagged picture shows none"
    missing = [key for key in FACTS if not (facts or {}).get(key)]
    if missing:
        return f"its run.json has no {', '.join(missing)}"
    if facts["preset"] not in RENDERED_PRESETS:
        return f"it ran with preset {facts['preset']}, and shown are the results of {' and '.join(RENDERED_PRESETS)}"
    return None if results else "its results.json is empty or not there"


def stamp(path, executed, folder, minutes=None):
    """Put the outputs, headline and picture of an executed copy into the notebook at `path`; exits where one lacks.

    folder: where its run.json and results.json lie. minutes: that it took, by default what run.json says.
    """
    notebook = cookbook.read(path)
    if cookbook.code_hash(executed) != cookbook.code_hash(notebook):
        raise SystemExit(f"{path.name} is unchanged: the executed copy has other code, its outputs do not belong here")
    notebook = clean(with_outputs(notebook, executed))
    facts, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    lack = lacking(notebook, facts, results)
    if lack:
        raise SystemExit(f"{path.name} is unchanged: {lack}")
    minutes = facts.get("minutes") if minutes is None else minutes
    if minutes is None:
        raise SystemExit(f"{path.name} is unchanged: its run.json does not say how many minutes it took: add --minutes")
    notebook.metadata["cookbook"] = {
        **{key: facts[key] for key in FACTS},
        "minutes": round(minutes, 1),
        "date": datetime.date.today().isoformat(),
        "results": results,
        "code_sha256": cookbook.code_hash(notebook, facts["preset"]),
    }
    line = readme.result_line(notebook)
    notebook.cells[0].source = cookbook.HEADLINE.sub(lambda m: f"{m[1]}\n{line}\n{m[2]}", notebook.cells[0].source)
    cookbook.write(notebook, path)
    cookbook.picture_path(path).write_bytes(pictures(cookbook.tagged(notebook, "picture"))[-1])
    print(f"{path.name}: {line}", flush=True)


def render(path, preset):
    """Execute a notebook in runs/ and put the outputs into it; exits, and changes nothing, where a cell fails."""
    folder = RUNS / f"render-{path.stem}-{preset}-{cookbook.code_hash(cookbook.read(path))[:8]}"
    variables = kernel_environment(COOKBOOK_PRESET=preset, CLEARML_SUPPRESS_UPDATE_MESSAGE="1")
    execution = execute(path, folder, variables)
    if execution.error:
        copy = relative(execution.folder / path.name)
        raise SystemExit(f"{path.name} is unchanged; it failed in {execution.error}; see {copy}")
    stamp(path, execution.notebook, execution.folder, execution.minutes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", help="number of one notebook; default: all")
    parser.add_argument("--preset", default="cpu", choices=RENDERED_PRESETS)
    parser.add_argument("--executed", type=Path, metavar="COPY.ipynb", help="an executed copy, instead of a run here")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where its run.json and results.json lie")
    parser.add_argument("--minutes", type=float, help="that the executed copy took")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a ± still shows the rest
    if not arguments.executed:
        if arguments.run or arguments.minutes:
            parser.error("--run and --minutes belong to --executed")
        for path in cookbook.find(arguments.nb):
            render(path, arguments.preset)
    elif not arguments.nb:
        parser.error("--executed needs --nb")
    else:
        (path,) = cookbook.find(arguments.nb)
        stamp(path, cookbook.read(arguments.executed), arguments.run or arguments.executed.parent, arguments.minutes)
    readme.update()


if __name__ == "__main__":
    main()
