"""AccentBrain: SpeechBrain's training loop for an `AccentModel`."""

import logging
import math
import signal
import time
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import MainProcessContext

from accent_plugin import devices
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.errors import CheckpointError, DataError, TrainingError
from accent_plugin.evaluation.scores import confusion_matrix, macro_f1, unweighted_average_recall
from accent_plugin.training import distributed, signals
from accent_plugin.training.checkpoints import NEWEST
from accent_plugin.training.options import (
    SELECTIONS,
    add_to_history,
    learning_rate_factor,
    own_sums,
    parameter_groups,
)
from accent_plugin.training.state import TrainingState
from accent_plugin.training.unread import PREPARE_AGAIN, UnreadClips

logger = logging.getLogger(__name__)

# Steps between two reads of the counters on the device: each read synchronises with the GPU.
CHECK_EVERY = 20

# PyTorch's GradScaler starts at 2^16, for a mean of losses. Here the losses of some 16 clips are summed.
_FIRST_SCALE = 2.0**12

# Halvings that bring a scale that has grown to 2^16 back to 1.
_SCALER_HALVINGS = 16


class AccentBrain(sb.Brain):
    """Trains and applies an accent classifier.

    `modules` holds one `model`, an `accent_plugin.model.AccentModel`. `hparams` must hold `epoch_counter` and
    SpeechBrain's run options.

    Dropout is the only randomness in a step. Checkpoints hold its generators and the position in the epoch, so that a
    resumed run gives the same result as an uninterrupted one, on the CPU bit by bit.

    Arguments
    ---------
    options : TrainingOptions
    class_weights : (classes,) torch.Tensor
        Weight of each class in the training loss; None for equal weights.
    history_file : str or Path
        JSON file for the metrics of each epoch, from which the training curves are drawn.
    **arguments
        Passed to speechbrain.Brain.

    Attributes
    ----------
    skipped_steps : int
        Steps skipped because their gradient was not finite, as of the last read of the counters.
    unread : accent_plugin.training.unread.UnreadClips
        `unread[stage]` has the unreadable clips: {id: reason}.
    """

    def __init__(self, *arguments, options, class_weights=None, history_file=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.options = options
        self._weights = None if class_weights is None else class_weights.cpu()
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.history_file = None if history_file is None else Path(history_file)
        self.skipped_steps = 0
        self.unread = UnreadClips(options.max_unreadable_share)
        self._window, self._pending = 0.0, signals.Pending()
        # SpeechBrain would also save between two batches of one step, but checkpoints do not hold gradients.
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
        # Outside training the processes may have different numbers of batches; DistributedDataParallel would hang.
        model = self.modules.model if stage == sb.Stage.TRAIN else self._model()
        return model(batch.wavs, batch.wav_lens, batch.states, batch.frame_counts)

    def _model(self):
        """The `AccentModel`, without the DistributedDataParallel wrapper."""
        return getattr(self.modules.model, "module", self.modules.model)

    def compute_objectives(self, predictions, batch, stage):
        """Sum the clips' weighted losses in training; average them in evaluation, and store the predictions."""
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
            After SIGTERM or SIGINT, once the step is finished and saved.
        TrainingError
            If too many steps in a row have gradients that are not finite.
        DataError
            If too many clips are unreadable.
        """
        # Brain calls set_epoch on this attribute: without it every epoch would have the same batches.
        self.train_sampler = train_set.batch_sampler
        self._epochs = epoch_counter.limit
        self.unread.begin(sb.Stage.TRAIN, train_set)
        self.unread.begin(sb.Stage.VALID, valid_set)
        if torch.device(self.device).type == "cuda":
            # Otherwise earlier folds or seeds in this process would count.
            torch.cuda.reset_peak_memory_stats(self.device)
        if distributed.world_size() > 1:
            # DistributedDataParallel copies the weights of the first process; dropout must differ between processes.
            sequence = np.random.SeedSequence([torch.initial_seed(), distributed.rank()])
            seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
            torch.manual_seed(seed)
            # For SpecAugment, where a configuration has it.
            np.random.seed(seed % 2**32)
            self.find_unused_parameters |= self._leaves_parameters_out()
        self._saved_at = time.monotonic()
        with signals.defer_signals() as self._pending:
            super().fit(epoch_counter, train_set, valid_set, **keywords)
            # A signal after the last step has not been handled yet.
            if any(distributed.all_reduce_sum([bool(self._pending)])):
                raise signals.Interrupted(self._pending.number or signal.SIGTERM)

    def on_fit_start(self):
        """Load the newest checkpoint, and delete old ones that a killed run has left."""
        super().on_fit_start()
        if self.checkpointer is not None:
            self._delete_old_checkpoints()

    def _leaves_parameters_out(self):
        """Whether a trainable parameter has no gradient in some steps."""
        encoder = self._model().wav2vec2
        return bool(
            self.options.freeze_encoder_steps
            or getattr(encoder.config, "layerdrop", 0)
            or getattr(encoder.config, "encoder_layerdrop", 0)
            or getattr(encoder, "layer_weights", None) is not None
        )

    def init_optimizers(self):
        """Make one AdamW with parameter groups for the pretrained encoder, and for the head and adapters."""
        model = self._model()
        groups = parameter_groups(model.encoder_parameters(), self.options.lr_encoder)
        groups += parameter_groups(model.head_parameters(), self.options.lr_head)
        # The fused AdamW can skip a step on the device, without a synchronisation to check the gradient.
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=self.options.weight_decay, fused=True)
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def fit_batch(self, batch):
        """Process one batch; step every `grad_accumulation_factor` batches and at the end of the epoch.

        The gradient of a step is that of the weighted mean over all its clips, however they are distributed over
        batches and processes.
        """
        steps = len(self.train_sampler)
        should_step = self.step % self.grad_accumulation_factor == 0 or self.step == steps
        self._freeze_encoder(self.optimizer_step < self.options.freeze_encoder_steps)
        self.unread.note(batch, sb.Stage.TRAIN)
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
        """Weighted sum of a batch's losses; None if the batch is empty and no process waits for its gradient."""
        if len(batch):
            predictions = self.compute_forward(batch, sb.Stage.TRAIN)
            return self.compute_objectives(predictions, batch, sb.Stage.TRAIN)
        if distributed.world_size() == 1 or not should_step:
            return None
        # The other processes wait to exchange gradients: this one contributes zeros.
        tone = torch.linspace(0, 100, SAMPLE_RATE, device=self.device).sin()[None]
        return (self.modules.model(tone) * 0.0).sum()

    def _set_learning_rates(self, progress):
        # A function of progress alone, so that it needs no checkpoint.
        factor = learning_rate_factor(progress, self.options.warmup, self.options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _freeze_encoder(self, frozen):
        """Freeze the encoder during the first steps, while the gradients from the random head are noise."""
        encoder = self._model().wav2vec2
        if frozen == encoder.detached:
            return
        encoder.detached = frozen
        logger.info("encoder %s at step %d", "frozen" if frozen else "unfrozen", self.optimizer_step)

    def optimizers_step(self):
        """Average the gradients over the clips of all processes, clip their global norm, step and reset them.

        A step whose gradient is not finite is skipped and counted. Afterwards a checkpoint is written if one is due,
        or if a signal has arrived.
        """
        weight, stop, due = distributed.all_reduce_sum([self._window, bool(self._pending), self._is_due()])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A step without a readable clip has no gradient, but weight decay and momentum would still change the weights.
        if weight and parameters:
            self.scaler.unscale_(self.optimizer)
            # DistributedDataParallel averages gradients over the processes.
            torch._foreach_mul_([parameter.grad for parameter in parameters], distributed.world_size() / weight)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            not_finite = (~torch.isfinite(norm)).float()
            if not self.scaler.is_enabled():
                self.optimizer.grad_scale, self.optimizer.found_inf = None, not_finite
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._sums[2] += not_finite
            self._sums[3] = (self._sums[3] + 1) * not_finite
        self.optimizer.zero_grad(set_to_none=True)
        self._window = 0.0
        self.optimizer_step += 1
        self._since += 1
        self._check_for_skipped_steps()
        if stop or due:
            self._save_within_epoch(self.step, self._sums.tolist())
        if stop:
            raise signals.Interrupted(self._pending.number or signal.SIGTERM)

    # Counters

    def _reset_sums(self, sums=(0.0, 0.0, 0.0, 0.0)):
        """Set the epoch's loss and weight, the number of steps skipped in the run, and how many of them in a row."""
        exact = torch.float32 if torch.device(self.device).type == "mps" else torch.float64
        self._sums = torch.tensor(sums, dtype=exact, device=self.device)

    def _count(self, loss, weight):
        # A loss that is not finite invalidates its step only, not the epoch's mean.
        counts = torch.isfinite(loss)
        self._sums[0] += torch.where(counts, loss, 0.0)
        self._sums[1] += counts * weight

    def _check_for_skipped_steps(self):
        """Warn of skipped steps, and stop after too many in a row."""
        if torch.device(self.device).type != "cpu" and self.optimizer_step % CHECK_EVERY:
            return
        skipped, in_a_row = (int(value) for value in self._sums[2:].tolist())
        if skipped > self.skipped_steps:
            logger.warning("steps skipped because their gradient was not finite: %d", skipped)
        self.skipped_steps = skipped
        if in_a_row > self.nonfinite_patience + (_SCALER_HALVINGS if self.scaler.is_enabled() else 0):
            raise TrainingError(
                f"the gradients of the last {in_a_row} steps up to step {self.optimizer_step} were not finite: "
                "training diverges, or the audio is damaged\nthe last checkpoint is good: choose another "
                "output_folder, and lower lr_encoder and lr_head or train in fp32; --nonfinite_patience sets how many "
                "non-finite steps in a row are tolerated"
            )

    def update_average(self, loss, avg_loss):
        """Mean loss of the epoch, for the progress bar; updated every `CHECK_EVERY` steps: it synchronises a GPU."""
        if self.step % CHECK_EVERY != 1:
            return avg_loss
        loss, weight = self._sums[:2].tolist()
        return loss / weight if weight else 0.0

    # Checkpoints

    def _is_due(self):
        """Whether a checkpoint is due, by the clock of the first process."""
        if not distributed.is_main() or self.checkpointer is None:
            return False
        if self._every_steps:
            # + 1 for the step in progress.
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
        """Clear the predictions of the previous stage; in training, go to the checkpoint's position in the epoch."""
        self._ids, self._labels, self._log_probabilities = [], [], []
        self._window = 0.0
        if stage == sb.Stage.TRAIN:
            self.step = self.train_sampler.start = self.position.step
            if "sums" in self.position.figures:
                self._reset_sums(own_sums(self.position.figures["sums"]))
            self.skipped_steps = int(self._sums[2])

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Keep the training loss; after validation, log the metrics and save a checkpoint."""
        self.unread.share(stage)
        if stage == sb.Stage.TRAIN:
            sums = self._sums.tolist()
            loss, weight = distributed.all_reduce_sum(sums[:2])
            self.train_loss = loss / weight if weight else math.nan
            self._trained = (len(self.train_sampler), sums)
            self.position.step, self.position.figures = 0, {"sums": [[0.0, 0.0, *sums[2:]]] * distributed.world_size()}
        elif stage == sb.Stage.VALID:
            self._finish_epoch(epoch)

    def evaluate_batch(self, batch, stage):
        """Score one batch; a signal during validation ends training between two batches."""
        if stage == sb.Stage.VALID and any(distributed.all_reduce_sum([bool(self._pending)])):
            self._save_within_epoch(*self._trained)
            raise signals.Interrupted(self._pending.number or signal.SIGTERM)
        self.unread.note(batch, stage)
        return super().evaluate_batch(batch, stage) if len(batch) else torch.zeros(())

    def _predictions(self):
        """Ids, labels and log-probabilities of a stage, from all processes, sorted by id."""
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
            raise DataError("all clips of the validation split are unreadable\n" + PREPARE_AGAIN)
        confusion = confusion_matrix(labels, log_probabilities.argmax(axis=1), log_probabilities.shape[1])
        figures = {
            "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
            "macro_f1": float(macro_f1(confusion)),
            "uar": float(unweighted_average_recall(confusion)),
        }
        if not np.isfinite(figures["loss"]):
            raise TrainingError(
                f"the validation loss of epoch {epoch} is not finite: training has diverged; start again in another "
                "output_folder with smaller lr_encoder and lr_head, or in fp32"
            )
        rates = {group["peak"]: group["lr"] for group in self.optimizer.param_groups}
        memory = devices.peak_memory(self.device)
        stats = {"epoch": epoch, **{f"lr {peak:g}": rate for peak, rate in rates.items()}}
        stats["peak memory"] = "unknown" if memory is None else f"{memory / 2**20:.0f} MiB"
        unread = len(self.unread[sb.Stage.TRAIN]) + len(self.unread[sb.Stage.VALID])
        counted = {"steps left out": int(self._trained[1][2]), "clips not read": unread}
        stats |= {name: number for name, number in counted.items() if number}
        self.options.train_logger.log_stats(stats, train_stats={"loss": self.train_loss}, valid_stats=figures)
        if self.options.tensorboard_logger is not None:
            # SpeechBrain's logger writes in the main process only, and the other processes do not have one.
            with MainProcessContext():
                self.options.tensorboard_logger.log_stats(
                    {"epoch": epoch}, train_stats={"loss": self.train_loss}, valid_stats=figures
                )
        if distributed.is_main() and self.history_file is not None:
            row = {"epoch": epoch, "train_loss": self.train_loss, **{f"valid_{k}": v for k, v in figures.items()}}
            row |= {name.replace(" ", "_"): number for name, number in counted.items()}
            add_to_history(self.history_file, row | {"peak_memory_bytes": memory})
        if hasattr(self.hparams.epoch_counter, "update_metric"):
            # Before the checkpoint, which saves the counter.
            error = figures["loss"] if self.options.selection == "loss" else 1 - figures["macro_f1"]
            self.hparams.epoch_counter.update_metric(error)
        if self.checkpointer is not None:
            self._write_checkpoint(0, [0.0, 0.0, *self._trained[1][2:]], {**figures, "epoch": epoch})

    # Evaluation

    @devices.exact_fp32()
    def predict(self, loader, progressbar=None):
        """Compute log-probabilities with the model of the best epoch.

        Returns
        -------
        ids : tuple of str
            Readable clips of all processes, sorted; the others are in `unread`.
        log_probabilities : (clips, classes) np.ndarray of float64
        """
        self.unread.begin(sb.Stage.TEST, loader)
        if self.checkpointer is not None and self.best_epoch() is None:
            raise CheckpointError(
                f"{self.checkpointer.checkpoints_dir} holds no intact checkpoint of a finished epoch\n"
                "train first; damaged checkpoints are listed above"
            )
        self.evaluate(loader, **SELECTIONS[self.options.selection], progressbar=progressbar)
        ids, _, log_probabilities = self._predictions()
        if not ids:
            raise DataError("all clips to evaluate are unreadable\n" + PREPARE_AGAIN)
        return tuple(ids), log_probabilities.astype(np.float64)

    def best_epoch(self):
        """Number of the epoch that evaluation uses; None if no checkpoint exists."""
        checkpoint = self.checkpointer.find_checkpoint(**SELECTIONS[self.options.selection])
        return None if checkpoint is None else checkpoint.meta["epoch"]
