"""Notebook 04 against independent implementations: plain loops, NumPy, SciPy, Stable-Baselines3's rollout buffer, and nle played by hand."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch
from nle import nethack
from nle.env import tasks
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from stable_baselines3.common.buffers import RolloutBuffer

CPU = torch.device("cpu")
LEVEL = 3  # the stairs down are 19 moves away


@pytest.fixture(autouse=True)
def one_thread():
    """As the notebook has it; sums of several threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(notebook, **change):
    """A run and a configuration of a few seconds."""
    config = dict(num_games=4, horizon=8, width=16, features=8, epochs=4)
    run = dict(level=LEVEL, seed=1, steps=5 * 32, max_steps=12, warm_up=3)
    for name, value in change.items():
        (config if name in notebook.Config.__dataclass_fields__ else run)[name] = value
    return notebook.Run(**run), notebook.Config(**config)


def learner_of(notebook, **change):
    return notebook.Learner(*small(notebook, **change), CPU)


def play(games, steps, actions=8, seed=0):
    """The observation to begin with and the Steps of random play."""
    generator = np.random.default_rng(seed)
    return games.reset(), [games.step(generator.integers(actions, size=len(games.games))) for _ in range(steps)]


def parts(value):
    """Arrays of an Observation, of Steps, of a tuple of arrays."""
    values = vars(value).values() if hasattr(value, "__dataclass_fields__") else value
    return [array for part in values for array in (parts(part) if hasattr(part, "__dataclass_fields__") else [part])]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# advantages


def rollout(T=9, N=4, seed=0):
    """rewards, values (T, N), last_value (N,), dones (T, N)."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(T, N)), generator.normal(size=(T, N)), generator.normal(size=N), generator.random((T, N)) < 0.25


def double_loop(rewards, values, last_value, dones, gamma, lam):
    """Every advantage by itself: the sum of later surprises, up to the end of the episode."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for i in range(N):
        for t in range(T):
            weight = 1.0
            for s in range(t, T):
                following = values[s + 1, i] if s + 1 < T else last_value[i]
                advantages[t, i] += weight * (rewards[s, i] + (0 if dones[s, i] else gamma * following) - values[s, i])
                if dones[s, i]:
                    break
                weight *= gamma * lam
    return advantages


@pytest.mark.parametrize("T", [1, 2, 9])
def test_gae_against_a_double_loop(nb04, T):
    arguments = rollout(T)
    np.testing.assert_allclose(nb04.gae(*arguments, 0.97, 0.9), double_loop(*arguments, 0.97, 0.9), rtol=0, atol=1e-12)


def test_gae_against_stable_baselines(nb04):
    rewards, values, last_value, dones = rollout()
    T, N = rewards.shape
    box = gymnasium.spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(T, box, box, gae_lambda=0.9, gamma=0.97, n_envs=N)
    begins = np.vstack([np.zeros(N), dones[:-1]])  # there an episode starts where the step before ended one
    for t in range(T):
        buffer.add(np.zeros((N, 1)), np.zeros((N, 1)), rewards[t], begins[t], torch.as_tensor(values[t]), torch.zeros(N))
    buffer.compute_returns_and_advantage(torch.as_tensor(last_value), dones[-1])
    np.testing.assert_allclose(nb04.gae(rewards, values, last_value, dones, 0.97, 0.9), buffer.advantages, rtol=0, atol=1e-5)


def test_gae_at_its_limits(nb04):
    rewards, values, last_value, dones = rollout()
    after = np.vstack([values[1:], last_value])
    np.testing.assert_allclose(nb04.gae(rewards, values, last_value, dones, 0.9, 0), rewards + 0.9 * ~dones * after - values)
    np.testing.assert_allclose(nb04.gae(rewards, values, last_value, np.ones_like(dones), 0.9, 0.8), rewards - values)
    discounted = sum(0.9**t * rewards[t] for t in range(len(rewards))) + 0.9 ** len(rewards) * last_value
    np.testing.assert_allclose(nb04.gae(rewards, values, last_value, np.zeros_like(dones), 0.9, 1)[0], discounted - values[0])


def test_two_streams(nb04):
    rewards, values, last_value, dones = rollout()
    bonus, other, last, _ = rollout(seed=1)
    given = {"rewards": rewards, "values": np.stack([values, other], -1), "dones": dones}
    lasts = np.stack([last_value, last], -1)
    change = dict(gamma=0.95, gamma_intrinsic=0.8, lam=0.7, extrinsic_coefficient=3.0, intrinsic_coefficient=0.5)
    run, config = small(nb04, **change)
    extrinsic = double_loop(rewards, values, last_value, dones, 0.95, 0.7)
    intrinsic = double_loop(bonus, other, last, np.zeros_like(dones), 0.8, 0.7)  # not episodic
    for kind in ("rnd", "count"):
        advantages, targets = nb04.advantages_of(given, lasts, bonus, replace(run, bonus=kind), config)
        np.testing.assert_allclose(advantages, 3 * extrinsic + 0.5 * intrinsic)
        np.testing.assert_allclose(targets, np.stack([extrinsic + values, intrinsic + other], -1))
    for kind in ("none", "watch"):
        np.testing.assert_allclose(nb04.advantages_of(given, lasts, bonus, replace(run, bonus=kind), config)[0], 3 * extrinsic)


# statistics


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_running_statistics(nb04, shape, offset):
    batches = [np.random.default_rng(i).normal(offset, 2, (rows, *shape)) for i, rows in enumerate((1, 7, 100, 1))]
    running = nb04.RunningMeanStd(shape=shape, epsilon=1e-9)
    for batch in batches:
        running.update(batch)
    together = np.concatenate(batches)
    np.testing.assert_allclose(running.mean, together.mean(0), rtol=1e-6)
    np.testing.assert_allclose(running.var, together.var(0), rtol=1e-2 if offset else 1e-6)


def test_the_warm_up_and_the_rollouts_are_all_that_whitens(nb04):
    """The statistics of the inputs equal NumPy's over everything the random networks were shown."""
    learner = learner_of(nb04)
    assert learner.seen.count == pytest.approx(12, abs=1e-3)
    shown = []
    learner = learner_of(nb04, warm_up=0)
    for _ in range(3):
        given, _ = nb04.collect(learner)
        nb04.curiosity(learner, given)
        shown.append(given["arrived"].reshape(-1, 181))
    np.testing.assert_allclose(learner.seen.mean, np.concatenate(shown).mean(0), atol=1e-4)
    np.testing.assert_allclose(learner.seen.var, np.concatenate(shown).var(0), atol=1e-4)
    np.testing.assert_allclose(learner.novelty.scale, np.sqrt(learner.seen.var + 1e-8), rtol=1e-4)
    np.testing.assert_allclose(learner.novelty.shift, learner.seen.mean, rtol=1e-4, atol=1e-6)


def test_filter_is_a_discounted_sum_over_time(nb04):
    rewards = np.random.default_rng(0).normal(size=(40, 3))
    filtered = nb04.RewardForwardFilter(0.9)
    sums = np.array([filtered.update(row) for row in rewards])
    direct = [[sum(0.9 ** (t - s) * rewards[s, i] for s in range(t + 1)) for i in range(3)] for t in range(40)]
    np.testing.assert_allclose(sums, direct)


