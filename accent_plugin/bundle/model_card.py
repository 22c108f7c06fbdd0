"""The model card of a bundle: a README.md with metadata for the Hugging Face Hub.

All metrics and warnings come from the report.
"""

import re
from pathlib import Path

import yaml

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle.config import CARD_FILE
from accent_plugin.errors import BundleError
from accent_plugin.evaluation.evaluate import SMALL
from accent_plugin.evaluation.selective import operating_point
from accent_plugin.report.markdown import table_rows, to_markdown
from accent_plugin.report.sections import accents_table, figures_table
from accent_plugin.report.text import (
    NAMES,
    UNCALIBRATED,
    count_in_words,
    describe_amount,
    format_figure,
    limit_of_labels,
    warnings_of,
)

NOT_EVALUATED = "Not evaluated: the accuracy of this model is unknown."

# Figure of a report -> the Hub's name of the metric, and its arguments.
_HUB_METRICS = {
    "accuracy": ("accuracy", None),
    "unweighted_average_recall": ("recall", {"average": "macro"}),
    "macro_f1": ("f1", {"average": "macro"}),
}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_USE_HEADING = "How to use it"

_USE_IN_TRANSFORMERS = f"""\
from transformers import pipeline

classify = pipeline("audio-classification", "FOLDER")
print(classify({{"array": samples, "sampling_rate": {SAMPLE_RATE:_}}}))  # mono; file names need FFmpeg

# Full report on labelled speech, with accent_plugin installed:
# accent-plugin evaluate --model FOLDER --data DATASETDICT"""

_USE_IN_ONNX = """\
# Requires accent_plugin and onnxruntime, but neither torch nor SpeechBrain
from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier

classifier = OnnxAccentClassifier.from_bundle("FOLDER")
print(classifier.predict_file("clip.wav"))

# accent-plugin classify FILES --model FOLDER"""

_USE = """\
# SpeechBrain's own class executes the folder's hyperparams.yaml: load only models that you trust
from speechbrain.inference.classifiers import EncoderClassifier

classifier = EncoderClassifier.from_hparams(source="FOLDER")
log_probabilities, score, index, label = classifier.classify_file("clip.wav")

# The same scores without executing anything; also for many files, long recordings and abstaining
from accent_plugin.inference import AccentClassifier

classifier = AccentClassifier.from_bundle("FOLDER")
print(classifier.predict_file("clip.wav"))"""


def write(folder, config, metrics=None, license="other"):
    """Write the model card of a bundle, and return its path.

    Arguments
    ---------
    folder : str or Path
    config : dict
        The content of config.json.
    metrics : dict, or None
        The content of the run's metrics.json; None if the model was not evaluated.
    license : str
        The Hub's name of the licence; "other" if none was chosen.

    Raises
    ------
    BundleError
        If the labels in the metrics differ from those of the bundle.
    """
    path = Path(folder) / CARD_FILE
    text = render(config, metrics, license)
    with files.atomic_write(path) as file:
        file.write(text)
    return path


