"""Lifting definitions out of notebooks: what is lifted, what a definition reads, and that errors show its lines."""

import ast
import inspect
import sys
import textwrap
import traceback

import nbformat
import pytest

from tools import cookbook, lift


@pytest.fixture
def notebook():
    """Function that makes a notebook of code cells; one of prose stands before them."""

    def make(*sources):
        cells = [nbformat.v4.new_code_cell(textwrap.dedent(source).strip("\n")) for source in sources]
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("PROSE = 3"), *cells])

    return make


@pytest.fixture
def lifted(notebook, tmp_path):
    """Function that makes a notebook of code cells, writes it as 99_small.ipynb and lifts it."""

    def make(*sources):
        path = tmp_path / "99_small.ipynb"
        nbformat.write(notebook(*sources), path)
        return lift.lift(path)

    return make


# --- the names that a definition reads

READS = {
    "def f(x): return x + shift": "shift",
    "def f(x): return f(x - 1)": "",
    "def f(x): return len(x), display(x), get_ipython()": "",
    # comprehensions bind their own variables and no others
    "def f(runs): return [config for config in runs], config.seeds": "config",
    "def f(runs): return config.seeds, {config for config in runs}": "config",
    "def f(runs): return {config: seed for config, seed in runs}, seed": "seed",
    "def f(runs): return sum(config.seed for config in runs) + seed": "seed",
    "def f(): return [config for config in config]": "config",
    "def f(): return [row for row in rows if row > least]": "rows least",
    "def f(): return [[cell for cell in row] for row in rows]": "rows",
    "def f(rows): return [lambda: (row, column) for row in rows]": "column",
    "NAMES = [name for name in names]": "names",
    "NAMES = [name for name in names] + [name]": "names name",
    "NAMES = {name: size for name in names}": "names size",
    # arguments, decorators, defaults, annotations
    "@cached(size=limit)\ndef f(): pass": "cached limit",
    "def f(a, /, b, *c, d, **e): return a, b, c, d, e": "",
    "def f(a=first, *, b=second): return a, b": "first second",
    "def f(a=a): return a": "a",
    "def f(a: Kind, *b: Other) -> Result: return a": "Kind Other Result",
    "async def f(x): return [await y async for y in x(z)]": "z",
    "F = lambda x, y=default: x + y + z": "default z",
    "F = lambda n: F(n - 1)": "",
    # nested functions and classes
    "def f(x):\n    def g(y): return x + y + z\n    return g": "z",
    "def f():\n    x = 1\n    class A:\n        y = x\n        z = w\n    return A": "w",
    "def f():\n    x = 1\n    class A:\n        x = x\n    return A": "x",
    "def f():\n    def g():\n        nonlocal x\n        x += 1\n    x = 0\n    return g": "",
    # bodies of classes look names up when they get there
    "class A(Base, metaclass=Meta): pass": "Base Meta",
    "class A(A): pass": "A",
    "@dataclass\nclass A:\n    steps: int = steps_of(3)\n    half: int = steps // 2": "dataclass steps_of",
    "class A:\n    config = config": "config",
    "class A:\n    a = 1\n    b = a\n    def f(self): return a": "a",
    "class A:\n    a = 1\n    b = [a for _ in range(2)]": "a",
    "class A:\n    a = 1\n    b = {a for _ in range(2)}": "a",
    "class A:\n    a = 1\n    b = {i: a for i in range(2)}": "a",
    "class A:\n    a = 1\n    class B:\n        a = a": "a",
    "class A:\n    a = 1\n    del a\n    b = a": "a",
    "class A:\n    for i in range(3):\n        j = i": "",
    "class A:\n    name: __qualname__ = __module__\n    def f(self): return __class__, super().f()": "",
    "class A:\n    b = None\n    def f(self, other: 'A' = b) -> A: return A()": "A",
    # binding by other statements
    "def f(x):\n    if (n := len(x)) > 3: return n\n    return m": "m",
    "def f(x): return [last := y for y in x], last": "",
    "LAST = [last := y for y in (1, 2)]": "",
    "A = (b := 3) + b": "",
    "def f():\n    try: go()\n    except Wrong as error: return error\n    return problem": "go Wrong problem",
    "def f():\n    with here() as x, there as y: return x, y": "here there",
    "def f():\n    for x, (y, *z) in pairs: pass\n    return x, y, z": "pairs",
    "def f():\n    import os.path\n    from math import pi as p\n    return os, p, pi": "pi",
    "def f(x):\n    match x:\n        case [a, *b]: return a, b\n        case Point(x=0): return y": "Point y",
    "def f():\n    x = 1\n    del x\n    return x": "",
    "def f():\n    print(x)\n    x = 1": "",
    "def f():\n    global count\n    count += 1": "count",
    "def f():\n    global count\n    del count": "count",
    "def f():\n    global count\n    def g(): return count\n    return g": "count",
    "def f():\n    def g():\n        global count\n        count = 1\n    count = 2": "count",
    # constants
    "LIMIT: Kind = least": "Kind least",
    "A, (B, *C) = D": "D",
    "A = A + 1": "A",
    "A |= {b: 1}": "A b",
    "del A": "A",
    # f-strings
    "def f(x): return f'{x:{width}} {y!r}' + f'{[y for y in x]}'": "width y",
    "def f(x): return f\"{'\u2009'.join(x)}{y}\"": "y",  # a thin space
}


