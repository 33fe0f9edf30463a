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
    (category,) = nb06.load(tmp_path, ("transistor",), "cpu", (), 20)
    assert category.masks is None
    assert "transistor has no masks: scores of pictures only" in capsys.readouterr().out


def test_a_single_mask_that_is_missing_is_named(nb06, tmp_path):
    write(tmp_path, mvtec())
    (tmp_path / "bottle/ground_truth/dent/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"dent/001.png has no mask .*dent/001_mask.png"):
        nb06.read_category(tmp_path / "bottle", 20)


@pytest.mark.parametrize("part", ["train", "test/good", "test/[sd]"])
def test_a_category_that_is_not_whole(nb06, tmp_path, part):
    write(tmp_path, {name: raw for name, raw in mvtec().items() if not any(name.startswith(f"bottle/{p}") for p in part_names(part))})
    (tmp_path / "bottle").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"bottle lacks pictures in train/good, test/good or of a defect"):
        nb06.read_category(tmp_path / "bottle", 20)


def part_names(part):
    return ("test/scratch", "test/dent") if part == "test/[sd]" else (part,)


# --- finding and fetching


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
def test_a_missing_category_lists_those_there(nb06, tmp_path, monkeypatch, preset):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    write(tmp_path / "mvtec_anomaly_detection", {**mvtec("bottle"), **mvtec("cable")})
    with pytest.raises(ValueError, match=r"no category metal_nut in .*; there are: bottle, cable"):
        nb06.load(tmp_path, ("bottle", "metal_nut"), preset, ("http://x",), 20)


def test_a_category_that_does_not_exist_is_not_downloaded(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    with pytest.raises(ValueError, match=r"no category botle in .*; there are: bottle, cable, capsule, .*zipper"):
        nb06.load(tmp_path, ("botle", "cable"), "cpu", ("http://x",), 20)


def test_a_category_of_ones_own(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("gearwheel"))
    assert nb06.load(tmp_path, ("gearwheel",), "cpu", (), 20)[0].name == "gearwheel"


def test_all_categories(nb06, tmp_path, monkeypatch):
    monkeypatch.setattr(nb06, "download", lambda *_: False)
    monkeypatch.setattr(nb06, "MVTEC_CATEGORIES", ("bottle", "cable"))
    write(tmp_path / "mvtec_anomaly_detection", mvtec("cable"))
    with pytest.raises(ValueError, match=r"no category bottle in .*; there are: cable"):
        nb06.load(tmp_path, ("all",), "cpu", ("http://x",), 20)
    write(tmp_path / "mvtec_anomaly_detection", mvtec("bottle"))
    assert [c.name for c in nb06.load(tmp_path, ("all",), "cpu", ("http://x",), 20)] == ["bottle", "cable"]


def test_download_of_the_categories_wanted(tiny, web, tmp_path, capsys):
    """Addresses are tried in order; what is missing, cut or something else is said and passed over."""
    url, asked = web
    urls = ("", f"{NOWHERE}/x", f"{url}/gone", f"{url}/cut", f"{url}/wrong", f"{url}/right", f"{url}/never")
    (category,) = tiny.load(tmp_path, ("bottle",), "cpu", urls, 20)
    assert len(category.train) == 5
    said = capsys.readouterr().out
    assert said.count("could not download") == 3
    assert f"the connection ended after 100 of {len(ARCHIVE):,} bytes" in said
    assert said.count("sent something else") == 1
    assert "/never" not in asked
    folder = tmp_path / "mvtec_anomaly_detection"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == set(mvtec("bottle"))
    assert not list(tmp_path.glob("*.part"))
    (other,) = tiny.load(tmp_path, ("cable",), "cpu", (), 20)  # out of the archive that was kept
    assert other.masks is None


def test_all_categories_are_fetched(tiny, web, tmp_path, monkeypatch):
    """Those that are there already are left alone."""
    monkeypatch.setattr(tiny, "MVTEC_CATEGORIES", ("bottle", "cable"))
    tiny.load(tmp_path, ("cable",), "cpu", (f"{web[0]}/right",), 20)
    assert [c.name for c in tiny.load(tmp_path, ("all",), "cpu", (f"{web[0]}/right",), 20)] == ["bottle", "cable"]


def test_an_archive_with_a_folder_around_it(tiny, tmp_path):
    (tmp_path / "a.tar.xz").write_bytes(archive_of(mvtec("bottle"), "mvtec/"))
    tiny.unpack(tmp_path / "a.tar.xz", tmp_path / "d", ["bottle"])
    assert len(list((tmp_path / "d/bottle").rglob("*.png"))) == len(mvtec("bottle"))


def test_what_an_interrupted_attempt_left_is_not_taken_up(tiny, tmp_path):
    write(tmp_path / "d/part", {"cable/train/good/000.png": b"half"})
    (tmp_path / "a.tar.xz").write_bytes(ARCHIVE)
    tiny.unpack(tmp_path / "a.tar.xz", tmp_path / "d", ["bottle"])
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["bottle"]


def test_an_archive_cannot_write_elsewhere(nb06, tmp_path, monkeypatch):
    outside = "bottle/train/" + "../" * 9 + f"{tmp_path.relative_to('/')}/x.png"
    (tmp_path / "root").mkdir()
    archive = archive_of({**mvtec("bottle"), outside: b"x"})
    (tmp_path / "root/mvtec_anomaly_detection.tar.xz").write_bytes(archive)
    monkeypatch.setattr(nb06, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    with pytest.raises(ValueError, match=r"could not unpack .*outside the destination"):
        nb06.fetch(tmp_path / "root", ["bottle"], ())
    assert not (tmp_path / "x.png").exists()


def test_a_damaged_archive_is_named(tiny, tmp_path):
    (tmp_path / "mvtec_anomaly_detection.tar.xz").write_bytes(ARCHIVE[:-200])
    with pytest.raises(ValueError, match=r"mvtec_anomaly_detection.tar.xz is corrupt, incomplete or another version .*: delete it"):
        tiny.load(tmp_path, ("bottle",), "cpu", (), 20)
    assert tiny.categories_in(tmp_path / "mvtec_anomaly_detection") == []


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tiny, web, tmp_path, capsys):
    (tmp_path / "file").touch()
    (category,) = tiny.load(tmp_path / "file", ("bottle",), "cpu", (f"{web[0]}/right",), 24, limit=4)
    assert category.source == "synthetic"
    assert "could not download" in capsys.readouterr().out


def test_smoke_asks_no_network(nb06, tmp_path, monkeypatch, capsys):
    no_network(monkeypatch, nb06)
    (category,) = nb06.load(tmp_path, ("bottle",), "smoke", ("http://x",), 24, limit=4)
    assert category.source == "synthetic"
    assert "SYNTHETIC PARTS drawn by this notebook" in capsys.readouterr().out


# --- drawn parts


@pytest.mark.parametrize("kind", ["hole", "missing_piece", "scratch"])
def test_a_defect_changes_its_mask_and_little_else(nb06, kind):
    for seed in range(5):
        picture, mask = nb06.draw_part(np.random.default_rng(seed), 96, kind)
        again, _ = nb06.draw_part(np.random.default_rng(seed), 96, kind)
        assert np.array_equal(picture, again)
        assert picture.shape == (96, 96, 3)
        assert 0 < mask.mean() < 0.06
        grey = picture.mean(-1) / 255
        if kind == "scratch":
            assert grey[mask].mean() > 0.6
        else:
            assert grey[mask].mean() < 0.4


def test_good_parts_have_no_mask_and_differ(nb06):
    rng = np.random.default_rng(0)
    (first, mask), (second, _) = nb06.draw_part(rng, 64), nb06.draw_part(rng, 64)
    assert not mask.any()
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="no defect 'rust'; there are: hole, missing_piece, scratch"):
        nb06.draw_part(rng, 64, "rust")


