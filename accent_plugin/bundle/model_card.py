"""The model card of a bundle: README.md with the Hugging Face Hub's metadata.

All figures and warnings of the card come from the report.
"""

import re
from pathlib import Path

import yaml

from accent_plugin import files
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.bundle.config import CARD_FILE
from accent_plugin.errors import BundleError
from accent_plugin.evaluation.evaluate import SMALL
from accent_plugin.report.markdown import table_rows, to_markdown
from accent_plugin.report.text import NAMES, count_in_words, format_duration, format_figure, warnings_of

NOT_EVALUATED = "Not evaluated: nothing is known about how often this model is right."

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
print(classify({{"array": samples, "sampling_rate": {SAMPLE_RATE:_}}}))  # mono; a file's name needs FFmpeg

# Its full report on labelled speech, with accent_plugin installed:
# accent-plugin evaluate --model FOLDER --data DATASETDICT"""

_USE_IN_ONNX = """\
# With accent_plugin and onnxruntime installed; neither torch nor SpeechBrain is needed
from accent_plugin.onnx import OnnxAccentClassifier

classifier = OnnxAccentClassifier.from_bundle("FOLDER")
print(classifier.predict_file("clip.wav"))

# accent-plugin classify FILES --model FOLDER"""

_USE = """\
# SpeechBrain's own class; it runs the hyperparams.yaml of the folder, so load only what you trust
from speechbrain.inference.classifiers import EncoderClassifier

classifier = EncoderClassifier.from_hparams(source="FOLDER")
log_probabilities, score, index, label = classifier.classify_file("clip.wav")

# The same scores, running nothing of the folder; several files, long recordings, abstaining
from accent_plugin.inference import AccentClassifier

classifier = AccentClassifier.from_bundle("FOLDER")
print(classifier.predict_file("clip.wav"))"""


def write(folder, config, metrics=None, license="other"):
    """Write the card of a bundle.

    Arguments
    ---------
    folder : str or Path
        The folder of the bundle.
    config : dict
        The content of its config.json.
    metrics : dict, or None
        The content of the run's metrics.json. None if the model was not evaluated; the card then says so.
    license : str
        The Hub's name of the licence; "other" if none was chosen.

    Returns
    -------
    path : Path

    Raises
    ------
    BundleError
        If the labels of the metrics differ.
    """
    path = Path(folder) / CARD_FILE
    text = render(config, metrics, license)
    with files.atomic_write(path) as file:
        file.write(text)
    return path


