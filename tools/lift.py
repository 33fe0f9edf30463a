"""Takes the definitions out of a notebook, so that they can be tested and measured without running it.

Lifted are, from the top level of code cells and in their order:

- imports, functions and classes,
- constants, that is UPPER_CASE names: `NAME = value`, `NAME: type = value`, `FIRST, SECOND = values`, `NAME |= value`.

All else is left out: other variables, calls, loops, IPython's magics and shell lines. Canon cells are cells like
others. A constant that reads a name which was not lifted (the result of a training, say) is left out too; who asks the
module for it is told which name it needs.

Tracebacks and `inspect.getsource` show the lines of the cell: each cell has a file name of its own, such as
`<06_padim.ipynb cell 12>`, where the cells of prose count and the first cell is 0.
"""

import ast
import builtins
import copy
import dis
import functools
import inspect
import io
import linecache
import re
import symtable
import sys
import textwrap
import tokenize
import types
from pathlib import Path

from IPython import get_ipython
from IPython.display import display

from tools import cookbook, sync_canon

IPYTHON = {"display": display, "get_ipython": get_ipython}  # what IPython adds to the builtins
IN_CLASSES = {"__module__", "__qualname__", "__annotations__"}  # what Python defines in the body of a class
EVERYWHERE = {*dir(builtins), *IPYTHON, *IN_CLASSES}
PYTHON_CELLS = re.compile(r"\s*%%(capture|prun|time|timeit)\b")  # cell magics that run the rest of the cell as Python


# --- source


def python_of(source):
    """The source of a cell with IPython's magics and shell lines blanked; the numbers of lines stay."""
    lines = source.split("\n")
    if source.lstrip().startswith("%%") and not PYTHON_CELLS.match(source):
        return "\n" * (len(lines) - 1)
    kept, statement, shell = [], "", False
    for line in lines:
        if shell:
            kept.append("")
            shell = line.endswith("\\")
        elif not statement and line.lstrip().startswith(("%", "!")):
            indentation = re.match(r"\s*", line)[0]
            kept.append(f"{indentation}pass" if indentation else "")
            shell = line.endswith("\\")
        else:
            kept.append(line)
            statement += f"{line}\n"
            statement = statement if _goes_on(statement) else ""
    return "\n".join(kept)


def _goes_on(text):
    """Whether a statement is not over: a bracket or a string is open, or the line ends with a backslash."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(text).readline):
            pass
    except tokenize.TokenError:
        return True
    return False


# --- names


class _Alike(ast.NodeTransformer):
    """Writes the same scopes so that every version of Python sees them.

    From 3.12 on `symtable` merges the scope of a comprehension into the one around it, but not that of a generator
    expression. `ast.unparse` of 3.11 cannot write an f-string around a string with a thin space in it.
    """

    def visit_ListComp(self, node):
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node):
        self.generic_visit(node)
        return ast.GeneratorExp(ast.Tuple([node.key, node.value], ast.Load()), node.generators)

    def visit_JoinedStr(self, node):
        self.generic_visit(node)
        return ast.Tuple(node.values, ast.Load())

    def visit_FormattedValue(self, node):
        self.generic_visit(node)
        return ast.Tuple([node.value, *filter(None, [node.format_spec])], ast.Load())


def globals_of(definition):
    """The set of names that a definition reads and does not bind itself, builtins and names of IPython left out.

    definition: source text or a node of a syntax tree. Names that it declares `global` count, read or only written.
    """
    tree = ast.parse(definition) if isinstance(definition, str) else definition
    if not isinstance(tree, ast.Module):
        tree = ast.Module([ast.Expr(tree) if isinstance(tree, ast.expr) else tree], [])
    alike = ast.unparse(_Alike().visit(copy.deepcopy(tree)))
    # in a function what the definition binds is local, and what is global comes from elsewhere
    around = symtable.symtable(f"def around():\n{textwrap.indent(alike, ' ')}\n pass", "<definition>", "exec")
    code = compile(ast.fix_missing_locations(tree), "<definition>", "exec")
    return (set(_global_within(around)) | _read_before_bound(code, set())) - EVERYWHERE


def _global_within(table):
    """Names that scopes inside this one take for global."""
    for inner in table.get_children():
        yield from (symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global())
        yield from _global_within(inner)


def _read_before_bound(code, bound):
    """Names that a cell or the body of a class looks up while they are not bound, where `bound` already are.

    Python looks these up by name when it gets there: `class Run: steps = steps` reads the global `steps`. So the order
    counts, of which a symbol table knows nothing.
    """
    by_name = not code.co_flags & inspect.CO_OPTIMIZED
    own, read = set(bound), set()
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if isinstance(name, types.CodeType):
            read |= _read_before_bound(name, own if code.co_name == "<module>" else bound)
        elif by_name and instruction.opname == "STORE_NAME":
            own.add(name)
        elif by_name and instruction.opname in ("LOAD_NAME", "DELETE_NAME") and name not in own:
            read.add(name)
        elif by_name and instruction.opname == "DELETE_NAME":
            own.discard(name)
    return read


# --- definitions


def _targets(node):
    """What a statement assigns to, tuples and lists taken apart; nothing for an annotation without a value."""
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in _parts(target)]
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.AnnAssign) and node.value):
        return [node.target]
    return []


def _parts(target):
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in _parts(element)]
    return _parts(target.value) if isinstance(target, ast.Starred) else [target]


def is_constant(node):
    """Whether a statement assigns or updates constants, and nothing else."""
    targets = _targets(node)
    return bool(targets) and all(isinstance(target, ast.Name) and target.id.isupper() for target in targets)


def is_definition(node):
    """Whether a statement is lifted."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return isinstance(node, kinds) or is_constant(node)


