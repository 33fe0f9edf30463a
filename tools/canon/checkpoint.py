# @title Checkpoints: identity, saving, exact resuming
# canon: checkpoint
import dataclasses
import functools
import hashlib
import os
import pickle
import random
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch


def checkpoint_folder(folder, free=200):
    """Path of the folder for checkpoints, made if need be; OSError now, not after hours, where it cannot be written.

    `free`: MB that have to be free. FileNotFoundError on a Drive that is not mounted.
    """
    path = expanded(folder, "CHECKPOINTS")
    probe = path / f"probe-{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {path} ({error.strerror}): set CHECKPOINTS to a folder that can be written") from error
    space = shutil.disk_usage(path).free / 1e6
    if space < free:
        raise OSError(f"{path} has {space:,.0f} MB left and {free} are wanted: free some, or set CHECKPOINTS to another disk")
    return path


def is_own(value):
    """Whether a function or class comes from the notebook, not from a library."""
    root = sys.modules.get(value.__module__.partition(".")[0])  # compiled classes name modules that nobody has imported
    return root is None or root.__spec__ is None


def digest(array):
    """dtype, shape and sha256 of a tensor or array."""
    if isinstance(array, torch.Tensor):
        raw = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{array.dtype}{tuple(array.shape)}{hashlib.sha256(raw).hexdigest()}"


def fingerprint(value, seen=None):
    """Text that stands for a value in an identity: settings, data, code. TypeError for what it cannot stand for.

    A function or class of the notebook stands for its code and for that of the functions, classes and constants that it uses.
    """
    seen = set() if seen is None else seen
    describe = functools.partial(fingerprint, seen=seen)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range, slice, type(...), np.generic, Path)):
        return repr(value)
    if isinstance(value, (torch.device, torch.dtype, np.dtype)):
        return repr(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return digest(value)
    if isinstance(value, torch.nn.Module):
        return describe(type(value)) + describe(dict(value.state_dict()))
    if isinstance(value, types.BuiltinFunctionType) or (isinstance(value, (types.FunctionType, type)) and not is_own(value)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.FunctionType):
        return function_fingerprint(value, seen)
    if isinstance(value, type):
        return class_fingerprint(value, seen)
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords])
    if dataclasses.is_dataclass(value):
        return type(value).__qualname__ + describe({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{describe(key)}:{describe(part)}" for key, part in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(describe, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(describe, value))) + "}"
    raise TypeError(f"{type(value).__name__} has no fingerprint: hand over its settings or tensors instead")


def function_fingerprint(function, seen):
    """Byte code, constants, defaults and captured values of a function, and what it uses of the notebook."""
    if function in seen:
        return function.__qualname__
    seen.add(function)
    describe = functools.partial(fingerprint, seen=seen)
    codes, parts, names = [function.__code__], [], set()
    while codes:
        code = codes.pop()
        inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        plain = [constant for constant in code.co_consts if constant not in inner and constant != function.__doc__]
        parts += [code.co_code.hex(), describe(plain), repr(code.co_names), repr(code.co_varnames)]
        names |= set(code.co_names)
        codes += inner
    captured = [cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not function]
    parts += [describe(function.__defaults__), describe(function.__kwdefaults__), describe(captured)]
    for name in sorted(names & function.__globals__.keys()):
        used = function.__globals__[name]
        if isinstance(used, (types.FunctionType, type)) or (name.isupper() and not isinstance(used, types.ModuleType)):
            parts.append(f"{name}={describe(used)}")
    return f"{function.__qualname__}({';'.join(parts)})"


def class_fingerprint(kind, seen):
    """The methods and plain attributes of a class of the notebook, and its bases."""
    if kind in seen:
        return kind.__qualname__
    seen.add(kind)
    parts = [fingerprint(base, seen) for base in kind.__bases__]
    for name, member in sorted(vars(kind).items()):
        member = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if isinstance(member, types.FunctionType):
            parts.append(f"{name}={function_fingerprint(member, seen)}")
        elif not name.startswith("_") and not isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            parts.append(f"{name}={fingerprint(member, seen)}")
    return f"{kind.__qualname__}({';'.join(parts)})"


def identity(*parts):
    """16 hexadecimal digits that change with the preset and any of the parts: settings, seeds, data, and the functions at work."""
    text = "|".join(fingerprint(part) for part in (preset_name(PRESET), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def random_states():
    """States of the global generators of Python, NumPy and PyTorch, as plain data."""
    version, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(), "numpy": (version, keys.tolist(), *rest), "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states):
    """Put the global generators into the states that random_states() gave; those of a GPU only where there is one."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def state_of(part):
    """Plain data that hold the state of a module, an optimiser, a generator of PyTorch or NumPy, and the like."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    return part.state_dict()


def restore(part, state):
    """Put a part into the state that state_of() gave."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    else:
        part.load_state_dict(state)


def write_whole(value, path):
    """torch.save that leaves the file before where it cannot finish; OSError where the disk is full or cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(value, temporary)
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_whole(path):
    """What write_whole() saved; ValueError that names a damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: delete it to begin anew") from error


class Checkpoint:
    """Where a run is kept, so that a restarted notebook goes on where it was and reaches the same numbers.

    folder: what checkpoint_folder() returned, None to keep nothing. name: for people; identity: all that changes the result (settings,
    seed, data, device, training function), so that after an edit nothing stale is taken up. every: seconds between two savings.
    """

    def __init__(self, folder, name, *parts, every=60):
        self.path = None if folder is None else Path(folder) / f"{name}-{identity(*parts)}.pt"
        self.every = every
        self.saved = time.monotonic()

    def due(self):
        """Whether the time to save has come."""
        return self.path is not None and time.monotonic() - self.saved >= self.every

    def save(self, log, **parts):
        """Keep `log` (plain data), the states of the parts and of the global generators. A full disk is said and does not stop the run."""
        self.saved = time.monotonic()
        if self.path is None:
            return
        state = {"log": log, "parts": {name: state_of(part) for name, part in parts.items()}, "random": random_states()}
        try:
            write_whole(state, self.path)
        except OSError as error:
            print(f"the checkpoint {self.path.name} is not kept ({error}); the run goes on")

    def load(self, **parts):
        """Put the parts and the global generators where save() found them; returns the log, None where nothing is kept."""
        if self.path is None or not self.path.exists():
            return None
        state = read_whole(self.path)
        try:
            for name, part in parts.items():
                restore(part, state["parts"][name])
            set_random_states(state["random"])
            return state["log"]
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"the checkpoint {self.path} is damaged or not of this model: delete it to begin anew") from error


def remembered(folder, name, compute, *arguments):
    """compute(*arguments), plain data or tensors, taken from the folder where an earlier run of the same code and arguments left it."""
    path = None if folder is None else Path(folder) / f"{name}-{identity(compute, *arguments)}.pt"
    if path is not None and path.exists():
        return read_whole(path)
    result = compute(*arguments)
    if path is not None:
        try:
            write_whole(result, path)
        except OSError as error:
            print(f"{path.name} is not kept ({error}); the run goes on")
    return result


checkpoints = checkpoint_folder(CHECKPOINTS)
