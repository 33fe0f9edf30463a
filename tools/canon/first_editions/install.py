# canon: install
import subprocess
import sys
from importlib import metadata


def install(*requirements):
    """Install by pip those of `requirements` ("name" or "name==version") that are absent; what is there keeps its version."""
    present = {(dist.name or "").lower(): dist.version for dist in metadata.distributions()}
    missing = [r for r in requirements if r.partition("==")[0].lower() not in present]
    frozen = [f"{name}=={present[name]}" for name in ("torch", "torchvision", "numpy") if name in present]
    if missing and subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing, *frozen]).returncode:
        raise RuntimeError(f"pip could not install {missing}; where there is a network, run: pip install {' '.join(missing)}")
    print("installed now:", ", ".join(missing) or "nothing, all is there")
