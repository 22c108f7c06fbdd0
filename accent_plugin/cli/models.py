"""Commands that use a trained model: classify, evaluate, serve, export, import, push."""

import os
import re
import sys
from pathlib import Path

from accent_plugin.errors import AccentPluginError


def run_classify(arguments):
    """Classify files."""
    from accent_plugin.inference import bulk

    format = arguments.format or format_of(arguments.output)
    sources = list(bulk.find(arguments.files))
    reading = {"workers": arguments.workers, "batch_seconds": arguments.batch_seconds}
    _require_use_of_labels(arguments, [arguments.model])
    if arguments.segments or arguments.channels == "each":
        return _classify_segments(arguments, sources, format)
    classifier = _classifier(arguments, arguments.model, **_window_options(arguments))
    _, failed = bulk.run(classifier, sources, format, arguments.output, **reading)
    return 1 if failed else 0


def _classify_segments(arguments, sources, format):
    from accent_plugin.inference import segments

    found = segments.read_segments(arguments.segments) if arguments.segments else None
    if found:
        segments.assign_segments(found, sources)
    options = {"batch_seconds": arguments.batch_seconds} | _window_options(arguments)
    classifier = _classifier(arguments, arguments.model, **options)
    each = arguments.channels == "each"
    _, failed = segments.run(classifier, sources, found, format, arguments.output, each_channel=each)
    return 1 if failed else 0


def run_serve(arguments):
    """Serve the page and the HTTP API."""
    from accent_plugin.serving import server, service

    _require_use_of_labels(arguments, [arguments.model])
    given = vars(arguments)
    limits = service.Limits(**{name: given[name] for name in vars(service.Limits()) if given[name] is not None})
    options = {"host": arguments.host, "port": arguments.port, "page": not arguments.no_page}
    token = os.environ.get(server.TOKEN_VARIABLE) if arguments.token is None else arguments.token
    server.require(limits, token)
    classifier = _classifier(
        arguments, arguments.model, batch_seconds=arguments.batch_seconds, **_window_options(arguments)
    )
    card = "" if arguments.no_page else _read_card(arguments.model)
    server.run(classifier, card, limits, token=token, open=arguments.open, **options)


def _read_card(model):
    # Imported late: the page needs Matplotlib for its colours, the API alone does not.
    from accent_plugin.serving import page

    return page.read_card(model)


def _window_options(arguments):
    """The window and hop that were given; without a hop, it is half the window."""
    window, hop = arguments.window_seconds, arguments.hop_seconds
    if hop is None and window is not None:
        hop = window / 2
    return {name: value for name, value in (("window_seconds", window), ("hop_seconds", hop)) if value is not None}


