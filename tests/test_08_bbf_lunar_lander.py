"""Notebook 08: every formula against a loop, a definition or a library, and runs that go on exactly where they stopped."""

import copy
import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch


@pytest.fixture
def small(nb08):
    """Agents that learn from the tenth step on and are reset every eight gradient steps."""
    return replace(
        nb08.Config(), width=8, atoms=11, batch_size=4, replay_ratio=2, start=10, anneal=6, period=8, explore=0.02, weight_decay=0.1
    )


def by_loop(rewards, dones, bootstrap, gamma, n):
    """n-step returns of one trajectory, word for word."""
    result = []
    for t in range(len(rewards)):
        total, over = 0.0, False
        for k in range(n):
            if t + k == len(rewards):
                break
            total += gamma**k * rewards[t + k]
            last = k
            if dones[t + k]:
                over = True
                break
        result.append(total if over else total + gamma ** (last + 1) * bootstrap[t + last])
    return result


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("dones", [[], [9], [3], [0, 4, 9]])
def test_n_step_return_equals_a_loop(nb08, n, dones):
    rng = np.random.default_rng(n)
    rewards, bootstrap = rng.standard_normal((2, 10))
    over = np.isin(np.arange(10), dones).astype(float)
    found = nb08.n_step_return(*map(torch.tensor, (rewards, over, bootstrap)), 0.9, n)
    assert found.tolist() == pytest.approx(by_loop(rewards, over, bootstrap, 0.9, n))


def test_n_step_return_refuses_no_step(nb08):
    with pytest.raises(ValueError, match="n is 0"):
        nb08.n_step_return(*torch.zeros(3, 4), 0.9, 0)


def test_a_clock_bootstraps_and_a_crash_does_not(nb08):
    rewards, ends = torch.ones(1, 4), torch.tensor([[0.0, 1, 0, 0]])
    sums, discount, last = nb08.n_step_sums(rewards, torch.zeros(1, 4), ends, 0.5, 3)
    assert (sums.item(), discount.item(), last.item()) == (1.5, 0.25, 1)
    sums, discount, last = nb08.n_step_sums(rewards, ends, ends, 0.5, 3)
    assert (sums.item(), discount.item(), last.item()) == (1.5, 0, 1)


def test_runs_may_differ_in_n_and_discount(nb08):
    rewards = torch.arange(1.0, 5).expand(2, 3, 4)  # (R, B, N)
    zeros = torch.zeros(2, 3, 4)
    sums, discount, last = nb08.n_step_sums(rewards, zeros, zeros, torch.tensor([[0.5], [1.0]]), torch.tensor([[2], [4]]))
    assert sums.tolist() == [[2.0] * 3, [10.0] * 3]
    assert discount.tolist() == [[0.25] * 3, [1.0] * 3]
    assert last.tolist() == [[1] * 3, [3] * 3]


SCHEDULE = [
    (0, 10, 0.97),
    (1000, 9, 0.97617),
    (2500, 7, 0.98313),
    (5000, 5, 0.99051),
    (7500, 4, 0.99467),
    (10_000, 3, 0.997),
    (99_999, 3, 0.997),
]


@pytest.mark.parametrize(("step", "n", "discount"), SCHEDULE)
def test_schedules(nb08, step, n, discount):
    assert nb08.annealed_horizon(step) == n
    assert nb08.annealed_discount(step) == pytest.approx(discount, abs=6e-6)


def test_equal_ends_are_fixed(nb08):
    assert {nb08.annealed_horizon(t, 5, 5, 100) for t in range(0, 200, 7)} == {5}
    assert nb08.annealed_discount(50, 0.99, 0.99, 100) == pytest.approx(0.99)


def by_definition(rewards, dones, probs, gamma, support):
    """C51's projection as its authors write it (algorithm 1), sample by sample."""
    low, high, step = support[0], support[-1], support[1] - support[0]
    result = np.zeros_like(probs)
    for i, (reward, done) in enumerate(zip(rewards, dones, strict=True)):
        for p, z in zip(probs[i], support, strict=True):
            b = min((min(max(reward + gamma * (1 - done) * z, low), high) - low) / step, len(support) - 1)
            under, over = math.floor(b), math.ceil(b)
            if under == over:
                result[i, under] += p
            else:
                result[i, under] += p * (over - b)
                result[i, over] += p * (b - under)
    return result


def test_projection_equals_the_definition(nb08):
    rng = np.random.default_rng(0)
    support = np.linspace(-4, 4, 51)
    rewards, dones = 3 * rng.standard_normal(200), (rng.random(200) < 0.3).astype(float)
    probs = rng.dirichlet(np.ones(51), 200)
    found = nb08.categorical_projection(*map(torch.tensor, (rewards, dones, probs)), 0.9, torch.tensor(support))
    np.testing.assert_allclose(found.numpy(), by_definition(rewards, dones, probs, 0.9, support), atol=1e-9)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, atol=1e-12)


