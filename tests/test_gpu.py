"""What a device could change: scores, pooling, steps in each precision, a restart, and what is said of full memory.

Everything runs on the CPU, too, so that the tests themselves are known to work before they meet a GPU. In fp32 TF32 is
off here: it leaves 10 bits of a product's numbers, and PyTorch takes it for convolutions unless it is told otherwise.
"""

import csv
import signal

import numpy as np
import pytest
import torch
from helpers import dataset_dicts as made
from helpers.encoders import TINY
from helpers.kills import Lives
from helpers.steps import batches, make_brain
from transformers import AutoFeatureExtractor, AutoModel

from accent_plugin.encoder.factory import make_encoder
from accent_plugin.model import AccentModel
from accent_plugin.pooling import POOLINGS, make_pooling

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
KINDS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ACCENTS = ("us", "england")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def without_tf32():
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def in_precision(device, precision):
    return torch.autocast(device, KINDS[precision], enabled=precision != "fp32")


def clips(lengths, device):
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(length, generator=generator) + 0.02 for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    return [wave.to(device) for wave in waves], padded.to(device), (torch.tensor(lengths) / max(lengths)).to(device)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", TINY)
def test_scores_do_not_depend_on_the_batch(family, precision, device, tiny_encoder):
    torch.manual_seed(3)
    model = AccentModel(make_encoder(str(tiny_encoder(family))), ["a", "b", "c"]).to(device).eval()
    waves, padded, lens = clips([16000, 9001, 4800, 3000], device)
    with torch.no_grad(), in_precision(device, precision):
        together = model(padded, lens)
        alone = torch.cat([model(wave[None]) for wave in waves])
    if precision == "fp32":
        assert (alone - together).abs().max() < 1e-5
    else:
        assert (alone.exp() - together.exp()).abs().max() < 0.02


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("bf16", 0.03), ("fp16", 0.005)])
@pytest.mark.parametrize("family", TINY)
def test_one_clip_gives_hugging_faces_frames(family, precision, within, device, tiny_encoder):
    folder = tiny_encoder(family)
    # Whisper's are those of 30 s.
    (wave,), _, _ = clips([480_000 if family == "whisper" else 8000], "cpu")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = next(iter(extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt").values())).to(device)
    reference = AutoModel.from_pretrained(folder).to(device).eval()
    reference = reference.encoder if family in ("moonshine", "whisper") else reference
    encoder = make_encoder(str(folder)).to(device).eval()
    with torch.no_grad(), in_precision(device, precision):
        expected = reference(inputs).last_hidden_state.float()
        frames = encoder(wave[None].to(device))[0].float()
    assert (frames - expected).norm() < within * expected.norm()


def pooled_in_numpy(pooling, frames):
    """(features,) of the valid (frames, features) of one clip, in float64."""
    weights = np.full((len(frames), 1), 1 / len(frames))
    if hasattr(pooling, "attention"):
        hidden, score = pooling.attention.hidden, pooling.attention.score
        weight, bias, vector = (p.detach().double().cpu().numpy() for p in (hidden.weight, hidden.bias, score.weight))
        scores = np.tanh(frames @ weight.T + bias) @ vector.T
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
    mean = (weights * frames).sum(axis=0)
    if pooling.out_features == frames.shape[1]:
        return mean
    return np.concatenate([mean, np.sqrt((weights * (frames - mean) ** 2).sum(axis=0))])


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_is_what_its_formula_says(name, device):
    torch.manual_seed(0)
    pooling, frames = make_pooling(name, 8).to(device), torch.randn(3, 500, 8) + 2
    counts = [500, 333, 1]
    valid = (torch.arange(500) < torch.tensor(counts)[:, None]).to(device)
    with torch.no_grad():
        pooled = pooling(frames.to(device), valid).cpu()
    for row, clip, count in zip(pooled, frames, counts, strict=True):
        expected = pooled_in_numpy(pooling, clip[:count].double().numpy())
        # A single frame's deviation is the floor under the square root.
        atol = 1e-5 if count > 1 else 1.1e-3
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("precision", KINDS)
def test_steps_lower_the_loss(precision, device, tiny_encoder):
    if device == "cpu" and precision == "fp16":
        pytest.skip("on the CPU the recipe does not train in fp16")
    torch.manual_seed(0)
    brain = make_brain(make_encoder(str(tiny_encoder("wav2vec2-group"))), device, precision=precision)
    train_set = batches(True)
    brain.train_sampler, brain._epochs, brain.step = train_set, 20, 1
    brain.on_fit_start()
    brain.modules.train()
    losses = []
    for _ in range(20):
        losses.append(sum(float(brain.fit_batch(batch)) for batch in train_set))
        train_set.set_epoch(len(losses) + 1)
    assert brain._sums[2] == 0, "a step was left out"
    assert losses[-1] < 0.9 * losses[0]


def probabilities(out):
    with open(out / "report/predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[f"p_{accent}"]) for accent in ACCENTS] for row in rows])


@pytest.fixture(scope="module")
def words(tiny_encoder, tmp_path_factory):
    """A command line of the recipe without a device."""
    folder = tmp_path_factory.mktemp("recipe")
    data = made.save(folder / "data", **made.three_splits(ACCENTS, clients=(5, 2, 2)))
    return [
        "hparams/wav2vec2_base.yaml",
        *("--data_folder", str(data), "--prepared_folder", str(folder / "prepared"), "--prepare_workers", "1"),
        *("--accents", f"[{', '.join(ACCENTS)}]", "--wav2vec2_hub", str(tiny_encoder("wav2vec2-group"))),
        *("--noprogressbar", "--num_workers", "0", "--precision", "fp32", "--batch_seconds", "5", "--max_seconds", "4"),
        *("--dropout", "0.2", "--lr_encoder", "0.001", "--lr_head", "0.01"),
        *("--number_of_epochs", "3", "--early_stopping", "0", "--selection", "last", "--ckpt_interval_steps", "1"),
    ]


# On a CPU, tests/recipe/test_survival.py kills runs in more places.
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=ON_A_GPU)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(words, device, tmp_path):
    lives = Lives([*words, "--device", device], tmp_path)
    try:
        lives.finish(tmp_path / "whole")
        # In the second epoch, before the step is saved.
        killed = lives.live(tmp_path / "killed", kill={"kind": "method", "name": "save_checkpoint", "times": 8})
        assert killed.code == -signal.SIGKILL, killed.err[-3000:]
        lives.finish(tmp_path / "killed")
        # A run without its dropout's generators would be such another one.
        lives.finish(tmp_path / "other", "--seed", "7")
    finally:
        lives.close()
    whole, resumed, other = (probabilities(tmp_path / name) for name in ("whole", "killed", "other"))
    # A GPU adds up in another order each time.
    assert np.abs(whole - resumed).max() <= (1e-3 if device == "cuda" else 0.0)
    assert np.abs(whole - other).max() > 1e-3


@ON_A_GPU
def test_full_memory_is_explained(train, words, tmp_path, monkeypatch):
    full = "accent_plugin.training.brain.AccentBrain.fit"
    monkeypatch.setattr(full, lambda *arguments: torch.empty(2**50, dtype=torch.uint8, device="cuda"))
    done = train(*words, "--device", "cuda", "--output_folder", tmp_path / "out")
    assert done.code == 2 and "the GPU's memory is full; lower batch_seconds" in done.err
    assert "Traceback" not in done.err
