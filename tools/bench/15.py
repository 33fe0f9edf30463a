"""Speed of notebook 15's search step on this machine, beside the official two-pass form: `make bench NB=15`.

    python -m tools.bench.15

One step of alphas by the second-order hypergradient, and one of the weights, on the notebook's one-shot network: ours, which moves the
weights in place, and the form of github.com/quark0/darts (architect.py) written plainly, which copies the network, flattens its weights
and looks ahead in the copy; without momentum and decay in the look ahead, so that both compute the same, which is checked. Then the
first order. Loading of pictures is left out: the official code makes a new iterator over them in every step. One thread on a CPU.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from tools import cookbook, lift

NB = lift.lift(cookbook.find("15")[0])
MEASURE = lift.block("measure")
XI, ROUNDS = 0.025, 9


def loss_of(model, alphas, batch):
    return F.cross_entropy(model(batch[0], alphas.softmax(1)), batch[1])


def look_ahead(model, alphas, batch):
    """A copy of the network after one step of size XI, through one flat vector, as the official code makes it."""
    flat = torch.cat([weight.data.view(-1) for weight in model.parameters()])
    slopes = torch.autograd.grad(loss_of(model, alphas, batch), list(model.parameters()))
    moved = flat - XI * torch.cat([slope.view(-1) for slope in slopes])
    ahead, first = copy.deepcopy(model), 0
    for weight in ahead.parameters():
        weight.data = moved[first : first + weight.numel()].view(weight.shape).clone()
        first += weight.numel()
    return ahead


def official(model, alphas, batches, epsilon=0.01):
    """Second-order hypergradient in the official form."""
    ahead = look_ahead(model, alphas, batches[0])
    direct, *vector = torch.autograd.grad(loss_of(ahead, alphas, batches[1]), [alphas, *ahead.parameters()])
    size = epsilon / torch.cat([part.view(-1) for part in vector]).norm()
    sides = []
    for shift in (size, -2 * size):
        for weight, part in zip(model.parameters(), vector, strict=True):
            weight.data.add_(part, alpha=float(shift))
        sides.append(torch.autograd.grad(loss_of(model, alphas, batches[0]), alphas)[0])
    for weight, part in zip(model.parameters(), vector, strict=True):
        weight.data.add_(part, alpha=float(size))
    return [direct - XI * (sides[0] - sides[1]) / (2 * size)]


def ours(model, alphas, batches, xi=XI):
    """The notebook's hypergradient."""
    losses = [functools.partial(loss_of, model, alphas, batch) for batch in batches]
    return NB.hypergradient(*losses, list(model.parameters()), [alphas], xi)


def whole_step(form, model, alphas, batches):
    """A hypergradient, and the gradients of the weights."""
    form(model, alphas, batches)
    torch.autograd.grad(loss_of(model, alphas, batches[0]), list(model.parameters()))


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = NB.Config(nodes=4, width=8, stages=2)
    model = NB.build(config, None, 0, device)
    alphas = (1e-3 * torch.randn(6, 3)).to(device).requires_grad_()
    pictures = torch.randint(256, (64, 3, 16, 16)).to(torch.uint8).to(device)
    labels = torch.randint(10, (64,)).to(device)
    batches = [(pictures[n::2], labels[n::2]) for n in (0, 1)]
    forms = {"second order, ours": ours, "second order, official form": official, "first order, ours": functools.partial(ours, xi=0)}
    difference = (ours(model, alphas, batches)[0] - official(model, alphas, batches)[0]).abs().max().item()
    print(f"second order: ours and the official form differ by at most {difference:.1e}", flush=True)
    cases = {name: functools.partial(whole_step, form, model, alphas, batches) for name, form in forms.items()}
    seconds = MEASURE.seconds_in_turns(cases, ROUNDS, device)
    for name, value in seconds.items():
        print(f"{name}: {1000 * value:.1f} ms a step ({value / seconds['second order, ours']:.2f} of ours)", flush=True)


if __name__ == "__main__":
    main()