def test_projection_keeps_the_mean_inside(nb08):
    support, probs = torch.linspace(-4, 4, 51, dtype=torch.float64), torch.rand(64, 51).double().softmax(1)
    rewards = torch.rand(64).double() / 10
    found = nb08.categorical_projection(rewards, torch.zeros(64, dtype=torch.float64), probs, 0.9, support)
    assert (found @ support - rewards - 0.9 * probs @ support).abs().max() < 1e-9


@pytest.mark.parametrize(("reward", "done", "expected"), [(1.0, 1, 3), (9.0, 1, 4), (-9.0, 0, 0), (-1.0, 1, 1)])
def test_projection_on_atoms_and_beyond_the_ends(nb08, reward, done, expected):
    probs = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]])
    found = nb08.categorical_projection(torch.tensor([reward]), torch.tensor([done]), probs, 1.0, torch.linspace(-2, 2, 5))
    assert found[0, expected].item() == pytest.approx(1)


def test_a_stack_is_many_networks(nb08, small):
    stack, x = nb08.Network(3, small), torch.randn(3, 5, 8)
    found = stack(x)
    for run in range(3):
        one = nb08.Network(1, small)
        with torch.no_grad():
            for alone, together in zip(one.parameters(), stack.parameters(), strict=True):
                alone.copy_(together[run : run + 1])
        torch.testing.assert_close(one(x[run : run + 1])[0], found[run])


def test_dueling_advantages_have_mean_zero(nb08, small):
    network, x = nb08.Network(2, small), torch.randn(2, 5, 8)
    value = network.heads["value"](network.encoder(x))
    torch.testing.assert_close(network(x).mean(2), value)


def test_decay_is_for_matrices_only(nb08, small):
    network = nb08.Network(1, small)
    before = copy.deepcopy(network.state_dict())
    optimiser = nb08.optimiser_of(network, small)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    kept = 1 - small.learning_rate * small.weight_decay
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name] * (kept if name.endswith("weight") else 1))


def test_learning_equals_plain_autograd_and_adamw(nb08, small):
    """One gradient step of two runs against two networks written with F.linear, and PyTorch's plain AdamW."""
    torch.manual_seed(0)
    agent = nb08.BBF(2, small, torch.device("cpu"))
    for p in agent.slow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    batch = {"observations": torch.randn(2, 4, 8), "next": torch.randn(2, 4, 8), "actions": torch.randint(4, (2, 4))}
    batch |= {"rewards": torch.randn(2, 4), "discount": torch.rand(2, 4)}
    probabilities = torch.rand(2, 4)
    fast, slow = copy.deepcopy(agent.fast.state_dict()), copy.deepcopy(agent.slow.state_dict())
    priorities = agent.learn(batch, probabilities)
    support = np.linspace(-small.limit, small.limit, small.atoms)
    for run in range(2):
        own = {name: value[run].clone().requires_grad_() for name, value in fast.items()}
        other = {name: value[run] for name, value in slow.items()}

        def logits(weights, x):
            for layer in ("encoder.0", "encoder.2"):
                x = torch.relu(x @ weights[f"{layer}.weight"] + weights[f"{layer}.bias"])
            value = x @ weights["heads.value.weight"] + weights["heads.value.bias"]
            advantage = (x @ weights["heads.advantage.weight"] + weights["heads.advantage.bias"]).view(4, 4, -1)
            return value[:, None] + advantage - advantage.mean(1, keepdim=True)

        with torch.no_grad():
            best = (logits(own, batch["next"][run]).softmax(-1) @ torch.tensor(support).float()).argmax(1)
            following = logits(other, batch["next"][run])[torch.arange(4), best].softmax(1)
        rewards, discount = batch["rewards"][run].numpy(), batch["discount"][run].tolist()
        cases = [(rewards[i : i + 1], following[i : i + 1].double().numpy(), discount[i]) for i in range(4)]
        target = np.stack([by_definition(reward, [0.0], probs, gamma, support)[0] for reward, probs, gamma in cases])
        chosen = logits(own, batch["observations"][run])[torch.arange(4), batch["actions"][run]]
        losses = -(torch.tensor(target).float() * chosen.log_softmax(1)).sum(1)
        weights = probabilities[run] ** -0.5
        loss = (weights / weights.max() * losses).mean()
        loss.backward()
        decayed = [own[name] for name in own if name.endswith("weight")]
        free = [own[name] for name in own if name.endswith("bias")]
        torch.optim.AdamW(decayed, small.learning_rate, weight_decay=small.weight_decay).step()
        torch.optim.AdamW(free, small.learning_rate, weight_decay=0).step()
        torch.testing.assert_close(priorities[run], losses.detach().sqrt(), atol=1e-5, rtol=1e-5)
        for name, value in agent.fast.state_dict().items():
            torch.testing.assert_close(value[run], own[name].detach(), atol=1e-6, rtol=1e-5)
            moved = slow[name][run] + small.tau * (own[name].detach() - slow[name][run])
            torch.testing.assert_close(agent.slow.state_dict()[name][run], moved, atol=1e-6, rtol=1e-5)


