# canon: runtime
def choose_preset(wanted, presets):
    """Name of the preset: $COOKBOOK_PRESET or `wanted`, where "auto" is gpu with CUDA and cpu without."""
    name = os.environ.get("COOKBOOK_PRESET") or wanted
    if name == "auto":
        name = "gpu" if torch.cuda.is_available() else "cpu"
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; choose one of: auto, {', '.join(presets)}")
    if name == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("preset 'gpu' needs CUDA: on Colab choose Runtime > Change runtime type > GPU, else take preset 'cpu'")
    return name


random.seed(SEED), np.random.seed(SEED), torch.manual_seed(SEED)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print("preset:", preset := choose_preset(PRESET, PRESETS))
print("device:", torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
print("versions: python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, np)), sep=", ")
