"""Speed of notebook 13's attacks on this machine, beside foolbox and torchattacks: `make bench NB=13`.

    python -m tools.bench.13
    python -m tools.bench.13 --weights fgsm.pth

On networks of the notebook after a short standard and a short PGD training, on MNIST's test pictures: success of 40 steps of PGD in
percent and pictures a second, ours, foolbox's and, where it is installed (`pip install --no-deps torchattacks`), torchattacks', first
with the same start, where the pictures have to be the same, then each with its own random starts, where success may differ by 0.5
points; in l-infinity and in l2. Then queries a second of Square, ours and torchattacks'. One thread on a CPU, as in the notebook.

--weights calibrates the notebook's battery instead, on a published network: those of Wong et al. lie in MNIST/models of
github.com/locuslab/fast_adversarial (for fgsm.pth AutoAttack's list says 98.50 % clean and 82.93 % after its attacks at 0.3).
"""

import argparse
import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import eagerpy
import foolbox
import torch

from tools import cookbook, lift

NB = lift.lift(cookbook.find("13")[0])
MEASURE = lift.block("measure")
EPS = {"linf": 0.3, "l2": 2.0}
STEPS, COUNT, ROUNDS, QUERIES = 40, 500, 3, 200
FOOLBOX = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}
PEER = importlib.util.find_spec("torchattacks")


def attacks(model, x, y, norm, random_start):
    """{library: function that returns the adversarial pictures}."""
    eps, step = EPS[norm], EPS[norm] / 10
    ours = functools.partial(NB.pgd, model, x, y, eps, step, STEPS, norm, random_start)
    attack = FOOLBOX[norm](abs_stepsize=step, steps=STEPS, random_start=random_start)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    criterion = foolbox.criteria.Misclassification(eagerpy.astensor(y))
    cases = {"ours": ours, "foolbox": lambda: attack.run(wrapped, eagerpy.astensor(x), criterion, epsilon=eps).raw}
    if PEER:
        import torchattacks

        kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
        other = kind(model, eps=eps, alpha=step, steps=STEPS, random_start=random_start)
        cases["torchattacks"] = lambda: other(x, y)
    return cases


def networks(device):
    """({name: network}, test pictures, their labels): after a short standard and a short PGD training."""
    data = NB.splits("MNIST", 10_000, device)
    train, test = data["train"], data["test"]
    config = replace(NB.Config(), filters=16, batch_size=50, steps=300, attack_steps=5)
    models = {}
    for name, attack in (("standard", NB.no_attack), ("PGD-trained", NB.many_steps)):
        weights, _ = NB.train(NB.Way(attack, 1), config, train, [part[:10] for part in test], 0)
        models[name] = NB.with_weights(config, weights, device)
    return models, test[0][:COUNT], test[1][:COUNT]


def bench_pgd(name, model, x, y, norm):
    """Success and speed of PGD; says where pictures from the same start differ."""
    success = {}
    for random_start in (False, True):
        cases = attacks(model, x, y, norm, random_start)
        made = {library: case() for library, case in cases.items()}
        for library, x_adv in made.items():
            success[library, random_start] = 100 - 100 * float(NB.right(model, x_adv, y).float().mean())
            if not random_start and library != "ours":
                differ = 100 * float(((x_adv - made["ours"]).abs() > 1e-5).float().mean())
                print(f"{name}, {norm}: {library} differs from ours by more than 1e-5 in {differ:.3f} % of the pixels", flush=True)
    seconds = MEASURE.seconds_in_turns(cases, ROUNDS, x.device)
    for library, value in seconds.items():
        found = f"success {success[library, False]:.1f} %, with a random start {success[library, True]:.1f} %"
        speed = f"{len(x) / value:,.0f} pictures a second ({seconds['ours'] / value:.2f} of ours)"
        print(f"{name}, {norm}, {library}: {found}; {speed}", flush=True)


def bench_square(name, model, x, y):
    """Pictures right after Square, and seconds."""
    cases = {"ours": functools.partial(NB.square_attack, model, x, y, EPS["linf"], QUERIES)}
    if PEER:
        import torchattacks

        other = torchattacks.Square(model, norm="Linf", eps=EPS["linf"], n_queries=QUERIES, n_restarts=1, p_init=0.8, loss="margin")
        cases["torchattacks"] = lambda: other(x, y)
    right = {library: 100 * float(NB.right(model, case(), y).float().mean()) for library, case in cases.items()}
    for library, seconds in MEASURE.seconds_in_turns(cases, 2, x.device).items():
        print(f"{name}, Square, {QUERIES} queries, {library}: {right[library]:.1f} % right, {seconds:.1f} s", flush=True)


def calibrate(path, device, steps=50, queries=5000):
    """What the notebook's battery leaves of a published network of the same layers, on random test pictures."""
    config = replace(NB.Config(), filters=16, pixels=(0.0, 1.0))  # it takes pixels as they are
    network = NB.Network(config).to(device)
    network.layers.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    pictures = NB.splits("MNIST", 1000, device)["test"]
    found = NB.battery(network.state_dict(), config, pictures, [pictures[0]], 0, steps, queries)
    shares = ", ".join(f"{name} {100 * float(mask.float().mean()):.1f}" for name, mask in found.items() if name != "transfer")
    print(f"{path.name}, right so far, %: {shares} (PGD with {steps} steps, Square with {queries:,} queries)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="*", default=[], metavar="FILE.pth", help="published weights, to calibrate on")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    for path in arguments.weights:
        calibrate(path, device)
    if arguments.weights:
        return
    models, x, y = networks(device)
    for name, model in models.items():
        for norm in EPS:
            bench_pgd(name, model, x, y, norm)
        bench_square(name, model, x[:200], y[:200])


if __name__ == "__main__":
    main()
