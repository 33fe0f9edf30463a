"""What the canon cells do, and what they do when things go wrong: packages missing, presets misspelt, disks full, servers hostile or gone."""

import dataclasses
import functools
import gzip
import hashlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from tests.clearml_server import ClearMLServer
from tests.stranger import NOWHERE, environment
from tests.web import serving
from tools import cookbook, sync_canon
from tools.lift import lift

PARAMETERS = 'PRESET = "auto"\nSEED = 0\nCHECKPOINTS = "checkpoints"'
DATA = cookbook.ROOT / "data"


@pytest.fixture(scope="module")
def canon(tmp_path_factory):
    """All canon blocks, lifted from one notebook."""
    path = tmp_path_factory.mktemp("canon") / "98_canon.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *ordered_blocks())]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return lift(path)


def ordered_blocks():
    """The sources of the blocks, `setup` first."""
    blocks = sync_canon.blocks()
    return [blocks.pop("setup"), *blocks.values()]


@pytest.fixture
def preset(monkeypatch):
    """Set the preset by the environment."""
    return lambda name: monkeypatch.setenv("COOKBOOK_PRESET", name)


# --- setup: packages


@pytest.fixture
def pip(monkeypatch):
    """Commands that install() would run; they succeed."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or types.SimpleNamespace(returncode=0))
    return commands


def test_install_on_a_complete_environment_runs_nothing(canon, pip):
    canon.install("torch", "numpy", "clearml==2.1.12", "scikit-learn")
    assert pip == []


def test_install_never_touches_torch_and_numpy(canon, pip):
    """Only what lacks is asked for, and torch, torchvision and numpy in the versions that are there."""
    canon.install("torch", "numpy", "no-such-package==1.0", "tqdm==0.0.1")
    (command,) = pip
    frozen = [f"{name}=={metadata.version(name)}" for name in ("torch", "torchvision", "numpy")]
    assert command == [sys.executable, "-m", "pip", "install", "-q", "no-such-package==1.0", *frozen]


def test_install_on_a_bare_machine_asks_for_everything(canon, pip, monkeypatch):
    monkeypatch.setattr(metadata, "distributions", list)
    canon.install("torch", "tqdm")
    assert pip[0][-2:] == ["torch", "tqdm"]


def test_install_says_what_to_do_when_pip_fails(canon, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: types.SimpleNamespace(returncode=1))
    with pytest.raises(RuntimeError, match=r"could not install .*where there is a network, run: pip install no-such-package==1.0"):
        canon.install("no-such-package==1.0")


# --- setup: presets, seeds, folders


@pytest.mark.parametrize(("cuda", "expected"), [(False, "cpu"), (True, "gpu")])
def test_auto_preset(canon, monkeypatch, cuda, expected):
    monkeypatch.delenv("COOKBOOK_PRESET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert canon.preset_name("auto") == expected
    assert canon.choose(smoke="smoke", cpu="cpu", gpu="gpu") == expected


def test_environment_overrides_the_preset(canon, preset):
    preset("smoke")
    assert canon.preset_name("cpu") == "smoke"
    assert canon.choose(smoke=1, cpu=2, gpu=3) == 1


def test_wrong_presets(canon, monkeypatch, preset):
    preset("fast")
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of: auto, smoke, cpu, gpu"):
        canon.choose(smoke=1, cpu=2, gpu=3)
    monkeypatch.delenv("COOKBOOK_PRESET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs CUDA"):
        canon.preset_name("gpu")


def test_choose_wants_all_three(canon):
    with pytest.raises(TypeError, match="gpu"):
        canon.choose(smoke=1, cpu=2)


@pytest.mark.parametrize("seed", ["3", 3.0, None, -1, 2**32, True])
def test_a_wrong_seed_is_named(canon, seed):
    with pytest.raises(ValueError, match=r"SEED is .*whole number from 0 to 4294966295.*SEED = 0"):
        canon.check_seed(seed)


def test_seeds(canon):
    canon.check_seed(0)
    canon.check_seed(2**32 - 1001)  # a thousand more for the runs after the first
    draws = []
    for _ in range(2):
        canon.seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_a_drive_that_is_not_mounted(canon):
    with pytest.raises(FileNotFoundError, match=r"CHECKPOINTS is /content/drive/MyDrive/x, but Google Drive is not mounted.*drive.mount"):
        canon.expanded("/content/drive/MyDrive/x", "CHECKPOINTS")


def test_the_home_folder_is_expanded(canon, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert canon.expanded("~/checkpoints", "CHECKPOINTS") == Path("/somewhere/checkpoints")
    assert canon.expanded("checkpoints", "CHECKPOINTS") == Path("checkpoints")


def test_note_is_whole_or_not_at_all(canon, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    canon.note("x.json", {"a": "±"})
    assert json.loads(Path("x.json").read_text(encoding="utf-8")) == {"a": "±"}
    (tmp_path / "folder").mkdir()
    canon.note("folder", [1])
    assert "folder is not kept" in capsys.readouterr().out
    assert json.loads(Path("x.json").read_text(encoding="utf-8")) == {"a": "±"}


# --- tracking

SCRIPT = """
import contextlib, logging, os, sys, threading, time, types
from clearml import Task
from clearml.backend_api import Session
from clearml.config import config_obj
{canon}
{before}
task = start_tracking("a test", {{"rate": 0.5}})
for i in range(30):
    task.get_logger().report_scalar("loss", "train", 1 / (i + 1), i)
{between}
finish_tracking(task, patience=3)
print("training goes on", flush=True)
os._exit(0)
"""


def keys_of(url):
    """The environment that names a server."""
    return {"CLEARML_API_ACCESS_KEY": "key", "CLEARML_API_SECRET_KEY": "secret", **hosts_of(url)}


def hosts_of(url):
    return {f"CLEARML_{kind}_HOST": url for kind in ("API", "WEB", "FILES")}


def track(folder, variables, before="", between=""):
    """Output of a process that tracks in `folder`, with these variables in its environment."""
    script = SCRIPT.format(canon=sync_canon.blocks()["tracking"], before=before, between=between)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("training goes on\n"), done.stdout + done.stderr
    return done.stdout


def offline_sessions(folder):
    return list(folder.glob("clearml/offline/*.zip"))


def test_tracking_without_credentials_is_offline(tmp_path):
    output = track(tmp_path, {})
    assert "ClearML goes offline: It seems ClearML is not configured" in output
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_online(tmp_path):
    with ClearMLServer() as server:
        output = track(tmp_path, keys_of(server.url))
    calls = [call for call, _ in server.requests]
    assert "goes offline" not in output
    assert "tasks.completed" in calls
    sent = "".join(body for call, body in server.requests if call == "events.add_batch")
    assert sent.count('"training_stats_scalar"') == 30
    assert '"rate"' in "".join(body for call, body in server.requests if call == "tasks.edit")
    assert offline_sessions(tmp_path) == []


def test_tracking_with_wrong_keys_goes_offline(tmp_path):
    with ClearMLServer(status=401) as server:
        output = track(tmp_path, keys_of(server.url))
    assert "ClearML goes offline: Failed getting token (error 401" in output
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_with_a_closed_server_goes_offline(tmp_path):
    assert "ClearML goes offline" in track(tmp_path, keys_of(NOWHERE))
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_with_a_silent_server_goes_offline(tmp_path):
    """A server that accepts connections and never answers: one time-out, no hang."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "ClearML goes offline" in track(tmp_path, keys_of(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert len(offline_sessions(tmp_path)) == 1


