"""What the maintainers' scripts and the tests share: finding, reading and writing notebooks, and what a notebook says of itself."""

import argparse
import ast
import hashlib
import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
MINIATURE = ROOT / "tests" / "miniature" / "00_least_squares_line.ipynb"
PRESETS = ("smoke", "cpu", "gpu")
HEADLINE = re.compile(r"(<!-- headline -->).*?(<!-- /headline -->)", re.DOTALL)


def find(number=None):
    """Paths of all notebooks, or of the one with this number (00 is the tests' miniature); exits with a list where there is none."""
    if number and f"{number:0>2}" == "00":
        return miniatures()
    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in paths if not number or path.name[:2] == f"{number:0>2}"]
    if not chosen:
        raise SystemExit(f"no notebook {number}; there are: {', '.join(path.name for path in paths)}")
    return chosen


def miniatures():
    """The small complete notebook in tests/ on which rules and tools are tried."""
    return [MINIATURE] if MINIATURE.exists() else []


def picture_path(path):
    """Where the picture of a notebook lies: in img/; that of the miniature beside it."""
    path = Path(path)
    return (path.parent.parent / "img" / path.name if path.parent.name == "notebooks" else path).with_suffix(".png")


def raw_url(path):
    """Address at which GitHub serves a file of the repository."""
    where = settings()
    return f"https://raw.githubusercontent.com/{where['repository']}/{where['branch']}/{Path(path).relative_to(ROOT).as_posix()}"


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


def in_preset(source, preset):
    """The source of a cell with every `choose(smoke=..., cpu=..., gpu=...)` replaced by what it gives in this preset.

    Where values for other presets do more than stand there, such as calling a function, which may draw random numbers,
    the call stays as it is; so does a cell with magics.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    raw = source.encode()  # syntax trees count in bytes
    starts = [0, *(place.end() for place in re.finditer(b"\n", raw))]
    pieces, end = [], 0
    for node in sorted(filter(is_choice, ast.walk(tree)), key=lambda node: (node.lineno, node.col_offset)):
        start = starts[node.lineno - 1] + node.col_offset
        values = {keyword.arg: keyword.value for keyword in node.keywords}
        chosen = values.pop(preset, None)
        if start < end or chosen is None or not all(map(does_nothing, values.values())):  # start < end: within another choice
            continue
        value = ast.get_source_segment(source, chosen)
        pieces += [raw[end:start].decode(), in_preset(f"({value})", preset)]
        end = starts[node.end_lineno - 1] + node.end_col_offset
    return "".join(pieces) + raw[end:].decode()


def is_choice(node):
    """Whether a node of a syntax tree is a call of `choose`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "choose"


def does_nothing(value):
    """Whether to evaluate an expression calls nothing but `choose` and gives nothing a name."""
    nodes = list(ast.walk(value))
    return all(is_choice(node) for node in nodes if isinstance(node, ast.Call)) and not any(isinstance(n, ast.NamedExpr) for n in nodes)


def code_hash(notebook, preset=None):
    """Hash of what is executed: the sources of the code cells, in order.

    preset: of what is executed *in this preset*, so that an edit to what others choose leaves it as it was.
    """
    sources = [cell.source for cell in code_cells(notebook)]
    if preset is not None:
        sources = [in_preset(source, preset) for source in sources]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def text_of(cell):
    """What a code cell printed on standard output."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def title(notebook):
    """(heading, one-sentence description) from the first cell."""
    heading, _, rest = notebook.cells[0].source.partition("\n")
    return heading.lstrip("# "), rest.strip().partition("\n\n")[0].replace("\n", " ")


def settings():
    """The table [tool.cookbook] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cookbook"]


def badge(path):
    """Markdown of the Colab badge for a notebook."""
    where, place = settings(), Path(path).relative_to(ROOT).as_posix()
    link = f"https://colab.research.google.com/github/{where['repository']}/blob/{where['branch']}/{place}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def swept(description, choices, duration):
    """Which of the choices a benchmark is to sweep over learning rates: those named after --sweep, all where none is; None without it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="*", choices=choices, help=f"train at several learning rates instead (about {duration})")
    names = parser.parse_args().sweep
    return names if names is None else names or list(choices)
