# @title Reading folders of photographs, and MVTec AD's archive
# canon: folders
import lzma
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from PIL import ImageOps

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def listed(folder):
    """Pictures in a folder, in order; names that begin with a dot are no data."""
    found = [path for path in folder.glob("*") if path.suffix.lower() in PICTURES]
    return sorted(path for path in found if not path.name.startswith("."))


def open_picture(path, background="white"):
    """RGB image of PIL, EXIF's rotation applied, on a background; ValueError names a bad file."""
    try:
        with Picture.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of {image.mode}: convert it to 8 bits")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        found = f"{path} is damaged or no picture ({error})"
        raise ValueError(f"{found}: remove it, or fetch the data again") from error
    below = Picture.new("RGBA", upright.size, background)
    return Picture.alpha_composite(below, upright).convert("RGB")


def resized(image, size, crop=None, resample=Picture.Resampling.LANCZOS):
    """A PIL image, whole, as size x size pixels, of which the middle crop x crop are taken."""
    first = (size - (crop or size)) // 2
    middle = slice(first, first + (crop or size))
    return np.asarray(image.resize((size, size), resample))[middle, middle]


def read_mask(path, size, crop=None):
    """What is not 0 in the mask of the test picture at `path`, (size, size) bool; ValueError."""
    if path.parent.name == "good":
        return np.zeros((crop or size, crop or size), bool)
    folder = path.parents[2] / "ground_truth" / path.parent.name
    wanted = folder / f"{path.stem}_mask.png"
    found = [file for file in listed(folder) if file.stem in (wanted.stem, path.stem)]
    if not found:
        raise ValueError(f"{path} has no mask {wanted}: remove ground_truth to go without masks")
    mask, picture = open_picture(found[0], "black"), open_picture(path)
    if mask.size != picture.size:
        raise ValueError(f"{found[0]} has {mask.size} pixels, {path} has {picture.size}")
    defect = np.asarray(mask).any(-1)  # in any colour
    if not defect.any():
        raise ValueError(f"{found[0]} is empty, but {path} lies in a folder of defects")
    return resized(Picture.fromarray(defect), size, crop, Picture.Resampling.NEAREST)


@dataclass(frozen=True)
class Category:
    """Pictures of one kind of part."""

    name: str  # as its folder
    train: torch.Tensor  # good parts, (N, 3, size, size), bytes
    test: torch.Tensor  # good and defective ones, the same
    kinds: tuple  # of each test picture: "good" or the name of its defect
    masks: np.ndarray | None  # of the defects, (N, size, size) bool; None where there are none
    source: str  # "MVTec AD" or "Fashion-MNIST"
    files: str  # width and height of the files

    @property
    def defective(self):
        """Whether each test picture shows a defect, (N,)."""
        return np.array([kind != "good" for kind in self.kinds])


def some(paths, limit):
    """The paths in order, or `limit` of them at even distances."""
    paths = sorted(paths)
    count = min(limit or len(paths), len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def to_tensor(pictures):
    """(N, 3, size, size) bytes of pictures (size, size, 3)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def file_facts(path):
    """((width, height), whether it has transparency) of a picture."""
    with Picture.open(path) as image:
        return image.size, image.has_transparency_data


def read_category(folder, size, crop=None, limit=None):
    """The Category in a folder: train/good, test/good, test/<defect>, ground_truth/<defect> if any.

    limit: at most so many pictures for training. ValueError says what is missing or damaged.
    """
    folder = Path(folder)
    train = listed(folder / "train/good")
    kinds = {path.name: listed(path) for path in sorted(folder.glob("test/[!.]*"))}
    good = len(kinds.get("good", ()))
    bad = sum(map(len, kinds.values())) - good
    if min(len(train), good, bad) < 3:
        found = f"{len(train)} in train/good, {good} in test/good, {bad} of defects in test"
        raise ValueError(f"{folder} lacks pictures, has {found}, needs 3 of each; {contents(folder)}")
    most = limit and max(2, limit // len(kinds))
    test = [path for paths in kinds.values() for path in some(paths, most)]
    paths = some(train, limit) + test
    masked = (folder / "ground_truth").is_dir()
    with ThreadPoolExecutor() as pool:
        read = lambda path: resized(open_picture(path), size, crop)
        pictures = to_tensor(list(pool.map(read, paths)))
        masks = list(pool.map(lambda path: read_mask(path, size, crop), test if masked else []))
        sizes, transparent = zip(*pool.map(file_facts, paths), strict=True)
    if any(transparent):
        print(f"{folder.name}: transparent pixels are read as white")
    if not masked:
        print(f"{folder.name} has no masks: scores of pictures only, none of pixels or regions")
    files = " to ".join("{} × {}".format(*pair) for pair in dict.fromkeys((min(sizes), max(sizes))))
    names = tuple(path.parent.name for path in test)
    parts = pictures[: -len(test)], pictures[-len(test) :]
    return Category(folder.name, *parts, names, np.stack(masks) if masked else None, "MVTec AD", files)


NAMES = "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush"
MVTEC_CATEGORIES = (*NAMES.split(), "transistor", "wood", "zipper")
ARCHIVE = "mvtec_anomaly_detection.tar.xz"
ARCHIVE_SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
SHARES = "https://www.mydrive.ch/shares"
ARCHIVE_URLS = (
    f"{SHARES}/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/{ARCHIVE}",
    f"{SHARES}/38536/3830184030e49fe74747669442f0f282/download/420938113-1629952094/{ARCHIVE}",
)


def categories_in(folder):
    """Names of the categories that a folder holds, in order."""
    return sorted(path.parents[1].name for path in folder.glob("*/train/good") if path.is_dir())


def unpack(archive, folder, categories):
    """Extract categories from MVTec AD's archive, whole or not at all; ValueError where it fails."""
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was interrupted
    try:
        with tarfile.open(archive) as source:
            wanted = (item for item in source if {*item.name.split("/")} & {*categories})
            source.extractall(part, wanted, filter="data")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"could not unpack {archive}: {error}") from error
    for good in list(part.rglob("train/good")):
        category = folder / good.parents[1].name
        shutil.rmtree(category, ignore_errors=True)
        good.parents[1].replace(category)
    shutil.rmtree(part)


def find_categories(root, wanted, urls, named=True):
    """Folders of the wanted categories (("all",): all 15), fetched if missing; [] without MVTec AD.

    ValueError for one that is not there, if the reader named it; else a line says it is skipped.
    """
    folder = root / "mvtec_anomaly_detection"
    wanted = MVTEC_CATEGORIES if tuple(wanted) == ("all",) else wanted
    missing = set(wanted) - set(categories_in(folder))
    known = missing <= set(MVTEC_CATEGORIES)
    archive = fetch(ARCHIVE, urls, ARCHIVE_SHA256) if missing and known else None
    if archive:
        unpack(archive, folder, missing)
    there = categories_in(folder)
    found = [folder / name for name in wanted if name in there]
    missing = ", ".join(name for name in wanted if name not in there)
    if missing and (not known or (there and (named or not found))):
        raise ValueError(f"no category {missing}: {contents(folder)}")
    if missing and found:
        print(f"skipped, not in {folder.name}: {missing}")
    return found
