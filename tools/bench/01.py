"""Speed and memory of notebook 01 on this machine: `make bench NB=01`.

    python -m tools.bench.01 [--sweep [NETWORK ...]]

Prints time and peak memory of the proximal step of the paper's first layer in all its forms (N = 500, n = 3072, m = 4000), of layers of
other sizes, and the training step of each method. --sweep trains every arm of the notebook's comparisons at its five learning rates instead,
one seed, and prints the validation accuracies by which the notebook chooses.
"""

import functools
import os
from dataclasses import replace

import torch

from tools import cookbook, lift

os.environ.setdefault("COOKBOOK_PRESET", "cpu")
os.environ.setdefault("COOKBOOK_DATA", str(cookbook.ROOT / "data"))

NB = lift.lift(cookbook.find("01")[0])
MEASURE = lift.block("measure")
CONFIG = NB.Config()
BASES = {
    "mlp": NB.Run(widths=CONFIG.mlp, batch_size=CONFIG.batch_size, steps=CONFIG.steps),
    "convnet": NB.Run("convnet", CONFIG.convnet, tau=1.0, optimizer="adam", batch_size=CONFIG.batch_size, steps=CONFIG.steps),
}
CONVNET = ("explicit", "CG-3", "explicit, centred", "CG-3, centred")
SWEEP = {"mlp": NB.ARMS, "convnet": {name: NB.ARMS[name] for name in CONVNET}}


def bench_step(N, n, m):
    """The step alone, in all its forms."""
    x, grad_z, weight, bias = torch.rand(N, n), torch.randn(N, m) / N, torch.zeros(m, n), torch.zeros(m)
    parts = x, grad_z, weight, bias, 0.05
    ways = {"gradient only": lambda: (grad_z.T @ x, grad_z.sum(0)), "linear solve, n x n": lambda: NB.primal_solve(x, grad_z, 0.05)}
    ways |= {"exact": lambda: NB.proximal_gradient(*parts)}
    ways |= {f"CG-{k}": functools.partial(NB.proximal_gradient, *parts, "cg", k) for k in (1, 3, 5, 10)}
    ways |= {f"authors' CG-{k}": functools.partial(NB.proximal_gradient, *parts, "authors", k) for k in (3, 10)}
    seconds = MEASURE.seconds_in_turns(ways, 7, "cpu")
    for name, way in ways.items():
        ratio = seconds["linear solve, n x n"] / seconds[name]
        peak = MEASURE.peak_memory(way, "cpu") / 2**20
        size = f"N {N:5} n {n:5} m {m:5} {name:20}"
        print(f"{size} {1e3 * seconds[name]:8.1f} ms {peak:7.1f} MiB, linear solve / this {ratio:.2f}", flush=True)


def bench_training(data):
    """The training step of each arm, for both networks."""
    for network, arms in SWEEP.items():
        cases = {name: NB.training_step(replace(BASES[network], **changes), data) for name, changes in arms.items()}
        seconds = MEASURE.seconds_in_turns(cases, 15, "cpu")
        for name, value in seconds.items():
            times = value / seconds["explicit"]
            print(f"{network:8} {name:22} {1e3 * value:7.1f} ms a training step, {times:.2f} times explicit's", flush=True)


def sweep(networks, data):
    """Final validation accuracy of one seed at five learning rates."""
    for network in networks:
        for name, changes in SWEEP[network].items():
            run = replace(BASES[network], **changes)
            for rate in NB.rates_for(run):
                log = NB.outcome(replace(run, learning_rate=rate), data, 100)
                result = f"accuracy {log['accuracy'][-1]:.3f}, loss {log['end'][-1]:.3f}"
                print(f"{network:8} {name:22} rate {rate:<6}: {result}", flush=True)


def main():
    networks = cookbook.swept(__doc__, SWEEP, "10 minutes")
    torch.manual_seed(0)
    data = NB.Pictures(NB.load_images("CIFAR10"))
    if networks is not None:
        return sweep(networks, data)
    for size in ((500, 3072, 4000), (500, 1000, 500), (2000, 500, 1000)):
        bench_step(*size)
    bench_training(data)


if __name__ == "__main__":
    main()
