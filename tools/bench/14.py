"""Speed of notebook 14's Transformer on this machine, beside `nn.Transformer` with the same weights: `make bench NB=14`.

    python -m tools.bench.14

Tokens a second of a training step (loss and gradients) and of greedy writing, 16 sentences with as many tokens on both sides, networks of the
size of the `cpu` preset's translation. PyTorch's module keeps no keys and values, so for each token it reads again all that is written. Both
take turns. Before that, the logits of both have to agree. One thread on a CPU, as in the notebook.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from tools import cookbook, lift

NB = lift.lift(cookbook.find("14")[0])
MEASURE = lift.block("measure")
SENTENCES, LENGTHS, ROUNDS, VOCABULARY = 16, (10, 25, 50, 100), 3, 2000


class Plain(nn.Module):
    """The Transformer of the notebook, of PyTorch's layers."""

    def __init__(self, ours, config):
        super().__init__()
        self.embedding, self.positions, self.width = ours.embedding, ours.positions, config.width
        how = {"dropout": 0.0, "batch_first": True, "norm_first": True, "dim_feedforward": 4 * config.width}
        self.network = nn.Transformer(config.width, config.heads, config.layers, config.layers, **how)
        for side, layers, norm in zip((self.network.encoder, self.network.decoder), (ours.encoder, ours.decoder), ours.norms, strict=True):
            side.norm.load_state_dict(norm.state_dict())
            for mine, layer in zip(layers, side.layers, strict=True):
                copy_layer(mine, layer)

    def embed(self, tokens):
        return self.embedding(tokens) * math.sqrt(self.width) + self.positions[: tokens.shape[1]]

    def encode(self, source):
        return self.network.encoder(self.embed(source), src_key_padding_mask=source == NB.PAD)

    def decode(self, memory, source, tokens):
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.network.decoder(self.embed(tokens), memory, tgt_mask=causal, memory_key_padding_mask=source == NB.PAD)
        return hidden @ self.embedding.weight.T


def copy_layer(ours, theirs):
    """Weights of a layer of the notebook into one of PyTorch."""
    pairs = [(ours.own, theirs.self_attn)]
    if ours.cross is not None:
        pairs.append((ours.cross, theirs.multihead_attn))
    for attention, copy in pairs:
        parts = attention.query, attention.key, attention.value
        copy.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
        copy.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
        copy.out_proj.load_state_dict(attention.output.state_dict())
    for n, norm in enumerate(ours.norms):
        getattr(theirs, f"norm{n + 1}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.network[0].state_dict())
    theirs.linear2.load_state_dict(ours.network[2].state_dict())


def plain_step(plain, source, target):
    """Loss and gradients of a step."""
    plain.zero_grad()
    logits = plain.decode(plain.encode(source), source, target[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=NB.PAD).backward()


@torch.no_grad()
def plain_greedy(plain, source, start, most):
    """Tokens (N, most), each computed from all before it, as PyTorch's module offers no cache."""
    tokens, memory = start[:, None], plain.encode(source)
    for _ in range(most):
        tokens = torch.cat([tokens, plain.decode(memory, source, tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, 1:]


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = NB.Config(kind="transformer", vocabulary=VOCABULARY, width=128, heads=4, layers=2, longest=max(LENGTHS))
    ours = NB.build(config, 0, device)
    plain = Plain(ours, config).to(device)
    for length in LENGTHS:
        source = torch.randint(4, VOCABULARY, (SENTENCES, length), device=device)
        with torch.no_grad():
            mine = ours.eval().advance(ours.encode(source), source)[0]
            error = (mine - plain.eval().decode(plain.encode(source), source, source)).abs().max()
        assert error < 1e-3, error
        ways = {"ours": functools.partial(NB.training_step, ours.train(), source, source)}
        ways["nn.Transformer"] = functools.partial(plain_step, plain.train(), source, source)
        trained = MEASURE.seconds_in_turns(ways, ROUNDS, device)
        ways = {"ours, cached": functools.partial(NB.greedy, ours.eval(), source, source[:, 0], length)}
        ways["nn.Transformer"] = functools.partial(plain_greedy, plain.eval(), source, source[:, 0], length)
        wrote = MEASURE.seconds_in_turns(ways, ROUNDS, device)
        print(f"{length} tokens a sentence, logits differ by {error:.0e}; tokens/s", flush=True)
        for what, found in (("training", trained), ("writing", wrote)):
            speeds = ", ".join(f"{way} {SENTENCES * length / seconds:,.0f}" for way, seconds in found.items())
            print(f"    {what}: {speeds}", flush=True)


if __name__ == "__main__":
    main()
