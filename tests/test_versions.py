"""The versions that a bug report and a report of results name."""

import importlib.metadata
import platform
import sys
from types import SimpleNamespace

import accent_plugin
from accent_plugin.versions import installed_versions


def test_packages_python_and_machine_are_named(monkeypatch):
    version = importlib.metadata.version

    def found(package):
        if package == "transformers":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", found)
    # As in a process that has not imported it.
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    made = installed_versions()
    assert made["accent_plugin"] == accent_plugin.__version__
    assert (made["numpy"], made["transformers"]) == (version("numpy"), "not installed")
    assert (made["python"], made["machine"].split()[0]) == (platform.python_version(), platform.system())
    assert "torch" not in sys.modules and "gpu" not in made


def test_a_gpu_is_named_where_torch_sees_one(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "H100")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert installed_versions()["gpu"] == "H100"
