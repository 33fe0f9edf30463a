"""Speed of notebook 02 on this machine: `make bench NB=02`.

    python -m tools.bench.02

Prints pictures a second of ten steps of PGD, ours, foolbox's and, where it is installed (`pip install --no-deps torchattacks`),
torchattacks', on the notebook's network, after it has checked that their pictures are the same; and those of SparseTopK beside a
threshold by torch.kthvalue.
"""

import functools
import importlib.util

import eagerpy
import foolbox
import torch

from tools import cookbook, lift

NB = lift.lift(cookbook.find("02")[0])
MEASURE = lift.block("measure")
EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def attacks(model, x, y):
    """{library: function that returns the adversarial pictures}."""
    ours = functools.partial(NB.pgd_attack, model, x, y, EPS, STEP, STEPS, random_start=False)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    criterion = foolbox.criteria.Misclassification(eagerpy.astensor(y))
    cases = {"ours": ours, "foolbox": lambda: attack.run(wrapped, eagerpy.astensor(x), criterion, epsilon=EPS).raw}
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        other = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False)
        cases["torchattacks"] = lambda: other(x, y)
    return cases


def threshold(keep, x):
    """SparseTopK by the k-th largest value, which keeps all that are tied."""
    sizes = x.flatten(2).abs()
    place = sizes.shape[2] - max(1, int(keep * sizes.shape[2])) + 1
    return x * (x.abs() >= sizes.kthvalue(place, 2).values[..., None, None])


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for batch in (32, 128):
        model = NB.Network(NB.Config(widths=(24, 48, 96), stride=2, blocks=1)).to(device).eval()
        x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
        cases = attacks(model, x, y)
        first = cases["ours"]()
        for name, case in cases.items():
            difference = (case() - first).abs()
            print(f"{name}: differs from ours by more than 1e-6 in {100 * (difference > 1e-6).float().mean():.3f} % of the values")
        seconds = MEASURE.seconds_in_turns(cases, 5, device)
        print(f"batch {batch}:", ", ".join(f"{name} {batch / value:,.0f} pictures/s" for name, value in seconds.items()))
    x = torch.randn(128, 48, 16, 16, device=device).relu()
    cases = {"topk": functools.partial(NB.SparseTopK(0.2), x), "kthvalue": functools.partial(threshold, 0.2, x)}
    seconds = MEASURE.seconds_in_turns(cases, 5, device)
    print("SparseTopK:", ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
