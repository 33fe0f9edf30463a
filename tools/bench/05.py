"""Speed and memory of notebook 05 on this machine: `make bench NB=05`.

    python -m tools.bench.05

Prints pictures a second of a training step in NumPy and in PyTorch for batches of several sizes, and for 128 blocks what each way to
remember holds and takes, at a batch of 256 and of 2,048.
"""

from dataclasses import replace

from tools import cookbook, lift

NB = lift.lift(cookbook.find("05")[0])
WAYS = [("stored",), ("micro-batches", 8), ("micro-batches", 32), ("checkpoints", 8), ("checkpoints", 32), ("reversible",)]


def bench_speed():
    """Against PyTorch on the same threads."""
    for depth in (16, 64):
        for batch in (64, 128, 256, 512, 1024, 2048):
            found = NB.speeds(replace(NB.Config(), depth=depth), batch, 10)
            ratio = found["stored"] / found["PyTorch"]
            rates = ", ".join(f"{name} {rate:8,.0f}" for name, rate in found.items())
            print(
                f"{depth:4} blocks, batch {batch:5}: {rates} pictures/s, ratio {ratio:.2f}",
                flush=True,
            )


def bench_ways():
    """Memory and time of a step."""
    for batch in (256, 2048):
        found = NB.costs(WAYS, replace(NB.Config(), depth=128), batch, 3)
        for way, (memory, seconds) in found.items():
            ratio = seconds / found["stored",][1]
            name = " ".join(map(str, way))
            print(f"128 blocks, batch {batch:5}, {name:18} {memory:7.1f} MiB {1e3 * seconds:8.0f} ms, {ratio:.2f} x stored", flush=True)


if __name__ == "__main__":
    bench_speed()
    bench_ways()
