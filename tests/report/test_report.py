"""What a report's folder holds: complete, strict, safe to open, and honest about its data."""

import base64
import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.predictions import LABELS, build, permuted, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from accent_plugin.errors import ReportError
from accent_plugin.evaluation.compare import FIGURES, compare_models, out_of_set_scores, summarise_runs
from accent_plugin.evaluation.evaluate import evaluate, speaker_rows
from accent_plugin.evaluation.predictions import ScoredClips
from accent_plugin.evaluation.scores import confusion_matrix
from accent_plugin.report import figures, html
from accent_plugin.report.comparisons import write_comparison, write_summary
from accent_plugin.report.markdown import to_markdown
from accent_plugin.report.predictions_csv import read_predictions, write_predictions
from accent_plugin.report.sections import _effect_of_abstaining, report_blocks
from accent_plugin.report.text import report_title
from accent_plugin.report.write import write_report

NASTY = 'a|b <script>alert("x")</script> $x_1$ `c` [d](e), "f"'
CURVES = [
    {"epoch": e, "train_loss": 1 / e, "valid_loss": 1.1 / e, "valid_macro_f1": 1 - 1 / e, "valid_uar": None}
    for e in (1, 2, 3)
]


def write(folder, predictions=None, data=None, **more):
    data = {"name": "a corpus", "synthetic": False, "speakers_disjoint": True, **(data or {})}
    return write_report(folder, predictions or simulate(speakers=12), data=data, **{"draws": 20, **more})