@pytest.mark.parametrize(("source", "names"), READS.items())
def test_names_that_a_definition_reads(source, names):
    assert lift.globals_of(source) == set(names.split())
    (node,) = ast.parse(source).body
    before = ast.dump(node, include_attributes=True)
    assert lift.globals_of(node) == set(names.split())
    assert ast.dump(node, include_attributes=True) == before  # the tree is as it was


def test_names_that_an_expression_and_a_cell_read():
    assert lift.globals_of(ast.parse("[x for x in y] + z", mode="eval").body) == {"y", "z"}
    assert lift.globals_of("import numpy as np\na = b\ndef f(): return a, np, c\nclass A: d = a\n") == {"b", "c"}
    assert lift.globals_of("# nothing") == set()


# --- foreign names


def test_foreign_names(notebook):
    """Each definition that reads a variable of a cell is named, with the variable."""
    small = notebook(
        "import os.path, numpy as np\nfrom math import pi as PI, tau",
        """
        def good(x):
            display(x)
            return os.path.join(np.pi, PI, tau, HEIGHT, LIMIT, Later, twice(x))

        def bad(runs):
            return [config for config in runs], config.seeds, best, NOTHING
        """,
        "WIDTH, HEIGHT = 3, 4\nLIMIT: int = HEIGHT\nNOTHING: int\nTABLE = {}\nTABLE |= {'a': rows}",
        "best = good(3)\nSTEPS = len(best)\nasync def twice(x): return x\nclass Later: size = STEPS; names = [best]",
    )
    assert lift.foreign_names(small) == {
        "bad": ["NOTHING", "best", "config"], "TABLE": ["rows"], "STEPS": ["best"], "Later": ["best"],
    }  # fmt: skip


def test_a_local_variable_of_the_same_name_hides_nothing(notebook):
    small = notebook("pi = 3", "def area(r):\n    pi = 3\n    return pi * r", "def length(r): return 2 * pi * r")
    assert lift.foreign_names(small) == {"length": ["pi"]}


def test_several_definitions_of_one_name(notebook):
    functions = ("def f(): return a, c", "def f(): return b, a", "def f(): return 1")
    small = notebook(*functions, "TABLE = {}", "TABLE |= x", "TABLE |= y")
    assert lift.foreign_names(small) == {"f": ["a", "b", "c"], "TABLE": ["x", "y"]}


@pytest.mark.parametrize("path", [*cookbook.find(), *cookbook.miniatures()], ids=lambda path: path.stem)
def test_notebooks_have_no_foreign_names(path):
    notebook = cookbook.read(path)
    assert lift.foreign_names(notebook) == {}
    assert len(list(lift.definitions(notebook))) > 20


# --- what is lifted