def test_filter_shares_no_memory(nb04):
    filtered, row = nb04.RewardForwardFilter(0.9), np.ones(2)
    first = filtered.update(row)
    row[:], first[:] = 7, 7
    np.testing.assert_allclose(filtered.update(np.zeros(2)), 0.9)


# the objective


def scalar_loss(ratio, advantage, clip):
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, clipped * advantage)


def test_ppo_loss_against_scalars(nb04):
    cases = list(itertools.product((0.5, 0.89, 0.95, 1.0, 1.05, 1.11, 2.0), (-2.0, -0.1, 0.0, 0.1, 2.0)))
    ratio, advantage = torch.tensor(cases, dtype=torch.float64).T
    old = torch.randn(len(cases), dtype=torch.float64)
    loss = nb04.ppo_loss(old + ratio.log(), old, advantage, 0.1)
    assert loss.item() == pytest.approx(np.mean([scalar_loss(*case, 0.1) for case in cases]), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(1.2, 1, False), (1.2, -1, True), (0.8, 1, True), (0.8, -1, False), (1, 1, True)]
)
def test_ppo_gradient_stops_where_clipped(nb04, ratio, advantage, moves):
    log_p = torch.tensor([np.log(ratio)], requires_grad=True)
    nb04.ppo_loss(log_p, torch.zeros(1), torch.tensor([float(advantage)]), 0.1).backward()
    assert log_p.grad.item() == pytest.approx(-ratio * advantage if moves else 0)


# games


def test_a_level_and_its_dice_come_back(nb04):
    for level in (LEVEL, None):
        first, again, other = (play(nb04.Games("staircase", 3, 20, level, seed), 50) for seed in (0, 0, 1))
        assert same(first[0], again[0])
        assert all(same(a.observation, b.observation) and same(a.arrived, b.arrived) for a, b in zip(first[1], again[1], strict=True))
        assert all(same(a, b) for a, b in zip(first[1], again[1], strict=True))
        assert not all(same(a.observation, b.observation) for a, b in zip(first[1], other[1], strict=True))


def test_the_level_stays_and_the_dice_do_not(nb04):
    games = nb04.Games("staircase", 4, 8, LEVEL, 0)
    begin, steps = games.reset(), [games.step(np.full(4, 0)) for _ in range(8)]
    assert steps[-1].truncated.all()
    maps = np.concatenate([begin.glyphs, steps[-1].observation.glyphs])  # four games, the beginnings of two episodes each
    agree = (maps >= nethack.GLYPH_OBJ_OFF).all(0)  # no creature there
    assert (maps[:, agree] == maps[0, agree]).all()
    assert agree.mean() > 0.99
    assert len({step.arrived.glyphs[i].tobytes() for step in steps[-1:] for i in range(4)}) > 1  # the pet goes its own ways
    later = {game.get_seeds()[0] for game in games.games}
    games.step(np.zeros(4, int))
    other = nb04.Games("staircase", 4, 8, LEVEL, 0)
    other.reset()
    assert len(later | {game.get_seeds()[0] for game in other.games}) == 8  # other dice in each game and episode
    anew = nb04.Games("staircase", 4, 5, None, 0)
    assert len({tuple(glyphs.ravel()) for glyphs in anew.reset().glyphs}) == 4
    assert all(game.get_seeds()[0] != game.get_seeds()[3] for game in anew.games)  # a dungeon of its own, not one tied to the dice


def test_nothing_returned_changes_later(nb04):
    games = nb04.Games("staircase", 2, 6, LEVEL, 0)
    begin = games.reset()
    kept = [(begin, [array.copy() for array in parts(begin)])]
    for action in itertools.chain(range(8), range(8)):
        step = games.step(np.array([action, 7 - action]))
        kept += [(part, [array.copy() for array in parts(part)]) for part in (step.observation, step.arrived)]
    assert all(same(part, copies) for part, copies in kept)


def test_out_of_steps_is_truncated(nb04):
    """nle says terminated; the last observation, which nle wipes, is there, and the next episode has begun."""
    games = nb04.Games("staircase", 2, 6, LEVEL, 0)
    _, steps = play(games, 13)
    assert [step.truncated.all() for step in steps] == [(t + 1) % 6 == 0 for t in range(13)]
    assert not any(step.terminated.any() or step.rewards.any() for step in steps)
    end = steps[5]
    assert (end.arrived.blstats[:, nethack.NLE_BL_HPMAX] > 0).all()
    assert (end.arrived.blstats[:, nethack.NLE_BL_TIME] > 1).all()
    assert (end.observation.blstats[:, nethack.NLE_BL_TIME] == 1).all()
    for i in range(2):
        x, y = end.arrived.blstats[i, :2]
        assert end.arrived.glyphs[i, y, x] < nethack.GLYPH_BODY_OFF  # the agent stands where the numbers say
    assert all(same(step.observation, step.arrived) for step in steps[:5])


def test_the_stairs_end_the_episode(nb04):
    """The shortest walk that the program knows leads to reward 1, terminated and not truncated."""
    games = nb04.Games("staircase", 1, 200, LEVEL, 0)
    observation, visited, record = games.reset(), set(), nb04.Record()
    for _ in range(150):
        y, x = int(observation.blstats[0, nethack.NLE_BL_Y]), int(observation.blstats[0, nethack.NLE_BL_X])
        visited.add((y, x))
        stairs = {tuple(place) for place in np.argwhere(observation.glyphs[0] == nethack.GLYPH_CMAP_OFF + nb04.STAIRS_DOWN).tolist()}
        known = observation.glyphs[0]
        moves = nb04.shortest_walk(known, (y, x), stairs) or nb04.shortest_walk(known, (y, x), nb04.frontier(known, visited))
        step = games.step(np.array(moves[:1]))
        record.add(step, nb04.crops(step.arrived))
        if step.terminated[0]:
            break
        observation = step.observation
    assert (step.rewards[0], step.truncated[0]) == (1, False)
    where = (step.arrived.blstats[0, nethack.NLE_BL_Y], step.arrived.blstats[0, nethack.NLE_BL_X])
    assert where in stairs
    assert record.successes == [1.0]


def test_a_death_is_terminated_and_leaves_the_last_sight(nb04):
    games = nb04.Games("NetHackScore-v0", 8, 5000, 5, 3)
    games.reset()
    generator = np.random.default_rng(0)
    for _ in range(4000):
        step = games.step(generator.integers(23, size=8))
        if step.terminated.any():
            break
    (i,) = np.flatnonzero(step.terminated)[:1]
    assert step.arrived.blstats[i, nethack.NLE_BL_HPMAX] > 0
    assert not step.truncated[i]


def test_the_day_does_not_matter(nb04):
    assert nb04.make_game("staircase", 5).nethack is not None
    game = nb04.make_game("NetHackScore-v0", 5)
    assert isinstance(game, tasks.NetHackScore)
    assert len(game.actions) == 23
    assert len(nb04.make_game("staircase", 5).actions) == 8


