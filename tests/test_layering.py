"""Who may import whom: arrows point downwards, and the rooms of data and figures need no torch."""

import ast
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import accent_plugin

PACKAGE = Path(accent_plugin.__file__).parent
# From the ground up; a room may import rooms of lower storeys, and of its own where it is named in BESIDE.
STOREYS = [
    {"errors", "interruption"},
    {"devices"},
    {"labels", "audio", "disk", "pooling", "whitening", "convolutions", "adapters", "predictions", "gate"}
    | {"processes", "dropout", "together"},
    {"bundle_config", "checkpoints", "position"},
    {"splits", "metrics", "augment", "encoder", "tiny", "nuisance", "hearing", "probing"},
    {"sources", "selection", "synthetic", "shards", "readahead"},
    {
        "manifests",
        "model",
        "batches",
        "pictures",
        "report_html",
        "report",
        "calibration",
        "model_card",
        "commonvoice",
        "readers",
        "corpus",
        "audit",
        "recordings",
    },
    {"features"},
    {"config", "brain", "baseline", "bands", "bundle"},
    {"exchange", "run_folder"},
    {"experiment", "inference", "onnx", "hub"},
    {"classify", "evaluation"},
    {"onnx_export", "service"},
    {"web", "page"},
    {"serve"},
    {"cli"},
]
BESIDE = {
    ("model_card", "report"),
    ("readers", "commonvoice"),
    ("corpus", "readers"),
    ("audit", "pictures"),
    ("report", "pictures"),
    ("report", "report_html"),
    ("report_html", "pictures"),
}
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Those that mypy checks.
WITHOUT_TORCH = {Path(name).stem for name in SETTINGS["tool"]["mypy"]["files"]}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(room):
    """Names of modules a room imports at its top."""
    for node in ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def storey(room):
    return next(level for level, rooms in enumerate(STOREYS) if room in rooms)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_downwards(room):
    for name in imports(room):
        package, _, other = name.partition(".")
        other = other.partition(".")[0]
        if package == "accent_plugin" and other in ROOMS and (room, other) not in BESIDE:
            assert storey(other) < storey(room), f"{room} imports {other}"


@pytest.mark.parametrize("room", sorted(WITHOUT_TORCH))
def test_rooms_of_data_and_figures_do_not_import_torch(room):
    heavy = {"torch", "speechbrain", "transformers"}
    assert not heavy & {name.partition(".")[0] for name in imports(room)}
