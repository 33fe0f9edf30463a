"""What holds for every notebook, a rule each: a function of (notebook, path) that yields complaints."""

import ast
import base64
import io
import re

import nbformat
from PIL import Image

from tools import cookbook, readme, sync_canon
from tools.lift import definitions, foreign_names, python_of

SECTIONS = ("Setup", "1. ", "Data", "Train and look", "Study", "Results", "Where this differs", "Exercises", "References")
CANON = {"setup", "tracking", "report"}  # every notebook has these; the others where they are wanted
CELL_METADATA = {"tags", *sync_canon.COLLAPSED}
LONG_LOOPS = {"04": 120, "08": 120}  # reinforcement learning: the loop is the lesson
RULES = {}


def rule(function):
    """Enter a rule."""
    RULES[function.__name__] = function
    return function


def hand_written(notebook):
    """Code cells that are no canon."""
    return [cell for cell in cookbook.code_cells(notebook) if sync_canon.name_of(cell) is None]


def lines_of(cell):
    """Lines of code in a cell: neither blank nor a comment."""
    return [line for line in cell.source.split("\n") if line.strip() and not line.strip().startswith("#")]


def part(notebook, start, end):
    """The cells from the one with the heading `## start` up to that with `## end`, which is left out."""
    headings = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "markdown" and cell.source.startswith(f"## {start}")]
    ends = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "markdown" and cell.source.startswith(f"## {end}")]
    return notebook.cells[headings[0] : ends[0]] if headings and ends else []


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


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


def out_of_order(notebook, sections):
    """Complaints about sections that lack or stand before one that should come first."""
    headings = re.findall(r"(?m)^## (.+)$", markdown_of(notebook))
    position = -1
    for section in sections:
        found = [i for i, heading in enumerate(headings) if heading.startswith(section)]
        if not found:
            yield f"no section '{section}'"
        elif found[0] <= position:
            yield f"section '{section}' is out of order"
        else:
            position = found[0]


@rule
def anatomy(notebook, path):
    """The sections in their order; the lesson ends with three takeaways; the study asks its questions."""
    yield from out_of_order(notebook, SECTIONS)
    lesson = [cell.source for cell in part(notebook, "Train and look", "Study") if cell.cell_type == "markdown"]
    if not lesson or not re.search(r"\*\*Takeaways\*\*", lesson[-1]) or len(re.findall(r"(?m)^\d\. ", lesson[-1])) != 3:
        yield "the lesson does not end with **Takeaways** and three numbered sentences"
    study = "\n".join(cell.source for cell in part(notebook, "Study", "Results") if cell.cell_type == "markdown")
    questions = re.findall(r"(?m)^### (.*)$", study)
    if not 1 <= len(questions) <= 5 or not all(question.endswith("?") for question in questions):
        yield f"the study's headings are not one to five questions: {questions}"


@rule
def picture_under_the_title(notebook, path):
    """The notebook's picture by its raw address, with alternative text."""
    source = notebook.cells[0].source
    address = cookbook.raw_url(cookbook.picture_path(path))
    if not re.search(rf'<img src="{re.escape(address)}"[^>]* alt="[^"]{{20,}}"', source):
        yield f'no <img src="{address}" ... alt="..."> in the title cell'


@rule
def budgets(notebook, path):
    """What a reader can take in: lines before the first piece, of the lesson, of the rest, of a cell, of prose."""
    before = sum(len(lines_of(cell)) for cell in hand_written_in(part(notebook, "Setup", "1. ")))
    if before > 40:
        yield f"{before} hand-written lines before the first piece (40)"
    lesson = sum(len(lines_of(cell)) for cell in hand_written_in(part(notebook, "Setup", "Study")))
    rest = sum(len(lines_of(cell)) for cell in hand_written(notebook)) - lesson
    if lesson > 1.25 * 350 or rest > 1.25 * 400:
        yield f"{lesson} lines of lesson (350 and a quarter), {rest} of the rest (400 and a quarter)"
    data = sum(len(lines_of(cell)) for cell in hand_written_in(part(notebook, "Data", "Train and look")))
    if data > 1.25 * 45:
        yield f"{data} lines for the data (45 and a quarter)"
    words = len(re.sub(r"\$\$.*?\$\$", " ", markdown_of(notebook), flags=re.DOTALL).split())
    if words > 3300:
        yield f"{words} words of prose (3,300)"
    for cell in hand_written(notebook):
        yield from long_cell(cell, LONG_LOOPS.get(path.name[:2], 60))


