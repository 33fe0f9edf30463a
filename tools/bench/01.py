"""Speed and memory of notebook 01 on this machine: `make bench NB=01`.

    python -m tools.bench.01 [--sweep [NETWORK ...]]

Prints time and peak memory of the proximal step of the paper's first layer in all its forms (N = 500, n = 3072, m = 4000), of layers of
other sizes, and the training step of each method. --sweep trains every method at several learning rates instead, one seed, and prints
the validation accuracy that the rates in the notebook were chosen by.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from tools import cookbook, lift

NB = lift.lift(cookbook.find("01")[0])
MEASURE = lift.block("measure")
CONFIG = NB.PRESETS["cpu"]
DATA = Path(os.environ.get("COOKBOOK_DATA", cookbook.ROOT / "data"))
NESTEROV, PROXIMAL = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), (0.5, 1.0, 2.0, 4.0)
ADAM, MUON, CONVNET = (1e-4, 3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2)
SWEEP = {
    "mlp": {
        "explicit": ({}, NESTEROV),
        "explicit, longer": ({"steps": CONFIG.longer * CONFIG.mlp.steps}, NESTEROV[1:4]),
        **{method: (changes, PROXIMAL) for method, changes in NB.PROXIMAL.items()},
        "explicit, centred inputs": ({"centre": True}, NESTEROV),
        "exact, centred inputs": ({"method": "exact", "centre": True}, (0.2, *PROXIMAL)),
        "CG-3, centred inputs": ({"method": "cg", "centre": True}, PROXIMAL),
        "explicit, Adam": ({"optimizer": "adam"}, ADAM),
        "exact, Adam": ({"optimizer": "adam", "method": "exact"}, ADAM),
        "Muon": ({"optimizer": "muon"}, MUON),
    },
    "convnet": {
        "explicit": ({}, CONVNET),
        "explicit, longer": ({"steps": CONFIG.longer * CONFIG.convnet.steps}, CONVNET[:3]),
        **{method: (changes, CONVNET) for method, changes in NB.PROXIMAL.items()},
        "explicit, centred inputs": ({"centre": True}, CONVNET),
        "CG-3, centred inputs": ({"method": "cg", "centre": True}, CONVNET),
    },
}


def bench_step(N, n, m):
    """The step alone, in all its forms."""
    x, grad_z, weight, bias = torch.rand(N, n), torch.randn(N, m) / N, torch.zeros(m, n), torch.zeros(m)
    ways = {
        "gradient only": lambda: (grad_z.T @ x, grad_z.sum(0)),
        "linear solve, k x k": lambda: NB.primal_solve(x, grad_z, 0.05),
        "exact": lambda: NB.proximal_gradient(x, grad_z, weight, bias, 0.05),
        **{f"CG-{k}": lambda k=k: NB.proximal_gradient(x, grad_z, weight, bias, 0.05, "cg", k) for k in (1, 3, 5, 10)},
    }
    seconds = MEASURE.seconds_in_turns(ways, 7, "cpu")
    for name, way in ways.items():
        ratio = seconds["linear solve, k x k"] / seconds[name]
        peak = MEASURE.peak_memory(way, "cpu") / 2**20
        size = f"N {N:5} n {n:5} m {m:5} {name:20}"
        print(f"{size} {1e3 * seconds[name]:8.1f} ms {peak:7.1f} MiB, linear solve / this {ratio:.2f}", flush=True)


def bench_training(data):
    """The training step of each method, for both networks."""
    for base in (CONFIG.mlp, CONFIG.convnet):
        runs = {method: replace(base, **NB.PROXIMAL.get(method, {})) for method in ("explicit", *NB.PROXIMAL)}
        cases = {method: NB.training_step(run, data, "cpu") for method, run in runs.items()}
        seconds = MEASURE.seconds_in_turns(cases, 15, "cpu")
        for name, value in seconds.items():
            times = value / seconds["explicit"]
            print(f"{base.network:8} {name:10} {1e3 * value:7.1f} ms a training step, {times:.2f} times explicit's")


def sweep(networks, data):
    """Final validation accuracy of one seed at several learning rates."""
    for base in (CONFIG.mlp, CONFIG.convnet):
        for name, (changes, rates) in SWEEP[base.network].items() if base.network in networks else ():
            for rate in rates:
                try:
                    log = NB.train(replace(base, **changes, learning_rate=rate), data, 0, eval_every=base.steps)[1]
                    result = f"accuracy {log['accuracy'][-1]:.3f}, loss {log['loss'][-1]:.3f}, {log['seconds'][-1]:.0f} s"
                except NB.Diverged as error:
                    result = str(error)
                print(f"{base.network:8} {name:25} rate {rate:<6}: {result}", flush=True)


def main():
    networks = cookbook.swept(__doc__, SWEEP, "40 minutes")
    torch.manual_seed(0)
    data = NB.Pictures(NB.load(DATA, "cifar-10-batches-bin", "smoke" if networks is None else "cpu"))
    if networks is not None:
        return sweep(networks, data)
    for size in (CONFIG.layer, (500, 1000, 500), (2000, 500, 1000)):
        bench_step(*size)
    bench_training(data)


if __name__ == "__main__":
    main()
