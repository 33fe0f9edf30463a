# @title Measuring time and memory
# canon: measure
import os
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def seconds_in_turns(cases, rounds, device):
    """{name: median seconds} of `cases`, {name: function without arguments}, over `rounds` in which they take turns.

    A first round warms up. What else the machine does at the time hits all cases alike.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            wait()
            start = time.perf_counter()
            case()
            wait()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def memory_events(case):
    """(seconds, bytes in tensors on the CPU) after each allocation and release of PyTorch's while `case` runs, both (N,)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's log complains where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = case()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    start = min((event.start_ns() for event in events), default=0)
    del result
    seconds = np.array([moment - start for moment, _ in changes]) / 1e9
    return seconds, np.cumsum([size for _, size in changes])


def peak_memory(case, device):
    """Largest number of bytes in tensors that `case`, a function without arguments, held at once; its inputs do not count."""
    if torch.device(device).type == "cuda":
        case()  # what libraries keep from their first use on is not the case's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        return torch.cuda.max_memory_allocated() - before
    held = memory_events(case)[1]
    return int(held.max()) if held.size else 0
