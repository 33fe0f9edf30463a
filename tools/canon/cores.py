# @title Running trainings side by side, one on each core
# canon: cores
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm


def over_cores(function, items, name):
    """[function(item), ...]: on a CPU as many at once as there are cores, on a GPU in turn; `name` stands beside the bar.

    Threads share the generators of torch: each training needs one of its own, and torch.set_num_threads(1) a core to itself.
    """
    bar = {"total": len(items), "desc": name, "leave": False}
    if torch.cuda.is_available():
        return list(tqdm(map(function, items), **bar))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, items), **bar))
