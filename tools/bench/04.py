"""Speed of notebook 04 on this machine, beside a loop as CleanRL's: `make bench NB=04`.

    python -m tools.bench.04

Both play `NetHackScore-v0` with the same agent network in one thread. CleanRL's way is a gymnasium SyncVectorEnv of the registered
environment with its default observations, in which every observation of the dict is copied each step, and a step of the agent by
torch.distributions with log-probability, entropy and value, as in its PPO scripts. The notebook's way is `judge`, `sample`, `Games.step`.
Measured in turns: games alone, and games with the agent. Then where the time of the notebook's whole training goes.
"""

import time
from dataclasses import replace

import gymnasium
import nle  # noqa: F401, registers the environments
import numpy as np
import torch

from tools import cookbook, lift

MEASURE = lift.block("measure")
GAMES, STEPS, ROUNDS = (16, 64), 300, 5


class Notebook:
    """The notebook's games and agent."""

    def __init__(self, notebook, num_games):
        run = notebook.Run(None, 0, task="NetHackScore-v0", warm_up=1)
        config = replace(notebook.Config(), num_games=num_games)
        self.notebook, self.learner = notebook, notebook.Learner(run, config, torch.device("cpu"))
        self.actions = np.random.default_rng(0).integers(23, size=(STEPS, num_games))

    def play(self):
        for actions in self.actions:
            self.learner.games.step(actions)

    def act(self):
        for _ in range(STEPS):
            seen = self.learner.observation
            logits, _ = self.learner.judge(self.notebook.crops(seen), self.notebook.places(seen.blstats))
            actions = self.notebook.sample(logits, self.learner.generator)
            logits.log_softmax(1).gather(1, actions[:, None])
            self.learner.observation = self.learner.games.step(actions.numpy()).observation


class CleanRL:
    """A loop in the manner of CleanRL around gymnasium's vector environment, with the notebook's network."""

    def __init__(self, notebook, num_games):
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        self.envs = gymnasium.vector.SyncVectorEnv([self.make] * num_games, autoreset_mode=same_step)
        self.notebook, self.agent = notebook, notebook.Agent(23, 128)
        self.observation, _ = self.envs.reset(seed=0)
        self.actions = np.random.default_rng(0).integers(23, size=(STEPS, num_games))

    @staticmethod
    def make():
        return gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("NetHackScore-v0"))

    def play(self):
        for actions in self.actions:
            self.envs.step(actions)

    def act(self):
        for _ in range(STEPS):
            seen = self.notebook.Observation(self.observation["glyphs"], self.observation["blstats"])
            view = self.notebook.tensors("cpu", self.notebook.crops(seen), self.notebook.places(seen.blstats))
            with torch.no_grad():
                logits, _ = self.agent(*view)
                policy = torch.distributions.Categorical(logits=logits)
                action = policy.sample()
                policy.log_prob(action)
                policy.entropy()
            self.observation, *_ = self.envs.step(action.numpy())


def bench_games(notebook, num_games):
    """Steps per second of both ways."""
    theirs, ours = CleanRL(notebook, num_games), Notebook(notebook, num_games)
    cases = {
        "games alone": {"theirs": theirs.play, "ours": ours.play},
        "games + agent": {"theirs": theirs.act, "ours": ours.act},
    }
    for what, ways in cases.items():
        seconds = MEASURE.seconds_in_turns(ways, ROUNDS, "cpu")
        slow, fast = (f"{STEPS * num_games / seconds[way]:7,.0f}" for way in ("theirs", "ours"))
        print(f"{num_games:3} games, {what:13}: CleanRL's way {slow} steps/s, notebook {fast}:", end=" ")
        print(f"{seconds['theirs'] / seconds['ours']:.1f} times", flush=True)


def bench_training(notebook, rollouts=10):
    """Where the time of the whole training goes."""
    learner = notebook.Learner(notebook.Run(None, 0, task="NetHackScore-v0"), notebook.Config(), torch.device("cpu"))
    seconds, steps = {"playing": 0.0, "bonus": 0.0, "learning": 0.0}, rollouts * learner.config.num_games * learner.config.horizon
    for _ in range(rollouts):
        times = [time.perf_counter()]
        rollout, last = notebook.collect(learner)
        times.append(time.perf_counter())
        _, bonus = notebook.curiosity(learner, rollout)
        times.append(time.perf_counter())
        notebook.improve(learner, rollout, *notebook.advantages_of(rollout, last, bonus, learner.run, learner.config))
        times.append(time.perf_counter())
        for name, spent in zip(seconds, np.diff(times), strict=True):
            seconds[name] += spent
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {spent / total:.0%}" for name, spent in seconds.items())
    print(f"whole training, 16 games: {steps / total:,.0f} steps/s: {parts}")


def main():
    torch.set_num_threads(1)
    notebook = lift.lift(cookbook.find("04")[0])
    for num_games in GAMES:
        bench_games(notebook, num_games)
    bench_training(notebook)


if __name__ == "__main__":
    main()