def test_an_unknown_task_lists_the_known(nb04):
    with pytest.raises(ValueError, match=r"'NetHackWin' is unknown; choose one of: staircase, NetHackStaircase-v0, .*NetHackScore-v0"):
        nb04.make_game("NetHackWin", 10)


@pytest.mark.parametrize(
    "task", ["NetHackStaircase-v0", "NetHackStaircasePet-v0", "NetHackOracle-v0", "NetHackGold-v0", "NetHackEat-v0", "NetHackScout-v0"]
)
def test_every_task_plays(nb04, task):
    games = nb04.Games(task, 2, 10, LEVEL, 0)
    _, steps = play(games, 12)
    assert steps[9].truncated.all()
    assert gymnasium.spec(task).id == task


@pytest.mark.parametrize(("change", "words"), [
    ({"num_games": 3, "horizon": 7, "minibatches": 4}, "a rollout of 21 steps at least, and 4 equal minibatches"),
    ({"minibatches": 0}, "0 equal minibatches"),
    ({"steps": 31}, "31 steps: wanted are a rollout of 32 steps"),
    ({"bonus": "RND"}, "'RND' is unknown; choose one of: .*rnd.*count.*none"),
    ({"task": "NetHackWin"}, "'NetHackWin' is unknown"),
])  # fmt: skip
def test_settings_that_do_not_fit(nb04, change, words):
    with pytest.raises(ValueError, match=words):
        nb04.train(*small(nb04, **change), CPU)


# what is seen


def test_crops_are_cut_around_the_agent(nb04):
    generator = np.random.default_rng(0)
    glyphs = generator.integers(0, nethack.MAX_GLYPH, (6, 21, 79)).astype(np.int16)
    blstats = np.zeros((6, 27), np.int64)
    blstats[:, 0], blstats[:, 1] = [0, 78, 40, 3, 78, 1], [0, 20, 10, 20, 0, 3]
    crops = nb04.crops(nb04.Observation(glyphs, blstats))
    assert (crops.shape, crops.dtype) == ((6, 9, 9), np.int16)
    for i, dy, dx in itertools.product(range(6), range(-4, 5), range(-4, 5)):
        y, x = blstats[i, 1] + dy, blstats[i, 0] + dx
        inside = 0 <= y < 21 and 0 <= x < 79
        assert crops[i, dy + 4, dx + 4] == (glyphs[i, y, x] if inside else nethack.GLYPH_CMAP_OFF)


def test_places(nb04):
    blstats = np.zeros((3, 27), np.int64)
    blstats[:, 0], blstats[:, 1] = [0, 78, 5], [0, 20, 7]
    found = nb04.places(blstats)
    assert found.shape == (3, 100)
    assert found.sum() == 6
    assert [sorted(np.flatnonzero(row).tolist()) for row in found] == [[0, 79], [78, 99], [5, 86]]


def test_record_counts_by_hand(nb04):
    record, counts = nb04.Record(), []
    for t in range(6):
        blstats = np.zeros((2, 27), np.int64)
        blstats[:, nethack.NLE_BL_X], blstats[:, nethack.NLE_BL_Y] = [t, 0], 3
        observation = nb04.Observation(np.zeros((2, 21, 79), np.int16), blstats)
        terminated, truncated = np.array([t == 2, t == 5]), np.array([t == 4, False])
        step = nb04.Step(observation, observation, np.array([1.0, 0.0], np.float32), terminated, truncated)
        counts.append(record.add(step, np.full((2, 9, 9), t)).tolist())
    assert counts == [[1, 2], [1, 3], [1, 4], [1, 5], [1, 6], [1, 7]]  # both begin at (3, 0)
    assert record.successes == [1.0, 0.0, 0.0]  # reached; out of steps, though paid; died
    assert record.visits[3, :7].tolist() == [7, 1, 1, 1, 1, 1, 0]
    assert record.visits.sum() == 12
    assert sorted(record.views) == [(3, x) for x in range(6)]
    assert (record.views[3, 0] == 0).all()  # the first view
    assert (record.views[3, 4] == 4).all()


def observation_of(notebook, count=5):
    return notebook.Games("staircase", count, 20, LEVEL, 0).reset()


def test_agent_begins_indifferent(nb04):
    agent = nb04.Agent(8, 32)
    observation = observation_of(nb04)
    logits, values = agent(*nb04.tensors(CPU, nb04.crops(observation), nb04.places(observation.blstats)))
    assert (logits.shape, values.shape) == ((5, 8), (5, 2))
    assert logits.softmax(1).max() < 0.13
    assert values.abs().max() < 0.1


def test_agent_depends_on_what_it_sees(nb04):
    agent, observation = nb04.Agent(8, 32), observation_of(nb04)
    crop, place = nb04.tensors(CPU, nb04.crops(observation), nb04.places(observation.blstats))
    logits, values = agent(crop, place)
    for other in ((crop.flip(1), place), (crop, place.flip(1))):
        assert not torch.equal(agent(*other)[0], logits)
        assert not torch.equal(agent(*other)[1], values)


def test_agent_by_hand(nb04):
    agent, observation = nb04.Agent(8, 32), observation_of(nb04)
    crop, place = nb04.crops(observation), nb04.places(observation.blstats)
    matrix = lambda layer, x: x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    near = agent.glyphs.weight.detach().numpy()[crop].reshape(5, -1)
    hidden = np.maximum(matrix(agent.below, np.concatenate([near, place], 1)), 0)
    hidden = np.maximum(matrix(agent.above, hidden), 0)
    logits, values = agent(*nb04.tensors(CPU, crop, place))
    np.testing.assert_allclose(logits.detach(), matrix(agent.policy, hidden), atol=1e-5)
    np.testing.assert_allclose(values.detach(), matrix(agent.heads, hidden), atol=1e-5)


def test_layers_are_orthogonal(nb04):
    weight = nb04.orthogonal(torch.nn.Linear(30, 10), 0.5).weight
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(10))


def test_novelty_by_hand(nb04):
    networks, statistics = nb04.Distillation(262, 16, 8), nb04.RunningMeanStd(shape=(262,), epsilon=1e-9)
    inputs = torch.randn(40, 262) * 3 + 1
    statistics.update(inputs.numpy())
    networks.whiten_by(statistics)
    probe = torch.randn(6, 262) * 10
    white = np.clip((probe.numpy() - inputs.numpy().mean(0)) / inputs.numpy().std(0), -5, 5)

    def network(layers, x):
        linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        for i, layer in enumerate(linear):
            x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            x = np.maximum(x, 0) if i < len(linear) - 1 else x
        return x

    expected = ((network(networks.target, white) - network(networks.predictor, white)) ** 2).mean(1)
    np.testing.assert_allclose(networks(probe).detach().numpy(), expected, rtol=1e-4)
    assert len([layer for layer in networks.predictor if isinstance(layer, torch.nn.Linear)]) == 4
    assert len([layer for layer in networks.target if isinstance(layer, torch.nn.Linear)]) == 2
    assert not isinstance(networks.target[-1], torch.nn.ReLU)


