"""Write the canon blocks of tools/canon/ into every notebook: `make canon`. `--check` only says which copies differ.

A block begins with a line `# @title ...`, which Colab shows in place of the collapsed cell, and a line `# canon: name`; a new notebook
carries the second line alone until `make canon` fills the cell.
"""

import argparse
import re

from tools import cookbook

CANON = cookbook.ROOT / "tools" / "canon"
COLLAPSED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab; in JupyterLab and VS Code


def blocks():
    """{name: source} of the canon blocks."""
    return {path.stem: path.read_text(encoding="utf-8").rstrip("\n") for path in sorted(CANON.glob("*.py"))}


def name_of(cell):
    """Name of the canon block that a cell is marked as, in its first or second line; None for a cell written by hand."""
    marker = re.match(r"(?:# @title .*\n)?# canon: (\S+)", cell.source)
    return marker[1] if marker and cell.cell_type == "code" else None


def canon_cells(notebook):
    """[(name, cell)] of the cells marked as canon."""
    return [(name_of(cell), cell) for cell in notebook.cells if name_of(cell)]


def is_collapsed(cell):
    return all(cell.metadata.get(key) == value for key, value in COLLAPSED.items())


def differing(notebook):
    """[(name, cell)] whose source is not that of the block, or whose metadata do not collapse it."""
    known = blocks()
    return [(name, cell) for name, cell in canon_cells(notebook) if cell.source != known.get(name) or not is_collapsed(cell)]


def fill(notebook, path):
    """Put the blocks into the cells marked as canon, collapsed; returns the names of those that differed. SystemExit for an unknown one."""
    known = blocks()
    changed = differing(notebook)
    for name, cell in changed:
        if name not in known:
            raise SystemExit(f"{path.name}: there is no canon block {name!r}; there are: {', '.join(known)}")
        cell.source = known[name]
        cell.metadata.update(COLLAPSED)
    return [name for name, _ in changed]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a copy differs")
    check = parser.parse_args().check
    failed = False
    for path in [*cookbook.find(), *cookbook.miniatures()]:
        notebook = cookbook.read(path)
        names = [name for name, _ in differing(notebook)] if check else fill(notebook, path)
        for name in names:
            print(f"{path.name}: canon block {name} {'differs' if check else 'updated'}")
        failed |= check and bool(names)
        if names and not check:
            cookbook.write(notebook, path)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
