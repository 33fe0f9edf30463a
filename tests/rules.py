"""What holds for every notebook, a rule each: a function of (notebook, path) that yields complaints."""

import ast
import base64
import builtins
import io
import re

import nbformat
from PIL import Image

from tests.lift import definitions, is_constant, is_constant_update, names_read, python_of
from tools import cookbook, readme, sync_canon

SECTIONS = (
    "What you will build", "Install", "Imports", "Parameters", "Runtime", "Experiment tracking", "Data", "Training", "Results",
    "Where this differs", "Exercises", "References",
)  # fmt: skip
CANON_MARKERS = {"# canon: install", "# canon: runtime", "# canon: style", "# canon: tracking"}
LONG_LOOPS = {"04": 120, "08": 120}  # reinforcement learning: the loop is the lesson
RULES = {}


def rule(function):
    RULES[function.__name__] = function
    return function


def trees(notebook):
    return [ast.parse(python_of(cell.source)) for cell in cookbook.code_cells(notebook)]


def outputs(notebook):
    return [output for cell in cookbook.code_cells(notebook) for output in cell.outputs]


def text_of_outputs(notebook):
    parts = []
    for output in outputs(notebook):
        data = output.get("data", {})
        parts += [output.get("text", ""), *(str(data.get(kind, "")) for kind in ("text/plain", "text/html", "text/markdown"))]
    return "\n".join(parts)


def markdown_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code_of(notebook):
    return "\n".join(cell.source for cell in cookbook.code_cells(notebook))


def pictures(cells):
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


@rule
def valid_format(notebook, path):
    """Valid nbformat 4.5 with unique cell ids."""
    ids = [cell.get("id") for cell in notebook.cells]
    if len(set(ids)) != len(ids):  # first: nbformat would repair them in passing
        yield "cell ids are not unique"
        return
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"invalid: {error.message}"


@rule
def title_cell(notebook, path):
    """`# NN · Name`, a sentence, the badge of this file."""
    cell = notebook.cells[0]
    heading, sentence = cookbook.title(notebook)
    if cell.cell_type != "markdown" or not cell.source.startswith("# "):
        yield "the first cell is no title"
    if not heading.startswith(f"{path.name[:2]} · "):
        yield f"the title {heading!r} does not begin with the number {path.name[:2]} and ·"
    if not sentence.endswith("."):
        yield "no sentence below the title"
    if cookbook.badge(path) not in cell.source:
        yield f"the Colab badge is not {cookbook.badge(path)}"


@rule
def anatomy(notebook, path):
    """The sections, in their order."""
    headings = re.findall(r"(?m)^## (.+)$", markdown_of(notebook))
    position = -1
    for section in SECTIONS:
        found = [i for i, heading in enumerate(headings) if heading.startswith(section)]
        if not found:
            yield f"no section '{section}'"
        elif found[0] <= position:
            yield f"section '{section}' is out of order"
        else:
            position = found[0]


@rule
def parameters_cell(notebook, path):
    """One cell tagged `parameters` of literal assignments with @param, PRESET and SEED among them."""
    cells = cookbook.tagged(notebook, "parameters")
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged parameters"
        return
    nodes = ast.parse(cells[0].source).body
    if any(not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)) for node in nodes):
        yield "the parameters cell holds more than literal assignments"
        return
    names = {node.targets[0].id: node.value.value for node in nodes}
    if names.get("PRESET") != "auto" or "SEED" not in names:
        yield 'parameters need PRESET = "auto" and SEED'
    if any("# @param" not in line for line in cells[0].source.splitlines()):
        yield "a parameter lacks # @param"


@rule
def canon_copies(notebook, path):
    """The four canon blocks, identical to their source."""
    markers = {cell.source.partition("\n")[0] for cell in cookbook.code_cells(notebook) if cell.source.startswith("# canon:")}
    if markers != CANON_MARKERS:
        yield f"canon cells missing or unknown: {sorted(markers ^ CANON_MARKERS)}"
    for cell in sync_canon.differing(notebook):
        yield f"the copy of {cell.source.partition(chr(10))[0]!r} differs: make canon"


