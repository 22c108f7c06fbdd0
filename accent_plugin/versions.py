"""The versions that a bug report, or whoever repeats a result, needs."""

import importlib.metadata
import platform
import sys

import accent_plugin

_PACKAGES = ("speechbrain", "transformers", "torch", "torchaudio", "datasets", "scikit-learn", "numpy", "soundfile")


def installed_versions():
    """Map packages, Python, the machine and its GPU to versions, without importing anything."""
    found = {
        "accent_plugin": accent_plugin.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
