"""AccentBrain: SpeechBrain's training loop for an `AccentModel`."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.epoch_loop import EpochCounter, EpochCounterWithStopper

from accent_plugin.errors import AccentPluginError, ConfigError
from accent_plugin.metrics import confusion_matrix, macro_f1, unweighted_average_recall

logger = logging.getLogger(__name__)

# How the epoch is chosen -> what to ask the checkpointer for.
SELECTIONS = {
    "macro_f1": {"max_key": "macro_f1"},
    "loss": {"min_key": "loss"},
    "last": {"max_key": "epoch"},
}


def learning_rate_factor(progress, warmup, decay):
    """Share of the peak learning rate at a point of training.

    Arguments
    ---------
    progress : float
        Share of training done, 0 to 1.
    warmup : float
        Share of training in which the rate rises linearly.
    decay : str
        "linear" or "cosine" to zero, or "none".

    Returns
    -------
    float

    Example
    -------
    >>> [round(learning_rate_factor(at, 0.1, "linear"), 2) for at in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    left = (1 - progress) / (1 - warmup) if warmup < 1 else 0.0
    left = min(max(left, 0.0), 1.0)
    return {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "none": 1.0}[decay]


class AccentBrain(sb.Brain):
    """Trains and applies an accent classifier.

    `modules` holds one `model`, an `accent_plugin.model.AccentModel`. Read from `hparams`: lr_encoder, lr_head,
    weight_decay, warmup, decay, number_of_epochs, freeze_encoder_steps, label_smoothing, selection, epoch_counter,
    train_logger, tensorboard_logger, and SpeechBrain's run options.

    Arguments
    ---------
    class_weights : (classes,) torch.Tensor
        Weight of each class in the training loss; None for ones.
    history_file : str or Path
        Where the figures of each epoch are kept, as JSON, for the training curves.
    **arguments
        Of speechbrain.Brain.
    """

    def __init__(self, *arguments, class_weights=None, history_file=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.history_file = None if history_file is None else Path(history_file)
        self.skipped_steps = 0
        self._window = 0.0

    # Forward and loss

    def compute_forward(self, batch, stage):
        """Log-probabilities (batch, classes) of a `Batch`."""
        batch = batch.to(self.device)
        return self.modules.model(batch.wavs, batch.wav_lens)

    def compute_objectives(self, predictions, batch, stage):
        """Mean loss of a batch; in evaluation the plain negative log-likelihood, and the predictions are kept."""
        labels = batch.labels.to(self.device)
        if stage == sb.Stage.TRAIN:
            losses, weights = self._weighted_losses(predictions, labels)
            return losses.sum() / weights.sum()
        self._ids.extend(batch.ids)
        self._labels.append(batch.labels)
        self._log_probabilities.append(predictions.detach().float().cpu())
        return torch.nn.functional.nll_loss(predictions.float(), labels)

    def _weighted_losses(self, log_probabilities, labels):
        """Loss of each clip times its weight, and the weights; both (batch,) torch.Tensor."""
        losses = torch.nn.functional.cross_entropy(
            log_probabilities.float(),
            labels,
            weight=self.class_weights,
            label_smoothing=self.hparams.label_smoothing,
            reduction="none",
        )
        weights = torch.ones_like(losses) if self.class_weights is None else self.class_weights[labels]
        return losses, weights

    # Training

    def fit(self, epoch_counter, train_set, valid_set=None, **keywords):
        """Train; `train_set` and `valid_set` are loaders whose batch sampler is a `BucketBatchSampler`."""
        # Brain calls its set_epoch: without this the batches of every epoch would be the same.
        self.train_sampler = train_set.batch_sampler
        self._epochs = epoch_counter.limit
        if torch.device(self.device).type == "cuda":
            # Or the runs before this one, of other folds or seeds, would count.
            torch.cuda.reset_peak_memory_stats(self.device)
        super().fit(epoch_counter, train_set, valid_set, **keywords)

    def init_optimizers(self):
        """One AdamW with a group for the pretrained encoder and one for what starts from nothing: head and adapters."""
        model = getattr(self.modules.model, "module", self.modules.model)
        groups = [
            {"params": _decayed(model.encoder_parameters()), "peak": self.hparams.lr_encoder},
            {"params": _not_decayed(model.encoder_parameters()), "peak": self.hparams.lr_encoder, "weight_decay": 0.0},
            {"params": _decayed(model.head_parameters()), "peak": self.hparams.lr_head},
            {"params": _not_decayed(model.head_parameters()), "peak": self.hparams.lr_head, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=self.hparams.weight_decay)
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def fit_batch(self, batch):
        """One batch; a step every `grad_accumulation_factor` batches and at the end of the epoch.

        The gradient of a step is that of the weighted mean over all its clips, however they were spread over batches.
        """
        steps = len(self.train_sampler)
        should_step = self.step % self.grad_accumulation_factor == 0 or self.step == steps
        self._freeze_encoder(self.optimizer_step < self.hparams.freeze_encoder_steps)
        with self.no_sync(not should_step):
            with self.training_ctx:
                predictions = self.compute_forward(batch, sb.Stage.TRAIN)
                losses, weights = self._weighted_losses(predictions, batch.labels.to(self.device))
            self.check_loss_isfinite(losses.sum())
            self.scaler.scale(losses.sum()).backward()
        self._window += weights.sum()
        if should_step:
            epoch = self.train_sampler.epoch
            self._set_learning_rates((epoch - 1 + self.step / steps) / self._epochs)
            self.optimizers_step()
        return (losses.sum() / weights.sum()).detach()

    def _set_learning_rates(self, progress):
        # A function of progress alone: nothing to save, and right after a restart.
        factor = learning_rate_factor(progress, self.hparams.warmup, self.hparams.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _freeze_encoder(self, frozen):
        """Hold the encoder still while the head, drawn at random, still sends it noise."""
        model = getattr(self.modules.model, "module", self.modules.model)
        if frozen == model.wav2vec2.held:
            return
        model.wav2vec2.held = frozen
        logger.info("encoder %s at step %d", "held still" if frozen else "released", self.optimizer_step)

    def optimizers_step(self):
        """Scale to the mean over the window's clips, clip over all parameters together, step, and start anew.

        A step whose gradient is not finite is left out and counted.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_([parameter.grad for parameter in parameters], float(self._window) or 1.0)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if torch.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        else:
            self.skipped_steps += 1
            logger.warning("step %d left out: its gradient is not finite", self.optimizer_step + 1)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._window = 0.0
        self.optimizer_step += 1

    # Stages

    def on_stage_start(self, stage, epoch=None):
        """Forget the predictions of the stage before."""
        self._ids, self._labels, self._log_probabilities = [], [], []
        self._window = 0.0

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Keep the training loss; after validation log, choose and save."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = float(stage_loss)
        elif stage == sb.Stage.VALID:
            self._finish_epoch(epoch)

    def _finish_epoch(self, epoch):
        log_probabilities = torch.cat(self._log_probabilities).numpy()
        labels = torch.cat(self._labels).numpy()
        confusion = confusion_matrix(labels, log_probabilities.argmax(axis=1), log_probabilities.shape[1])
        figures = {
            "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
            "macro_f1": float(macro_f1(confusion)),
            "uar": float(unweighted_average_recall(confusion)),
        }
        if not np.isfinite(figures["loss"]):
            raise AccentPluginError(
                f"the validation loss of epoch {epoch} is not finite: the weights are spoilt; "
                "start again in another output_folder with smaller lr_encoder and lr_head, or in fp32"
            )
        rates = {group["peak"]: group["lr"] for group in self.optimizer.param_groups}
        memory = peak_memory(self.device)
        stats = {"epoch": epoch, **{f"lr {peak:g}": rate for peak, rate in rates.items()}}
        stats["peak memory"] = "not known" if memory is None else f"{memory / 2**20:.0f} MiB"
        self.hparams.train_logger.log_stats(stats, train_stats={"loss": self.train_loss}, valid_stats=figures)
        if self.hparams.tensorboard_logger is not None:
            self.hparams.tensorboard_logger.log_stats(
                {"epoch": epoch}, train_stats={"loss": self.train_loss}, valid_stats=figures
            )
        self._remember(epoch, figures, memory)
        if self.checkpointer is not None:
            keys = {f"{key}s": [name] for key, name in SELECTIONS[self.hparams.selection].items()}
            self.checkpointer.save_and_keep_only(meta={**figures, "epoch": epoch}, **keys)
        if hasattr(self.hparams.epoch_counter, "update_metric"):
            error = figures["loss"] if self.hparams.selection == "loss" else 1 - figures["macro_f1"]
            self.hparams.epoch_counter.update_metric(error)

    def _remember(self, epoch, figures, memory):
        """Add the epoch to the history; a resumed run replaces what it does again."""
        if self.history_file is None or not if_main_process():
            return
        history = [row for row in read_history(self.history_file) if row["epoch"] < epoch]
        row = {"epoch": epoch, "train_loss": self.train_loss, **{f"valid_{k}": v for k, v in figures.items()}}
        history.append({**row, "peak_memory_bytes": memory})
        self.history_file.write_text(json.dumps(history, indent=1), encoding="utf-8")

    # Evaluation

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
        log_probabilities : (clips, classes) np.ndarray of float64
        """
        self.evaluate(loader, **SELECTIONS[self.hparams.selection], progressbar=progressbar)
        return tuple(self._ids), torch.cat(self._log_probabilities).double().numpy()

    def best_epoch(self):
        """Number of the epoch that evaluation uses, or None where nothing was saved."""
        checkpoint = self.checkpointer.find_checkpoint(**SELECTIONS[self.hparams.selection])
        return None if checkpoint is None else checkpoint.meta["epoch"]


def read_history(path):
    """Figures of each epoch, oldest first, as `AccentBrain` keeps them; an empty list where there are none."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def peak_memory(device):
    """Most memory that was in use at once.

    Arguments
    ---------
    device : torch.device or str
        On a GPU its tensors count, since training began; otherwise all memory of this process (and not of those that
        read audio for it), since it was started.

    Returns
    -------
    int
        Bytes; None on Windows, which does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, kilobytes on Linux.
    return peak if sys.platform == "darwin" else peak * 1024


def make_epoch_counter(number_of_epochs, patience):
    """SpeechBrain's epoch counter; stops after `patience` epochs without a better figure, 0 for never."""
    if not patience:
        return EpochCounter(number_of_epochs)
    # It is given an error to minimise: its "max" takes an equal figure for an improvement and never stops.
    return EpochCounterWithStopper(number_of_epochs, limit_to_stop=patience, limit_warmup=0, direction="min")


def make_tensorboard_logger(enabled, folder):
    """SpeechBrain's TensorBoard logger, or None.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """
    if not enabled:
        return None
    try:
        return sb.utils.train_logger.TensorboardLogger(save_dir=folder)
    except ImportError as error:
        raise ConfigError("tensorboard is True, but TensorBoard is not installed: pip install tensorboard") from error


def _decayed(parameters):
    return [parameter for parameter in parameters if parameter.requires_grad and parameter.ndim > 1]


def _not_decayed(parameters):
    """Biases, norms and layer weights: pulling them to zero regularises nothing."""
    return [parameter for parameter in parameters if parameter.requires_grad and parameter.ndim <= 1]
