# @title Reading MNIST, Fashion-MNIST and CIFAR-10
# canon: images
import gzip
import http.client
import lzma
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.datasets.mnist import read_image_file, read_label_file

IMAGE_SETS = {  # torchvision's name: (address, folder of the plain files, images of the full training and test set)
    "MNIST": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw", 60_000, 10_000),
    "FashionMNIST": ("https://github.com/zalandoresearch/fashion-mnist", "FashionMNIST/raw", 60_000, 10_000),
    "CIFAR10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "cifar-10-batches-bin", 50_000, 10_000),
}


def idx_images(folder, train):
    """(images (N, 1, 28, 28) uint8, labels (N,) int64) of IDX files in `folder`, read by torchvision, through gzip where packed."""
    arrays = []
    for kind, read in (("images-idx3", read_image_file), ("labels-idx1", read_label_file)):
        plain = folder / f"{'train' if train else 't10k'}-{kind}-ubyte"
        path = plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
        try:
            with tempfile.TemporaryDirectory() as scratch:
                if path != plain:
                    plain = Path(scratch) / "plain"
                    plain.write_bytes(gzip.decompress(path.read_bytes()))
                arrays.append(read(str(plain)))
        except (OSError, EOFError, AssertionError, ValueError, RuntimeError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is corrupt or incomplete ({error}): delete it, and fetch it again") from error
    return arrays[0][:, None], arrays[1]


def cifar_images(folder, train):
    """(images (N, 3, 32, 32) uint8, labels (N,) int64) of CIFAR-10's binary files in `folder`, through xz where packed."""
    images, labels = [], []
    for path in sorted(folder.glob("data_batch_*" if train else "test_batch*")):
        try:
            raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            records = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3 * 32 * 32).copy())
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise ValueError(f"{path} is corrupt or incomplete ({error}): delete it, and fetch it again") from error
        if records[:, 0].max() > 9:
            raise ValueError(f"{path} is no file of CIFAR-10 (a label of {records[:, 0].max()}): delete it, and fetch it again")
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        labels.append(records[:, 0].long())
    return torch.cat(images), torch.cat(labels)


def downloaded_images(name, train):
    """The full set as torchvision downloads, checks and reads it, in data/full; the same tensors as above."""
    data_set = getattr(torchvision.datasets, name)(str(data_folder() / "full"), train=train, download=True)
    images = torch.as_tensor(data_set.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
    return images, torch.as_tensor(data_set.targets)


def load_images(name):
    """{"train" and "test": (images (N, C, H, W) uint8, labels (N,) int64)} of "MNIST", "FashionMNIST" or "CIFAR10".

    The full set from the data folder, else downloaded (not in smoke), else the embedded subset, which it says. FileNotFoundError
    where there is none of them, ValueError that names a damaged file.
    """
    address, place, train_size, test_size = IMAGE_SETS[name]
    folder = data_folder() / place
    read = cifar_images if name == "CIFAR10" else idx_images
    mark = "test_batch.bin" if name == "CIFAR10" else "t10k-labels-idx1-ubyte"
    suffix = ".xz" if name == "CIFAR10" else ".gz"
    if not (folder / mark).exists() and preset_name(PRESET) != "smoke":
        try:
            return {"train": downloaded_images(name, True), "test": downloaded_images(name, False)}
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            print(f"could not download {name}: {str(error).strip().splitlines()[0]}")
    if not (folder / mark).exists() and not (folder / f"{mark}{suffix}").exists():
        raise missing(place, address)
    images = {"train": read(folder, True), "test": read(folder, False)}
    if len(images["train"][1]) < train_size:
        counts = f"{len(images['train'][1]):,} and {len(images['test'][1]):,} images instead of {train_size:,} and {test_size:,}"
        print(f"EMBEDDED SUBSET of {name}: {counts}, so accuracies are lower than with the full set")
    return images