def test_agents_act_by_the_slow_network(nb08, small):
    agent = nb08.BBF(1, small, torch.device("cpu"))
    with torch.no_grad():
        agent.slow.heads["advantage"].weight.zero_()
        agent.slow.heads["advantage"].bias.zero_()
        agent.slow.heads["advantage"].bias.view(4, small.atoms)[2, -1] = 9  # action 2 pays most
    assert agent.act(torch.randn(1, 6, 8)).tolist() == [[2] * 6]


@pytest.mark.parametrize(("since", "expected"), [(0, 1), (10, 1), (15, 0.5), (20, 0.02), (100, 0.02)])
def test_exploration_ends(nb08, small, since, expected):
    assert nb08.BBF(1, small, torch.device("cpu")).exploration(since) == pytest.approx(expected)


def filled(nb08, runs, count, capacity=700, ends=()):
    """A replay whose rewards count 0, 1, 2, ... in each run."""
    replay = nb08.Replay(runs, capacity)
    for step in range(count):
        end = torch.full((runs,), float(step in ends))
        observation = torch.full((runs, 8), float(step))
        replay.add(
            rewards=torch.full((runs,), float(step)), dones=end, ends=end, observations=observation, next=observation + 1,
            actions=torch.full((runs,), step % 4),
        )  # fmt: skip
    return replay


def test_draws_by_priority(nb08):
    priorities, generator = nb08.Priorities(2, 600), torch.Generator().manual_seed(0)
    wanted = torch.rand(2, 600, generator=generator) ** 3
    priorities.change(torch.arange(600).expand(2, -1), wanted)
    shares = wanted / wanted.sum(1, keepdim=True)
    index, probabilities = priorities.draw(100_000, generator)
    torch.testing.assert_close(probabilities, shares.gather(1, index), rtol=1e-4, atol=1e-8)
    for run in range(2):
        counts = index[run].bincount(minlength=600).numpy()
        expected = 100_000 * shares[run].double().numpy() / shares[run].double().sum().item()
        assert scipy.stats.chisquare(counts, expected).pvalue > 0.001


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_draws_stay_inside(nb08, count):
    """Nothing is drawn that was never added, at the ends of a block either."""
    priorities, generator = nb08.Priorities(1, 1000), torch.Generator().manual_seed(0)
    priorities.change(torch.arange(count)[None], torch.ones(1, count))
    index, probabilities = priorities.draw(20_000, generator)
    assert index.min() == 0
    assert index.max() == count - 1
    torch.testing.assert_close(probabilities, torch.full((1, 20_000), 1 / count))


def test_a_draw_beyond_the_sum_is_the_last_place(nb08, monkeypatch):
    priorities = nb08.Priorities(1, 1000)
    priorities.change(torch.arange(300)[None], torch.full((1, 300), 0.1))
    monkeypatch.setattr(torch, "rand", lambda shape, **settings: torch.ones(shape))
    index, _ = priorities.draw(3, None)
    assert index.tolist() == [[299] * 3]


def test_new_transitions_get_the_largest_priority(nb08):
    replay = filled(nb08, 1, 10)
    replay.priorities.change(torch.tensor([[3, 4]]), torch.tensor([[7.0, 0.5]]))
    replay.add(rewards=torch.zeros(1))
    assert replay.priorities.values.flatten(1)[0, :12].tolist() == [1, 1, 1, 7, 0.5, 1, 1, 1, 1, 1, 7, 0]
    assert replay.priorities.sums[0, 0].item() == pytest.approx(8 + 7 + 0.5 + 7)


def test_sums_follow_priorities(nb08):
    """Also where a place is given twice in a batch."""
    priorities, generator = nb08.Priorities(2, 700), torch.Generator().manual_seed(1)
    for _ in range(50):
        index = torch.randint(700, (2, 32), generator=generator)
        priorities.change(index, torch.rand(2, 32, generator=generator))
    torch.testing.assert_close(priorities.sums, priorities.values.sum(2))


