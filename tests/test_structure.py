"""Every notebook keeps every rule, and every rule notices a notebook that is broken on purpose."""

import copy

import nbformat
import pytest

from tests.rules import RULES
from tools import cookbook, sync_canon

PATHS = [*cookbook.miniatures(), *cookbook.find()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_rules(path):
    notebook = cookbook.read(path)
    complaints = {name: list(rule(notebook, path)) for name, rule in RULES.items()}
    assert {name: found for name, found in complaints.items() if found} == {}


def cell_of(notebook, start):
    return next(cell for cell in notebook.cells if cell.source.startswith(start))


def canon_cell(notebook, name):
    return next(cell for found, cell in sync_canon.canon_cells(notebook) if found == name)


def output(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def append(cell, text):
    cell.source += text


def replace(cell, old, new):
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


def figures_of(notebook):
    """The outputs that show a figure."""
    return [o for c in cookbook.code_cells(notebook) for o in c.outputs if "image/png" in o.get("data", {})]


def transparent_picture(notebook):
    """A 1 x 1 transparent PNG in place of the first figure."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    figures_of(notebook)[0].data["image/png"] = png


def drop_outputs(cells):
    for cell in cells:
        cell.outputs = []


def move_results_up(notebook):
    section = cell_of(notebook, "## Results")
    notebook.cells.remove(section)
    notebook.cells.insert(1, section)


def describe(notebook, **facts):
    """Change what the first figure says of itself."""
    figures_of(notebook)[0].metadata["image/png"].update(facts)


def swap_pictures(notebook):
    """The first figure, which is not 4:3, in place of the picture."""
    figures_of(notebook)[1].data["image/png"] = figures_of(notebook)[-1].data["image/png"]


first_code = lambda notebook: cookbook.code_cells(notebook)[0]
last_code = lambda notebook: cookbook.code_cells(notebook)[-1]
exercise = lambda notebook: cookbook.tagged(notebook, "exercise")[0]

# (rule, what is wrong, how to break the miniature)
BROKEN = [
    ("valid_format", "duplicate id", lambda nb: nb.cells[1].update(id=nb.cells[0].id)),
    ("valid_format", "cell without source", lambda nb: nb.cells[1].pop("source")),
    ("title_cell", "another number", lambda nb: replace(nb.cells[0], "# 0", "# 9")),
    ("title_cell", "a badge that leads elsewhere", lambda nb: replace(nb.cells[0], "/blob/", "/blob/x")),
    ("anatomy", "no exercises", lambda nb: replace(cell_of(nb, "## Exercises"), "## Exercises", "Exercises")),
    ("anatomy", "results before the data", move_results_up),
    ("anatomy", "no numbered piece", lambda nb: replace(cell_of(nb, "## 1. "), "## 1. ", "## ")),
    ("anatomy", "no takeaways", lambda nb: nb.cells.remove(cell_of(nb, "**Takeaways**"))),
    ("anatomy", "two takeaways", lambda nb: replace(cell_of(nb, "**Takeaways**"), "3. ", "")),
    ("anatomy", "a study that asks nothing", lambda nb: replace(cell_of(nb, "## Study"), "?\n", "\n")),
    ("picture_under_the_title", "none", lambda nb: replace(nb.cells[0], "<img ", "<im ")),
    ("picture_under_the_title", "no alternative text", lambda nb: replace(nb.cells[0], ' alt="', ' alt="" x="')),
    ("budgets", "late idea", lambda nb: append(cell_of(nb, "settings = "), "\nx = 1" * 30)),
    ("budgets", "long lesson", lambda nb: [nb.cells.insert(3, nbformat.v4.new_code_cell("x = 1\n" * 28)) for _ in range(16)]),
    ("budgets", "long rest", lambda nb: [nb.cells.append(nbformat.v4.new_code_cell("x = 1\n" * 28)) for _ in range(18)]),
    ("budgets", "long data section", lambda nb: append(cell_of(nb, "def load_points"), "\nx = 1" * 50)),
    ("budgets", "a long cell", lambda nb: append(last_code(nb), "\nx = 1" * 31)),
    ("budgets", "a long loop", lambda nb: append(last_code(nb), "\nloss.backward()" + "\nx = 1" * 61)),
    ("budgets", "a long class", lambda nb: append(last_code(nb), "\nclass A:" + "\n    x = 1" * 46)),
    ("budgets", "a wide line", lambda nb: append(last_code(nb), "\nx = " + "1" * 100)),
    ("budgets", "much prose", lambda nb: append(nb.cells[1], " word" * 3300)),
    ("one_statement_per_line", "a tuple of calls", lambda nb: append(last_code(nb), "\nprint(1), print(2)")),
    ("one_statement_per_line", "a semicolon", lambda nb: append(last_code(nb), "\nx = 1; y = 2")),
    ("one_statement_per_line", "a body beside its header", lambda nb: append(last_code(nb), "\nif x: y = 2")),
    ("one_statement_per_line", "a loop in one line", lambda nb: append(last_code(nb), "\nfor x in y: z = 2")),
    ("one_statement_per_line", "within a function", lambda nb: append(last_code(nb), "\ndef f():\n    x = 1; return x")),
    ("exercises", "one only", lambda nb: exercise(nb).metadata.update(tags=[])),
    ("exercises", "no check", lambda nb: replace(exercise(nb), "exercise(", "print(")),
    ("exercises", "no stub", lambda nb: replace(exercise(nb), "def ", "f = ")),
    ("exercises", "already solved", lambda nb: exercise(nb).outputs[0].update(text="1: solved")),
    ("results_record", "none", lambda nb: nb.metadata.cookbook.update(results=[])),
    ("results_record", "no values", lambda nb: nb.metadata.cookbook.results[0].update(values=[])),
    ("results_record", "no unit", lambda nb: nb.metadata.cookbook.results[0].pop("unit")),
    ("results_record", "a long headline", lambda nb: nb.metadata.cookbook.update(headline="word " * 26)),
    ("results_record", "a long line for the gallery", lambda nb: nb.metadata.cookbook.update(gallery="word " * 21)),
    ("parameters_cell", "no tag", lambda nb: cookbook.tagged(nb, "parameters")[0].metadata.pop("tags")),
    ("parameters_cell", "a computed value", lambda nb: append(cookbook.tagged(nb, "parameters")[0], "\nX = len('a')  # @param")),
    ("parameters_cell", "no @param", lambda nb: append(cookbook.tagged(nb, "parameters")[0], "\nX = 1")),
    ("canon_copies", "an edited copy", lambda nb: append(canon_cell(nb, "setup"), "\nx = 1")),
    ("canon_copies", "a missing block", lambda nb: nb.cells.remove(canon_cell(nb, "tracking"))),
    ("canon_copies", "a block twice", lambda nb: nb.cells.append(copy.deepcopy(canon_cell(nb, "setup")))),
    ("canon_copies", "not collapsed", lambda nb: canon_cell(nb, "setup").metadata.pop("cellView")),
    ("one_imports_cell", "a second imports cell", lambda nb: append(last_code(nb), "\nimport json")),
    ("one_imports_cell", "the repository", lambda nb: append(cell_of(nb, "from dataclasses"), "\nfrom tools import cookbook")),
    ("executed_in_order", "a cell run twice", lambda nb: last_code(nb).update(execution_count=99)),
    ("clean_outputs", "an error", lambda nb: last_code(nb).outputs.append(nbformat.v4.new_output("error", ename="E", evalue=""))),
    ("clean_outputs", "a warning", lambda nb: last_code(nb).outputs.append(output("UserWarning: x", "stderr"))),
    ("clean_outputs", "a long output", lambda nb: last_code(nb).outputs.append(output("x\n" * 80))),
    ("no_plumbing_in_outputs", "a progress bar", lambda nb: last_code(nb).outputs.append(output("seed 0: 100%|███| 200/200"))),
    ("no_plumbing_in_outputs", "ClearML", lambda nb: last_code(nb).outputs.append(output("ClearML Task: Offline session stored in x"))),
    ("clean_metadata", "widgets", lambda nb: nb.metadata.update(widgets={})),
    ("clean_metadata", "papermill's notes", lambda nb: nb.cells[0].metadata.update(papermill={})),
    ("no_secrets_or_paths", "a home folder", lambda nb: last_code(nb).outputs.append(output("saved to /home/ann/x.pt"))),
    ("no_secrets_or_paths", "a key", lambda nb: append(last_code(nb), "\nsecret_key = 'abcdefghijklmnop1234'")),
    ("size", "too large", lambda nb: last_code(nb).outputs.append(output("x" * 1_000_001))),
    ("size", "long cells", lambda nb: [append(c, "\nx = 1" * 16) for c in cookbook.code_cells(nb)]),
    ("not_stale", "changed code", lambda nb: append(last_code(nb), "\nx = 1")),
    ("rendered_facts", "smoke outputs", lambda nb: nb.metadata.cookbook.update(preset="smoke")),
    ("rendered_facts", "no device", lambda nb: nb.metadata.cookbook.update(device="")),
    ("rendered_facts", "the title edited", lambda nb: nb.cells[0].update(source=cookbook.HEADLINE.sub("x", nb.cells[0].source))),
    ("figures", "too few", lambda nb: drop_outputs(cookbook.code_cells(nb))),
    ("figures", "a transparent one", transparent_picture),
    ("figures_to_read", "no alternative text", lambda nb: describe(nb, alt="")),
    ("figures_to_read", "small print", lambda nb: describe(nb, smallest_text=7.0)),
    ("figures_to_read", "the picture from another run", lambda nb: drop_outputs(cookbook.tagged(nb, "picture"))),
    ("figures_to_read", "small print in the picture", lambda nb: figures_of(nb)[1].metadata["image/png"].update(smallest_text=12.0)),
    ("figures_to_read", "a picture that is not 4:3", swap_pictures),
    ("check_cells", "no tags", lambda nb: [c.metadata.pop("tags") for c in cookbook.tagged(nb, "check")]),
    ("check_cells", "a check that asserts nothing", lambda nb: cookbook.tagged(nb, "check")[0].update(source="print('fine')")),
    ("documented", "no docstring", lambda nb: append(last_code(nb), "\ndef f(x):\n    return x")),
    ("documented", "a long function", lambda nb: append(last_code(nb), '\ndef f(x):\n    """Doc."""' + "\n    x += 1" * 60)),
    ("config_says_why", "mutable", lambda nb: replace(cell_of(nb, "from dataclasses"), "(frozen=True)", "")),
    ("config_says_why", "no reason", lambda nb: replace(cell_of(nb, "from dataclasses"), "  # plain descent; question 1 varies it", "")),
    ("config_is_small", "many fields", lambda nb: append(cell_of(nb, "from dataclasses"), "\nclass Config:" + "\n    x: int = 1" * 16)),
    ("self_contained_definitions", "a variable", lambda nb: append(last_code(nb), '\ndef f():\n    """Doc."""\n    return settings.seeds')),
    (
        "self_contained_definitions",
        "a variable with the name of a comprehension's",
        lambda nb: append(last_code(nb), '\ndef f(runs):\n    """Doc."""\n    return [run for run in runs], run'),
    ),
    ("definitions_kept", "a function overwritten", lambda nb: append(last_code(nb), "\nshow = 3")),
    ("definitions_kept", "a function as loop variable", lambda nb: append(last_code(nb), "\nfor show in ():\n    pass")),
    ("sound_code", "a blanket filter", lambda nb: append(last_code(nb), "\nwarnings.filterwarnings('ignore')")),
    ("sound_code", "a swallowed error", lambda nb: append(last_code(nb), "\ntry:\n    f()\nexcept Exception:\n    pass")),
    ("sound_code", "unsafe loading", lambda nb: append(last_code(nb), "\ntorch.load(path)")),
    ("sound_code", "dead code", lambda nb: append(last_code(nb), "\n# print(x)")),
    ("nothing_left_to_write", "an answer", lambda nb: append(nb.cells[1], "\n*(answer)*")),
    ("nothing_left_to_write", "a note", lambda nb: append(nb.cells[1], "\nTODO: numbers")),
    ("nothing_left_to_write", "a cell of a table", lambda nb: append(nb.cells[1], "\n| mean | RESULT |")),
    ("github_markdown", "a backslash lost", lambda nb: append(nb.cells[1], "\n$x^\top$")),
    ("github_markdown", "a bare align", lambda nb: append(nb.cells[1], "\n\\begin{align}x\\end{align}")),
    ("github_markdown", "a local picture", lambda nb: append(nb.cells[1], "\n![x](img/x.png)")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "break_it"), BROKEN, ids=[f"{name}: {wrong}" for name, wrong, _ in BROKEN])
def test_rule_notices(name, wrong, break_it):
    notebook = copy.deepcopy(cookbook.read(cookbook.MINIATURE))
    break_it(notebook)
    assert list(RULES[name](notebook, cookbook.MINIATURE)) != []


def test_every_rule_is_seen_to_fail():
    assert {name for name, _, _ in BROKEN} == set(RULES)


def test_signs_are_no_words_of_the_gallery():
    notebook = copy.deepcopy(cookbook.read(cookbook.MINIATURE))
    notebook.metadata.cookbook.update(gallery="62.6 ± " * 20)
    assert list(RULES["results_record"](notebook, cookbook.MINIATURE)) == []


def test_what_is_no_second_statement():
    """Decorators, elif, multi-line calls, a lambda: nothing to complain about."""
    notebook = copy.deepcopy(cookbook.read(cookbook.MINIATURE))
    code = "@decorate\ndef f(x):\n    if x:\n        y = 1\n    elif z:\n        y = 2\n    else:\n        y = call(\n            1\n        )\n"
    code += "    return lambda: y"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    assert list(RULES["one_statement_per_line"](notebook, cookbook.MINIATURE)) == []
