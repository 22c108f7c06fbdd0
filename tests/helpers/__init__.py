"""Pieces that test files share."""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/CommonVoiceAccent"


def setup_argument(name):
    """An argument of setup.py, which is read and not run."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == name)
    return ast.literal_eval(value)


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def shared(*parts):
    """A path of real data kept beside the checkout, or a skip where it is absent."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"real data are absent: there is no {'/'.join(('../shared', *parts))}")
    return path
