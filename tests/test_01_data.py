"""Where notebook 01 finds MNIST and CIFAR-10, and what it says where they are missing or damaged."""

import gzip
import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.stranger import NOWHERE
from tests.web import serving
from tools import cookbook, make_data

DATA = cookbook.ROOT / "data"
SETS = ("MNIST", "cifar-10-batches-bin")


def content_of(name, count=20):
    """A small file of the right format: its bytes, unpacked."""
    source = np.random.default_rng(len(name) + sum(name.encode()))
    labels = np.arange(count, dtype=np.uint8) % 10
    if name.startswith("cifar"):
        return np.hstack([labels[:, None], source.integers(0, 256, (count, 3072)).astype(np.uint8)]).tobytes()
    return make_data.idx_bytes(labels if "labels" in name else source.integers(0, 256, (count, 28, 28)).astype(np.uint8))


@pytest.fixture
def tiny(nb01, monkeypatch):
    """Notebook 01 for which tiny files are the known ones."""
    monkeypatch.setattr(nb01, "SHA256", {name: hashlib.sha256(content_of(name)).hexdigest() for name in nb01.SHA256})
    packed = {name: pack(name) for name in nb01.EMBEDDED_SHA256}
    monkeypatch.setattr(nb01, "EMBEDDED_SHA256", {name: hashlib.sha256(raw).hexdigest() for name, raw in packed.items()})
    return nb01


def pack(name):
    """Bytes of an embedded file, with ten examples."""
    inner = name.rpartition(".")[0]
    raw = content_of(inner, 10)
    return gzip.compress(raw, mtime=0) if name.endswith(".gz") else lzma.compress(raw)


def write(folder, files):
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def full(nb01, data_set):
    return {name: content_of(name) for name in nb01.SHA256 if name.startswith(data_set)}


def embedded(nb01, data_set):
    return {name: pack(name) for name in nb01.EMBEDDED_SHA256 if name.startswith(data_set)}


def archive_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


@pytest.fixture
def web(tiny):
    """URL of a server on the loopback interface with both data sets, whole, cut and with other content."""
    pages = {"/right/cifar.tar.gz": archive_of(full(tiny, "cifar"))}
    pages["/cut/cifar.tar.gz"] = pages["/right/cifar.tar.gz"][:-500]
    pages["/other/cifar.tar.gz"] = archive_of({name: b"other" for name in full(tiny, "cifar")})
    pages["/less/cifar.tar.gz"] = archive_of({"cifar-10-batches-bin/readme.html": b"hello"})
    pages["/text/cifar.tar.gz"] = b"<html>moved</html>"
    for name, raw in full(tiny, "MNIST").items():
        base = Path(name).name
        pages[f"/right/{base}.gz"], pages[f"/cut/{base}.gz"] = gzip.compress(raw), gzip.compress(raw)[:-20]
        pages[f"/other/{base}.gz"], pages[f"/text/{base}.gz"] = gzip.compress(b"other"), b"<html>moved</html>"
    with serving(pages) as address:
        yield address


def serve(tiny, monkeypatch, url, *places):
    """Let the notebook's addresses be these of the server."""
    monkeypatch.setattr(tiny, "URLS", {"MNIST": tuple(f"{url}/{place}/" for place in places),
                                       "cifar-10-batches-bin": tuple(f"{url}/{place}/cifar.tar.gz" for place in places)})  # fmt: skip


# --- the formats


def test_hashes_of_embedded_files_are_those_of_the_data_folder(nb01):
    for name, digest in nb01.EMBEDDED_SHA256.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
        assert f"{digest}  {name}" in (DATA / "README.md").read_text()
    assert {name.rpartition(".")[0] for name in nb01.EMBEDDED_SHA256} < set(nb01.SHA256)


