"""Execute notebooks into runs/, each in a folder of its own, and say what came of them: `make run` calls this.

    python -m tools.run [--nb 07] [--preset smoke|cpu|gpu] [--seed 0] [NAME=VALUE ...]

NAME=VALUE sets any other parameter of the notebooks. A notebook that fails is reported with its cell, the others still
run, and the exit status is 1. After an interruption the same command goes on where it was.
"""

import argparse
import ast
import hashlib
import re
import shutil
import sys
import textwrap
import time

from tools import cookbook
from tools.execute import execute, kernel_environment, read_json

RUNS = cookbook.ROOT / "runs"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "None"}
RESULTS_PAGE = re.compile(r"ClearML results page: (\S+)")
INTERRUPTED = 130  # what a shell makes of Ctrl-C


def defaults(path):
    """{name: value} of the notebook's parameters, as the cell tagged `parameters` sets them."""
    cells = cookbook.tagged(cookbook.read(path), "parameters")
    nodes = [node for cell in cells for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    return {target.id: ast.literal_eval(node.value) for node in nodes for target in node.targets}


def literal(text):
    """The value that a text means: a number (decimal), true or false, None, text in quotes or without."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)  # int("010") is 10
        except ValueError:
            continue
    if text == "None":
        return None
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def value_of(name, text, default, where):
    """The value of NAME=TEXT for a parameter with this default; exits where it is of another kind."""
    value = literal(text)
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        given = f"{text} is {KINDS[type(value)]}" if text else "nothing stands behind ="
        wanted = f"{name} is {KINDS[type(default)]} in {where} ({default} by default)"
        raise SystemExit(f"{name}={text}: {given}, but {wanted}")
    return value


def split_pairs(pairs, seed=None):
    """{name: text} of NAME=VALUE pairs and the option for the seed; exits where one is no pair or set elsewhere."""
    texts = {} if seed is None else {"SEED": seed}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise SystemExit(f"{pair!r} is no NAME=VALUE: a parameter is set as in PARAMS='WIDTH=64 DEPTH=3'")
        if name == "PRESET":
            raise SystemExit(f"use PRESET={text} by itself, outside PARAMS, as in: make run PRESET={text or 'cpu'}")
        if name in texts:
            raise SystemExit(f"{name} is set twice, to {texts[name]} and to {text}: set it once")
        texts[name] = text
    return texts


def parameters_of(path, texts):
    """{name: value} for a notebook; exits where it has no such parameter or the value is of another kind."""
    known = defaults(path)
    unknown = sorted(texts.keys() - known.keys())
    if unknown:
        raise SystemExit(f"{path.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known)}")
    return {name: value_of(name, text, known[name], path.name) for name, text in texts.items()}


def folder_of(path, preset, parameters):
    """runs/<name>-<preset>-<parameters>-<code>, where a notebook runs: other code never takes up what this one left."""
    suffix = "".join(f"-{name}={value}" for name, value in parameters.items())
    plain = re.sub(r"[^\w.,=+-]", "_", suffix)[:80]
    if plain != suffix:
        plain += f"~{hashlib.sha256(suffix.encode()).hexdigest()[:6]}"
    return RUNS / f"{path.stem}-{preset}{plain}-{cookbook.code_hash(cookbook.read(path))[:8]}"


def session(execution, start):
    """Where the ClearML session of a run that began at `start` (epoch) lies, in words; None where there is none."""
    kept = [path for path in execution.folder.glob("clearml/offline/*.zip") if path.stat().st_mtime >= start]
    if kept:
        return relative(max(kept, key=lambda path: path.stat().st_mtime))
    page = RESULTS_PAGE.search("\n".join(map(cookbook.text_of, cookbook.code_cells(execution.notebook))))
    return f"on the server, {page[1]}" if page else None


def relative(path):
    return str(path.relative_to(cookbook.ROOT))


def say(*lines):
    print(*lines, sep="\n", flush=True)


def report(path, preset, execution, start):
    """Say what came of a run: minutes, error, copy, ClearML session, and the headline if its numbers mean something."""
    minutes = f"{execution.minutes:.1f} minutes"
    say(f"{path.stem}: FAILED in {execution.error} ({minutes})" if execution.error else f"{path.stem}: ok ({minutes})")
    say(f"  executed copy: {relative(execution.folder / path.name)}")
    say(f"  ClearML session: {session(execution, start) or 'none'}")
    if execution.error or preset == "smoke":
        return
    facts = read_json(execution.folder / "run.json") or {}
    headline = facts.get("headline", "")
    for line in textwrap.wrap(headline, shutil.get_terminal_size().columns - 3):
        say(f"  {line}")


def summary(executions):
    """The counts and the minutes of all runs in one line."""
    count = len(executions)
    failed = sum(execution.error is not None for execution in executions)
    minutes = sum(execution.minutes for execution in executions)
    return f"{count} notebook{'s' * (count != 1)}: {count - failed} ok, {failed} failed, {minutes:.1f} minutes"


def run(paths, preset, texts):
    """Execute the notebooks one after the other; returns the exit status."""
    parameters = {path: parameters_of(path, texts) for path in paths}
    executions = []
    try:
        for path in paths:
            start = time.time()
            folder = folder_of(path, preset, parameters[path])
            executions.append(execute(path, folder, kernel_environment(COOKBOOK_PRESET=preset), parameters[path]))
            report(path, preset, executions[-1], start)
    except KeyboardInterrupt:
        say(summary(executions), f"interrupted in {path.stem}; the same command goes on there, from its last checkpoint")
        return INTERRUPTED
    say(summary(executions))
    return int(any(execution.error for execution in executions))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", help="number of one notebook; default: all")
    parser.add_argument("--preset", default="smoke", choices=cookbook.PRESETS)
    parser.add_argument("--seed", help="the first random seed")
    parser.add_argument("pairs", nargs="*", metavar="NAME=VALUE", help="further parameters")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a ± still shows the rest
    raise SystemExit(run(cookbook.find(arguments.nb), arguments.preset, split_pairs(arguments.pairs, arguments.seed)))


if __name__ == "__main__":
    main()
