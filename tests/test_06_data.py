"""Pictures, masks and weights of notebook 06: where they come from, and what happens when they are missing or damaged."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.stranger import NOWHERE
from tests.web import serving
from tools.cookbook import ROOT

KINDS = {"good": 3, "scratch": 2, "dent": 2}


def png(size=20, mode="RGB", seed=0):
    """Bytes of a PNG of noise."""
    channels = {"RGB": 3, "RGBA": 4, "L": None, "P": None}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size) if channels is None else (size, size, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if channels != 4 else np.dstack([pixels[..., :3], np.full((size, size), 255, np.uint8)])).convert(mode).save(
        buffer, "png"
    )
    return buffer.getvalue()


def mask_png(size=20):
    mask = np.zeros((size, size), np.uint8)
    mask[5:10, 8:14] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "png")
    return buffer.getvalue()


def mvtec(category="bottle", masks=True):
    """{path: bytes} of a category in MVTec AD's layout: 5 training pictures, 7 for testing."""
    files = {f"{category}/train/good/{i:03}.png": png(seed=i) for i in range(5)}
    for offset, (kind, count) in enumerate(KINDS.items()):
        for i in range(count):
            files[f"{category}/test/{kind}/{i:03}.png"] = png(seed=10 * offset + 100 + i)
            if masks and kind != "good":
                files[f"{category}/ground_truth/{kind}/{i:03}_mask.png"] = mask_png()
    return files


def write(folder, files):
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def archive_of(files, prefix=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, raw in {"license.txt": b"CC BY-NC-SA 4.0", **files}.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


ARCHIVE = archive_of({**mvtec("bottle"), **mvtec("cable", masks=False)})


@pytest.fixture
def tiny(nb06, monkeypatch):
    """Notebook 06 for which a tiny archive is the known one."""
    monkeypatch.setattr(nb06, "ARCHIVE_SHA256", hashlib.sha256(ARCHIVE).hexdigest())
    return nb06


@pytest.fixture
def web():
    """(URL of a server, what it was asked for): /right, /wrong, /cut, else 404."""
    pages = {"/right": ARCHIVE, "/wrong": b"<html>moved</html>", "/cut": ARCHIVE[:100]}
    with serving(pages, {"/right": len(ARCHIVE), "/cut": len(ARCHIVE)}) as address:
        yield address


@pytest.fixture(autouse=True)
def root(nb06, tmp_path, monkeypatch):
    """The data folder of the notebook is the test's."""
    monkeypatch.setenv("COOKBOOK_DATA", str(tmp_path))
    monkeypatch.delenv("COOKBOOK_PRESET", raising=False)
    monkeypatch.setattr(nb06, "PRESET", "cpu")


def no_network(monkeypatch, notebook):
    monkeypatch.setattr(notebook, "download", lambda *_: pytest.fail("asked the network"))


# --- reading a category


def test_a_category(nb06, tmp_path):
    write(tmp_path, mvtec())
    category = nb06.read_category(tmp_path / "bottle", 20)
    assert (category.name, category.source, category.files) == ("bottle", "MVTec AD", "20 × 20")
    assert category.train.shape == (5, 3, 20, 20)
    assert category.train.dtype == torch.uint8
    assert category.kinds == ("dent",) * 2 + ("good",) * 3 + ("scratch",) * 2
    assert category.defective.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    expected = np.asarray(Image.open(tmp_path / "bottle/test/good/001.png"))
    assert np.array_equal(category.test[3].permute(1, 2, 0).numpy(), expected)
    assert not category.masks[2:5].any()
    assert category.masks[0].sum() == category.masks[6].sum() == 30
    assert category.masks[0, 5:10, 8:14].all()


def test_resizing_and_cropping_are_the_same_for_pictures_and_masks(nb06, tmp_path):
    write(tmp_path, mvtec())
    half = nb06.read_category(tmp_path / "bottle", 10)
    assert half.train.shape[-1] == half.masks.shape[-1] == 10
    whole, middle = nb06.read_category(tmp_path / "bottle", 40), nb06.read_category(tmp_path / "bottle", 40, crop=30)
    assert torch.equal(middle.test, whole.test[..., 5:35, 5:35])
    assert np.array_equal(middle.masks, whole.masks[:, 5:35, 5:35])
    assert whole.masks[0].sum() == 4 * 30


def test_at_most_so_many_pictures_are_read(nb06, tmp_path):
    write(tmp_path, mvtec())
    category = nb06.read_category(tmp_path / "bottle", 20, limit=3)
    assert len(category.train) == 3
    assert category.kinds == ("dent",) * 2 + ("good",) * 2 + ("scratch",) * 2
    assert nb06.some("dacb", 2) == ["a", "c"]
    assert nb06.some("dacb", None) == ["a", "b", "c", "d"]


def test_pictures_of_any_size_and_mode(nb06, tmp_path):
    write(tmp_path, mvtec())
    for i, (size, mode) in enumerate([(33, "RGB"), (20, "L"), (25, "RGBA"), (20, "P")]):
        (tmp_path / f"bottle/train/good/{i:03}.png").write_bytes(png(size, mode))
    category = nb06.read_category(tmp_path / "bottle", 20)
    assert category.train.shape == (5, 3, 20, 20)
    assert category.files == "20 × 20 to 33 × 33"
    grey = category.train[1]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("name", ["train/good/002.png", "test/scratch/001.png", "ground_truth/dent/000_mask.png"])
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"not a picture"])
def test_a_damaged_picture_is_named(nb06, tmp_path, name, damage):
    files = mvtec()
    write(tmp_path, files | {f"bottle/{name}": damage(files[f"bottle/{name}"])})
    with pytest.raises(ValueError, match=rf"{name} is damaged or no picture .*: remove it, or fetch the data again"):
        nb06.read_category(tmp_path / "bottle", 20)


