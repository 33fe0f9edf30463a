"""A CUDA device that only pretends: tensors "on cuda" are computed by the CPU, but obey the rules of a GPU.

    from tools import pretended_cuda
    pretended_cuda.install()               # a T4; install(capability=(9, 0)) for a GPU with bfloat16

Afterwards torch.cuda.is_available() is True. A tensor that is made on "cuda" or moved there says that it lies on cuda:0. Mixing it with a
CPU tensor, reading it as NumPy, indexing a CPU tensor with it, or drawing with a generator of the other device raises as on a GPU. The
values are real, so that a whole notebook runs; autocast computes on the CPU in the precision asked for, and the loss scaler scales.
Convolutions round what they multiply to TF32, as newer GPUs than a T4 do unless torch.backends.cudnn.allow_tf32 is off.

What it cannot show: products in TF32 on the way back, speed, memory, kernels, streams, torch.compile on a GPU. It replaces functions of
torch for the rest of the process.
"""

import torch
import torch._dynamo  # it takes an inventory of torch's functions, so it must come before any is replaced
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
DRAWS = {getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "bernoulli_", "random_", "exponential_")}
MOVES = {getattr(torch.Tensor, name) for name in ("to", "cuda", "cpu", "copy_", "type_as")} | {torch.result_type, torch.can_cast}
HANDLED = MOVES | {torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.pin_memory}
PLAIN = {int, float, bool, complex, str, type(None), type(...), torch.dtype, torch.layout, torch.memory_format, torch.Size, type, range}
TENSORS = {torch.Tensor, torch.nn.Parameter}
PACKING = {"_pack_padded_sequence", "_pad_packed_sequence"}  # lengths lie on the CPU, before and after
PACKED = PACKING | {"gru", "lstm", "rnn_tanh", "rnn_relu"}
CONVOLUTIONS = {getattr(torch, name) for d in "123" for name in (f"conv{d}d", f"conv_transpose{d}d")}
cuda_generators = []


def names_cuda(device):
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


class CudaTensor(torch.Tensor):
    """A tensor that is computed by the CPU and says that it lies on the GPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def numpy(self, *args, **kwargs):
        raise TypeError(NUMPY)

    def __array__(self, *args, **kwargs):
        raise TypeError(NUMPY)

    def __format__(self, spec):
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __reduce_ex__(self, protocol):
        return to_cpu(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = to_cuda(to_cpu(self).detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True  # what isinstance(..., nn.Parameter) looks at
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def to_cpu(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(tensor.detach().as_subclass(torch.Tensor), tensor.requires_grad)
        return tensor.as_subclass(torch.Tensor)


def to_cuda(value):
    if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(CudaTensor)


def tensors_in(values, found):
    """Append the tensors among values, nested in lists, tuples and dicts, to `found`."""
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            tensors_in(value, found)
        elif isinstance(value, dict):
            tensors_in(value.values(), found)
    return found


def check_devices(function, args, kwargs):
    """Whether the inputs lie on cuda; raises as a GPU does where they lie on both."""
    tensors = tensors_in(args, [])
    if kwargs:
        tensors_in(kwargs.values(), tensors)
    on_cuda = any(isinstance(t, CudaTensor) for t in tensors)
    name = getattr(function, "__name__", str(function))
    if not on_cuda or function in MOVES or name == "__set__":
        return on_cuda
    if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        index = [i for i in tree_flatten(args[1])[0] if isinstance(i, torch.Tensor)]
        if not isinstance(args[0], CudaTensor):
            if any(isinstance(i, CudaTensor) for i in index):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return False
        value = args[2] if len(args) > 2 else None
        if index and isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) and value.dim():
            raise RuntimeError("a value on cpu cannot be put into a tensor on cuda:0 by a tensor of indices")
        return True
    lengths = {torch.int64} if name in PACKED else {}
    foreign = [tuple(t.shape) for t in tensors if not isinstance(t, CudaTensor) and t.dim() and t.dtype not in lengths]
    if foreign:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({name}; on cpu: {foreign})")
    return True


def destination(function, args, kwargs):
    """Where a move or a factory puts its result: True cuda, False cpu, None where the inputs are."""
    if function is torch.Tensor.cuda:
        return True
    if function is torch.Tensor.cpu:
        return False
    device = kwargs.get("device")
    if function is torch.Tensor.to:
        for a in args[1:]:
            if isinstance(a, torch.Tensor):
                return isinstance(a, CudaTensor)
            if isinstance(a, (str, torch.device)) or (isinstance(a, int) and not isinstance(a, bool)):
                device = a
    return None if device is None else names_cuda(device)


def on_the_cpu(a):
    """An argument as the CPU needs it."""
    if isinstance(a, torch.device) or (isinstance(a, str) and a.startswith("cuda")):
        return CPU
    return to_cpu(a) if isinstance(a, CudaTensor) else a


def rounded_to_tf32(value):
    """A float32 tensor with eleven significant bits, the slope of which is 1; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        large = value * (2**13 + 1)
        return to_cuda(large - (large - value))


def call(function, args, kwargs):
    """What a function of torch gives on such tensors. Most calls are plain: no move, no factory, all on one device."""
    if function in CONVOLUTIONS and isinstance(args[0], CudaTensor) and torch.backends.cudnn.allow_tf32:
        args = (*map(rounded_to_tf32, args[:2]), *args[2:])
    if function in HANDLED or "device" in kwargs or "generator" in kwargs:
        return call_by_the_rules(function, args, kwargs)
    on_cuda, on_cpu = False, False
    for a in (*args, *kwargs.values()) if kwargs else args:
        kind = type(a)
        if kind is CudaTensor:
            on_cuda = True
        elif kind in TENSORS:
            on_cpu = True
        elif kind not in PLAIN:
            return call_by_the_rules(function, args, kwargs)
    if not on_cuda:
        return function(*args, **kwargs)
    if on_cpu:
        return call_by_the_rules(function, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)
        kind = type(result)
        if kind in TENSORS:
            return result.as_subclass(CudaTensor)
    return result if kind in PLAIN or kind is CudaTensor else on_cuda_too(result)