def test_batches_hold_n_step_transitions(nb08):
    replay = filled(nb08, 2, 20, ends=(5, 19))
    index = torch.tensor([[0, 4, 17], [0, 4, 18]])
    batch = replay.batch(index, torch.tensor([[3], [2]]), torch.tensor([[0.5], [1.0]]), 3)
    assert batch["rewards"].tolist() == [[0 + 0.5 * 1 + 0.25 * 2, 4 + 0.5 * 5, 17 + 0.5 * 18 + 0.25 * 19], [1, 9, 37]]
    assert batch["discount"].tolist() == [[0.125, 0, 0], [1, 0, 0]]
    assert batch["next"][..., 0].tolist() == [[3, 6, 20], [2, 6, 20]]
    assert batch["observations"][..., 0].tolist() == index.tolist()
    assert batch["actions"].tolist() == [[0, 0, 1], [0, 0, 2]]


def test_the_newest_transition_bootstraps(nb08):
    replay = filled(nb08, 1, 20)
    batch = replay.batch(torch.tensor([[19, 18]]), torch.tensor([[3]]), torch.tensor([[0.5]]), 3)
    assert batch["rewards"].tolist() == [[19, 18 + 0.5 * 19]]
    assert batch["discount"].tolist() == [[0.5, 0.25]]
    assert batch["next"][..., 0].tolist() == [[20, 20]]


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_shrink_and_perturb(nb08, alpha):
    old, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before, draw = copy.deepcopy(old.state_dict()), copy.deepcopy(fresh.state_dict())
    nb08.shrink_and_perturb(old, fresh, alpha)
    for name, value in old.state_dict().items():
        torch.testing.assert_close(value, alpha * before[name] + (1 - alpha) * draw[name])
    assert all(torch.equal(value, draw[name]) for name, value in fresh.state_dict().items())


def test_shrink_and_perturb_refuses_no_share(nb08):
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        nb08.shrink_and_perturb(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 1.5)


def test_a_reset_restarts_heads_and_all_moments(nb08, small):
    agent = nb08.BBF(2, small, torch.device("cpu"))
    batch = {"observations": torch.randn(2, 4, 8), "next": torch.randn(2, 4, 8), "actions": torch.zeros(2, 4).long()}
    agent.learn(batch | {"rewards": torch.ones(2, 4), "discount": torch.ones(2, 4)}, torch.ones(2, 4))
    before = {name: copy.deepcopy(getattr(agent, name).state_dict()) for name in ("fast", "slow")}
    torch.manual_seed(7)
    agent.reset()
    torch.manual_seed(7)
    for name in ("fast", "slow"):  # each by a draw of its own, in this order
        fresh = nb08.Network(2, small).state_dict()
        for key, value in getattr(agent, name).state_dict().items():
            expected = (before[name][key] + fresh[key]) / 2 if key.startswith("encoder") else fresh[key]
            torch.testing.assert_close(value, expected)
    assert not agent.optimiser.state


