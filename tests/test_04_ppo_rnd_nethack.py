"""Notebook 04 against independent implementations: plain loops, NumPy, SciPy, Stable-Baselines3's rollout buffer, and nle played by hand."""

import io
import itertools
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from nle import nethack
from nle.env import tasks
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from stable_baselines3.common.buffers import RolloutBuffer

from tests.checks import check_amp_dtype, check_kill_while_saving, check_statistics

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
    """A run of a few seconds."""
    settings = dict(level=LEVEL, steps=5 * 32, num_games=4, horizon=8, max_steps=12, window=5, width=16, features=8, warm_up=3, seed=1)
    return notebook.Run(**(settings | change))


def play(games, steps, actions=8, seed=0):
    """The observation to begin with and the Steps of random play."""
    generator = np.random.default_rng(seed)
    return games.reset(), [games.step(generator.integers(actions, size=len(games.games))) for _ in range(steps)]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


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
    run = nb04.Run(gamma=0.95, gamma_intrinsic=0.8, lam=0.7, extrinsic=3.0, intrinsic=0.5)
    extrinsic = double_loop(rewards, values, last_value, dones, 0.95, 0.7)
    endless = double_loop(bonus, other, last, np.zeros_like(dones), 0.8, 0.7)
    ended = double_loop(bonus, other, last, dones, 0.8, 0.7)
    for change, intrinsic in (({}, endless), ({"episodic": True}, ended)):
        advantages, targets = nb04.advantages_of(given, lasts, bonus, replace(run, **change))
        np.testing.assert_allclose(advantages, 3 * extrinsic + 0.5 * intrinsic)
        np.testing.assert_allclose(targets, np.stack([extrinsic + values, intrinsic + other], -1))
    np.testing.assert_allclose(nb04.advantages_of(given, lasts, bonus, replace(run, bonus=False))[0], 3 * extrinsic)


# statistics


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_running_statistics(nb04, shape, offset):
    batches = [np.random.default_rng(i).normal(offset, 2, (rows, *shape)) for i, rows in enumerate((1, 7, 0, 100, 1))]
    running = nb04.RunningMeanStd(shape)
    for batch in batches:
        running.update(batch)
    together = np.concatenate(batches)
    np.testing.assert_allclose(running.mean, together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(running.var, together.var(0), rtol=1e-8)
    assert running.count == 109


def test_running_statistics_need_no_shape(nb04):
    running, batch = nb04.RunningMeanStd(), np.random.default_rng(0).normal(size=(20, 3))
    running.update(batch[:5])
    running.update(batch[5:])
    np.testing.assert_allclose((running.mean, running.var), (batch.mean(0), batch.var(0)))


def test_running_statistics_of_single_precision(nb04):
    running = nb04.RunningMeanStd((1,))
    for part in np.split(np.float32(4000) + np.random.default_rng(0).random((10_000, 1), dtype=np.float32), 100):
        running.update(part)
    assert running.var[0] == pytest.approx(1 / 12, rel=0.03)


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


def test_statistics_and_tables(nb04):
    mean, std = nb04.mean_std([1.0, 2.0, 4.0])
    assert (mean, std) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    check_statistics(nb04)


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
        assert all(same(a[2:], b[2:]) for a, b in zip(first[1], again[1], strict=True))
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
    kept = [(begin, [array.copy() for array in begin])]
    for action in itertools.chain(range(8), range(8)):
        step = games.step(np.array([action, 7 - action]))
        kept += [(part, [array.copy() for array in part]) for part in (step.observation, step.arrived)]
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
    observation, visited, record = games.reset(), set(), nb04.Record(1, 5)
    for _ in range(150):
        y, x = int(observation.blstats[0, nethack.NLE_BL_Y]), int(observation.blstats[0, nethack.NLE_BL_X])
        visited.add((y, x))
        stairs = {tuple(place) for place in np.argwhere(observation.glyphs[0] == nethack.GLYPH_CMAP_OFF + nb04.STAIRS_DOWN).tolist()}
        known = observation.glyphs[0]
        moves = nb04.shortest_walk(known, (y, x), stairs) or nb04.shortest_walk(known, (y, x), nb04.frontier(known, visited))
        step = games.step(np.array(moves[:1]))
        record.add(step)
        if step.terminated[0]:
            break
        observation = step.observation
    assert (step.rewards[0], step.truncated[0]) == (1, False)
    where = (step.arrived.blstats[0, nethack.NLE_BL_Y], step.arrived.blstats[0, nethack.NLE_BL_X])
    assert where in stairs
    assert record.outcomes[0][:2] == (1, 1)


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


def test_games_come_back_from_seeds_and_actions(nb04):
    games, other = (nb04.Games("staircase", 3, 7, None, 5) for _ in range(2))
    _, steps = play(games, 17)
    assert same(other.load_state_dict(games.state_dict()), steps[-1].observation)
    assert other.state_dict() == games.state_dict()  # and can be saved again
    generator = np.random.default_rng(9)
    for _ in range(10):
        actions = generator.integers(8, size=3)
        assert same(games.step(actions).observation, other.step(actions).observation)
    before = games.state_dict()
    games.step(np.zeros(3, int))
    assert before != games.state_dict()


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
    ({"num_games": 3, "horizon": 7, "minibatches": 4}, "3 games x 7 steps do not split into 4 equal minibatches"),
    ({"minibatches": 0}, "minibatches"),
    ({"steps": 100}, "100 steps are less than one rollout of 16 games x 64 steps"),
])  # fmt: skip
def test_settings_that_do_not_fit(nb04, change, words):
    with pytest.raises(ValueError, match=words):
        nb04.Run(**change)


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


