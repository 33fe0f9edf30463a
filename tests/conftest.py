"""What tests share: `nb06`, the definitions of notebook 06, and so on for every notebook; seeds; threads; kernels that start fast."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores; processes that a test starts inherit it
os.environ.setdefault("CLEARML_OFFLINE_MODE", "1")  # no test reports to a server of the person who runs it

import pytest
import torch

from tests.forked_kernels import forked_kernels
from tools import cookbook
from tools.lift import lift

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forking_process(tmp_path_factory):
    """Environment variables with which kernels are forked."""
    with forked_kernels(tmp_path_factory.mktemp("forked")) as variables:
        yield variables


@pytest.fixture
def forked(forking_process, monkeypatch):
    """Kernels that this test starts are forked from a process that has the libraries in memory."""
    for name, value in forking_process.items():
        monkeypatch.setenv(name, value)


def definitions_of(path):
    """Fixture with the definitions of the notebook at `path`, lifted once in a session."""

    def lifted():
        return lift(path)

    lifted.__doc__ = f"The definitions of notebook {path.name[:2]}."
    return pytest.fixture(scope="session")(lifted)


for notebook in cookbook.find():
    globals()[f"nb{notebook.name[:2]}"] = definitions_of(notebook)