def test_sixteen_bits_are_refused(nb06, tmp_path):
    write(tmp_path, mvtec())
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "bottle/train/good/000.png")
    with pytest.raises(ValueError, match=r"000.png .*convert it to 8 bits"):
        nb06.read_category(tmp_path / "bottle", 20)


def test_a_category_without_masks(nb06, tmp_path, monkeypatch, capsys):
    no_network(monkeypatch, nb06)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("transistor", masks=False))
    (category,) = nb06.load(tmp_path, ("transistor",), (), 20)
    assert category.masks is None
    assert "transistor has no masks: scores of pictures only" in capsys.readouterr().out


def test_a_single_mask_that_is_missing_is_named(nb06, tmp_path):
    write(tmp_path, mvtec())
    (tmp_path / "bottle/ground_truth/dent/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"dent/001.png has no mask .*dent/001_mask.png"):
        nb06.read_category(tmp_path / "bottle", 20)


# --- finding and fetching


def test_a_missing_category_lists_those_there(nb06, tmp_path, monkeypatch):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    write(tmp_path / "mvtec_anomaly_detection", {**mvtec("bottle"), **mvtec("cable")})
    with pytest.raises(ValueError, match=r"no category metal_nut: .*mvtec_anomaly_detection holds bottle, cable"):
        nb06.load(tmp_path, ("bottle", "metal_nut"), ("http://x",), 20)


def test_a_category_of_ones_own(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("gearwheel"))
    assert nb06.load(tmp_path, ("gearwheel",), (), 20)[0].name == "gearwheel"


def test_all_categories(nb06, tmp_path, monkeypatch):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    monkeypatch.setattr(nb06, "MVTEC_CATEGORIES", ("bottle", "cable"))
    write(tmp_path / "mvtec_anomaly_detection", mvtec("cable"))
    with pytest.raises(ValueError, match=r"no category bottle: .* holds cable"):
        nb06.load(tmp_path, ("all",), ("http://x",), 20)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("bottle"))
    assert [c.name for c in nb06.load(tmp_path, ("all",), ("http://x",), 20)] == ["bottle", "cable"]


