"""ONNX exports: the same scores as with torch, without importing torch."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from helpers.encoders import TINY

from accent_plugin.bundle import load
from accent_plugin.bundle.config import weights_identity
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.session import open_graph
from accent_plugin.bundle.write import write_bundle
from accent_plugin.cli import models
from accent_plugin.cli.parser import make_parser
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.errors import AccentPluginError, BundleError, ConfigError, ExchangeError
from accent_plugin.exchange import onnx_export
from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * 16_000)).astype(np.float32)


def make_bundle(folder, encoder, speeds=(1.0,), **head):
    """A bundle with scores that differ between clips."""
    torch.manual_seed(0)
    model = AccentModel(make_encoder(str(encoder)), LABELS, **head)
    torch.nn.init.normal_(model.classifier.weight, std=3.0)
    return write_bundle(
        folder, model, LABELS, encoder_name="tiny", pooling=head.get("pooling", "mean"), speeds=list(speeds)
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_bundle):
    """`tiny_bundle` exported to ONNX in fp32."""
    return onnx_export.export(tiny_bundle, tmp_path_factory.mktemp("onnx") / "fp32")


def scores(predictions):
    return np.log([list(prediction.probabilities.values()) for prediction in predictions])


def require_torchs_scores(folder, exported):
    """Clips of one batch, whatever their lengths."""
    waves = [noise(seconds, seed) for seed, seconds in enumerate((0.005, 0.3, 1.0, 1.05, 3.7, 23.0))]
    expected = scores(AccentClassifier.from_bundle(folder, device="cpu").predict_batch(waves))
    found = scores(OnnxAccentClassifier.from_bundle(exported).predict_batch(waves))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.1, "the clips must differ, or nothing is compared"


@pytest.mark.parametrize("name", TINY)
def test_every_family_has_the_scores_of_torch(tmp_path, tiny_encoder, name):
    head = {"pooling": "attentive_statistics", "projector_size": 8, "projector_activation": True}
    folder = make_bundle(tmp_path / "bundle", tiny_encoder(name), speeds=(1.0, 1.1), **head)
    require_torchs_scores(folder, onnx_export.export(folder, tmp_path / "onnx"))


def test_an_export_has_the_scores_of_torch(exported, tiny_bundle):
    require_torchs_scores(tiny_bundle, exported)


def test_a_clip_scores_the_same_alone_and_in_a_batch(exported):
    classifier = OnnxAccentClassifier.from_bundle(exported)
    waves = [noise(seconds, seed) for seed, seconds in enumerate((2.0, 1.8, 1.7, 1.9))]
    alone = scores([classifier.predict(wave, 16_000) for wave in waves])
    np.testing.assert_allclose(scores(classifier.predict_batch(waves)), alone, atol=1e-5)


class Recorder:
    """A session that records the shapes of its inputs."""

    def __init__(self, session, provider):
        self._session, self._provider, self.shapes = session, provider, []

    def get_providers(self):
        return [self._provider, "CPUExecutionProvider"]

    def run(self, names, inputs):
        self.shapes.append(inputs["waves"].shape)
        return self._session.run(names, inputs)


@pytest.mark.parametrize(
    ("provider", "shapes"),
    [
        ("CPUExecutionProvider", [(1, 32_000), (1, 30_000), (1, 28_000)]),
        ("CUDAExecutionProvider", [(3, 32_000)]),
    ],
)
def test_windows_are_scored_one_by_one_without_padding_on_a_cpu(exported, provider, shapes):
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    session = Recorder(open_graph(exported / "model.onnx"), provider)
    classifier = OnnxAccentClassifier(session, config)
    classifier.predict_batch([noise(seconds, seed) for seed, seconds in enumerate((1.75, 2.0, 1.875))])
    assert session.shapes == shapes


def test_files_windows_and_abstaining_match_torch(exported, tiny_bundle, tmp_path):
    soundfile.write(tmp_path / "long.flac", noise(26), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    sources = [tmp_path / "long.flac", tmp_path / "broken.wav"]
    options = {"window_seconds": 8.0, "hop_seconds": 4.0, "min_coverage": 0.5}
    theirs = AccentClassifier.from_bundle(tiny_bundle, device="cpu", **options)
    ours = OnnxAccentClassifier.from_bundle(exported, **options)
    (expected, failure), (found, refused) = theirs.predict_files(sources), ours.predict_files(sources)
    assert refused == failure
    assert ours.threshold == theirs.threshold == 0.5
    assert (found.accent, found.decision, found.seconds) == (expected.accent, expected.decision, expected.seconds)
    assert [(w.start, w.end) for w in found.windows] == [(w.start, w.end) for w in expected.windows]
    for window, other in zip(found.windows, expected.windows, strict=True):
        assert window.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_the_identity_is_that_of_the_graph(exported, tiny_bundle):
    """Results of both must not be mixed in one file: they agree to four digits only."""
    made_of = json.loads((exported / "config.json").read_text(encoding="utf-8"))["onnx"]["made_of"]
    theirs = AccentClassifier.from_bundle(tiny_bundle, device="cpu").identity
    assert made_of.startswith(theirs) and OnnxAccentClassifier.from_bundle(exported).identity != theirs


def test_the_folder_contains_no_local_paths(exported):
    here = [str(Path(each).resolve().parent).encode() for each in (load.__file__, torch.__file__, exported)]
    for path in exported.iterdir():
        assert not [place for place in here if place in path.read_bytes()], path.name


WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchaudio", "speechbrain", "transformers", "onnx"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
"""


