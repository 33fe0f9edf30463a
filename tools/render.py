"""Execute notebooks in place, so that the committed outputs are those of the committed code: `make render NB=07 PRESET=cpu`.

    python -m tools.render --nb 07 --preset cpu|gpu

Writes the outputs, in the metadata what they belong to (preset, device, minutes, versions, hash of the code cells), the headline into
the title, the picture into img/ and the gallery of the README. Nothing is written where a cell fails.
"""

import argparse
import base64
import datetime
import io

import numpy as np
from PIL import Image

from tools import cookbook, readme

KEPT_CELL_METADATA = ("tags",)


def compress(png):
    """An opaque picture without its alpha channel, and with a palette of 256 colours where hardly a pixel (1 in 500) changes visibly.

    What is no PNG (a moving GIF shown as one) stays as it is.
    """
    image = Image.open(io.BytesIO(png))
    if image.format != "PNG" or image.convert("RGBA").getextrema()[3][0] < 255:
        return png
    image = image.convert("RGB")
    few = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    change = np.abs(np.asarray(few.convert("RGB"), dtype=int) - np.asarray(image)).max(-1)  # of 255 levels
    alike = (change > 24).mean() < 1 / 500 and (change**2).mean() < 4**2
    target = io.BytesIO()
    (few if alike else image).save(target, "png", optimize=True)
    return min(png, target.getvalue(), key=len)


def clean(notebook):
    """Drop what execution leaves in the metadata (timings, papermill's and widgets' state), and compress the figures."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = base64.b64encode(compress(base64.b64decode(output.data["image/png"]))).decode()
    return notebook


def pictures(cells):
    """The PNG images among the outputs of cells, as bytes."""
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


def stamp(notebook, minutes):
    """Write what the outputs belong to into the metadata, and the headline into the title cell."""
    facts = cookbook.runtime(notebook)
    notebook.metadata["cookbook"] = {
        **facts,
        "minutes": round(minutes, 1),
        "date": datetime.date.today().isoformat(),
        "headline": cookbook.headline(notebook),
        "code_sha256": cookbook.code_hash(notebook),
    }
    notebook.cells[0].source = cookbook.HEADLINE.sub(lambda m: f"{m[1]}\n{readme.result_line(notebook)}\n{m[2]}", notebook.cells[0].source)


def render(path, preset):
    target = cookbook.ROOT / "runs" / f"render-{path.stem}-{preset}.ipynb"
    target.parent.mkdir(exist_ok=True)
    minutes, error = cookbook.execute(path, target, preset)
    if error:
        raise SystemExit(f"{path.name} is unchanged; it failed in {error}; see {target.relative_to(cookbook.ROOT)}")
    notebook = clean(cookbook.read(target))
    if len(pictures(notebook.cells)) < 3 or not pictures(cookbook.tagged(notebook, "picture")) or not cookbook.headline(notebook):
        raise SystemExit(
            f"{path.name} is unchanged: it needs three figures, one of them in a cell tagged picture, and a cell tagged headline"
        )
    stamp(notebook, minutes)
    cookbook.write(notebook, path)
    (cookbook.ROOT / "img" / f"{path.stem}.png").write_bytes(pictures(cookbook.tagged(notebook, "picture"))[-1])
    target.unlink()
    print(f"{path.name}: {readme.result_line(notebook)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nb", help="number of one notebook; default: all")
    parser.add_argument("--preset", default="cpu", choices=[preset for preset in cookbook.PRESETS if preset != "smoke"])
    arguments = parser.parse_args()
    for path in cookbook.find(arguments.nb):
        render(path, arguments.preset)
    readme.update()


if __name__ == "__main__":
    main()
