"""Reports of runs, folds and seeds."""

import json
import logging
from pathlib import Path

from speechbrain import Stage

from accent_plugin.audio.degradations import DEGRADATIONS
from accent_plugin.bundle import config as bundle_config
from accent_plugin.data.manifests import read_manifest
from accent_plugin.evaluation.compare import compare_models, out_of_set_scores, summarise_runs
from accent_plugin.evaluation.predictions import pool_clips
from accent_plugin.exchange.start import start_identity
from accent_plugin.experiment.predict import as_predictions, predict
from accent_plugin.report import comparisons as report_comparisons
from accent_plugin.report import write as report_write
from accent_plugin.report.comparisons import LEAK_FILE, write_comparison, write_summary
from accent_plugin.report.predictions_csv import read_predictions
from accent_plugin.report.write import METRICS_FILE
from accent_plugin.training import distributed
from accent_plugin.training.options import read_history
from accent_plugin.versions import installed_versions

logger = logging.getLogger(__name__)


# Clips that a note names.
_NAMED = 10


# Of the card that a DatasetDict carries, what a report repeats.
_CARD_REPEATED = ("made_by", "source", "arguments", "counts", "dropped", "lost_sentences", "labels", "warnings")


def describe_data(prepared, fold=None):
    """What a report says of the data: name, whether it is synthetic, how it was split, counts and what was left out."""
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


def describe_model(hparams):
    """What a report says of the model: its parts, sizes, and the choices that shaped it."""
    model = hparams["model"]
    start = {} if hparams["from_bundle"] is None else {"from_bundle": start_identity(hparams["from_bundle"])}
    return {
        "encoder": _encoder_name(hparams),
        **start,
        "family": model.wav2vec2.config.model_type,
        "method": hparams["method"],
        "pooling": hparams["pooling"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": hparams["seed"],
    }


def _encoder_name(hparams):
    start = hparams["from_bundle"]
    if start is not None and bundle_config.is_bundle(start):
        return bundle_config.read(start)["model"]["encoder"].get("name")
    encoder = start or hparams["wav2vec2_hub"]
    # The folder's name alone: a report travels, a local path should not.
    return Path(encoder).name if Path(encoder).is_dir() else encoder


def write_report(brain, loaders, prepared, hparams, command, temperature=1.0, fold=None, outsiders=None):
    """Evaluate on the test split and write the run's report.

    Arguments
    ---------
    brain : AccentBrain
    loaders : dict
        As `make_loaders` gives it.
    prepared : accent_plugin.data.manifests.Prepared
    hparams : dict
    command : str
    temperature : float
        Of `calibrate`.
    fold : int
    outsiders : accent_plugin.data.manifests.Prepared
        Speech of accents that are not among the classes; None for none.

    Returns
    -------
    predictions : accent_plugin.evaluation.predictions.ScoredClips
    metrics : dict
        The content of metrics.json; None in all processes but the first.
    """
    accents, clips = hparams["accents"], loaders["test"].dataset.clips

    def scores(clips, degrade=None):
        return predict(brain, clips, hparams["loading"], hparams["evaluation"]["test_speeds"], degrade, temperature)

    predictions = as_predictions(*scores(clips), accents)
    notes = [*prepared.warnings, *_unread_note(brain.unread[Stage.TEST])]
    outside = None
    if outsiders is not None:
        heard, log_probabilities = scores(read_manifest(outsiders.paths()["test"]))
        outside = out_of_set_scores(predictions, log_probabilities, [clip.accent for clip in heard])
    degraded = None
    if hparams["evaluation"]["bands"]:
        degraded = {name: as_predictions(*scores(clips, degrade), accents) for name, degrade in DEGRADATIONS.items()}
    history = read_history(brain.history_file)
    memory = [row["peak_memory_bytes"] for row in history if row.get("peak_memory_bytes") is not None]
    metrics = write_run_report(
        hparams["output_folder"],
        predictions,
        data=describe_data(prepared, fold),
        model=describe_model(hparams) | {"temperature": temperature, "peak_memory_bytes": max(memory, default=None)},
        command=command,
        curves=history,
        notes=notes,
        audio=split_sources(clips),
        selected_epoch=brain.best_epoch(),
        out_of_set=outside,
        bands=degraded,
    )
    return predictions, metrics


def _unread_note(unread):
    if not unread:
        return []
    names = ", ".join(sorted(unread)[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
    return [f"{len(unread)} clips of the test split could not be read and are not scored: {names}"]


def split_sources(clips):
    """A function: id of a clip -> path of its audio."""
    return {clip.id: clip.wav for clip in clips}.get


def write_pooled_report(output_folder, folds, prepared, command):
    """One report on the predictions of all folds, in which every speaker was tested once.

    Arguments
    ---------
    output_folder : str or Path
        Of the whole; the folds' own are below it.
    folds : list of (accent_plugin.evaluation.predictions.ScoredClips, dict)
        As `write_report` returns them.
    prepared : accent_plugin.data.manifests.Prepared
    command : str

    Returns
    -------
    dict
        The content of metrics.json.
    """
    clips = [clip for fold in prepared.folds for clip in read_manifest(fold["test"])]
    recall = [metrics["clip"]["unweighted_average_recall"]["value"] for _, metrics in folds]
    return write_run_report(
        output_folder,
        pool_clips([predictions for predictions, _ in folds]),
        data=describe_data(prepared),
        model={**folds[0][1]["model"], "models": f"{len(folds)}, one per fold"},
        command=command,
        notes=[
            *prepared.warnings,
            f"Predictions of {len(folds)} folds pooled: each model is tested on speakers it has not seen. "
            f"Unweighted average recall of the single folds: {', '.join(f'{value:.3f}' for value in recall)}.",
        ],
        audio=split_sources(clips),
    )


def write_seeds(output_folder, runs):
    """Mean and standard deviation over seeds, as summary.json and summary.md.

    Arguments
    ---------
    output_folder : str or Path
    runs : dict
        Name of a run -> the content of its metrics.json.
    """
    write_summary(Path(output_folder), summarise_runs(list(runs.values()), list(runs)))
    logger.info("summary of %d runs: %s", len(runs), Path(output_folder) / "summary.md")


def write_leak(output_folder, honest, leaky):
    """What sharing speakers between train and test adds: leak.md, and a paired comparison where the clips are the same.

    Arguments
    ---------
    output_folder, honest, leaky : str or Path
        Folder of the comparison, and of the two runs (split by speaker, and at random).
    """
    names = ("split by speaker", "split at random")
    runs = [Path(run) / "report" for run in (honest, leaky)]
    metrics = [json.loads((run / METRICS_FILE).read_text(encoding="utf-8")) for run in runs]
    predictions = [read_predictions(run) for run in runs]
    report_comparisons.write_leak(output_folder, dict(zip(names, metrics, strict=True)))
    if set(predictions[0].ids) == set(predictions[1].ids):
        write_comparison(output_folder, *names, compare_models(*predictions))
    logger.info("what the leak adds: %s", Path(output_folder) / LEAK_FILE)


def write_run_report(output_folder, predictions, **parts):
    """Write the report of a run in the first process; None in the others."""
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