def on_cuda_too(result):
    """A result that may hold tensors in lists, tuples and dicts."""
    if isinstance(result, torch.Size) or not isinstance(result, (torch.Tensor, list, tuple, dict)):
        return result
    return tree_map(to_cuda, result)


def call_by_the_rules(function, args, kwargs):
    on_cuda, where, generator = check_devices(function, args, kwargs), destination(function, args, kwargs), kwargs.get("generator")
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = {**kwargs, "device": CPU}
    if generator is not None:
        drawn_on = on_cuda if function in DRAWS or where is None else where
        if drawn_on != any(generator is g for g in cuda_generators):
            raise RuntimeError(f"Expected a '{'cuda' if drawn_on else 'cpu'}' device type for generator")
    if function is torch.Tensor.pin_memory:
        return args[0]
    with torch._C.DisableTorchFunctionSubclass():
        if function in (torch.Tensor.cuda, torch.Tensor.cpu):
            moved = isinstance(args[0], CudaTensor) != where
            result = to_cpu(args[0]).clone() if moved else args[0]
        elif function is torch.Tensor.to:
            result = function(args[0], *map(on_the_cpu, args[1:]), **kwargs)
            if where is not None and isinstance(args[0], CudaTensor) != where and result is args[0]:
                result = result.clone()
        else:
            result = function(*args, **kwargs)
    if (args and result is args[0]) or isinstance(result, torch.Size) or function in (torch.Tensor.item, torch.Tensor.tolist):
        return result
    if function is torch.Tensor.__getitem__:
        where = isinstance(args[0], CudaTensor)
    if not isinstance(result, torch.Tensor) and not (isinstance(result, (list, tuple, dict)) and tensors_in([result], [])):
        return result
    if on_cuda and getattr(function, "__name__", "") in PACKING:
        return to_cuda(result[0]), result[1]
    if where if where is not None else on_cuda:
        return to_cuda(result) if isinstance(result, torch.Tensor) else tree_map(to_cuda, result)
    return to_cpu(result) if isinstance(result, CudaTensor) else result


class Watch(TorchFunctionMode):
    """Sees every call, also those without a tensor among their inputs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for kind in types:
            if not issubclass(kind, torch.Tensor):  # torch.fx records what is done to its stand-ins
                return function(*args, **(kwargs or {}))
        return call(function, args, kwargs or {})


def apply_to_module(self, function, recurse=True):
    """nn.Module._apply that replaces parameters instead of writing into them."""
    for module in self.children():
        module._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            new = function(parameter)
        if new is not parameter:
            new = new.detach().requires_grad_(parameter.requires_grad)
            if isinstance(new, CudaTensor):
                new._is_param = True
            self._parameters[name] = new if isinstance(new, CudaTensor) else torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def without_cuda(value):
    """Nested containers as torch.save should store them."""
    if isinstance(value, CudaTensor):
        return to_cpu(value)
    if isinstance(value, dict):
        return type(value)((k, without_cuda(v)) for k, v in value.items())
    return type(value)(without_cuda(v) for v in value) if type(value) in (list, tuple) else value


def replace_cuda_functions(capability):
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended T4",
        "get_device_capability": capability, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "mem_get_info": (14 << 30, 15 << 30), "memory_allocated": 1 << 29, "max_memory_allocated": 1 << 30, "memory_reserved": 1 << 30,
        "max_memory_reserved": 1 << 30, "get_rng_state": state, "get_rng_state_all": [state],
    }  # fmt: skip
    silent = ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "set_rng_state",
              "set_rng_state_all", "init", "_lazy_init")  # fmt: skip
    for name, answer in (answers | dict.fromkeys(silent)).items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)


def install(capability=(7, 5)):
    """Make torch believe in a GPU of this compute capability."""
    replace_cuda_functions(capability)
    real_generator, real_autocast, save, load = torch.Generator, torch.autocast, torch.save, torch.load

    class Kind(type):
        def __instancecheck__(cls, other):
            return isinstance(other, real_generator)

    class Generator(metaclass=Kind):
        def __new__(cls, device="cpu"):
            generator = real_generator()
            if names_cuda(device):
                cuda_generators.append(generator)
            return generator

    class Autocast(real_autocast):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            super().__init__("cpu", dtype or torch.bfloat16, enabled, cache_enabled)

    def load_on(file, map_location=None, **kwargs):
        value = load(file, map_location="cpu", **kwargs)
        return tree_map(to_cuda, value) if isinstance(map_location, (str, torch.device)) and names_cuda(map_location) else value

    torch.Generator, torch.autocast, torch.amp.autocast = Generator, Autocast, Autocast
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda device_type=None: enabled("cpu") if device_type in (None, "cuda") else enabled(device_type)
    torch.get_autocast_dtype = lambda device_type: dtype("cpu" if device_type == "cuda" else device_type)
    torch.save = lambda value, *args, **kwargs: save(without_cuda(value), *args, **kwargs)
    torch.load = load_on
    torch.nn.Module._apply = apply_to_module
    torch.nn.RNNBase.flatten_parameters = lambda self: None  # lays the weights out for cuDNN
    Watch().__enter__()