def test_synthetic_category(nb06):
    """The same parts at every size."""
    category = nb06.synthetic_category(48, limit=3)
    larger = torch.nn.functional.avg_pool2d(nb06.synthetic_category(96, limit=3).test.float(), 2)
    assert (larger - category.test.float()).abs().mean() < 3
    assert category.kinds == ("good",) * 3 + ("hole",) * 3 + ("missing_piece",) * 3 + ("scratch",) * 3
    assert (category.masks.any((1, 2)) == category.defective).all()
    middle = nb06.synthetic_category(48, 40, 3)
    assert torch.equal(middle.test, category.test[..., 4:44, 4:44])
    assert torch.equal(nb06.reread(category, None, 48, 40, 3).train, middle.train)
    assert torch.equal(nb06.synthetic_category(48, limit=3).train, category.train)


def test_reread(nb06, tmp_path):
    write(tmp_path / "mvtec_anomaly_detection", mvtec())
    category = nb06.read_category(tmp_path / "mvtec_anomaly_detection" / "bottle", 20)
    again = nb06.reread(category, tmp_path, 24, 20, None)
    assert again.train.shape == category.train.shape
    assert not torch.equal(again.train, category.train)


# --- weights


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


def test_weights_are_downloaded(nb06, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(nb06, "download", lambda url, path, digest: asked.append((url, path.name, digest)) or "mobilenet" in url)
    assert nb06.choose_backbone(tmp_path, "auto", "cpu")[0] == "mobilenet_v2"
    assert asked[0] == ("https://download.pytorch.org/models/resnet18-f37072fd.pth", "resnet18-f37072fd.pth", "f37072fd")
    assert asked[1][2] == "b0353104"
    monkeypatch.setattr(nb06, "download", lambda url, path, digest: asked.append(url) and False)
    with pytest.raises(
        FileNotFoundError, match=r"no weights of mobilenet_v2: save https://\S+ as .*mobilenet_v2-b0353104.pth.*COOKBOOK_DATA"
    ):
        nb06.choose_backbone(tmp_path, "auto", "smoke")
    with pytest.raises(FileNotFoundError, match="no weights of wide_resnet50_2"):
        nb06.choose_backbone(tmp_path, "wide_resnet50_2", "cpu")
    assert len(asked) == 5


def test_smoke_takes_the_weights_that_are_there(nb06, tmp_path, monkeypatch):
    no_network(monkeypatch, nb06)
    write(tmp_path / "torch/checkpoints", {"mobilenet_v2-b0353104.pth": b"x"})
    assert nb06.choose_backbone(tmp_path, "auto", "smoke")[0] == "mobilenet_v2"


def test_damaged_weights_are_named(nb06, tmp_path):
    path = tmp_path / "mobilenet_v2-b0353104.pth"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"mobilenet_v2-b0353104.pth is corrupt or incomplete \(11 bytes\): delete it"):
        nb06.Extractor("mobilenet_v2", path)


def test_an_unknown_backbone_lists_the_known_ones(nb06, tmp_path):
    with pytest.raises(ValueError, match="'vgg' is unknown; choose one of: auto, resnet18, mobilenet_v2, wide_resnet50_2"):
        nb06.choose_backbone(tmp_path, "vgg", "cpu")