@pytest.mark.parametrize("data_set", SETS)
def test_embedded_data(nb01, data_set, monkeypatch, capsys):
    monkeypatch.setattr(nb01, "fetch", lambda *_: pytest.fail("asked the network"))
    loaded = nb01.load(DATA, data_set, "smoke")
    assert f"EMBEDDED SUBSET of {data_set}" in capsys.readouterr().out
    shape, counts = ((1, 28, 28), (10_000, 2_000)) if data_set == "MNIST" else ((3, 32, 32), (5_000, 1_000))
    for (x, y), count in zip((loaded["train"], loaded["test"]), counts, strict=True):
        assert x.shape == (count, *shape)
        assert y.shape == (count,)
        assert x.dtype == y.dtype == np.uint8
        assert np.bincount(y).tolist() == [count // 10] * 10


def test_parse(nb01):
    raw = content_of("cifar-10-batches-bin/x", 3)
    x, y = nb01.parse("cifar-10-batches-bin/x", raw)
    assert y.tolist() == [0, 1, 2]
    assert x[1, 2, 5, 7] == raw[3073 + 1 + 2 * 1024 + 5 * 32 + 7]  # record, label, channel, row, column
    (digits,) = nb01.parse("MNIST/raw/images", content_of("MNIST/raw/images", 3))
    assert digits.shape == (3, 1, 28, 28)
    assert digits[2, 0, 3, 4] == content_of("MNIST/raw/images", 3)[16 + 2 * 784 + 3 * 28 + 4]
    assert nb01.parse("MNIST/raw/labels", content_of("MNIST/raw/labels", 3))[0].tolist() == [0, 1, 2]


# --- where data come from


@pytest.mark.parametrize("data_set", SETS)
def test_full_set_comes_first(tiny, data_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "fetch", lambda *_: pytest.fail("asked the network"))
    write(tmp_path, full(tiny, data_set) | embedded(tiny, data_set))
    loaded = tiny.load(tmp_path, data_set, "smoke")
    assert "EMBEDDED" not in capsys.readouterr().out
    assert [len(y) for _, y in loaded.values()] == ([20, 20] if data_set == "MNIST" else [100, 20])
    if data_set != "MNIST":  # the five batches in their order
        assert np.array_equal(loaded["train"][0][40:60], tiny.parse("cifar", content_of("cifar-10-batches-bin/data_batch_3.bin"))[0])


@pytest.mark.parametrize("data_set", SETS)
def test_download(tiny, web, data_set, tmp_path, monkeypatch, capsys):
    """Addresses are tried in order; what is missing, cut, something else or no archive is said and passed over."""
    url, asked = web
    serve(tiny, monkeypatch, url, "gone", "text", "cut", "other", "right", "never")
    monkeypatch.setattr(tiny, "URLS", {key: (f"{NOWHERE}/", *urls) for key, urls in tiny.URLS.items()})
    loaded = tiny.load(tmp_path, data_set, "cpu")
    assert len(loaded["test"][1]) == 20
    said = capsys.readouterr().out
    assert said.count("could not download") == 4
    assert "sent something else" in said
    assert not [path for path in asked if path.startswith("/never")]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(full(tiny, data_set))
    monkeypatch.setattr(tiny, "contents", lambda *_: pytest.fail("asked the network again"))
    assert len(tiny.load(tmp_path, data_set, "cpu")["test"][1]) == 20


def test_archive_without_the_files(tiny, web, tmp_path, monkeypatch, capsys):
    serve(tiny, monkeypatch, web[0], "less")
    assert not tiny.fetch(tmp_path, "cifar-10-batches-bin")
    assert "could not download" in capsys.readouterr().out


@pytest.mark.parametrize("data_set", SETS)
def test_only_what_is_missing_is_fetched(tiny, web, data_set, tmp_path, monkeypatch):
    url, asked = web
    serve(tiny, monkeypatch, url, "right")
    files = full(tiny, data_set)
    missing = next(name for name in files if "t10k-labels" in name or "test_batch" in name)
    write(tmp_path, {name: raw for name, raw in files.items() if name != missing})
    assert tiny.fetch(tmp_path, data_set)
    assert len(asked) == 1
    assert (tmp_path / missing).read_bytes() == files[missing]


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tiny, web, tmp_path, monkeypatch, capsys):
    serve(tiny, monkeypatch, web[0], "right")
    (tmp_path / "file").touch()
    assert not tiny.fetch(tmp_path / "file", "MNIST")
    assert "could not download" in capsys.readouterr().out


@pytest.mark.parametrize("data_set", SETS)
def test_embedded_set_without_a_network(tiny, data_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "fetch", lambda *_: False)
    write(tmp_path, embedded(tiny, data_set))
    assert [len(y) for _, y in tiny.load(tmp_path, data_set, "cpu").values()] == [10, 10]
    assert f"EMBEDDED SUBSET of {data_set}" in capsys.readouterr().out


@pytest.mark.parametrize("data_set", SETS)
def test_no_data_at_all(nb01, data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(nb01, "fetch", lambda *_: False)
    with pytest.raises(FileNotFoundError, match=rf"no {data_set}: .*https://\S+ .*(t10k-labels|test_batch).*COOKBOOK_DATA"):
        nb01.load(tmp_path, data_set, "smoke")


@pytest.mark.parametrize("data_set", SETS)
@pytest.mark.parametrize("kind", [full, embedded])
def test_a_damaged_file_is_named(tiny, data_set, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "fetch", lambda *_: False)
    for damage in (lambda raw: raw[:-3], lambda raw: raw[:50] + b"x" + raw[51:], lambda raw: b""):
        files = kind(tiny, data_set)
        name = list(files)[-1]
        write(tmp_path, files | {name: damage(files[name])})
        with pytest.raises(ValueError, match=rf"{Path(name).name} is corrupt, incomplete or another version \([\d,]+ bytes\): remove it"):
            tiny.load(tmp_path, data_set, "cpu")