@rule
def one_imports_cell(notebook, path):
    """Imports stand in one cell, canon aside; none from this repository."""
    importing = []
    for cell in cookbook.code_cells(notebook):
        nodes = [n for n in ast.walk(ast.parse(python_of(cell.source))) if isinstance(n, (ast.Import, ast.ImportFrom))]
        modules = {name for n in nodes for name in ([n.module] if isinstance(n, ast.ImportFrom) else [alias.name for alias in n.names])}
        if nodes and not cell.source.startswith("# canon:"):
            importing.append(cell)
        if {module.split(".")[0] for module in modules} & {"tools", "tests", "notebooks"}:
            yield "imports from this repository: a notebook runs alone"
    if len(importing) != 1:
        yield f"{len(importing)} cells import"


@rule
def executed_in_order(notebook, path):
    """Execution counts 1, 2, 3, ..."""
    counts = [cell.execution_count for cell in cookbook.code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield "not run from top to bottom in one go"


@rule
def clean_outputs(notebook, path):
    """No errors, no warnings, no overlong output."""
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error is committed: {output.ename}"
        if output.get("name") == "stderr":
            yield f"output on stderr: {output.text[:80]!r}"
        if output.get("text", "").count("\n") > 60:
            yield "an output of more than 60 lines"


@rule
def clean_metadata(notebook, path):
    """No widget state (GitHub shows 'Invalid Notebook'), none of Colab's or papermill's notes."""
    extra = set(notebook.metadata) - {"kernelspec", "language_info", "cookbook"}
    extra |= {key for cell in notebook.cells for key in cell.metadata if key != "tags"}
    if extra:
        yield f"metadata to strip: {sorted(extra)}"
    if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs(notebook)):
        yield "a widget among the outputs"


@rule
def no_secrets_or_paths(notebook, path):
    """No credentials, no path of the machine that rendered it."""
    text = code_of(notebook) + text_of_outputs(notebook)
    for found in re.findall(r"/(?:root|tmp|work|Users|home)/[\w.-]+", text):
        yield f"a path of a machine: {found}"
    for found in re.findall(r"(?i)(?:access_key|secret_key|api_key|token|password)\s*[=:]\s*['\"][\w-]{12,}", text):
        yield f"looks like a credential: {found[:30]}"


@rule
def size(notebook, path):
    """At most 1 MB with outputs, 20 to 60 code cells, half of them of at most 15 lines."""
    if len(nbformat.writes(notebook)) > 1_000_000:
        yield "more than 1 MB: GitHub may not render it"
    lines = sorted(len([line for line in cell.source.split("\n") if line.strip()]) for cell in cookbook.code_cells(notebook))
    if not 20 <= len(lines) <= 60:
        yield f"{len(lines)} code cells"
    if lines[len(lines) // 2] > 15:
        yield f"the median cell has {lines[len(lines) // 2]} lines"


@rule
def not_stale(notebook, path):
    """The outputs were made by this code."""
    if notebook.metadata.get("cookbook", {}).get("code_sha256") != cookbook.code_hash(notebook):
        yield "the code changed since the outputs were made: make render"


@rule
def rendered_facts(notebook, path):
    """Preset, device, minutes, versions and headline agree with the outputs and the title."""
    facts = notebook.metadata.get("cookbook", {})
    if facts.get("preset") not in ("cpu", "gpu"):
        yield f"rendered with preset {facts.get('preset')}"
    if not facts.get("minutes", 0) > 0:
        yield "no minutes"
    for key, value in cookbook.runtime(notebook).items():
        if facts.get(key) != value:
            yield f"{key} is {facts.get(key)!r} in the metadata and {value!r} in the outputs"
    if not facts.get("headline") or facts["headline"] != cookbook.headline(notebook):
        yield "the headline in the metadata is not what the cell tagged headline printed"
    if facts and readme.result_line(notebook) not in notebook.cells[0].source:
        yield "the title cell does not show the result"


@rule
def figures(notebook, path):
    """Three figures or more on opaque white; the picture in img/ is the output of the cell tagged `picture`."""
    images = pictures(notebook.cells)
    if len(images) < 3:
        yield f"{len(images)} figures"
    for image in images:
        if Image.open(io.BytesIO(image)).convert("RGBA").getpixel((0, 0)) != (255, 255, 255, 255):
            yield "a figure without an opaque white background"
    tagged = pictures(cookbook.tagged(notebook, "picture"))
    committed = cookbook.ROOT / "img" / f"{path.stem}.png"
    if not tagged or not committed.exists() or committed.read_bytes() != tagged[-1]:
        yield f"img/{path.stem}.png is not the output of the cell tagged picture"


@rule
def check_cells(notebook, path):
    """Three checks or more, of at most ten lines, that assert and print."""
    cells = cookbook.tagged(notebook, "check")
    if len(cells) < 3:
        yield f"{len(cells)} cells tagged check"
    for cell in cells:
        if (
            len([line for line in cell.source.split("\n") if line.strip()]) > 10
            or "assert " not in cell.source
            or "print(" not in cell.source
        ):
            yield f"a check over ten lines, or without assert and print: {cell.source[:60]!r}"


@rule
def documented(notebook, path):
    """Public functions and classes have docstrings, functions at most 60 lines."""
    for node in definitions(notebook):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{node.name} has no docstring"
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONG_LOOPS.get(path.name[:2], 60):
                yield f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@rule
def config_says_why(notebook, path):
    """`Config` and its parts are frozen dataclasses with a comment beside every field."""
    cells = [(cell.source.split("\n"), ast.parse(python_of(cell.source))) for cell in cookbook.code_cells(notebook)]
    frozen = [
        (lines, node)
        for lines, tree in cells
        for node in tree.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(d) for d in node.decorator_list] == ["dataclass(frozen=True)"]
    ]
    if "Config" not in [node.name for _, node in frozen]:
        yield "no frozen dataclass Config"
    for lines, node in frozen:
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and "#" not in lines[field.end_lineno - 1]:
                yield f"{node.name}.{field.target.id} does not say why it has its value"