def test_a_server_that_dies_does_not_hold_the_run_up(tmp_path):
    """finish_tracking() gives up after its patience."""
    with ClearMLServer(dies_after="events.add_batch") as server:
        start = time.monotonic()
        late = "time.sleep(2); task.get_logger().report_scalar('loss', 'train', 0, 99)"
        output = track(tmp_path, keys_of(server.url), between=late)
    assert "the server has stopped answering" in output
    assert time.monotonic() - start < 60


def test_a_server_without_a_web_page_is_said(tmp_path):
    """Task.init() would stop there."""
    with ClearMLServer() as server:
        keys = keys_of(server.url)
        del keys["CLEARML_WEB_HOST"]
        output = track(tmp_path, keys)
    assert "ClearML goes offline: Could not detect ClearML web application server" in output


def test_credentials_that_come_later_are_taken_up(tmp_path):
    """Offline first; with keys in the environment online from then on, without a restart; without them offline again."""
    with ClearMLServer() as server:
        again = f"finish_tracking(task)\nos.environ.update({keys_of(server.url)})\ntask = start_tracking('a test', {{'rate': 0.25}})\n"
        again += f"finish_tracking(task)\nfor key in {list(keys_of(server.url))}: del os.environ[key]\n"
        again += "task = start_tracking('a test', {'rate': 0.1})"
        output = track(tmp_path, {}, between=again)
    assert output.count("ClearML goes offline: It seems ClearML is not configured") == 2
    assert [call for call, _ in server.requests].count("tasks.completed") == 1
    assert len(offline_sessions(tmp_path)) == 2


def test_a_configuration_file_that_comes_later_is_taken_up(tmp_path):
    with ClearMLServer() as server:
        servers = ", ".join(f'{kind}_server: "{server.url}"' for kind in ("api", "web", "files"))
        credentials = f'api {{ {servers}, credentials {{ access_key: "key", secret_key: "secret" }} }}'
        path = tmp_path / "clearml.conf"
        again = f"finish_tracking(task)\nopen({str(path)!r}, 'w').write({credentials!r})\ntask = start_tracking('a test', {{}})\n"
        output = track(tmp_path, {"CLEARML_CONFIG_FILE": str(path)}, between=again)
    assert output.count("ClearML goes offline") == 1
    assert "tasks.completed" in [call for call, _ in server.requests]


def test_an_open_task_is_closed_before_the_next_begins(tmp_path):
    """A cell run twice: two tasks, each with its own points."""
    again = "task = start_tracking('a test', {'rate': 0.25})\nlog_curves(task, 'run', {'step': [1, 2], 'loss': [3.0, 4.0]})"
    with ClearMLServer() as server:
        track(tmp_path, keys_of(server.url), between=again)
    calls = [call for call, _ in server.requests]
    assert calls.count("tasks.create") == calls.count("tasks.completed") == 2
    assert calls.index("tasks.completed") < len(calls) - calls[::-1].index("tasks.create") - 1