class Page(HTMLParser):
    """Tags, the attributes that load something, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "data", "poster", "srcset", "action")]
        assert not [k for k, _ in attributes if k.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report with everything in it, some of it hostile."""
    folder = tmp_path_factory.mktemp("whole")
    tone = folder / "tone.flac"
    soundfile.write(tone, 0.1 * np.sin(np.arange(48_000) / 20), 16_000)
    good = simulate(speakers=12, skill=2)
    clients = [NASTY if c == "s001" else c for c in good.client_ids]
    p = ScoredClips(good.ids, clients, good.truth, good.log_probabilities, LABELS, good.seconds, good.gender, good.age)
    worse = simulate(speakers=12, skill=1)
    worse = ScoredClips(p.ids, clients, p.truth, worse.log_probabilities, LABELS, p.seconds, p.gender, p.age)
    metrics = write(
        folder / "report",
        p,
        data={"name": "corpus <b>", "counts": {"train": {"us": {"clips": 12345, "speakers": 3}}}, "left_out": {}},
        model={
            "encoder": NASTY,
            "parameters": 7_100_000,
            "loss": float("nan"),
            "path": Path("x"),
            "rate": np.float32(0.5),
        },
        versions={"torch": "2.11.0"},
        command="train.py --x '```'\nsecond <line>",
        curves=CURVES,
        selected_epoch=2,
        notes=["3 clips were <left> out."],
        audio=lambda clip: tone,
        out_of_set=out_of_set_scores(p, p.log_probabilities[:9], ["scot|land"] * 9),
        bands={"telephone": worse, "noise at 10 dB": p, "noise at 0 dB": worse},
    )
    return folder / "report", metrics, p


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Metrics of an honest report, and names for its pictures."""
    metrics = write(tmp_path_factory.mktemp("small"), simulate(speakers=3, clips=1))
    return metrics, {name: f"{name}.png" for name in ("confusion", "recall", "reliability", "scores", "coverage")}


# ---- predictions.csv


def test_predictions_come_back_as_they_were(tmp_path):
    p = simulate()
    write_predictions(tmp_path / "predictions.csv", p)
    q = read_predictions(tmp_path)
    for name in ("ids", "client_ids", "labels", "gender", "age"):
        assert getattr(q, name) == getattr(p, name)
    assert (q.truth == p.truth).all() and (q.seconds == p.seconds).all()
    np.testing.assert_allclose(q.log_probabilities, p.log_probabilities, rtol=0, atol=1e-14)
    assert evaluate(q, draws=20)["confusion"] == evaluate(p, draws=20)["confusion"]


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(str.strip), st.floats(-740, -1e-12))
def test_any_text_and_any_probability_come_back(tmp_path_factory, text, log_probability):
    path = tmp_path_factory.mktemp("csv") / "predictions.csv"
    rest = np.log1p(-np.exp(log_probability))
    p = ScoredClips([text, text + "2"], [text, "b"], [0, 1], [[log_probability, rest]] * 2, (text + "x", "y"), [1, 2])
    write_predictions(path, p)
    q = read_predictions(path)
    assert (q.ids, q.client_ids, q.labels) == (p.ids, p.client_ids, p.labels)
    np.testing.assert_allclose(np.exp(q.log_probabilities), np.exp(p.log_probabilities), rtol=1e-12)


def test_columns_are_those_of_the_design(tmp_path):
    write_predictions(tmp_path / "p.csv", build([[0.25, 0.75]], [0], ["a,b"], labels=("us", "england")))
    header, row = csv.reader((tmp_path / "p.csv").open(newline=""))
    assert header == [
        *("ID", "client_id", "accent", "predicted", "p_us", "p_england"),
        *("gender", "age", "words_seen", "sentence_seen", "seconds"),
    ]
    assert row == ["clip0000", "a,b", "us", "england", "0.25", "0.75", "", "", "", "", "5.0"]


def test_predictions_without_client_ids_come_back(tmp_path):
    write_predictions(tmp_path / "p.csv", build([[0.25, 0.75]], [0], labels=("us", "england")))
    assert read_predictions(tmp_path / "p.csv").client_ids is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no predictions in"),
        ("", "lacks ID, accent, seconds"),
        ("ID,accent,seconds\n", "lacks p_<accent> columns"),
        ("ID,accent,p_us,p_england,seconds\n", "no predictions to evaluate"),
        ("ID,accent,p_us,p_england,seconds\na,us,0.5,0.5\n", "line 2: 5 columns expected"),
        ("ID,accent,p_us,p_england,seconds\na,us,half,0.5,1\n", "damaged: could not convert"),
        ("ID,accent,p_us,p_england,seconds\na,wales,0.5,0.5,1\n", "damaged"),
        ("ID,accent,p_us,p_england,seconds\na,us,0.5,0.1,1\n", "do not sum to 1"),
        ("ID,accent,p_us,p_england,seconds\na,us,-0.5,1.5,1\n", "do not sum to 1"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, text, match):
    if text is not None:
        (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(ReportError, match=match):
        read_predictions(tmp_path / "predictions.csv")


# ---- the report's folder


def test_all_files_are_there_and_nothing_else(whole):
    folder, *_ = whole
    pngs = {
        f"{name}.png"
        for name in ("confusion", "recall", "reliability", "scores", "coverage", "speakers", "curves", "degradations")
    }
    assert {f.name for f in folder.iterdir()} == {"metrics.json", "predictions.csv", "report.md", "report.html"} | pngs
    for name in pngs:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_are_strict_json_with_the_keys_of_the_design(whole):
    folder, metrics, p = whole

    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.json")

    read = json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
    assert read == metrics
    wanted = {"data", "clip", "speaker", "per_accent", "confusion", "groups", "model", "versions", "command"}
    assert set(read) == wanted | {
        "text",
        "risk_coverage",
        "confidence",
        "absent_accents",
        "notes",
        "warnings",
        "out_of_set",
        "bands",
    }
    assert {"name", "synthetic", "speakers_disjoint", "speakers", "clips", "seconds"} <= set(read["data"])
    assert (read["data"]["speakers"], read["data"]["clips"]) == (12, 48)
    assert read["data"]["seconds"] == pytest.approx(p.seconds.sum())
    assert read["model"]["loss"] is None and read["model"]["path"] == "x" and read["model"]["rate"] == 0.5


def test_degradations_have_their_kind_and_strength_and_calibration_error(whole):
    folder, metrics, _ = whole
    found = {name: (band["kind"], band["strength"], band["unit"]) for name, band in metrics["bands"].items()}
    assert found == {
        "telephone": ("telephone", None, ""),
        "noise at 10 dB": ("noise", 10.0, "dB"),
        "noise at 0 dB": ("noise", 0.0, "dB"),
    }
    error = metrics["bands"]["noise at 0 dB"]["expected_calibration_error"]["value"]
    rows = (folder / "report.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith("| noise at 0 dB |"))
    assert f"{error:.3f}" in row and error != metrics["clip"]["expected_calibration_error"]["value"]


def test_the_picture_of_degradations_follows_their_figures(tmp_path):
    def drawn(name, **changed):
        figure = {"value": 0.5, "low": 0.4, "high": 0.6}
        bands = [
            {"kind": "noise", "unit": "dB", "strength": 10.0, "unweighted_average_recall": figure},
            {"kind": "noise", "unit": "dB", "strength": 0.0, "unweighted_average_recall": figure | changed},
            {"kind": "telephone", "unit": "", "strength": None, "unweighted_average_recall": figure},
        ]
        figures.degradations(tmp_path / name, figure, dict(enumerate(bands)))
        return (tmp_path / name).read_bytes()

    same = drawn("a.png")
    assert drawn("b.png") == same != drawn("c.png", value=0.2)
    assert drawn("d.png", low=0.1) != same != drawn("e.png", low=None, high=None)


def test_report_can_be_computed_again_from_its_predictions(whole):
    folder, metrics, _ = whole
    again = evaluate(read_predictions(folder), draws=20)
    for name in FIGURES:
        assert again["clip"][name] == pytest.approx(metrics["clip"][name])
    assert again["groups"].keys() == metrics["groups"].keys()


def test_same_predictions_same_bytes(tmp_path):
    p = simulate(speakers=6)
    write(tmp_path / "a", p, curves=CURVES)
    write(tmp_path / "b", permuted(p, np.arange(len(p.ids))[::-1]), curves=CURVES)
    for file in (tmp_path / "a").iterdir():
        if file.suffix in (".json", ".png", ".md", ".html"):
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_markdown_says_what_it_must(whole):
    folder, metrics, _ = whole
    text = (folder / "report.md").read_text()
    assert text.startswith("# English accents: corpus &lt;b&gt;\n")
    v = metrics["clip"]["unweighted_average_recall"]
    assert f"{v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f}) by clip" in text
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / picture).is_file()
    assert len(re.findall(r"!\[", text)) == 8
    sure = metrics["risk_coverage"]["surest"]["0.8"]
    words = (
        f"the most confident {sure['coverage']:.0%} of clips (probability at least {sure['threshold']:.3f}): accuracy "
    )
    assert words + f"{sure['accuracy']['value']:.3f} (" in text
    for words in (
        "Misclassified clips",
        "too few speakers",
        "telephone",
        "AUROC",
        "torch",
        "2.11.0",
        "12,345",
        "second <line>",
    ):
        assert words in text
    assert "3 clips were &lt;left&gt; out." in text
    assert "````\ntrain.py" in text  # a fence longer than the one inside


def test_markdown_tables_have_as_many_cells_in_every_row(whole):
    folder, *_ = whole
    text = (folder / "report.md").read_text()
    assert r"a\|b &lt;script&gt;" in text and "<script>" not in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_html_is_one_file_without_scripts(whole):
    folder, *_ = whole
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert page.sources and all(
        s.startswith(("data:image/png;base64,", "data:audio/mpeg;base64,")) for s in page.sources
    )
    assert "url(" not in text and "@import" not in text
    assert 'alert("x")' in page.text  # shown, not run
    assert page.tags.count("img") == 8
    assert "prefers-color-scheme: dark" in text
    for words in ("Most confident errors", "Results by speaker", "telephone", "second <line>", "corpus <b>"):
        assert words in page.text


def test_html_plays_the_most_confident_errors(whole, tmp_path):
    folder, _, p = whole
    page = Page((folder / "report.html").read_text())
    wrong = int((p.predicted != p.truth).sum())
    assert 0 < page.tags.count("audio") <= min(wrong, html.MOST_PLAYERS)
    source = next(s for s in page.sources if s.startswith("data:audio"))
    (tmp_path / "clip.mp3").write_bytes(base64.b64decode(source.split(",")[1]))
    wave, rate = soundfile.read(tmp_path / "clip.mp3")
    assert rate == 16_000 and len(wave) / rate == pytest.approx(3, abs=0.2)


def test_players_are_few_and_leave_out_what_cannot_be_read(tmp_path):
    n = 60
    p = build([[0.9, 0.1]] * n, [1] * n, [f"s{i // 10}" for i in range(n)], labels=("us", "england"))
    (tmp_path / "broken.flac").write_bytes(b"no audio")
    assert html.players(p, lambda clip: tmp_path / "broken.flac") == []
    assert html.players(p, lambda clip: tmp_path / "missing.flac") == []
    assert html.players(p, lambda clip: None) == html.players(p, None) == []
    soundfile.write(tmp_path / "noise.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 20), 16_000)
    players = html.players(p, lambda clip: tmp_path / "noise.flac")
    assert len(players) == html.MOST_PLAYERS
    assert [x["client_id"] for x in players].count("s0") == html.MOST_PER_SPEAKER
    assert sum(len(x["source"]) for x in players) < html.MOST_BYTES


@pytest.mark.parametrize(
    ("data", "title", "sentence"),
    [
        ({"synthetic": True}, "(synthetic speech)", "says nothing about accuracy on real speech"),
        ({"split": "random", "speakers_disjoint": False}, "(LEAKY split: speakers shared)", "do not compare the two"),
        ({"split": "random", "speakers_disjoint": None}, "(LEAKY split: speakers shared)", "do not compare the two"),
        ({"speakers_disjoint": None}, "(may share speakers)", "the speakers are not known"),
        ({"speakers_disjoint": False}, "(speakers shared)", "expect lower figures on new speakers"),
        (
            {"synthetic": True, "split": "random"},
            "(LEAKY split: speakers shared; synthetic speech)",
            "nothing about accuracy",
        ),
    ],
)
def test_title_and_first_lines_say_what_the_data_cannot_show(small, data, title, sentence):
    facts = {**small[0]["data"], **data}
    blocks = list(report_blocks({**small[0], "data": facts}, [], small[1]))[:4]
    lines = to_markdown(blocks).splitlines()
    assert lines[0].endswith(title)
    assert any(sentence in line for line in lines[:5] if line.startswith("> "))
    page = html.render(report_title(facts), blocks, Path())
    assert title in page.split("</title>")[0] and sentence in page


def test_a_leaky_synthetic_report_says_both_in_every_file(tmp_path):
    metrics = write(tmp_path, simulate(speakers=3, clips=1), {"synthetic": True, "split": "random"})
    assert metrics["data"]["synthetic"] is True and metrics["data"]["split"] == "random"
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "LEAKY split" in text[:500] and "says nothing about accuracy on real speech" in text


def test_honest_data_have_a_plain_title():
    data = {"name": "a corpus", "synthetic": False, "speakers_disjoint": True, "split": "speaker"}
    assert report_title(data) == "English accents: a corpus"


def one_answer():
    """A model that answers every clip with us, always equally confident."""
    p = simulate(speakers=12)
    return ScoredClips(
        p.ids, p.client_ids, p.truth, np.log(np.tile([0.5, 0.3, 0.2], (len(p.ids), 1))), p.labels, p.seconds
    )


def test_a_model_that_always_gives_one_answer_is_named_on_top_and_in_the_log(tmp_path, caplog):
    metrics = write(tmp_path, one_answer())
    sentence = "The model answers every clip with us"
    assert [w for w in metrics["warnings"] if w.startswith(sentence)]
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[2].startswith(f"> **{sentence}")
    assert "> **Confidence is the same for right and wrong answers" in "\n".join(lines[:8])
    page = (tmp_path / "report.html").read_text()
    assert f'<p class="warning">{sentence}' in page.split("<h2>")[0]
    assert sentence in caplog.text


def test_an_ordinary_model_is_not_warned_about(tmp_path, caplog):
    assert write(tmp_path, simulate(speakers=30))["warnings"] == [] and not caplog.text
    assert "> **" not in (tmp_path / "report.md").read_text()


def test_calibration_and_coverage_are_told_for_every_accent_and_group(tmp_path):
    p = simulate(speakers=30)
    metrics = write(tmp_path, p, threshold=0.7)
    section = (tmp_path / "report.md").read_text().split("## Calibration by accent and group\n")[1].split("\n## ")[0]
    assert "from a probability of 0.700 on, chosen on validation." in section
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    cells = {tuple(row[:2]): row[2:] for row in rows[2:]}
    kinds = {kind: list(group) for kind, group in metrics["groups"].items()} | {"accent": list(LABELS), "all": [""]}
    assert set(cells) == {(kind, name) for kind, names in kinds.items() for name in names}
    v = metrics["groups"]["gender"]["female"]["confidence_minus_accuracy"]
    assert cells["gender", "female"][1] == f"{v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f})"
    assert cells["all", ""][2].startswith(f"{(p.probabilities.max(axis=1) >= 0.7).mean():.3f} (")
    assert (
        f"AUROC of the probability between right and wrong answers: {metrics['confidence']['auroc']['value']:.3f}"
        in (section)
    )


def test_words_and_sentences_that_training_had_are_told(tmp_path):
    words, sentences = ["4/4"] * 12 + ["3/4"] * 24 + [""] * 12, ["yes"] * 12 + ["no"] * 24 + [""] * 12
    predictions = replace(simulate(speakers=12), words_seen=words, sentence_seen=sentences)
    write(tmp_path, predictions)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Training has 120 of the 144 words of the test clips, and the whole sentence of 12 of 36 clips." in text
    rows = [line for line in text.splitlines() if line.startswith(("| words |", "| sentence |"))]
    assert len(rows) == 2 * (3 + 3)
    assert read_predictions(tmp_path).words_seen == tuple(words)


def test_a_threshold_of_the_test_clips_is_told_as_such(tmp_path):
    write(tmp_path, simulate(speakers=12))
    assert "on, at which 80% of these clips are answered." in (tmp_path / "report.md").read_text()


def test_without_client_ids_nothing_is_told_by_speaker(tmp_path):
    p = simulate(speakers=6)
    p = ScoredClips(p.ids, None, p.truth, p.log_probabilities, p.labels, p.seconds)
    metrics = write(tmp_path, p, {"speakers_disjoint": None})
    text = (tmp_path / "report.md").read_text()
    assert metrics["data"]["speakers"] is None and not (tmp_path / "speakers.png").exists()
    assert "by speaker" not in text.split("##")[0] and "resample clips" in text


def test_an_old_report_gives_way_as_a_whole(tmp_path):
    write(tmp_path, curves=CURVES)
    p = simulate(speakers=6)
    write(tmp_path, ScoredClips(p.ids, None, p.truth, p.log_probabilities, p.labels, p.seconds))
    assert not (tmp_path / "speakers.png").exists() and not (tmp_path / "curves.png").exists()


# ---- pictures


@pytest.mark.parametrize(
    ("speakers", "labels"), [(2, LABELS[:2]), (124, LABELS), (40, tuple(f"accent {i}" for i in range(10)))]
)
def test_pictures_of_any_size(tmp_path, speakers, labels):
    p = simulate(speakers, clips=1, labels=labels)
    rows = speaker_rows(p)
    figures.speakers(tmp_path / "speakers.png", rows, labels)
    counts = confusion_matrix(p.truth, p.predicted, len(labels))
    figures.confusion(tmp_path / "confusion.png", labels, {"by clip": counts})
    figures.true_accent_probability(tmp_path / "scores.png", p)
    for file in tmp_path.iterdir():
        width, height = (int.from_bytes(file.read_bytes()[i : i + 4], "big") for i in (16, 20))
        assert 300 < width < 2000 and 200 < height < 4000, file.name


def test_names_that_matplotlib_would_read_as_formulas(tmp_path):
    labels = ("$x", r"\frac{", "a_{b}$$")
    p = simulate(6, clips=1, labels=labels)
    p = ScoredClips(p.ids, [f"$\\bad{i}$" for i in range(6)], p.truth, p.log_probabilities, labels, p.seconds)
    write(tmp_path, p)


@pytest.mark.parametrize("clips", [1, 2, 300])
@pytest.mark.parametrize("skill", [1.0, 50.0])
def test_coverage_of_any_size(tmp_path, clips, skill):
    p = simulate(clips, clips=1, skill=skill)
    part = evaluate(p, draws=5)["risk_coverage"]
    figures.coverage(tmp_path / "coverage.png", part)
    assert (tmp_path / "coverage.png").stat().st_size > 1000


def test_equal_probabilities_make_one_line_of_text():
    p = build([[0.9, 0.1]] * 10, [0] * 9 + [1], labels=("us", "england"))
    metrics = evaluate(p, draws=5)
    text = _effect_of_abstaining(metrics["risk_coverage"], metrics["clip"]["accuracy"])
    assert text.count("Answering only") == 1 and "the most confident 100% of clips (probability at least 0.900)" in text


@pytest.mark.parametrize(
    "rows", [[{"epoch": 1, "train_loss": 1.0}], [{"epoch": 1, "valid_macro_f1": None}], CURVES[:1]]
)
def test_curves_of_short_runs(tmp_path, rows):
    figures.curves(tmp_path / "curves.png", rows, 1)
    assert (tmp_path / "curves.png").stat().st_size > 1000


# ---- comparison and summary


def test_comparison_is_written(tmp_path):
    a, b = simulate(skill=0.5), simulate(skill=2)
    comparison = compare_models(a, b, draws=50)
    write_comparison(tmp_path, "frozen", "fine|tuned", comparison)
    read = json.loads((tmp_path / "comparison.json").read_text())
    assert (read["a"], read["b"]) == ("frozen", "fine|tuned")
    assert read["clip"] == comparison["clip"] and len(read["changed"]) == len(comparison["changed"])
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("# fine\\|tuned against frozen") and "corrected" in text
    assert f"{comparison['clip']['accuracy']['difference']['value']:+.3f}" in text


def test_comparison_without_speakers_is_written(tmp_path):
    p = build([[0.9, 0.1], [0.2, 0.8]], [0, 1], labels=("us", "england"))
    write_comparison(tmp_path, "a", "b", compare_models(p, p, draws=5))
    assert "too narrow" in (tmp_path / "comparison.md").read_text()


def test_summary_is_written(tmp_path):
    runs = [evaluate(simulate(seed=s), draws=5) for s in (1, 2, 3)]
    write_summary(tmp_path, summarise_runs(runs, ["seed 1", "seed 2", "seed 3"]))
    assert json.loads((tmp_path / "summary.json").read_text())["runs"] == ["seed 1", "seed 2", "seed 3"]
    text = (tmp_path / "summary.md").read_text()
    assert "seed 3" in text and f"{np.mean([r['clip']['accuracy']['value'] for r in runs]):.3f}" in text


def test_evaluating_and_reporting_need_no_torch():
    code = "import sys, accent_plugin.evaluation.evaluate, accent_plugin.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
