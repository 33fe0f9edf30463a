"""What the canon cells do when things go wrong: packages missing, presets misspelt, ClearML's server absent, hostile or gone."""

import socket
import subprocess
import sys
import time
import types
from importlib import metadata

import pytest
import torch

from tests import execute
from tests.clearml_server import ClearMLServer
from tools import sync_canon


def canon(name, **namespace):
    """Namespace after executing the definitions of a canon block (what precedes its first top-level statement)."""
    source = sync_canon.blocks()[f"# canon: {name}"]
    exec(source.split("\n\n\nrandom.seed")[0], namespace)
    return types.SimpleNamespace(**namespace)


# --- install


@pytest.fixture
def pip(monkeypatch):
    """Commands that install() would run; they succeed."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or types.SimpleNamespace(returncode=0))
    return commands


def test_install_on_a_complete_environment_runs_nothing(pip, capsys):
    canon("install").install("torch", "numpy", "clearml==2.1.12", "scikit-learn")
    assert pip == []
    assert "nothing" in capsys.readouterr().out


def test_install_never_touches_torch_and_numpy(pip):
    """Only what lacks is asked for, and torch, torchvision and numpy in the versions that are there."""
    canon("install").install("torch", "numpy", "no-such-package==1.0", "tqdm==0.0.1")
    (command,) = pip
    frozen = [f"{name}=={metadata.version(name)}" for name in ("torch", "torchvision", "numpy")]
    assert command == [sys.executable, "-m", "pip", "install", "-q", "no-such-package==1.0", *frozen]


def test_install_on_a_bare_machine_asks_for_everything(pip, monkeypatch):
    monkeypatch.setattr(metadata, "distributions", list)
    canon("install").install("torch", "tqdm")
    assert pip[0][-2:] == ["torch", "tqdm"]


def test_install_says_what_to_do_when_pip_fails(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: types.SimpleNamespace(returncode=1))
    with pytest.raises(RuntimeError, match=r"could not install .*where there is a network, run: pip install no-such-package==1.0"):
        canon("install").install("no-such-package==1.0")


# --- runtime

PRESETS = ("smoke", "cpu", "gpu")


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.delenv("COOKBOOK_PRESET", raising=False)
    import os

    return canon("runtime", os=os, torch=torch).choose_preset


@pytest.mark.parametrize(("cuda", "expected"), [(False, "cpu"), (True, "gpu")])
def test_auto_preset(choose, monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choose("auto", PRESETS) == expected


def test_environment_overrides_the_preset(choose, monkeypatch):
    monkeypatch.setenv("COOKBOOK_PRESET", "smoke")
    assert choose("cpu", PRESETS) == "smoke"


def test_wrong_presets(choose, monkeypatch):
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of: auto, smoke, cpu, gpu"):
        choose("fast", PRESETS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs CUDA"):
        choose("gpu", PRESETS)


# --- tracking

SCRIPT = """
import contextlib, logging, os, sys, threading, time
from clearml import Task
from clearml.backend_api import Session
from clearml.config import config_obj
{canon}
task = start_tracking("a test", {{"rate": 0.5}})
for i in range(30):
    task.get_logger().report_scalar("loss", "train", 1 / (i + 1), i)
{between}
finish_tracking(task, patience=3)
print("training goes on", flush=True)
os._exit(0)
"""


def track(folder, url=None, between=""):
    """Output of a process that tracks against the server at `url` (None: no credentials)."""
    keys = {"CLEARML_API_ACCESS_KEY": "key", "CLEARML_API_SECRET_KEY": "secret"}
    hosts = {f"CLEARML_{kind}_HOST": url for kind in ("API", "WEB", "FILES")}
    script = SCRIPT.format(canon=sync_canon.blocks()["# canon: tracking"], between=between)
    environment = execute.stranger(**({**keys, **hosts} if url else {}))
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("training goes on\n"), done.stdout + done.stderr
    return done.stdout


def offline_sessions(folder):
    return list(folder.glob("clearml/offline/*.zip"))


def test_tracking_without_credentials_is_offline(tmp_path):
    output = track(tmp_path)
    assert "ClearML goes offline: It seems ClearML is not configured" in output
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_online(tmp_path):
    with ClearMLServer() as server:
        output = track(tmp_path, server.url)
    calls = [call for call, _ in server.requests]
    assert "goes offline" not in output
    assert "tasks.completed" in calls
    sent = "".join(body for call, body in server.requests if call == "events.add_batch")
    assert sent.count('"training_stats_scalar"') == 30
    assert '"rate"' in "".join(body for call, body in server.requests if call == "tasks.edit")
    assert offline_sessions(tmp_path) == []


def test_tracking_with_wrong_keys_goes_offline(tmp_path):
    with ClearMLServer(status=401) as server:
        output = track(tmp_path, server.url)
    assert "ClearML goes offline: Failed getting token (error 401" in output
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_with_a_closed_server_goes_offline(tmp_path):
    assert "ClearML goes offline" in track(tmp_path, execute.NOWHERE)
    assert len(offline_sessions(tmp_path)) == 1


def test_tracking_with_a_silent_server_goes_offline(tmp_path):
    """A server that accepts connections and never answers: one time-out, no hang."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "ClearML goes offline" in track(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert len(offline_sessions(tmp_path)) == 1


def test_a_server_that_dies_does_not_hold_the_run_up(tmp_path):
    """finish_tracking() gives up after its patience."""
    with ClearMLServer(dies_after="events.add_batch") as server:
        start = time.monotonic()
        output = track(tmp_path, server.url, between="time.sleep(2); task.get_logger().report_scalar('loss', 'train', 0, 99)")
    assert "the server has stopped answering" in output
    assert time.monotonic() - start < 60
