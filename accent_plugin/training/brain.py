"""AccentBrain: SpeechBrain's training loop for an `AccentModel`."""

import json
import logging
import math
import signal
import time
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import MainProcessContext

from accent_plugin import devices, files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import CheckpointError, DataError, TrainingError
from accent_plugin.evaluation.scores import confusion_matrix, macro_f1, unweighted_average_recall
from accent_plugin.training import distributed, signals
from accent_plugin.training.checkpoints import NEWEST
from accent_plugin.training.options import (
    SELECTIONS,
    decayed_parameters,
    learning_rate_factor,
    mix_seed,
    own_sums,
    read_history,
    undecayed_parameters,
)
from accent_plugin.training.state import TrainingState

logger = logging.getLogger(__name__)


_DOING = {sb.Stage.TRAIN: "training", sb.Stage.VALID: "validating", sb.Stage.TEST: "evaluating"}


# Steps between two looks at what is counted on the device: each look waits for a GPU.
CHECK_EVERY = 20


# A GradScaler begins too high. PyTorch's own 2^16 is for a mean of losses; here they are added up, of some 16 clips.
_FIRST_SCALE = 2.0**12


# It halves as often as this before its scale, which may have grown, is 1.
_SCALER_HALVINGS = 16


# After an error of the data.
_AGAIN = "prepare the data again, and run the same command: it goes on from the last checkpoint"