def test_download_of_the_categories_wanted(tiny, web, tmp_path, capsys):
    """Addresses are tried in order; what is missing, cut or something else is said and passed over."""
    url, asked = web
    urls = (f"{NOWHERE}/x", f"{url}/gone", f"{url}/cut", f"{url}/wrong", f"{url}/right", f"{url}/never")
    (category,) = tiny.load(tmp_path, ("bottle",), urls, 20)
    assert len(category.train) == 5
    said = capsys.readouterr().out
    assert said.count("could not download") == 4
    assert said.count("invalid hash value") == 2
    assert "/never" not in asked
    folder = tmp_path / "mvtec_anomaly_detection"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == set(mvtec("bottle"))
    assert not list(tmp_path.glob("*.part"))
    (other,) = tiny.load(tmp_path, ("cable",), (), 20)  # out of the archive that was kept
    assert other.masks is None


def test_all_categories_are_fetched(tiny, web, tmp_path, monkeypatch):
    """Those that are there already are left alone."""
    monkeypatch.setattr(tiny, "MVTEC_CATEGORIES", ("bottle", "cable"))
    tiny.load(tmp_path, ("cable",), (f"{web[0]}/right",), 20)
    assert [c.name for c in tiny.load(tmp_path, ("all",), (f"{web[0]}/right",), 20)] == ["bottle", "cable"]


def test_an_archive_with_a_folder_around_it(tiny, tmp_path):
    (tmp_path / "a.tar.xz").write_bytes(archive_of(mvtec("bottle"), "mvtec/"))
    tiny.unpack(tmp_path / "a.tar.xz", tmp_path / "d", ["bottle"])
    assert len(list((tmp_path / "d/bottle").rglob("*.png"))) == len(mvtec("bottle"))


def test_what_an_interrupted_attempt_left_is_not_taken_up(tiny, tmp_path):
    write(tmp_path / "d/part", {"cable/train/good/000.png": b"half"})
    (tmp_path / "a.tar.xz").write_bytes(ARCHIVE)
    tiny.unpack(tmp_path / "a.tar.xz", tmp_path / "d", ["bottle"])
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["bottle"]


def test_a_damaged_archive_is_named(tiny, tmp_path):
    (tmp_path / "mvtec_anomaly_detection.tar.xz").write_bytes(ARCHIVE[:-200])
    with pytest.raises(ValueError, match=r"mvtec_anomaly_detection.tar.xz is corrupt or incomplete .*: delete it"):
        tiny.load(tmp_path, ("bottle",), (), 20)
    assert tiny.categories_in(tmp_path / "mvtec_anomaly_detection") == []


def test_a_category_that_does_not_exist_is_not_downloaded(nb06, tmp_path, monkeypatch):
    """And what is said is what lies there, not what MVTec AD would have."""
    no_network(monkeypatch, nb06)
    with pytest.raises(ValueError, match=r"no category botle, cable: there is no folder .*mvtec_anomaly_detection"):
        nb06.load(tmp_path, ("botle", "cable"), ("http://x",), 20)


def test_a_category_of_the_preset_that_is_not_there_is_skipped(nb06, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("bottle"))
    (category,) = nb06.load(tmp_path, ("bottle", "metal_nut"), ("http://x",), 20, named=False)
    assert category.name == "bottle"
    assert "skipped, not in mvtec_anomaly_detection: metal_nut" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no category metal_nut: .* holds bottle"):
        nb06.load(tmp_path, ("metal_nut",), ("http://x",), 20, named=False)


def test_an_archive_cannot_write_elsewhere(nb06, tmp_path, monkeypatch):
    outside = "bottle/train/" + "../" * 9 + f"{tmp_path.relative_to('/')}/x.png"
    archive = archive_of({**mvtec("bottle"), outside: b"x"})
    (tmp_path / "a.tar.xz").write_bytes(archive)
    with pytest.raises(ValueError, match=r"could not unpack .*outside the destination"):
        nb06.unpack(tmp_path / "a.tar.xz", tmp_path / "d", ["bottle"])
    assert not (tmp_path / "x.png").exists()
    assert nb06.categories_in(tmp_path / "d") == []


# --- garments


@pytest.fixture
def sets():
    """Two labels of 28 x 28 pictures with a grey square in the middle: 9 for training and 9 for testing of each."""
    images = torch.zeros(18, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 6:22, 6:22] = torch.arange(100, 190, 5, dtype=torch.uint8).view(18, 1, 1, 1)
    return {part: (images, torch.arange(18) % 2) for part in ("train", "test")}


