"""Reports of runs, folds and seeds."""

import json
import logging
from pathlib import Path

from accent_plugin.bundle import config as bundle_config
from accent_plugin.evaluation.compare import compare_models, summarise_runs
from accent_plugin.evaluation.predictions import pool_clips
from accent_plugin.exchange.start import start_identity
from accent_plugin.report import comparisons as report_comparisons
from accent_plugin.report import write as report_write
from accent_plugin.report.comparisons import LEAK_FILE, write_comparison, write_summary
from accent_plugin.report.predictions_csv import read_predictions
from accent_plugin.report.write import METRICS_FILE
from accent_plugin.training import distributed
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)

# Most clips that a note names.
_NAMED = 10

# Fields of a DatasetDict's card that a report repeats.
_CARD_REPEATED = ("made_by", "source", "arguments", "counts", "dropped", "lost_sentences", "labels", "warnings")


def describe_data(prepared, fold=None):
    """Describe the data for a report: name, whether it is synthetic, split, counts and skipped clips."""
    counts = prepared.counts if fold is None else prepared.counts[f"fold_{fold}"]
    made = {key: value for key, value in prepared.card.items() if key in _CARD_REPEATED}
    if "arguments" in made:
        made["arguments"] = {key: value for key, value in made["arguments"].items() if value not in (None, {})}
    return {
        "name": prepared.name,
        "synthetic": prepared.synthetic,
        "speakers_disjoint": prepared.speakers_disjoint,
        "split": prepared.arguments["split"],
        "counts": counts,
        "left_out": prepared.dropped,
    } | ({"made_before": made} if made else {})


def describe_model(model, values):
    """Describe an `AccentModel` for a report: its parts, their sizes and the hyperparameters in `values`."""
    start = {} if values["from_bundle"] is None else {"from_bundle": start_identity(values["from_bundle"])}
    return {
        "encoder": encoder_name(values),
        **start,
        "family": model.wav2vec2.config.model_type,
        "method": values["method"],
        "pooling": values["pooling"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": values["seed"],
    }


def encoder_name(values):
    """Return the name of the encoder on the Hub or of its folder."""
    start = values["from_bundle"]
    if start is not None and bundle_config.is_bundle(start):
        return bundle_config.read(start)["model"]["encoder"].get("name")
    encoder = start or values["wav2vec2_hub"]
    # Only the folder's name: reports are shared, and should not contain local paths.
    return Path(encoder).name if Path(encoder).is_dir() else encoder


def unread_notes(unread):
    """Make notes of a report about unreadable clips of the test split; `unread` is {id: reason}."""
    if not unread:
        return []
    names = ", ".join(sorted(unread)[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
    return [f"{len(unread)} clips of the test split could not be read and are not scored: {names}"]


def split_sources(clips):
    """Make a function that maps the id of a clip to the path of its audio."""
    return {clip.id: clip.wav for clip in clips}.get


class Summaries:
    """Reports on several runs of one command; each is written when its last run is finished.

    Arguments
    ---------
    output_folder : str or Path
        The output folder of the command.
    n_folds : int
        Number of folds to pool; 0 for none.
    seeds : list of int
        Seeds to summarise; None for none.
    """

    def __init__(self, output_folder, n_folds=0, seeds=None):
        self._output_folder, self._n_folds, self._seeds = output_folder, n_folds, seeds
        # Finished members of each group: runs, (folder, content of metrics.json), folders.
        self._fold_runs, self._seed_runs, self._split_folders = [], [], []

    def add(self, run):
        """Add a finished `Run`, in the order of `Settings.runs`, and write the reports that it completes."""
        if not distributed.is_main():
            return
        folder, metrics = run.folder, run.metrics
        if self._n_folds:
            self._fold_runs.append(run)
            if len(self._fold_runs) < self._n_folds:
                return
            folder, folds, self._fold_runs = folder.parent, self._fold_runs, []
            metrics = _write_pooled_report(folder, folds)
        if self._seeds:
            self._seed_runs.append((str(folder), metrics))
            if len(self._seed_runs) < len(self._seeds):
                return
            folder, seeds, self._seed_runs = folder.parent, dict(self._seed_runs), []
            _write_seeds(folder, seeds)
        self._split_folders.append(folder)
        if len(self._split_folders) == 2:
            _write_leak(self._output_folder, *self._split_folders)


def _write_pooled_report(output_folder, folds):
    """Write one report on the predictions of all folds, which test every speaker once; returns its metrics.json."""
    prepared = folds[0].prepared
    recall = [fold.metrics["clip"]["unweighted_average_recall"]["value"] for fold in folds]
    return write_run_report(
        output_folder,
        pool_clips([fold.predictions for fold in folds]),
        data=describe_data(prepared),
        model={**folds[0].metrics["model"], "models": f"{len(folds)}, one per fold"},
        command=folds[0].command,
        notes=[
            *prepared.warnings,
            f"Predictions of {len(folds)} folds pooled: each model is tested on speakers it has not seen. "
            f"Unweighted average recall of the single folds: {', '.join(f'{value:.3f}' for value in recall)}.",
        ],
        audio=split_sources(clip for fold in folds for clip in fold.clips["test"]),
    )


def _write_seeds(output_folder, runs):
    """Write mean and standard deviation over seeds to summary.json and summary.md; `runs` is {name: metrics.json}."""
    write_summary(Path(output_folder), summarise_runs(list(runs.values()), list(runs)))
    logger.info("summary of %d runs: %s", len(runs), Path(output_folder) / "summary.md")


def _write_leak(output_folder, honest, leaky):
    """Write the effect of speakers shared by train and test to leak.md, and compare the runs if the clips are the same.

    `honest` is the folder of the run split by speaker, `leaky` that of the run split at random.
    """
    names = ("split by speaker", "split at random")
    runs = [Path(run) / "report" for run in (honest, leaky)]
    metrics = [json.loads((run / METRICS_FILE).read_text(encoding="utf-8")) for run in runs]
    predictions = [read_predictions(run) for run in runs]
    report_comparisons.write_leak(output_folder, dict(zip(names, metrics, strict=True)))
    if set(predictions[0].ids) == set(predictions[1].ids):
        write_comparison(output_folder, *names, compare_models(*predictions))
    logger.info("effect of shared speakers: %s", Path(output_folder) / LEAK_FILE)


def write_run_report(output_folder, predictions, **parts):
    """Write the report of a run in the first process; return None in the others."""
    if not distributed.is_main():
        return None
    folder = Path(output_folder) / "report"
    metrics = report_write.write_report(folder, predictions, versions=installed_versions(), **parts)
    recall = metrics["clip"]["unweighted_average_recall"]
    logger.info(
        "unweighted average recall by clip %.3f (95 %%: %.3f to %.3f); report: %s",
        *(recall[key] for key in ("value", "low", "high")),
        folder / "report.md",
    )
    return metrics
