"""Write what the README and the title cells take from elsewhere: `make readme` and `make badges REPO=owner/name`.

python -m tools.readme                      the gallery, from the notebooks' metadata
python -m tools.readme --repository me/fork   the repository's name, in pyproject.toml, the title cells and the README
"""

import argparse
import html
import re

from tools import cookbook

README = cookbook.ROOT / "README.md"
GALLERY = re.compile(r"(<!-- gallery -->).*?(<!-- /gallery -->)", re.DOTALL)
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)")
PICTURE_ALT = re.compile(r'<img [^>]*alt="([^"]*)"')
USUAL_DEVICE = "x86_64 CPU, 2 threads"

# A row of the gallery. In a table of HTML the picture's cell keeps its width, which a table of Markdown would squeeze to some
# 25 pixels; what stands between blank lines is Markdown.
ROW = """\
<tr><td width="300">

[<img src="img/{stem}.png" width="300" alt="{alt}">](notebooks/{stem}.ipynb)

</td><td>

**[{heading}](notebooks/{stem}.ipynb)**<br>{sentence}

{result}

{effort}[Colab]({colab}) · [GitHub](notebooks/{stem}.ipynb)

</td></tr>
"""
GALLERY_END = f"""\
Minutes and numbers are those of the committed runs. `cpu` and `gpu` are [presets](#presets); where a row names no hardware, it was
`{USUAL_DEVICE}`."""


def result_line(notebook):
    """The headline with the preset, device and minutes that it took, from the metadata of a rendered notebook."""
    facts = notebook.metadata.get("cookbook")
    if facts is None:
        return "Not rendered yet."
    minutes = f"{facts['minutes']:.0f}"
    unit = "minute" if minutes == "1" else "minutes"
    return f"**Result:** {facts['headline']} (preset `{facts['preset']}`, {facts['device']}, {minutes} {unit})"


def picture_url(path):
    """Address of a notebook's picture that works outside the repository, as in Colab."""
    return cookbook.raw_url(cookbook.picture_path(path))


def colab_url(path):
    """Where a notebook's badge leads."""
    return BADGE.fullmatch(cookbook.badge(path))[1]


def told(path, notebook):
    """What the gallery says of a notebook: {"sentence": what it is, "gallery": what came out, "alt": what its picture shows}."""
    heading, sentence = cookbook.title(notebook)
    picture = PICTURE_ALT.search(notebook.cells[0].source)
    result = notebook.metadata.get("cookbook", {}).get("gallery", "Not rendered yet.")
    return {"sentence": sentence, "gallery": result, "alt": html.unescape(picture[1]) if picture else heading}


def effort(facts):
    """Minutes, preset and, where it is not the usual one, device of the committed run; empty before the first."""
    if not facts:
        return ""
    device = "" if facts["device"] == USUAL_DEVICE else f", {facts['device']}"
    return f"{facts['minutes']:.0f} min (`{facts['preset']}`{device}) · "


def row(path):
    """One notebook in the gallery: a row of an HTML table around Markdown."""
    notebook = cookbook.read(path)
    texts = told(path, notebook)
    return ROW.format(
        stem=path.stem,
        heading=cookbook.title(notebook)[0],
        sentence=texts["sentence"],
        result=texts["gallery"].replace(" ± ", "&nbsp;±&nbsp;"),  # a number and its spread stay in one line
        alt=html.escape(texts["alt"]),
        colab=colab_url(path),
        effort=effort(notebook.metadata.get("cookbook")),
    )


def gallery():
    """The table of all notebooks: a picture, and beside it what the notebook is and found."""
    rows = "\n".join(row(path) for path in cookbook.find())
    return f"<table>\n{rows}</table>\n\n{GALLERY_END}"


def update():
    """Rewrite the gallery."""
    README.write_text(GALLERY.sub(lambda m: f"{m[1]}\n{gallery()}\n{m[2]}", README.read_text()))


def renamed_title(path, source):
    """A title cell's source with the badge and the picture's address of the repository that pyproject.toml names."""
    source = BADGE.sub(lambda _: cookbook.badge(path), source)
    picture = rf"https://raw\.githubusercontent\.com/[^\s()\"]+/{re.escape(path.stem)}\.png"
    return re.sub(picture, lambda _: picture_url(path), source)


def rename(repository):
    """Put another GitHub repository's name everywhere it stands."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise SystemExit(f"{repository!r} is no owner/name")
    old = cookbook.settings()["repository"]
    for path in (cookbook.ROOT / "pyproject.toml", README):
        path.write_text(path.read_text().replace(old, repository))
    for path in [*cookbook.find(), *cookbook.miniatures()]:
        notebook = cookbook.read(path)
        notebook.cells[0].source = renamed_title(path, notebook.cells[0].source)
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
