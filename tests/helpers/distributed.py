"""What each of several processes does in `test_processes.py`, which does the same in one process to compare.

    torchrun --nproc_per_node=2 helpers/distributed.py PLAN

PLAN is a JSON file: `checks` names a folder for the results of `check_all`, `recipe` holds a command line of the
recipe and `recipes` several, `losses` names a file for the loss of each of its steps, and `dies` says which process
ends where, and how.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from speechbrain.utils.run_opts import RunOptions

from accent_plugin.audio import codecs
from accent_plugin.data.manifests import Clip
from accent_plugin.errors import AccentPluginError, ConfigError, DataError
from accent_plugin.model import AccentModel
from accent_plugin.training import distributed
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.brain import AccentBrain
from accent_plugin.training.checkpoints import AtomicCheckpointer
from accent_plugin.training.loaders import LoadingOptions, whole_clips
from accent_plugin.training.options import TrainingOptions, make_epoch_counter

RECIPE = Path(__file__).resolve().parents[2] / "recipes/CommonVoiceAccent"
CLIPS, EPOCHS = 15, 3

# Name of a check -> clips whose files are broken, batches of a step in one process, and hyperparameters.
CHECKS = {
    "plain": {},
    "class weights": {"class_weights": [3.0, 0.5]},
    "encoder held still": {"freeze_encoder_steps": 3},
    "longer windows": {"window": 4},
    "unreadable": {"broken": (3, 7), "max_unreadable_share": 0.2},
    "unreadable in longer windows": {"broken": (0, 3, 6), "max_unreadable_share": 0.3, "window": 4},
    "nothing but unreadable": {"broken": range(CLIPS), "max_unreadable_share": 1.0, "epochs": 1, "validate": False},
    "another dropout in each process": {"dropout": 0.5, "epochs": 1},
}


class TinyEncoder(torch.nn.Module):
    """Stands in for an encoder: one frame per 400 samples, which a linear layer maps to 3 features; with a buffer."""

    width, detached = 3, False

    def __init__(self, dropout=0.0):
        super().__init__()
        self.model = torch.nn.Linear(400, 3)
        self.dropout = torch.nn.Dropout(dropout)
        self.register_buffer("scale", torch.ones(()))
        self.config = None

    def forward(self, wavs, wav_lens=None):
        frames = wavs.unfold(1, 400, 400)
        lens = torch.ones(len(wavs)) if wav_lens is None else wav_lens
        valid = torch.arange(frames.shape[1]) < (lens[:, None] * frames.shape[1]).round()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return self.dropout(self.model(frames) * self.scale), valid


class Logger:
    """Keeps what it is given."""

    def __init__(self):
        self.rows = []

    def log_stats(self, meta, **stats):
        self.rows.append({**meta, **stats})


class RecordingBrain(AccentBrain):
    """Keeps the clips of each batch, and the gradients with which the optimizer steps."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.batches, self.gradients = [], []

    def init_optimizers(self):
        super().init_optimizers()
        step = self.optimizer.step

        def recorded(*arguments, **keywords):
            named = self._model().named_parameters()
            self.gradients.append({name: p.grad.tolist() for name, p in named if p.grad is not None})
            return step(*arguments, **keywords)

        self.optimizer.step = recorded

    def fit_batch(self, batch):
        self.batches.append(list(batch.ids))
        return super().fit_batch(batch)


def write_clips(folder, broken=()):
    """Clips of two classes that differ in loudness and length; of the broken ones the file is missing."""
    rng, clips = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for number in range(CLIPS):
        path, samples = folder / f"{number}.flac", 1600 + 400 * (number % 4)
        if number not in broken:
            codecs.write(path, rng.uniform(0, 0.9 if number % 2 else 0.1, samples).astype(np.float32))
        clips.append(Clip(f"c{number:02d}", samples / 16000, str(path), "ab"[number % 2], f"s{number}", "", ""))
    return tuple(clips)


def make_brain(folder, class_weights=None, epochs=EPOCHS, dropout=0.0, **changes):
    """A brain with a tiny model, the same in every process but for a seed that they must not keep apart."""
    torch.manual_seed(distributed.rank())
    model, counter = AccentModel(TinyEncoder(dropout), ["a", "b"], dropout=dropout), make_epoch_counter(epochs, 0)
    if not distributed.rank():
        torch.manual_seed(0)
        model = AccentModel(TinyEncoder(dropout), ["a", "b"], dropout=dropout)
    options = {
        "lr_encoder": 0.01,
        "lr_head": 0.1,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "decay": "linear",
        "freeze_encoder_steps": 0,
        "label_smoothing": 0.1,
        "selection": "macro_f1",
        "train_logger": Logger(),
        "max_unreadable_share": 0.0,
    }
    options |= {key: value for key, value in changes.items() if key in options}
    hparams = {"epoch_counter": counter, "max_grad_norm": 1e9}
    run_opts = {"device": "cpu", "noprogressbar": True, "distributed_backend": "gloo"}
    run_opts["distributed_launch"] = distributed.is_launched()
    run_opts["grad_accumulation_factor"] = changes.get("window", 2) // distributed.world_size()
    (folder / "save").mkdir(parents=True, exist_ok=True)
    return RecordingBrain(
        modules={"model": model},
        options=TrainingOptions(**options),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=AtomicCheckpointer(folder / "save", {"model": model, "counter": counter}),
        class_weights=None if class_weights is None else torch.tensor(class_weights),
        history_file=folder / "history.json",
    )