def run_of(nb08, small, steps, checkpoint, way=None):
    """(agent, landers, log) of two runs."""
    torch.manual_seed(3)
    agent, landers = nb08.BBF(2, small, torch.device("cpu")), nb08.Landers([1, 2])
    log = nb08.train(agent, [way or nb08.Way()] * 2, landers, steps, 0, checkpoint)
    return agent, landers, log


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 40, 90])
def test_a_run_goes_on_exactly(nb08, small, stop, tmp_path):
    """Whether it is stopped before learning, at a reset, or in the middle of an episode."""
    whole, landers, _ = run_of(nb08, small, 120, nb08.Checkpoint(None, "run", 1))

    class Stops(nb08.Checkpoint):
        calls = 0

        def due(self):
            return True

        def save(self, *arguments, **parts):
            super().save(*arguments, **parts)
            self.calls += 1
            if self.calls == stop:
                raise Interrupted

    with pytest.raises(Interrupted):
        run_of(nb08, small, 120, Stops(tmp_path, "run", 1))
    again, others, log = run_of(nb08, small, 120, nb08.Checkpoint(tmp_path, "run", 1))
    assert log["steps"] == 120
    assert others.finished == landers.finished
    np.testing.assert_array_equal(others.observations, landers.observations)
    for mine, other in zip(whole.fast.parameters(), again.fast.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_replay_holds_what_happened(nb08, small):
    """What followed a step is where the next begins, and rewards are a hundredth of the landers'."""
    held = []
    agent, landers = nb08.BBF(2, small, torch.device("cpu")), nb08.Landers([1, 2])
    nb08.train(agent, [nb08.Way()] * 2, landers, 300, 0, nb08.Checkpoint(None, "run", 1), lambda agent, replay: held.append(replay))
    replay = held[-1]
    stored = {name: getattr(replay, name)[:, : replay.size] for name in ("rewards", "ends", "observations", "next")}
    inside = stored["ends"][:, :-1] == 0
    assert torch.equal(stored["next"][:, :-1][inside], stored["observations"][:, 1:][inside])
    assert not torch.equal(stored["next"], stored["observations"])
    _, run, value = landers.finished[0]
    last = int(stored["ends"][run].argmax())
    assert 100 * stored["rewards"][run, : last + 1].sum().item() == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize(("way", "resets", "explores"), [("reset", True, False), ("explore", False, True), ("nothing", False, False)])
def test_what_happens_at_a_reset(nb08, small, way, resets, explores):
    calls = []
    torch.manual_seed(3)
    agent, landers = nb08.BBF(1, small, torch.device("cpu")), nb08.Landers([1])
    agent.reset = lambda: calls.append(1)
    log = nb08.train(agent, [nb08.Way(at_reset=way)], landers, 30, 0, nb08.Checkpoint(None, "run", 1))
    assert log["learned"] == 40
    assert len(calls) == 4 * resets
    assert log["reset"] == 32 * resets
    assert log["explore"] == 26 * explores


def test_landers_repeat_themselves(nb08):
    landers = nb08.Landers([5, 6, 7])
    rng = np.random.default_rng(0)
    for _ in range(150):
        landers.step(rng.integers(4, size=3))
    again = nb08.Landers([0, 0, 0])
    again.load_state_dict(landers.state_dict())
    np.testing.assert_array_equal(again.observations, landers.observations)
    for _ in range(50):
        actions = rng.integers(4, size=3)
        one, other = landers.step(actions), again.step(actions)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert again.finished == landers.finished


def test_the_clock_is_no_crash(nb08, monkeypatch):
    monkeypatch.setattr(nb08.Lander, "LIMIT", 5)
    landers = nb08.Landers([1])
    steps = [landers.step([0]) for _ in range(5)]
    assert [step["ends"].item() for step in steps] == [0, 0, 0, 0, 1]
    assert [step["dones"].item() for step in steps] == [0] * 5
    assert len(landers.finished) == 1
    assert landers.finished[0][:2] == (5, 0)


def test_observations_stay_with_their_holder(nb08):
    landers = nb08.Landers([1])
    held = landers.observations
    before = held.copy()
    landers.step([2])
    np.testing.assert_array_equal(held, before)


def test_evaluation_counts_first_episodes_of_each_place(nb08, small):
    agent = nb08.BBF(2, small, torch.device("cpu"))
    found = nb08.evaluate(agent, [3, 4], 6, side=3)
    assert found.shape == (2, 6)
    assert np.isfinite(found).all()


def test_a_missing_box2d_says_what_to_install(nb08, monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="pip install box2d"):
        nb08.new_lander()


# What rliable 1.2.0 gives; it is published as source only, and the tests install wheels.
RLIABLE_IQM = {
    4: -0.02959999643662835, 5: -0.0703524554171062, 10: -0.28356442362957684, 11: -0.13128145987459558, 40: -0.10083604615808868,
}  # fmt: skip
RLIABLE_INTERVAL = -0.3219061642820612, 0.18464097873993743  # of 20,000 draws
RLIABLE_ABOVE = [12, 12, 9, 9, 8, 8, 6, 6, 6, 6, 5, 5, 3, 3, 3, 3, 1, 1, 0, 0, 0]  # of 12 runs
RLIABLE_IMPROVEMENT = 0.24166666666666667


@pytest.mark.parametrize("count", RLIABLE_IQM)
def test_iqm_equals_scipy_and_rliable(nb08, count):
    scores = np.random.default_rng(count).standard_normal((count, 3))
    assert nb08.iqm(scores) == pytest.approx(RLIABLE_IQM[count])
    assert nb08.iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25, axis=None))


def test_iqm_of_too_few(nb08):
    with pytest.warns(UserWarning, match="3 scores"):
        assert nb08.iqm([1, 2, 6]) == 3


def test_intervals_equal_rliables(nb08):
    """Two bootstraps of 20,000 draws each, so up to their own noise."""
    scores = np.random.default_rng(0).standard_normal((10, 4))
    found = nb08.stratified_bootstrap_ci(scores, reps=20_000)
    np.testing.assert_allclose(found, RLIABLE_INTERVAL, atol=0.015)


def test_strata_are_drawn_apart(nb08):
    """With tasks that never overlap, each is drawn from its own runs, and not the same runs for all."""
    scores = np.stack([np.arange(8.0), 1000 * np.arange(8.0)], 1)
    drawn = nb08.bootstrap_iqms(scores, 4000, np.random.default_rng(0))
    ours = [
        scipy.stats.trim_mean(np.concatenate([rng.choice(scores[:, 0], 8), rng.choice(scores[:, 1], 8)]), 0.25)
        for rng in [np.random.default_rng(1)]
        for _ in range(4000)
    ]
    assert np.mean(drawn) == pytest.approx(np.mean(ours), rel=0.1)
    assert np.std(drawn) == pytest.approx(np.std(ours), rel=0.1)


