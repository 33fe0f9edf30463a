"""Speed of notebook 08 on this machine: `make bench NB=08`.

    python -m tools.bench.08

Prints gradient steps a second, summed over all runs that go on at once: our DQN and BBF, stacked and one process on each core, and
Stable-Baselines3's DQN with the same hidden layers and batch, one run with all threads and one run on each core.
"""

import functools
import os
import time
from dataclasses import replace

import gymnasium
import numpy as np
import torch
from joblib import Parallel, delayed
from stable_baselines3 import DQN as PeerDQN
from stable_baselines3.common.logger import configure

from tools import cookbook, lift

NOTEBOOK = cookbook.find("08")[0]
STEPS = 200


class Space(gymnasium.Env):
    """Only the spaces of Lunar Lander, for an agent that does not act here."""

    observation_space = gymnasium.spaces.Box(-1, 1, (8,))
    action_space = gymnasium.spaces.Discrete(4)


def rate_of(step, runs, device="cpu"):
    """Gradient steps a second, the best of three rounds."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(runs * STEPS / (time.perf_counter() - start))
    return max(rates)


def ours(kind, runs, width, batch, device):
    """Gradient steps a second of one process, drawing from the replay included."""
    torch.set_num_threads(1)
    nb = lift.lift(NOTEBOOK)
    config = replace(nb.Config(), width=width, batch_size=batch)
    agent = getattr(nb, kind)(runs, config, torch.device(device), 100_000)
    agent.batch_size = batch
    if kind == "DQN":
        agent.fast, agent.slow = (nb.QNetwork(runs, width).to(device) for _ in range(2))
        agent.optimiser = torch.optim.Adam(agent.fast.parameters(), 6.3e-4, fused=True)
    replay, generator = nb.Replay(runs, 2000).to(device), torch.Generator(device).manual_seed(0)
    for _ in range(2000):
        observations = torch.randn(2, runs, 8, device=device)
        zeros = torch.zeros(runs, device=device)
        happened = {"rewards": zeros, "dones": zeros, "ends": zeros, "actions": zeros.long()}
        replay.add(observations=observations[0], next=observations[1], **happened)
    n, gamma = torch.full((runs, 1), 3, device=device), torch.full((runs, 1), 0.99, device=device)

    def step():
        index, probabilities = replay.priorities.draw(batch, generator)
        found = replay.batch(index, n, gamma, 3)
        replay.priorities.change(index, agent.learn(found, probabilities))

    step()
    return rate_of(step, runs, device)


def peer(width, batch, threads):
    """Gradient steps a second of Stable-Baselines3's DQN."""
    torch.set_num_threads(threads)
    policy = {"net_arch": [width, width]}
    agent = PeerDQN("MlpPolicy", Space(), policy_kwargs=policy, device="cpu", buffer_size=2000)
    agent.set_logger(configure(None, []))
    for _ in range(2000):
        seen, following = (agent.observation_space.sample()[None] for _ in range(2))
        agent.replay_buffer.add(seen, following, np.zeros(1, int), np.zeros(1), np.zeros(1), [{}])
    return rate_of(functools.partial(agent.train, 1, batch), 1)


def main():
    cores = os.cpu_count()
    cuda = torch.cuda.is_available()
    for width, batch in ((256, 128), (64, 32)):
        name = f"hidden layers of {width}, batches of {batch}"
        alone = peer(width, batch, cores)
        spread = sum(Parallel(cores)(delayed(peer)(width, batch, 1) for _ in range(cores)))
        print(f"{name}: Stable-Baselines3's DQN, one run {alone:,.0f}, one on each core {spread:,.0f}", flush=True)
        for kind in ("DQN", "BBF"):
            for runs in (1, 5, 10, 20):
                jobs = [delayed(ours)(kind, runs, width, batch, "cpu") for _ in range(cores)]
                found = sum(Parallel(cores)(jobs))
                ratios = f"{found / alone:.1f} and {found / spread:.1f} times"
                print(f"{name}: {kind}, {runs:2} runs on each core {found:6,.0f} ({ratios})", flush=True)
            for runs in (1, 10, 40) if cuda else ():
                print(f"{name}: {kind}, {runs} runs on the GPU {ours(kind, runs, width, batch, 'cuda'):,.0f}", flush=True)


if __name__ == "__main__":
    main()