def test_a_feature_that_never_varied_is_clipped_when_it_does(nb04):
    networks, statistics = nb04.Distillation(262, 16, 8), nb04.RunningMeanStd(shape=(262,))
    statistics.update(np.zeros((10, 262)))
    networks.whiten_by(statistics)
    assert torch.isfinite(networks(torch.eye(262))).all()
    torch.testing.assert_close(networks(torch.eye(262)), networks(torch.eye(262) * 1000))


def test_creatures_are_not_new(nb04):
    place = np.zeros((1, 100), np.float32)
    crop = np.full((1, 9, 9), nb04.FLOOR)
    with_pet, with_thing = crop.copy(), crop.copy()
    with_pet[0, 3, 3], with_thing[0, 3, 3] = nethack.GLYPH_PET_OFF + 10, nethack.GLYPH_OBJ_OFF + 10
    blind, seeing = nb04.sight(crop, place), nb04.sight(crop, place, creatures=True)
    assert np.array_equal(blind, nb04.sight(with_pet, place))
    assert not np.array_equal(seeing, nb04.sight(with_pet, place, creatures=True))
    assert not np.array_equal(blind, nb04.sight(with_thing, place))
    assert (blind.shape, blind.dtype) == ((1, 181), np.float32)
    place[0, 7] = 1
    moved = nb04.sight(with_thing, place)[0]
    assert moved[81 + 7] == 1
    assert moved[3 * 9 + 3] == nb04.CODES[nethack.GLYPH_OBJ_OFF + 10]


def test_only_the_predictor_learns(nb04):
    networks = nb04.Distillation(100, 16, 8)
    trained = {name for name, parameter in networks.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("predictor.") for name in trained)
    inputs = torch.randn(64, 100)
    optimiser, first = torch.optim.Adam(networks.predictor.parameters(), 1e-3), networks(inputs).mean().item()
    for _ in range(200):
        optimiser.zero_grad()
        networks(inputs).mean().backward()
        optimiser.step()
    assert networks(inputs).mean().item() < first / 5 < networks(torch.randn(64, 100)).mean().item()


# the loop


@pytest.fixture
def learner(nb04):
    return learner_of(nb04)