def test_profiles_and_improvement_equal_rliables(nb08):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, (12, 1)).astype(float), rng.integers(2, 9, (10, 1)).astype(float)
    thresholds = np.linspace(-1, 9, 21)
    np.testing.assert_allclose(12 * nb08.performance_profile(first, thresholds), RLIABLE_ABOVE)
    assert nb08.probability_of_improvement(first, second) == pytest.approx(RLIABLE_IMPROVEMENT)


def test_differences_are_paired_by_run(nb08):
    """What two methods share by seed leaves their difference: without noise of its own the interval has no width."""
    scores = np.random.default_rng(0).standard_normal((10, 1))
    assert nb08.difference_ci(scores, scores) == (0, 0, 0)
    assert nb08.difference_ci(scores + 5, scores) == pytest.approx((5, 5, 5))
    other = np.random.default_rng(1).standard_normal((10, 1))
    draws = np.random.default_rng(2).integers(10, size=(20_000, 10))
    drawn = [scipy.stats.trim_mean(part[:, 0][draws], 0.25, axis=1) for part in (scores, other)]
    expected = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    assert nb08.difference_ci(scores, other, reps=20_000)[1:] == pytest.approx(expected, abs=0.05)


def test_effects_are_paired_by_run(nb08):
    shared = np.random.default_rng(3).standard_normal((10, 1))
    scores = {cell: shared + 2 * cell[2] for cell in nb08.cells_of(nb08.OFF)}
    effects = {name: nb08.effect_ci(scores, signs) for name, signs in nb08.contrasts(nb08.OFF).items()}
    assert effects.pop("resets") == pytest.approx((2, 2, 2))
    assert all(effect == pytest.approx((0, 0, 0)) for effect in effects.values())


