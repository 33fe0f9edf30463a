"""Takes a notebook's definitions out of it by its syntax tree, so that they can be tested without running it.

Lifted are imports, functions, classes and UPPER_CASE constants at the top level of its cells, in their order. A constant is left out
where it needs something that was not lifted (the result of a training, say).
"""

import ast
import builtins
import sys
import types

from tools import cookbook


def python_of(source):
    """The source of a cell without IPython's magics and shell lines."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n"))


def is_constant(node):
    return isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets)


def is_constant_update(node):
    """NAME |= ... of a constant."""
    return isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id.isupper()


def names_read(node):
    """Names that an expression reads, those bound inside it (comprehensions, lambdas) left out."""
    loads = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    stores = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return loads - stores - set(dir(builtins))


def definitions(notebook):
    """Statements to lift, in the order of the notebook."""
    for cell in cookbook.code_cells(notebook):
        for node in ast.parse(python_of(cell.source)).body:
            if (
                isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                or is_constant(node)
                or is_constant_update(node)
            ):
                yield node


def lift(path):
    """Module with the definitions of the notebook at `path`."""
    module = types.ModuleType(f"lifted_{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for node in definitions(cookbook.read(path)):
        if (is_constant(node) or is_constant_update(node)) and not names_read(node.value) <= vars(module).keys():
            continue
        exec(compile(ast.Module([node], []), f"<{path.name}>", "exec"), vars(module))
    return module