def test_actions_are_drawn_from_the_policy(nb04):
    logits = torch.linspace(-1, 1, 8).expand(20_000, 8)
    drawn = nb04.sample(logits, torch.Generator().manual_seed(0))
    again = nb04.sample(logits, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    np.testing.assert_allclose(drawn.bincount(minlength=8) / 20_000, logits[0].softmax(0), atol=4 * np.sqrt(0.25 / 20_000))


def spied(learner, monkeypatch):
    """The Steps that a learner's games take."""
    steps, step = [], learner.games.step
    monkeypatch.setattr(learner.games, "step", lambda actions: steps.append(step(actions)) or steps[-1])
    return steps


def update(notebook, learner):
    """One rollout and what is learned from it."""
    given, last = notebook.collect(learner)
    _, bonus = notebook.curiosity(learner, given)
    advantages, targets = notebook.advantages_of(given, last, bonus, learner.run, learner.config)
    return notebook.improve(learner, given, advantages, targets)


def view_of(notebook, observation):
    """Crop and place of an observation."""
    return notebook.crops(observation), notebook.places(observation.blstats)


def test_rollout_holds_what_was_seen_and_done(nb04, learner, monkeypatch):
    """Two rollouts of eight steps; episodes end after the twelfth step, within the second."""
    observations, steps = [learner.observation], spied(learner, monkeypatch)
    for end in (8, 16):
        rollout, last_values = nb04.collect(learner)
        observations += [step.observation for step in steps[end - 8 : end]]
        for t, (observation, step) in enumerate(zip(observations[end - 8 : end], steps[end - 8 : end], strict=True)):
            assert same(view_of(nb04, observation), (rollout["crop"][t], rollout["place"][t]))
            np.testing.assert_array_equal(rollout["arrived"][t], nb04.sight(*view_of(nb04, step.arrived)))
            logits, values = learner.judge(*view_of(nb04, observation))
            np.testing.assert_allclose(rollout["values"][t], values, rtol=1e-5)
            chosen = logits.log_softmax(1).numpy()[np.arange(4), rollout["actions"][t]]
            np.testing.assert_allclose(rollout["log_p"][t], chosen, rtol=1e-5)
            np.testing.assert_array_equal(rollout["dones"][t], step.terminated | step.truncated)
        np.testing.assert_allclose(last_values, learner.judge(*view_of(nb04, steps[end - 1].observation))[1])
        assert same(learner.observation, steps[end - 1].observation)
        assert rollout["crop"].shape == (8, 4, 9, 9)
    assert rollout["dones"].sum() == 4
    assert not same(steps[11].arrived, steps[11].observation)
    visits = Counter()
    for t, step in enumerate(steps):
        for i, (x, y) in enumerate(step.arrived.blstats[:, :2].tolist()):
            visits[y, x] += 1
            if t >= 8:
                assert rollout["counts"][t - 8, i] == visits[y, x]


def test_truncation_is_bootstrapped_with_where_it_stopped(nb04, learner, monkeypatch):
    steps = spied(learner, monkeypatch)
    rewards = np.concatenate([nb04.collect(learner)[0]["rewards"] for _ in range(2)])
    ended = 0
    for step, found in zip(steps, rewards, strict=True):
        value = learner.judge(*view_of(nb04, step.arrived))[1][:, 0]
        np.testing.assert_allclose(found, step.rewards + np.where(step.truncated, 0.99 * value, 0), rtol=1e-5)
        ended += step.truncated.sum()
        if step.truncated.any():
            assert not np.allclose(value, learner.judge(*view_of(nb04, step.observation))[1][:, 0])
    assert ended == 4


def test_an_end_is_not_bootstrapped(nb04, learner, monkeypatch):
    steps, step = [], learner.games.step

    def ending(actions):
        """The first game dies where the others run out of steps."""
        taken = step(actions)
        steps.append(
            replace(taken, terminated=taken.truncated & [True, False, False, False], truncated=taken.truncated & [False, True, True, True])
        )
        return steps[-1]

    monkeypatch.setattr(learner.games, "step", ending)
    rollouts = [nb04.collect(learner)[0] for _ in range(2)]
    rewards, dones = (np.concatenate([rollout[name] for rollout in rollouts]) for name in ("rewards", "dones"))
    t = next(t for t, taken in enumerate(steps) if taken.truncated.any())
    assert steps[t].terminated[0]
    assert dones[t].all()
    assert rewards[t, 0] == 0
    assert (rewards[t, 1:] != 0).all()


def test_without_the_reward_only_the_bonus_pays(nb04, monkeypatch):
    for reward in (True, False):
        learner = learner_of(nb04, reward=reward, max_steps=100)
        step = learner.games.step
        monkeypatch.setattr(learner.games, "step", lambda actions, step=step: replace(step(actions), rewards=np.ones(4, np.float32)))
        assert (nb04.collect(learner)[0]["rewards"] == float(reward)).all()


@pytest.mark.parametrize("kind", ["rnd", "count", "watch"])
@pytest.mark.parametrize("normalise", [True, False])
def test_bonus_is_divided_by_the_deviation_of_its_sums(nb04, kind, normalise):
    learner = learner_of(nb04, bonus=kind, normalise=normalise)
    kept = []
    for _ in range(3):
        given, _ = nb04.collect(learner)
        expected = given["counts"] ** -0.5
        if kind in ("rnd", "watch"):
            seen = torch.as_tensor(given["arrived"].reshape(32, 181))
            expected = learner.novelty(seen).detach().numpy().reshape(8, 4)  # with the old whitening
        raw, bonus = nb04.curiosity(learner, given)
        np.testing.assert_allclose(raw, expected, rtol=1e-5)
        kept.append(raw)
        value, sums = np.zeros(4), []
        for row in np.concatenate(kept):
            value = 0.99 * value + row
            sums.append(value)
        deviation = np.sqrt(np.var(sums) + 1e-8) if normalise else 1
        np.testing.assert_allclose(bonus, raw / deviation, rtol=1e-3)


def test_without_whitening_the_inputs_stay(nb04):
    learner = learner_of(nb04, whiten=False)
    nb04.curiosity(learner, nb04.collect(learner)[0])
    assert (learner.novelty.shift == 0).all()
    assert (learner.novelty.scale == 1).all()


@pytest.mark.parametrize("kind", ["none", "watch"])
def test_ppo_alone_knows_no_bonus(nb04, kind):
    learner = learner_of(nb04, bonus=kind)
    networks, heads = {k: v.clone() for k, v in learner.novelty.state_dict().items()}, learner.agent.heads.weight.detach().clone()
    for _ in range(2):
        update(nb04, learner)
    assert same_tensors(networks, learner.novelty.state_dict()) == (kind == "none")
    assert torch.equal(heads[1], learner.agent.heads.weight[1])  # the second value
    assert not torch.equal(heads[0], learner.agent.heads.weight[0])
    assert (learner.seen.count > 1) == (kind == "watch")


def test_watching_changes_nothing(nb04):
    """The predictor that watches PPO learns beside it: from the same start the agent is the same with and without."""
    first, second = (learner_of(nb04, bonus=kind, warm_up=0) for kind in ("none", "watch"))
    for learner in (first, second):
        update(nb04, learner)
    assert same_tensors(first.agent.state_dict(), second.agent.state_dict())


def test_what_paid_becomes_likelier(nb04):
    """Advantage 1 for one action and none for the rest: its probability rises, within what the clip allows at first order."""
    learner = learner_of(nb04, epochs=1, minibatches=1, entropy=0.0)
    given, _ = nb04.collect(learner)
    view = view_of(nb04, learner.observation)
    before = learner.judge(*view)[0].softmax(1)[:, 3]
    nb04.improve(learner, given, (given["actions"] == 3).astype(float), given["values"])
    assert (learner.judge(*view)[0].softmax(1)[:, 3] > before).all()


@pytest.mark.parametrize(("entropy", "rises"), [(0.1, True), (-0.1, False)])
def test_entropy_is_rewarded(nb04, entropy, rises):
    """Nothing else to learn: no advantage, values at their targets."""
    learner = learner_of(nb04, epochs=1, minibatches=1, entropy=entropy, bonus="none")
    with torch.no_grad():
        learner.agent.policy.bias.copy_(torch.linspace(-1, 1, 8))
    given, _ = nb04.collect(learner)
    first, second = (nb04.improve(learner, given, np.zeros((8, 4)), given["values"])["entropy"] for _ in range(2))
    assert (second > first) == rises


def test_losses_of_the_first_minibatch(nb04):
    """At first the ratio is 1: the loss of the policy is minus the mean advantage, 0 when standardised; values against their targets."""
    for standardise in (True, False):
        learner = learner_of(nb04, epochs=1, minibatches=1, standardise=standardise)
        given, _ = nb04.collect(learner)
        advantages = np.random.default_rng(0).normal(3, 1, size=(8, 4))
        losses = nb04.improve(learner, given, advantages, given["values"] + np.array([2.0, 0.0]))
        assert losses["policy loss"] == pytest.approx(0 if standardise else -advantages.mean(), abs=1e-5)
        assert losses["value loss"] == pytest.approx(4, rel=1e-4)
        assert losses["entropy"] == pytest.approx(np.log(8), abs=1e-3)


def test_all_samples_are_used_once_an_epoch(nb04, monkeypatch):
    learner = learner_of(nb04, epochs=2)
    given, _ = nb04.collect(learner)
    sizes, inner = [], nb04.ppo_loss
    given["log_p"] = np.arange(32, dtype=np.float32).reshape(8, 4)  # marks the samples
    monkeypatch.setattr(nb04, "ppo_loss", lambda new, old, *rest: sizes.append(old.clone()) or inner(new, new.detach(), *rest))
    nb04.improve(learner, given, np.ones((8, 4)), given["values"])
    assert [len(size) for size in sizes] == [8] * 8
    assert sorted(torch.cat(sizes[:4]).tolist()) == list(range(32)) == sorted(torch.cat(sizes[4:]).tolist())
    assert sizes[0].tolist() != sizes[4].tolist()


def test_every_sample_has_its_target(nb04):
    """Without a step (rate 0) the loss of four minibatches is that of all samples together."""
    learner = learner_of(nb04, epochs=1, learning_rate=0.0)
    with torch.no_grad():
        learner.agent.heads.weight.mul_(1000)  # values differ between samples
    given, _ = nb04.collect(learner)
    off = np.random.default_rng(0).normal(size=(8, 4, 2))
    losses = nb04.improve(learner, given, np.zeros((8, 4)), given["values"] + off)
    assert losses["value loss"] == pytest.approx((off[..., 0] ** 2).mean(), rel=1e-3)


def test_both_values_learn(nb04):
    learner = learner_of(nb04, epochs=40)
    given, _ = nb04.collect(learner)
    targets = given["values"] + np.array([0.0, 1.0])
    nb04.improve(learner, given, np.zeros((8, 4)), targets)
    crop, place = (given[name].reshape(32, *given[name].shape[2:]) for name in ("crop", "place"))
    assert np.abs(learner.judge(crop, place)[1] - targets.reshape(32, 2)).mean() < 0.3


def test_agent_and_predictor_have_rates_of_their_own(nb04):
    moved = {}
    for still in ("learning_rate", "predictor_rate"):
        learner = learner_of(nb04, **{still: 0.0})
        given, _ = nb04.collect(learner)
        networks = {"agent": learner.agent, "predictor": learner.novelty.predictor, "target": learner.novelty.target}
        before = {name: torch.cat([p.detach().flatten() for p in network.parameters()]) for name, network in networks.items()}
        nb04.improve(learner, given, np.ones((8, 4)), given["values"] + 1)
        after = {name: torch.cat([p.detach().flatten() for p in network.parameters()]) for name, network in networks.items()}
        moved[still] = [name for name in networks if not torch.equal(before[name], after[name])]
    assert moved == {"learning_rate": ["predictor"], "predictor_rate": ["agent"]}


def test_solved_is_what_holds_at_the_end(nb04, monkeypatch):
    monkeypatch.setattr(nb04, "WINDOW", 5)
    solved = nb04.MEASURES["solved"]
    assert solved(history([0.2, 0.8], [5, 9]))
    assert not solved(history([0.9, 0.7], [5, 9]))  # lost again
    assert not solved(history([0.9, 0.9], [2, 4]))  # too few episodes


def test_settings_reach_the_update(nb04, monkeypatch):
    learner = learner_of(nb04, clip=0.3, update_proportion=0.0, standardise=False)
    given, _ = nb04.collect(learner)
    clips, inner, advantages = [], nb04.ppo_loss, np.random.default_rng(0).normal(size=(8, 4)) * 1000
    monkeypatch.setattr(
        nb04, "ppo_loss", lambda new, old, scaled, clip: clips.append((clip, scaled.std().item())) or inner(new, old, scaled, clip)
    )
    before = {name: value.clone() for name, value in learner.novelty.state_dict().items()}
    nb04.improve(learner, given, advantages, given["values"])
    assert {clip for clip, _ in clips} == {0.3}
    assert min(scale for _, scale in clips) > 100  # as they are
    assert same_tensors(before, learner.novelty.state_dict())  # no sample was chosen
    norm = torch.stack([parameter.grad.norm() for parameter in learner.agent.parameters()]).norm()
    assert norm == pytest.approx(0.5, rel=1e-3)  # clipped


def test_share_of_the_samples_trains_the_predictor(nb04):
    learner = learner_of(nb04, update_proportion=0.25, epochs=100, minibatches=1)
    given, _ = nb04.collect(learner)
    rows, known = [], torch.as_tensor(given["arrived"].reshape(32, 181))
    learner.novelty.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    nb04.improve(learner, given, np.zeros((8, 4)), given["values"])
    assert sum(map(len, rows)) / 3200 == pytest.approx(0.25, abs=0.04)
    chosen = {tuple(row) for row in torch.cat(rows).tolist()}
    assert chosen == {tuple(row) for row in known.tolist()}  # any of them, in the course of time


# runs


def test_training_comes_back(nb04):
    """The same seed gives the same numbers, another seed others; the columns are as long as the run."""
    run, config = small(nb04)
    first, second, other = (nb04.train(r, config, CPU)["history"] for r in (run, run, replace(run, seed=2)))
    assert first == second
    assert first != other
    assert first["step"] == [32, 64, 96, 128, 160]
    assert {len(column) for column in first.values()} == {5}
    assert all(np.isfinite(column).all() for column in first.values())
    assert first["cells"] == sorted(first["cells"])


@pytest.mark.parametrize("bonus", ["none", "count"])
def test_other_bonuses_train(nb04, bonus):
    history = nb04.train(*small(nb04, bonus=bonus, steps=64), CPU)["history"]
    assert all(np.isfinite(column).all() for column in history.values())


def test_success_is_that_of_the_last_episodes(nb04, monkeypatch):
    monkeypatch.setattr(nb04, "WINDOW", 2)
    ends, inner = iter([[], [1.0, 0.0], [0.0], [], []]), nb04.collect

    def collect(learner):
        found = inner(learner)
        learner.record.successes += next(ends)
        return found

    monkeypatch.setattr(nb04, "collect", collect)
    history = nb04.train(*small(nb04, max_steps=500), CPU)["history"]
    assert history["success"] == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert history["episodes"] == [0, 2, 3, 3, 3]


def test_trained_remembers_and_keeps_the_order(nb04, tmp_path, monkeypatch):
    runs, config = [small(nb04, steps=64, seed=seed)[0] for seed in (1, 2, 3)], small(nb04)[1]
    monkeypatch.setattr(nb04, "elsewhere", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(nb04.os, "cpu_count", lambda: 1)  # threads of one process share torch's generator
    first = nb04.trained(runs, config, tmp_path, "test")
    assert list(first) == runs
    assert len(list(tmp_path.glob("run-*.pt"))) == 3
    for run in runs:
        assert first[run]["history"] == nb04.train(run, config, CPU)["history"]
    monkeypatch.setattr(nb04, "Learner", None)  # remembered by name: a change of the code makes another run
    with pytest.raises(TypeError):
        nb04.trained([replace(runs[0], seed=9)], config, tmp_path, "test")


def test_an_error_ends_the_rest(nb04, tmp_path, monkeypatch):
    begun = []

    def failing(function, run, *rest):
        begun.append(run.seed)
        if run.seed == 1:
            raise KeyError("seed 1")
        time.sleep(0.2)  # so that the error is heard before all have begun
        return {"history": {}, "seconds": 0.0, "looks": []}

    closed = []
    executor = type("Executor", (), {"shutdown": lambda self, **options: closed.append(options)})
    monkeypatch.setattr(nb04, "elsewhere", failing)
    monkeypatch.setattr(nb04, "get_reusable_executor", executor)
    monkeypatch.setattr(nb04.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyError, match="seed 1"):
        nb04.trained([small(nb04, seed=seed)[0] for seed in range(50)], small(nb04)[1], tmp_path, "test")
    assert len(begun) < 10
    assert closed == [{"wait": True, "kill_workers": True}]


def test_processes_of_their_own_give_the_same(nb04, tmp_path, monkeypatch):
    """Two at once in processes, as in a kernel, where definitions travel by value, equal one after the other in this one."""
    monkeypatch.setattr(nb04.os, "cpu_count", lambda: 2)
    runs = [small(nb04, steps=64, seed=seed)[0] for seed in (1, 2, 3)]
    cloudpickle.register_pickle_by_value(nb04)
    try:
        found = nb04.trained(runs, small(nb04)[1], tmp_path, "test")
    finally:
        cloudpickle.unregister_pickle_by_value(nb04)
    for run in runs:
        assert found[run]["history"] == nb04.train(run, small(nb04)[1], CPU)["history"]


# choice of levels


def test_shortest_walk_against_scipy(nb04):
    generator = np.random.default_rng(0)
    floor, wall, door = (nethack.GLYPH_CMAP_OFF + symbol for symbol in (nb04.FLOOR, 1, 13))
    for _ in range(20):
        glyphs = generator.choice([floor, floor, floor, wall, door], size=(21, 79)).astype(np.int16)
        start, goal = ((int(generator.integers(21)), int(generator.integers(79))) for _ in range(2))
        glyphs[start] = glyphs[goal] = floor
        edges = []
        for y, x, dy, dx in itertools.product(range(21), range(79), (-1, 0, 1), (-1, 0, 1)):
            there = y + dy, x + dx
            inside = (dy or dx) and 0 <= there[0] < 21 and 0 <= there[1] < 79
            if inside and wall not in (glyphs[y, x], glyphs[there]) and not (dy and dx and door in (glyphs[y, x], glyphs[there])):
                edges.append((y * 79 + x, there[0] * 79 + there[1]))
        rows, columns = np.array(edges).T
        graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(21 * 79, 21 * 79)).tocsr()
        length = dijkstra(graph, indices=start[0] * 79 + start[1], unweighted=True)[goal[0] * 79 + goal[1]]
        moves = nb04.shortest_walk(glyphs, start, {goal})
        assert (np.inf if moves is None else len(moves)) == length
        here = start
        for move in moves or []:
            here = tuple(np.add(here, nb04.COMPASS[move]).tolist())
            assert glyphs[here] != wall
        assert moves is None or here == goal


def test_compass_is_that_of_nle(nb04):
    names = {"N": (-1, 0), "E": (0, 1), "S": (1, 0), "W": (0, -1), "NE": (-1, 1), "SE": (1, 1), "SW": (1, -1), "NW": (-1, -1)}
    assert tuple(names[direction.name] for direction in nethack.CompassDirection) == nb04.COMPASS


def test_blocked_places_are_avoided(nb04):
    glyphs = np.full((21, 79), nethack.GLYPH_CMAP_OFF + nb04.FLOOR, np.int16)
    assert len(nb04.shortest_walk(glyphs, (5, 5), {(5, 9)})) == 4
    assert len(nb04.shortest_walk(glyphs, (5, 5), {(5, 9)}, {(y, 7) for y in range(20)})) > 20
    assert nb04.shortest_walk(glyphs, (5, 5), {(5, 9)}, {(y, 7) for y in range(21)}) is None
    assert nb04.shortest_walk(glyphs, (5, 5), {(5, 5)}) == []


def test_frontier(nb04):
    glyphs = np.full((21, 79), nethack.GLYPH_CMAP_OFF, np.int16)
    glyphs[5:10, 5:10] = nethack.GLYPH_CMAP_OFF + nb04.FLOOR
    edge = {(y, x) for y in range(5, 10) for x in range(5, 10) if y in (5, 9) or x in (5, 9)}
    assert nb04.frontier(glyphs, set()) == edge
    assert nb04.frontier(glyphs, {(5, 5)}) == edge - {(5, 5)}
    glyphs[7, 7] = nethack.GLYPH_CMAP_OFF + 13
    assert (7, 7) in nb04.frontier(glyphs, set())


def test_levels_by_the_rule(nb04, monkeypatch):
    cases = ((24, 0), (25, 0), (50, 0.019), (50, 0.02), (30, 0.099), (30, 0.1), (51, 0.01), (51, 0.02), (60, 0), (61, 0))
    assert [nb04.kind_of(*case) for case in cases] == [
        None, "hard", "hard", "easy", "easy", None, "far", None, "far", None,
    ]  # fmt: skip
    ways = {7: (30, 9), 8: (30, 9), 9: None, 10: (10, 1), 11: (60, 9), 12: (30, 9), 13: (30, 9), 14: (99, 9)}
    shares = {7: 0.0, 8: 0.05, 11: 0.0, 12: 0.5, 13: 0.0, 14: 0.0}
    walk = lambda level, *rest: type("Record", (), {"successes": [shares[level]]})
    monkeypatch.setattr(nb04, "explore", ways.get)
    monkeypatch.setattr(nb04, "random_walk", walk)
    chosen = nb04.choose_levels(7, {"easy": 1, "hard": 2, "far": 1}, 10, 100)
    assert chosen == {"easy": {8: (30, 9, 0.05)}, "hard": {7: (30, 9, 0.0), 13: (30, 9, 0.0)}, "far": {11: (60, 9, 0.0)}}


def test_program_finds_the_stairs_or_gives_up(nb04):
    assert nb04.explore(1) is None  # no way by eight moves alone
    moves, steps = nb04.explore(12)  # past a door that is locked
    assert (moves, steps < 150) == (31, True)
    assert nb04.explore(LEVEL)[0] == 19


def test_random_walk(nb04):
    record = nb04.random_walk(LEVEL, 10, 20, 0, num_games=4)
    again = nb04.random_walk(LEVEL, 10, 20, 0, num_games=4)
    assert 10 <= len(record.successes) <= 13
    assert (record.visits == again.visits).all()
    assert 5 < (record.visits > 0).sum() < 200
    assert record.visits.sum() >= 10 * 20 - 4 * 20


# demonstrations


def test_deep_sea(nb04):
    chance = [nb04.deep_sea(4, None, np.random.default_rng(i)) for i in range(600)]
    assert np.mean(chance) == pytest.approx(16, abs=4 * np.std(chance) / np.sqrt(600))
    assert nb04.deep_sea(14, None, np.random.default_rng(0), limit=50) == 50
    for weight in (0, 1):
        directed = [nb04.deep_sea(12, weight, np.random.default_rng(i)) for i in range(5)]
        assert max(directed) < 500 < 2**12


def test_a_greedy_bonus_stays_where_it_was(nb04):
    """One decision: with values from zero whoever errs at first errs for ever, but for a little chance; with optimism he errs once."""
    found = [nb04.deep_sea(1, 1, np.random.default_rng(i), 60, False) for i in range(100)]
    assert set(found) == {1, 60}
    assert 30 < found.count(60) < 70
    chance = [nb04.deep_sea(1, 1, np.random.default_rng(i), 400, False, 0.1) for i in range(100)]
    assert max(chance) < 400
    missed = np.array([episodes - 1 for episodes in chance if episodes > 1])
    assert missed.mean() == pytest.approx(20, abs=12)  # a chance move comes after 10 tries on average, and is right every other time
    assert {nb04.deep_sea(1, 0, np.random.default_rng(i), 60, True) for i in range(100)} == {1, 2}
    assert {nb04.deep_sea(1, 1, np.random.default_rng(i), 60, True) for i in range(100)} <= {1, 2, 3}


def test_novelty_falls_with_visits_when_whitened(nb04):
    states, visits = nb04.grid_states(300, 0)
    assert (states.shape, visits.min(), visits.max() <= 300) == ((400, 41), 1, True)
    white = (states - states.mean(0)) / states.std(0)
    order = [
        np.corrcoef(np.argsort(np.argsort(visits.numpy())), np.argsort(np.argsort(nb04.novelty_after(x, visits, 0).numpy())))[0, 1]
        for x in (states, white)
    ]
    assert order[1] < -0.75 < -0.5 < order[0]


# evaluation


def history(successes, episodes=None):
    count = len(successes)
    return {
        "step": [10 * (i + 1) for i in range(count)], "episodes": (episodes or [99] * 9)[:count], "success": successes,
        "cells": list(range(count)),
    }  # fmt: skip


def test_steps_to(nb04, monkeypatch):
    monkeypatch.setattr(nb04, "WINDOW", 5)
    assert nb04.steps_to(history([0.1, 0.8, 0.2])) == 20
    assert nb04.steps_to(history([0.9, 0.5, 0.9], [3, 6, 9])) == 30  # not before the window is full
    assert nb04.steps_to(history([0.9], [5])) == 10
    assert nb04.steps_to(history([0.1, 0.79])) is None


def test_a_run_that_never_gets_there_is_never_counted(nb04, monkeypatch):
    monkeypatch.setattr(nb04, "WINDOW", 5)
    found = {run: {"history": history(success)} for run, success in enumerate(([0.1, 0.8], [0.9, 0.2], [0.1, 0.1], [0.8, 0.9]))}
    reached = nb04.measured([[0, 1], [2, 3]], found, nb04.steps_to)
    np.testing.assert_array_equal(reached, [[20, 10], [np.nan, 10]])
    assert [(reached <= limit).sum() for limit in (9, 10, 19, 20, np.inf)] == [0, 2, 2, 3, 3]


def tuned(notebook):
    """Another entropy for each arm."""
    return {arm: {"entropy": 0.1 * n} for n, arm in enumerate(notebook.ARMS, 1)}


def test_arms_levels_and_seeds(nb04):
    levels = {"easy": (1, 2), "hard": (3,), "far": (4,)}
    grid = nb04.grid_of(levels, range(3), range(2), tuned(nb04))
    assert len(grid) == 5 + 5 + 3
    assert {len(rows) for (_, kind), rows in grid.items() if kind == "easy"} == {2}
    assert [run.seed for run in grid["PPO", "hard"][0]] == [0, 1, 2]
    assert [run.seed for run in grid["PPO", "far"][0]] == [0, 1]
    runs = [run for rows in grid.values() for row in rows for run in row]
    assert len(set(runs)) == len(runs) == 5 * 3 * 3 + 3 * 2
    assert {(run.bonus, run.standardise) for run in runs} == {
        ("none", True), ("none", False), ("rnd", True), ("rnd", False), ("count", True),
    }  # fmt: skip
    for (arm, _), rows in grid.items():  # an arm has what it was tuned to
        assert {run.entropy for row in rows for run in row} == {tuned(nb04)[arm]["entropy"]}


def test_tries_are_the_same_for_all_and_the_merit_is_success_over_training(nb04):
    assert len({tuple(change.items()) for change in nb04.TRIES}) == 4
    early, late = history([0.5, 0.9]), history([0.0, 0.9])
    assert nb04.merit([early, late])[0] == 0.6  # 0.575, rounded
    late["cells"] = [3, 7]
    assert nb04.merit([late])[1] == 7
    assert nb04.merit([early]) > nb04.merit([late])  # places decide between equals only
    assert nb04.merit([late]) > nb04.merit([history([0.0, 0.96])])


def test_measures_and_differences(nb04):
    levels = {"easy": (1,), "hard": (3,)}
    grid = nb04.grid_of(levels, range(3), range(2), tuned(nb04))
    found = {}
    for (arm, _), rows in grid.items():
        for run in rows[0]:
            value = 0.9 if arm == "PPO + RND" or (arm == "PPO" and run.seed == 0) else 0.1
            found[run] = {"history": history([0.0, value])}
    assert nb04.measured(grid["PPO", "easy"], found, nb04.MEASURES["solved"]).tolist() == [[1, 0, 0]]
    assert nb04.measured(grid["PPO", "easy"], found, nb04.MEASURES["success"]).tolist() == [[0.9, 0.1, 0.1]]
    assert nb04.measured(grid["PPO", "easy"], found, nb04.MEASURES["cells"]).tolist() == [[1, 1, 1]]
    table = nb04.differences(grid, found, [("PPO + RND", "PPO")], 200, 0)
    assert table.loc["PPO + RND less PPO", "solved"].startswith("+0.67 [")
    assert table.loc["PPO + RND less PPO", "cells"].startswith("+0 [+0, +0]")


def test_bootstrap(nb04):
    generator = np.random.default_rng(0)
    first, second = generator.normal(1, 1, (12, 10)), generator.normal(0, 1, (12, 10))
    low, high = nb04.bootstrap(first, second, 2000, 0)
    assert low < np.mean(first) - np.mean(second) < high
    expected = 1.96 * np.sqrt(2 / 120)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.6)
    levels = generator.normal(size=(40, 1)) * np.ones(3)  # levels differ, seeds do not
    low, high = nb04.bootstrap(levels, np.zeros((40, 3)), 10_000, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * levels[:, 0].std() / np.sqrt(40), rel=0.06)
    np.testing.assert_allclose(nb04.bootstrap(first, first * 0 + first.mean(), 1, 0).shape, (2,))
    paired = nb04.bootstrap(np.arange(5)[:, None] + np.ones((5, 3)), np.arange(5)[:, None] * np.ones((5, 3)), 200, 0)
    np.testing.assert_allclose(paired, [1, 1])  # the same levels for both methods