def test_dqn_learns_like_stable_baselines(nb08, small):
    """A gradient step of the plain DQN against smooth L1 on the maximum, clipped, by plain Adam."""
    torch.manual_seed(0)
    agent = nb08.DQN(2, small, torch.device("cpu"), steps=100)
    batch = {"observations": torch.randn(2, 16, 8), "next": torch.randn(2, 16, 8), "actions": torch.randint(4, (2, 16))}
    batch |= {"rewards": torch.randn(2, 16), "discount": torch.rand(2, 16)}
    before = copy.deepcopy(agent.fast.state_dict())
    agent.learn(batch, torch.ones(2, 16))
    for run in range(2):
        layers = [torch.nn.Linear(8, 256), torch.nn.Linear(256, 256), torch.nn.Linear(256, 4)]
        network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
        with torch.no_grad():
            for layer, name in zip(layers, ("encoder.0", "encoder.2", "head"), strict=True):
                layer.weight.copy_(before[f"{name}.weight"][run].T)
                layer.bias.copy_(before[f"{name}.bias"][run, 0])
        optimiser = torch.optim.Adam(network.parameters(), 6.3e-4)
        with torch.no_grad():
            target = 100 * batch["rewards"][run] + batch["discount"][run] * network(batch["next"][run]).max(1).values
        values = network(batch["observations"][run]).gather(1, batch["actions"][run][:, None])[:, 0]
        torch.nn.functional.smooth_l1_loss(values, target).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10)
        optimiser.step()
        torch.testing.assert_close(agent.fast.state_dict()["encoder.0.weight"][run], layers[0].weight.T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(agent.fast.state_dict()["head.bias"][run, 0], layers[2].bias, atol=1e-6, rtol=1e-4)


def test_dqn_copies_its_target_now_and_then(nb08, small):
    agent = nb08.DQN(1, small, torch.device("cpu"), steps=100)
    batch = {"observations": torch.randn(1, 2, 8), "next": torch.randn(1, 2, 8), "actions": torch.zeros(1, 2).long()}
    batch |= {"rewards": torch.ones(1, 2), "discount": torch.ones(1, 2)}
    for step in range(1, 252):
        agent.learn(batch, torch.ones(1, 2))
        same = all(torch.equal(a, b) for a, b in zip(agent.fast.parameters(), agent.slow.parameters(), strict=True))
        assert same == (step == 250)


def test_cells_are_all_combinations(nb08):
    cells = nb08.cells_of(nb08.OFF)
    assert len(cells) == len(set(cells.values())) == 8
    assert cells[True, True, True] == nb08.Way()
    assert cells[False, True, False] == nb08.Way(horizon=(3, 3), at_reset="nothing")


def test_effects_are_those_of_a_linear_model(nb08):
    """Scores made from known effects without scatter give them back."""
    cells, rng = list(nb08.cells_of(nb08.OFF)), np.random.default_rng(0)
    known = {name: rng.standard_normal() for name in nb08.contrasts(nb08.OFF)}
    signs = nb08.contrasts(nb08.OFF)
    scores = {cell: np.full((8, 1), sum(known[name] / 2 * signs[name][cell] for name in known)) for cell in cells}
    for name, value in known.items():
        mean, low, high = nb08.effect_ci(scores, signs[name], reps=20)
        assert (mean, low, high) == pytest.approx((value, value, value))
    for one, other in zip(signs.values(), list(signs.values())[1:], strict=False):
        assert sum(one[cell] * other[cell] for cell in cells) == 0


def test_effects_have_their_interval(nb08):
    rng = np.random.default_rng(1)
    scores = {cell: rng.standard_normal((10, 1)) + 3 * cell[0] for cell in nb08.cells_of(nb08.OFF)}
    effects = {name: nb08.effect_ci(scores, signs) for name, signs in nb08.contrasts(nb08.OFF).items()}
    _mean, low, high = effects["horizon"]
    assert low < 3 < high
    assert 0 < high - low < 2
    assert all(low < 0 < high for name, (_, low, high) in effects.items() if name not in ("horizon", "discount × resets"))


def test_curves_carry_the_last_value_on(nb08):
    run = {"curve": [(10, 1.0), (12, 3.0), (100, 7.0)]}
    np.testing.assert_array_equal(nb08.curve_of(run, 100, bins=5), [2, 2, 2, 2, 7])
    assert np.isnan(nb08.curve_of({"curve": [(100, 7.0)]}, 100, bins=2)[0])


def test_return_curve_is_the_mean_from_where_every_run_has_ended_an_episode(nb08):
    runs = [{"curve": [(5, 1.0), (60, 3.0)]}, {"curve": [(30, 5.0), (100, 7.0)]}]
    curve = nb08.return_curve(runs, 100)
    assert curve["step"] == list(range(30, 101, 5))
    assert curve["return"] == [3.0] * 6 + [4.0] * 8 + [5.0]


def test_stacks_keep_kinds_of_resets_apart(nb08):
    ways = list(nb08.cells_of(nb08.OFF).values())
    stacks = nb08.stacks_of(ways, range(10), 20)
    assert [len(seeds) for _, seeds in stacks] == [20] * 4
    assert all(len({way.at_reset for way in chosen}) == 1 for chosen, _ in stacks)
    placed = {pair for chosen, seeds in stacks for pair in zip(chosen, seeds, strict=True)}
    assert placed == set(itertools.product(ways, range(10)))


def test_runs_are_sorted_by_way(nb08):
    ways = nb08.Way(), nb08.Way(horizon=(3, 3))
    runs = [{"final": [value]} for value in range(5)]
    found = nb08.by_way([(ways, (0, 0)), ((ways[1], ways[0], ways[1]), (1, 1, 2))], [runs[:2], runs[2:]])
    assert found == {ways[0]: [runs[0], runs[3]], ways[1]: [runs[1], runs[2], runs[4]]}
    np.testing.assert_array_equal(nb08.scores_of(found[ways[0]]), [[0], [3]])


def test_a_stack_is_taken_apart_into_runs(nb08, small, monkeypatch):
    agents = []
    trained = nb08.train
    monkeypatch.setattr(nb08, "train", lambda agent, *rest: agents.append(agent) or trained(agent, *rest))
    monkeypatch.setattr(nb08, "evaluate", lambda agent, seeds, episodes: np.array([[1.0, 2.0], [3.0, 4.0]]))
    monkeypatch.setattr(nb08.Lander, "LIMIT", 25)  # each lander ends an episode or more
    ways = nb08.Way(), nb08.Way(horizon=(3, 3))
    runs = nb08.run_stack(nb08.BBF, small, ways, (0, 1), 60, 2, "cpu", None)
    assert [run["final"] for run in runs] == [[1.0, 2.0], [3.0, 4.0]]
    assert runs[0]["curve"] != runs[1]["curve"]
    looks = nb08.plasticity(agents[0], nb08.Replay(2, 60))
    assert set(runs[0]["measures"]) == set(looks)
    for n, run in enumerate(runs):
        assert [step for step, _ in run["curve"]] == sorted(step for step, _ in run["curve"])
        assert run["curve"][0][0] <= 25
        assert [len(values) for values in run["measures"].values()] == [20, 20]
        assert run["measures"]["weight norm"][-1] == pytest.approx(looks["weight norm"][n])
        alone = nb08.BBF(1, small, torch.device("cpu"))  # the weights are those of a run for itself
        alone.slow.load_state_dict(run["weights"])
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(alone.slow(x[n : n + 1])[0], agents[0].slow(x)[n])
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in run["weights"].values())  # not the stack's


