"""Reports on several runs: each is written as soon as its last run is finished, of all of its runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from accent_plugin.experiment import reports
from accent_plugin.experiment.reports import Summaries


@pytest.fixture
def written(monkeypatch):
    """What was written: (kind, folder, what of), oldest first."""
    found = []

    def pooled(folder, folds):
        found.append(("pooled", str(folder), [str(fold.folder) for fold in folds]))
        return f"metrics of {folder}"

    monkeypatch.setattr(reports, "_write_pooled_report", pooled)
    monkeypatch.setattr(reports, "_write_seeds", lambda folder, runs: found.append(("seeds", str(folder), runs)))
    monkeypatch.setattr(reports, "_write_leak", lambda *folders: found.append(("leak", *map(str, folders))))
    return found


def add(summaries, *folders):
    for folder in folders:
        summaries.add(SimpleNamespace(folder=Path(folder), metrics=f"metrics of {folder}"))


def test_nothing_is_written_about_a_single_run(written):
    add(Summaries("out"), "out")
    assert written == []


def test_folds_are_pooled_after_the_last(written):
    summaries = Summaries("out", n_folds=3)
    add(summaries, "out/fold_1", "out/fold_2")
    assert written == []
    add(summaries, "out/fold_3")
    assert written == [("pooled", "out", ["out/fold_1", "out/fold_2", "out/fold_3"])]


def test_seeds_are_summarised_after_the_last(written):
    summaries = Summaries("out", seeds=[3, 4])
    add(summaries, "out/3")
    assert written == []
    add(summaries, "out/4")
    assert written == [("seeds", "out", {"out/3": "metrics of out/3", "out/4": "metrics of out/4"})]


def test_the_folds_of_a_seed_are_pooled_before_the_next_seed(written):
    summaries = Summaries("out", n_folds=2, seeds=[3, 4])
    add(summaries, "out/3/fold_1", "out/3/fold_2", "out/4/fold_1")
    assert written == [("pooled", "out/3", ["out/3/fold_1", "out/3/fold_2"])]
    add(summaries, "out/4/fold_2")
    assert written[1:] == [
        ("pooled", "out/4", ["out/4/fold_1", "out/4/fold_2"]),
        ("seeds", "out", {"out/3": "metrics of out/3", "out/4": "metrics of out/4"}),
    ]


@pytest.mark.parametrize("n_folds", [0, 2])
def test_the_leak_is_shown_after_both_splits(written, n_folds):
    summaries = Summaries("out", n_folds=n_folds)
    for split in ("speaker", "random"):
        assert not any(kind == "leak" for kind, *_ in written)
        add(summaries, *(f"out/{split}/fold_{k}" for k in range(1, n_folds + 1)), *[f"out/{split}"] * (not n_folds))
    assert written[-1] == ("leak", "out", "out/speaker", "out/random")


def test_only_the_first_process_writes(written, monkeypatch):
    monkeypatch.setattr(reports.distributed, "is_main", lambda: False)
    add(Summaries("out", n_folds=1, seeds=[3]), "out/3/fold_1")
    assert written == []
