"""Speed and memory of notebook 03 on this machine: `make bench NB=03`.

    python -m tools.bench.03 [--sweep [TASK ...]]

Prints time and peak memory of attention, forward and backward, in three forms (explicit, fused, ordinary) at the notebook's lengths;
a module's forward and backward beside that of transformers' DiffLlama; and the training step of each kind. --sweep trains ordinary and
differential attention at several learning rates instead: what `learning_rate` in the notebook was chosen by.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

from tools import cookbook, lift

NB = lift.lift(cookbook.find("03")[0])
MEASURE = lift.block("measure")
CONFIG = NB.PRESETS["cpu"]
DATA = Path(os.environ.get("COOKBOOK_DATA", cookbook.ROOT / "data"))
RATES = {"recurrence": (1e-3, 2e-3, 4e-3), "recall": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "text": (1e-3, 2e-3, 4e-3)}


def bench_attention():
    """The three forms at the notebook's lengths."""
    for length in CONFIG.lengths:
        cases = NB.speed_cases(length, "cpu")
        seconds = MEASURE.seconds_in_turns(cases, 7, "cpu")
        peak = {name: MEASURE.peak_memory(case, "cpu") for name, case in cases.items()}
        each = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms {peak[name] / 2**20:.1f} MiB" for name in cases)
        print(f"{length:5} tokens: {each}; explicit / fused {seconds['explicit'] / seconds['fused']:.2f} in time,", end=" ")
        print(f"{peak['explicit'] / peak['fused']:.1f} in memory; fused / ordinary {seconds['fused'] / seconds['ordinary']:.2f} in time")


def peer_case(length, width=256, pairs=4):
    """Forward and backward of transformers' DiffLlama attention through SDPA, rotary positions included."""
    heads = {"num_attention_heads": 2 * pairs, "num_key_value_heads": 2 * pairs}
    config = DiffLlamaConfig(hidden_size=width, **heads, attn_implementation="sdpa")
    module, x = DiffLlamaAttention(config, layer_idx=0), torch.randn(1, length, width)
    positions = DiffLlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    return lambda: torch.autograd.grad(module(x, positions, attention_mask=None)[0].sum(), module.parameters())


def our_case(length, width=256, pairs=4):
    """The same through the notebook's module."""
    module, x = NB.DifferentialAttention(width, pairs), torch.randn(1, length, width)
    table = NB.rope_table(length, width // pairs // 2)
    return lambda: torch.autograd.grad(module(x, table).sum(), module.parameters())


def bench_module():
    """The notebook's module beside that of transformers."""
    for length in CONFIG.lengths:
        cases = {"notebook 03": our_case(length), "transformers' DiffLlama": peer_case(length)}
        ours, theirs = MEASURE.seconds_in_turns(cases, 7, "cpu").values()
        peaks = [MEASURE.peak_memory(case, "cpu") / 2**20 for case in cases.values()]
        print(f"{length:5} tokens, module: notebook {1e3 * ours:.1f} ms {peaks[0]:.1f} MiB,", end=" ")
        print(f"transformers {1e3 * theirs:.1f} ms {peaks[1]:.1f} MiB: {theirs / ours:.2f} times as fast")


def bench_training(data):
    """Trainings of 40 steps of each kind, by the step."""
    runs = {kind: replace(CONFIG.text, **changes, steps=40) for kind, changes in NB.KINDS.items()}
    train = functools.partial(NB.train, data=data, seed=0, score=lambda model: 0.0, eval_every=40)
    cases = {kind: functools.partial(train, run) for kind, run in runs.items()}
    seconds = MEASURE.seconds_in_turns(cases, 5, "cpu")
    for kind, value in seconds.items():
        times = value / seconds["ordinary"]
        print(f"training step, {kind:12} {1e3 * value / 40:5.1f} ms, {times:.2f} times ordinary attention's")


def task(name, data):
    """(run, data, score) of one of the notebook's tasks; the score is that by which a rate is chosen."""
    draws = torch.Generator().manual_seed(NB.TEST_SEED)
    if name == "recurrence":
        data = NB.Recurrence()
        tests = data.batch(replace(CONFIG.recurrence, batch_size=CONFIG.tests), draws)
        return CONFIG.recurrence, data, lambda model: NB.correct(model, *tests).mean().item()
    if name == "recall":
        data = NB.Recall(CONFIG.recall_lengths, CONFIG.recall_records)
        length = CONFIG.test_lengths[-1]
        tests = NB.recall_tests(data, max(data.records), length, CONFIG.tests)[:2]
        return CONFIG.recall, data, lambda model: NB.correct(model, *tests).mean().item()
    return CONFIG.text, data, lambda model: NB.text_loss(model, data.validation, model.run.context)


def sweep(names, data):
    """Final score of one seed for both kinds at several learning rates."""
    for name in names:
        run, examples, score = task(name, data)
        for rate in RATES[name]:
            for kind in ("ordinary", "differential"):
                last = replace(run, kind=kind, learning_rate=rate)
                log = NB.train(last, examples, 0, score, eval_every=run.steps)[1]
                print(f"{name:10} {kind:12} learning rate {rate}: {log['score'][-1]:.4f}, {log['seconds'][-1]:.0f} s", flush=True)


def main():
    tasks = cookbook.swept(__doc__, RATES, "half an hour")
    torch.manual_seed(0)
    data = NB.Text(NB.load_text(DATA, "smoke" if tasks is None else "cpu"))
    if tasks is not None:
        return sweep(tasks, data)
    bench_attention()
    bench_module()
    bench_training(data)


if __name__ == "__main__":
    main()
