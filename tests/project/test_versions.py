"""The versions that are supported: written down once, tried at both ends, and named when they are left."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import warnings

import pytest
from helpers import ROOT

import accent_plugin

ENDS = ("speechbrain", "transformers", "datasets")


@pytest.mark.parametrize("name", ENDS)
def test_the_oldest_that_is_tried_is_the_oldest_that_is_allowed(name):
    allowed = re.search(rf'"{name}>=([\d.]+),<', (ROOT / "setup.py").read_text(encoding="utf-8")).group(1)
    assert f"{name}=={allowed}" in (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()


def test_nothing_is_said_of_what_is_installed_here():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import accent_plugin"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("found", ["0.9", "99.0"])
def test_another_version_is_named_in_one_line(name, found, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda which: found if which == name else version(which))
    with pytest.warns(UserWarning) as caught:
        accent_plugin._name_unsupported()
    (said,) = (str(warning.message) for warning in caught)
    assert name in said and f"{found} is installed" in said and "\n" not in said


def test_a_checkout_that_is_not_installed_says_nothing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accent_plugin._name_unsupported()
