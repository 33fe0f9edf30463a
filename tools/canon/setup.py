# @title Setup: packages, seeds, device, plot style
# canon: setup
%matplotlib inline
import json
import os
import platform
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def install(*requirements):
    """Install by pip those of `requirements` ("name" or "name==version") that are absent; what is there keeps its version.

    Colab's PyTorch and NumPy stay as they are, so that no restart is needed. RuntimeError where pip fails.
    """
    present = {(package.name or "").lower(): package.version for package in metadata.distributions()}
    missing = [r for r in requirements if r.partition("==")[0].lower() not in present]
    frozen = [f"{name}=={present[name]}" for name in ("torch", "torchvision", "numpy") if name in present]
    if missing and subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing, *frozen]).returncode:
        raise RuntimeError(f"pip could not install {missing}; where there is a network, run: pip install {' '.join(missing)}")
    if missing:
        print("installed now:", ", ".join(missing))


install("torch", "torchvision", "numpy", "matplotlib", "pandas", "tqdm", "clearml==2.1.12")

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler

PRESETS = ("smoke", "cpu", "gpu")
COLORS = {  # Okabe and Ito's: told apart by colour-blind readers too, and in print
    "blue": "#0072B2", "vermilion": "#D55E00", "green": "#009E73", "orange": "#E69F00", "purple": "#CC79A7", "sky": "#56B4E9",
    "black": "#000000",
}
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))


def preset_name(wanted):
    """The preset: $COOKBOOK_PRESET or `wanted`, where "auto" is gpu with CUDA and cpu without.

    ValueError for another name, RuntimeError for gpu without CUDA.
    """
    name = os.environ.get("COOKBOOK_PRESET") or wanted
    if name == "auto":
        name = "gpu" if torch.cuda.is_available() else "cpu"
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of: auto, {', '.join(PRESETS)}")
    if name == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("preset 'gpu' needs CUDA: on Colab choose Runtime > Change runtime type > GPU, else take preset 'cpu'")
    return name


def choose(*, smoke, cpu, gpu):
    """The value that belongs to the preset of this run."""
    return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[preset_name(PRESET)]


def check_seed(seed):
    """ValueError where SEED is not a whole number that every library takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32 - 1000:
        raise ValueError(f"SEED is {seed!r}: it takes a whole number from 0 to {2**32 - 1001}, without quotes, such as SEED = 0")


def seed_everything(seed):
    """Seed the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def expanded(folder, name):
    """Path of a folder that the parameter `name` gives, ~ expanded; FileNotFoundError on a Drive that is not mounted."""
    path = Path(folder).expanduser()
    drive = Path("/content/drive")
    if path.is_relative_to(drive) and not (drive / "MyDrive").is_dir() and not (drive / "Shareddrives").is_dir():
        raise FileNotFoundError(
            f"{name} is {path}, but Google Drive is not mounted, and what is written there would be lost: "
            "run first: from google.colab import drive; drive.mount('/content/drive')"
        )
    return path


def note(file, value):
    """Write `value` as JSON into the working folder, whole or not at all; a folder that cannot be written is no reason to stop."""
    temporary = Path(f"{file}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        print(f"{file} is not kept, for the folder {Path.cwd().name} cannot be written ({error.strerror})")


def run_facts():
    """Preset, hardware and versions of this run."""
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    return {
        "preset": preset_name(PRESET),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
    }


check_seed(SEED)
seed_everything(SEED)
preset = preset_name(PRESET)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
note("run.json", run_facts())
plt.rcParams.update({
    "figure.figsize": (9, 4), "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 11, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10, "axes.titlesize": 12, "axes.titlelocation": "left",
    "lines.linewidth": 1.8, "legend.frameon": False, "axes.prop_cycle": cycler(color=list(COLORS.values()), linestyle=LINES),
})
print("preset:", preset + (" (a quick look at whether everything runs: its numbers mean nothing)" if preset == "smoke" else ""))
print("device:", run_facts()["device"])
print("versions:", run_facts()["versions"])
