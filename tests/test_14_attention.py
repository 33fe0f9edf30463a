"""Notebook 14 against PyTorch's layers with copied weights, explicit loops, enumeration of all sequences, and sacreBLEU."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@pytest.fixture
def small(nb14):
    """Settings of a small network."""
    return nb14.Config(vocabulary=75, width=16, heads=2, layers=2, batch_size=4, steps=6, longest=64)


def kinds():
    return ["last", "each step", "uniform", "additive", "dot", "transformer"]


# --- attention


def test_additive_attention_by_a_loop(nb14):
    query, keys, values = normal(3, 4), normal(3, 5, 6, seed=1), normal(3, 5, 7, seed=2)
    W, U, v = normal(4, 8, seed=3), normal(6, 8, seed=4), normal(8, seed=5)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, True, False]])
    context, weights = nb14.additive_attention(query, keys, values, W, U, v, mask)
    for n in range(3):
        scores = [float(v @ torch.tanh(query[n] @ W + keys[n, j] @ U)) for j in range(5)]
        parts = [math.exp(score) if mask[n, j] else 0.0 for j, score in enumerate(scores)]
        expected = torch.tensor(parts, dtype=torch.float64) / sum(parts)
        torch.testing.assert_close(weights[n], expected)
        torch.testing.assert_close(context[n], sum(expected[j] * values[n, j] for j in range(5)))
    free = nb14.additive_attention(query, keys, values, W, U, v)[1]
    torch.testing.assert_close(free[0], weights[0])
    torch.testing.assert_close(free.sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_scaled_dot_product_is_pytorchs(nb14, shape):
    q, k, v = normal(*shape, 4, 8), normal(*shape, 6, 8, seed=1), normal(*shape, 6, 5, seed=2)
    output, weights = nb14.scaled_dot_product(q, k, v)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(weights, (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1))
    mask = torch.rand(4, 6, generator=generator(3)) < 0.6
    mask[:, 0] = True
    found = nb14.scaled_dot_product(q, k, v, mask)
    torch.testing.assert_close(found[0], F.scaled_dot_product_attention(q, k, v, mask))
    assert (found[1] * ~mask).abs().max() == 0


def test_a_row_masked_everywhere_is_zero_with_gradients(nb14):
    q, k = normal(2, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    mask = torch.tensor([[False] * 4, [True, False, True, False]])
    output, weights = nb14.scaled_dot_product(q, k, k, mask)
    assert output[0].abs().max() == 0
    assert weights[0].abs().max() == 0
    output.sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad[0].abs().max() == 0
    assert k.grad.isfinite().all()


def test_masked_scores_do_not_matter_however_large(nb14):
    scores = torch.tensor([[1.0, 2.0, 1e30], [3e38, 0.0, math.inf]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    torch.testing.assert_close(nb14.masked_softmax(scores, mask)[0, :2], torch.tensor([1.0, 2.0]).softmax(0))
    assert nb14.masked_softmax(scores, mask)[1].tolist() == [1, 0, 0]


def pytorchs(ours, width, heads):
    """nn.MultiheadAttention with the weights of ours."""
    theirs = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64)
    copy_attention(ours, theirs)
    return theirs


def copy_attention(ours, theirs):
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).detach()
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_multi_head_attention_is_pytorchs(nb14, heads):
    torch.manual_seed(1)
    ours = nb14.MultiHeadAttention(8, heads).double()
    theirs = pytorchs(ours, 8, heads)
    x, context = normal(3, 4, 8), normal(3, 6, 8, seed=1)
    hidden = torch.arange(6) >= torch.tensor([[6], [3], [1]])  # PyTorch's True: may not
    expected = theirs(x, context, context, key_padding_mask=hidden, average_attn_weights=False)
    found = ours(x, context, ~hidden[:, None, None])
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    causal = torch.ones(4, 4).tril().bool()
    expected = theirs(x, x, x, attn_mask=~causal, average_attn_weights=False)
    found = ours(x, x, causal)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_undivided_scores(nb14):
    torch.manual_seed(1)
    plain, scaled = nb14.MultiHeadAttention(8, 2, scaled=False), nb14.MultiHeadAttention(8, 2)
    scaled.load_state_dict(plain.state_dict())
    x = normal(2, 3, 8, dtype=torch.float32)
    scaled.query.weight.data *= 2  # the root of 4
    scaled.query.bias.data *= 2
    torch.testing.assert_close(plain(x, x)[1], scaled(x, x)[1])


@pytest.mark.parametrize(("width", "heads"), [(8, 3), (8, 0), (4, 8)])
def test_width_has_to_be_divisible(nb14, width, heads):
    with pytest.raises(ValueError, match=f"width {width} is not divisible by {heads} heads"):
        nb14.MultiHeadAttention(width, heads)


def test_dropout_is_inverted_and_of_its_generator(nb14):
    x = torch.ones(100_000)
    dropout = nb14.Dropout(0.3, generator(1))
    found = dropout(x)
    assert sorted(set(found.tolist())) == pytest.approx([0, 1 / 0.7])
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(nb14.Dropout(0.3, generator(1))(x), found)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(nb14.Dropout(0.0)(x), x)
    attention = nb14.MultiHeadAttention(8, 2, dropout=nb14.Dropout(0.5, generator(2)))
    y = normal(1, 5, 8, dtype=torch.float32)
    assert not torch.allclose(attention(y, y)[0], attention(y, y)[0])
    torch.testing.assert_close(attention.eval()(y, y)[0], attention(y, y)[0])


@pytest.mark.parametrize("kept", [False, True])
def test_weights_of_attention_can_be_spared_from_dropout(nb14, small, kept):
    config = replace(small, kind="transformer", dropout=0.4, weights_kept=kept)
    model = nb14.build(config, 0, "cpu").train()
    attentions = [module for module in model.modules() if isinstance(module, nb14.MultiHeadAttention)]
    assert len(attentions) == 3 * config.layers
    for attention in attentions:
        x = torch.randn(2, 5, config.width, generator=generator(1))
        output, weights = attention(x, x)
        expected = attention.output((weights @ attention.remember(x)[1]).transpose(1, 2).flatten(2))
        assert torch.allclose(output, expected, atol=1e-6) == kept
    assert all(layer.dropout.rate == 0.4 for layer in (*model.encoder, *model.decoder))


# --- networks


def test_positions_are_the_papers(nb14):
    found = nb14.sinusoidal_positions(50, 6)
    assert found.shape == (50, 6)
    for place, i in itertools.product((0, 1, 17, 49), range(3)):
        angle = place / 10_000 ** (2 * i / 6)
        assert found[place, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert found[place, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    for length, width in ((3, 5), (0, 4)):
        with pytest.raises(ValueError, match="even"):
            nb14.sinusoidal_positions(length, width)


def theirs_of(nb14, ours, decoder):
    """PyTorch's layer, normalised first, with the weights of ours."""
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    theirs = kind(16, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    copy_attention(ours.own, theirs.self_attn)
    if decoder:
        copy_attention(ours.cross, theirs.multihead_attn)
    for n, norm in enumerate(ours.norms):
        getattr(theirs, f"norm{n + 1}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(ours.network[0].state_dict())
    theirs.linear2.load_state_dict(ours.network[2].state_dict())
    return theirs.eval()


def shaken(model, seed=5):
    """The model with all weights and biases drawn, so that none is at its start."""
    draws = generator(seed)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=draws)
    return model.eval()


def test_encoder_layer_is_pytorchs(nb14, small):
    ours = shaken(nb14.Layer(small, False))
    x = normal(3, 7, 16, dtype=torch.float32)
    hidden = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    expected = theirs_of(nb14, ours, False)(x, src_key_padding_mask=hidden)
    found, (keys, values), weights = ours(x, ~hidden[:, None, None])
    torch.testing.assert_close(found[~hidden], expected[~hidden], atol=1e-5, rtol=1e-4)
    assert keys.shape == values.shape == (3, 2, 7, 8)
    assert weights is None


def test_decoder_layer_is_pytorchs(nb14, small):
    ours = shaken(nb14.Layer(small, True))
    x, memory = normal(3, 5, 16, dtype=torch.float32), normal(3, 7, 16, seed=1, dtype=torch.float32)
    hidden = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    causal = torch.ones(5, 5).tril().bool()
    expected = theirs_of(nb14, ours, True)(x, memory, tgt_mask=~causal, memory_key_padding_mask=hidden)
    source, mask = ours.cross.remember(memory), ~hidden[:, None, None]
    found, _, weights = ours(x, causal, None, source, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert weights.shape == (3, 2, 5, 7)
    assert (weights * hidden[:, None, None]).abs().max() == 0


def test_transformer_is_its_layers(nb14, small):
    model = shaken(nb14.build(small, 0, "cpu"))
    source, tokens = torch.tensor([[3, 4, 5, 1, 0], [6, 7, 1, 0, 0]]), torch.tensor([[2, 3, 9], [2, 8, 8]])
    positions = nb14.sinusoidal_positions(64, 16)
    mask = (source != 0)[:, None, None]
    x = model.embedding(source) * 4 + positions[:5]
    for layer in model.encoder:
        x = layer(x, mask)[0]
    memory = model.norms[0](x)
    y = model.embedding(tokens) * 4 + positions[:3]
    for layer in model.decoder:
        y, _, weights = layer(y, torch.ones(3, 3).tril().bool(), None, layer.cross.remember(memory), mask)
    logits, _, looks = model.advance(model.encode(source), tokens)
    torch.testing.assert_close(logits, model.norms[1](y) @ model.embedding.weight.T)
    torch.testing.assert_close(looks, weights.mean(1))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("both", [False, True])
def test_cached_is_uncached_and_padding_changes_nothing(nb14, small, kind, both):
    config = replace(small, kind=kind, both=both)
    model = shaken(nb14.build(config, 0, "cpu"))
    source, tokens = torch.randint(2, 35, (3, 7), generator=generator()), torch.randint(2, 35, (3, 6), generator=generator(1))
    source[0, 3:], source[1, 5:] = nb14.PAD, nb14.PAD
    at_once, after, looks = model.advance(model.encode(source), tokens)
    assert looks.shape == (3, 6, 7)
    torch.testing.assert_close(looks.sum(-1), torch.ones(3, 6))
    assert (looks * (source == nb14.PAD)[:, None]).abs().max() == 0
    for row, size in ((0, 3), (1, 5), (2, 7)):
        state = model.encode(source[row : row + 1, :size])
        for n in range(0, 6, 2):  # two at a time
            logits, state, weights = model.advance(state, tokens[row : row + 1, n : n + 2])
            torch.testing.assert_close(logits[0], at_once[row, n : n + 2], atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(weights[0], looks[row, n : n + 2, :size], atol=1e-4, rtol=1e-3)
    for part, whole in zip(state, after, strict=True):
        if part.is_floating_point() and part.shape[1:] == whole.shape[1:]:
            torch.testing.assert_close(part[0], whole[2], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", kinds())
def test_later_tokens_do_not_matter(nb14, small, kind):
    model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
    source, tokens = torch.randint(2, 35, (2, 7), generator=generator()), torch.randint(2, 35, (2, 6), generator=generator(1))
    other = tokens.clone()
    other[:, 4:] = 3
    first, second = (model.advance(model.encode(source), part)[0] for part in (tokens, other))
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_contexts_of_the_kinds(nb14, small):
    """What each kind gives the decoder, from the states of one and the same encoder."""
    source, tokens = torch.tensor([[3, 4, 5, 1], [6, 1, 0, 0]]), torch.tensor([[2, 7, 8], [2, 9, 9]])
    model = shaken(nb14.build(replace(small, kind="last"), 0, "cpu"))
    states = [model.encoder(model.embedding(source[n : n + 1, :size]))[0][0] for n, size in ((0, 4), (1, 2))]
    contexts = {
        "last": [0 * part[-1] for part in states],
        "each step": [part[-1] for part in states],
        "uniform": [part.mean(0) for part in states],
    }
    for kind, expected in contexts.items():
        same = nb14.build(replace(small, kind=kind), 0, "cpu").eval()
        same.load_state_dict(model.state_dict())
        logits = same.advance(same.encode(source), tokens)[0]
        for n in range(2):
            context = expected[n].expand(3, -1)
            first = model.first(states[n][-1]).tanh()
            hidden = model.decoder(torch.cat([model.embedding(tokens[n]), context], 1)[None], first[None, None])[0][0]
            mixed = model.output(torch.cat([hidden, context], 1)).tanh()
            torch.testing.assert_close(logits[n], mixed @ model.embedding.weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_contexts_are_chosen_by_the_state_before(nb14, small, kind):
    source, tokens = torch.tensor([[3, 4, 5, 1]]), torch.tensor([[2, 7, 8]])
    model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
    states, last = model.encoder(model.embedding(source))
    hidden = model.first(last[0]).tanh()
    found, _, looks = model.advance(model.encode(source), tokens)
    for n in range(3):
        if kind == "dot":
            weights = (states[0] @ hidden[0] / 4).softmax(0)
        else:
            weights = torch.stack([model.v(torch.tanh(model.W(hidden[0]) + model.U(s)))[0] for s in states[0]]).softmax(0)
        torch.testing.assert_close(looks[0, n], weights)
        context = (weights[:, None] * states[0]).sum(0)
        inputs = torch.cat([model.embedding(tokens[0, n]), context])[None, None]
        hidden = model.decoder(inputs, hidden[None])[1][0]
        mixed = model.output(torch.cat([hidden[0], context])).tanh()
        torch.testing.assert_close(found[0, n], mixed @ model.embedding.weight.T, atol=1e-5, rtol=1e-4)


def test_same_weights_for_all_kinds_but_the_additive(nb14, small):
    sizes = {kind: sum(p.numel() for p in nb14.build(replace(small, kind=kind), 0, "cpu").parameters()) for kind in kinds()}
    assert sizes["last"] == sizes["each step"] == sizes["uniform"] == sizes["dot"]
    assert sizes["additive"] == sizes["last"] + 2 * 16 * 16 + 16


@pytest.mark.parametrize("kind", ["dot", "transformer"])
def test_build_draws_by_its_seed(nb14, small, kind):
    config = replace(small, kind=kind)
    first, again, other = (nb14.build(config, seed, "cpu").state_dict() for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() > 1:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.8 * bound < weight.abs().max() <= bound
            assert not torch.equal(weight, other[name])
        elif "bias" in name:
            assert weight.abs().max() == 0
        else:
            assert torch.equal(weight, torch.ones_like(weight))
    with pytest.raises(ValueError, match="kind is 'lstm': it takes one of last, each step"):
        nb14.build(replace(small, kind="lstm"), 0, "cpu")


def test_shrunk_start_is_the_divided_function(nb14, small):
    config = replace(small, heads=1)
    divided = nb14.build(config, 3, "cpu").eval()
    small_start = nb14.build(replace(config, scaled=False, shrunk=True), 3, "cpu").eval()
    undivided = nb14.build(replace(config, scaled=False), 3, "cpu").eval()
    source, tokens = torch.randint(2, 35, (2, 7), generator=generator()), torch.randint(2, 35, (2, 6), generator=generator(1))
    found = [model.advance(model.encode(source), tokens)[0] for model in (divided, small_start, undivided)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_length_over_the_maximum(nb14, small):
    model = nb14.build(replace(small, longest=5), 0, "cpu")
    with pytest.raises(ValueError, match="6 tokens are more than 5: raise `longest`"):
        model.encode(torch.full((1, 6), 3))
    state = model.encode(torch.full((1, 5), 3))
    _, state, _ = model.advance(state, torch.full((1, 4), 3))
    _, state, _ = model.advance(state, torch.full((1, 1), 3))
    with pytest.raises(ValueError, match="6 tokens are more than 5"):
        model.advance(state, torch.full((1, 1), 3))


# --- strings


def test_strings_by_a_loop(nb14):
    source, target = nb14.strings(1200, 2, 9, generator(1), least=2)
    assert source.shape == (1200, 10)
    assert target.shape == (1200, 12)
    seen = set()
    for string, answer in zip(source.tolist(), target.tolist(), strict=True):
        size = string.index(nb14.END)
        assert 2 <= size <= 9
        assert set(string[size + 1 :]) <= {nb14.PAD}
        symbols = string[:size]
        assert all(nb14.SYMBOL <= symbol < nb14.SYMBOL + nb14.SYMBOLS for symbol in symbols)
        end = answer.index(nb14.END)
        assert set(answer[end + 1 :]) <= {nb14.PAD}
        assert answer[1] == nb14.GO
        if answer[0] == nb14.COPY:
            assert answer[2:end] == symbols
        elif answer[0] == nb14.REVERSE:
            assert answer[2:end] == symbols[::-1]
        else:
            assert answer[2:end] == [symbols[answer[0] - nb14.INDEX]]
        seen.add((min(answer[0], nb14.INDEX), size))
    assert len(seen) == 3 * 8
    assert int(max(source.max(), target.max())) < nb14.Config().vocabulary


def test_strings_of_one_task_and_length(nb14):
    for name, first in zip(nb14.TASKS, (nb14.COPY, nb14.REVERSE, nb14.INDEX), strict=True):
        source, target = nb14.strings(300, 30, 30, generator(), name)
        assert (source[:, 30] == nb14.END).all()
        if name == "recall":
            asked = target[:, 0] - nb14.INDEX
            assert sorted(set(asked.tolist())) == list(range(30))
            assert torch.equal(target[:, 2], source.gather(1, asked[:, None])[:, 0])
        else:
            assert (target[:, 0] == first).all()
    kinds = nb14.strings(4000, 5, 5, generator(2))[1][:, 0].clamp(max=nb14.INDEX)
    shares = [float((kinds == first).float().mean()) for first in (nb14.COPY, nb14.REVERSE, nb14.INDEX)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    same = [nb14.strings(5, 1, 6, generator(3)) for _ in range(2)]
    assert torch.equal(same[0][0], same[1][0])
    assert torch.equal(same[0][1], same[1][1])


# --- sentences


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (85, "eighty five"),
        (100, "one hundred"),
        (319, "three hundred nineteen"),
        (1000, "one thousand"),
        (70_021, "seventy thousand twenty one"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_numbers_in_words(nb14, n, words):
    assert nb14.spelled(n) == words


def test_numbers_are_different(nb14):
    parts = nb14.numbers((60, 10, 10), 3)
    assert [len(part) for part in parts] == [60, 10, 10]
    pairs = [pair for part in parts for pair in part]
    assert len(set(pairs)) == 80
    assert all(words == nb14.spelled(int(digits.replace(" ", ""))) for words, digits in pairs)
    assert parts == nb14.numbers((60, 10, 10), 3)
    assert parts != nb14.numbers((60, 10, 10), 4)


def test_sentences_are_stripped_pairs_or_none(nb14, monkeypatch, tmp_path):
    import gzip

    written = {"val.de": "Ein Mann. \nÜber\n", "val.en": "A man.\n Over\n"}
    asked = []

    def fetch(name, urls, sha256):
        asked.append((name, urls, sha256))
        path = tmp_path / name.replace("/", "_")
        path.write_bytes(gzip.compress(written[name.split("/")[1][:-3]].encode()))
        return path

    monkeypatch.setitem(nb14.sentences.__globals__, "fetch", fetch)
    assert nb14.sentences("val") == [("Ein Mann.", "A man."), ("Über", "Over")]
    assert asked[0] == ("multi30k/val.de.gz", [f"{nb14.MULTI30K}/val.de.gz"], nb14.DIGESTS["val.de"])
    written["val.en"] = "A man.\n"
    with pytest.raises(ValueError, match="zip"):
        nb14.sentences("val")
    monkeypatch.setitem(nb14.sentences.__globals__, "fetch", lambda *_: None)
    assert nb14.sentences("val") is None


@pytest.fixture
def pieces(nb14):
    lines = [nb14.spelled(n) for n in range(0, 2000, 7)] + [" ".join(str(n)) for n in range(0, 2000, 7)]
    return nb14.learn_pieces(lines, 60)


def test_pieces_close_and_open(nb14, pieces):
    pairs = [("seventy one", "7 1"), ("two", "2"), ("", "")]
    source, target = nb14.padded(pieces, pairs, "cpu")
    for row, (line, _) in zip(source.tolist(), pairs, strict=True):
        size = row.index(nb14.END)
        assert pieces.decode(row[:size]) == line
        assert set(row[size + 1 :]) <= {nb14.PAD}
    assert (target[:, 0] == nb14.GO).all()
    assert nb14.text_of(pieces, target[:, 1:].tolist()) == ["7 1", "2", ""]
    assert nb14.text_of(pieces, [pieces.encode("7 1")]) == ["7 1"]  # without an end
    assert pieces.pad_id() == nb14.PAD
    assert pieces.eos_id() == nb14.END
    assert pieces.encode("é")[-1] == 3  # unknown, no error


def test_bundles_hold_each_pair_once_by_length(nb14, pieces):
    pairs = [(nb14.spelled(n), " ".join(str(n))) for n in range(0, 900, 37)]
    batches = nb14.bundles(pieces, pairs, 4, "cpu")
    assert [len(source) for source, _ in batches] == [4] * 6 + [1]
    lines = [line for source, _ in batches for line in nb14.text_of(pieces, source.tolist())]
    assert sorted(lines) == sorted(words for words, _ in pairs)
    widths = [source.shape[1] for source, _ in batches]
    assert widths == sorted(widths)
    draws = generator()
    assert {id(nb14.pick(batches, draws)) for _ in range(200)} == {id(batch) for batch in batches}


# --- training


def test_loss_is_of_tokens_after_the_first(nb14, small):
    source, target = nb14.strings(5, 2, 6, generator(1))
    model = shaken(nb14.build(replace(small, kind="dot"), 0, "cpu"))
    logits = model.advance(model.encode(source), target[:, :-1])[0].log_softmax(-1)
    parts = [-logits[n, t, target[n, t + 1]] for n in range(5) for t in range(8) if target[n, t + 1] != nb14.PAD]
    assert float(nb14.cross_entropy(model, source, target)) == pytest.approx(float(torch.stack(parts).mean()), abs=1e-5)


def test_training_by_a_loop_of_its_own(nb14, small):
    config = replace(small, kind="additive", dropout=0.2, learning_rate=0.01, warm_up=0.5)
    batch = functools.partial(nb14.strings, 4, 1, 5)
    asked = []

    def judge(model):
        assert not model.training
        asked.append(float(sum(p.abs().sum() for p in model.parameters())))
        return {"size": asked[-1]}

    weights, log = nb14.train(config, batch, judge, 7, "cpu", 3)
    model, draws = nb14.build(config, 7, "cpu"), generator(7)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(1, 7):
        source, target = batch(draws)
        loss = nb14.cross_entropy(model.train(), source, target)
        share = min(step / 7 / 0.5, (1 - step / 7) / 0.5)
        optimiser.param_groups[0]["lr"] = 0.01 * share
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight)
    assert log["step"] == [2, 4, 6]
    assert log["size"] == asked
    assert log["seconds"] == sorted(log["seconds"])


def test_gradients_are_clipped(nb14, small, monkeypatch):
    limits = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, limit: limits.append((len(list(parameters)), limit)))
    config = replace(small, kind="dot", steps=2)
    nb14.train(config, functools.partial(nb14.strings, 4, 1, 5), lambda model: {}, 7, "cpu")
    assert limits == [(len(list(nb14.build(config, 0, "cpu").parameters())), 1.0)] * 2


def test_a_network_learns_to_copy(nb14):
    config = nb14.Config(kind="additive", width=32, batch_size=32, steps=400, learning_rate=0.01)
    tests = {"copy": nb14.strings(50, 3, 3, generator(9), "copy")}
    batch = functools.partial(nb14.strings, 32, 1, 3, task="copy")
    _, log = nb14.train(config, batch, functools.partial(nb14.judge_strings, tests), 0, "cpu", 2)
    assert log["copy"][-1] > 90


def test_schedule_rises_and_falls(nb14):
    assert nb14.schedule(0, 0.1) == 0
    assert nb14.schedule(0.05, 0.1) == pytest.approx(0.5)
    assert nb14.schedule(0.1, 0.1) == pytest.approx(1)
    assert nb14.schedule(0.55, 0.1) == pytest.approx(0.5)
    assert nb14.schedule(1, 0.1) == 0


class Table(nn.Module):
    """Scores of the next token by the last one only: (V, V) logits; a state that counts."""

    def __init__(self, table):
        super().__init__()
        self.embedding = nn.Embedding(*table.shape)
        self.table = table
        self.calls = []

    def encode(self, source):
        return [source.sum(1, keepdim=True)]

    def advance(self, state, tokens):
        self.calls.append(tokens.shape)
        return self.table[tokens] + 0 * state[0][..., None], [state[0] + tokens.shape[1]], None


def test_greedy_takes_the_best_and_stops(nb14):
    table = torch.full((6, 6), -5.0)
    table[2, 3], table[3, 4], table[4, nb14.END], table[5, 5] = 1, 1, 1, 1
    table[nb14.END, 3] = table[nb14.PAD, 3] = 9
    found = nb14.greedy(Table(table), torch.tensor([[3], [3], [3]]), torch.tensor([2, 4, 5]), 5)
    assert found.tolist() == [[3, 4, 1, 0, 0], [1, 0, 0, 0, 0], [5, 5, 5, 5, 5]]


@pytest.mark.parametrize("kind", ["dot", "transformer"])
def test_greedy_is_uncached_writing(nb14, small, kind):
    model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
    source, start = nb14.strings(6, 2, 7, generator(2))[0], torch.full((6,), nb14.GO)
    found, plain = nb14.greedy(model, source, start, 8), nb14.without_cache(model, source, start, 8)
    for row, other in zip(found.tolist(), plain.tolist(), strict=True):
        size = other.index(nb14.END) + 1 if nb14.END in other else 8
        assert row[:size] == other[:size]
        assert set(row[size:]) <= {nb14.PAD}


def test_answers_are_teacher_forced_or_free(nb14, small):
    source, target = nb14.strings(6, 2, 7, generator(2))
    model = shaken(nb14.build(replace(small, kind="dot"), 0, "cpu"))
    logits = model.advance(model.encode(source), target[:, :-1])[0]
    forced = logits.argmax(-1)
    only_symbols = logits.clone()
    only_symbols[..., : nb14.SYMBOL] = -math.inf
    assert torch.equal(nb14.answers(model, source, target, False), only_symbols.argmax(-1))
    assert not torch.equal(only_symbols.argmax(-1), forced)
    free = nb14.greedy(model, source, target[:, 0], target.shape[1] - 1)
    assert torch.equal(nb14.answers(model, source, target, True), free)
    right = [forced[n, t] == target[n, t + 1] for n in range(6) for t in range(9) if target[n, t + 1] >= nb14.SYMBOL]
    expected = 100 * float(torch.stack(right).float().mean())
    assert nb14.judge_strings({"any": (source, target)}, model)["any"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [([[3, 75]], "3 to 75: there are 0 to 74"), ([[-1, 3]], "-1 to 3"), ([[0, 3]], "empty"), ([[], []], "empty")],
)
def test_tokens_that_are_none(nb14, small, tokens, said):
    model = nb14.build(replace(small, kind="dot"), 0, "cpu")
    with pytest.raises(ValueError, match=said):
        nb14.greedy(model, torch.tensor(tokens, dtype=torch.long), torch.full((len(tokens),), 2), 3)


# --- beam search


def enumerated(table, start, end, most, penalty):
    """(score, tokens) of the best of all sequences, scored one by one."""
    size, best = len(table), (-math.inf, None)
    for count in range(1, most + 1):
        for tokens in itertools.product(range(size), repeat=count):
            ended = tokens[-1] == end
            if end in tokens[:-1] or (not ended and count < most):
                continue
            chain = [start, *tokens]
            score = sum(float(table[a, b]) for a, b in itertools.pairwise(chain)) / ((5 + count) / 6) ** penalty
            best = max(best, (score, list(tokens[:-1] if ended else tokens)))
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_wide_beams_find_the_best_of_all(nb14, penalty, seed):
    table = normal(4, 4, seed=seed).log_softmax(1).float()
    score, tokens = enumerated(table, 2, 1, 4, penalty)
    found = nb14.beam_search(lambda begun, parents: table[begun[:, -1]], 2, 1, 400, 4, penalty)
    assert found[0] == tokens
    assert found[1] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["additive", "transformer"])
def test_beam_of_one_is_greedy(nb14, small, kind):
    model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
    source = nb14.strings(8, 2, 7, generator(2))[0]
    rows = nb14.greedy(model, source, torch.full((8,), nb14.GO), 9).tolist()
    for row, one in zip(rows, source, strict=True):
        wanted = row[: row.index(nb14.END)] if nb14.END in row else row
        step = nb14.next_of(model, one[one != nb14.PAD][None])
        assert nb14.beam_search(step, nb14.GO, nb14.END, 1, 9)[0] == wanted


@pytest.mark.parametrize("kind", ["additive", "uniform", "transformer"])
def test_beams_carry_their_own_caches(nb14, small, kind):
    model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
    source = nb14.strings(1, 6, 6, generator(4))[0]

    def uncached(begun, parents):
        rows = source.expand(len(begun), -1)
        with torch.no_grad():
            return model.advance(model.encode(rows), begun)[0][:, -1].log_softmax(1)

    expected = nb14.beam_search(uncached, nb14.GO, nb14.END, 4, 7)
    found = nb14.beam_search(nb14.next_of(model, source), nb14.GO, nb14.END, 4, 7)
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=1e-4)


def test_beams_that_end_at_once_or_never(nb14):
    table = torch.full((3, 3), -math.inf)
    table[2, 1] = 0.0
    assert nb14.beam_search(lambda begun, parents: table[begun[:, -1]], 2, 1, 3, 5) == ([], 0.0)
    table = torch.full((3, 3), -math.inf)
    table[:, 0] = math.log(0.5)
    tokens, score = nb14.beam_search(lambda begun, parents: table[begun[:, -1]], 2, 1, 2, 3, 0.0)
    assert tokens == [0, 0, 0]
    assert score == pytest.approx(3 * math.log(0.5))
    for width, length, penalty in ((0, 3, 0.6), (2, 0, 0.6), (2, 3, -1.0)):
        with pytest.raises(ValueError, match="too small"):
            nb14.beam_search(lambda begun, parents: table, 2, 1, width, length, penalty)


def test_beams_of_sentences(nb14, small):
    config = replace(small, kind="dot")
    model = nb14.build(config, 0, "cpu").eval()
    source = nb14.strings(3, 2, 5, generator(2))[0]
    found = nb14.beamed(model.state_dict(), config, source, 2, 0.6, "cpu", 9)
    for row, tokens in zip(source, found, strict=True):
        assert tokens == nb14.beam_search(nb14.next_of(model, row[row != nb14.PAD][None]), nb14.GO, nb14.END, 2, 9, 0.6)[0]


# --- the study


def test_each_place_is_asked_for_as_often_at_each_length(nb14):
    """Else a recall would be trained more on the first places, or on the newest symbols."""
    source, target = nb14.strings(60_000, 1, 9, generator(5), "recall", least=6, more=2)
    assert source.shape == (60_000, 12)
    lengths = (source == nb14.END).int().argmax(1)
    asked = target[:, 0] - nb14.INDEX
    assert (asked < lengths).all()
    for length in range(6, 12):
        counts = torch.bincount(asked[lengths == length], minlength=length)
        assert int(counts.sum()) / 60_000 == pytest.approx(1 / 6, abs=0.006)
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / length] * length, abs=0.015)
    assert set(lengths.tolist()) == set(range(6, 12))
    copies = nb14.strings(2000, 3, 9, generator(6), "copy", least=6, more=2)[0]
    assert set((copies == nb14.END).int().argmax(1).tolist()) == set(range(3, 10))


def test_logits_of_the_last_tokens_only(nb14, small):
    source, tokens = nb14.strings(3, 4, 6, generator(1))[0], torch.randint(2, 35, (3, 5), generator=generator(2))
    for kind in ("last", "additive", "transformer"):
        model = shaken(nb14.build(replace(small, kind=kind), 0, "cpu"))
        whole, part = (model.advance(model.encode(source), tokens, last=n)[0] for n in (0, 2))
        torch.testing.assert_close(part, whole[:, -2:])


def test_best_rate_is_chosen_by_the_mean_score_of_seeds(nb14, small):
    tried = []
    worse = dict(zip(nb14.RATES, (0.9, 0.5, 1.0), strict=True))  # alone it would choose the second rate
    losses = {("last", 4): dict(zip(nb14.RATES, (0.0, 0.5, 1.0), strict=True)), ("last", 5): worse}
    losses |= {("dot", seed): dict(zip(nb14.RATES, (3.0, 2.0, 1.0), strict=True)) for seed in (4, 5)}

    def fit(config, seed):
        tried.append((config.kind, config.steps, seed))
        return None, {"loss": [9.0, losses[config.kind, seed][config.learning_rate]]}

    arms = {"a": replace(small, kind="dot"), "b": replace(small, kind="last", steps=8)}
    score = lambda log: -log["loss"][-1]
    found = nb14.with_best_rate(arms, fit, score, [4, 5])
    assert {name: config.learning_rate for name, config in found.items()} == {"a": nb14.RATES[2], "b": nb14.RATES[0]}
    assert nb14.with_best_rate(arms, fit, score, [5])["b"].learning_rate == nb14.RATES[1]
    assert found["b"] == replace(arms["b"], learning_rate=nb14.RATES[0])
    half = {("dot", small.steps // 2, seed) for seed in (4, 5)} | {("last", 4, seed) for seed in (4, 5)}
    assert set(tried) == half
    tried.clear()
    assert nb14.with_best_rate(arms, fit, score, [4], (nb14.RATES[1],))["a"].learning_rate == nb14.RATES[1]
    assert len(tried) == 2


def test_accuracy_by_place(nb14, small, monkeypatch):
    """Answers that are wrong at known places."""
    tests = {(name, 4): nb14.strings(60, 4, 4, generator(1), name) for name in nb14.TASKS}

    def answers(model, source, target, free):
        found = target[:, 1:].clone()
        recall = target[0, 0] >= nb14.INDEX
        found[:, 1] = torch.where((target[:, 0] == nb14.INDEX + 2) | (not recall), nb14.PAD, found[:, 1])
        return found if free else target[:, 1:]

    monkeypatch.setitem(nb14.by_place.__globals__, "answers", answers)
    config = replace(small, kind="dot")
    weights = nb14.build(config, 0, "cpu").state_dict()
    found = nb14.by_place(weights, config, tests, "cpu")
    assert all((places == 100).all() for (_, _, free), places in found.items() if free is False)
    assert found["copy", 4, "end"] == found["reverse", 4, "end"] == 100
    assert found["copy", 4, True].tolist() == [0, 100, 100, 100]  # the first that is written
    assert found["reverse", 4, True].tolist() == [100, 100, 100, 0]
    assert found["recall", 4, True].tolist() == [100, 100, 0, 100]


def test_alignment_counts_the_right_places(nb14, small, monkeypatch):
    tests = {(name, 4): nb14.strings(10, 4, 4, generator(1), name) for name in nb14.TASKS}

    class Looking(nn.Module):
        def encode(self, source):
            return source

        def advance(self, state, tokens):
            weights = torch.zeros(len(tokens), tokens.shape[1], 5)
            for n, row in enumerate(tokens.tolist()):
                for place in range(4):
                    weights[n, 1 + place, 3 - place if row[0] == nb14.REVERSE else place] = 1
                if row[0] == nb14.COPY:
                    weights[n, 2] = torch.tensor([0, 0, 0, 0, 1.0])
            return None, None, weights

    monkeypatch.setitem(nb14.aligned.__globals__, "with_weights", lambda *_: Looking())
    assert nb14.aligned(None, small, tests, "cpu") == pytest.approx((75 + 100) / 2)


def test_loss_of_sentences_is_a_mean_over_pieces(nb14, small):
    model = shaken(nb14.build(replace(small, kind="dot"), 0, "cpu"))
    batches = [nb14.strings(4, 2, 6, generator(1)), nb14.strings(3, 5, 5, generator(2))]
    total = count = 0
    for source, target in batches:
        logits = model.advance(model.encode(source), target[:, :-1])[0]
        total += float(F.cross_entropy(logits.transpose(1, 2), target[:, 1:], ignore_index=0, reduction="sum"))
        count += int((target[:, 1:] != 0).sum())
    assert nb14.judge_sentences(batches, model)["loss"] == pytest.approx(total / count, abs=1e-5)


def test_written_is_greedy_in_parts(nb14, small):
    config = replace(small, kind="dot")
    model = nb14.build(config, 0, "cpu").eval()
    source = nb14.strings(250, 2, 5, generator(2))[0]
    found = nb14.written(model.state_dict(), config, source, "cpu", 4)
    assert torch.equal(found, nb14.greedy(model, source, torch.full((250,), nb14.GO), 4))


def test_variance_of_scores_at_the_start(nb14, small):
    source = nb14.strings(50, 10, 10, generator(2))[0]
    config = replace(small, width=64, heads=1)
    plain, scaled = (nb14.score_variance(replace(config, scaled=s), 1, source, "cpu") for s in (False, True))
    assert plain == pytest.approx(64 * scaled, rel=1e-4)
    small_start = nb14.score_variance(replace(config, scaled=False, shrunk=True), 1, source, "cpu")
    assert small_start == pytest.approx(scaled, rel=1e-4)
    model = nb14.build(config, 1, "cpu").eval()
    layer = model.encoder[0]
    x = layer.norms[0](model.embed(source))
    scores = torch.einsum("nid,njd->nij", layer.own.query(x), layer.own.key(x))
    assert plain == pytest.approx(float(scores.var()), rel=1e-4)


def test_a_training_step_leaves_gradients(nb14, small):
    model = nb14.build(replace(small, kind="dot"), 0, "cpu")
    source, target = nb14.strings(4, 2, 6, generator(1))
    nb14.training_step(model, source, target)
    first = [p.grad.clone() for p in model.parameters()]
    nb14.training_step(model, source, target)
    for before, weight in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(before, weight.grad)
    assert np.isfinite(sum(float(g.abs().sum()) for g in first))
