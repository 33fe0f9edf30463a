"""Notebook 11's channel pruning beside Torch-Pruning's at half of the multiply-adds: `make bench NB=11`.

    python -m tools.bench.11 [--seeds 3] [--epochs 4]

Trains the notebook's network on CIFAR-10, prunes it to half of its multiply-adds, and trains on, for all alike: by our norms (l2 and l1), and by
Torch-Pruning's own L1 norm of whole groups, with one threshold for the network and with one ratio for all layers, the ratio being the one at
which our counter finds the same multiply-adds. Beside them stands the dense network, trained on as long. Prints test accuracies, differences
pair by pair with their interval over the test pictures, multiply-adds, and seconds to prune. Uses every core, a training on each.
"""

import argparse
import bisect
import copy
import functools
import time

import numpy as np
import torch

from tools import cookbook, lift

try:
    import torch_pruning
except ImportError:
    raise SystemExit("torch-pruning is not installed: .venv/bin/pip install torch-pruning==1.6.1") from None

NB = lift.lift(cookbook.find("11")[0])
SHAPE = (3, 32, 32)
RATIOS = np.linspace(0, 0.9, 901)


def pictures_of(device):
    """The parts of CIFAR-10 that the notebook uses."""
    data, found = NB.load_images("CIFAR10"), {}
    held_out = len(data["train"][1]) // 10
    for name, source, part in (
        ("train", "train", slice(None, -held_out)),
        ("validation", "train", slice(-held_out, None)),
        ("test", "test", slice(None)),
    ):
        found[name] = [values[part].to(device) for values in data[source]]
    return found


def ours(model, target, norm):
    """The notebook's: scores, a plan that fits, removal."""
    scores = NB.maker_scores(model, functools.partial(NB.filter_scores, norm=norm))
    return NB.remove_channels(model, NB.plan_for(model, scores, target, SHAPE))


def peers(model, ratio, one_threshold):
    """Torch-Pruning's L1 norm of groups, once, at one ratio."""
    model = copy.deepcopy(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, *SHAPE, device=next(model.parameters()).device),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        global_pruning=one_threshold,
        pruning_ratio=float(ratio),
        max_pruning_ratio=0.9,  # as our plans leave a tenth of every group
        ignored_layers=[model.head],
    )
    pruner.step()
    return model


def fitting_ratio(model, target, one_threshold):
    """The ratio at which Torch-Pruning leaves the multiply-adds nearest to the target, by our counter."""
    macs = functools.cache(lambda n: NB.count_macs(peers(model, RATIOS[n], one_threshold), SHAPE))
    n = min(bisect.bisect_left(range(len(RATIOS)), -target, key=lambda n: -macs(n)), len(RATIOS) - 1)
    return RATIOS[min((max(n - 1, 0), n), key=lambda n: abs(macs(n) - target))]


def pruned(model, target):
    """{way: (smaller network, seconds that pruning took)}."""
    found = {}
    ways = {"ours, l2": lambda: ours(model, target, 2), "ours, l1": lambda: ours(model, target, 1)}
    for name, one_threshold in (("Torch-Pruning, one threshold", True), ("Torch-Pruning, one ratio", False)):
        ways[name] = functools.partial(peers, model, fitting_ratio(model, target, one_threshold), one_threshold)
    for name, way in ways.items():
        start = time.perf_counter()
        smaller = way()
        found[name] = smaller, time.perf_counter() - start
    return found


def rights(found):
    """Which test pictures were classified rightly, (seeds, pictures), as 0 and 1."""
    return np.stack([each["right"].double().numpy() for each in found])


def row(name, right, macs, full, rest=""):
    """Print one line of the table."""
    accuracy = NB.summary(100 * right.mean(1), 2)
    share = macs / full
    print(f"{name:30} {accuracy:>16} % {np.mean(macs):12,.0f} multiply-adds ({share.min():.3f} to {share.max():.3f}) {rest}", flush=True)
    if "Torch-Pruning" in name and np.abs(share / 0.5 - 1).max() > 0.02:
        print(f"{'':30} more than 2 % from half: no ratio comes nearer", flush=True)


def main():
    config = NB.Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=config.epochs, help="of the dense network; after pruning a fifth as many")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    pictures, seeds, rate = pictures_of(device), range(options.seeds), config.learning_rate

    def run(job):
        model, seed, epochs = job
        return NB.retrained(model, (), pictures, config, seed, epochs, rate)

    fresh = [NB.fresh_weights(NB.Network(config), seed).to(device) for seed in seeds]
    full = NB.count_macs(fresh[0], SHAPE)
    first = NB.over_cores(run, [(model, seed, options.epochs) for seed, model in enumerate(fresh)], "dense")
    for model, found in zip(fresh, first, strict=True):
        model.load_state_dict(found["weights"])
    smaller = [pruned(model, full // 2) for model in fresh]
    ways = {"dense, trained on": fresh, **{name: [each[name][0] for each in smaller] for name in smaller[0]}}
    jobs = [(model, seed + 10, options.epochs / 5) for models in ways.values() for seed, model in enumerate(models)]
    runs = NB.over_cores(run, jobs, "pruned")

    row("dense", rights(first), np.full(len(seeds), full), full)
    table = {}
    for n, (name, models) in enumerate(ways.items()):
        found = runs[n * len(seeds) : (n + 1) * len(seeds)]
        table[name] = rights(found)
        seconds = f"{np.mean([each[name][1] for each in smaller]):.2f} s to prune" if name in smaller[0] else ""
        before = f"before training {NB.summary([each['before'] for each in found], 1)} %"
        row(name, table[name], np.array([NB.count_macs(model, SHAPE) for model in models]), full, f"{before} {seconds}")
    print(
        "ours has the search for the multiply-adds in its seconds; Torch-Pruning's are those of one pruning at the ratio found", flush=True
    )
    for mine in ("ours, l2", "ours, l1"):
        for other in [name for name in table if name == "dense, trained on" or name.startswith("Torch")]:
            mean, low, high = (100 * value for value in NB.paired_interval(table[mine].mean(0), table[other].mean(0)))
            apart = ", ".join(f"{100 * value:+.2f}" for value in table[mine].mean(1) - table[other].mean(1))
            print(
                f"{mine} less {other}: {mean:+.2f} points, 95 % over pictures {low:+.2f} to {high:+.2f}; seed by seed {apart}", flush=True
            )


if __name__ == "__main__":
    main()