def check(folder, broken=(), validate=True, **changes):
    """Train and validate; return what this process has seen."""
    clips = distributed.broadcast_from_main(write_clips, folder / "clips", broken)
    brain = make_brain(folder, **changes)
    dataset = ClipDataset(clips, ["a", "b"])
    share = {"rank": distributed.rank(), "processes": distributed.world_size()}
    train = make_loader(dataset, BucketBatchSampler(dataset.seconds(), 0.3, seed=1, **share))
    # SpeechBrain's loop over epochs, with or without the stage after each.
    options = LoadingOptions(["a", "b"], 0, "none", 0.15, None, None, 0)
    brain.fit(brain.hparams.epoch_counter, train, whole_clips(clips, options) if validate else None)
    seen = {"batches": brain.batches, "gradients": brain.gradients, "logged": brain.options.train_logger.rows}
    if validate:
        seen["ids"], scores = brain.predict(whole_clips(clips, options))
        seen["scores"] = scores.tolist()
    seen["draw"] = torch.rand(()).item()
    return seen


def check_exchange():
    """What the functions of `processes` give, and how an error of the first process ends the others."""

    def fail():
        raise ConfigError("said once")

    own = distributed.rank()
    seen = {
        "total": distributed.all_reduce_sum([1, own]),
        "gather": distributed.all_gather({"rank": own}),
        "from_main": distributed.broadcast_from_main(lambda: f"by {own}"),
    }
    try:
        distributed.broadcast_from_main(fail)
    except SystemExit as error:
        seen["end"] = f"exit {error.code}"
    except ConfigError as error:
        seen["end"] = str(error)
    return seen


def check_too_many(folder):
    """The error of a training in which every process loses fewer clips than all may, and all together more."""
    try:
        check(folder, broken=(1, 4, 7, 10), max_unreadable_share=0.2)
    except SystemExit as error:
        return f"exit {error.code}"
    except DataError as error:
        return str(error)


def check_all(folder):
    """Every check, with the results of this process in `<folder>/<its rank>.json`."""
    seen = {name: check(folder / name, **changes) for name, changes in CHECKS.items()}
    seen |= {"exchange": check_exchange(), "too many": check_too_many(folder / "too many")}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(seen), encoding="utf-8")


@contextlib.contextmanager
def watched(losses=None, dies=None):
    """Write down the loss of each step, over all processes, and let a process die before a step.

    `dies` holds `rank`, `step`, `how` (kill, exit, error or stop) and `marker`, a file that is there once it has been.
    """
    original, count, sums, found = AccentBrain.optimizers_step, AccentBrain._count, [0.0, 0.0], []

    def counted(self, loss, weight):
        sums[:] = sums[0] + float(loss), sums[1] + weight
        count(self, loss, weight)

    def step(self):
        if dies and (distributed.rank(), self.optimizer_step) == (dies["rank"], dies["step"]):
            if not Path(dies["marker"]).exists():
                Path(dies["marker"]).touch()
                _die(dies["how"])
        loss, weight = distributed.all_reduce_sum(sums)
        found.append(loss / weight)
        sums[:] = 0.0, 0.0
        original(self)
        if losses and distributed.is_main():
            Path(losses).write_text(json.dumps(found), encoding="utf-8")

    AccentBrain.optimizers_step, AccentBrain._count = step, counted
    try:
        yield
    finally:
        AccentBrain.optimizers_step, AccentBrain._count = original, count


def _die(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(17)
    elif how == "error":
        raise AccentPluginError("this process has a problem of its own")
    elif how == "stop":
        # What a cluster sends to torchrun.
        os.kill(os.getppid(), signal.SIGTERM)


def recipe(argv):
    """Exit code of the recipe's main."""
    spec = importlib.util.spec_from_file_location("accent_recipe", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # As in helpers/recipe.py, which a script beside it cannot import.
    with mock.patch("speechbrain.utils.logger.get_environment_description", lambda: "not described in tests"):
        return module.main(argv)


def recipes(lines):
    """Several command lines one after the other, between which the processes do not part."""
    original, distributed.stop = distributed.stop, lambda: None
    try:
        return max(recipe(argv) for argv in lines)
    finally:
        distributed.stop = original


def main(plan):
    os.chdir(RECIPE)
    sys.path.insert(0, str(RECIPE))
    if "recipes" in plan:
        return recipes(plan["recipes"])
    if "checks" in plan:
        distributed.start(RunOptions(device="cpu"))
        check_all(Path(plan["checks"]))
    if "recipe" not in plan:
        return 0
    with watched(plan.get("losses"), plan.get("dies")):
        return recipe(plan["recipe"])


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
