"""Start a notebook from the miniature of the tests: `make new NB=16 NAME=weight_averaging`.

    python -m tools.new --nb 16 --name weight_averaging

Writes notebooks/16_weight_averaging.ipynb: every section, the canon cells and the small example, without outputs, to be replaced
piece by piece. It runs from the start.
"""

import argparse
import re
import uuid

from tools import cookbook, sync_canon


def retitled(source, number, name):
    """The source of a title cell under another number and name, with the badge and picture of that notebook."""
    path = cookbook.NOTEBOOKS / f"{number}_{name}.ipynb"
    words = name.replace("_", " ")
    source = re.sub(r"^# .*", f"# {number} · {words[0].upper()}{words[1:]}", source)
    source = re.sub(r"\[!\[Open In Colab\]\([^)]*\)\]\([^)]*\)", lambda _: cookbook.badge(path), source)
    source = re.sub(r'src="[^"]*"', f'src="{cookbook.raw_url(cookbook.picture_path(path))}"', source)
    return cookbook.HEADLINE.sub(r"\1\nNot rendered yet.\n\2", source)


def started(number, name):
    """A new notebook made from the miniature."""
    notebook = cookbook.read(cookbook.MINIATURE)
    old = " ".join(cookbook.MINIATURE.stem.split("_"))
    for cell in notebook.cells:
        cell.id = uuid.uuid4().hex[:8]
        cell.source = cell.source.replace(old, f"{number} {name.replace('_', ' ')}")
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    notebook.cells[0].source = retitled(notebook.cells[0].source, number, name)
    notebook.metadata.pop("cookbook", None)
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", required=True, help="two digits")
    parser.add_argument("--name", required=True, help="words in lower case, joined by _")
    arguments = parser.parse_args()
    if not re.fullmatch(r"\d\d", arguments.nb) or arguments.nb == "00":
        raise SystemExit(f"NB={arguments.nb}: it takes two digits from 01 to 99")
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", arguments.name):
        raise SystemExit(f"NAME={arguments.name}: it takes words in lower case, joined by _, such as batch_normalization")
    taken = sorted(cookbook.NOTEBOOKS.glob(f"{arguments.nb}_*.ipynb"))
    if taken:
        raise SystemExit(f"there is {taken[0].name} already")
    path = cookbook.NOTEBOOKS / f"{arguments.nb}_{arguments.name}.ipynb"
    notebook = started(arguments.nb, arguments.name)
    sync_canon.fill(notebook, path)
    cookbook.write(notebook, path)
    print(f"notebooks/{path.name} is begun: replace the example piece by piece; tests go into tests/test_{path.stem}.py")


if __name__ == "__main__":
    main()