@rule
def self_contained_definitions(notebook, path):
    """Definitions use other definitions only, no variable of a cell: they can be lifted."""
    nodes = list(definitions(notebook))
    known = set(dir(builtins))
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif is_constant(node):
            known |= {target.id for target in node.targets}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or is_constant(node) or is_constant_update(node):
            arguments = {a.arg for f in ast.walk(node) if isinstance(f, ast.arguments) for a in (*f.posonlyargs, *f.args, *f.kwonlyargs)}
            arguments |= {a.arg for f in ast.walk(node) if isinstance(f, ast.arguments) for a in (f.vararg, f.kwarg) if a}
            inner = {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            inner |= {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler) and n.name}
            inner |= {alias.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for alias in n.names}
            foreign = names_read(node) - known - arguments - inner
            if foreign:
                yield f"{getattr(node, 'name', ast.unparse(node)[:40])} depends on {sorted(foreign)}"


@rule
def sound_code(notebook, path):
    """No blanket filters, swallowed errors, widgets, leftovers or unsafe loading."""
    code = code_of(notebook)
    patterns = {
        r"filterwarnings\(\s*['\"]ignore|simplefilter\(\s*['\"]ignore": "a blanket warning filter",
        r"tqdm\.(notebook|auto)": "tqdm.notebook or tqdm.auto: widget state breaks GitHub's rendering",
        r"except( Exception)?:\s*\n?\s*pass\b": "a swallowed exception",
        r"\b(TODO|FIXME|XXX)\b": "a leftover",
        r"torch\.load\((?![^\n]*weights_only=True)": "torch.load without weights_only=True",
        r"(?m)^\s*#\s*(print|plt|for|if|return|import|[a-z_]+\s*=)\b.*[(=:]": "commented-out code",
    }
    for pattern, what in patterns.items():
        if re.search(pattern, code):
            yield what


@rule
def github_markdown(notebook, path):
    """Mathematics and pictures that GitHub renders."""
    text = markdown_of(notebook)
    if re.search(r"[\x00-\x09\x0b-\x1f]", text):
        yield r"a control character: a backslash was lost, as of \top or \frac"
    for pattern, what in (
        (r"\\newcommand", r"\newcommand"),
        (r"\\begin\{(align|equation|gather)\*?\}", "a bare environment: use $$ and aligned"),
    ):
        if re.search(pattern, text):
            yield what
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            yield f"the picture {target} will not show in Colab"
    if text.count("$$") % 2:
        yield "an unclosed $$"