def bound_by(node):
    """Names that a definition binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    return [target.id for target in _targets(node)] or [node.name]


def definitions(notebook):
    """The statements of a notebook that are lifted, as nodes of syntax trees, in order."""
    for cell in cookbook.code_cells(notebook):
        yield from filter(is_definition, ast.parse(python_of(cell.source)).body)


def foreign_names(notebook):
    """{name of a definition: sorted names that it reads and that no definition of the notebook gives}.

    Definitions that use other definitions only are not in it. Builtins and `display` and `get_ipython` are not foreign.
    """
    nodes = list(definitions(notebook))
    known = {name for node in nodes for name in bound_by(node)}
    foreign = {}
    for node in nodes:
        lacking = globals_of(node) - known
        if lacking:
            name = ", ".join(bound_by(node))
            foreign[name] = sorted(lacking.union(foreign.get(name, ())))
    return foreign


# --- lifting


def lift(path):
    """Module with the definitions of the notebook at `path`.

    `module.__skipped__` is {name of a constant that was left out: sorted names that it needs}. A definition that cannot
    be executed raises its error, with a note that names the cell.
    """
    path = Path(path)
    cells = enumerate(cookbook.read(path).cells)
    sources = {f"<{path.name} cell {number}>": cell.source for number, cell in cells if cell.cell_type == "code"}
    return _module(path.stem, f"<{path.name}>", sources, {})


def lift_source(source, name, **names):
    """Module with the definitions of one block of source, lifted like those of a cell; it can use `names`."""
    return _module(name, f"<{name}>", {f"<{name}>": source}, names)


def block(name, **names):
    """Module with the definitions of the canon block tools/canon/`name`.py.

    names: what the block takes from cells above it. KeyError where there is no such block.
    """
    return lift_source(sync_canon.blocks()[name], f"canon {name}", **names)


def _module(name, file, sources, names):
    """Module of the definitions in `sources`, {file name of a cell: source}, with `names` to begin with."""
    module = types.ModuleType(f"lifted_{name.replace(' ', '_')}")
    module.__file__ = file
    module.__skipped__ = {}
    module.__getattr__ = functools.partial(_explain, module)
    vars(module).update({**IPYTHON, **names})
    sys.modules[module.__name__] = module  # dataclasses look their module up
    above = ""
    for cell, source in sources.items():
        python = f"{python_of(source)}\n"
        _remember(cell, python)
        for node in filter(is_definition, ast.parse(python, cell).body):
            _add(node, module, cell)
            if isinstance(node, ast.ClassDef):
                _number_lines(vars(module)[node.name], above.count("\n"))
        above += python
    _remember(file, above)
    return module


def _explain(module, name):
    """What the module answers when asked for a name that it has not."""
    if name in module.__skipped__:
        needs = " and ".join(map(repr, module.__skipped__[name]))
        raise AttributeError(f"{name} was not lifted: it needs {needs}, which no definition gives")
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def _add(node, module, cell):
    """Execute a definition in the module, or note that a constant is left out."""
    names, skipped = vars(module), module.__skipped__
    lacking = globals_of(node) - names.keys() if is_constant(node) else set()
    if lacking:
        needs = sorted({need for name in lacking for need in skipped.get(name, [name])})
        for name in bound_by(node):
            names.pop(name, None)  # what an earlier cell gave is no longer its value
            skipped[name] = needs
        return
    try:
        exec(compile(ast.Module([node], []), cell, "exec"), names)
    except Exception as error:
        error.add_note(f"while {', '.join(bound_by(node))} was lifted from {cell}")
        raise
    for name in bound_by(node):
        skipped.pop(name, None)


def _remember(file, source):
    """Let tracebacks and `inspect` find the lines of a file that does not exist."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)


def _number_lines(kind, above):
    """Add the `above` lines before the cell to where Python 3.13 seeks a class: in the file of the whole module."""
    if "__firstlineno__" in vars(kind):
        kind.__firstlineno__ += above
    for member in list(vars(kind).values()):
        if isinstance(member, type) and member.__qualname__.startswith(f"{kind.__qualname__}."):
            _number_lines(member, above)
