"""Runs a notebook as a stranger would: alone in a folder, without a network, without credentials."""

import os

from tools.execute import execute

NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused at once
NO_NETWORK = {
    "http_proxy": NOWHERE,
    "https_proxy": NOWHERE,
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "no_proxy": "127.0.0.1,localhost",
}


def environment(**changes):
    """The environment without anything of this repository or of ClearML, without a network, with `changes`."""
    foreign = ("COOKBOOK_", "CLEARML_", "MPLBACKEND")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {**kept, **NO_NETWORK, "CLEARML_CONFIG_FILE": os.devnull, **changes}


def run(path, folder, pretended_gpu=False, **changes):
    """Execute a copy of the notebook in `folder`, where its checkpoints stay; returns it.

    Raises RuntimeError that names the failing cell.
    """
    options = {"pretended_gpu": pretended_gpu, "timeout": 600, "keep_checkpoints": True}
    execution = execute(path, folder, environment(**changes), **options)
    if execution.error:
        raise RuntimeError(execution.error)
    return execution.notebook