def render(config, metrics=None, license="other"):
    """Make the text of a card; arguments as for `write`.

    Example
    -------
    >>> config = {"labels": ["us", "england"], "sample_rate": 16000, "model": {"encoder": {"family": "wav2vec2"}}}
    >>> render(config).splitlines()[:3]
    ['---', 'language: en', 'license: other']
    """
    if metrics is not None and list(metrics["confusion"]["labels"]) != list(config["labels"]):
        raise BundleError(
            f"the metrics are of a model that tells {', '.join(metrics['confusion']['labels'])} apart, the bundle's of "
            f"{', '.join(config['labels'])}: give the metrics.json of the bundle's own run"
        )
    front = yaml.safe_dump(metadata(config, metrics, license), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{to_markdown(_contents(config, metrics))}"


def metadata(config, metrics=None, license="other"):
    """Make the Hub's metadata of a card, as plain values; arguments as for `write`."""
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
    """Convert a bundle's card for the model in transformers' format: metadata and usage are replaced.

    Arguments
    ---------
    card : str
        From `render`. Text that a user has added stays.

    Raises
    ------
    BundleError
        If the card does not start with metadata.
    """
    return _for_library(card, "transformers", _USE_IN_TRANSFORMERS)


def for_onnx(card):
    """Convert a bundle's card for the model in ONNX format, like `for_transformers`."""
    return _for_library(card, "onnx", _USE_IN_ONNX)


def _for_library(card, library, use):
    try:
        _, front, text = re.split(r"^---\n", card, maxsplit=2, flags=re.M)
        meta = yaml.safe_load(front)
        meta |= {"library_name": library, "tags": [library, *meta.get("tags", [])]}
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BundleError(f"{CARD_FILE} has no metadata on top, or damaged ones ({type(error).__name__})") from None
    meta["tags"] = [tag for tag in meta["tags"] if tag != "speechbrain"]
    front = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    before, heading, after = text.partition(f"## {_USE_HEADING}\n")
    rest = re.split(r"^(?=## )", after, maxsplit=1, flags=re.M)[1:]
    use = to_markdown([("text", "FOLDER is where this card lies."), ("code", use)])
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
                **({"args": dict(arguments)} if arguments else {}),  # its own, or YAML would refer to the first
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
    for sentence in [sentence for _, sentence in warnings] if metrics else [NOT_EVALUATED]:
        yield "warning", sentence
    encoder = model["encoder"]
    pooling = f", {model['pooling'].replace('_', ' ')} pooling" if model.get("pooling") else ""
    yield (
        "text",
        f"Tells which of {len(labels)} accents a recording of English is in: {', '.join(labels)}. Encoder: "
        f"{encoder.get('name') or 'not named'} ({encoder['family']}){pooling}; it listens at {config['sample_rate']:,} "
        f"Hz, mono. {_origin(config)}",
    )

    yield "heading", 2, _USE_HEADING
    yield "text", "With accent_plugin installed; FOLDER is where this card lies."
    yield "code", _USE
    yield "code", "accent-plugin classify FILES --model FOLDER"

    yield "heading", 2, "Evaluation"
    yield from _figures(metrics) if metrics else [("text", NOT_EVALUATED)]
    yield "heading", 2, "Calibration"
    yield "text", _calibration(config.get("calibration"))
    yield "heading", 2, "Limits"
    yield "list", list(_limits(config, metrics))
    if metrics and metrics.get("bands"):
        yield "table", ["worse recordings", "unweighted average recall by clip", "cost"], [
            [name, format_figure(v["unweighted_average_recall"]), format_figure(v["difference"], signed=True)]
            for name, v in metrics["bands"].items()
        ]  # fmt: skip

    yield "heading", 2, "Intended use"
    yield (
        "text",
        "For statistics over many recordings, such as how well speech recognition serves the speakers of an accent, "
        "for sorting corpora, and for research.",
    )
    yield (
        "warning",
        "Not for deciding about a person: not in asylum, hiring, credit, insurance, schooling or policing. An accent "
        "tells neither where somebody comes from nor who they are, and this model is wrong about some people.",
    )

    if metrics:
        yield "heading", 2, "Data"
        data = {key: value for key, value in metrics["data"].items() if value not in ({}, [], "")}
        yield "table", ["data", ""], list(table_rows({**data, "seconds": round(data["seconds"], 1)}))
    versions = config.get("versions") or (metrics or {}).get("versions")
    if versions:
        yield "heading", 2, "Versions"
        yield "table", ["", "version"], list(table_rows(versions))


def _origin(config):
    if config.get("imported_from"):
        return (
            f"Trained elsewhere: imported from {config['imported_from']}, a classifier of Hugging Face's transformers."
        )
    return "Trained with accent_plugin, a plugin of SpeechBrain."


def _figures(metrics):
    data = metrics["data"]
    levels = [(level, metrics[level]) for level in ("clip", "speaker") if metrics[level]]
    tested = [count_in_words(data["clips"], "clip"), format_duration(data["seconds"])]
    if data["speakers"] is not None:
        tested.insert(0, count_in_words(data["speakers"], "speaker"))
    accents = metrics["per_accent"]
    unit = "speakers within their accent" if data["speakers"] is not None else "clips, since speakers are not known"
    yield (
        "text",
        f"Tested on {data['name'] or 'data without a name'}: {', '.join(tested)}. Guessing gives an unweighted average "
        f"recall of {1 / len(accents):.2f}. In brackets: 95 % intervals of a bootstrap over {unit}; by speaker, every "
        "speaker counts once.",
    )
    yield "table", ["", *(f"by {level}" for level, _ in levels)], [
        [text, *(format_figure(figures[name]) for _, figures in levels)] for name, text in NAMES.items()
    ]  # fmt: skip
    yield "table", ["accent", "recall by clip", "precision", "F1", "clips", "speakers"], [
        [label, *(format_figure(v[key]) for key in ("recall", "precision", "f1")), f"{v['clips']:,}",
         "–" if v["speakers"] is None else f"{v['speakers']:,}"]
        for label, v in accents.items()
    ]  # fmt: skip


def _calibration(calibration):
    if not calibration:
        return "Not calibrated: probabilities are as training left them, and mostly too sure."
    loss, error, curve = (calibration[key] for key in ("log_loss", "expected_calibration_error", "curve"))
    text = (
        f"Calibrated with one temperature, {calibration['temperature']:.3f}, fitted on {calibration['clips']:,} "
        f"validation clips and part of the weights. On these clips log-loss went from {loss['before']:.3f} to "
        f"{loss['after']:.3f}, expected calibration error from {error['before']:.3f} to {error['after']:.3f}."
    )
    points = list(zip(curve["coverage"], curve["threshold"], curve["risk"], strict=True))
    coverage, threshold, risk = next(point for point in points if point[0] >= min(0.8, points[-1][0]))
    return text + (
        f" Answering only from a probability of {threshold:.3f} on would there have answered {coverage:.0%} of clips, "
        f"{risk:.1%} of them wrongly; answering all, {points[-1][2]:.1%}."
    )


def _limits(config, metrics):
    yield (
        f"It knows {', '.join(config['labels'])} and nothing else: speech of any other accent or language, and noise, "
        "get one of these answers too."
    )
    if not metrics:
        yield NOT_EVALUATED
        return
    if metrics.get("out_of_set"):
        others = metrics["out_of_set"]["overall"]
        yield (
            f"On {others['clips']:,} clips of other accents a probability of 0.8 or more was given to "
            f"{others['confident']['0.8']:.0%}; they are told from known accents with an AUROC of "
            f"{others['auroc']:.3f} (0.5: not at all)."
        )
    if metrics["data"].get("speakers_disjoint") is not True:
        yield "Train and test are not known to be of different speakers: on unseen ones it is worse than its figures."
    few = [f"{kind} {name} ({_speakers(cell)})" for kind, cells in metrics["groups"].items()
           for name, cell in cells.items() if cell["small"]]  # fmt: skip
    few += [f"accent {label} ({_speakers(cell)})" for label, cell in metrics["per_accent"].items()
            if cell["recall"]["n"] < SMALL]  # fmt: skip
    if few:
        yield f"Tested on fewer than {SMALL} speakers, so that nothing is known: {', '.join(few)}."
    if not metrics.get("bands"):
        yield "Not tested on worse recordings, such as telephone, MP3 or noise."
    yield from metrics["notes"]


def _speakers(cell):
    return (
        count_in_words(cell["clips"], "clip")
        if cell["speakers"] is None
        else count_in_words(cell["speakers"], "speaker")
    )
