"""Speed and memory of notebook 03 on this machine: `make bench NB=03`.

    python -m tools.bench.03 [--steps 40]

Prints time and peak memory of attention, forward and backward, in four forms (explicit, padded, split, ordinary), and the kernels that
PyTorch chose; a module's forward and backward beside that of transformers' DiffLlama; and the training step of each kind. Learning rates are
tuned in the notebook itself, by validation text and a seed that it does not report, so there is no sweep here.
"""

import argparse
import functools
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

from tools import cookbook, lift

NB = lift.lift(cookbook.find("03")[0])
MEASURE = lift.block("measure")
LENGTHS = (128, 256, 512, 1024, 2048)
PREFIX = "aten::_scaled_dot_product_"


def kernel_of(case):
    """Name of the attention kernel that PyTorch chose for a case."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        case()
    keys = {event.key for event in profiler.key_averages() if event.key.startswith(PREFIX)}
    return ", ".join(sorted(key.removeprefix(PREFIX) for key in keys if "backward" not in key)) or "none fused"


def bench_attention():
    """The four forms at all lengths."""
    print("kernels:", {name: kernel_of(case) for name, case in NB.speed_cases(128, "cpu").items()})
    for length in LENGTHS:
        cases = NB.speed_cases(length, "cpu")
        seconds = MEASURE.seconds_in_turns(cases, 7, "cpu")
        peak = {name: MEASURE.peak_memory(case, "cpu") for name, case in cases.items()}
        each = ", ".join(f"{name} {1e3 * seconds[name]:.1f} ms {peak[name] / 2**20:.1f} MiB" for name in cases)
        print(f"{length:5} tokens: {each}; explicit / padded {seconds['explicit'] / seconds['fused']:.2f} in time,", end=" ")
        print(f"{peak['explicit'] / peak['fused']:.1f} in memory; split / padded {seconds['split'] / seconds['fused']:.2f} in time")


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
    for length in LENGTHS:
        cases = {"notebook 03": our_case(length), "transformers' DiffLlama": peer_case(length)}
        ours, theirs = MEASURE.seconds_in_turns(cases, 7, "cpu").values()
        peaks = [MEASURE.peak_memory(case, "cpu") / 2**20 for case in cases.values()]
        print(f"{length:5} tokens, module: notebook {1e3 * ours:.1f} ms {peaks[0]:.1f} MiB,", end=" ")
        print(f"transformers {1e3 * theirs:.1f} ms {peaks[1]:.1f} MiB: {theirs / ours:.2f} times as fast")


def bench_training(data, steps):
    """Trainings of each kind, by the step."""
    runs = {kind: replace(NB.Run(), kind=kind, steps=steps) for kind in NB.KINDS}
    train = functools.partial(NB.train, data=data, seed=0, score=lambda model: 0.0, eval_every=steps)
    cases = {kind: functools.partial(train, run) for kind, run in runs.items()}
    seconds = MEASURE.seconds_in_turns(cases, 5, "cpu")
    for kind, value in seconds.items():
        times = value / seconds["ordinary"]
        print(f"training step, {kind:12} {1e3 * value / steps:5.1f} ms, {times:.2f} times ordinary attention's")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of a training that is timed (default 40)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as in the notebook
    bench_attention()
    bench_module()
    bench_training(NB.Corpus(NB.load_text()), steps)


if __name__ == "__main__":
    main()