def test_garments(nb06, sets):
    """A defect changes its mask and nothing else; good ones are untouched; the same every time."""
    category = nb06.garments(sets, "boot", 1, 56)
    assert (category.name, category.source, category.files) == ("boot", "Fashion-MNIST", "28 × 28")
    assert category.kinds == ("good",) * 3 + ("hole",) * 3 + ("scratch",) * 3
    assert category.train.shape == category.test.shape == (9, 3, 56, 56)
    assert (category.masks.any((1, 2)) == category.defective).all()
    grey = category.test[:, 0].numpy()
    for index, (picture, mask) in enumerate(zip(grey, category.masks, strict=True)):
        clean = category.train[index, 0].numpy()  # the same pictures
        assert np.array_equal(picture[~mask], clean[~mask])
        assert (picture[mask] != clean[mask]).all()
        assert mask.mean() < 0.02
    assert (grey[3:6][category.masks[3:6]] == 0).all()
    again = nb06.garments(sets, "boot", 1, 56)
    assert torch.equal(again.test, category.test)
    middle = nb06.garments(sets, "boot", 1, 56, crop=48)
    assert torch.equal(middle.train, category.train[..., 4:52, 4:52])
    assert len(nb06.garments(sets, "boot", 1, 56, limit=6).train) == 6


def test_garments_where_there_is_no_mvtec(nb06, tmp_path, monkeypatch, capsys, sets):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    monkeypatch.setattr(nb06, "load_images", lambda name: {p: (i, (n % 2) + 8) for p, (i, n) in sets.items()})
    boot, bag = nb06.load(tmp_path, ("bottle",), ("http://x",), 24)
    assert (boot.name, bag.name) == ("boot", "bag")
    said = capsys.readouterr().out
    assert "NO MVTEC AD: there is no folder" in said
    assert "BOOTS AND BAGS" in said


# --- situations that users of similar software met


def edit(tmp_path, name, change):
    """Read a picture of the category, change it, and save it in its place."""
    path = tmp_path / "bottle" / name
    change(Image.open(path)).save(path)
    return path


def masks_of(nb06, tmp_path):
    return nb06.read_category(tmp_path / "bottle", 20).masks


