"""Commands that read finished runs: compare, summarise."""

from pathlib import Path

from accent_plugin.cli.models import short_names
from accent_plugin.errors import AccentPluginError


def run_compare(arguments):
    """Compare two runs on the same clips."""
    from accent_plugin.evaluation.compare import compare_models
    from accent_plugin.report.comparisons import write_comparison

    first, second = arguments.run
    names = short_names(arguments.run)
    comparison = compare_models(_read_predictions(first), _read_predictions(second))
    write_comparison(arguments.out, *names, comparison)
    print((Path(arguments.out) / "comparison.md").read_text(encoding="utf-8"))


def run_summarise(arguments):
    """Summarise the metrics of several runs."""
    import json

    from accent_plugin.evaluation.compare import summarise_runs
    from accent_plugin.report.comparisons import write_summary
    from accent_plugin.report.write import METRICS_FILE

    runs = {}
    for run in arguments.run:
        path = _report_folder(run) / METRICS_FILE
        try:
            runs[run] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AccentPluginError(
                f"{path} cannot be read: {error}; give the output folders of finished runs"
            ) from None
    write_summary(arguments.out, summarise_runs(list(runs.values()), list(runs)))
    print((Path(arguments.out) / "summary.md").read_text(encoding="utf-8"))


def _report_folder(run):
    """The report folder, given the output folder of a run or the report folder itself."""
    run = Path(run)
    return run / "report" if (run / "report").is_dir() else run


def _read_predictions(run):
    from accent_plugin.report.predictions_csv import read_predictions

    return read_predictions(_report_folder(run))
