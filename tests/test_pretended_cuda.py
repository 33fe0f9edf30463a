"""The pretended GPU: what runs on a GPU runs on it, to the CPU's numbers, and what a GPU refuses it refuses."""

import os
import subprocess
import sys

import pytest

from tools import cookbook

WORKS = {
    "is there": "torch.cuda.is_available() and torch.cuda.get_device_capability() == (7, 5)",
    "tensors say where they lie": "x.is_cuda and x.device.type == 'cuda' and x.cpu().device.type == 'cpu' and (x + 1).is_cuda",
    "a number on the CPU may be mixed in": "(x * torch.tensor(2.0)).is_cuda",
    "item and tolist": "x.sum().item() == x.cpu().sum().item() and x.tolist() == x.cpu().tolist()",
    "numpy by way of the CPU": "(x.cpu().numpy() == x.detach().cpu().numpy()).all()",
    "factories": "torch.zeros(2, device='cuda').is_cuda and torch.zeros_like(x).is_cuda and x.new_zeros(2).is_cuda",
    "to another dtype stays there": "x.to(torch.float16).is_cuda and x.half().is_cuda and x.long().is_cuda",
    "modules move": "all(p.is_cuda for p in nn.Linear(2, 2).cuda().parameters())",
    "buffers move": "nn.BatchNorm1d(2).to('cuda').running_mean.is_cuda",
    "several outputs": "all(t.is_cuda for t in x.max(1)) and all(t.is_cuda for t in x.split(1))",
    "indexing by a mask": "x[x > 0].is_cuda and x[:, torch.tensor([0], device='cuda')].is_cuda",
    "cat and stack": "torch.cat([x, x]).is_cuda and torch.stack([x, x]).is_cuda",
    "attention": "F.scaled_dot_product_attention(q, q, q).is_cuda",
    "convolution": "F.conv2d(torch.rand(1, 3, 8, 8, device='cuda'), torch.rand(4, 3, 3, 3, device='cuda')).is_cuda",
    "a convolution rounds to TF32": "1e-5 < error_of_convolution() < 1e-2",
    "a convolution is exact if asked": "exactly(error_of_convolution) < 1e-5",
    "the slope of a rounded convolution": "torch.equal(slope_of_convolution(), exactly(slope_of_convolution))",
    "a generator of its own device": "torch.randn(3, generator=torch.Generator('cuda').manual_seed(0), device='cuda').is_cuda",
    "deep copies": "all(p.is_cuda for p in copy.deepcopy(nn.Linear(2, 2).cuda()).parameters())",
    "saving and loading": "saved().is_cuda and torch.equal(saved().cpu(), x.cpu())",
    "autocast": "mixed().dtype == torch.float16",
    "the state of autocast": "asked() == (True, torch.float16) and not torch.is_autocast_enabled('cuda')",
    "gradients lie there": "gradient().is_cuda",
    "pinned memory": "torch.rand(2).pin_memory().to('cuda', non_blocking=True).is_cuda",
    "state dicts": "all(v.is_cuda for v in nn.Linear(2, 2).cuda().state_dict().values())",
    "no_grad and inference": "inferred().is_cuda",
    "packed sequences": "packed('cpu').is_cuda and torch.allclose(packed('cpu').cpu(), packed('cpu', where='cpu'), atol=1e-6)",
    "memory is asked for": "torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() >= 0",
}
RAISES = {
    "mixing the devices": ("x + torch.ones(2, 2)", "same device"),
    "a product of both": ("x @ torch.ones(2, 2)", "same device"),
    "a module on the CPU": ("nn.Linear(2, 2)(x)", "same device"),
    "an input on the CPU": ("nn.Linear(2, 2).cuda()(torch.ones(1, 2))", "same device"),
    "a target on the CPU": ("F.cross_entropy(x, torch.tensor([0, 1]))", "same device"),
    "cat of both": ("torch.cat([x, torch.ones(2, 2)])", "same device"),
    "numpy": ("x.numpy()", "Tensor.cpu()"),
    "asarray": ("np.asarray(x)", "Tensor.cpu()"),
    "plotting": ("np.array([x[0], x[1]])", "Tensor.cpu()"),
    "indices on the GPU": ("torch.arange(3)[torch.tensor([0], device='cuda')]", "indices should be"),
    "a generator of the CPU": ("torch.randn(3, generator=torch.Generator(), device='cuda')", "device type for generator"),
    "a generator of the GPU": ("torch.randn(3, generator=torch.Generator('cuda'))", "device type for generator"),
    "a shuffle by a generator of the GPU": ("torch.randperm(3, generator=torch.Generator('cuda'))", "device type for generator"),
    "lengths on the GPU": ("packed('cuda')", "on CPU"),
    "a packed input on the CPU": ("packed('cpu', x=torch.ones(2, 3, 4))", "same device"),
    "a buffer left behind": ("left_behind()(x)", "same device"),
}
SCRIPT = """
import copy, io
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tools import pretended_cuda

def training(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(144, 5)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(6, 3, 8, 8, generator=batches).to(device)
        y = torch.randint(5, (6,), generator=batches).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [value.cpu().tolist() for value in model.state_dict().values()]

def saved():
    file = io.BytesIO()
    torch.save({{"x": x}}, file)
    file.seek(0)
    return torch.load(file, map_location="cuda", weights_only=True)["x"]

def mixed():
    with torch.autocast("cuda", torch.float16):
        return nn.Linear(2, 2).cuda()(x)

def asked():
    with torch.autocast("cuda", torch.float16):
        return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

def gradient():
    layer = nn.Linear(2, 2).cuda()
    layer(x).sum().backward()
    return layer.weight.grad

def packed(lengths_on, x=None, where="cuda"):
    torch.manual_seed(0)
    encoder = nn.GRU(4, 5, batch_first=True).to(where)
    x = torch.ones(2, 3, 4, device=where) if x is None else x
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([1, 3], device=lengths_on), True, False)
    return nn.utils.rnn.pad_packed_sequence(encoder(packed)[0], True)[0]

def inferred():
    with torch.no_grad(), torch.inference_mode():
        return nn.Linear(2, 2).cuda()(x)

def exactly(compute):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return compute()

def error_of_convolution():
    x, weight = torch.rand(1, 3, 8, 8, device="cuda"), torch.rand(4, 3, 3, 3, device="cuda")
    return (F.conv2d(x, weight) - F.conv2d(x.double(), weight.double())).abs().max().item()

def slope_of_convolution():
    weight = torch.ones(1, 1, 1, 1, device="cuda").requires_grad_()
    F.conv2d(torch.arange(4.0, device="cuda").view(1, 1, 2, 2), weight).sum().backward()
    return weight.grad

def left_behind():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.ones(2, 2)  # no buffer, so it does not move

        def forward(self, x):
            return x + self.shift

    return Shifted().cuda()

on_cpu = training("cpu")
pretended_cuda.install()
x, q = torch.randn(2, 2, device="cuda"), torch.rand(1, 2, 4, 8, device="cuda")
print("training:", exactly(lambda: training("cuda")) == on_cpu)
for name, code in {works}.items():
    try:
        print(name, bool(eval(code)), sep=": ")
    except Exception as error:
        print(name, repr(error)[:200].replace(chr(10), " "), sep=": ")
for name, (code, text) in {raises}.items():
    try:
        eval(code)
        print(name, "did not raise", sep=": ")
    except Exception as error:
        print(name, text in str(error) or str(error)[:200].replace(chr(10), " "), sep=": ")
"""


@pytest.fixture(scope="module")
def said():
    """{what was tried: what came of it}, from one process that has the device."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(works=WORKS, raises=RAISES)], cwd=cookbook.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def test_a_training_gives_the_numbers_of_the_cpu(said):
    assert said["training"] == "True"


@pytest.mark.parametrize("name", WORKS)
def test_works(said, name):
    assert said[name] == "True"


@pytest.mark.parametrize("name", RAISES)
def test_raises(said, name):
    assert said[name] == "True"
