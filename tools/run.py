"""Execute notebooks into runs/ and print a table of their results: `make run` calls this.

    python -m tools.run [--nb 07] [--preset smoke|cpu|gpu] [--seed 0] [NAME=VALUE ...]

NAME=VALUE sets any other parameter of the notebooks. A notebook that fails is reported with its cell, the others still run, and the
exit status is 1.
"""

import argparse

from tools import cookbook

RUNS = cookbook.ROOT / "runs"


def run(path, preset, pairs):
    """Execute one notebook; returns its row of the table and its error (None where it went well)."""
    parameters = cookbook.parse_parameters(path, pairs)
    suffix = "".join(f"-{name}={value}" for name, value in parameters.items()).replace("/", "_")
    target = RUNS / f"{path.stem}-{preset}{suffix}.ipynb"
    minutes, error = cookbook.execute(path, target, preset, parameters)
    executed = cookbook.read(target)
    device = cookbook.runtime(executed).get("device", "?")
    result = f"FAILED in {error}" if error else cookbook.headline(executed)
    return (path.stem, preset, device, f"{minutes:.1f}", result, str(target.relative_to(cookbook.ROOT))), error


def table(rows):
    """Rows as text in columns, the first row as the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", help="number of one notebook; default: all")
    parser.add_argument("--preset", default="smoke", choices=cookbook.PRESETS)
    parser.add_argument("--seed", help="the first random seed")
    parser.add_argument("pairs", nargs="*", metavar="NAME=VALUE", help="further parameters")
    arguments = parser.parse_args()
    pairs = arguments.pairs + ([f"SEED={arguments.seed}"] if arguments.seed else [])
    RUNS.mkdir(exist_ok=True)
    results = [run(path, arguments.preset, pairs) for path in cookbook.find(arguments.nb)]
    print(table([("notebook", "preset", "device", "minutes", "headline", "executed copy"), *(row for row, _ in results)]))
    raise SystemExit(any(error for _, error in results))


if __name__ == "__main__":
    main()