def test_definitions_are_lifted_and_nothing_else(lifted):
    module = lifted(
        "import math\nfrom os import path as place",
        "x = 3\nprint('lifted a call')\nassert False",
        "def area(r):\n    return PI * r * r\n\nasync def later(): return 1",
        "class Circle:\n    radius = 2\nfor i in range(3):\n    INNER = i",
        "PI = 3\nWIDTH, (HEIGHT, *REST) = 4, (5, 6, 7)\nLIMIT: int = WIDTH + 1\nNOTHING: int",
        "TABLE = {'a': 1}\nTABLE |= {'b': PI}",
        "mixed, UPPER = 1, 2\nTABLE['c'] = 3\nmath.E = 3\nFIRST = SECOND = [UPPER_OF for UPPER_OF in (1, 2)]",
    )
    assert (module.area(2), module.Circle.radius, module.place.sep) == (12, 2, "/")
    assert module.math.pi == pytest.approx(3.14159, abs=1e-5)
    assert inspect.iscoroutinefunction(module.later)
    assert (module.PI, module.WIDTH, module.HEIGHT, module.REST, module.LIMIT) == (3, 4, 5, [6, 7], 5)
    assert module.TABLE == {"a": 1, "b": 3}
    assert module.FIRST is module.SECOND == [1, 2]
    assert not {"x", "i", "INNER", "mixed", "UPPER", "NOTHING", "PROSE"} & vars(module).keys()
    assert module.__skipped__ == {}


def test_dataclasses_and_names_of_ipython_work(lifted):
    imports = "from dataclasses import dataclass"
    module = lifted(imports, "@dataclass\nclass Run:\n    steps: 'int' = 3\ndef show(x): return display(x)")
    assert module.Run(4).steps == 4
    assert sys.modules[module.Run.__module__] is module
    assert module.show("shown") is None
    assert module.get_ipython() is None


def test_a_constant_that_needs_a_result_says_so(lifted):
    module = lifted("STEPS = len(model) + data", "HALF = STEPS // 2", "OTHER = HALF + 1 + best\nSEEDS = 5")
    assert module.SEEDS == 5
    both = ["data", "model"]
    assert module.__skipped__ == {"STEPS": both, "HALF": both, "OTHER": ["best", *both]}
    for name in ("STEPS", "HALF"):
        with pytest.raises(AttributeError) as caught:
            getattr(module, name)
        assert str(caught.value) == f"{name} was not lifted: it needs 'data' and 'model', which no definition gives"
    with pytest.raises(AttributeError, match=r"^module 'lifted_99_small' has no attribute 'model'$"):
        _ = module.model
    assert not hasattr(module, "STEPS")


def test_the_last_value_of_a_constant_counts(lifted):
    """One that a later cell makes of a result has no value; one that a later cell gives outright has."""
    first, second = "TABLE = {}\nSTEPS = len(model)\nSIZE, SHAPE = 3, 4", "TABLE |= rows\nSTEPS = 7\nSIZE = model.size"
    module = lifted(first, second, "TABLE |= {'a': 1}")
    assert module.STEPS == 7
    assert module.SHAPE == 4
    assert module.__skipped__ == {"TABLE": ["rows"], "SIZE": ["model"]}
    with pytest.raises(AttributeError, match="TABLE was not lifted: it needs 'rows', which"):
        _ = module.TABLE


@pytest.mark.parametrize(
    ("source", "error", "name"),
    [
        ("RATE = 1 / 0", ZeroDivisionError, "RATE"),
        ("A, B = (1, 2, 3)", ValueError, "A, B"),
        ("def f(x=undefined): pass", NameError, "f"),
        ("import no_such_module", ModuleNotFoundError, "no_such_module"),
    ],
)
def test_an_error_names_its_cell(lifted, source, error, name):
    with pytest.raises(error) as caught:
        lifted("import os", f"x = 1\n\n{source}")
    assert caught.value.__notes__ == [f"while {name} was lifted from <99_small.ipynb cell 2>"]
    text = "".join(traceback.format_exception(caught.value))
    assert f'File "<99_small.ipynb cell 2>", line 3, in <module>\n    {source}\n' in text


def test_a_syntax_error_names_its_cell(lifted):
    with pytest.raises(SyntaxError) as caught:
        lifted("x = 1", "y = 2\nz = = 3")
    assert (caught.value.filename, caught.value.lineno) == ("<99_small.ipynb cell 2>", 2)


# --- magics


def test_magics_are_blanked_and_lines_stay(lifted):
    module = lifted(
        "%matplotlib inline\n!pip install \\\n    torch\n%config A.b = ['png']\n\ndef f(): return 1",
        "%%time\nTIMED = 1",
        "%%bash\nexport BASH=1\nif then fi",
        "if True:\n    %cd ..\n    !ls\nNEXT = 1",
    )
    assert module.f.__code__.co_firstlineno == 6
    assert module.TIMED == module.NEXT == 1
    assert not hasattr(module, "BASH")


