"""Installed versions, for bug reports and reproducibility."""

import importlib.metadata
import platform
import sys

import accent_plugin

_PACKAGES = ("speechbrain", "transformers", "torch", "torchaudio", "datasets", "scikit-learn", "numpy", "soundfile")


def installed_versions():
    """Return the versions of packages, Python, the machine and its GPU, without importing anything."""
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