def test_places_numbers_and_cells(nb04):
    blstats = np.zeros((3, 27), np.int64)
    blstats[:, 0], blstats[:, 1] = [0, 78, 5], [0, 20, 7]
    blstats[:, nethack.NLE_BL_HP], blstats[:, nethack.NLE_BL_HPMAX] = [5, 0, 12], [10, 0, 12]
    blstats[:, nethack.NLE_BL_DEPTH] = [1, 2, 3]
    places, numbers = nb04.places(blstats), nb04.numbers(blstats)
    assert (places.shape, numbers.shape) == ((3, 100), (3, 5))
    assert [sorted(np.flatnonzero(row).tolist()) for row in places] == [[0, 79], [78, 99], [5, 86]]
    np.testing.assert_allclose(numbers[:, :2], [[0.5, 0.1], [0, 0.2], [1, 0.3]])
    columns = (nethack.NLE_BL_DNUM, nethack.NLE_BL_DLEVEL, nethack.NLE_BL_Y, nethack.NLE_BL_X)
    many = np.zeros((4000, 27), np.int64)
    for column, size in zip(columns, (8, 50, 21, 79), strict=True):
        many[:, column] = np.random.default_rng(column).integers(size, size=4000)
    assert len(set(nb04.cells(many).tolist())) == len(np.unique(many[:, columns], axis=0))


def test_record_counts_by_hand(nb04):
    record, seen = nb04.Record(2, 3), []
    for t in range(6):
        blstats = np.zeros((2, 27), np.int64)
        blstats[:, 0], blstats[:, nethack.NLE_BL_DEPTH] = [t, 0], [2, 1]
        observation = nb04.Observation(np.zeros((2, 21, 79), np.int16), blstats)
        terminated, truncated = np.array([t == 2, t == 5]), np.array([t == 4, False])
        record.add(nb04.Step(observation, observation, np.array([1.0, 0.0], np.float32), terminated, truncated))
        seen.append(record.episodes)
    assert seen == [0, 0, 1, 1, 2, 3]
    assert list(record.outcomes) == [(1.0, 3.0, 3.0, 2.0), (0.0, 2.0, 2.0, 2.0), (0.0, 0.0, 1.0, 1.0)]
    assert len(record.visited) == 6
    again = nb04.Record(2, 3)
    again.load_state_dict(record.state_dict())
    assert again.state_dict() == record.state_dict()
    assert again.outcomes.maxlen == 3


def observation_of(notebook, count=5):
    return notebook.Games("staircase", count, 20, LEVEL, 0).reset()


def test_agent_begins_indifferent_and_ignores_the_blank(nb04):
    agent = nb04.Agent(8, 8, 16, 32)
    crop, glyphs, vector = nb04.tensors(nb04.inputs_of(observation_of(nb04)), CPU)
    assert (crop.dtype, glyphs.dtype, vector.dtype, vector.shape) == (torch.int32, torch.int32, torch.float32, (5, 105))
    logits, values = agent(crop, glyphs, vector)
    assert (logits.shape, values.shape) == ((5, 8), (5, 2))
    assert logits.softmax(1).max() < 0.13
    (logits.square().sum() + values.square().sum()).backward()
    for embedding in (agent.near, agent.far):
        assert (embedding.weight.grad[nethack.GLYPH_CMAP_OFF] == 0).all()
        assert (embedding.weight[nethack.GLYPH_CMAP_OFF] == 0).all()
        assert embedding.weight.grad.abs().sum() > 0


