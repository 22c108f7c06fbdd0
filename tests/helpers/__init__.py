"""Pieces that test files share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/CommonVoiceAccent"


def shared(*parts):
    """A path of real data kept beside the checkout, or a skip where it is absent."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"real data are absent: there is no {'/'.join(('../shared', *parts))}")
    return path