class AccentBrain(sb.Brain):
    """Trains and applies an accent classifier.

    `modules` holds one `model`, an `accent_plugin.model.AccentModel`. Read from `hparams`: `epoch_counter`, and
    SpeechBrain's run options.

    What is random about a step is the dropout alone; its generators are part of a checkpoint, and so is the place in
    the epoch. A restart thus goes on as if nothing had happened, on the CPU to the last bit.

    Arguments
    ---------
    options : TrainingOptions
    class_weights : (classes,) torch.Tensor
        Weight of each class in the training loss; None for ones.
    history_file : str or Path
        Where the figures of each epoch are kept, as JSON, for the training curves.
    **arguments
        Of speechbrain.Brain.

    Attributes
    ----------
    skipped_steps : int
        Steps that were left out because their gradient was not finite; as of the last look.
    unread : dict
        Stage -> {id of a clip that could not be read: why}.
    """

    def __init__(self, *arguments, options, class_weights=None, history_file=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.options = options
        self._weights = None if class_weights is None else class_weights.cpu()
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.history_file = None if history_file is None else Path(history_file)
        self.skipped_steps = 0
        self.unread, self._clips = {stage: {} for stage in sb.Stage}, {}
        self._window, self._pending = 0.0, signals.Pending()
        # SpeechBrain would save between two batches of one step, where the gradient is not part of a checkpoint.
        self._every_minutes, self._every_steps = self.ckpt_interval_minutes, self.ckpt_interval_steps
        self.ckpt_interval_minutes = self.ckpt_interval_steps = 0
        self._since, self._saved_at = 0, time.monotonic()
        self.position = TrainingState()
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("position", self.position, optional_load=True)
        self._reset_sums()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": _FIRST_SCALE})

    # Forward and loss

    def compute_forward(self, batch, stage):
        """Log-probabilities (batch, classes) of a `Batch`."""
        batch = batch.to(self.device)
        # Outside training the processes need not see equally many batches, which a wrapped model would wait for.
        model = self.modules.model if stage == sb.Stage.TRAIN else self._model()
        return model(batch.wavs, batch.wav_lens, batch.pooled_states)

    def _model(self):
        """The `AccentModel`, without what distributes it."""
        return getattr(self.modules.model, "module", self.modules.model)

    def compute_objectives(self, predictions, batch, stage):
        """In training the sum of the clips' weighted losses; in evaluation their mean, and predictions are kept."""
        labels = batch.labels.to(self.device, non_blocking=True)
        if stage == sb.Stage.TRAIN:
            smoothing = self.options.label_smoothing
            return torch.nn.functional.cross_entropy(
                predictions.float(), labels, weight=self.class_weights, label_smoothing=smoothing, reduction="none"
            ).sum()
        self._ids.extend(batch.ids)
        self._labels.append(batch.labels.cpu().numpy())
        self._log_probabilities.append(predictions.detach().float().cpu().numpy())
        return torch.nn.functional.nll_loss(predictions.float(), labels)

    # Training

    @devices.exact_fp32()
    def fit(self, epoch_counter, train_set, valid_set=None, **keywords):
        """Train; `train_set` and `valid_set` are loaders whose batch sampler is a `BucketBatchSampler`.

        Raises
        ------
        accent_plugin.training.signals.Interrupted
            After SIGTERM or SIGINT, when the step is finished and saved.
        TrainingError
            When steps have no finite gradient again and again.
        DataError
            When too many clips cannot be read.
        """
        # Brain calls its set_epoch: without this the batches of every epoch would be the same.
        self.train_sampler = train_set.batch_sampler
        self._epochs = epoch_counter.limit
        self._clips = {sb.Stage.TRAIN: _clips_in(train_set), sb.Stage.VALID: _clips_in(valid_set)}
        if torch.device(self.device).type == "cuda":
            # Or the runs before this one, of other folds or seeds, would count.
            torch.cuda.reset_peak_memory_stats(self.device)
        if distributed.world_size() > 1:
            # The weights are those of the first process, see DistributedDataParallel; the dropout is each one's own.
            seed = mix_seed(torch.initial_seed(), distributed.rank())
            torch.manual_seed(seed)
            # For SpecAugment, where a configuration has it.
            np.random.seed(seed % 2**32)
            self.find_unused_parameters |= self._leaves_parameters_out()
        self._saved_at = time.monotonic()
        with signals.defer_signals() as self._pending:
            super().fit(epoch_counter, train_set, valid_set, **keywords)
            # After the last step nobody else looks.
            if any(distributed.all_reduce_sum([bool(self._pending)])):
                raise signals.Interrupted(self._pending.number or signal.SIGTERM)

    def on_fit_start(self):
        """Load the newest checkpoint; delete old ones, which a run that was killed in between has left."""
        super().on_fit_start()
        if self.checkpointer is not None:
            self._delete_old_checkpoints()

    def _leaves_parameters_out(self):
        """Whether some step leaves a trainable parameter without a gradient."""
        encoder = self._model().wav2vec2
        return bool(
            self.options.freeze_encoder_steps
            or getattr(encoder.config, "layerdrop", 0)
            or getattr(encoder.config, "encoder_layerdrop", 0)
            or getattr(encoder, "layer_weights", None) is not None
        )

    def init_optimizers(self):
        """One AdamW with a group for the pretrained encoder and one for what starts from nothing: head and adapters."""
        model = self._model()
        groups = [
            {"params": decayed_parameters(model.encoder_parameters()), "peak": self.options.lr_encoder},
            {
                "params": undecayed_parameters(model.encoder_parameters()),
                "peak": self.options.lr_encoder,
                "weight_decay": 0.0,
            },
            {"params": decayed_parameters(model.head_parameters()), "peak": self.options.lr_head},
            {
                "params": undecayed_parameters(model.head_parameters()),
                "peak": self.options.lr_head,
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        # The fused one leaves a step out by itself where it is told to, without anybody looking at the gradient.
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=self.options.weight_decay, fused=True)
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def fit_batch(self, batch):
        """One batch; a step every `grad_accumulation_factor` batches and at the end of the epoch.

        The gradient of a step is that of the weighted mean over all its clips, however they were spread over batches
        and processes.
        """
        steps = len(self.train_sampler)
        should_step = self.step % self.grad_accumulation_factor == 0 or self.step == steps
        self._freeze_encoder(self.optimizer_step < self.options.freeze_encoder_steps)
        self._note_unread(batch, sb.Stage.TRAIN)
        weight = float(len(batch) if self._weights is None else self._weights[batch.labels].sum())
        with self.no_sync(not should_step):
            with self.training_ctx:
                loss = self._summed_loss(batch, should_step)
            if loss is not None:
                self.scaler.scale(loss).backward()
                self._count(loss.detach(), weight)
        self._window += weight
        if should_step:
            windows = math.ceil(steps / self.grad_accumulation_factor)
            done = math.ceil(self.step / self.grad_accumulation_factor)
            self._set_learning_rates((self.train_sampler.epoch - 1 + done / windows) / self._epochs)
            self.optimizers_step()
        return torch.zeros(()) if loss is None else loss.detach() / (weight or 1.0)

    def _summed_loss(self, batch, should_step):
        """Weighted sum of the losses of a batch's clips; None where it has none and nobody waits for its gradient."""
        if len(batch):
            predictions = self.compute_forward(batch, sb.Stage.TRAIN)
            return self.compute_objectives(predictions, batch, sb.Stage.TRAIN)
        if distributed.world_size() == 1 or not should_step:
            return None
        # The other processes exchange gradients: one of zeros is this one's part.
        tone = torch.linspace(0, 100, SAMPLE_RATE, device=self.device).sin()[None]
        return (self.modules.model(tone) * 0.0).sum()

    def _set_learning_rates(self, progress):
        # A function of progress alone: nothing to save, and right after a restart.
        factor = learning_rate_factor(progress, self.options.warmup, self.options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _freeze_encoder(self, frozen):
        """Hold the encoder still while the head, drawn at random, still sends it noise."""
        encoder = self._model().wav2vec2
        if frozen == encoder.detached:
            return
        encoder.detached = frozen
        logger.info("encoder %s at step %d", "held still" if frozen else "released", self.optimizer_step)

    def optimizers_step(self):
        """Scale to the mean over the clips of all processes, clip over all parameters together, step, and start anew.

        A step whose gradient is not finite is left out and counted. Afterwards a checkpoint is written where one is
        due, or where somebody asked for the end.
        """
        weight, stop, due = distributed.all_reduce_sum([self._window, bool(self._pending), self._is_due()])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Without a single clip that could be read there is nothing to learn, but decay and momentum would move.
        if weight and parameters:
            self.scaler.unscale_(self.optimizer)
            # Exchanged gradients are means over the processes.
            torch._foreach_mul_([parameter.grad for parameter in parameters], distributed.world_size() / weight)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            spoilt = (~torch.isfinite(norm)).float()
            if not self.scaler.is_enabled():
                self.optimizer.grad_scale, self.optimizer.found_inf = None, spoilt
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._sums[2] += spoilt
            self._sums[3] = (self._sums[3] + 1) * spoilt
        self.optimizer.zero_grad(set_to_none=True)
        self._window = 0.0
        self.optimizer_step += 1
        self._since += 1
        self._look_for_trouble()
        if stop or due:
            self._save_within_epoch(self.step, self._sums.tolist())
        if stop:
            raise signals.Interrupted(self._pending.number or signal.SIGTERM)

    # What is counted

    def _reset_sums(self, sums=(0.0, 0.0, 0.0, 0.0)):
        """Loss and weight of the epoch, steps left out in the run, and the last of them without a good one between."""
        exact = torch.float32 if torch.device(self.device).type == "mps" else torch.float64
        self._sums = torch.tensor(sums, dtype=exact, device=self.device)

    def _count(self, loss, weight):
        # A loss that is not finite spoils its step alone, not the epoch's mean.
        counts = torch.isfinite(loss)
        self._sums[0] += torch.where(counts, loss, 0.0)
        self._sums[1] += counts * weight

    def _look_for_trouble(self):
        """Warn of steps that were left out, and stop where there is no end of them."""
        if torch.device(self.device).type != "cpu" and self.optimizer_step % CHECK_EVERY:
            return
        skipped, in_a_row = (int(value) for value in self._sums[2:].tolist())
        if skipped > self.skipped_steps:
            logger.warning("steps left out because their gradient was not finite: %d", skipped)
        self.skipped_steps = skipped
        if in_a_row > self.nonfinite_patience + (_SCALER_HALVINGS if self.scaler.is_enabled() else 0):
            raise TrainingError(
                f"the gradients of the last {in_a_row} steps, to step {self.optimizer_step}, were not finite: training "
                "diverges, or the audio is spoilt\nthe last checkpoint is good: lower lr_encoder and lr_head or train "
                "in fp32, in another output_folder; --nonfinite_patience says how many such steps are borne"
            )

    def update_average(self, loss, avg_loss):
        """Mean loss of the epoch so far, for the progress bar: looked at now and then, as that waits for a GPU."""
        if self.step % CHECK_EVERY != 1:
            return avg_loss
        loss, weight = self._sums[:2].tolist()
        return loss / weight if weight else 0.0

    def _note_unread(self, batch, stage):
        """Count clips that could not be read, name them once, and stop when they are too many."""
        unread = self.unread[stage]
        for name, why in batch.lost:
            if name not in unread:
                logger.warning("clip %s is left out: %s", name, why)
            unread[name] = why
        self._limit_unread(stage)

    def _limit_unread(self, stage):
        unread, clips, share = self.unread[stage], self._clips.get(stage, 0), self.options.max_unreadable_share
        if unread and len(unread) > (max(1.0, share * clips) if share else 0):
            name, why = next(iter(unread.items()))
            raise DataError(
                f"{len(unread)} of {clips} clips cannot be read while {_DOING[stage]}, more than max_unreadable_share "
                f"({share:g}) allows; the first: {name}: {why}\n{_AGAIN}"
            )

    def _share_unread(self, stage):
        """Let every process know what the others could not read; in another epoch the same clips are dealt anew."""
        parts = distributed.all_gather(self.unread[stage])
        self.unread[stage] = {name: why for part in parts for name, why in part.items()}
        distributed.broadcast_from_main(self._limit_unread, stage)

    # Checkpoints

    def _is_due(self):
        """Whether it is time for a checkpoint; the first process's clock counts."""
        if not distributed.is_main() or self.checkpointer is None:
            return False
        if self._every_steps:
            # With the step that is being taken.
            return self._since + 1 >= self._every_steps
        return 0 < self._every_minutes * 60 <= time.monotonic() - self._saved_at

    def _save_within_epoch(self, step, sums):
        if self.checkpointer is not None:
            self._write_checkpoint(step, sums, end_of_epoch=False)

    def _write_checkpoint(self, step, sums, meta=None, end_of_epoch=True):
        self.position.capture(step, {"sums": distributed.all_gather(sums)})
        self.checkpointer.save_checkpoint(meta, end_of_epoch)
        self._delete_old_checkpoints()
        self._since, self._saved_at = 0, time.monotonic()

    def _delete_old_checkpoints(self):
        best = self.checkpointer.find_checkpoint(**SELECTIONS[self.options.selection])
        self.checkpointer.delete_checkpoints(
            num_to_keep=NEWEST, ckpt_predicate=lambda one: best is None or one.path != best.path
        )

    # Stages

    def on_stage_start(self, stage, epoch=None):
        """Forget the predictions of the stage before; go to the place in the epoch where a checkpoint left it."""
        self._ids, self._labels, self._log_probabilities = [], [], []
        self._window = 0.0
        if stage == sb.Stage.TRAIN:
            self.step = self.train_sampler.start = self.position.step
            if "sums" in self.position.figures:
                self._reset_sums(own_sums(self.position.figures["sums"]))
            self.skipped_steps = int(self._sums[2])

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Keep the training loss; after validation log, choose and save."""
        self._share_unread(stage)
        if stage == sb.Stage.TRAIN:
            sums = self._sums.tolist()
            loss, weight = distributed.all_reduce_sum(sums[:2])
            self.train_loss = loss / weight if weight else math.nan
            self._trained = (len(self.train_sampler), sums)
            self.position.step, self.position.figures = 0, {"sums": [[0.0, 0.0, *sums[2:]]] * distributed.world_size()}
        elif stage == sb.Stage.VALID:
            self._finish_epoch(epoch)

    def evaluate_batch(self, batch, stage):
        """Score one batch; between two of them training can be asked to end."""
        if stage == sb.Stage.VALID and any(distributed.all_reduce_sum([bool(self._pending)])):
            self._save_within_epoch(*self._trained)
            raise signals.Interrupted(self._pending.number or signal.SIGTERM)
        self._note_unread(batch, stage)
        return super().evaluate_batch(batch, stage) if len(batch) else torch.zeros(())

    def _predictions(self):
        """Ids, labels and log-probabilities of a stage from all processes, sorted by id."""
        classes = len(self._model().classifier.bias)
        own = (
            self._ids,
            np.concatenate([np.zeros(0, dtype=np.int64), *self._labels]),
            np.concatenate([np.zeros((0, classes), dtype=np.float32), *self._log_probabilities]),
        )
        ids, labels, log_probabilities = zip(*distributed.all_gather(own), strict=True)
        ids = [name for part in ids for name in part]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        return [ids[place] for place in order], np.concatenate(labels)[order], np.concatenate(log_probabilities)[order]

    def _finish_epoch(self, epoch):
        _, labels, log_probabilities = self._predictions()
        if not len(labels):
            raise DataError("no clip of the validation split could be read\n" + _AGAIN)
        confusion = confusion_matrix(labels, log_probabilities.argmax(axis=1), log_probabilities.shape[1])
        figures = {
            "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
            "macro_f1": float(macro_f1(confusion)),
            "uar": float(unweighted_average_recall(confusion)),
        }
        if not np.isfinite(figures["loss"]):
            raise TrainingError(
                f"the validation loss of epoch {epoch} is not finite: the weights are spoilt; "
                "start again in another output_folder with smaller lr_encoder and lr_head, or in fp32"
            )
        rates = {group["peak"]: group["lr"] for group in self.optimizer.param_groups}
        memory = devices.peak_memory(self.device)
        stats = {"epoch": epoch, **{f"lr {peak:g}": rate for peak, rate in rates.items()}}
        stats["peak memory"] = "not known" if memory is None else f"{memory / 2**20:.0f} MiB"
        unread = len(self.unread[sb.Stage.TRAIN]) + len(self.unread[sb.Stage.VALID])
        counted = {"steps left out": int(self._trained[1][2]), "clips not read": unread}
        stats |= {name: number for name, number in counted.items() if number}
        self.options.train_logger.log_stats(stats, train_stats={"loss": self.train_loss}, valid_stats=figures)
        if self.options.tensorboard_logger is not None:
            # The others have none, and would not hear that it is done.
            with MainProcessContext():
                self.options.tensorboard_logger.log_stats(
                    {"epoch": epoch}, train_stats={"loss": self.train_loss}, valid_stats=figures
                )
        if distributed.is_main():
            self._remember(epoch, figures, memory, counted)
        if hasattr(self.hparams.epoch_counter, "update_metric"):
            # Before the checkpoint, which has to know of it.
            error = figures["loss"] if self.options.selection == "loss" else 1 - figures["macro_f1"]
            self.hparams.epoch_counter.update_metric(error)
        if self.checkpointer is not None:
            self._write_checkpoint(0, [0.0, 0.0, *self._trained[1][2:]], {**figures, "epoch": epoch})

    def _remember(self, epoch, figures, memory, counted):
        """Add the epoch to the history; a resumed run replaces what it does again."""
        if self.history_file is None:
            return
        history = [row for row in read_history(self.history_file) if row["epoch"] < epoch]
        row = {"epoch": epoch, "train_loss": self.train_loss, **{f"valid_{k}": v for k, v in figures.items()}}
        row |= {name.replace(" ", "_"): number for name, number in counted.items()}
        history.append({**row, "peak_memory_bytes": memory})
        with files.atomic_write(self.history_file) as file:
            json.dump(history, file, indent=1)

    # Evaluation

    @devices.exact_fp32()
    def predict(self, loader, progressbar=None):
        """Log-probabilities of the best epoch's model.

        Arguments
        ---------
        loader : torch.utils.data.DataLoader
        progressbar : bool
            None for SpeechBrain's own choice.

        Returns
        -------
        ids : tuple of str
            Of the clips of all processes, sorted; those that could not be read are not among them but in `unread`.
        log_probabilities : (clips, classes) np.ndarray of float64
        """
        self._clips[sb.Stage.TEST], self.unread[sb.Stage.TEST] = _clips_in(loader), {}
        if self.checkpointer is not None and self.best_epoch() is None:
            raise CheckpointError(
                f"{self.checkpointer.checkpoints_dir} holds no whole checkpoint of a finished epoch\n"
                "train first; what was damaged is named above"
            )
        self.evaluate(loader, **SELECTIONS[self.options.selection], progressbar=progressbar)
        ids, _, log_probabilities = self._predictions()
        if not ids:
            raise DataError("no clip that is to be evaluated could be read\n" + _AGAIN)
        return tuple(ids), log_probabilities.astype(np.float64)

    def best_epoch(self):
        """Number of the epoch that evaluation uses, or None where nothing was saved."""
        checkpoint = self.checkpointer.find_checkpoint(**SELECTIONS[self.options.selection])
        return None if checkpoint is None else checkpoint.meta["epoch"]


def _clips_in(loader):
    return len(getattr(loader, "dataset", None) or ())
