"""One run of the recipe, and which runs a command line asks for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from speechbrain import Stage

from accent_plugin.audio.augment import make_augmentation
from accent_plugin.audio.degradations import DEGRADATIONS
from accent_plugin.data.manifests import Clip
from accent_plugin.errors import ConfigError, DataError
from accent_plugin.experiment.run import Run, _fit_whitening
from accent_plugin.experiment.settings import read_settings
from accent_plugin.training.batches import Batch
from accent_plugin.training.loaders import LoadingOptions


@pytest.fixture
def settings(tiny_encoder, tmp_path):
    """Function: words of a command line -> its settings."""
    words = [str(ROOT / "hparams/wav2vec2_base.yaml"), "--wav2vec2_hub", str(tiny_encoder("wav2vec2-group"))]
    words += ["--output_folder", str(tmp_path / "out"), "--prepared_folder", str(tmp_path / "prepared")]
    words += ["--data_folder", str(tmp_path), "--precision", "fp32"]
    return lambda *more: read_settings([*words, *more], ROOT, look_at_data=False)


def runs(settings, tmp_path):
    """Folder below tmp_path, seed and fold of each run."""
    found = [(one.values, fold) for one, fold in settings.runs()]
    assert all(values["save_folder"] == f"{values['output_folder']}/save" for values, _ in found)
    return [(values["output_folder"].removeprefix(f"{tmp_path}/"), values["seed"], fold) for values, fold in found]


def test_a_plain_command_line_is_one_run(settings, tmp_path):
    assert runs(settings(), tmp_path) == [("out", 1986, None)]


def test_every_seed_trains_every_fold(settings, tmp_path):
    expected = [(f"out/{seed}/fold_{fold}", seed, fold) for seed in (7, 3) for fold in (1, 2, 3)]
    assert runs(settings("--seeds", "7,3", "--n_folds", "3"), tmp_path) == expected


def test_one_fold_can_be_run_alone(settings, tmp_path):
    assert runs(settings("--n_folds", "3", "--fold", "2"), tmp_path) == [("out/fold_2", 1986, 2)]


def test_both_splits_have_their_own_folders(settings, tmp_path):
    both = settings("--split", "both", "--n_folds", "3")
    expected = [(f"out/{split}/fold_{fold}", 1986, fold) for split in ("speaker", "random") for fold in (1, 2, 3)]
    assert runs(both, tmp_path) == expected
    found = [(one.values["split"], one.values["prepared_folder"]) for one, _ in both.runs()]
    assert found[0] == ("speaker", str(tmp_path / "prepared/speaker"))
    assert found[-1] == ("random", str(tmp_path / "prepared/random"))


def test_a_folder_is_claimed_by_one_run_at_a_time(settings, tmp_path):
    with Run(settings()).locked():
        with pytest.raises(ConfigError, match="is in use by process"), Run(settings()).locked():
            pass
    with Run(settings()).locked():
        pass


def test_a_finished_run_keeps_no_network(settings):
    run = Run(settings())
    with run.locked():
        run.brain = object()
    assert run.brain is None


@pytest.mark.parametrize("restarted", [False, True])
def test_overwrite_deletes_the_run_before_unless_a_cluster_has_started_this_one_again(settings, monkeypatch, restarted):
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(int(restarted)))
    run = Run(settings())
    history = run.folder / "save/history.json"
    history.parent.mkdir(parents=True)
    history.write_text("[]")
    (run.folder / "run.json").write_text('{"data": "x", "values": {}}')
    with run.locked(overwrite=True):
        assert history.exists() == restarted


def test_data_that_this_machine_cannot_see_are_an_error(settings, tmp_path):
    elsewhere = SimpleNamespace(folder=tmp_path / "elsewhere")
    with pytest.raises(DataError, match="give a prepared_folder that all machines share"):
        Run(settings()).prepare(lambda **_: elsewhere, {})


def answers(clips, accents, confident):
    """Log-probabilities of a model that gives the first accent to every clip, with a probability."""
    rows = [[confident, *[(1 - confident) / (len(accents) - 1)] * (len(accents) - 1)] for _ in clips]
    return clips, np.log(rows)


@pytest.fixture
def evaluated(settings, monkeypatch):
    """Function: augmentation and test clips -> a run, and a list of what its clips were degraded with.

    The model is sure of clips that are not degraded, and less sure of others.
    """

    def make(augmentation, clips, *words):
        run, asked = Run(settings(*words)), []
        accents = run.values["accents"]

        def predict(brain, clips, loading, speeds, degrade, temperature):
            asked.append(degrade)
            return answers(clips, accents, 0.99 if degrade is None else 0.9)

        monkeypatch.setattr("accent_plugin.experiment.run.predict", predict)
        run.loading = LoadingOptions(accents, 1, "none", 10.0, None, augmentation, 0)
        run.clips = {"valid": clips, "test": clips}
        return run, asked

    return make


def some_clips(speakers):
    accents = ("us", "us", "england", "us", "us", "australia")
    return [Clip(f"c{n}", 2.0, "/x.flac", accents[n % 6], f"s{n % speakers}", "", "") for n in range(12)]


def test_with_augmentation_the_temperature_is_fitted_on_augmented_copies_too(evaluated):
    plain, asked = evaluated(None, some_clips(4))
    plain.calibrate()
    assert asked == [None] and plain.calibration["clips"] == 12
    augmentation = make_augmentation(True, 0.5, noise_snr=[0, 10])
    augmented, asked = evaluated(augmentation, some_clips(4))
    augmented.calibrate()
    assert asked == [None, augmentation] and augmented.calibration["clips"] == 24
    assert [run.calibration["augmented"] for run in (plain, augmented)] == [False, True]
    # Two thirds of both are right: the surer ones need a higher temperature.
    assert plain.calibration["temperature"] > augmented.calibration["temperature"] > 1


@pytest.mark.parametrize("speakers", [1, 4])
def test_every_degradation_is_tested_and_babble_if_there_are_other_speakers(evaluated, monkeypatch, speakers):
    run, asked = evaluated(None, some_clips(speakers), "--test_degradations", "True")
    run.calibration = {"temperature": 1.0, "curve": None}
    run.prepared = SimpleNamespace(warnings=())
    run.brain = SimpleNamespace(
        unread={Stage.TEST: None}, history_file=None, best_epoch=lambda: 1, hparams=SimpleNamespace(model=None)
    )
    for name in ("unread_notes", "read_history"):
        monkeypatch.setattr(f"accent_plugin.experiment.run.{name}", lambda *_: [])
    monkeypatch.setattr("accent_plugin.experiment.run.describe_model", lambda *_: {})
    monkeypatch.setattr("accent_plugin.experiment.run.operating_point", lambda *_: {"threshold": 0.5})
    written = {}
    monkeypatch.setattr(run, "_write_report", lambda model, notes, **parts: written.update(parts))
    run.report()
    wanted = [name for name, d in DEGRADATIONS.items() if speakers > 1 or d.kind != "babble"]
    assert list(written["bands"]) == wanted and asked == [None, *(DEGRADATIONS[name] for name in wanted)]


@pytest.fixture
def tf32():
    """PyTorch's switches of matrix products, with TF32 allowed."""
    switches = torch.backends.cuda.matmul
    before, switches.allow_tf32 = switches.allow_tf32, True
    yield switches
    switches.allow_tf32 = before


def test_whitening_is_fitted_without_tf32(tf32):
    """On a GPU, TF32 would round the vectors that the whitening is fitted on; SpeechBrain turns it on."""
    allowed, fitted = [], []

    def embed(*_):
        allowed.append(tf32.allow_tf32)
        return torch.zeros(1, 2)

    whitening = SimpleNamespace(fitted=False, fit=lambda vectors, labels, shrinkage: fitted.append(len(vectors)))
    model = SimpleNamespace(whitening=whitening, eval=lambda: None, embed=embed)
    brain = SimpleNamespace(
        modules=SimpleNamespace(model=model),
        checkpointer=SimpleNamespace(find_checkpoint=lambda: None),
        hparams=SimpleNamespace(epoch_counter=SimpleNamespace(limit=1)),
        device="cpu",
        noprogressbar=True,
    )

    class Loader(list):
        batch_sampler = SimpleNamespace(set_epoch=lambda epoch: None)

    _fit_whitening(brain, Loader([Batch(("a",), torch.zeros(1, 400), None, torch.tensor([0]))]), 2, 0.1)
    assert allowed == [False, False] and fitted == [2]
    assert tf32.allow_tf32