def test_curves_of_a_resumed_run_are_whole(tmp_path):
    """log_curves() reports every column from an index on."""
    log = {"step": [10, 20, 30], "loss": [3.0, 2.0, 1.0], "score": [0.1, 0.2, 0.3]}
    with ClearMLServer() as server:
        track(tmp_path, keys_of(server.url), between=f"log_curves(task, 'a run', {log})\nlog_curves(task, 'the end', {log}, since=2)")
    sent = [json.loads(line) for call, body in server.requests if call == "events.add_batch" for line in body.splitlines()]
    points = sorted((e["metric"], e["variant"], e["iter"], e["value"]) for e in sent if e.get("variant") in ("a run", "the end"))
    whole = [(name, "a run", step, value) for name in ("loss", "score") for step, value in zip(log["step"], log[name], strict=True)]
    assert points == sorted([*whole, ("loss", "the end", 30, 1.0), ("score", "the end", 30, 0.3)])


COLAB = """
secrets = {secrets}
colab = types.ModuleType("google.colab")
def get(name):
    if name not in secrets:
        raise KeyError(name)
    return secrets[name]
colab.userdata = types.SimpleNamespace(get=get)
sys.modules["google.colab"] = colab
"""


def test_all_of_colabs_secrets(tmp_path):
    with ClearMLServer() as server:
        output = track(tmp_path, {}, before=COLAB.format(secrets=keys_of(server.url)))
    assert "goes offline" not in output


def test_one_of_colabs_secrets_is_not_enough(tmp_path):
    output = track(tmp_path, {}, before=COLAB.format(secrets={"CLEARML_API_ACCESS_KEY": "key"}))
    assert "ClearML goes offline: Colab's secrets lack CLEARML_API_SECRET_KEY" in output


def test_half_of_the_keys_in_the_environment(tmp_path):
    output = track(tmp_path, {"CLEARML_API_SECRET_KEY": "secret"})
    assert "ClearML goes offline: the environment lacks CLEARML_API_ACCESS_KEY" in output


def test_offline_by_wish(tmp_path):
    with ClearMLServer() as server:
        output = track(tmp_path, {**keys_of(server.url), "CLEARML_OFFLINE_MODE": "1"})
    assert "ClearML goes offline: CLEARML_OFFLINE_MODE is set" in output
    assert server.requests == []


