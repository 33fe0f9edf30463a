"""Speed of notebook 07 on this machine: `make bench NB=07`.

    python -m tools.bench.07 [--sweep]

Prints the time of a training step at nanoGPT's CPU budget (4 layers, 4 heads, width 128, context 64, batch 12) beside nanoGPT's own
step, of decoding with and without the cache, and what ClearML's offline mode adds to a run. With NANOGPT=folder in the environment the
peer is the code in that clone of nanoGPT; without it, its model and loop as rebuilt below. --sweep trains both blocks at three
learning rates instead.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from tools import cookbook, lift, sync_canon

PATH = cookbook.find("07")[0]
NB = lift.lift(PATH)
MEASURE = lift.block("measure")
RUN = NB.Run(n_layer=4, n_head=4, d_model=128, context=64, steps=2000, warmup=100)  # nanoGPT's for a CPU


def our_step(corpus):
    """The step of the notebook's loop."""
    model = NB.Transformer(RUN, len(corpus.vocabulary))
    optimizer = NB.make_optimizer(model, RUN)
    batches = torch.Generator().manual_seed(0)

    def step():
        x, y = NB.draw_batch(corpus.train, RUN, batches)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RUN.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_model(corpus):
    """nanoGPT's model and optimiser: from its clone, or the same block and the unfused AdamW that it takes on a CPU."""
    if "NANOGPT" in os.environ:
        sys.path.insert(0, os.environ["NANOGPT"])
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(block_size=64, vocab_size=len(corpus.vocabulary), n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
        return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu"), lambda x, y: model(x, y)[1]
    model = NB.Transformer(replace(RUN, block="gpt2", position="learned", init="nanogpt"), len(corpus.vocabulary))
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decayed], "weight_decay": 0.1 * decayed} for decayed in (True, False)
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99)), lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def peer_step(corpus):
    """The step of nanoGPT's loop, with its way of drawing batches."""
    model, optimizer, loss = peer_model(corpus)
    tokens = corpus.train.numpy().astype(np.uint16)

    def step():
        starts = torch.randint(len(tokens) - RUN.context, (RUN.batch_size,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + s : i + s + RUN.context].astype(np.int64)) for i in starts]) for s in (0, 1))
        loss(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def repeated(step):
    """Ten steps, so that what the clock itself takes does not count."""

    def steps():
        for _ in range(10):
            step()

    return steps


def bench_training(corpus):
    """Training steps of the notebook and of nanoGPT."""
    peer = "nanoGPT (clone)" if "NANOGPT" in os.environ else "nanoGPT (rebuilt)"
    cases = {"notebook 07": repeated(our_step(corpus)), peer: repeated(peer_step(corpus))}
    seconds = MEASURE.seconds_in_turns(cases, 30, "cpu")
    for name, value in seconds.items():
        speed = 10 * RUN.batch_size * RUN.context / value
        print(f"training step, {name:18} {1e3 * value / 10:5.1f} ms, {speed:,.0f} characters/s")
    print(f"speed of notebook 07 / nanoGPT: {seconds[peer] / seconds['notebook 07']:.2f}")


def bench_decoding(corpus):
    """Tokens per second with the cache and without, as the notebook measures them."""
    model = NB.extended(NB.Transformer(replace(RUN, context=256), len(corpus.vocabulary)), 1024)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    for n in (64, 256, 512, 1024):
        ways = {way: functools.partial(NB.generate, model, prompt, n, temperature=0, use_cache=way) for way in (True, False)}
        seconds = MEASURE.seconds_in_turns(ways, 3, "cpu")
        cached, recomputed = seconds[True], seconds[False]
        print(f"decoding {n:4} tokens: {n / cached:5.0f} tokens/s cached, {n / recomputed:5.0f} recomputed:", end=" ")
        print(f"{recomputed / cached:.1f} times")


TRACKING = """
import contextlib, logging, os, sys, threading, time
start = time.perf_counter()
from clearml import Task
from clearml.backend_api import Session
from clearml.config import config_obj
imported = time.perf_counter()
{canon}
task = start_tracking("bench", {{"a": 1}})
for i in range(1000):
    task.get_logger().report_scalar("a", "b", i, i)
finish_tracking(task)
print(f"import {{imported - start:.2f}} s, all the rest {{time.perf_counter() - imported:.2f}} s")
"""


def bench_tracking():
    """Seconds that importing ClearML, starting, 1,000 scalars and closing take offline, by the notebook's block."""
    script = TRACKING.format(canon=sync_canon.blocks()["tracking"])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CLEARML")}
    command = [sys.executable, "-c", script]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    print("ClearML offline:", done.stdout.splitlines()[-1])


def sweep(corpus):
    """Validation loss of one seed for both blocks at three learning rates: so the notebook's was chosen."""
    for block, position in (("modern", "rope"), ("gpt2", "learned")):
        for rate in (1e-3, 2e-3, 4e-3):
            run = replace(RUN, block=block, position=position, learning_rate=rate)
            model, _ = NB.train(run, corpus, seed=0)
            loss = NB.loss_by_position(model, corpus.validation, RUN.context)[0].mean()
            print(f"{block:6} {position:7} learning rate {rate}: validation loss {loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="train both blocks at three learning rates (about ten minutes)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    os.environ.setdefault("COOKBOOK_DATA", str(cookbook.ROOT / "data"))
    os.environ["COOKBOOK_PRESET"] = "cpu" if arguments.sweep else "smoke"  # smoke asks no network
    corpus = NB.make_corpus(NB.load_text())
    if arguments.sweep:
        sweep(corpus)
        return
    bench_training(corpus)
    bench_decoding(corpus)
    bench_tracking()


if __name__ == "__main__":
    main()
