"""Shared pieces: tiny encoders of every family with random weights, and where real data lie, if they do."""

import os
import sys

# Before numpy and torch start their thread pools: tests share the machine, and their arrays are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test may reach the Hub; what needs it is tested against its offline error.
os.environ["HF_HUB_OFFLINE"] = "1"

from types import SimpleNamespace

import pytest
from helpers import RECIPE, encoders, shared
from helpers.predictions import calibrated
from helpers.recipe import NO_PIP_FREEZE, load_recipe


@pytest.fixture(scope="session")
def real_speech():
    """A DatasetDict of real speech."""
    return shared("data", "speech_accent_archive")


@pytest.fixture(scope="session")
def real_moonshine():
    """A pretrained Moonshine encoder."""
    return shared("encoders", "moonshine_tiny")


@pytest.fixture(scope="session")
def real_whisper():
    """A pretrained Whisper encoder."""
    return shared("encoders", "whisper_base")


def _give_lazy_modules_a_file():
    """Hypothesis asks each module for its file, and SpeechBrain's lazy ones would import packages that are absent."""
    for module in list(sys.modules.values()):
        if "speechbrain" in type(module).__module__:
            vars(module).setdefault("__file__", None)


# The files that take longest, from the longest on.
LONGEST = ("test_recipe.py", "test_encoders.py", "test_survival.py", "test_hugging_face.py", "test_distributed.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Before Hypothesis looks at the modules that test files have imported.

    The longest files come first: one that began last would keep one process busy while the others have nothing to do.
    """
    _give_lazy_modules_a_file()
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module", autouse=True)
def lazy_modules_without_file():
    """And at those that have been imported since."""
    _give_lazy_modules_a_file()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Function: name of `helpers.encoders.TINY` -> folder of an encoder with random weights."""
    folder = tmp_path_factory.mktemp("encoders")
    return lambda name: encoders.make(name, folder / name)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_encoder):
    """A bundle of three accents around a tiny encoder with random weights."""
    import torch

    from accent_plugin.bundle.write import write_bundle
    from accent_plugin.encoder.factory import make_encoder
    from accent_plugin.model import AccentModel

    labels = ("us", "england", "australia")
    torch.manual_seed(0)
    model = AccentModel(make_encoder(str(tiny_encoder("moonshine"))), labels)
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    curve = {"threshold": [0.34, 0.5, 0.9], "coverage": [1.0, 0.6, 0.2], "risk": [0.4, 0.2, 0.0]}
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return write_bundle(folder, model, labels, encoder_name="tiny", pooling="mean", calibration=calibrated(1.0, curve))


@pytest.fixture
def train(monkeypatch, capsys):
    """Run the recipe's main in this process, from its own folder, as `python train.py ...` would."""
    monkeypatch.setattr(*NO_PIP_FREEZE)
    monkeypatch.chdir(RECIPE)
    monkeypatch.syspath_prepend(str(RECIPE))
    module = load_recipe()
    hook = sys.excepthook

    def run(*arguments):
        code = module.main([str(argument) for argument in arguments])
        return SimpleNamespace(code=code, err=capsys.readouterr().err, module=module)

    yield run
    sys.excepthook = hook  # SpeechBrain replaces it