def hand_written_in(cells):
    """Of some cells those with code that is no canon, imports aside."""
    chosen = [cell for cell in cells if cell.cell_type == "code" and sync_canon.name_of(cell) is None]
    bare = lambda cell: "\n".join(line for line in cell.source.split("\n") if not re.match(r"(import|from) ", line))
    return [nbformat.from_dict({**cell, "source": bare(cell)}) for cell in chosen]


SCOPES = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def long_cell(cell, loop):
    """Complaint about a cell over its limit: a loop that trains, a class, anything else; and about lines over 100 characters."""
    tree = ast.parse(python_of(cell.source))
    has_class = any(isinstance(node, ast.ClassDef) for node in tree.body)
    trains = "backward()" in cell.source or "def train(" in cell.source
    limit = loop if trains else 45 if has_class else 30
    if len(lines_of(cell)) > limit and not any(is_import(node) for node in tree.body):
        yield f"a cell of {len(lines_of(cell))} lines ({limit}): {cell.source[:50]!r}"
    for line in cell.source.split("\n"):
        if len(line) > 100:
            yield f"a line of {len(line)} characters (100): {line.strip()[:50]!r}"


@rule
def one_statement_per_line(notebook, path):
    """No tuples of calls, no semicolons, no body beside its header."""
    for cell in hand_written(notebook):
        for node in ast.walk(ast.parse(python_of(cell.source))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
                yield f"line {node.lineno} joins statements into a tuple: {ast.unparse(node)[:50]!r}"
            for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                if isinstance(body, list):
                    yield from shared_lines(node, body)


def shared_lines(node, body):
    """Complaints about statements of a body that begin on the line of their header or of the statement before."""
    last = getattr(node, "lineno", 0)
    for statement in body:
        if statement.lineno <= last:
            yield f"line {statement.lineno} holds two statements: {ast.unparse(statement)[:50]!r}"
        last = statement.end_lineno


@rule
def exercises(notebook, path):
    """Two exercises or more with a stub and a check, unsolved and not failing."""
    cells = cookbook.tagged(notebook, "exercise")
    if len(cells) < 2:
        yield f"{len(cells)} cells tagged exercise"
    for cell in cells:
        if "def " not in cell.source or "exercise(" not in cell.source:
            yield f"an exercise without a stub and a check: {cell.source[:50]!r}"
        elif "not solved yet" not in cookbook.text_of(cell):
            yield f"an exercise that does not say 'not solved yet': {cell.source[:50]!r}"


@rule
def results_record(notebook, path):
    """The records of the results, a headline of at most 25 words and one of 20 for the gallery; signs such as ± and % are no words."""
    facts = notebook.metadata.get("cookbook", {})
    records = facts.get("results") or []
    if not records:
        yield "no results in the metadata"
    for record in records:
        if set(record) != {"name", "values", "unit", "better", "reference"} or not record["values"]:
            yield f"an incomplete record: {record}"
    for key, most in (("headline", 25), ("gallery", 20)):
        count = sum(any(map(str.isalnum, word)) for word in facts.get(key, "").split())
        if not 3 <= count <= most:
            yield f"the {key} has {count} words ({most})"


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
    """The canon blocks, each once, identical to their source, and collapsed."""
    names = [name for name, _ in sync_canon.canon_cells(notebook)]
    if CANON - set(names) or len(set(names)) < len(names):
        yield f"canon cells that lack or stand twice: {sorted(CANON - set(names)) or names}"
    for name, _ in sync_canon.differing(notebook):
        yield f"the canon block {name} differs from tools/canon or is not collapsed: make canon"


@rule
def one_imports_cell(notebook, path):
    """Imports stand in one cell, canon aside; none from this repository."""
    importing = []
    for cell in cookbook.code_cells(notebook):
        nodes = [n for n in ast.walk(ast.parse(python_of(cell.source))) if isinstance(n, (ast.Import, ast.ImportFrom))]
        modules = {name for n in nodes for name in ([n.module] if isinstance(n, ast.ImportFrom) else [alias.name for alias in n.names])}
        if nodes and sync_canon.name_of(cell) is None:
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
def no_plumbing_in_outputs(notebook, path):
    """No progress bars, no lines of ClearML about where its session lies."""
    text = text_of_outputs(notebook)
    for pattern in (r"\d+%\|", r"ClearML Task:", r"session stored in", r"clearml\.Task - "):
        if re.search(pattern, text):
            yield f"{pattern!r} stands in the outputs"


@rule
def clean_metadata(notebook, path):
    """No widget state (GitHub shows 'Invalid Notebook'), none of Colab's or papermill's notes."""
    extra = set(notebook.metadata) - {"kernelspec", "language_info", "cookbook"}
    extra |= {key for cell in notebook.cells for key in cell.metadata if key not in CELL_METADATA}
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
    """At most 1 MB with outputs; half of the cells have at most 15 lines."""
    if len(nbformat.writes(notebook)) > 1_000_000:
        yield "more than 1 MB: GitHub may not render it"
    lines = sorted(len([line for line in cell.source.split("\n") if line.strip()]) for cell in hand_written(notebook))
    if lines[len(lines) // 2] > 15:
        yield f"the median cell has {lines[len(lines) // 2]} lines"


@rule
def not_stale(notebook, path):
    """The outputs were made by this code, as their preset runs it."""
    facts = notebook.metadata.get("cookbook", {})
    if facts.get("code_sha256") != cookbook.code_hash(notebook, facts.get("preset")):
        yield "the code changed since the outputs were made: make render"


@rule
def rendered_facts(notebook, path):
    """Preset, device, minutes, versions and headline stand in the metadata, and the title shows them."""
    facts = notebook.metadata.get("cookbook", {})
    if facts.get("preset") not in ("cpu", "gpu"):
        yield f"rendered with preset {facts.get('preset')}"
    if not facts.get("minutes", -1) >= 0:
        yield "no minutes"
    if not facts.get("device") or not facts.get("versions") or not facts.get("headline"):
        yield "device, versions or headline lack"
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


@rule
def figures_to_read(notebook, path):
    """At most 9 inches wide at 150 dpi, nothing under 9 points, alternative text; the picture is a panel of 4:3 with large text."""
    for cell in cookbook.code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                facts = output.metadata.get("image/png", {})
                picture = "picture" in cell.metadata.get("tags", [])
                yield from small_print(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))), facts, picture)
    tagged = pictures(cookbook.tagged(notebook, "picture"))
    committed = cookbook.picture_path(path)
    if len(tagged) != 1 or not committed.exists() or committed.read_bytes() != tagged[0]:
        yield f"{committed.name} is not the output of the cell tagged picture"


