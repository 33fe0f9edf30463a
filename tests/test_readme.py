"""The README: what its gallery says and shows, its links and commands, and the scripts that write them."""

import base64
import io
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from tools import cookbook, readme

FIRST_EDITIONS = [path for path in cookbook.find() if cookbook.is_first_edition(path)]
NUMBER = re.compile(r"(?<![\w-])\d[\d,]*(?:\.\d+)?(?: ± \d+(?:\.\d+)?)?")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RAW = "https://raw.githubusercontent.com"
by_stem = pytest.mark.parametrize("path", FIRST_EDITIONS, ids=lambda path: path.stem)


def entry(path):
    return cookbook.first_editions()[path.name[:2]]


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


def complaints(text, headline):
    """What is wrong with a result in the gallery: it has at most 20 words and two numbers, all with the spread that the headline gives."""
    numbers = NUMBER.findall(text)
    known = NUMBER.findall(headline)
    known += [number.partition(" ± ")[0] for number in known]
    if len(text.split()) > 20:
        yield "more than 20 words"
    if len(numbers) > 2:
        yield "more than two numbers"
    for number in numbers:
        if number not in known:
            yield f"{number} is not in the headline"


@by_stem
def test_a_first_edition_says_in_the_gallery_what_its_headline_says(path):
    headline = cookbook.read(path).metadata["cookbook"]["headline"]
    assert list(complaints(entry(path)["gallery"], headline)) == []
    assert len(entry(path)["sentence"].split()) <= 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CIFAR-10: 0.57 ± 0.01 against 1,915", []),
        ("0.57 after two epochs", []),
        ("0.57 ± 0.02 against 1,915", ["0.57 ± 0.02 is not in the headline"]),
        ("0.5 against 1,915", ["0.5 is not in the headline"]),
        ("915 MiB", ["915 is not in the headline"]),
        ("0.57, 0.57 and 1,915", ["more than two numbers"]),
        ("word " * 21, ["more than 20 words"]),
    ],
)
def test_a_wrong_result_is_noticed(text, expected):
    assert list(complaints(text, "CIFAR-10, accuracy 0.57 ± 0.01 against 0.46 ± 0.02, 1,915 MiB")) == expected


@by_stem
def test_a_first_edition_shows_the_thumbnail_that_its_box_cuts_out(path):
    committed = Image.open(cookbook.ROOT / "img" / f"{path.stem}.png")
    assert committed.size == (800, 600)
    expected = np.asarray(Image.open(io.BytesIO(readme.thumbnail(path))).convert("RGB"), dtype=float)
    assert np.abs(np.asarray(committed.convert("RGB")) - expected).mean() < 1  # of 255 levels: a palette may be made a little differently


def test_every_picture_belongs_to_a_notebook_and_is_four_to_three():
    pictures = {path.stem: Image.open(path).size for path in (cookbook.ROOT / "img").iterdir()}
    assert pictures.keys() <= {path.stem for path in cookbook.find()}
    for stem, (width, height) in pictures.items():
        assert width / height == pytest.approx(4 / 3, abs=0.01), stem


@by_stem
def test_the_title_of_a_first_edition_stays_to_the_letter(path):
    notebook = cookbook.read(path)
    shown = cookbook.HEADLINE.search(notebook.cells[0].source)[0]
    assert shown == f"<!-- headline -->\n{readme.result_line(notebook)}\n<!-- /headline -->"
    assert readme.renamed_title(path, notebook.cells[0].source) == notebook.cells[0].source


# The scripts, on a small repository: notebook 01 is a first edition, 02 and the miniature are not


def png(image):
    target = io.BytesIO()
    image.save(target, "png")
    return target.getvalue()


def shown(image):
    """The output of a cell that displays the image."""
    return nbformat.v4.new_output("display_data", data={"image/png": base64.b64encode(png(image)).decode()})


def stripes():
    """400 x 200 pixels: red, green, blue and white stripes, 100 pixels wide."""
    return Image.fromarray(np.repeat(np.array([RED, GREEN, BLUE, WHITE], dtype=np.uint8), 100, axis=0)[None].repeat(200, axis=0))