def run_evaluate(arguments):
    """Evaluate models on labelled data."""
    import json
    import shlex

    from accent_plugin import files
    from accent_plugin.evaluation.compare import compare_models
    from accent_plugin.inference import labelled
    from accent_plugin.report.comparisons import write_comparison
    from accent_plugin.report.write import MARKDOWN_FILE

    if len(arguments.model) > 2:
        raise AccentPluginError(f"--model is given {len(arguments.model)} times: give one model, or two to compare")
    _require_use_of_labels(arguments, arguments.model)
    classifiers = [_classifier(arguments, model, **labelled.WHOLE_CLIPS) for model in arguments.model]
    clips = _read_rows(arguments, classifiers)
    out, command, found, failed = Path(arguments.out), shlex.join(["accent-plugin", *arguments.argv]), [], 0
    with files.writable_folder(out, "--out"):
        pass
    for number, (model, classifier) in enumerate(zip(arguments.model, classifiers, strict=True), 1):
        predictions, failures = labelled.evaluate_model(
            classifier, clips.rows, sys.stderr.isatty(), workers=arguments.workers
        )
        if number == 1:
            labelled.remove_earlier(out)
        folder = out if len(classifiers) == 1 else labelled.folder_of(out, number)
        metrics = labelled.write_evaluation(folder, classifier, predictions, arguments.data, clips, failures, command)
        found.append(predictions)
        failed += failures.total()
        print(f"{model}: {folder / MARKDOWN_FILE}")
        print(json.dumps({scope: metrics[scope] for scope in ("clip", "speaker")}, indent=1))
    if len(found) == 2:
        write_comparison(out, *short_names(arguments.model), compare_models(*labelled.evaluate_both(*found)))
        print((out / "comparison.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


def _read_rows(arguments, classifiers):
    """Read the labelled clips for classifiers, which must have the same labels."""
    from accent_plugin.data import labels
    from accent_plugin.inference.labelled import ROLES, read_labelled

    if len({frozenset(each.labels) for each in classifiers}) > 1:
        first, second = (", ".join(each.labels) for each in classifiers)
        raise AccentPluginError(f"models with different labels cannot be compared: {first}; and {second}")
    mapping = labels.read_mapping(arguments.mapping) if arguments.mapping else None
    columns = {role: getattr(arguments, f"{role}_column") for role in ROLES}
    return read_labelled(arguments.data, classifiers[0].labels, mapping=mapping, split=arguments.split, columns=columns)


def run_export(arguments):
    """Export a run as a bundle, or a bundle to transformers or ONNX."""
    print(EXPORTS[arguments.to](arguments))


def _export_bundle(arguments):
    from accent_plugin.experiment.run import export

    return export(arguments.run, arguments.out, arguments.device or "cpu")


def _export_huggingface(arguments):
    from accent_plugin.exchange.hugging_face import to_hugging_face

    folder = _bundle_of(arguments.run)
    return to_hugging_face(folder, arguments.out or folder.absolute().parent / arguments.to)


def _export_onnx(arguments):
    from accent_plugin.exchange import onnx_export

    folder = _bundle_of(arguments.run)
    name = "onnx" if arguments.precision == "fp32" else f"onnx_{arguments.precision}"
    out = arguments.out or folder.absolute().parent / name
    return onnx_export.export(folder, out, arguments.precision, arguments.data, arguments.unchecked, arguments.split)


# Format -> function that writes it and returns its path.
EXPORTS = {"bundle": _export_bundle, "huggingface": _export_huggingface, "onnx": _export_onnx}


def _bundle_of(run):
    """The bundle folder, given the output folder of a run or the bundle itself."""
    run = Path(run)
    return run / "bundle" if (run / "bundle").is_dir() else run


def run_import(arguments):
    """Convert a transformers classifier to a bundle."""
    from accent_plugin.exchange.hugging_face import import_hugging_face

    print(import_hugging_face(arguments.source, arguments.out, _read_label_names(arguments)))


def _read_label_names(arguments):
    """Read the `--labels` mapping; None if it is not given."""
    from accent_plugin.data import labels

    return labels.read_mapping(arguments.labels) if arguments.labels else None


def run_push(arguments):
    """Upload a bundle to the Hub."""
    from accent_plugin.exchange import hub

    print(hub.push(_bundle_of(arguments.run), arguments.repo, private=not arguments.public))


def _classifier(arguments, model, **options):
    for name in ("min_probability", "max_risk", "min_coverage"):
        if getattr(arguments, name, None) is not None:
            options[name] = getattr(arguments, name)
    if _choose_backend(arguments, model) == "onnx":
        from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier

        return OnnxAccentClassifier.from_bundle(model, **options)

    from accent_plugin.inference.classifier import AccentClassifier

    if not _is_hugging_face(model):
        return AccentClassifier.from_bundle(model, arguments.device, precision=arguments.precision, **options)

    from accent_plugin import devices
    from accent_plugin.exchange.hugging_face import from_hugging_face

    if arguments.device:
        devices.require_device(arguments.device)
    loaded = from_hugging_face(model, _read_label_names(arguments))
    run_opts = {"device": arguments.device} if arguments.device else None
    return AccentClassifier(loaded.modules, loaded.hparams, run_opts=run_opts, precision=arguments.precision, **options)


# Devices of NVIDIA, AMD, and either on Windows' Linux. torch could tell, but takes seconds to import.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def _choose_backend(arguments, model):
    """The backend that was given, or the one that starts and runs faster.

    On a CPU, this is ONNX Runtime wherever there is a graph. An accelerator, --device and --precision need torch.
    """
    from accent_plugin.bundle import config as bundle_config

    exported = Path(model, bundle_config.ONNX_FILE).is_file()
    needs_torch = arguments.device or arguments.precision != "fp32"
    if needs_torch and (exported or arguments.backend == "onnx"):
        raise AccentPluginError(
            "--device and --precision work with the torch backend only: ONNX Runtime runs on the CPU, in the precision "
            "of the graph"
        )
    if arguments.backend:
        return arguments.backend
    has_graph = Path(model, bundle_config.GRAPH_FILE).is_file()
    fast_on_cpu = has_graph and not needs_torch and not any(map(os.path.exists, _ACCELERATORS))
    return "onnx" if exported or fast_on_cpu else "torch"


def _is_hugging_face(model):
    """Whether a model is a transformers classifier, given by its folder or its name on the Hub."""
    from accent_plugin.bundle import config as bundle_config

    if Path(model).exists():
        return bundle_config.is_hugging_face(model)
    # USER/NAME. A mistyped path below an existing folder is not looked up on the Hub.
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).parent.exists()


def _require_use_of_labels(arguments, models):
    if arguments.labels and not any(map(_is_hugging_face, models)):
        raise AccentPluginError(
            f"--labels renames the classes of a Hugging Face model, but {' and '.join(models)} is not one"
        )


def format_of(output):
    """Format of an output file, from its suffix."""
    suffix = Path(output).suffix.lower() if output else ""
    return {".jsonl": "jsonl", ".csv": "csv"}.get(suffix, "jsonl" if output else "table")


def short_names(runs):
    """Folder names of runs; full paths if the names are not unique."""
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else list(map(str, runs))
