"""Runs a notebook as a stranger would: alone in a folder, without a network, without credentials."""

import os

import nbclient

from tools import cookbook

NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused at once
NO_NETWORK = {
    "http_proxy": NOWHERE,
    "https_proxy": NOWHERE,
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "no_proxy": "127.0.0.1,localhost",
}


def stranger(**changes):
    """The environment without anything of this repository or of ClearML, without a network, with `changes`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COOKBOOK_", "CLEARML_")) and key != "MPLBACKEND"}
    return {**kept, **NO_NETWORK, "CLEARML_CONFIG_FILE": os.devnull, **changes}


def run(path, folder, **changes):
    """Execute a copy of the notebook in `folder`; returns it, or raises nbclient's CellExecutionError."""
    notebook = cookbook.read(path)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, coalesce_streams=True)
    client.execute(env=stranger(**changes))
    return notebook
