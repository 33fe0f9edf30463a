"""Speed and memory of notebook 06 on this machine, beside anomalib: `make bench NB=06`.

    python -m tools.bench.06

Fit and score of one category (209 training and 83 test pictures, 56 x 56 places, 100 features) on the same random embeddings, each way in
a process of its own: seconds with the embeddings at hand; the largest resident memory when they arrive batch by batch, as from a
network; and how far the heat maps agree. Then all 448 features of ResNet-18, online. anomalib is wanted here only:
`.venv/bin/pip install anomalib==2.7.0`.
"""

import multiprocessing
import sys
import threading
from pathlib import Path

import psutil
import torch

from tools import cookbook, lift

MEASURE = lift.block("measure")
TRAIN, TEST, SIDE, SIZE, BATCH, ROUNDS, FEATURES = 209, 83, 56, 224, 32, 5, 100


class Notebook:
    """The notebook's online statistics, Cholesky factors, triangular solve and heat maps."""

    def __init__(self):
        self.nb = lift.lift(cookbook.find("06")[0])

    def run(self, train, test):
        gaussian = None
        for batch in train:
            gaussian = gaussian or self.nb.OnlineGaussian(*batch.shape[1:])
            gaussian.update(batch)
        factors = self.nb.cholesky_factors(gaussian)
        distances = (self.nb.mahalanobis(batch, gaussian.mean, factors) for batch in test)
        return torch.cat([self.nb.heat_maps(distance, SIZE, 4.0) for distance in distances])

    def layout(self, batch):
        return batch


class Anomalib:
    """anomalib's MultiVariateGaussian and AnomalyMapGenerator, as its Padim uses them."""

    def __init__(self):
        from anomalib.models.components.stats import MultiVariateGaussian
        from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

        self.gaussian, self.maps = MultiVariateGaussian, AnomalyMapGenerator()

    def run(self, train, test):
        gaussian = self.gaussian()
        gaussian.fit(torch.vstack(list(train)))
        known = {"mean": gaussian.mean, "inv_covariance": gaussian.inv_covariance, "image_size": (SIZE, SIZE)}
        return torch.cat([self.maps(embedding=batch, **known)[:, 0] for batch in test])

    def layout(self, batch):
        return batch.mT.reshape(len(batch), -1, SIDE, SIDE).contiguous()


WAYS = {"notebook 06": Notebook, "anomalib": Anomalib}


def embeddings(count, features, seed):
    """Batches of random, correlated embeddings (B, P, d), each made when it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, BATCH):
        shape = (min(BATCH, count - start), SIDE * SIDE)
        yield torch.randn(*shape, features, generator=generator).add_(torch.randn(*shape, 1, generator=generator) + 1)


def largest_memory(case):
    """Peak of the resident memory while `case` runs, over that before, in bytes; looked at every 2 ms."""
    process, stop, seen = psutil.Process(), threading.Event(), []

    def watch():
        while not stop.wait(0.002):
            seen.append(process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    case()
    stop.set()
    watcher.join()
    return max(seen) - before


def measure(name, features=FEATURES):
    """(seconds, bytes, heat maps) of a way."""
    way = WAYS[name]()

    def stream(count, seed):
        return (way.layout(batch) for batch in embeddings(count, features, seed))

    way.run(stream(4, 0), stream(4, 1))  # imports and threads, once
    peak = largest_memory(lambda: way.run(stream(TRAIN, 0), stream(TEST, 1)))
    train, test = list(stream(TRAIN, 0)), list(stream(TEST, 1))
    seconds = MEASURE.seconds_in_turns({name: lambda: way.run(train, test)}, ROUNDS, "cpu")
    return seconds[name], peak, way.run(train, test)


def alone(name, features=FEATURES):
    """measure() in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, features))


def main():
    results = {}
    for name in WAYS:
        try:
            seconds, peak, _ = results[name] = alone(name)
            size = f"{TRAIN} + {TEST} pictures, {FEATURES} features"
            print(f"{name:12} {size}: {seconds:.2f} s, {peak / 2**20:,.0f} MiB", flush=True)
        except ImportError as error:
            print(f"{name:12} left out, {error}: {Path(sys.executable).parent / 'pip'} install anomalib==2.7.0")
    if len(results) == 2:
        (ours, small, maps), (theirs, large, other) = results.values()
        inner = slice(20, -20)  # borders are padded differently
        difference = ((maps - other).abs() / other)[:, inner, inner].max()
        print(f"anomalib / notebook: {theirs / ours:.1f} in time, {large / small:.1f} in memory;", end=" ")
        print(f"heat maps differ by {difference:.0e} at most")
    seconds, peak, _ = alone("notebook 06", 448)
    print(f"notebook 06, all 448 features of ResNet-18: {seconds:.1f} s, {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