@pytest.mark.parametrize("draw", ["ones", "red", "blue", "binary", "palette", "transparent"])
def test_masks_of_any_encoding(nb06, tmp_path, draw):
    """F1: what is not 0 is defect, in whatever colour it is drawn."""
    write(tmp_path, mvtec())
    right = masks_of(nb06, tmp_path)
    on = right[0]
    coloured = lambda colour: Image.fromarray((on[..., None] * np.array(colour)).astype(np.uint8))
    images = {
        "ones": Image.fromarray(on.astype(np.uint8)), "red": coloured((255, 0, 0)), "blue": coloured((0, 0, 40)),
        "binary": Image.fromarray(on), "palette": coloured((128, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE),
        "transparent": Image.fromarray(np.dstack([np.full((20, 20, 3), 255), on * 255]).astype(np.uint8)),
    }  # fmt: skip
    for kind in ("dent", "scratch"):
        for i in range(2):
            images[draw].save(tmp_path / f"bottle/ground_truth/{kind}/{i:03}_mask.png")
    assert np.array_equal(masks_of(nb06, tmp_path), right)


def test_an_empty_mask_of_a_defect_is_named(nb06, tmp_path):
    """F1."""
    write(tmp_path, mvtec())
    Image.new("L", (20, 20)).save(tmp_path / "bottle/ground_truth/scratch/001_mask.png")
    with pytest.raises(ValueError, match=r"scratch/001_mask.png is empty, but .*scratch/001.png lies in a folder of defects"):
        masks_of(nb06, tmp_path)


def test_hidden_files_and_folders_are_no_data(nb06, tmp_path):
    """F2."""
    write(tmp_path, mvtec())
    hidden = {f"bottle/test/.ipynb_checkpoints/{i:03}-checkpoint.png": png(seed=i) for i in range(3)}
    hidden |= {f"bottle/{part}/._000.png": b"no picture" for part in ("train/good", "test/good", "test/dent")}
    hidden |= {"bottle/train/good/.ipynb_checkpoints/000.png": png(), "bottle/test/Thumbs.db": b"x", "bottle/test/.DS_Store": b"x"}
    right = nb06.read_category(tmp_path / "bottle", 20)
    write(tmp_path, hidden)
    found = nb06.read_category(tmp_path / "bottle", 20)
    assert found.kinds == right.kinds
    assert torch.equal(found.train, right.train)


def rotated(path, pixels):
    """A photograph whose camera lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)


def test_rotation_is_applied(nb06, tmp_path):
    """F3: a picture of 30 x 20 that says it is 20 x 30 fits its mask of 20 x 30."""
    write(tmp_path, mvtec())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    rotated(tmp_path / "bottle/test/dent/000.png", pixels)
    mask = np.zeros((30, 20), np.uint8)
    mask[20:, :5] = 255
    Image.fromarray(mask).save(tmp_path / "bottle/ground_truth/dent/000_mask.png")
    category = nb06.read_category(tmp_path / "bottle", 20)
    upright = Image.fromarray(np.rot90(pixels, -1).copy()).resize((20, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(category.test[0].permute(1, 2, 0).numpy(), np.asarray(upright))
    assert category.masks[0, 15:, :4].all()
    assert not category.masks[0, :12].any()


def test_a_mask_of_another_size_is_named(nb06, tmp_path):
    """F3."""
    write(tmp_path, mvtec())
    (tmp_path / "bottle/ground_truth/dent/001_mask.png").write_bytes(mask_png(24))
    with pytest.raises(ValueError, match=r"dent/001_mask.png has \(24, 24\) pixels, .*dent/001.png has \(20, 20\)"):
        masks_of(nb06, tmp_path)


def test_too_few_pictures_are_said_when_reading(nb06, tmp_path):
    """F11: 15 good ones, 1 defective and 2 good ones for testing."""
    files = {f"bottle/train/good/{i}.png": png(seed=i) for i in range(15)}
    files |= {"bottle/test/good/0.png": png(), "bottle/test/good/1.png": png(), "bottle/test/dent/0.png": png()}
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"has 15 in train/good, 2 in test/good, 1 of defects in test, needs 3 of each; .*bottle holds"):
        nb06.read_category(tmp_path / "bottle", 20)


@pytest.mark.parametrize("part", ["train", "test/good", "test/d"])
def test_a_category_that_is_not_whole(nb06, tmp_path, part):
    left = {name: raw for name, raw in mvtec().items() if not name.startswith((f"bottle/{part}", "bottle/test/scratch"))}
    write(tmp_path, left)
    with pytest.raises(ValueError, match=r"bottle lacks pictures, has \d in train/good"):
        nb06.read_category(tmp_path / "bottle", 20)


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".PNG", ".bmp", ".tif", ".TIFF", ".webp"])
def test_pictures_of_any_format(nb06, tmp_path, suffix):
    """F14: pictures may have other endings than masks."""
    write(tmp_path, mvtec())
    right = nb06.read_category(tmp_path / "bottle", 20)
    for path in [*(tmp_path / "bottle/train").rglob("*.png"), *(tmp_path / "bottle/test").rglob("*.png")]:
        Image.open(path).save(path.with_suffix(suffix))
        if suffix != ".PNG" or path.with_suffix(suffix) != path:
            path.unlink()
    found = nb06.read_category(tmp_path / "bottle", 20)
    assert found.kinds == right.kinds
    assert np.array_equal(found.masks, right.masks)
    assert (found.train.float() - right.train.float()).abs().mean() < 60  # lossy formats of noise


def test_transparent_pixels_are_white_and_it_is_said_once(nb06, tmp_path, capsys):
    """F18: the colours under alpha 0 do not count."""
    write(tmp_path, mvtec())
    for i in range(3):
        pixels = np.full((20, 20, 4), 10, np.uint8)
        pixels[:, :10, 3] = 255
        pixels[:, 10:, 3] = 0
        Image.fromarray(pixels).save(tmp_path / f"bottle/train/good/{i:03}.png")
    category = nb06.read_category(tmp_path / "bottle", 20)
    assert (category.train[0, :, :, :9] < 30).all()
    assert (category.train[0, :, :, 11:] > 225).all()
    assert capsys.readouterr().out.count("transparent pixels are read as white") == 1


def test_old_numpy_has_no_trapezoid(nb06, monkeypatch):
    """F20: NumPy 1.26."""
    monkeypatch.delattr(np, "trapezoid", raising=False)
    monkeypatch.delattr(np, "trapz", raising=False)
    masks = np.zeros((1, 10, 10), bool)
    masks[0, :2, :2] = True
    assert nb06.pro_score(masks, masks.astype(float)) == pytest.approx(1)


def test_a_data_folder_one_level_too_deep(nb06, tmp_path, monkeypatch):
    """F24: what is said names the folder looked into and what lies there."""
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("gearwheel"))
    with pytest.raises(ValueError, match=r"no category gearwheel: there is no folder .*/gearwheel/mvtec_anomaly_detection"):
        nb06.load(tmp_path / "mvtec_anomaly_detection/gearwheel", ("gearwheel",), (), 20)
    with pytest.raises(ValueError, match=r"no category bottle: .*mvtec_anomaly_detection holds gearwheel"):
        nb06.load(tmp_path, ("bottle",), (), 20)
    with pytest.raises(ValueError, match=r"nothing lacks pictures, has 0 in train/good.*there is no folder .*nothing"):
        nb06.read_category(tmp_path / "nothing", 20)


# --- weights


def test_weights_are_downloaded(nb06, tmp_path, monkeypatch):
    asked = []
    fake = lambda path, urls, digest: asked.append((urls[0], path.name, digest)) or "mobilenet" in path.name
    monkeypatch.setattr(nb06, "download", fake)
    assert nb06.choose_backbone(tmp_path, "auto", "cpu")[0] == "mobilenet_v2"
    assert asked[0] == ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "resnet18-f37072fd.pth", "f37072fd")
    assert asked[1][2] == "b0353104"
    monkeypatch.setattr(nb06, "download", lambda path, urls, digest: asked.append(urls) and False)
    with pytest.raises(FileNotFoundError, match=r"save https://\S+ as .*mobilenet_v2-b0353104.pth.*COOKBOOK_DATA"):
        nb06.choose_backbone(tmp_path, "auto", "smoke")
    with pytest.raises(FileNotFoundError, match="wide_resnet50_2"):
        nb06.choose_backbone(tmp_path, "wide_resnet50_2", "cpu")
    assert len(asked) == 5


def test_damaged_weights_are_named(nb06, tmp_path):
    path = tmp_path / "mobilenet_v2-b0353104.pth"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"mobilenet_v2-b0353104.pth is corrupt or incomplete \(11 bytes\): delete it"):
        nb06.Extractor("mobilenet_v2", path)


def test_embedded_weights(nb06, monkeypatch):
    no_network(monkeypatch, nb06)
    name, path = nb06.choose_backbone(ROOT / "data", "auto", "smoke")
    assert name == "mobilenet_v2"
    maps = nb06.Extractor(name, path)(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8))
    assert [m.shape[1] for m in maps] == [24, 32, 96]


def test_resnet18_comes_first(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    for backbone in nb06.BACKBONES.values():
        write(tmp_path / "torch/checkpoints", {backbone.file: b"x"})
    assert nb06.choose_backbone(tmp_path, "auto", "cpu")[0] == "resnet18"
    assert nb06.choose_backbone(tmp_path, "mobilenet_v2", "cpu")[0] == "mobilenet_v2"


def test_smoke_takes_the_weights_that_are_there(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    write(tmp_path / "torch/checkpoints", {"mobilenet_v2-b0353104.pth": b"x"})
    assert nb06.choose_backbone(tmp_path, "auto", "smoke")[0] == "mobilenet_v2"


def test_an_unknown_backbone_lists_the_known_ones(nb06, tmp_path):
    with pytest.raises(ValueError, match="'vgg' is unknown; choose one of: auto, resnet18, mobilenet_v2, wide_resnet50_2"):
        nb06.choose_backbone(tmp_path, "vgg", "cpu")
