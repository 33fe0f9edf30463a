"""Kernels that are forked from one process which has the libraries in memory: they start in a tenth of a second instead of eight.

Only where a notebook is run once more, for what does not depend on how it was imported; its first run starts a kernel of its own.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = (
    "numpy", "scipy.stats", "scipy.ndimage", "pandas", "sklearn.metrics", "sklearn.model_selection", "torch", "torch._dynamo",
    "torchvision", "matplotlib.pyplot", "tqdm", "IPython", "ipykernel.kernelapp", "matplotlib_inline.backend_inline",
)  # fmt: skip


@contextlib.contextmanager
def forked_kernels(folder):
    """Environment variables with which this process starts its kernels by forking; {} where the system cannot."""
    if not hasattr(os, "pidfd_open"):
        yield {}
        return
    address = folder / "socket"
    with subprocess.Popen([sys.executable, "-P", __file__, "serve", address]) as server:
        try:
            while not address.exists():
                if server.poll() is not None:
                    raise RuntimeError("the process that forks kernels did not start")
                time.sleep(0.05)
            spec = folder / "kernels" / "python3"
            spec.mkdir(parents=True)
            argv = [sys.executable, "-I", "-S", __file__, "ask", str(address), "-f", "{connection_file}"]
            (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "forked", "language": "python"}))
            yield {"JUPYTER_PATH": str(folder)}
        finally:
            server.kill()


def ask(address, *arguments):
    """Stand for a forked kernel: pass signals on to it, end as it ends; it ends when this process does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        wish = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(wish).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(wish)
        kernel = int.from_bytes(server.recv(8), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(kernel, number))
        return int.from_bytes(server.recv(8) or b"\1", "big")


def become_kernel(wish, files):
    """Go on as the kernel that was asked for; does not return."""
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()
    for place, file in enumerate(files):
        os.dup2(file, place)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["ipykernel_launcher", *wish["arguments"], f"--IPKernelApp.parent_handle={os.getppid()}"]
    sys.path.insert(0, "")
    status = 1
    try:
        launch_new_instance()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def begin(asker):
    """Fork a kernel for who asks on the connection; returns its process id."""
    head, files, _, _ = socket.recv_fds(asker, 8, 3)
    size, wish = int.from_bytes(head, "big"), b""
    while len(wish) < size:
        wish += asker.recv(size - len(wish))
    kernel = os.fork()
    if not kernel:
        become_kernel(json.loads(wish), files)
    for file in files:
        os.close(file)
    asker.sendall(kernel.to_bytes(8, "big"))
    return kernel


def serve(address):
    """Import the libraries, then fork kernels until this process is killed."""
    for name in LIBRARIES:
        __import__(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        askers, kernels = {}, {}  # {descriptor: connection}, {descriptor: (process, connection)}
        while True:
            ready, _, _ = select.select([listener, *askers, *kernels], [], [])
            for place in ready:
                if place is listener:
                    asker, _ = listener.accept()
                    kernel = begin(asker)
                    askers[asker.fileno()] = kernel
                    kernels[os.pidfd_open(kernel)] = kernel, asker
                elif place in kernels:
                    kernel, asker = kernels.pop(place)
                    os.close(place)
                    status = os.waitstatus_to_exitcode(os.waitpid(kernel, 0)[1])
                    askers.pop(asker.fileno(), None)
                    with contextlib.suppress(OSError):
                        asker.sendall((status % 256).to_bytes(8, "big"))
                    asker.close()
                elif place in askers:  # who asked is gone
                    os.kill(askers.pop(place), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(*sys.argv[2:]))
    serve(Path(sys.argv[2]).as_posix())