def test_agent_depends_on_all_its_views(nb04):
    agent = nb04.Agent(8, 8, 16, 32)
    crop, glyphs, vector = nb04.tensors(nb04.inputs_of(observation_of(nb04)), CPU)
    values = agent(crop, glyphs, vector)[1]
    other = torch.full_like(glyphs, nethack.GLYPH_CMAP_OFF)
    other[:, 15, 60] = nethack.GLYPH_CMAP_OFF + 24
    assert not torch.equal(agent(crop.flip(1), glyphs, vector)[1], values)
    assert not torch.equal(agent(crop, other, vector)[1], values)
    assert not torch.equal(agent(crop, glyphs, -vector)[1], values)


def test_layers_are_orthogonal(nb04):
    weight = nb04.orthogonal(torch.nn.Linear(30, 10), 0.5).weight
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(10))


def test_novelty_by_hand(nb04):
    networks, statistics = nb04.Distillation(2, 16, 8), nb04.RunningMeanStd((262,))
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


def test_a_feature_that_never_varied_is_clipped_when_it_does(nb04):
    networks, statistics = nb04.Distillation(2, 16, 8), nb04.RunningMeanStd((262,))
    statistics.update(np.zeros((10, 262)))
    networks.whiten_by(statistics)
    assert torch.isfinite(networks(torch.eye(262))).all()
    torch.testing.assert_close(networks(torch.eye(262)), networks(torch.eye(262) * 1000))


def test_creatures_are_not_new(nb04):
    blind, seeing = (nb04.Distillation(4, 16, 8, creatures) for creatures in (False, True))
    place = torch.zeros(1, 100)
    crop = torch.full((1, 9, 9), nethack.GLYPH_CMAP_OFF + nb04.FLOOR, dtype=torch.int32)
    with_pet = crop.clone()
    with_pet[0, 3, 3] = nethack.GLYPH_PET_OFF + 10
    with_thing = crop.clone()
    with_thing[0, 3, 3] = nethack.GLYPH_OBJ_OFF + 10
    assert torch.equal(blind.inputs(crop, place), blind.inputs(with_pet, place))
    assert not torch.equal(seeing.inputs(crop, place), seeing.inputs(with_pet, place))
    assert not torch.equal(blind.inputs(crop, place), blind.inputs(with_thing, place))
    assert blind.inputs(crop, place).shape == (1, 81 * 4 + 100)


def test_only_the_predictor_learns(nb04):
    networks = nb04.Distillation(4, 16, 8)
    trained = {name for name, parameter in networks.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("predictor.") for name in trained)
    inputs = torch.randn(64, 81 * 4 + 100)
    optimiser, first = torch.optim.Adam(networks.predictor.parameters(), 1e-3), networks(inputs).mean().item()
    for _ in range(200):
        optimiser.zero_grad()
        networks(inputs).mean().backward()
        optimiser.step()
    assert networks(inputs).mean().item() < first / 5 < networks(torch.randn(64, 81 * 4 + 100)).mean().item()


# the loop


@pytest.fixture
def learner(nb04):
    return nb04.Learner(small(nb04), CPU)


