"""AccentBrain: optimizer steps, learning rates, checkpoints and errors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.distributed import Logger, TinyEncoder

from accent_plugin.audio import codecs
from accent_plugin.data.manifests import Clip
from accent_plugin.errors import DataError, TrainingError
from accent_plugin.training.batches import Batch, BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.checkpoints import AtomicCheckpointer
from accent_plugin.training.options import TrainingOptions, learning_rate_factor, make_epoch_counter, read_history


def make_model():
    from accent_plugin.model import AccentModel

    torch.manual_seed(0)
    return AccentModel(TinyEncoder(), ["a", "b"])


@pytest.fixture
def make_brain(tmp_path):
    def make(epochs=2, patience=0, checkpoints=True, class_weights=None, run_opts=None, **changes):
        model, counter = make_model(), make_epoch_counter(epochs, patience)
        options = {
            "lr_encoder": 0.01,
            "lr_head": 0.1,
            "weight_decay": 0.0,
            "warmup": 0.0,
            "decay": "none",
            "freeze_encoder_steps": 0,
            "label_smoothing": 0.0,
            "selection": "macro_f1",
            "train_logger": Logger(),
            "max_unreadable_share": 0.05,
            **changes,
        }
        hparams = {"max_grad_norm": options.pop("max_grad_norm", 1e9), "epoch_counter": counter}
        recoverables = {"model": model, "counter": counter}
        checkpointer = AtomicCheckpointer(tmp_path / "save", recoverables) if checkpoints else None
        (tmp_path / "save").mkdir(exist_ok=True)
        return AccentBrain(
            modules={"model": model},
            options=TrainingOptions(**options),
            hparams=hparams,
            run_opts={"device": "cpu", "noprogressbar": True, **(run_opts or {})},
            checkpointer=checkpointer,
            class_weights=class_weights,
            history_file=tmp_path / "save/history.json",
        )

    return make


@pytest.fixture
def loader(tmp_path):
    """Twelve clips of two classes that differ in loudness."""
    rng, clips = np.random.default_rng(0), []
    for number in range(12):
        path = tmp_path / f"{number}.flac"
        samples = rng.uniform(0, 0.9 if number % 2 else 0.1, 1600 + 400 * (number % 3)).astype(np.float32)
        codecs.write(path, samples)
        clips.append(Clip(f"c{number}", len(samples) / 16000, str(path), "ab"[number % 2], f"s{number}", "", ""))

    def make(batch_seconds=0.6):
        dataset = ClipDataset(tuple(clips), ["a", "b"])
        return make_loader(dataset, BucketBatchSampler(dataset.seconds(), batch_seconds, seed=1))

    return make


def batch_of(numbers, labels):
    rng = np.random.default_rng(3)
    wavs = torch.from_numpy(rng.uniform(-1, 1, (8, 800)).astype(np.float32))[numbers]
    return Batch(tuple(map(str, numbers)), wavs, None, torch.tensor(labels))


class Steps(list):
    """A training set of ready batches, which is also its own sampler."""

    epoch = 1
    batch_sampler = property(lambda self: self)


def gradients_of_one_step(brain, batches, factor):
    """Gradients with which the optimizer steps when `batches` are accumulated."""
    brain.train_sampler, brain._epochs = Steps(batches), 1
    brain.grad_accumulation_factor = factor
    brain.init_optimizers()
    brain.modules.train()
    brain.on_stage_start(None)
    brain.nonfinite_count, seen = 0, []
    brain.optimizer.step = lambda: seen.append([p.grad.clone() for p in brain.modules.parameters()])
    for batch in batches:
        brain.step += 1
        brain.fit_batch(batch)
    return seen


def take_steps(brain, batches):
    """Weights of the classifier after each of some steps of one batch each."""
    brain.train_sampler, brain._epochs = Steps(batches), 1
    brain.init_optimizers()
    brain.modules.train()
    brain.on_stage_start(None)
    weights = []
    for batch in batches:
        brain.step += 1
        brain.fit_batch(batch)
        weights.append(brain.modules.model.classifier.weight.detach().clone())
    return weights


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0])])
def test_a_step_takes_the_weighted_mean_over_all_its_clips_however_they_are_batched(make_brain, weights):
    labels = [0, 1, 1, 0, 1]
    together = batch_of([0, 1, 2, 3, 4], labels)
    pieces = [batch_of([0, 1, 2], labels[:3]), batch_of([3], labels[3:4]), batch_of([4], labels[4:])]
    (one,) = gradients_of_one_step(make_brain(class_weights=weights), [together], 1)
    (three,) = gradients_of_one_step(make_brain(class_weights=weights), pieces, 3)
    model = make_model()
    torch.nn.functional.cross_entropy(model(together.wavs), together.labels, weight=weights).backward()
    for mean, a, b in zip((p.grad for p in model.parameters()), one, three, strict=True):
        assert torch.allclose(a, mean, atol=1e-6) and torch.allclose(b, mean, atol=1e-6)


def test_the_last_incomplete_window_of_an_epoch_is_not_lost(make_brain):
    pieces = [batch_of([n], [n % 2]) for n in range(5)]
    assert len(gradients_of_one_step(make_brain(), pieces, 2)) == 3


def test_clipping_covers_all_parameters_together(make_brain):
    (gradients,) = gradients_of_one_step(make_brain(max_grad_norm=1e-3), [batch_of([0, 1], [0, 1])], 1)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_step_with_a_non_finite_gradient_is_skipped(make_brain, caplog):
    brain, good, bad = make_brain(), batch_of([0, 1], [0, 1]), batch_of([2, 3], [0, 1])
    bad.wavs[0, 0] = torch.nan
    weights = take_steps(brain, [good, bad, good])
    assert brain.skipped_steps == 1 and "not finite" in caplog.text
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    # Momentum and weight decay were not applied either: the steps equal those without the bad batch.
    assert torch.equal(take_steps(make_brain(), [good, good])[-1], weights[2])


@pytest.fixture
def scaled_brain(make_brain, monkeypatch):
    """A brain with scaled losses, as in fp16 on a GPU; factors that are powers of two cause no rounding."""

    def make(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "GradScaler", lambda device, enabled: torch.amp.GradScaler("cpu"))
            return make_brain(**arguments)

    return make


def test_scaled_losses_give_the_same_steps(make_brain, scaled_brain):
    weights = []
    for make in (make_brain, scaled_brain):
        brain = make(max_grad_norm=0.01, checkpoints=False)
        brain.grad_accumulation_factor = 2
        take_steps(brain, [batch_of([0, 1, 2], [0, 1, 0]), batch_of([3, 4], [1, 0])] * 2)
        weights.append([parameter.detach().clone() for parameter in brain.modules.parameters()])
    assert brain.scaler.is_enabled()
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_a_non_finite_scaled_gradient_skips_the_step_and_halves_the_scale(scaled_brain):
    brain = scaled_brain(checkpoints=False)
    # Chosen for a sum over clips; PyTorch's default is for a mean.
    assert brain.scaler.get_scale() == 4096
    spoilt = batch_of([0, 1], [0, 1])
    spoilt.wavs[0, 0] = torch.inf
    before = [parameter.detach().clone() for parameter in brain.modules.parameters()]
    take_steps(brain, [spoilt])
    assert all(torch.equal(*pair) for pair in zip(before, brain.modules.parameters(), strict=True))
    assert (brain.skipped_steps, brain.scaler.get_scale()) == (1, 2048)
    take_steps(brain, [batch_of([0, 1], [0, 1])])
    assert not any(torch.equal(*pair) for pair in zip(before, brain.modules.parameters(), strict=True))


def test_too_many_non_finite_gradients_in_a_row_are_an_error(make_brain):
    bad = batch_of([0, 1], [0, 1])
    bad.wavs[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="the last 3 steps up to step 3 were not finite") as caught:
        take_steps(make_brain(run_opts={"nonfinite_patience": 2}), [bad] * 9)
    assert "lr_encoder" in str(caught.value)


def test_encoder_and_head_have_their_own_learning_rates(make_brain, loader):
    brain = make_brain(epochs=1)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    encoder = {id(p) for p in brain.modules.model.encoder_parameters()}
    rates = {id(p): group["lr"] for group in brain.optimizer.param_groups for p in group["params"]}
    assert {rates[i] for i in rates if i in encoder} == {0.01}
    assert {rates[i] for i in rates if i not in encoder} == {0.1}
    assert len(rates) == len(list(brain.modules.parameters()))


def test_the_encoder_is_frozen_in_the_first_steps(make_brain, loader):
    brain, train = make_brain(epochs=1, freeze_encoder_steps=2), loader(0.3)
    weights, fit_batch = [], brain.fit_batch

    def watched(batch):
        weights.append(brain.modules.model.wav2vec2.model.weight.detach().clone())
        return fit_batch(batch)

    brain.fit_batch = watched
    brain.fit(brain.hparams.epoch_counter, train, loader())
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    "progress, warmup, decay, factor",
    [(0.05, 0.1, "none", 0.5), (0.5, 0.0, "linear", 0.5), (0.5, 0.0, "cosine", 0.5), (1.0, 0.1, "cosine", 0.0),
     (1.0, 1.0, "linear", 0.0), (0.9, 0.1, "none", 1.0), (0.25, 0.0, "cosine", 0.5 + 0.25 * 2**0.5)],
)  # fmt: skip
def test_learning_rate_factor_matches_hand_computed_values(progress, warmup, decay, factor):
    assert learning_rate_factor(progress, warmup, decay) == pytest.approx(factor)


def test_training_learns_and_keeps_the_best_epoch(make_brain, loader):
    brain = make_brain(epochs=30)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    history = read_history(brain.history_file)
    assert [row["epoch"] for row in history] == list(range(1, 31))
    best = max(row["valid_macro_f1"] for row in history)
    assert best > 0.9
    assert history[brain.best_epoch() - 1]["valid_macro_f1"] == best


@pytest.mark.parametrize("selection, better", [("loss", min), ("last", None)])
def test_the_epoch_can_be_selected_by_other_metrics(make_brain, loader, selection, better):
    brain = make_brain(epochs=4, selection=selection, lr_encoder=0.5, lr_head=0.5)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    history = read_history(brain.history_file)
    best = better(history, key=lambda row: row["valid_loss"]) if better else history[-1]
    assert brain.best_epoch() == best["epoch"]
    assert brain.predict(loader())[1].shape == (12, 2)


def test_validation_metrics_match_the_predictions(make_brain, loader):
    brain = make_brain(epochs=3, decay="linear")
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    ids, log_probabilities = brain.predict(loader())
    clips = {clip.id: clip for clip in loader().dataset.clips}
    truth = np.array(["ab".index(clips[name].accent) for name in ids])
    chosen = read_history(brain.history_file)[brain.best_epoch() - 1]
    assert -log_probabilities[np.arange(12), truth].mean() == pytest.approx(chosen["valid_loss"], abs=1e-6)


def test_training_stops_early_without_improvement(make_brain, loader):
    # With learning rates of zero all epochs have the same metric, which is no improvement.
    brain = make_brain(epochs=50, patience=2, lr_encoder=0.0, lr_head=1e-12)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    assert len(read_history(brain.history_file)) == 3


def test_non_finite_weights_are_an_error(make_brain, loader):
    brain = make_brain(epochs=1)
    with torch.no_grad():
        brain.modules.model.classifier.weight.fill_(torch.nan)
    brain.nonfinite_patience = 100
    with pytest.raises(TrainingError, match="validation loss of epoch 1 is not finite"):
        brain.fit(brain.hparams.epoch_counter, loader(), loader())


def test_two_runs_with_the_same_seed_are_equal(make_brain, loader, tmp_path):
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        brain = make_brain(epochs=2, checkpoints=False)
        brain.fit(brain.hparams.epoch_counter, loader(), loader())
        weights.append([p.clone() for p in brain.modules.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_training_and_evaluation_are_not_rounded_to_tf32(make_brain, loader, monkeypatch):
    brain, seen, forward = make_brain(epochs=1), [], TinyEncoder.forward

    def spied(self, *arguments):
        seen.append((self.training, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return forward(self, *arguments)

    monkeypatch.setattr(TinyEncoder, "forward", spied)
    brain.fit(brain.hparams.epoch_counter, loader())
    assert set(seen) == {(True, False, False)}
    seen.clear()
    brain.checkpointer = None
    brain.predict(loader())
    assert set(seen) == {(False, False, False)}


def test_bfloat16_trains_and_validation_stays_exact(make_brain, loader):
    brain, seen = make_brain(epochs=1, run_opts={"precision": "bf16"}), set()
    for part in (brain.modules.model.wav2vec2.model, brain.modules.model.classifier):
        part.register_forward_hook(lambda part, _, output: seen.add((part.training, output.dtype)))
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in brain.modules.parameters()} == {torch.float32}
    assert np.isfinite(read_history(brain.history_file)[0]["train_loss"])


def test_epochs_have_different_batches(make_brain, loader):
    brain, seen = make_brain(epochs=2), []
    compute_forward = brain.compute_forward

    def watched(batch, stage):
        if stage.name == "TRAIN":
            seen.append(batch.ids)
        return compute_forward(batch, stage)

    brain.compute_forward = watched
    train = loader(0.3)
    brain.fit(brain.hparams.epoch_counter, train, loader())
    half = len(seen) // 2
    assert sorted(map(sorted, seen[:half])) != sorted(map(sorted, seen[half:]))


def test_the_log_and_the_history_have_the_peak_memory(make_brain, loader):
    brain = make_brain(epochs=1)
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    (row,) = read_history(brain.history_file)
    # Python with torch uses some 300 MB.
    assert 1e8 < row["peak_memory_bytes"] < 1e11
    assert brain.options.train_logger.rows[0]["peak memory"] == f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"


def test_class_weights_follow_the_class_counts():
    from accent_plugin.training.loaders import make_class_weights

    clips = [SimpleNamespace(accent=accent) for accent in "aaab"]
    dataset = ClipDataset(clips, ["a", "b"])
    assert torch.allclose(make_class_weights("balanced", dataset), torch.tensor([2 / 3, 2.0]))
    assert make_class_weights([1, 3], dataset).tolist() == [1.0, 3.0]
    assert make_class_weights(None, dataset) is None


# Clips that cannot be read


def spoil(loader, *numbers):
    for number in numbers:
        with open(loader.dataset.clips[number].wav, "wb"):
            pass


def test_unreadable_training_clips_are_skipped_and_counted(make_brain, loader):
    brain, train, valid = make_brain(epochs=1, max_unreadable_share=0.5), loader(), loader()
    valid.dataset.clips = valid.dataset.clips[4:]
    valid.batch_sampler.seconds = valid.dataset.seconds()
    spoil(train, 0, 3)
    brain.fit(brain.hparams.epoch_counter, train, valid)
    (row,) = read_history(brain.history_file)
    assert row["clips_not_read"] == 2 and row["steps_left_out"] == 0
    assert brain.options.train_logger.rows[0]["clips not read"] == 2


def test_too_many_unreadable_clips_are_an_error_and_the_last_checkpoint_is_usable(make_brain, loader):
    brain, train = make_brain(epochs=1), loader()
    brain.fit(brain.hparams.epoch_counter, train, loader())
    spoil(train, *range(6))
    brain = make_brain(epochs=2)
    with pytest.raises(
        DataError, match=r"more than max_unreadable_fraction \(0.05\) allows; the first is c\d+: "
    ) as caught:
        brain.fit(brain.hparams.epoch_counter, train, loader())
    assert "prepare the data again" in str(caught.value)
    assert make_brain().best_epoch() == 1


@pytest.mark.parametrize("stage", ["validation", "evaluate"])
def test_a_split_of_unreadable_clips_is_an_error(make_brain, loader, stage):
    brain, train = make_brain(epochs=1, max_unreadable_share=1.0), loader()
    if stage == "evaluate":
        brain.fit(brain.hparams.epoch_counter, train, loader())
    spoil(train, *range(12))
    with pytest.raises(DataError, match=f"all clips .*{stage}.* unreadable"):
        brain.predict(loader()) if stage == "evaluate" else brain.fit(brain.hparams.epoch_counter, train, loader())


def test_a_batch_that_is_not_finite_is_counted_in_the_history(make_brain, loader):
    brain, count = make_brain(epochs=1), 0
    compute_forward = brain.compute_forward

    def spoilt(batch, stage):
        nonlocal count
        count += stage.name == "TRAIN"
        return compute_forward(batch, stage) * (torch.nan if stage.name == "TRAIN" and count == 2 else 1.0)

    brain.compute_forward = spoilt
    brain.fit(brain.hparams.epoch_counter, loader(), loader())
    (row,) = read_history(brain.history_file)
    assert row["steps_left_out"] == 1 and np.isfinite(row["train_loss"])
    assert brain.options.train_logger.rows[0]["steps left out"] == 1


def test_a_restart_keeps_the_early_stopping_counter(make_brain, loader):
    still = {"patience": 2, "lr_encoder": 0.0, "lr_head": 1e-12}
    for epochs in (2, 50, 50):
        # Each run starts at the end of an epoch; the last one after training has already stopped.
        brain = make_brain(epochs=epochs, **still)
        brain.fit(brain.hparams.epoch_counter, loader(), loader())
    assert len(read_history(brain.history_file)) == 3
