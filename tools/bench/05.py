"""Speed and memory of notebook 05 on this machine: `make bench NB=05`.

    python -m tools.bench.05

Prints pictures a second of a training step in NumPy and in PyTorch for batches of several sizes, and for 128 blocks what each way to
remember holds and takes, at a batch of 256 and of 2,048.
"""

import functools
from dataclasses import replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from tools import cookbook, lift

NB = lift.lift(cookbook.find("05")[0])
MEASURE = lift.block("measure")
WAYS = [("stored",), ("micro-batches", 8), ("micro-batches", 32), ("checkpoints", 8), ("checkpoints", 32), ("reversible",)]


def speeds(config, batch, rounds):
    """{implementation: pictures a second} of a training step with Adam, beside the same network in PyTorch."""
    rng, network = np.random.default_rng(0), NB.Network(config, 0)
    pictures, labels = rng.standard_normal((batch, 784), dtype=np.float32), rng.integers(10, size=batch)
    weights = [torch.tensor(layer.weights, requires_grad=True) for layer in network.layers]
    adam = torch.optim.Adam(weights, 1e-3)

    def torch_step():
        adam.zero_grad()
        NB.torch_loss(network, weights, torch.from_numpy(pictures), torch.from_numpy(labels)).backward()
        adam.step()

    ours = network, NB.Adam(network.layers, 1e-3), pictures, labels
    cases = {way: functools.partial(NB.step_by(way), *ours) for way in ("stored", "reversible")}
    seconds = MEASURE.seconds_in_turns(cases | {"PyTorch": torch_step}, rounds, "cpu")
    return {name: batch / value for name, value in seconds.items()}


def bench_speed():
    """Pictures a second, one thread each."""
    threadpool_limits(1)
    torch.set_num_threads(1)
    for depth in (16, 64):
        for batch in (64, 128, 256, 512, 1024, 2048):
            found = speeds(replace(NB.Config(), depth=depth), batch, 10)
            rates = ", ".join(f"{name} {rate:8,.0f}" for name, rate in found.items())
            ratio = found["stored"] / found["PyTorch"]
            print(f"{depth:4} blocks, batch {batch:5}: {rates} pictures/s, stored / PyTorch {ratio:.2f}", flush=True)


def bench_ways():
    """Memory and time of a step."""
    for batch in (256, 2048):
        found = NB.costs(WAYS, replace(NB.Config(), depth=128), batch, 1)
        for way, (memory, (seconds,)) in found.items():
            ratio = seconds / found["stored",][1][0]
            name = " ".join(map(str, way))
            print(f"128 blocks, batch {batch:5}, {name:18} {memory:7.1f} MiB {1e3 * seconds:8.0f} ms, {ratio:.2f} x stored", flush=True)


if __name__ == "__main__":
    bench_speed()
    bench_ways()