def small_print(image, facts, picture):
    """Complaints about one figure."""
    if image.width > 9 * 150:
        yield f"a figure {image.width} pixels wide ({9 * 150})"
    if len(facts.get("alt", "")) < 20:
        yield f"a figure without alternative text: {facts.get('alt')!r}"
    least = 16 if picture else 9
    if (facts.get("smallest_text") or least) < least:
        yield f"text of {facts['smallest_text']} points ({least})"
    if picture and abs(image.width / image.height - 4 / 3) > 0.01:
        yield f"a picture of {image.width} x {image.height} pixels, not 4:3"


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
    for tree in map(ast.parse, [python_of(cell.source) for cell in hand_written(notebook)]):
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
def config_is_small(notebook, path):
    """`Config` has at most 15 fields: what only scales an experiment stands where the experiment is."""
    for tree in trees(notebook):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                count = sum(isinstance(field, ast.AnnAssign) for field in node.body)
                if count > 15:
                    yield f"Config has {count} fields (15)"


@rule
def self_contained_definitions(notebook, path):
    """Definitions use other definitions only, no variable of a cell: they can be lifted."""
    for name, foreign in foreign_names(notebook).items():
        if foreign:
            yield f"{name} depends on {foreign}"


def assigned(node):
    """Names that statements of a cell assign, but not what a function, class or comprehension in them does."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    if not isinstance(node, (*SCOPES, ast.ClassDef)):
        for child in ast.iter_child_nodes(node):
            yield from assigned(child)


@rule
def definitions_kept(notebook, path):
    """No cell gives the name of a function or class to something else: what calls it later would break, or train something else."""
    trees = [ast.parse(python_of(cell.source)) for cell in notebook.cells if cell.cell_type == "code"]
    definitions = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, definitions)}
    for name in sorted({name for tree in trees for name in assigned(tree)} & defined):
        yield f"{name} is a function or class, and a cell assigns something else to it"


@rule
def sound_code(notebook, path):
    """No blanket filters, swallowed errors, widgets, leftovers or unsafe loading."""
    code = "\n".join(cell.source for cell in hand_written(notebook))
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
def nothing_left_to_write(notebook, path):
    """No placeholder in prose: a note to oneself, a table's cell of one word in capitals."""
    for found in re.findall(r"\(answer\)|\b(?:TODO|FIXME|XXX)\b|\|\s*[A-Z]{4,}\s*(?=\|)", markdown_of(notebook)):
        yield f"still to be written: {found}"


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
