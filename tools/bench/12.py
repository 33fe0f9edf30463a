"""Speed of notebook 12's training step on this machine, beside a plain PyTorch loop with the same networks: `make bench NB=12`.

    python -m tools.bench.12

Real images a second of a training on random pictures of 32 x 32, data drawing included: DCGAN's way, non-saturating with R1 + R2, and
relativistic with R1 + R2. The plain loop builds the networks from layers of PyTorch, writes out losses and penalties, and has no moving
average, no looks and no check of weights. Both take turns. Before that, one step of each from the same weights and noise has to give the same
generator. One thread on a CPU, as in the notebook.
"""

import copy
import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tools import cookbook, lift

NB = lift.lift(cookbook.find("12")[0])
MEASURE = lift.block("measure")
STEPS, ROUNDS = 20, 3
WAYS = {
    "DCGAN": NB.Way("non_saturating", norm="batch", beta=0.5),
    "non-saturating + R1 + R2": NB.Way("non_saturating", r1=1.0, r2=1.0),
    "relativistic + R1 + R2": NB.Way("relativistic", r1=1.0, r2=1.0),
}


def plain_networks(config, norm):
    """The networks of the notebook for 1 x 32 x 32, from layers of PyTorch."""
    c = config.channels
    between = (lambda n: [nn.BatchNorm2d(n), nn.ReLU()]) if norm else (lambda n: [nn.LeakyReLU(0.2)])
    g = [nn.Linear(config.noise, 64 * c), nn.Unflatten(1, (4 * c, 4, 4))]
    for before, after in ((4 * c, 2 * c), (2 * c, c), (c, 1)):
        g += [*between(before), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    d = [nn.Conv2d(1, c, 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after in ((c, 2 * c), (2 * c, 4 * c)):
        d += [nn.Conv2d(before, after, 4, 2, 1), *([nn.BatchNorm2d(after)] if norm else []), nn.LeakyReLU(0.2)]
    return nn.Sequential(*g, nn.Tanh()), nn.Sequential(*d, nn.Flatten(), nn.Linear(64 * c, 1))


def slope_penalty(d, x):
    """Squared length of the slope at x, mean over the batch."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return slope.square().sum([1, 2, 3]).mean()


def plain_training(way, config, images, g, d, steps):
    """The loop as one would write it without the notebook."""
    adam = functools.partial(torch.optim.Adam, lr=way.rate, betas=(way.beta, 0.99), fused=True)
    optimiser_g, optimiser_d = adam(g.parameters()), adam(d.parameters())
    draws = torch.Generator(images.device).manual_seed(0)

    def batch():
        return images[torch.randint(len(images), (config.batch, 1), generator=draws, device=images.device), 0]

    def noise():
        return torch.randn(config.batch, config.noise, generator=draws, device=images.device)

    for _ in range(steps):
        real = batch()
        fake = g(noise()).detach()
        real_logits, fake_logits = d(real), d(fake)
        single = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        loss = F.softplus(fake_logits - real_logits).mean() if way.loss == "relativistic" else single
        if way.r1:
            loss = loss + way.r1 / 2 * slope_penalty(d, real) + way.r2 / 2 * slope_penalty(d, fake)
        optimiser_d.zero_grad()
        loss.backward()
        optimiser_d.step()
        real = batch()
        logits = d(g(noise())) if way.loss != "relativistic" else -(d(real) - d(g(noise())))
        optimiser_g.zero_grad()
        F.softplus(-logits).mean().backward()
        optimiser_g.step()
    return g


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    config = NB.Config()
    images = torch.rand(1000, 1, 32, 32, device=device) * 2 - 1
    game = NB.picture_game((images, torch.zeros(1000, dtype=torch.long, device=device)), 1, config, lambda g: {})
    for name, way in WAYS.items():
        ours, theirs = game.networks(way, 0), [network.to(device) for network in plain_networks(config, way.norm)]
        for network, plain in zip(ours, theirs, strict=True):
            plain.load_state_dict(dict(zip(plain.state_dict(), network.state_dict().values(), strict=True)))
        kept, _ = NB.train(way, replace(game, steps=1), config, 0)
        stepped = plain_training(way, config, images, *copy.deepcopy(theirs), 1)
        error = max((one - other).abs().max() for one, other in zip(kept["generator"].values(), stepped.state_dict().values(), strict=True))
        cases = {
            "ours": functools.partial(NB.train, way, replace(game, steps=STEPS), config, 0),
            "plain": functools.partial(plain_training, way, config, images, *theirs, STEPS),
        }
        seconds = MEASURE.seconds_in_turns(cases, ROUNDS, device)
        speeds = ", ".join(f"{case} {STEPS * config.batch / value:,.0f} images/s" for case, value in seconds.items())
        print(f"{name}: {speeds} ({seconds['plain'] / seconds['ours']:.2f} of the plain loop); one step differs by {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
