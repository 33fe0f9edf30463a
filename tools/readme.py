"""Write what the README and the title cells take from elsewhere: `make readme` and `make badges REPO=owner/name`.

python -m tools.readme                      the gallery, from the notebooks' metadata
python -m tools.readme --repository me/fork   the repository's name, in pyproject.toml, the Colab badges and the README
"""

import argparse
import re

from tools import cookbook

README = cookbook.ROOT / "README.md"
GALLERY = re.compile(r"(<!-- gallery -->).*?(<!-- /gallery -->)", re.DOTALL)
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\([^)]*\)")


def result_line(notebook):
    """The headline with the preset, device and minutes that it took, from the metadata of a rendered notebook."""
    facts = notebook.metadata.get("cookbook")
    if facts is None:
        return "Not rendered yet."
    return f"**Result:** {facts['headline']} (preset `{facts['preset']}`, {facts['device']}, {facts['minutes']:.0f} minutes)"


def gallery():
    """The table of notebooks in Markdown."""
    rows = ["| | Notebook | Result | Minutes | |", "|---|---|---|---|---|"]
    for path in cookbook.find():
        notebook = cookbook.read(path)
        heading, sentence = cookbook.title(notebook)
        facts = notebook.metadata.get("cookbook", {})
        picture = f'<img src="img/{path.stem}.png" width="260" alt="{heading}">'
        minutes = f"{facts['minutes']:.0f} (`{facts['preset']}`, {facts['device']})" if facts else "not rendered yet"
        name = f"[**{heading}**](notebooks/{path.name})<br>{sentence}"
        rows.append(f"| {picture} | {name} | {facts.get('headline', '')} | {minutes} | {cookbook.badge(path)} |")
    return "\n".join(rows)


def update():
    """Rewrite the gallery."""
    README.write_text(GALLERY.sub(lambda m: f"{m[1]}\n{gallery()}\n{m[2]}", README.read_text()))


def rename(repository):
    """Put another GitHub repository's name everywhere it stands."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SystemExit(f"{repository!r} is no owner/name")
    old = cookbook.settings()["repository"]
    for path in (cookbook.ROOT / "pyproject.toml", README):
        path.write_text(path.read_text().replace(old, repository))
    for path in cookbook.find():
        notebook = cookbook.read(path)
        notebook.cells[0].source = BADGE.sub(lambda _, path=path: cookbook.badge(path), notebook.cells[0].source)
        cookbook.write(notebook, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="owner/name of the repository on GitHub")
    arguments = parser.parse_args()
    if arguments.repository:
        rename(arguments.repository)
    update()


if __name__ == "__main__":
    main()
