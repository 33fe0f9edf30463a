# @title Finding and downloading data
# canon: fetch
import hashlib
import http.client
import os
import socket
from pathlib import Path

import torch


def data_folder():
    """Where data are looked for: $COOKBOOK_DATA, else the data/ of a clone of the repository, else ./data."""
    if os.environ.get("COOKBOOK_DATA"):
        return expanded(os.environ["COOKBOOK_DATA"], "COOKBOOK_DATA")
    beside = Path("../data")
    return beside.resolve() if (beside / "README.md").exists() else Path("data")


def contents(folder, most=8):
    """What lies in a folder, in words."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {', '.join(names[:most]) or 'nothing'}{more}"


def check_file(path, sha256):
    """ValueError that names the file where its bytes have another sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} is corrupt or incomplete ({path.stat().st_size:,} bytes): delete it, and it is fetched again")


def download(path, urls, sha256, timeout=30):
    """Save what the first working address sends as `path`, if its sha256 is right; True if one did. Says what went wrong."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # torch.hub sets none, and a silent server would hold the notebook for ever
    try:
        for url in urls:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
                return True
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                print(f"could not download {url}: {error}")
    finally:
        socket.setdefaulttimeout(patience)
    return False


def fetch(name, urls, sha256):
    """Path of the file `name` in the data folder: found there, else downloaded; None where neither works.

    The smoke preset asks no network. ValueError where the file is there and its bytes are wrong.
    """
    path = data_folder() / name
    if path.exists():
        check_file(path, sha256)
        return path
    if preset_name(PRESET) == "smoke":
        return None
    return path if download(path, urls, sha256) else None


def missing(name, url):
    """The error to raise where a data set is neither found nor downloaded: what to do, where it was looked for, what lies there."""
    return FileNotFoundError(
        f"{name} was neither found nor downloaded: save {url} as {data_folder() / name}, or point COOKBOOK_DATA to a folder "
        f"that holds {name}; {contents(data_folder())}"
    )