def render(config, metrics=None, license="other"):
    """Return the text of a model card; arguments as for `write`.

    Example
    -------
    >>> config = {"labels": ["us", "england"], "sample_rate": 16000, "model": {"encoder": {"family": "wav2vec2"}}}
    >>> render(config).splitlines()[:3]
    ['---', 'language: en', 'license: other']
    """
    if metrics is not None and list(metrics["confusion"]["labels"]) != list(config["labels"]):
        raise BundleError(
            f"the labels of the metrics are {', '.join(metrics['confusion']['labels'])}, those of the bundle "
            f"{', '.join(config['labels'])}: give the metrics.json of the bundle's own run"
        )
    front = yaml.safe_dump(metadata(config, metrics, license), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{to_markdown(_contents(config, metrics))}"


def metadata(config, metrics=None, license="other"):
    """Return the metadata of a model card for the Hub, as plain values; arguments as for `write`."""
    encoder = config["model"]["encoder"]
    family, base = str(encoder["family"]), str(encoder.get("name", ""))
    synthetic = ["synthetic"] if metrics and metrics["data"].get("synthetic") else []
    meta = {
        "language": "en",
        "license": license,
        "library_name": "speechbrain",
        "pipeline_tag": "audio-classification",
        "tags": ["speechbrain", "accent_plugin", "audio-classification", "accent", "english", family, *synthetic],
    }
    if _HUB_ID.fullmatch(base):
        meta["base_model"] = base
    if metrics:
        meta["metrics"] = [name for name, _ in _HUB_METRICS.values()]
        meta["model-index"] = [{"name": f"{family}-english-accents", "results": [_result(metrics)]}]
    return meta


def for_transformers(card):
    """Adapt a bundle's model card to its transformers export: replace the metadata and the usage, keep the rest.

    Raises
    ------
    BundleError
        If the card does not start with metadata.
    """
    return _for_library(card, "transformers", _USE_IN_TRANSFORMERS)


def for_onnx(card):
    """Adapt a bundle's model card to its ONNX export; see `for_transformers`."""
    return _for_library(card, "onnx", _USE_IN_ONNX)


def _for_library(card, library, use):
    try:
        _, front, text = re.split(r"^---\n", card, maxsplit=2, flags=re.M)
        meta = yaml.safe_load(front)
        meta |= {"library_name": library, "tags": [library, *meta.get("tags", [])]}
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BundleError(f"{CARD_FILE} does not start with valid metadata: {type(error).__name__}") from None
    meta["tags"] = [tag for tag in meta["tags"] if tag != "speechbrain"]
    front = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    before, heading, after = text.partition(f"## {_USE_HEADING}\n")
    rest = re.split(r"^(?=## )", after, maxsplit=1, flags=re.M)[1:]
    use = to_markdown([("text", "FOLDER is the folder with this card."), ("code", use)])
    return f"---\n{front}---\n{before}" + (f"{heading}\n{use}\n{''.join(rest)}" if heading else "")


def _result(metrics):
    name = " ".join(str(metrics["data"]["name"]).split()) or "not named"
    warnings = "".join(f" ({short})" for short, _ in warnings_of(metrics["data"]))
    return {
        "task": {"type": "audio-classification", "name": "English accents"},
        "dataset": {
            "type": re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_") or "not_named",
            "name": name + warnings,
            "split": "test",
        },
        "metrics": [
            {
                "type": kind,
                "value": metrics[level][figure]["value"],
                "name": f"{NAMES[figure]} by {level}",
                **(
                    {"args": dict(arguments)} if arguments else {}
                ),  # a copy: for a shared dict, YAML would write an alias
            }
            for level in ("clip", "speaker")
            if metrics[level]
            for figure, (kind, arguments) in _HUB_METRICS.items()
        ],
    }


def _contents(config, metrics):
    """Yield the blocks of a card for `accent_plugin.report.markdown.to_markdown`; all text is plain."""
    labels, model = config["labels"], config["model"]
    warnings = warnings_of(metrics["data"]) if metrics else []
    short = "; ".join(short for short, _ in warnings) if metrics else "not evaluated"
    yield "heading", 1, f"English accents: {', '.join(labels)}" + (f" ({short.upper()})" if short else "")
    sentences = [NOT_EVALUATED]
    if metrics:
        # Reports of version 0.1.0 have no warnings about answers.
        sentences = [*(sentence for _, sentence in warnings), *metrics.get("warnings", [])]
    for sentence in sentences:
        yield "warning", sentence
    encoder = model["encoder"]
    imported = config.get("imported_from")
    origin = f"Imported from {imported}, a transformers classifier." if imported else "Trained with accent_plugin."
    pooling = f", {model['pooling'].replace('_', ' ')} pooling" if model.get("pooling") else ""
    yield (
        "text",
        f"Classifies recordings of English into {len(labels)} accents: {', '.join(labels)}. Encoder: "
        f"{encoder.get('name') or 'not named'} ({encoder['family']}){pooling}. Input: {config['sample_rate']:,} Hz, "
        f"mono. {origin}",
    )

    yield "heading", 2, _USE_HEADING
    yield "text", "Requires accent_plugin. FOLDER is the folder with this card."
    yield "code", _USE
    yield "code", "accent-plugin classify FILES --model FOLDER"

    yield "heading", 2, "Evaluation"
    yield from _figures(metrics) if metrics else [("text", NOT_EVALUATED)]
    yield "heading", 2, "Calibration"
    yield "text", _calibration(config.get("calibration"))
    yield "heading", 2, "Limits"
    yield "list", list(_limits(config, metrics))
    if metrics and metrics.get("bands"):
        yield "table", ["degradation", "unweighted average recall by clip", "difference"], [
            [name, format_figure(v["unweighted_average_recall"]), format_figure(v["difference"], signed=True)]
            for name, v in metrics["bands"].items()
        ]  # fmt: skip

    yield "heading", 2, "Intended use"
    yield (
        "text",
        "Statistics over many recordings, such as the error rates of speech recognition by accent; sorting corpora; "
        "research.",
    )
    yield (
        "warning",
        "Do not use this model in decisions about people, such as asylum, hiring, credit, insurance, schooling or "
        "policing. An accent does not show where people come from or who they are, and the model makes errors.",
    )

    if metrics:
        yield "heading", 2, "Data"
        data = {key: value for key, value in metrics["data"].items() if value not in ({}, [], "")}
        yield "table", ["data", ""], list(table_rows({**data, "seconds": round(data["seconds"], 1)}))
    versions = config.get("versions") or (metrics or {}).get("versions")
    if versions:
        yield "heading", 2, "Versions"
        yield "table", ["", "version"], list(table_rows(versions))


def _figures(metrics):
    data = metrics["data"]
    accents = metrics["per_accent"]
    unit = "speakers, stratified by accent" if data["speakers"] is not None else "clips (speakers are not known)"
    yield (
        "text",
        f"Test data: {data['name'] or 'not named'}, {describe_amount(data)}. Chance level of the unweighted average "
        f"recall: {1 / len(accents):.2f}. In brackets: 95 % intervals, from a bootstrap over {unit}. By speaker, each "
        "speaker counts once.",
    )
    yield figures_table({f"by {level}": metrics[level] for level in ("clip", "speaker") if metrics[level]})
    yield accents_table(accents)


def _calibration(calibration):
    if not calibration:
        return UNCALIBRATED
    loss, error, curve = (calibration[key] for key in ("log_loss", "expected_calibration_error", "curve"))
    point = operating_point(curve)
    half = ", half of them augmented copies," if calibration.get("augmented") else ""
    return (
        f"Calibrated by temperature scaling. The temperature, {calibration['temperature']:.3f}, was fitted on "
        f"{calibration['clips']:,} validation clips{half} and is part of the weights. On these clips, log-loss changed "
        f"from {loss['before']:.3f} to {loss['after']:.3f}, and the expected calibration error from "
        f"{error['before']:.3f} to {error['after']:.3f}. With a threshold of {point['threshold']:.3f}, "
        f"{point['coverage']:.0%} of these clips would have been answered, {point['risk']:.1%} of them wrongly. "
        f"Without a threshold, {curve['risk'][-1]:.1%} of all "
        "answers are wrong."
    )


def _limits(config, metrics):
    yield limit_of_labels(config["labels"])
    if not metrics:
        return
    if metrics.get("out_of_set"):
        others = metrics["out_of_set"]["overall"]
        yield (
            f"Of {others['clips']:,} clips with other accents, {others['confident']['0.8']:.0%} got a probability of "
            f"0.8 or more. AUROC between known and other accents: {others['auroc']:.3f} (0.5: chance)."
        )
    if metrics["data"].get("speakers_disjoint") is not True:
        yield "Train and test may share speakers: expect lower figures on new speakers."
    cells = [(f"{kind} {name}", v, v["small"]) for kind, g in metrics["groups"].items() for name, v in g.items()]
    cells += [(f"accent {name}", v, v["recall"]["n"] < SMALL) for name, v in metrics["per_accent"].items()]
    few = [f"{name} ({_speakers(cell)})" for name, cell, small in cells if small]
    if few:
        yield f"Fewer than {SMALL} test speakers, too few for conclusions: {', '.join(few)}."
    if not metrics.get("bands"):
        yield "Not tested on degraded audio, such as telephone speech, MP3 or noise."
    yield from metrics["notes"]


def _speakers(cell):
    kind = "clip" if cell["speakers"] is None else "speaker"
    return count_in_words(cell[f"{kind}s"], kind)