def test_actions_are_drawn_from_the_policy(nb04, learner):
    with torch.no_grad():
        learner.agent.policy.bias.copy_(torch.linspace(-1, 1, 8))
    one = nb04.Observation(*(array[:1].repeat(4, 0) for array in learner.observation))
    drawn, counts = [learner.act(one) for _ in range(1500)], Counter()
    for _, actions, _, _ in drawn:
        counts.update(actions.tolist())
    logits, values = learner.agent(*nb04.tensors(nb04.inputs_of(one), CPU))
    probability = logits[0].softmax(0).detach().numpy()
    np.testing.assert_allclose([counts[a] / 6000 for a in range(8)], probability, atol=4 * np.sqrt(0.25 / 6000))
    _, actions, log_p, found = drawn[0]
    np.testing.assert_allclose(log_p, np.log(probability)[actions], rtol=1e-4)
    np.testing.assert_allclose(found, values.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(learner.values(one), found)


def spied(learner, monkeypatch):
    """The Steps that a learner's games take."""
    steps, step = [], learner.games.step
    monkeypatch.setattr(learner.games, "step", lambda actions: steps.append(step(actions)) or steps[-1])
    return steps


def test_rollout_holds_what_was_seen_and_done(nb04, learner, monkeypatch):
    """Two rollouts of eight steps; episodes end after the twelfth step, within the second."""
    observations, steps = [learner.observation], spied(learner, monkeypatch)
    for end in (8, 16):
        rollout, last_values = nb04.collect(learner)
        observations += [step.observation for step in steps[end - 8 : end]]
        for t, (observation, step) in enumerate(zip(observations[end - 8 : end], steps[end - 8 : end], strict=True)):
            assert same(nb04.inputs_of(observation), (rollout["crop"][t], rollout["glyphs"][t], rollout["vector"][t]))
            np.testing.assert_array_equal(rollout["near"][t], nb04.crops(step.arrived))
            np.testing.assert_array_equal(rollout["place"][t], nb04.places(step.arrived.blstats))
            np.testing.assert_allclose(rollout["values"][t], learner.values(observation), rtol=1e-5)
            np.testing.assert_array_equal(rollout["dones"][t], step.terminated | step.truncated)
        np.testing.assert_allclose(last_values, learner.values(steps[end - 1].observation))
        assert same(learner.observation, steps[end - 1].observation)
        assert rollout["crop"].shape == (8, 4, 9, 9)
    assert rollout["dones"].sum() == 4
    assert not same(steps[11].arrived, steps[11].observation)


def test_truncation_is_bootstrapped_with_where_it_stopped(nb04, learner, monkeypatch):
    steps = spied(learner, monkeypatch)
    rewards = np.concatenate([nb04.collect(learner)[0]["rewards"] for _ in range(2)])
    ended = 0
    for step, found in zip(steps, rewards, strict=True):
        value = learner.values(step.arrived)[:, 0]
        np.testing.assert_allclose(found, step.rewards + np.where(step.truncated, 0.99 * value, 0), rtol=1e-5)
        ended += step.truncated.sum()
        if step.truncated.any():
            assert not np.allclose(value, learner.values(step.observation)[:, 0])
    assert ended == 4


def test_an_end_is_not_bootstrapped(nb04, learner, monkeypatch):
    steps, step = [], learner.games.step

    def ending(actions):
        """The first game dies where the others run out of steps."""
        taken = step(actions)
        steps.append(
            taken._replace(terminated=taken.truncated & [True, False, False, False], truncated=taken.truncated & [False, True, True, True])
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


def test_bonus_is_divided_by_the_deviation_of_its_sums(nb04):
    run = small(nb04)
    for change in ({}, {"normalise": False}, {"wrong_axis": True}):
        learner = nb04.Learner(replace(run, **change), CPU)
        seen, kept = [], []
        for _ in range(3):
            rollout, _ = nb04.collect(learner)
            near, place = nb04.tensors((rollout["near"].reshape(-1, 9, 9), rollout["place"].reshape(-1, 100)), CPU)
            expected = learner.novelty(learner.novelty.inputs(near, place)).detach().numpy().reshape(8, 4)  # with the old whitening
            raw, bonus, inputs = nb04.curiosity(learner, rollout)
            np.testing.assert_allclose(raw, expected, rtol=1e-5)
            kept.append(raw)
            seen.append(inputs.numpy())
            rows = np.concatenate([part.T if change.get("wrong_axis") else part for part in kept]) if not change.get("wrong_axis") else None
            if rows is not None:
                value, sums = np.zeros(4), []
                for row in rows:
                    value = 0.99 * value + row
                    sums.append(value)
                deviation = np.sqrt(np.var(sums) + 1e-8) if not change else 1
                np.testing.assert_allclose(bonus, raw / deviation, rtol=1e-5)
            else:
                assert learner.filter.value.shape == (8,)  # of the steps, not of the games
        assert learner.seen.count == 3 * 32 + run.warm_up * 4
        np.testing.assert_allclose(learner.novelty.shift, learner.seen.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(learner.novelty.scale, np.sqrt(learner.seen.var + 1e-8), rtol=1e-4)


def test_without_whitening_the_inputs_stay(nb04):
    learner = nb04.Learner(small(nb04, whiten=False), CPU)
    nb04.update(learner)
    assert (learner.novelty.shift == 0).all()
    assert (learner.novelty.scale == 1).all()


def test_ppo_alone_knows_no_bonus(nb04):
    learner = nb04.Learner(small(nb04, bonus=False), CPU)
    networks, values = {k: v.clone() for k, v in learner.novelty.state_dict().items()}, learner.agent.values.weight.detach().clone()
    for _ in range(2):
        nb04.update(learner)
    assert same_tensors(networks, learner.novelty.state_dict())
    assert torch.equal(values[1], learner.agent.values.weight[1])  # the second value
    assert not torch.equal(values[0], learner.agent.values.weight[0])
    assert learner.seen.count == 0
    assert [row["bonus"] for row in learner.history] == [0, 0]


def test_what_paid_becomes_likelier(nb04):
    """Advantage 1 for one action and none for the rest: its probability rises, within what the clip allows at first order."""
    learner = nb04.Learner(small(nb04, epochs=1, minibatches=1, entropy=0.0), CPU)
    rollout, _ = nb04.collect(learner)
    advantages = (rollout["actions"] == 3).astype(float)
    before = learner.agent(*nb04.tensors(nb04.inputs_of(learner.observation), CPU))[0].softmax(1)[:, 3]
    nb04.improve(learner, rollout, advantages, rollout["values"], torch.zeros(32, 181))
    after = learner.agent(*nb04.tensors(nb04.inputs_of(learner.observation), CPU))[0].softmax(1)[:, 3]
    assert (after > before).all()


@pytest.mark.parametrize(("entropy", "rises"), [(0.1, True), (-0.1, False)])
def test_entropy_is_rewarded(nb04, entropy, rises):
    """Nothing else to learn: no advantage, values at their targets."""
    learner = nb04.Learner(small(nb04, epochs=1, minibatches=1, entropy=entropy, bonus=False), CPU)
    with torch.no_grad():
        learner.agent.policy.bias.copy_(torch.linspace(-1, 1, 8))
    rollout, _ = nb04.collect(learner)
    first, second = (nb04.improve(learner, rollout, np.zeros((8, 4)), rollout["values"], None)["entropy"] for _ in range(2))
    assert (second > first) == rises


def test_losses_of_the_first_minibatch(nb04):
    """At first the ratio is 1: the loss of the policy is minus the mean advantage, 0 when standardised; values against their targets."""
    learner = nb04.Learner(small(nb04, epochs=1, minibatches=1), CPU)
    rollout, _ = nb04.collect(learner)
    targets = rollout["values"] + np.array([2.0, 0.0])
    losses = nb04.improve(learner, rollout, np.random.default_rng(0).normal(size=(8, 4)), targets, torch.zeros(32, 181))
    assert losses["policy loss"] == pytest.approx(0, abs=1e-6)
    assert losses["value loss"] == pytest.approx(4, rel=1e-4)
    assert losses["entropy"] == pytest.approx(np.log(8), abs=1e-3)


def test_all_samples_are_used_once_an_epoch(nb04, monkeypatch):
    learner = nb04.Learner(small(nb04, epochs=2), CPU)
    rollout, _ = nb04.collect(learner)
    sizes, inner = [], nb04.ppo_loss
    rollout["log_p"] = np.arange(32, dtype=np.float32).reshape(8, 4)  # marks the samples
    monkeypatch.setattr(nb04, "ppo_loss", lambda new, old, *rest: sizes.append(old.clone()) or inner(new, new.detach(), *rest))
    nb04.improve(learner, rollout, np.ones((8, 4)), rollout["values"], torch.zeros(32, 181))
    assert [len(size) for size in sizes] == [8] * 8
    assert sorted(torch.cat(sizes[:4]).tolist()) == list(range(32)) == sorted(torch.cat(sizes[4:]).tolist())
    assert sizes[0].tolist() != sizes[4].tolist()


def test_every_sample_has_its_target(nb04):
    """Without a step (rate 0) the loss of four minibatches is that of all samples together."""
    learner = nb04.Learner(small(nb04, epochs=1, learning_rate=0.0), CPU)
    with torch.no_grad():
        learner.agent.values.weight.mul_(1000)  # values differ between samples
    rollout, _ = nb04.collect(learner)
    off = np.random.default_rng(0).normal(size=(8, 4, 2))
    losses = nb04.improve(learner, rollout, np.zeros((8, 4)), rollout["values"] + off, torch.zeros(32, 181))
    assert losses["value loss"] == pytest.approx((off[..., 0] ** 2).mean(), rel=1e-3)


def test_both_values_learn(nb04):
    learner = nb04.Learner(small(nb04, epochs=40), CPU)
    rollout, _ = nb04.collect(learner)
    targets = rollout["values"] + np.array([0.0, 1.0])
    nb04.improve(learner, rollout, np.zeros((8, 4)), targets, torch.zeros(32, 181))
    crop, glyphs, vector = (rollout[name].reshape(32, *rollout[name].shape[2:]) for name in ("crop", "glyphs", "vector"))
    values = learner.agent(*nb04.tensors((crop, glyphs, vector), CPU))[1].detach().numpy()
    assert np.abs(values - targets.reshape(32, 2)).mean() < 0.3


def test_settings_reach_the_update(nb04, monkeypatch):
    learner = nb04.Learner(small(nb04, clip=0.3, share=0.0, standardise=False), CPU)
    rollout, _ = nb04.collect(learner)
    clips, inner, advantages = [], nb04.ppo_loss, np.random.default_rng(0).normal(size=(8, 4)) * 1000
    monkeypatch.setattr(
        nb04, "ppo_loss", lambda new, old, scaled, clip: clips.append((clip, scaled.std().item())) or inner(new, old, scaled, clip)
    )
    before = {name: value.clone() for name, value in learner.novelty.state_dict().items()}
    nb04.improve(learner, rollout, advantages, rollout["values"], torch.zeros(32, 181))
    assert {clip for clip, _ in clips} == {0.3}
    assert min(scale for _, scale in clips) > 100  # as they are
    assert same_tensors(before, learner.novelty.state_dict())  # no sample was chosen
    norm = torch.stack([parameter.grad.norm() for parameter in learner.agent.parameters()]).norm()
    assert norm == pytest.approx(0.5, rel=1e-3)  # clipped


def test_share_of_the_samples_trains_the_predictor(nb04, monkeypatch):
    learner = nb04.Learner(small(nb04, share=0.25, epochs=100, minibatches=1), CPU)
    rollout, _ = nb04.collect(learner)
    rows = []
    learner.novelty.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    nb04.improve(learner, rollout, np.zeros((8, 4)), rollout["values"], torch.zeros(32, 181))
    assert sum(rows) / 3200 == pytest.approx(0.25, abs=0.04)


def test_mixed_precision(nb04, monkeypatch):
    check_amp_dtype(nb04, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_mixed_precision(nb04, monkeypatch, dtype):
    monkeypatch.setattr(nb04, "amp_dtype", lambda device: dtype)
    learner = nb04.Learner(small(nb04), CPU)
    assert learner.scaler.is_enabled() == (dtype == torch.float16)
    for _ in range(2):
        nb04.update(learner)
    assert all(np.isfinite(list(row.values())).all() for row in learner.history)
    assert all(parameter.dtype == torch.float32 and torch.isfinite(parameter).all() for parameter in learner.agent.parameters())


# runs


@pytest.mark.parametrize("change", [{}, {"bonus": False}, {"level": None}, {"task": "NetHackScore-v0"}])
def test_interrupted_training_of_04_resumes_to_the_same_numbers(nb04, tmp_path, monkeypatch, change):
    run = small(nb04, **change)
    whole = nb04.load(nb04.train(run, CPU, tmp_path / "whole", every=2))
    inner, calls = nb04.update, []

    def stopping(learner):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        inner(learner)

    monkeypatch.setattr(nb04, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        nb04.train(run, CPU, tmp_path, every=2)
    half = nb04.load(nb04.run_path(run, CPU, tmp_path))
    assert len(half["history"]) == 2
    assert "optimiser" in half
    resumed = nb04.load(nb04.train(run, CPU, tmp_path, every=2))
    assert len(calls) == 7  # three before, the interrupted one, three after
    assert resumed["history"] == whole["history"]
    assert same_tensors(resumed["agent"], whole["agent"])
    assert same_tensors(resumed["novelty"], whole["novelty"])


def test_a_finished_run_of_04_is_remembered(nb04, tmp_path, monkeypatch):
    run = small(nb04, steps=64)
    path = nb04.train(run, CPU, tmp_path)
    assert set(nb04.load(path)) == {"history", "seconds", "agent", "novelty"}
    assert list(tmp_path.iterdir()) == [path]
    assert [row["steps"] for row in nb04.load(path)["history"]] == [32, 64]
    monkeypatch.setattr(nb04, "Learner", None)
    assert nb04.train(run, CPU, tmp_path) == path


def test_a_kill_while_saving_leaves_the_old_checkpoint_of_04(nb04, tmp_path, monkeypatch):
    path = nb04.train(small(nb04), CPU, tmp_path)
    check_kill_while_saving(lambda: nb04.save({"history": [], "agent": {}}, path), path, monkeypatch)


def test_each_run_of_04_has_its_own_checkpoint(nb04, tmp_path):
    run = nb04.Run()
    change = {str: lambda value: "NetHackScore-v0", bool: lambda value: not value, type(None): lambda value: 3}
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    others = [replace(run, **{name: change.get(type(value), lambda value: value + 4)(value)}) for name, value in values.items()]
    paths = [nb04.run_path(r, CPU, tmp_path) for r in (run, *others)] + [nb04.run_path(run, torch.device("cuda"), tmp_path)]
    assert len(set(paths)) == len(fields(run)) + 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped", "another", "a list"])
def test_a_damaged_checkpoint_of_04_is_named(nb04, tmp_path, damage):
    run = small(nb04, steps=32)
    path = nb04.train(run, CPU, tmp_path)
    content = path.read_bytes()
    if damage in ("another", "a list"):
        torch.save({"weights": torch.zeros(3)} if damage == "another" else [1, 2], path)
    else:
        path.write_bytes(
            {"cut": content[:1000], "garbage": b"\x80\x02." * 50, "flipped": content[:100] + bytes(300) + content[400:]}[damage]
        )
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: delete it"):
        nb04.train(run, CPU, tmp_path)


def test_an_error_in_a_process_shows_at_once(nb04, tmp_path):
    runs = [small(nb04, steps=32 * 150, seed=seed) for seed in range(6)]
    path = nb04.run_path(runs[0], CPU, tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        nb04.sweep(runs, CPU, tmp_path, 2, "test")
    assert len(list(tmp_path.glob("*.pt"))) < 6


def test_a_folder_that_cannot_be_written_is_named(nb04, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"set CHECKPOINTS to a folder that can be written"):
        nb04.train(small(nb04, steps=32), CPU, tmp_path / "file" / "folder", every=1)


def test_processes_give_what_one_gives(nb04, tmp_path):
    runs = [small(nb04, steps=64, seed=seed) for seed in (1, 2, 3)]
    alone, together = (nb04.sweep(runs, CPU, tmp_path / str(workers), workers, "test") for workers in (1, 2))
    assert list(alone) == runs
    for run in runs:
        assert alone[run]["history"] == together[run]["history"]
        assert same_tensors(alone[run]["agent"], together[run]["agent"])


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
    config = nb04.Config(levels=2, first_level=0, nearest=15, farthest=40, luck=0.5, tries=16)
    levels = nb04.choose_levels(config, 100)
    assert list(levels) == [2, 3]
    assert levels[3][0] == 19
    assert all(15 <= moves <= 40 and luck < 0.5 for moves, _, _, luck in levels.values())
    assert list(nb04.choose_levels(replace(config, farthest=20), 100)) == [3, 11]
    assert list(nb04.choose_levels(replace(config, nearest=30), 100)) == [5, 7]
    lucky = {level: np.array([[0.5 if level == 2 else 0.25, 0, 0, 1]]) for level in range(20)}
    monkeypatch.setattr(nb04, "random_walk", lambda task, level, *rest: (lucky[level], 1))
    assert list(nb04.choose_levels(replace(config, first_level=1), 100)) == [3, 4]


def test_program_finds_the_stairs_or_gives_up(nb04):
    assert nb04.explore(1) is None  # no way by eight moves alone
    moves, steps, screen = nb04.explore(12)  # past a door that is locked
    assert (moves, steps < 150) == (31, True)
    assert (screen["tty_chars"] == ord(">")).any()


def test_random_walk(nb04):
    outcomes, cells = nb04.random_walk("staircase", LEVEL, 10, 20, 0, num_games=4)
    assert outcomes.shape == (10, 4)
    assert cells > 5
    assert (outcomes == nb04.random_walk("staircase", LEVEL, 10, 20, 0, num_games=4)[0]).all()
    assert (outcomes[:, 3] == 1).all()


# demonstrations


def test_deep_sea(nb04):
    chance = [nb04.deep_sea(4, None, np.random.default_rng(i)) for i in range(600)]
    assert np.mean(chance) == pytest.approx(16, abs=4 * np.std(chance) / np.sqrt(600))
    assert nb04.deep_sea(14, None, np.random.default_rng(0), limit=50) == 50
    for weight in (0, 1):
        directed = [nb04.deep_sea(12, weight, np.random.default_rng(i)) for i in range(5)]
        assert max(directed) < 500 < 2**12


def test_novelty_falls_with_visits_when_whitened(nb04):
    states, visits = nb04.grid_states(300, 0)
    assert (states.shape, visits.min(), visits.max() <= 300) == ((400, 41), 1, True)
    white = (states - states.mean(0)) / states.std(0)
    order = [
        np.corrcoef(np.argsort(np.argsort(visits.numpy())), np.argsort(np.argsort(nb04.novelty_after(x, visits, 0).numpy())))[0, 1]
        for x in (states, white)
    ]
    assert order[1] < -0.8 < order[0]


# evaluation


def history(successes, episodes=None):
    return {
        "history": [
            {"steps": 10 * (i + 1), "episodes": (episodes or [99] * 9)[i], "success": s, "coverage": i} for i, s in enumerate(successes)
        ]
    }


def test_steps_to(nb04):
    assert nb04.steps_to(history([0.1, 0.8, 0.2]), 5) == 20
    assert nb04.steps_to(history([0.9, 0.5, 0.9], [3, 6, 9]), 5) == 30  # not before the window is full
    assert nb04.steps_to(history([0.1, 0.79]), 5) is None


def test_summary(nb04):
    runs = {nb04.Run(level=4, seed=s, bonus=b): history([0.0, 0.9 if b and s else 0.1]) for s in (0, 1) for b in (True, False)}
    assert nb04.summary(runs, 4, True, 5, 777) == {"steps": [777, 20], "solved": [False, True], "success": [0.1, 0.9], "cells": [1, 1]}
    assert nb04.summary(runs, 4, False, 5, 777)["solved"] == [False, False]


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


def test_apart(nb04):
    assert nb04.apart(np.array([0, 9, 8, 0, 7, 0, 6.0]), 3, 2) == [1, 4, 6]
    assert nb04.apart(np.array([1.0, 2.0]), 4, 5) == [1]


def test_terminal_shows_the_characters(nb04):
    game = nb04.make_game("staircase", 5, nb04.SCREEN)
    game.seed(core=1, disp=1, reseed=False, lgen=LEVEL)
    observation, _ = game.reset()
    picture = np.asarray(nb04.terminal(observation)).astype(int)
    assert (picture[0] == 255).all()
    height, width = (picture.shape[0] - 4) // 24, (picture.shape[1] - 4) // 80
    lit = picture[2:-2, 2:-2].reshape(24, height, 80, width, 3).max((1, 3, 4)) > 0
    row, column = observation["blstats"][1] + 1, observation["blstats"][0]
    assert observation["tty_chars"][row, column] == ord("@")
    drawn = observation["tty_chars"] != ord(" ")
    assert lit[row, column]
    lit[row, column] = drawn[row, column]
    assert (lit == drawn).mean() > 0.999


def test_film(nb04):
    game = nb04.make_game("staircase", 30, nb04.SCREEN)
    game.seed(core=1, disp=1, reseed=False, lgen=LEVEL)
    observation, screens = game.reset()[0], []
    for i in range(12):
        screens.append({key: value.copy() for key, value in observation.items()})
        observation, *_ = game.step(i % 8)
    moving = Image.open(io.BytesIO(nb04.film(screens, np.linspace(1, 2, 12), 6)))
    assert (moving.format, moving.n_frames) == ("GIF", 6)
    assert moving.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_episode_is_played_to_its_end(nb04, tmp_path):
    run = small(nb04, steps=32)
    agent, networks = nb04.restored(run, nb04.load(nb04.train(run, CPU, tmp_path)))
    screens, rewards = nb04.play(agent, LEVEL, 0, 15, "staircase")
    assert (len(screens), len(rewards)) == (16, 15)
    assert screens[-1]["blstats"][nethack.NLE_BL_HPMAX] > 0
    novelty = nb04.novelty_of(networks, screens)
    assert novelty.shape == (16,)
    seen = nb04.Observation(screens[3]["glyphs"][None], screens[3]["blstats"][None])
    inputs = networks.inputs(torch.as_tensor(nb04.crops(seen)).int(), torch.as_tensor(nb04.places(seen.blstats)))
    assert novelty[3] == pytest.approx(networks(inputs).item(), rel=1e-4)
    again, _ = nb04.play(agent, LEVEL, 0, 15, "staircase")
    assert all(np.array_equal(a["tty_chars"], b["tty_chars"]) for a, b in zip(screens, again, strict=True))


def test_nothing_is_left_in_the_folder(nb04, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb04.Games("NetHackScore-v0", 2, 5, None, 0).reset()
    assert list(Path(tmp_path).iterdir()) == []
