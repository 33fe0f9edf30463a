"""Every notebook keeps every rule, and every rule notices a notebook that is broken on purpose."""

import copy
import re

import nbformat
import pytest

from tests.rules import RULES
from tools import cookbook, readme, sync_canon

PATHS = cookbook.find()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RULES)
def test_rule(name, path):
    assert list(RULES[name](cookbook.read(path), path)) == []


def cell_of(notebook, start):
    return next(cell for cell in notebook.cells if cell.source.startswith(start))


def output(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def append(cell, text):
    cell.source += text


def transparent_picture(notebook):
    """A 1 x 1 transparent PNG in place of the first figure."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    next(o for c in cookbook.code_cells(notebook) for o in c.outputs if "image/png" in o.get("data", {})).data["image/png"] = png


def drop_outputs(cells):
    for cell in cells:
        cell.outputs = []


def move_results_up(notebook):
    section = next(cell for cell in notebook.cells if cell.source.startswith("## Results"))
    notebook.cells.remove(section)
    notebook.cells.insert(1, section)


first_code = lambda notebook: cookbook.code_cells(notebook)[0]
last_code = lambda notebook: cookbook.code_cells(notebook)[-1]

# (rule, what is wrong, how to break a good notebook)
BROKEN = [
    ("valid_format", "duplicate id", lambda nb: nb.cells[1].update(id=nb.cells[0].id)),
    ("valid_format", "cell without source", lambda nb: nb.cells[1].pop("source")),
    ("title_cell", "another number", lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("# 0", "# 9"))),
    ("title_cell", "a badge that leads elsewhere", lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("/blob/", "/blob/x"))),
    ("anatomy", "no exercises", lambda nb: [c.update(source=c.source.replace("## Exercises", "Exercises")) for c in nb.cells]),
    ("anatomy", "results before the data", move_results_up),
    ("parameters_cell", "no tag", lambda nb: cookbook.tagged(nb, "parameters")[0].metadata.pop("tags")),
    ("parameters_cell", "a computed value", lambda nb: append(cookbook.tagged(nb, "parameters")[0], "\nX = len('a')  # @param")),
    ("parameters_cell", "no @param", lambda nb: append(cookbook.tagged(nb, "parameters")[0], "\nX = 1")),
    ("canon_copies", "an edited copy", lambda nb: append(cell_of(nb, "# canon: runtime"), "\nx = 1")),
    ("canon_copies", "a missing block", lambda nb: nb.cells.remove(cell_of(nb, "# canon: style"))),
    ("one_imports_cell", "a second imports cell", lambda nb: append(last_code(nb), "\nimport json")),
    ("one_imports_cell", "the repository", lambda nb: append(cell_of(nb, "import "), "\nfrom tools import cookbook")),
    ("executed_in_order", "a cell run twice", lambda nb: last_code(nb).update(execution_count=99)),
    ("clean_outputs", "an error", lambda nb: last_code(nb).outputs.append(nbformat.v4.new_output("error", ename="E", evalue=""))),
    ("clean_outputs", "a warning", lambda nb: last_code(nb).outputs.append(output("UserWarning: x", "stderr"))),
    ("clean_outputs", "a long output", lambda nb: last_code(nb).outputs.append(output("x\n" * 80))),
    ("clean_metadata", "widgets", lambda nb: nb.metadata.update(widgets={})),
    ("clean_metadata", "papermill's notes", lambda nb: nb.cells[0].metadata.update(papermill={})),
    ("no_secrets_or_paths", "a home folder", lambda nb: last_code(nb).outputs.append(output("saved to /home/ann/x.pt"))),
    ("no_secrets_or_paths", "a key", lambda nb: append(last_code(nb), "\nsecret_key = 'abcdefghijklmnop1234'")),
    ("size", "too large", lambda nb: last_code(nb).outputs.append(output("x" * 1_000_001))),
    ("size", "long cells", lambda nb: [append(c, "\nx = 1" * 16) for c in cookbook.code_cells(nb)]),
    ("not_stale", "changed code", lambda nb: append(last_code(nb), "\nx = 1")),
    ("rendered_facts", "smoke outputs", lambda nb: nb.metadata.cookbook.update(preset="smoke")),
    ("rendered_facts", "another headline", lambda nb: nb.metadata.cookbook.update(headline="better")),
    ("rendered_facts", "the title edited", lambda nb: nb.cells[0].update(source=cookbook.HEADLINE.sub("x", nb.cells[0].source))),
    ("figures", "too few", lambda nb: drop_outputs(cookbook.code_cells(nb))),
    ("figures", "a transparent one", transparent_picture),
    ("figures", "the picture from another run", lambda nb: drop_outputs(cookbook.tagged(nb, "picture"))),
    ("check_cells", "no tags", lambda nb: [c.metadata.pop("tags") for c in cookbook.tagged(nb, "check")]),
    ("check_cells", "a check that asserts nothing", lambda nb: cookbook.tagged(nb, "check")[0].update(source="print('fine')")),
    ("documented", "no docstring", lambda nb: append(last_code(nb), "\ndef f(x):\n    return x")),
    ("documented", "a long function", lambda nb: append(last_code(nb), '\ndef f(x):\n    """Doc."""' + "\n    x += 1" * 60)),
    ("config_says_why", "mutable", lambda nb: [c.update(source=c.source.replace("(frozen=True)", "")) for c in cookbook.code_cells(nb)]),
    ("config_says_why", "no reason", lambda nb: append(cell_of(nb, "@dataclass"), "\n    unexplained: int = 3")),
    ("self_contained_definitions", "a variable", lambda nb: append(last_code(nb), '\ndef f():\n    """Doc."""\n    return config.seeds')),
    ("sound_code", "a blanket filter", lambda nb: append(last_code(nb), "\nwarnings.filterwarnings('ignore')")),
    ("sound_code", "a swallowed error", lambda nb: append(last_code(nb), "\ntry:\n    f()\nexcept Exception:\n    pass")),
    ("sound_code", "unsafe loading", lambda nb: append(last_code(nb), "\ntorch.load(path)")),
    ("sound_code", "dead code", lambda nb: append(last_code(nb), "\n# print(x)")),
    ("github_markdown", "a backslash lost", lambda nb: append(nb.cells[1], "\n$x^\top$")),
    ("github_markdown", "a bare align", lambda nb: append(nb.cells[1], "\n\\begin{align}x\\end{align}")),
    ("github_markdown", "a local picture", lambda nb: append(nb.cells[1], "\n![x](img/x.png)")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "break_it"), BROKEN, ids=[f"{name}: {wrong}" for name, wrong, _ in BROKEN])
def test_rule_notices(name, wrong, break_it):
    notebook = copy.deepcopy(cookbook.read(PATHS[0]))
    break_it(notebook)
    assert list(RULES[name](notebook, PATHS[0])) != []


def test_every_rule_is_seen_to_fail():
    assert {name for name, _, _ in BROKEN} == set(RULES)


def test_canon_is_small():
    sources = sync_canon.blocks().values()
    assert len(sources) <= 4
    assert sum(bool(line.strip()) for source in sources for line in source.splitlines()) <= 60


def test_readme_gallery_is_current():
    assert readme.GALLERY.search(readme.README.read_text())[0] == f"<!-- gallery -->\n{readme.gallery()}\n<!-- /gallery -->"


def test_readme_links_and_commands_exist():
    text = readme.README.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (cookbook.ROOT / target).exists(), target
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", (cookbook.ROOT / "Makefile").read_text()))
    assert {command for command in re.findall(r"\bmake ([a-z]+)\b", text)} <= targets