def test_the_classifier_needs_neither_torch_nor_speechbrain(exported, tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(2), 16_000)
    script = WITHOUT + (
        "from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier\n"
        "print(OnnxAccentClassifier.from_bundle(sys.argv[1]).predict_file(sys.argv[2]).accent)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, exported, tmp_path / "clip.wav"], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() in LABELS, run.stderr


@pytest.mark.parametrize("model", ["exported", "tiny_bundle"])
def test_the_command_line_needs_neither_torch_nor_speechbrain(request, model, tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(2), 16_000)
    script = WITHOUT + "from accent_plugin.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    command = [
        sys.executable,
        "-c",
        script,
        "classify",
        tmp_path / "clip.wav",
        "--model",
        request.getfixturevalue(model),
    ]
    command += ["--backend", "onnx"]
    run = subprocess.run([*command, "--format", "jsonl"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["accent"] in LABELS


# --------------------------------------------------------------------------------------------------------- smaller


@pytest.mark.parametrize(("precision", "kinds"), [("fp16", {"FLOAT16"}), ("bf16", {"BFLOAT16"}), ("int8", {"INT8"})])
def test_a_lower_precision_gives_similar_scores(exported, tiny_bundle, tmp_path, precision, kinds):
    smaller = onnx_export.export(tiny_bundle, tmp_path / precision, precision, unchecked=True)
    graph = onnx.load(smaller / "model.onnx").graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= 1024]
    found = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in large}
    # Convolutions are not quantised in int8.
    assert found == kinds | ({"FLOAT"} if precision == "int8" else set())
    assert (smaller / "model.onnx").stat().st_size < (exported / "model.onnx").stat().st_size
    waves = [noise(seconds, seed) for seed, seconds in enumerate((1.0, 2.0, 3.0))]
    ours = scores(OnnxAccentClassifier.from_bundle(smaller).predict_batch(waves))
    exact = scores(OnnxAccentClassifier.from_bundle(exported).predict_batch(waves))
    assert 0 < np.abs(np.exp(ours) - np.exp(exact)).max() < 0.05


def test_int8_has_a_scale_for_each_output_and_an_exact_classifier(tmp_path, tiny_encoder):
    folder = make_bundle(tmp_path / "bundle", tiny_encoder("moonshine"))
    out = onnx_export.export(folder, tmp_path / "onnx", "int8", unchecked=True)
    graph = onnx.load(out / "model.onnx").graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    quantised = {
        name.removesuffix("_Transposed_quantized"): shape for name, shape in shapes.items() if "_quantized" in name
    }
    encoder = load_bundle(folder).model.wav2vec2
    linear = {f"wav2vec2.{key}" for key, each in encoder.named_modules() if isinstance(each, torch.nn.Linear)}
    # Neither the classifier, nor the constant that rotates queries and keys.
    assert {name.removesuffix(".weight") for name in quantised} == linear
    assert [shapes[f"{name}_Transposed_scale"] for name in quantised] == [shape[1:] for shape in quantised.values()]


def test_quantisation_leaves_the_root_logger_alone(exported, tmp_path, monkeypatch):
    """ONNX Runtime adds a handler, so that every log message would be printed twice."""
    shutil.copy(exported / "model.onnx", tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])
    onnx_export.lower_precision(tmp_path / "model.onnx", "int8")
    assert logging.root.handlers == []


