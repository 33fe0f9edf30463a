"""The embedded data: what data/README.md says of them is so."""

import hashlib
import re

import numpy as np
import pytest
import torch

from tools import cookbook, make_data

DATA = cookbook.ROOT / "data"
README = (DATA / "README.md").read_text()


@pytest.fixture(scope="module")
def reader():
    """Namespace after the code of the README, run in the repository's root."""
    import os

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace, before, hub = {}, os.getcwd(), torch.hub.get_dir()
    os.chdir(cookbook.ROOT)
    try:
        exec(code, namespace)
    finally:
        os.chdir(before)
        torch.hub.set_dir(hub)
    return namespace


@pytest.fixture(scope="module")
def embedded_files():
    """Files in data/ but those full data sets that a notebook has downloaded there."""
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    downloads = {"tinyshakespeare.txt", "cifar-10-batches-bin/test_batch.bin"}
    downloads |= {f"{name}/raw/{part}-ubyte" for name in ("MNIST", "FashionMNIST") for part in parts}
    downloads |= {f"cifar-10-batches-bin/data_batch_{n}.bin" for n in range(1, 6)}
    return [path for path in DATA.rglob("*") if path.is_file() and str(path.relative_to(DATA)) not in downloads]


def test_sums_are_those_of_the_readme(embedded_files):
    stated = dict(reversed(line.split()) for line in re.findall(r"(?m)^[0-9a-f]{64}  \S+$", README))
    files = {str(path.relative_to(DATA)) for path in embedded_files} - {"README.md"}
    assert files == set(stated)
    for name, digest in stated.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_size(embedded_files):
    assert sum(path.stat().st_size for path in embedded_files) <= 40_000_000


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_digits_and_clothes(reader, name):
    for split, count in (("train", 1000), ("t10k", 200)):
        images = reader["read_idx"](DATA / name / "raw" / f"{split}-images-idx3-ubyte.gz")
        labels = reader["read_idx"](DATA / name / "raw" / f"{split}-labels-idx1-ubyte.gz")
        assert images.shape == (10 * count, 28, 28)
        assert np.bincount(labels).tolist() == [count] * 10
        assert 60 < images.mean() * 2 < 160
        assert images.std() > 70


def test_no_test_image_is_in_the_training_set(reader):
    for name in ("MNIST", "FashionMNIST"):
        train, test = (reader["read_idx"](DATA / name / "raw" / f"{split}-images-idx3-ubyte.gz") for split in ("train", "t10k"))
        assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    train, test = (reader["read_cifar"](DATA / "cifar-10-batches-bin" / f"{n}.bin.xz")[0] for n in ("data_batch_1", "test_batch"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_pictures_of_cifar(reader):
    for name, count in (("data_batch_1", 500), ("test_batch", 100)):
        images, labels = reader["read_cifar"](DATA / "cifar-10-batches-bin" / f"{name}.bin.xz")
        assert images.shape == (10 * count, 3, 32, 32)
        assert np.bincount(labels).tolist() == [count] * 10
        horizontal = np.abs(np.diff(images.astype(int), axis=3)).mean()
        assert horizontal < 0.2 * images.std() * 2  # neighbours are alike: the bytes are in the right order


def test_weights_load_offline(reader):
    """`torch.hub`'s layout; the network tells the embedded pictures apart."""
    with torch.no_grad():
        logits = reader["backbone"](torch.zeros(1, 3, 224, 224))
    assert logits.shape == (1, 1000)


def test_plays():
    text = (DATA / "shakespeare.txt").read_text(encoding="ascii")
    assert 1_000_000 < len(text) < 1_200_000
    assert text.startswith("FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n")
    assert not re.search(r"(?m)[\[\]{}]|^(?:ACT|SCENE) [IVX\d]", text)
    assert "gutenberg" not in text.lower()
    assert len(re.findall(r"(?m)^[A-Z' ]+:$", text)) > 8000


def test_clean_play():
    raw = (
        "TITLE\n\nPERSONS\n\nACT I.\n\nSCENE 1. Rome.\n\n[Enter A.\nB follows.]\n\nFIRST LORD.\nHail [aside] all.\n\n\n\nA\nYes.\n\nTHE END"
    )
    assert make_data.clean_play(raw) == "FIRST LORD:\nHail  all.\n\nA\nYes.\n"


def test_idx_round_trip(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(make_data.idx_bytes(array))
    assert np.array_equal(make_data.read_idx(tmp_path / "x"), array)


def test_balanced_subset():
    labels = np.array([1, 0, 1, 1, 0, 0])
    assert make_data.balanced(labels, 2).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="fewer than 4"):
        make_data.balanced(labels, 4)
