"""Speed of notebook 10's augmentation on this machine, beside DataLoaders and kornia: `make bench NB=10`.

    python -m tools.bench.10

Pictures a second, CIFAR-10's bytes in and float batches out, for shift and mirror and for the five augmentations of the lesson: ours, resident
and batched, with one thread and with all; torchvision's v2 transforms in a DataLoader with two workers, from PIL's pictures and from bytes of
tensors; kornia's, batched, with one thread and with all. Then the share of a training step that augmentation takes. kornia is wanted here
only: `.venv/bin/pip install kornia`.
"""

import functools
import os
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as transforms

from tools import cookbook, lift

NB = lift.lift(cookbook.find("10")[0])
MEASURE = lift.block("measure")
COUNT, BATCH, ROUNDS = 10_000, 64, 5
FLOATS = v2.ToDtype(torch.float32, scale=True)
OURS = {
    "shift and mirror": NB.BASE,
    "five": (NB.random_zoom, NB.random_flip, NB.random_rotation, NB.random_brightness, NB.random_saturation),
}
TORCHVISION = {
    "shift and mirror": [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
    "five": [
        v2.RandomResizedCrop(32, scale=(0.5, 1), ratio=(1, 1), antialias=False),
        v2.RandomHorizontalFlip(),
        v2.RandomRotation(15, InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.4, saturation=0.6),
    ],
}


class Pictures(Dataset):
    """Pictures one by one, transformed."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, n):
        return self.transform(self.images[n])


def kornias():
    """{name: batched transform}, or nothing where kornia is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        print("kornia is not installed: .venv/bin/pip install kornia", flush=True)
        return {}
    five = K.RandomResizedCrop((32, 32), scale=(0.5, 1), ratio=(1, 1)), K.RandomHorizontalFlip(), K.RandomRotation(15.0, p=1.0)
    shift = K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip()
    colour = K.ColorJitter(brightness=0.4, saturation=0.6, p=1.0)
    return {"shift and mirror": torch.nn.Sequential(*shift), "five": torch.nn.Sequential(*five, colour)}


def batched(draw, images, device):
    """All pictures, drawn batch by batch on the device."""
    images = images.to(device)
    for part in images.split(BATCH):
        draw(part.float() / 255)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def ours(name, generator, x):
    for draw in OURS[name]:
        x = draw(x, generator=generator)
    return x


def pictures_a_second(work):
    """Median over rounds, the first one left out."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return COUNT / sorted(times[1:])[ROUNDS // 2]


def bench_pipelines(images, device):
    """Pictures a second of each way, and how many times the faster DataLoader's that is."""
    generator = torch.Generator(device).manual_seed(0)
    sources = {"PIL": [transforms.to_pil_image(image) for image in images], "bytes": list(images)}
    peers = kornias()
    for name, steps in TORCHVISION.items():
        found = {}
        for source, pictures in sources.items():
            transform = v2.Compose([v2.ToImage(), *steps, FLOATS] if source == "bytes" else [*steps, v2.ToImage(), FLOATS])
            loader = DataLoader(Pictures(pictures, transform), BATCH, shuffle=True, num_workers=2, persistent_workers=True)
            found[f"DataLoader, two workers, {source}"] = pictures_a_second(lambda loader=loader: list(loader))
        for threads in sorted({1, os.cpu_count()}):
            torch.set_num_threads(threads)
            draw = functools.partial(ours, name, generator)
            found[f"ours, {threads} threads"] = pictures_a_second(lambda draw=draw: batched(draw, images, device))
            if name in peers:
                found[f"kornia, {threads} threads"] = pictures_a_second(lambda name=name: batched(peers[name], images, device))
        loaders = max(value for way, value in found.items() if way.startswith("DataLoader"))
        for way, value in found.items():
            print(f"{name:18} {way:32} {value:10,.0f} pictures a second ({value / loaders:.1f})", flush=True)


def bench_share(images, device):
    """The part of a training step that the augmentation is, with one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(0)
    model = NB.Network(NB.Config()).to(device).train()
    x, y = images[:BATCH].to(device).float() / 255, torch.arange(BATCH, device=device) % 10
    cases = {name: functools.partial(ours, name, generator, x) for name in OURS}
    cases |= {"AugMix": lambda: NB.augmix(x, generator), "step": lambda: F.cross_entropy(model(x), y).backward()}
    seconds = MEASURE.seconds_in_turns(cases, 50, device)
    for name in [*OURS, "AugMix"]:
        print(f"{name}: {100 * seconds[name] / (seconds[name] + seconds['step']):.0f} % of a step", flush=True)


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = NB.load_images("CIFAR10")["train"][0]
    images = images.repeat(1 + COUNT // len(images), 1, 1, 1)[:COUNT]
    bench_pipelines(images, device)
    bench_share(images, device)


if __name__ == "__main__":
    main()
