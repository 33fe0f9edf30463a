import functools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.lift import lift
from tools import cookbook

os.environ.setdefault("CLEARML_OFFLINE_MODE", "1")  # no test reports to a server of the person who runs it


@functools.cache
def lifted(number):
    return lift(cookbook.find(number)[0])


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nb01():
    """The definitions of notebook 01."""
    return lifted("01")


@pytest.fixture(scope="session")
def nb03():
    """The definitions of notebook 03."""
    return lifted("03")


@pytest.fixture(scope="session")
def nb04():
    """The definitions of notebook 04."""
    return lifted("04")


@pytest.fixture(scope="session")
def nb06():
    """The definitions of notebook 06."""
    return lifted("06")


@pytest.fixture(scope="session")
def nb07():
    """The definitions of notebook 07."""
    return lifted("07")