def test_episode_is_played_to_its_end(nb04):
    agent, networks = nb04.Agent(8, 16), nb04.Distillation(181, 16, 8)
    screens, rewards = nb04.play(agent, LEVEL, 0, 15)
    assert (len(screens), len(rewards)) == (16, 15)
    assert screens[-1]["blstats"][nethack.NLE_BL_HPMAX] > 0
    novelty = nb04.novelty_of(networks, screens)
    assert novelty.shape == (16,)
    seen = nb04.Observation(screens[3]["glyphs"][None], screens[3]["blstats"][None])
    assert novelty[3] == pytest.approx(networks(torch.as_tensor(nb04.sight(*view_of(nb04, seen)))).item(), rel=1e-4)
    again, _ = nb04.play(agent, LEVEL, 0, 15)
    assert all(np.array_equal(a["tty_chars"], b["tty_chars"]) for a, b in zip(screens, again, strict=True))


def test_photos_and_maps(nb04, monkeypatch):
    monkeypatch.setattr(nb04, "MOMENTS", (40, 64))
    run, config = small(nb04)
    looks = nb04.train(run, config, CPU, nb04.photo)["looks"]
    photos = [look for look in looks if look]
    assert [look is None for look in looks] == [True, False, True, True, False]  # 40 and 64 lie in the second rollout
    assert [taken["step"] for taken in photos] == [64, 160]
    visits, novelty = nb04.maps_of(photos, config, CPU)
    assert visits.shape == novelty.shape == (2, 21, 79)
    assert [part.sum() for part in visits] == [64, 160]
    assert (np.isnan(novelty[0]) == (visits[1] == 0)).all()  # later places too, in the eyes of the early networks
    y, x = np.argwhere(visits[1])[0].tolist()
    view = photos[1]["views"][photos[1]["places"].index((y, x))].numpy()[None]
    blstats = np.zeros((1, 27), int)
    blstats[0, nethack.NLE_BL_X], blstats[0, nethack.NLE_BL_Y] = x, y
    networks = nb04.Distillation(181, 16, 8)
    networks.load_state_dict(photos[0]["networks"])
    expected = networks(torch.as_tensor(nb04.sight(view, nb04.places(blstats)))).item()
    assert novelty[0, y, x] == pytest.approx(expected, rel=1e-4)
    assert not np.allclose(novelty[0][visits[1] > 0], novelty[1][visits[1] > 0])


def test_nothing_is_left_in_the_folder(nb04, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb04.Games("NetHackScore-v0", 2, 5, None, 0).reset()
    assert list(Path(tmp_path).iterdir()) == []
