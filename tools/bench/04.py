"""Speed of notebook 04 on this machine, beside a loop as CleanRL's: `make bench NB=04`.

    python -m tools.bench.04

Both play `NetHackScore-v0` with the same agent network in one thread. CleanRL's way is a gymnasium SyncVectorEnv of the registered
environment with its default observations, in which every observation of the dict is copied each step, and a step of the agent by
torch.distributions with log-probability, entropy and value, as in its PPO scripts. The notebook's way is `Learner.act` and `Games.step`.
Measured in turns: games alone, and games with the agent. Then where the time of the notebook's whole training goes.
"""

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
        run = notebook.Run(task="NetHackScore-v0", num_games=num_games, warm_up=1)
        self.learner = notebook.Learner(run, torch.device("cpu"))
        self.actions = np.random.default_rng(0).integers(23, size=(STEPS, num_games))

    def play(self):
        for actions in self.actions:
            self.learner.games.step(actions)

    def act(self):
        for _ in range(STEPS):
            _, actions, _, _ = self.learner.act(self.learner.observation)
            self.learner.observation = self.learner.games.step(actions).observation


class CleanRL:
    """A loop in the manner of CleanRL around gymnasium's vector environment, with the notebook's network."""

    def __init__(self, notebook, num_games):
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        self.envs = gymnasium.vector.SyncVectorEnv([self.make] * num_games, autoreset_mode=same_step)
        self.inputs = lambda seen: notebook.inputs_of(notebook.Observation(seen["glyphs"], seen["blstats"]))
        self.agent = notebook.Agent(23, 8, 16, 128)
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
            crop, glyphs, vector = (torch.as_tensor(array) for array in self.inputs(self.observation))
            with torch.no_grad():
                logits, _ = self.agent(crop.int(), glyphs.int(), vector)
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


def bench_training(notebook):
    """Where the time of the whole training goes."""
    learner = notebook.Learner(notebook.Run(task="NetHackScore-v0"), torch.device("cpu"))
    for _ in range(10):
        notebook.update(learner)
    total = sum(learner.seconds.values())
    parts = ", ".join(f"{name} {spent / total:.0%}" for name, spent in learner.seconds.items())
    print(f"whole training, 16 games: {10 * 1024 / total:,.0f} steps/s: {parts}")


def main():
    torch.set_num_threads(1)
    notebook = lift.lift(cookbook.find("04")[0])
    for num_games in GAMES:
        bench_games(notebook, num_games)
    bench_training(notebook)


if __name__ == "__main__":
    main()
