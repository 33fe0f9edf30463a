"""The README: what its gallery says and shows, its links and commands, and the scripts that write them."""

import re

import nbformat
import pytest
from PIL import Image

from tools import cookbook, readme

RAW = "https://raw.githubusercontent.com"


# The committed README and its pictures


def test_the_gallery_is_current():
    assert readme.GALLERY.search(readme.README.read_text())[0] == f"<!-- gallery -->\n{readme.gallery()}\n<!-- /gallery -->"


def test_links_anchors_and_commands_exist():
    text = readme.README.read_text()
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|href)="([^"]+)"', text)
    local = {target for pair in targets for target in pair if target and not target.startswith("https://")}
    headings = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"(?m)^## (.+)$", text)}
    assert {target for target in local if target.startswith("#")} <= headings
    assert [target for target in local if not target.startswith("#") and not (cookbook.ROOT / target).exists()] == []
    commands = set(re.findall(r"(?m)^([a-z]+):.*##", (cookbook.ROOT / "Makefile").read_text()))
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= commands


def test_every_picture_belongs_to_a_notebook_and_is_four_to_three():
    pictures = {path.stem: Image.open(path).size for path in (cookbook.ROOT / "img").iterdir()}
    assert pictures.keys() <= {path.stem for path in cookbook.find()}
    for stem, (width, height) in pictures.items():
        assert width / height == pytest.approx(4 / 3, abs=0.01), stem


# The scripts, on a small repository


def notebook(heading, folder, stem, **facts):
    """A notebook whose title shows a badge and two pictures, its own and another one."""
    title = (
        f"# {heading}\n\nIt tests.\n\n"
        f"[![Open In Colab](badge.svg)](https://colab.research.google.com/github/me/old/blob/main/{folder}/{stem}.ipynb)\n\n"
        f'<img src="{RAW}/me/old/main/img/{stem}.png" width="400" alt="A &lt; B">\n<img src="{RAW}/me/old/main/img/other.png">'
    )
    cells = [nbformat.v4.new_markdown_cell(title), nbformat.v4.new_code_cell("plot()", metadata={"tags": ["picture"]})]
    metadata = {"cookbook": {"preset": "cpu", "device": readme.USUAL_DEVICE, "minutes": 32.6, "headline": "loss 1 ± 2", **facts}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with 01_first, 02_second and the miniature 00_small."""
    for folder in ("notebooks", "img", "tests/miniature"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(cookbook, "ROOT", tmp_path)
    monkeypatch.setattr(cookbook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(cookbook, "MINIATURE", tmp_path / "tests" / "miniature" / "00_small.ipynb")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before <!-- gallery -->old<!-- /gallery --> after, on me/old")
    (tmp_path / "pyproject.toml").write_text('[tool.cookbook]\nrepository = "me/old"\nbranch = "main"\n')
    first = notebook("01 · First", "notebooks", "01_first", gallery="Loss 1 ± 2.")
    nbformat.write(first, tmp_path / "notebooks" / "01_first.ipynb")
    facts = {"device": "NVIDIA H100", "preset": "gpu", "minutes": 11.5, "gallery": "Loss 3 ± 4."}
    second = notebook("02 · Second", "notebooks", "02_second", **facts)
    nbformat.write(second, tmp_path / "notebooks" / "02_second.ipynb")
    nbformat.write(notebook("00 · Small", "tests/miniature", "00_small"), cookbook.MINIATURE)
    return tmp_path


def test_a_row_says_what_its_notebook_says(repository):
    first, second = (readme.row(path) for path in cookbook.find())
    for part in (
        "**[01 · First](notebooks/01_first.ipynb)**<br>It tests.\n",
        "\nLoss 1&nbsp;±&nbsp;2.\n",
        'src="img/01_first.png"',
        "\n33 min (`cpu`) · [Colab]",
    ):
        assert part in first
    for part in (
        "**[02 · Second](notebooks/02_second.ipynb)**<br>It tests.\n",
        "\nLoss 3&nbsp;±&nbsp;4.\n",
        'src="img/02_second.png"',
        'alt="A &lt; B"',
        "\n12 min (`gpu`, NVIDIA H100) · [Colab](https://colab.research.google.com/github/me/old/blob/main/notebooks/02_second.ipynb)",
    ):
        assert part in second


def test_markdown_in_a_row_stands_between_blank_lines_as_github_needs_it(repository):
    opening, picture, between, *blocks, closing = readme.row(cookbook.find("02")[0]).strip().split("\n\n")
    assert opening == '<tr><td width="300">'
    assert 'width="300"' in picture
    assert between == "</td><td>"
    assert len(blocks) == 3
    assert closing == "</td></tr>"


def test_a_notebook_that_is_not_rendered_has_a_row(repository):
    path = repository / "notebooks" / "02_second.ipynb"
    bare = cookbook.read(path)
    del bare.metadata["cookbook"]
    cookbook.write(bare, path)
    assert "\nNot rendered yet.\n" in readme.row(path)
    assert readme.result_line(bare) == "Not rendered yet."


def test_a_result_line_names_preset_device_and_minutes(repository):
    second = cookbook.read(repository / "notebooks" / "02_second.ipynb")
    assert readme.result_line(second) == "**Result:** loss 1 ± 2 (preset `gpu`, NVIDIA H100, 12 minutes)"


def renamed(repository, monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["readme", "--repository", name])
    readme.main()
    return {path: cookbook.read(path).cells[0].source for path in [*cookbook.find(), cookbook.MINIATURE]}


def test_badges_and_pictures_follow_the_repository(repository, monkeypatch):
    first, second, miniature = renamed(repository, monkeypatch, "you/fork").values()
    for title, place in ((first, "notebooks/01_first"), (second, "notebooks/02_second"), (miniature, "tests/miniature/00_small")):
        assert f"(https://colab.research.google.com/github/you/fork/blob/main/{place}.ipynb)" in title
    assert f'"{RAW}/you/fork/main/img/02_second.png"' in second
    assert f'"{RAW}/you/fork/main/tests/miniature/00_small.png"' in miniature
    assert f'"{RAW}/me/old/main/img/other.png"' in second
    assert readme.picture_url(repository / "notebooks" / "02_second.ipynb") == f"{RAW}/you/fork/main/img/02_second.png"
    text = (repository / "README.md").read_text()
    assert "me/old" not in text + (repository / "pyproject.toml").read_text()
    assert "/github/you/fork/blob/main/notebooks/02_second.ipynb" in text


@pytest.mark.parametrize("name", ["fork", "you/fork/x", "you/my fork", "https://github.com/you/fork"])
def test_what_is_no_repository_is_refused(repository, monkeypatch, name):
    before = (repository / "pyproject.toml").read_text()
    with pytest.raises(SystemExit, match="no owner/name"):
        renamed(repository, monkeypatch, name)
    assert (repository / "pyproject.toml").read_text() == before
