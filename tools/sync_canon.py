"""Write the canon blocks of tools/canon/ into every notebook: `make canon`. `--check` only says which copies differ."""

import argparse

from tools import cookbook

CANON = cookbook.ROOT / "tools" / "canon"


def blocks():
    """{first line: source} of the canon blocks."""
    sources = [path.read_text().rstrip("\n") for path in sorted(CANON.glob("*.py"))]
    return {source.partition("\n")[0]: source for source in sources}


def differing(notebook):
    """Cells whose first line marks a canon block and whose source is not that block."""
    known = blocks()
    marked = [cell for cell in cookbook.code_cells(notebook) if cell.source.startswith("# canon:")]
    return [cell for cell in marked if cell.source != known.get(cell.source.partition("\n")[0])]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a copy differs")
    check = parser.parse_args().check
    failed = False
    for path in cookbook.find():
        notebook = cookbook.read(path)
        for cell in differing(notebook):
            marker = cell.source.partition("\n")[0]
            if marker not in blocks():
                raise SystemExit(f"{path.name}: there is no {marker!r}; there are: {', '.join(blocks())}")
            print(f"{path.name}: {marker} {'differs' if check else 'updated'}")
            failed |= check
            cell.source = blocks()[marker]
        if not check:
            cookbook.write(notebook, path)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
