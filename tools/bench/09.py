"""Speed and memory of notebook 09 on this machine: `make bench NB=09`.

    python -m tools.bench.09

Prints milliseconds of forward and backward of one layer, ours, the formula left to autograd and PyTorch's own, at sizes of convolutional and
fully connected networks; what each keeps for its backward pass beside the input; and what folding saves in a whole network.
"""

import functools

import torch
from torch import nn

from tools import cookbook, lift

NB = lift.lift(cookbook.find("09")[0])
MEASURE = lift.block("measure")
SHAPES = [(64, 16, 32, 32), (64, 64, 16, 16), (64, 256, 8, 8), (128, 64, 56, 56), (256, 1024)]


def both_ways(layer, x, slope):
    layer(x).backward(slope)


def bench_layers(device):
    """One layer, forward and backward."""
    for shape in SHAPES:
        x = torch.randn(shape, device=device, requires_grad=True)
        slope = torch.randn_like(x)
        peer = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        layers = {"ours": NB.BatchNorm(shape[1]), "by autograd": NB.Plain(shape[1]), "PyTorch's": peer(shape[1])}
        cases = {name: functools.partial(both_ways, layer.to(device), x, slope) for name, layer in layers.items()}
        seconds = MEASURE.seconds_in_turns(cases, 20, device)
        for name, layer in layers.items():
            kept = NB.kept_for_backward(layer, x) / 2**20
            ratio = seconds[name] / seconds["PyTorch's"]
            print(f"{shape!s:20} {name:12} {1e3 * seconds[name]:8.2f} ms ({ratio:.2f}), keeps {kept:6.2f} MiB", flush=True)


def bench_folding(device):
    """The notebook's network in evaluation mode, folded and not."""
    model = NB.vgg(NB.Way("batch"), (16, 32, 64), 0).to(device).eval()
    thin = NB.folded(model)
    for batch in (1, 64, 256):
        x = torch.randn(batch, 3, 32, 32, device=device)
        with torch.no_grad():
            seconds = MEASURE.seconds_in_turns({"whole": lambda x=x: model(x), "folded": lambda x=x: thin(x)}, 20, device)
        print(f"batch {batch:4}: folded {seconds['whole'] / seconds['folded']:.2f} times as fast", flush=True)


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    bench_layers(device)
    bench_folding(device)


if __name__ == "__main__":
    main()