@pytest.fixture
def losing(monkeypatch):
    """A lower precision that loses two points."""
    found = onnx_export.Comparison("corpus", clips=200, exact=0.9, smaller=0.88, same_label=0.95)
    monkeypatch.setattr(onnx_export, "compare", lambda *arguments: found)


def test_a_lower_precision_that_loses_more_than_a_point_is_refused(losing, tiny_bundle, tmp_path):
    with pytest.raises(ExchangeError, match=r"recall 0.880 instead of 0.900 on 200 clips of corpus.*--unchecked"):
        onnx_export.export(tiny_bundle, tmp_path / "out", "fp16", data="corpus")
    assert not list(tmp_path.iterdir())


def test_unchecked_keeps_a_lower_precision(losing, tiny_bundle, tmp_path):
    out = onnx_export.export(tiny_bundle, tmp_path / "out", "fp16", data="corpus", unchecked=True)
    compared = json.loads((out / "config.json").read_text(encoding="utf-8"))["onnx"]["compared"]
    assert compared["unweighted_average_recall"] == {"fp32": 0.9, "fp16": 0.88}
    OnnxAccentClassifier.from_bundle(out)


def test_a_lower_precision_is_compared_on_validation(exported, tiny_bundle, real_speech):
    """Test clips must not influence the decision."""
    import datasets

    found = onnx_export.compare(exported, exported, real_speech)
    clips = datasets.load_from_disk(str(real_speech))["validation"]
    assert (found.clips, found.loss, found.same_label) == (len(clips), 0.0, 1.0)


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "int4"}, "'int4' is unknown"), ({"precision": "int8"}, "give --data, .* with --unchecked")],
    ids=str,
)
def test_invalid_options_are_an_error(tiny_bundle, tmp_path, options, message):
    with pytest.raises(ExchangeError, match=message):
        onnx_export.export(tiny_bundle, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_other_files_are_not_replaced(tiny_bundle, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(BundleError, match="contains 'thesis.txt', which this command did not write"):
        onnx_export.export(tiny_bundle, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_an_export_with_other_files_is_not_replaced(exported, tiny_bundle, tmp_path):
    import shutil

    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(BundleError, match="contains 'notes.txt', which this command did not write"):
        onnx_export.export(tiny_bundle, tmp_path / "out")


def test_an_export_is_replaced(tiny_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"cut")
    (tmp_path / "out" / "config.json").write_text('{"format_version": 1}')
    out = onnx_export.export(tiny_bundle, tmp_path / "out")
    assert OnnxAccentClassifier.from_bundle(out).labels == LABELS
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_torch_does_not_load_an_export(exported):
    with pytest.raises(BundleError, match="is an ONNX export: load it with accent_plugin.exchange.onnx_classifier"):
        load_bundle(exported)


@pytest.fixture
def spoilt(exported, tmp_path):
    """A copy of `exported`, and a function that replaces its graph and updates the digest."""
    from accent_plugin.bundle import config as bundle_config

    folder = tmp_path / "spoilt"
    shutil.copytree(exported, folder)

    def put(content):
        (folder / "model.onnx").write_bytes(content)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["weights"] = bundle_config.weights_identity(folder / "model.onnx")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return folder, put


def test_a_modified_graph_is_an_error(spoilt):
    folder, _ = spoilt
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-100] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="the SHA-256 of .* differs from config.json"):
        OnnxAccentClassifier.from_bundle(folder)


def test_a_truncated_graph_is_an_error(spoilt):
    folder, _ = spoilt
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    with pytest.raises(BundleError, match="it is damaged or changed"):
        OnnxAccentClassifier.from_bundle(folder)


def test_a_file_that_is_not_a_graph_is_an_error(spoilt):
    _, put = spoilt
    with pytest.raises(BundleError, match="is not an ONNX graph: a field has the unknown type 6"):
        OnnxAccentClassifier.from_bundle(put(b"no graph at all"))


def other_graph(*outputs, **attributes):
    """A graph that doubles its input."""
    tensor = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Add", ["waves", "waves"], list(outputs), **attributes)
    inputs = [tensor("waves", onnx.TensorProto.FLOAT, [None])]
    graph = onnx.helper.make_graph(
        [node], "other", inputs, [tensor(name, onnx.TensorProto.FLOAT, [None]) for name in outputs]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_a_graph_with_other_inputs_is_an_error(spoilt):
    _, put = spoilt
    with pytest.raises(BundleError, match="inputs and outputs sums, waves: it was not written"):
        OnnxAccentClassifier.from_bundle(put(other_graph("sums").SerializeToString()))


def test_a_graph_with_external_weights_is_an_error(spoilt, tmp_path):
    """An untrusted graph may refer to any file; an export needs none."""
    (tmp_path / "secret").write_bytes(bytes(16))
    _, put = spoilt
    graph = other_graph("sums")
    weight = onnx.helper.make_tensor("waves", onnx.TensorProto.FLOAT, [4], bytes(16), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    del graph.graph.input[:]
    graph.graph.initializer.append(weight)
    with pytest.raises(BundleError, match="refers to '../secret': do not trust it"):
        OnnxAccentClassifier.from_bundle(put(graph.SerializeToString()))


def test_a_missing_onnx_runtime_is_an_error(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        OnnxAccentClassifier.from_bundle(exported)


def test_a_missing_exporter_is_an_error(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExchangeError, match="onnx is not installed: pip install onnx"):
        onnx_export.export(tiny_bundle, tmp_path / "out")


def test_options_are_validated_as_with_torch(exported):
    with pytest.raises(ConfigError, match=r"hop_seconds is 9.*\n.*choose one way to abstain"):
        OnnxAccentClassifier.from_bundle(exported, window_seconds=5, hop_seconds=9, max_risk=0.1, min_coverage=0.5)


@pytest.mark.slow
def test_onnx_runtime_leaves_nothing_in_the_home_folder(tiny_bundle, tmp_path):
    home, out = tmp_path / "home", tmp_path / "onnx"
    home.mkdir()
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path), "HF_HOME": str(tmp_path)}
    soundfile.write(tmp_path / "clip.wav", noise(2), 16_000)
    for words in (
        ["export", tiny_bundle, "--to", "onnx", "--out", out],
        ["classify", tmp_path / "clip.wav", "--model", out],
    ):
        command = [sys.executable, "-m", "accent_plugin.cli", *map(str, words)]
        subprocess.run(command, env=env, check=True, capture_output=True)
        assert list(home.rglob("*")) == []


def test_weights_with_nan_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "nan")
    graph = onnx.load(folder / "model.onnx")
    weight = next(each for each in graph.graph.initializer if len(each.dims) > 1)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, folder / "model.onnx")
    config = json.loads((folder / "config.json").read_text()) | {"weights": weights_identity(folder / "model.onnx")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="its weights have NaN or infinity"):
        OnnxAccentClassifier.from_bundle(folder)