# --- fetch

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv("COOKBOOK_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def web():
    """URL of a server: /right sends the content, /wrong a part, /cut too but announces it all, else 404."""
    pages = {"/right": CONTENT, "/wrong": CONTENT[:20], "/cut": CONTENT[:20]}
    with serving(pages, {"/cut": len(CONTENT)}) as (url, _):
        yield url


def test_mirrors_are_tried_in_order_and_checked(canon, folder, preset, web, capsys):
    preset("cpu")
    urls = (f"{NOWHERE}/x", f"{web}/gone", f"{web}/cut", f"{web}/wrong", f"{web}/right")
    assert canon.fetch("a/text.txt", urls, SHA256) == folder / "a" / "text.txt"
    assert (folder / "a" / "text.txt").read_bytes() == CONTENT
    assert capsys.readouterr().out.count("could not download") == 4
    assert canon.fetch("a/text.txt", (), SHA256) == folder / "a" / "text.txt"  # found from now on


def test_nothing_is_left_of_a_wrong_download(canon, folder, preset, web):
    preset("cpu")
    assert canon.fetch("text.txt", (f"{web}/wrong", f"{web}/cut"), SHA256) is None
    assert list(folder.iterdir()) == []


def test_smoke_asks_no_network(canon, folder, preset):
    preset("smoke")
    with serving({"/right": CONTENT}) as (url, asked):
        assert canon.fetch("text.txt", (f"{url}/right",), SHA256) is None
    assert asked == []


def test_a_damaged_file_is_named(canon, folder):
    folder.mkdir()
    (folder / "text.txt").write_bytes(CONTENT[:30])
    with pytest.raises(ValueError, match=r"text.txt is corrupt or incomplete \(30 bytes\): delete it"):
        canon.fetch("text.txt", (), SHA256)


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(canon, folder, preset, web, capsys):
    preset("cpu")
    folder.parent.joinpath("data").touch()
    assert canon.fetch("text.txt", (f"{web}/right",), SHA256) is None
    assert "could not download" in capsys.readouterr().out


def test_a_silent_server_is_left(canon, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        start = time.monotonic()
        assert not canon.download(tmp_path / "x", (url,), SHA256, timeout=0.3)
    assert time.monotonic() - start < 10
    assert socket.getdefaulttimeout() is None


def test_missing_data_say_what_lies_there(canon, folder):
    """COOKBOOK_DATA one level too deep: the reader sees what the folder holds."""
    error = canon.missing("mvtec/bottle", "https://example.org/x")
    assert str(error).endswith(f"there is no folder {folder}")
    assert "save https://example.org/x as" in str(error)
    assert "COOKBOOK_DATA" in str(error)
    for name in ("train", "test", ".hidden"):
        (folder / name).mkdir(parents=True)
    assert str(canon.missing("mvtec/bottle", "https://example.org/x")).endswith(f"{folder} holds test, train")


def test_data_folder(canon, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("COOKBOOK_DATA", "~/data")
    assert canon.data_folder() == Path("/somewhere/data")
    monkeypatch.delenv("COOKBOOK_DATA")
    monkeypatch.chdir(cookbook.ROOT / "tests")
    assert canon.data_folder() == DATA
    monkeypatch.chdir(tmp_path)
    assert canon.data_folder() == Path("data")


# --- images


@pytest.mark.parametrize(
    ("name", "channels", "side", "train"), [("MNIST", 1, 28, 10_000), ("FashionMNIST", 1, 28, 10_000), ("CIFAR10", 3, 32, 5_000)]
)
def test_embedded_images(canon, monkeypatch, preset, capsys, name, channels, side, train):
    preset("smoke")
    monkeypatch.setenv("COOKBOOK_DATA", str(DATA))
    images = canon.load_images(name)
    for split, count in (("train", train), ("test", train // 5)):
        pixels, labels = images[split]
        assert pixels.shape == (count, channels, side, side)
        assert pixels.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [count // 10] * 10
    assert f"EMBEDDED SUBSET of {name}: {train:,} and {train // 5:,} images" in capsys.readouterr().out


def test_embedded_digits_are_those_that_make_data_reads(canon, monkeypatch, preset):
    preset("smoke")
    monkeypatch.setenv("COOKBOOK_DATA", str(DATA))
    raw = gzip.decompress((DATA / "MNIST/raw/t10k-images-idx3-ubyte.gz").read_bytes())
    assert canon.load_images("MNIST")["test"][0].numpy().tobytes() == raw[16:]


def test_plain_files_of_a_full_set(canon, folder, preset):
    """Files without .gz or .xz come first and are read in order."""
    preset("cpu")
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    records = np.arange(6, dtype=np.uint8)[:, None] * np.ones((6, 3073), np.uint8)
    for i, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(records[2 * i : 2 * i + 2].tobytes())
    images = canon.load_images("CIFAR10")
    assert images["train"][1].tolist() == [0, 1, 2, 3]
    assert images["test"][1].tolist() == [4, 5]
    assert (images["train"][0][3] == 3).all()


@pytest.mark.parametrize(
    ("name", "file"), [("MNIST", "MNIST/raw/train-images-idx3-ubyte"), ("CIFAR10", "cifar-10-batches-bin/test_batch.bin")]
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_images_are_named(canon, folder, preset, name, file, packed):
    preset("smoke")
    for suffix in (".gz", ".xz"):
        for path in DATA.glob(f"{file.rpartition('/')[0]}/*{suffix}"):
            target = folder / path.relative_to(DATA)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    path = folder / (file + {"MNIST": ".gz", "CIFAR10": ".xz"}[name] if packed else file)
    path.write_bytes(path.read_bytes()[:1000] if packed else b"\x00\x00\x08\x03" + b"<!DOCTYPE html>" * 300)
    if not packed and name == "CIFAR10":
        (folder / "cifar-10-batches-bin/test_batch.bin.xz").unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is corrupt or incomplete"):
        canon.load_images(name)


def test_a_file_of_something_else_is_no_cifar(canon, tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"\xff" * 3073)
    with pytest.raises(ValueError, match=r"test_batch.bin is no file of CIFAR-10 \(a label of 255\)"):
        canon.cifar_images(tmp_path, train=False)


def test_a_download_that_fails_falls_back_on_the_subset(canon, monkeypatch, preset, capsys):
    preset("cpu")
    monkeypatch.setenv("COOKBOOK_DATA", str(DATA))

    def fail(name, train):
        raise RuntimeError("Error downloading x:\nno network")

    monkeypatch.setattr(canon, "downloaded_images", fail)
    assert len(canon.load_images("MNIST")["train"][1]) == 10_000
    output = capsys.readouterr().out
    assert "could not download MNIST: Error downloading x:" in output
    assert "EMBEDDED SUBSET" in output


def test_no_images_at_all(canon, folder, preset):
    preset("smoke")
    with pytest.raises(FileNotFoundError, match=r"https://\S+.*COOKBOOK_DATA.*there is no folder"):
        canon.load_images("CIFAR10")


# --- checkpoint: the folder


def test_checkpoint_folder_is_made(canon, tmp_path):
    assert canon.checkpoint_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_the_training(canon, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file.*set CHECKPOINTS to a folder that can be written"):
        canon.checkpoint_folder(tmp_path / "file" / "x")


def test_a_full_disk_is_said_before_the_training(canon, tmp_path, monkeypatch):
    monkeypatch.setattr(canon.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=30e6))
    with pytest.raises(OSError, match="has 30 MB left and 200 are wanted"):
        canon.checkpoint_folder(tmp_path)


# --- checkpoint: identity


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    widths: tuple = (1, 2)


def test_identity_follows_settings_and_data(canon):
    x = torch.arange(4.0)
    parts = [
        (Settings(), x, 0), (Settings(rate=0.2), x, 0), (Settings(widths=(1, 3)), x, 0), (Settings(), x, 1), (Settings(), x + 1, 0),
        (Settings(), x.double(), 0), (Settings(), x.view(2, 2), 0), (Settings(), x.numpy(), 0), (Settings(), "text", 0),
        (Settings(), {"a": 1}, 0), (Settings(), {"a": 2}, 0), (Settings(), None, 0), (Settings(), torch.float16, 0), (Settings(), b"text", 0),
        (Settings(), x.bfloat16(), 0), (Settings(), nn.Linear(2, 2), 0), (Settings(), np.float32(1), 0), (Settings(), True, 0), (x, 0),
    ]  # fmt: skip
    assert len({canon.identity(*part) for part in parts}) == len(parts)
    assert canon.identity(*parts[0]) == canon.identity(Settings(), torch.arange(4.0), 0)
    assert canon.identity(nn.Linear(2, 2)) != canon.identity(nn.Linear(2, 2))  # other weights
    assert canon.identity({"a": 1, "b": 2}) == canon.identity({"b": 2, "a": 1})
    assert canon.identity({"a", "b", "c"}) == canon.identity({"c", "b", "a"})


def test_identity_follows_the_preset(canon, preset):
    identities = set()
    for name in ("smoke", "cpu"):
        preset(name)
        identities.add(canon.identity(1))
    assert len(identities) == 2


CODE = {
    "as it was": """
LIMIT = 3

def step(x):
    return x * LIMIT

class Model:
    width = 4

    def forward(self, x):
        return step(x) + self.width

def train(x, rate=0.1):
    model = Model()
    return [model.forward(v) for v in x]
"""
}
CODE |= {
    "the function itself": CODE["as it was"].replace("for v in x]", "for v in x[1:]]"),
    "a default": CODE["as it was"].replace("rate=0.1", "rate=0.2"),
    "a constant": CODE["as it was"].replace("LIMIT = 3", "LIMIT = 4"),
    "a function that it calls by way of a class": CODE["as it was"].replace("x * LIMIT", "x + LIMIT"),
    "a method": CODE["as it was"].replace("+ self.width", "- self.width"),
    "an attribute of the class": CODE["as it was"].replace("width = 4", "width = 5"),
    "a number in a comprehension": CODE["as it was"].replace("model.forward(v)", "model.forward(2 * v)"),
}


def code_identity(canon, source):
    """Identity of `train` in a notebook's namespace."""
    namespace = {"__name__": "__main__of_a_notebook"}
    exec(source, namespace)
    return canon.identity(namespace["train"])


def test_identity_follows_the_code(canon):
    assert len({code_identity(canon, source) for source in CODE.values()}) == len(CODE)


def test_identity_ignores_comments_and_docstrings(canon):
    commented = CODE["as it was"].replace("def step(x):\n", 'def step(x):\n    """Three times."""\n    # thrice\n')
    commented = commented.replace("def train(x, rate=0.1):\n", 'def train(x, rate=0.1):\n    """Trains."""\n')
    assert code_identity(canon, commented) == code_identity(canon, CODE["as it was"])
    assert code_identity(canon, "def other():\n    return 5\n" + CODE["as it was"]) == code_identity(canon, CODE["as it was"])


def test_identity_is_the_same_in_another_process():
    """Sets and strings hash differently there."""
    source = 'def train(x):\n    return x in {"a", "b", "c"} and x in KNOWN\nKNOWN = {"d", "e", "f"}'
    checkpoint = sync_canon.blocks()["checkpoint"].rpartition("\n\n\n")[0]
    script = f"PRESET = 'cpu'\npreset_name = lambda name: 'cpu'\n{checkpoint}\n{source}\nprint(identity(train, {{'x', 'y', 'z'}}))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", f"exec({script!r})"], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    (output,) = outputs
    assert len(output.strip()) == 16


def test_identity_takes_captured_values_and_partials(canon):
    namespace = {"__name__": "a notebook"}
    exec("def captured(value):\n    return lambda x: x + value", namespace)
    captured = namespace["captured"]
    assert canon.identity(captured(1)) != canon.identity(captured(2))
    assert canon.identity(captured(1)) == canon.identity(captured(1))
    assert canon.identity(functools.partial(max, 1)) != canon.identity(functools.partial(max, 2))
    assert canon.identity(torch.relu) != canon.identity(torch.tanh)
    assert canon.identity(nn.ReLU) != canon.identity(nn.GELU)


def test_what_measures_memory_has_an_identity(canon):
    """It uses compiled classes, whose modules nobody has imported."""
    assert canon.identity(canon.peak_memory) != canon.identity(canon.memory_events)


def test_recursive_code_has_an_identity(canon):
    source = "def train(n):\n    return n and other(n - 1)\ndef other(n):\n    return train(n)"
    assert code_identity(canon, source) != code_identity(canon, source.replace("n - 1", "n - 2"))


def test_what_has_no_fingerprint_is_named(canon):
    with pytest.raises(TypeError, match="generator has no fingerprint: hand over its settings"):
        canon.identity(x for x in "abc")


# --- checkpoint: saving and resuming


def parts_of_a_run():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return {
        "model": model, "optimizer": optimizer, "schedule": schedule, "scaler": torch.amp.GradScaler("cpu"),
        "batches": torch.Generator().manual_seed(3), "draws": np.random.default_rng(4),
    }  # fmt: skip


def run(canon, path, steps, stop=None):
    """A training whose every source of randomness counts; returns its log and weights."""
    parts = parts_of_a_run()
    checkpoint = canon.Checkpoint(path, "run", steps, every=0)
    log = checkpoint.load(**parts) or {"step": [], "loss": []}
    for step in range(len(log["step"]), steps):
        if step == stop:
            raise KeyboardInterrupt
        shift = parts["draws"].normal() + random.random() + np.random.rand()  # noqa: NPY002
        x = torch.randn(8, 3, generator=parts["batches"]) + shift
        loss = parts["model"](x).square().mean()
        parts["optimizer"].zero_grad()
        parts["scaler"].scale(loss).backward()
        parts["scaler"].step(parts["optimizer"])
        parts["scaler"].update()
        parts["schedule"].step()
        log["step"].append(step)
        log["loss"].append(loss.item())
        if checkpoint.due():
            checkpoint.save(log, **parts)
    return log, [parameter.detach().clone() for parameter in parts["model"].parameters()]


def test_an_interrupted_run_reaches_the_same_numbers(canon, tmp_path):
    canon.seed_everything(5)
    log, weights = run(canon, None, 12)
    canon.seed_everything(5)
    with pytest.raises(KeyboardInterrupt):
        run(canon, tmp_path, 12, stop=7)
    canon.seed_everything(99)  # a restarted notebook is elsewhere
    resumed_log, resumed_weights = run(canon, tmp_path, 12)
    assert resumed_log == log
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
    assert run(canon, tmp_path, 12)[0] == log  # finished: nothing left to do


def test_checkpoints_hold_plain_data_and_leave_no_other_file(canon, tmp_path):
    run(canon, tmp_path, 3)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("run-")
    assert torch.load(path, weights_only=True)["log"]["step"] == [0, 1, 2]


def test_a_kill_while_saving_leaves_the_checkpoint_before(canon, tmp_path, monkeypatch):
    run(canon, tmp_path, 3)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def torn(value, target):
        Path(target).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        canon.write_whole({"x": 1}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_does_not_stop_the_run(canon, tmp_path, monkeypatch, capsys):
    def full(value, target):
        Path(target).write_bytes(b"half a file")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    log, _ = run(canon, tmp_path, 2)
    assert len(log["step"]) == 2
    assert "is not kept ([enforce fail" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert canon.remembered(tmp_path, "x", abs, -3) == 3


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_a_damaged_checkpoint_is_named(canon, tmp_path, content):
    run(canon, tmp_path, 3)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: delete it to begin anew"):
        run(canon, tmp_path, 3)


def test_a_checkpoint_of_another_model_is_named(canon, tmp_path):
    checkpoint = canon.Checkpoint(tmp_path, "run", 1)
    checkpoint.save({}, model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="damaged or not of this model"):
        checkpoint.load(model=nn.Linear(2, 3))
    with pytest.raises(ValueError, match="damaged or not of this model"):
        checkpoint.load(other=nn.Linear(2, 2))
    torch.save({"weights": torch.zeros(3)}, checkpoint.path)
    with pytest.raises(ValueError, match="damaged or not of this model"):
        checkpoint.load(model=nn.Linear(2, 2))


def test_a_checkpoint_is_replaced_at_once(canon, tmp_path):
    """Who has the one before open still reads it whole."""
    canon.write_whole([1], tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    with (tmp_path / "x.pt").open("rb") as file:
        canon.write_whole([1, 2], tmp_path / "x.pt")
        assert file.read() == before
    assert canon.read_whole(tmp_path / "x.pt") == [1, 2]


def test_two_processes_do_not_share_a_temporary_file(canon, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(torch, "save", lambda value, target: names.append(target.name) or target.touch())
    canon.write_whole(1, tmp_path / "x.pt")
    monkeypatch.setattr(canon.os, "getpid", lambda: 12345)
    canon.write_whole(1, tmp_path / "x.pt")
    assert len(set(names)) == 2


def test_without_a_folder_nothing_is_kept(canon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = canon.Checkpoint(None, "run", 1, every=0)
    checkpoint.save({})
    assert not checkpoint.due()
    assert checkpoint.load() is None
    assert canon.remembered(None, "x", abs, -3) == 3
    assert list(tmp_path.iterdir()) == []


def test_when_a_checkpoint_is_due(canon, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(canon.time, "monotonic", lambda: now[0])
    checkpoint = canon.Checkpoint(tmp_path, "run", 1, every=60)
    now[0] = 159.0
    assert not checkpoint.due()
    now[0] = 160.0
    assert checkpoint.due()
    checkpoint.save({})
    assert not checkpoint.due()


def test_what_was_computed_is_remembered(canon, tmp_path):
    namespace = {"__name__": "a notebook"}
    exec("def double(x, factor=2):\n    return {'value': factor * x, 'curve': [0.5, 0.25]}", namespace)
    first = canon.remembered(tmp_path, "double", namespace["double"], 3)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert canon.remembered(tmp_path, "double", namespace["double"], 3) == first == {"value": 6, "curve": [0.5, 0.25]}
    assert path.stat().st_mtime_ns == stamp
    assert canon.remembered(tmp_path, "double", namespace["double"], 4)["value"] == 8
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"damaged: delete it"):
        canon.remembered(tmp_path, "double", namespace["double"], 3)


# --- report


def test_summaries(canon):
    mean, std = canon.mean_std([1.0, 2.0, 4.0])
    assert (mean, std) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert canon.summary([1000.0, 2000.0], 1) == "1,500.0 ± 707.1"
    curves = np.arange(6.0).reshape(2, 3)
    assert np.allclose(canon.mean_std(curves)[1], curves.std(0, ddof=1))


def test_one_seed_claims_no_spread(canon):
    assert canon.summary([0.5]) == "0.500"
    assert np.isnan(canon.mean_std([5.0])[1])


def test_paired_interval(canon):
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    mean, low, high = canon.paired_interval(first, second)
    assert mean == pytest.approx((first - second).mean())
    assert (low, high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert canon.paired_interval([1.0], [0.5]) == (0.5, -math.inf, math.inf)


def test_band(canon):
    _, axes = plt.subplots()
    curves = np.array([[1.0, 2.0], [3.0, 6.0]])
    line = canon.band(axes, [0, 1], curves, "a", "black", "s")
    assert line.get_ydata().tolist() == [2.0, 4.0]
    assert line.get_marker() == "s"
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(2 - math.sqrt(2))
    assert edges.max() == pytest.approx(4 + 2 * math.sqrt(2))
    canon.band(axes, [0, 1], curves[:1], "b", "black")
    assert len(axes.collections) == 1  # one seed has no band
    plt.close("all")


def test_text_in_cells_is_seen(canon):
    _, axes = plt.subplots()
    image = axes.imshow([[0.0, 1.0]], cmap="viridis")
    canon.write_cells(axes, image, [["dark", "light"]])
    colors = {text.get_text(): (text.get_color(), text.get_position()) for text in axes.texts}
    assert colors == {"dark": ("white", (0, 0)), "light": ("black", (1, 0))}
    plt.close("all")


class Task:
    """Stands for a ClearML task."""

    def __init__(self):
        self.figures, self.tables = [], []

    def get_logger(self):
        return self

    def report_matplotlib_figure(self, title, series, figure, report_interactive):
        self.figures.append(series)

    def report_table(self, title, series, table_plot):
        self.tables.append((series, table_plot))


@pytest.fixture
def shown(canon, monkeypatch):
    """What display() got."""
    displayed = []
    monkeypatch.setattr(canon, "display", lambda value, raw=False: displayed.append(value))
    return displayed


@pytest.mark.parametrize(("name", "texts"), [("cpu", 0), ("smoke", 1)])
def test_show(canon, shown, preset, name, texts):
    """PNG at 150 dpi with what a reader must know of it; ClearML gets it; smoke's says that it means nothing."""
    preset(name)
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.set_title("large", fontsize=14)
    axes.text(0, 0, "small", fontsize=8.5)
    axes.text(0, 0, "hidden", fontsize=2, visible=False)
    task = Task()
    canon.show(figure, "a figure", "a description", task)
    (image,) = shown
    _, facts = image._repr_png_()
    assert facts == {"alt": "a description", "width": 400, "inches": 4.0, "smallest_text": 8.5}
    assert int.from_bytes(image.data[16:20], "big") == 600
    assert task.figures == ["a figure"]
    assert len(figure.texts) == texts
    assert not plt.fignum_exists(figure.number)


def test_results(canon, shown, preset, tmp_path, monkeypatch, capsys):
    preset("cpu")
    monkeypatch.chdir(tmp_path)
    results, task = canon.Results(), Task()
    results.add("accuracy", [0.1], "", "higher")
    results.add("accuracy", [0.25, 0.75], "", "higher", "0.9 in the paper, full data")  # the cell run again
    results.add("time", 3, "s", "lower")
    results.add("diverged", [1.0, math.nan], "", "lower")
    assert results.summary("accuracy", 2) == "0.50 ± 0.35"
    results.conclude(task, "It reaches 0.50.", "0.50")
    records = json.loads(Path("results.json").read_text())
    assert [record["name"] for record in records] == ["accuracy", "time", "diverged"]
    assert records[0] == {
        "name": "accuracy",
        "values": [0.25, 0.75],
        "unit": "",
        "better": "higher",
        "reference": "0.9 in the paper, full data",
    }
    assert records[2]["values"] == [1.0, None]
    facts = json.loads(Path("run.json").read_text())
    assert facts["headline"] == "It reaches 0.50."
    assert facts["gallery"] == "0.50"
    assert facts["preset"] == "cpu"
    assert "It reaches 0.50." in capsys.readouterr().out
    assert "<td>0.500 ± 0.354</td>" in shown[0]["text/html"]
    ((name, table),) = task.tables
    assert name == "results"
    assert table["mean ± std"].tolist()[:2] == ["0.500 ± 0.354", "3.000"]
    assert table["runs"].tolist() == [2, 1, 2]


def test_smoke_prints_no_headline(canon, shown, preset, tmp_path, monkeypatch, capsys):
    preset("smoke")
    monkeypatch.chdir(tmp_path)
    results = canon.Results()
    results.add("accuracy", [0.1])
    results.conclude(Task(), "It reaches 0.10.")
    assert "0.10" not in capsys.readouterr().out
    assert json.loads(Path("run.json").read_text())["gallery"] == "It reaches 0.10."


def test_wrong_records(canon):
    with pytest.raises(ValueError, match="'higher' or 'lower'"):
        canon.Results().add("x", [1.0], better="more")
    with pytest.raises(ValueError, match="x has no values"):
        canon.Results().add("x", [])


def test_show_table(canon, shown):
    task = Task()
    frame = pd.DataFrame({"a": [1]}, index=pd.Index(["row"], name="name"))
    canon.show_table(frame, "a table", task)
    (table,) = shown
    assert "\n" not in table["text/html"]
    assert "<td>1</td>" in table["text/html"]
    assert table["text/plain"] == frame.to_string()
    assert task.tables[0][1].columns.tolist() == ["name", "a"]


def test_exercises_never_stop_the_run(canon, capsys):
    def unsolved():
        raise NotImplementedError("your turn")

    canon.exercise("1", unsolved)
    canon.exercise("2", lambda: False)
    canon.exercise("3", lambda: True)
    assert capsys.readouterr().out.splitlines() == ["1: not solved yet (NotImplementedError: your turn)", "2: not solved yet", "3: solved"]


# --- measure


def test_peak_memory(canon):
    """Two blocks of a MiB at once, a third after one is gone."""

    def case():
        first, second = torch.empty(2**18), torch.empty(2**18)
        del first
        return second + torch.empty(2**18)[0]

    assert canon.peak_memory(case, "cpu") / 2**20 == pytest.approx(3, abs=0.1)
    assert canon.peak_memory(lambda: None, "cpu") == 0


def test_memory_events(canon):
    seconds, held = canon.memory_events(lambda: [torch.empty(2**18) for _ in range(3)])
    assert (np.diff(seconds) >= 0).all()
    assert (held[:3] / 2**20).tolist() == pytest.approx([1, 2, 3], abs=0.01)


def test_seconds_in_turns(canon):
    """The first turn warms up and does not count; the cases alternate; a slower one is slower."""
    calls = []
    cases = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or time.sleep(0.02)}
    seconds = canon.seconds_in_turns(cases, 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert 0 <= seconds["a"] < 0.02 <= seconds["b"] < 0.2
    pauses = iter([0.3, 0.0])
    assert canon.seconds_in_turns({"a": lambda: time.sleep(next(pauses))}, 1, "cpu")["a"] < 0.2


# --- cores


def test_over_cores_keeps_the_order(canon):
    assert canon.over_cores(lambda n: n * n, range(5), "squares") == [0, 1, 4, 9, 16]


def test_over_cores_passes_an_error_on(canon):
    with pytest.raises(ZeroDivisionError):
        canon.over_cores(lambda n: 1 / n, [1, 0, 2], "inverses")


def test_over_cores_goes_in_turn_on_a_gpu(canon, monkeypatch):
    """Threads would share the device's streams, and nothing would be faster."""
    import threading

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = canon.over_cores(lambda n: threading.current_thread().name, range(3), "names")
    assert names == [threading.current_thread().name] * 3


# --- trials


def test_each_keeps_the_order_of_its_items(canon):
    assert list(canon.each(lambda n: n * n, (3, 1, 2), "squares").items()) == [(3, 9), (1, 1), (2, 4)]


def test_versus_is_a_paired_t_test_in_words(canon):
    first, second = [1.0, 2.0, 4.0], [0.0, 2.0, 2.0]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert canon.versus(first, second, 2) == f"+1.00 [{expected.low:+.2f}, {expected.high:+.2f}]"
    assert canon.versus([1.0, 2.0], [1.0, 3.0], 1) == "-0.5 [-6.9, +5.9]"  # 12.706 deviations of 0.5
    assert canon.versus([1.0, 2.0], [0.5, 1.5]) == "+0.500 [+0.500, +0.500]"
    assert canon.versus(np.array([1.0]), np.array([1.25]), 2) == "-0.25, one seed"


# --- compare


def test_compared_is_a_t_test_over_pictures(canon):
    draws = [torch.Generator().manual_seed(n) for n in (1, 2)]
    first, second = (torch.rand(3, 400, generator=g) < p for g, p in zip(draws, (0.7, 0.6), strict=True))
    mean, low, high, seeds = canon.compared(first, second)
    difference = 100 * (first.double() - second.double()).mean(0).numpy()
    expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((difference.mean(), expected.low, expected.high))
    assert seeds == 3
    assert canon.compared(second, first)[:3] == pytest.approx((-mean, -high, -low))


def test_compared_counts_the_seeds_with_the_sign_of_the_mean(canon):
    ups_and_downs = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert canon.compared(*ups_and_downs)[3] == 2
    assert canon.compared(*ups_and_downs[::-1])[3] == 2
    assert canon.compared(ups_and_downs[0], ups_and_downs[0]) == (0.0, 0.0, 0.0, 3)
