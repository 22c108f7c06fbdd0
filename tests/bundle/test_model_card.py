"""The card of a bundle: the Hub can read it, it repeats the report, and it hides no limit."""

import importlib
import re

import numpy as np
import pytest
import yaml
from helpers.predictions import LABELS, build, simulate
from huggingface_hub import ModelCard, ModelCardData

from accent_plugin.bundle import model_card
from accent_plugin.errors import BundleError
from accent_plugin.evaluation import calibration
from accent_plugin.evaluation.compare import FIGURES, out_of_set_scores
from accent_plugin.evaluation.predictions import ScoredClips
from accent_plugin.report.text import LEAKY, NAMES, SYNTHETIC
from accent_plugin.report.write import write_report

NASTY = 'a|b <script>alert("x")</script>\n---\nlicense: mit\n# [d](e): "f" \'g\' {h} & *i* `j`'


def config(**more):
    return {
        "labels": list(LABELS),
        "sample_rate": 16_000,
        "model": {
            "encoder": {"name": "facebook/wav2vec2-base", "family": "wav2vec2"},
            "pooling": "attentive_statistics",
        },
        "calibration": None,
        "versions": {"torch": "2.11.0"},
        **more,
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Function: facts of the data, arguments of the report -> content of its metrics.json."""

    def evaluate(data=None, predictions=None, **more):
        data = {"name": "a corpus", "synthetic": False, "speakers_disjoint": True, "split": "speaker", **(data or {})}
        folder = tmp_path_factory.mktemp("report")
        return write_report(folder, predictions or simulate(speakers=30), data=data, draws=20, **more)

    return evaluate


@pytest.fixture(scope="module")
def honest(evaluated):
    return evaluated()


def body(text):
    return text.split("\n---\n", 1)[1]


# ---- metadata


def test_the_hub_reads_the_metadata(tmp_path, honest):
    path = model_card.write(tmp_path, config(), honest)
    assert path == tmp_path / "README.md" and [f.name for f in tmp_path.iterdir()] == ["README.md"]
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    assert (card.data.language, card.data.license, card.data.library_name) == ("en", "other", "speechbrain")
    assert (card.data.pipeline_tag, card.data.base_model) == ("audio-classification", "facebook/wav2vec2-base")
    assert {"speechbrain", "accent", "wav2vec2"} <= set(card.data.tags) and "synthetic" not in card.data.tags
    assert card.data.metrics == ["accuracy", "recall", "f1"]
    results = {result.metric_name: result for result in card.data.eval_results}
    assert len(results) == 6
    for level in ("clip", "speaker"):
        for figure in ("accuracy", "unweighted_average_recall", "macro_f1"):
            result = results[f"{NAMES[figure]} by {level}"]
            assert result.metric_value == honest[level][figure]["value"]
            assert (result.task_type, result.dataset_name, result.dataset_type, result.dataset_split) == (
                "audio-classification", "a corpus", "a_corpus", "test",
            )  # fmt: skip


def test_metadata_come_back_as_they_were(honest):
    text = model_card.render(config(), honest, license="cc0-1.0")
    front = text.split("---\n")[1]
    assert yaml.safe_load(front) == model_card.metadata(config(), honest, "cc0-1.0")
    assert yaml.safe_load(front)["license"] == "cc0-1.0"
    assert "&id" not in front and "!!" not in front


def test_results_of_synthetic_or_leaky_data_say_so(evaluated):
    meta = model_card.metadata(config(), evaluated({"synthetic": True, "split": "random"}))
    assert "synthetic" in meta["tags"]
    (result,) = meta["model-index"][0]["results"]
    assert result["dataset"]["name"] == "a corpus (LEAKY split: speakers shared) (synthetic speech)"


@pytest.mark.parametrize("name", ["encoder", "/home/me/encoder", "../x/y", "", "a/b/c"])
def test_an_encoder_that_is_not_on_the_hub_is_no_base_model(name):
    encoder = {"name": name, "family": "moonshine"}
    assert "base_model" not in model_card.metadata(config(model={"encoder": encoder, "pooling": "mean"}))


def test_without_client_ids_there_are_results_by_clip_only(evaluated):
    p = simulate()
    metrics = evaluated({"speakers_disjoint": None}, build(p.probabilities, p.truth))
    text = model_card.render(config(), metrics)
    assert {r.metric_name.rpartition(" ")[2] for r in ModelCard(text).data.eval_results} == {"clip"}
    assert "speakers are not known" in text and "MAY SHARE SPEAKERS" in text
    assert "Train and test may share speakers: expect lower figures" in text


# ---- text


def test_figures_are_those_of_the_report(honest):
    text = model_card.render(config(), honest)
    assert "\n# English accents: us, england, australia\n" in text
    for figure in FIGURES:
        cells = [
            f"{v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})"
            for v in (honest["clip"][figure], honest["speaker"][figure])
        ]
        assert f"| {NAMES[figure]} | {' | '.join(cells)} |" in text
    for label in LABELS:
        assert f"| {label} | {honest['per_accent'][label]['recall']['value']:.3f} (" in text
    assert "30 speakers, 120 clips" in text and "| torch | 2.11.0 |" in text


def test_it_says_how_to_use_it_and_what_not_to_use_it_for(honest):
    text = model_card.render(config(), honest)
    for words in (
        'EncoderClassifier.from_hparams(source="FOLDER")',
        'AccentClassifier.from_bundle("FOLDER")',
        "accent-plugin classify FILES --model FOLDER",
        "asylum, hiring, credit",
        "policing",
        "The model's labels are us, england, australia.",
    ):
        assert words in text


@pytest.mark.parametrize("convert", [str, model_card.for_transformers, model_card.for_onnx])
def test_what_a_card_imports_from_the_package_exists(honest, convert):
    text = convert(model_card.render(config(), honest))
    for module, name in re.findall(r"^from (accent_plugin\S*) import (\w+)$", text, re.M):
        assert hasattr(importlib.import_module(module), name)


def test_synthetic_speech_is_shouted_in_the_first_line(evaluated):
    lines = body(model_card.render(config(), evaluated({"synthetic": True}))).split("\n")
    assert lines[1] == "# English accents: us, england, australia (SYNTHETIC SPEECH)"
    assert lines[3] == f"> **{SYNTHETIC}**"


def test_a_leaky_split_is_shouted_too(evaluated):
    text = body(model_card.render(config(), evaluated({"split": "random", "speakers_disjoint": False})))
    assert "(LEAKY SPLIT: SPEAKERS SHARED)" in text.split("\n")[1] and LEAKY in text
    assert "expect lower figures on new speakers" in text


def test_warnings_of_the_report_are_on_top(evaluated):
    clips = simulate(speakers=30)
    constant = build(np.tile([0.5, 0.3, 0.2], (len(clips.ids), 1)), clips.truth, clips.client_ids)
    metrics = evaluated(predictions=constant)
    lines = body(model_card.render(config(), metrics)).strip().splitlines()
    assert [line for line in lines[1:8] if line.startswith("> **The model answers every clip with us")]


def test_without_metrics_it_says_that_it_was_not_evaluated():
    text = model_card.render(config())
    card = ModelCard(text)
    assert card.data.eval_results is None and card.data.metrics is None
    assert body(text).split("\n")[1].endswith("(NOT EVALUATED)")
    assert text.count(model_card.NOT_EVALUATED) == 2 and "asylum" in text


def test_limits_are_those_of_the_report(evaluated):
    few = simulate(speakers=9)
    worse = simulate(speakers=9, skill=0.5)
    metrics = evaluated(
        predictions=few,
        out_of_set=out_of_set_scores(few, few.log_probabilities[:9], ["scotland"] * 9),
        bands={"telephone": worse},
        notes=["3 clips were left out."],
    )
    text = model_card.render(config(), metrics)
    limits = text.split("## Limits")[1].split("## ")[0]
    assert "Fewer than 5 test speakers" in limits and "gender female (3 speakers)" in limits
    assert "accent us (3 speakers)" in limits
    assert "Of 9 clips with other accents" in limits and "AUROC" in limits
    assert "3 clips were left out." in limits
    cost = metrics["bands"]["telephone"]["difference"]["value"]
    assert "| telephone | " in limits and f"{cost:+.3f}" in limits
    assert "Not tested on degraded audio" not in limits


def test_without_bands_it_says_that_bands_were_not_tested(honest):
    assert "Not tested on degraded audio" in model_card.render(config(), honest)


def test_how_the_data_were_made_is_told(evaluated):
    made = {"made_by": "accent_plugin 0.1.0", "dropped": {"no accent": 12}, "source": {"kind": "release", "name": "cv"}}
    counts = {"train": {"us": {"clips": 12345, "speakers": 3}}}
    text = model_card.render(config(), evaluated({"counts": counts, "made": made, "left_out": {}}))
    assert "| made, made_by | accent_plugin 0.1.0 |" in text and "| made, source | kind release, name cv |" in text
    assert "| counts, train, us | clips 12,345, speakers 3 |" in text and "left_out" not in text


def test_calibration_is_told():
    p = simulate(speakers=60)
    made = calibration.describe_calibration(2 * p.log_probabilities, p.truth)
    text = model_card.render(config(calibration=made))
    assert f"The temperature, {made['temperature']:.3f}, was fitted on 240 validation clips" in text
    assert f"from {made['log_loss']['before']:.3f} to {made['log_loss']['after']:.3f}" in text
    answered = next(i for i, c in enumerate(made["curve"]["coverage"]) if c >= 0.8)
    assert f"80% of these clips would have been answered, {made['curve']['risk'][answered]:.1%} of them wrongly" in text
    assert "Not calibrated" in model_card.render(config())


def test_calibration_on_augmented_copies_is_named(honest):
    made = calibration.describe_calibration(np.log([[0.9, 0.1]] * 3 + [[0.2, 0.8]]), np.array([0, 0, 1, 1]))
    texts = [model_card.render(config(calibration=made | more), honest) for more in ({}, {"augmented": True})]
    assert ["half of them augmented copies" in text for text in texts] == [False, True]


def test_calibration_of_one_clip_is_told():
    made = calibration.describe_calibration(np.log([[0.5, 0.3, 0.2]]), [0])
    text = model_card.render(config(calibration=made))
    assert "100% of these clips would have been answered, 0.0% of them wrongly" in text


def test_text_of_the_data_is_escaped(evaluated):
    p = simulate(speakers=9)
    labels = (NASTY, "us", "england")
    p = ScoredClips(p.ids, p.client_ids, p.truth, p.log_probabilities, labels, p.seconds)
    metrics = evaluated({"name": NASTY, "made": {"by": NASTY}}, p, notes=[NASTY])
    encoder = {"name": NASTY, "family": "wav2vec2"}
    text = model_card.render(config(labels=list(labels), model={"encoder": encoder, "pooling": "mean"}), metrics)
    data = ModelCard(text).data
    assert data.license == "other" and " ".join(NASTY.split()) == data.eval_results[0].dataset_name
    assert "<script" not in body(text) and "[d](e)" not in body(text)
    assert "\n---\n" not in body(text)
    for table in re.findall(r"(?:^\|.*\|\n)+", body(text), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_metrics_of_another_model_are_refused(honest):
    with pytest.raises(
        BundleError, match="of the metrics are us, england, australia, those of the bundle us, scotland"
    ):
        model_card.render(config(labels=["us", "scotland"]), honest)


def test_same_inputs_same_bytes(tmp_path, honest):
    first = model_card.write(tmp_path, config(), honest).read_bytes()
    assert model_card.write(tmp_path, config(), honest).read_bytes() == first