def test_dormant_units_and_norms(nb08, small):
    agent, replay = nb08.BBF(2, small, torch.device("cpu")), filled(nb08, 2, 40)
    with torch.no_grad():
        for layer in (0, 2):
            agent.fast.encoder[layer].bias[0, 0, :4] = -1e6  # four of eight units never answer in the first run
    found = nb08.plasticity(agent, replay)
    assert found["dormant units, %"][0] >= 50
    norm = math.sqrt(sum(p[1].square().sum().item() for p in agent.fast.parameters()))
    assert found["weight norm"][1] == pytest.approx(norm, rel=1e-5)


def test_a_support_that_is_too_short_is_said(nb08, capsys):
    nb08.check_support([-450.0, 260.0, 0.0, 10.0], 4.0)
    assert "25.0 % of the episodes' returns, not discounted, from -450 to 260, lie beyond the atoms' 400" in capsys.readouterr().out


def test_a_support_that_covers_all_is_quiet(nb08, capsys):
    nb08.check_support([-390.0, 260.0], 4.0)
    nb08.check_support([], 4.0)
    assert not capsys.readouterr().out


def test_share_of_episodes_that_the_clock_ends(nb08):
    run = {"curve": [(300, -5.0), (1300, -60.0), (1500, 20.0)]}
    assert nb08.clock_share(run, 1500) == 50  # of the episodes of 1,000 and of 200 steps
    assert nb08.clock_share(run, 2000) == 100  # none ended: the last one still hovers
    assert nb08.clock_share({"curve": []}, 100) == 100


def test_curves_of_runs_that_have_ended_nothing_are_empty(nb08):
    runs = [{"curve": []}, {"curve": [(30, 5.0)]}]
    assert nb08.return_curve(runs, 100) == {"step": [], "return": []}
    figure, axis = nb08.plt.subplots()
    nb08.draw_curves(axis, {"none": runs}, 100)
    nb08.plt.close(figure)
    assert len(axis.lines[0].get_xdata()) == 0


def test_curves_are_drawn_where_they_belong(nb08):
    """Against thousands of steps, the middle of the runs inside the band of their own intervals."""
    runs = [{"curve": [(step, value) for step in range(1000, 20_001, 1000)]} for value in (0.0, 10, 20, 30, 40)]
    figure, axis = nb08.plt.subplots()
    nb08.draw_curves(axis, {"runs": runs}, 20_000)
    (line,), (band,) = axis.lines, axis.collections
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 21))
    np.testing.assert_allclose(line.get_ydata(), 20)
    low, high = nb08.stratified_bootstrap_ci(np.array([[0.0], [10], [20], [30], [40]]), reps=300)
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((low, high))
    nb08.plt.close(figure)


def learning_batch(runs, generator):
    """A batch as a replay gives it, and probabilities, for 16 samples of each run."""
    shape = runs, 16
    batch = {"rewards": torch.randn(shape, generator=generator), "discount": torch.full(shape, 0.9)}
    batch |= {name: torch.randn(*shape, 8, generator=generator) for name in ("observations", "next")}
    batch["actions"] = torch.randint(4, shape, generator=generator)
    return batch, torch.rand(shape, generator=generator)


def test_the_loss_is_one_graph_and_learns_the_same(nb08, small):
    agents = []
    for backend in (None, "aot_eager"):  # traced and run without a compiler for the machine
        torch.manual_seed(0)
        agents.append(nb08.BBF(3, small, torch.device("cpu")))
        if backend:
            torch.compiler.reset()
            agents[-1].losses = torch.compile(nb08.cross_entropies, backend=backend, fullgraph=True)
        generator = torch.Generator().manual_seed(1)
        found = [agents[-1].learn(*learning_batch(3, generator)) for _ in range(4)]
    torch.compiler.reset()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    torch.testing.assert_close(found[0], nb08.BBF(3, small, torch.device("cpu")).learn(*learning_batch(3, generator)))
    for one, other in zip(agents[0].parameters(), agents[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_compiled_on_a_gpu_only(nb08, small, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append((function, how)) or "graph")
    wanted = replace(small, compiled=True)
    assert nb08.losses_of(wanted, torch.device("cpu")) is nb08.cross_entropies
    assert nb08.losses_of(replace(small, compiled=False), torch.device("cuda")) is nb08.cross_entropies
    monkeypatch.setattr(nb08.importlib.util, "find_spec", lambda name: None)  # no triton
    assert nb08.losses_of(wanted, torch.device("cuda")) is nb08.cross_entropies
    assert not asked
    monkeypatch.setattr(nb08.importlib.util, "find_spec", lambda name: name == "triton")
    assert nb08.losses_of(wanted, torch.device("cuda")) == "graph"
    assert asked == [(nb08.cross_entropies, {"mode": "reduce-overhead", "fullgraph": True})]