# ------------------------------------------------------------------------------------------------ choice of the backend


def choose(model, *options):
    """The backend that the command line chooses."""
    arguments = make_parser().parse_args(["classify", "clip.wav", "--model", str(model), *options])
    return models._choose_backend(arguments, str(model))


@pytest.fixture
def without_accelerator(monkeypatch):
    monkeypatch.setattr(models, "_ACCELERATORS", ())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "onnx"),
        (("--backend", "torch"), "torch"),
        (("--device", "cpu"), "torch"),
        (("--precision", "bf16"), "torch"),
        (("--precision", "fp32"), "onnx"),
    ],
    ids=str,
)
def test_a_bundle_with_a_graph_runs_on_onnx_runtime_unless_options_need_torch(
    tiny_bundle, without_accelerator, options, expected
):
    assert choose(tiny_bundle, *options) == expected


def test_a_bundle_without_a_graph_runs_on_torch(tiny_bundle, tmp_path, without_accelerator):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (folder / "graph.onnx").unlink()
    assert choose(folder) == "torch"


def test_an_accelerator_is_used(tiny_bundle, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_ACCELERATORS", (str(tmp_path),))
    assert (choose(tiny_bundle), choose(tiny_bundle, "--backend", "onnx"), choose(exported)) == (
        "torch",
        "onnx",
        "onnx",
    )


@pytest.mark.parametrize("options", [("--device", "cpu"), ("--precision", "bf16")], ids=str)
def test_options_of_torch_are_refused_for_onnx_runtime(tiny_bundle, exported, options):
    for model, more in ((tiny_bundle, ("--backend", "onnx")), (exported, ())):
        with pytest.raises(AccentPluginError, match="--device and --precision work with the torch backend only"):
            choose(model, *options, *more)