def test_percent_signs_of_python_stay():
    """As the modulo at the start of a line, or in a string."""
    source = "A = (\n    7\n    % 4\n)\nB = '''\n%d\n!x\n'''\nC = 7 \\\n% 4\nD = 1 != 2\n%time D"
    python = lift.python_of(source)
    assert python == source.removesuffix("%time D")
    assert python.count("\n") == source.count("\n")
    names = {}
    exec(python, names)
    assert (names["A"], names["B"], names["C"]) == (3, "\n%d\n!x\n", 3)


# --- canon


@pytest.mark.parametrize("first", ["# canon: small", "# @title A small block\n# canon: small"])
def test_canon_cells_are_lifted(lifted, first):
    assert lifted(f"{first}\nimport os\ndef f(): return 3\nf()").f() == 3


def test_a_block_of_source(capsys):
    source = "%matplotlib inline\nimport os\nSIZE = GIVEN + 1\nSTEPS = size\ndef f(): return other()\nprint(3)"
    module = lift.lift_source(source, "a block", GIVEN=2, other=lambda: 4)
    assert (module.SIZE, module.f(), module.__skipped__) == (3, 4, {"STEPS": ["size"]})
    assert capsys.readouterr().out == ""
    assert inspect.getsource(module.f) == "def f(): return other()\n"
    assert module.f.__code__.co_filename == "<a block>"


def test_a_canon_block():
    measure = lift.block("measure")
    assert set(measure.seconds_in_turns({"a": lambda: None}, 1, "cpu")) == {"a"}
    assert inspect.getsource(measure.peak_memory).startswith("def peak_memory(case, device):\n")
    setup = lift.block("setup", PRESET="gpu")
    assert setup.COLORS["blue"] == "#0072B2"
    with pytest.raises(KeyError):
        lift.block("no such block")


# --- lines of the cell in tracebacks, and inspect

CELLS = (
    '''
    %matplotlib inline
    from dataclasses import dataclass


    def divide(a, b):
        """The quotient."""
        return (
            a / b
        )
    ''',
    '''
    SIZE = 3


    @dataclass
    class Run:
        """A run."""

        steps: int = 4

        class Part:
            """A part of it."""

            size = 1

        def half(self):
            return divide(self.steps, 0)


    class Other(Run):
        run = Run
    KINDS = [Run]
    KIND = Run


    def last(): return [divide(1, x) for x in (1, 0)]
    ''',
)


def text_of(cell, first, last):
    """Lines of a cell, counted from 1."""
    return "".join(f"{line}\n" for line in textwrap.dedent(cell).strip("\n").split("\n")[first - 1 : last])


def test_tracebacks_show_the_lines_of_the_cell(lifted):
    module = lifted(*CELLS)
    with pytest.raises(ZeroDivisionError) as caught:
        module.Run().half()
    text = "".join(traceback.format_exception(caught.value))
    assert 'File "<99_small.ipynb cell 2>", line 16, in half\n    return divide(self.steps, 0)\n' in text
    assert 'File "<99_small.ipynb cell 1>", line 8, in divide\n    a / b\n' in text


def test_inspect_finds_the_source(lifted):
    module = lifted(*CELLS)
    assert inspect.getsource(module.divide) == text_of(CELLS[0], 5, 9)
    assert inspect.getsource(module.last) == "def last(): return [divide(1, x) for x in (1, 0)]\n"
    assert inspect.getsource(module.Run.half) == text_of(CELLS[1], 15, 16)
    assert inspect.getsource(module.Run) == text_of(CELLS[1], 4, 16)
    assert inspect.getsource(module.Run.Part) == text_of(CELLS[1], 10, 13)
    assert inspect.getsource(module.Other) == text_of(CELLS[1], 19, 20)


def test_two_notebooks_keep_their_lines_apart(notebook, tmp_path):
    modules = []
    for number in ("97", "98"):
        path = tmp_path / f"{number}_small.ipynb"
        nbformat.write(notebook(f"def f(): return {number}", f"class A: x = {number}"), path)
        modules.append(lift.lift(path))
    assert [inspect.getsource(module.f) for module in modules] == ["def f(): return 97\n", "def f(): return 98\n"]
    assert [inspect.getsource(module.A) for module in modules] == ["class A: x = 97\n", "class A: x = 98\n"]
    assert [module.f() for module in modules] == [97, 98]