def notebook(heading, folder, stem, **facts):
    """A notebook whose title shows a badge and two pictures, its own and another one, and whose last picture has stripes."""
    title = (
        f"# {heading}\n\nIt tests.\n\n"
        f"[![Open In Colab](badge.svg)](https://colab.research.google.com/github/me/old/blob/main/{folder}/{stem}.ipynb)\n\n"
        f'<img src="{RAW}/me/old/main/img/{stem}.png" width="400" alt="A &lt; B">\n<img src="{RAW}/me/old/main/img/other.png">'
    )
    cells = [nbformat.v4.new_markdown_cell(title), nbformat.v4.new_code_cell("plot()", metadata={"tags": ["picture"]})]
    cells[1].outputs = [shown(Image.new("RGB", (400, 200), "black")), shown(stripes())]
    metadata = {"cookbook": {"preset": "cpu", "device": readme.USUAL_DEVICE, "minutes": 32.6, "headline": "loss 1 ± 2", **facts}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose first edition is 01_first; it also holds 02_second and the miniature 00_small."""
    for folder in ("notebooks", "img", "tests/miniature"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(cookbook, "ROOT", tmp_path)
    monkeypatch.setattr(cookbook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(cookbook, "MINIATURE", tmp_path / "tests" / "miniature" / "00_small.ipynb")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before <!-- gallery -->old<!-- /gallery --> after, on me/old")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.cookbook]\nrepository = "me/old"\nbranch = "main"\n[tool.cookbook.first_editions.01]\n'
        'sentence = "It is old."\ngallery = "Loss 1 ± 2."\nthumbnail = [100, 0, 200, 200]\nalt = "Green"\n'
    )
    gallery = "Loss 3 ± 4."
    nbformat.write(notebook("01 · First", "notebooks", "01_first"), tmp_path / "notebooks" / "01_first.ipynb")
    second = notebook("02 · Second", "notebooks", "02_second", device="NVIDIA H100", preset="gpu", minutes=11.5, gallery=gallery)
    nbformat.write(second, tmp_path / "notebooks" / "02_second.ipynb")
    nbformat.write(notebook("00 · Small", "tests/miniature", "00_small"), cookbook.MINIATURE)
    return tmp_path


def set_box(repository, box):
    path = repository / "pyproject.toml"
    path.write_text(re.sub(r"thumbnail = .*", f"thumbnail = {box}", path.read_text()))


def thumbnail(repository):
    return np.asarray(Image.open(io.BytesIO(readme.thumbnail(repository / "notebooks" / "01_first.ipynb"))).convert("RGB"))


def test_a_thumbnail_is_the_box_in_the_middle_of_white(repository):
    tall = thumbnail(repository)  # 100 x 200 of green in 267 x 200, three times as large: 250 columns of white, 300 of green, 250 of white
    assert tall.shape == (600, 800, 3)
    assert (tall[:, :235] == WHITE).all()
    assert (tall[:, 265:535] == GREEN).all()
    assert (tall[:, 565:] == WHITE).all()
    set_box(repository, [100, 50, 300, 100])
    wide = thumbnail(repository)  # 200 x 50 in 200 x 150, four times as large: 200 rows of white, 200 of green and blue, 200 of white
    assert (wide[:185] == WHITE).all()
    assert (wide[215:385, :385] == GREEN).all()
    assert (wide[215:385, 415:] == BLUE).all()
    assert (wide[415:] == WHITE).all()


def test_a_thumbnail_of_a_transparent_picture_is_white_there(repository):
    path = repository / "notebooks" / "01_first.ipynb"
    clear = cookbook.read(path)
    clear.cells[1].outputs = [shown(Image.new("RGBA", (400, 200), (0, 0, 0, 0)))]
    cookbook.write(clear, path)
    assert (thumbnail(repository) == WHITE).all()


@pytest.mark.parametrize("box", [[0, 0, 401, 200], [0, 0, 400, 201], [-1, 0, 400, 200], [200, 0, 200, 200], [0, 200, 400, 0]])
def test_a_box_outside_the_picture_is_refused(repository, box):
    set_box(repository, box)
    with pytest.raises(ValueError, match=r"01_first\.ipynb, 400 x 200 pixels"):
        thumbnail(repository)


def test_update_writes_the_gallery_and_the_thumbnails_of_first_editions(repository):
    readme.update()
    text = (repository / "README.md").read_text()
    assert text.startswith("before <!-- gallery -->\n<table>\n<tr>")
    assert text.endswith("\n<!-- /gallery --> after, on me/old")
    assert [path.name for path in (repository / "img").iterdir()] == ["01_first.png"]
    assert (repository / "img" / "01_first.png").read_bytes() == readme.thumbnail(repository / "notebooks" / "01_first.ipynb")


def test_a_row_says_what_the_edition_of_its_notebook_says(repository):
    first, second = (readme.row(path) for path in cookbook.find())
    for part in (
        "**[01 · First](notebooks/01_first.ipynb)**<br>It is old.\n",
        "\nLoss 1&nbsp;±&nbsp;2.\n",
        'alt="Green"',
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


def test_of_a_first_edition_only_the_badge_follows(repository, monkeypatch):
    path = repository / "notebooks" / "01_first.ipynb"
    before = cookbook.read(path)
    after = renamed(repository, monkeypatch, "you/fork")[path]
    assert after == readme.BADGE.sub(cookbook.badge(path), before.cells[0].source)
    assert cookbook.read(path).cells[1:] == before.cells[1:]


@pytest.mark.parametrize("name", ["fork", "you/fork/x", "you/my fork", "https://github.com/you/fork"])
def test_what_is_no_repository_is_refused(repository, monkeypatch, name):
    before = (repository / "pyproject.toml").read_text()
    with pytest.raises(SystemExit, match="no owner/name"):
        renamed(repository, monkeypatch, name)
    assert (repository / "pyproject.toml").read_text() == before
