"""The ONNX graph in a bundle: torch's scores, weights stored once, and what an untrusted graph may refer to."""

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
import transformers
from helpers.encoders import TINY

from accent_plugin import pooling
from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle import write
from accent_plugin.bundle.graph import make_graph
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.session import open_graph, read_offsets
from accent_plugin.bundle.write import write_bundle
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.errors import AudioError, BundleError
from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier
from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")


def make_model(source, pooling="mean", whitening=False, **options):
    """A model with scores that differ between clips."""
    head = {name: options.pop(name) for name in ("projector_size", "projector_activation") if name in options}
    torch.manual_seed(0)
    encoder = make_encoder(str(source), **options)
    if encoder.weighted_layers is not None:
        torch.nn.init.normal_(encoder.layer_weights)
    model = AccentModel(encoder, LABELS, pooling, whitening=whitening, **head).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    if whitening:
        model.whitening.fit(torch.randn(50, model.pooling.out_features), torch.arange(50) % 3)
    return model


def require_torchs_scores(path, model):
    """Every clip of a batch as torch scores it alone, without padding and without a mask."""
    generator = torch.Generator().manual_seed(1)
    clips = [0.1 * torch.randn(samples, generator=generator) for samples in (3_000, 24_000, 17_001)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.3)
    lengths = torch.tensor([len(clip) for clip in clips])
    scores, embeddings = open_graph(path).run(
        ["log_probabilities", "embeddings"], {"waves": padded.numpy(), "lengths": lengths.numpy()}
    )
    with torch.inference_mode():
        expected = torch.cat([model.embed(clip[None]) for clip in clips])
        np.testing.assert_allclose(embeddings, expected, atol=1e-4)
        expected = torch.cat([model(clip[None]) for clip in clips])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(expected.numpy(), axis=0).max() > 0.1, "the clips must differ, or nothing is compared"


def written(path, model):
    path.write_bytes(make_graph(model).SerializeToString())
    return path


@pytest.mark.parametrize("name", TINY)
def test_every_family_has_torchs_scores(tmp_path, tiny_encoder, name):
    model = make_model(tiny_encoder(name))
    require_torchs_scores(written(tmp_path / "graph.onnx", model), model)


@pytest.mark.parametrize("name", ["wav2vec2-layer", "moonshine", "whisper"])
def test_the_states_of_every_kind_of_encoder_have_torchs_scores(tmp_path, tiny_encoder, name):
    model = make_model(tiny_encoder(name), weighted_layers=[0, 2, 3], standardise_layers=True)
    require_torchs_scores(written(tmp_path / "graph.onnx", model), model)


@pytest.mark.parametrize("name", pooling.POOLINGS)
@pytest.mark.parametrize(
    "head", [{}, {"projector_size": 8}, {"projector_size": 8, "projector_activation": True, "whitening": True}], ids=str
)
def test_every_head_has_torchs_scores(tmp_path, tiny_encoder, name, head):
    model = make_model(tiny_encoder("moonshine"), pooling=name, **head)
    require_torchs_scores(written(tmp_path / "graph.onnx", model), model)


def test_nothing_but_the_first_convolution_and_its_activation_has_that_size(tmp_path, tiny_encoder):
    """Masks and norms of this size took a tenth of the time."""
    model = make_model(tiny_encoder("wav2vec2-group"))
    graph = make_graph(model)
    kinds = {node.output[0]: node.op_type for node in graph.graph.node}
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kinds)
    waves = 0.1 * np.random.default_rng(0).standard_normal((2, 16_000)).astype(np.float32)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    found = session.run(list(kinds), {"waves": waves, "lengths": np.array([16_000, 9_000])})
    channels, frames = model.wav2vec2.config.conv_dim[0], (16_000 - 10) // 5 + 1
    large = [kind for kind, value in zip(kinds.values(), found, strict=True) if value.size >= 2 * channels * frames]
    assert large == ["MatMul", "Gelu"]


def test_low_frequencies_have_torchs_scores(tmp_path, tiny_encoder):
    """The second differences of a slow wave are a thousandth of it, but the norm makes them large."""
    model = make_model(tiny_encoder("wav2vec2-group"))
    with torch.no_grad():
        weight = model.wav2vec2.model.feature_extractor.conv_layers[0].conv.weight
        shapes = 1e3 * torch.randn(weight[..., :8].shape)
        weight.zero_()
        for place, value in enumerate((1, -2, 1)):
            weight[..., place : place + 8] += value * shapes
    clip = torch.sin(torch.arange(16_000) * (2 * torch.pi * 100 / 16_000))[None]
    session = open_graph(written(tmp_path / "graph.onnx", model))
    scores = session.run(["log_probabilities"], {"waves": clip.numpy(), "lengths": np.array([16_000])})[0]
    with torch.inference_mode():
        # Of scores up to 9. With a covariance in float32 they are NaN.
        np.testing.assert_allclose(scores, model(clip), atol=0.01)


def test_partial_rotary_embeddings_have_torchs_scores(tmp_path, tiny_encoder):
    """As in Moonshine's own checkpoints: some features of a head are not rotated."""
    folder = shutil.copytree(tiny_encoder("moonshine"), tmp_path / "encoder")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    path.write_text(json.dumps(config | {"partial_rotary_factor": 0.5}), encoding="utf-8")
    model = make_model(folder)
    assert 2 * len(model.wav2vec2.model.rotary_emb.inv_freq) < model.wav2vec2.layers[0].self_attn.head_dim
    require_torchs_scores(written(tmp_path / "graph.onnx", model), model)


def test_hubert_without_a_norm_before_its_projection_has_torchs_scores(tmp_path, tiny_encoder):
    folder = shutil.copytree(tiny_encoder("hubert-layer"), tmp_path / "encoder")
    config = transformers.HubertConfig.from_pretrained(folder, feat_proj_layer_norm=False, conv_bias=True)
    torch.manual_seed(0)
    transformers.HubertModel(config).save_pretrained(folder)
    model = make_model(folder)
    require_torchs_scores(written(tmp_path / "graph.onnx", model), model)


def test_merged_adapters_are_in_the_graph(tmp_path, tiny_encoder):
    model = make_model(tiny_encoder("wav2vec2-group"), lora_rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    require_torchs_scores(folder / "graph.onnx", model)


# ------------------------------------------------------------------------------------------------------- in a bundle


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_encoder):
    """A bundle with a graph, and copies of each clip at two speeds."""
    folder = tmp_path_factory.mktemp("graph") / "bundle"
    model = make_model(tiny_encoder("wav2vec2-group"))
    return write_bundle(folder, model, LABELS, encoder_name="tiny", pooling="mean", speeds=(1.0, 1.1))


@pytest.fixture
def spoilt(template, tmp_path):
    return shutil.copytree(template, tmp_path / "spoilt")


def test_weights_are_stored_once(template):
    """The graph names each tensor of the safetensors file and has no bytes of it."""
    data = (template / "model.ckpt").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    graph = onnx.load(template / "graph.onnx", load_external_data=False).graph
    external = {each.name: each for each in graph.initializer if each.external_data}
    # SpecAugment's vector has no use here.
    assert header.keys() - external.keys() == {"wav2vec2.model.masked_spec_embed"}
    for name, tensor in external.items():
        start, end = header[name]["data_offsets"]
        found = {entry.key: entry.value for entry in tensor.external_data}
        assert found == {"location": "model.ckpt", "offset": str(8 + size + start), "length": str(end - start)}
        assert (list(tensor.dims), tensor.raw_data) == (header[name]["shape"], b"")
    inline = [each for each in graph.initializer if not each.external_data]
    assert sum(each.ByteSize() for each in inline) < 2_000


def test_the_configuration_has_the_size_and_digest_of_the_graph(template):
    config = json.loads((template / "config.json").read_text(encoding="utf-8"))
    identity = bundle_config.weights_identity(template / "graph.onnx")
    assert config["graph"] == {
        "bytes": identity["bytes"], "sha256": identity["sha256"], "minimum_samples": 400, "maximum_samples": None
    }  # fmt: skip


def test_a_bundle_classifies_with_onnx_runtime_as_with_torch(template):
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(samples).astype(np.float32) for samples in (4_000, 30_000, 31_000)]
    ours, theirs = OnnxAccentClassifier.from_bundle(template), AccentClassifier.from_bundle(template, device="cpu")
    # The answers of both may be in one file: they agree to four digits.
    assert ours.identity == theirs.identity
    for found, expected in zip(ours.predict_batch(waves), theirs.predict_batch(waves), strict=True):
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-4)


def test_a_clip_that_is_too_long_for_whisper_is_refused_as_with_torch(tmp_path, tiny_encoder):
    folder = tmp_path / "bundle"
    write_bundle(folder, make_model(tiny_encoder("whisper")), LABELS, encoder_name="tiny", pooling="mean")
    for classifier in (OnnxAccentClassifier, AccentClassifier):
        long = classifier.from_bundle(folder, window_seconds=40.0)
        with pytest.raises(AudioError, match=r"window_seconds is 40, too long for this encoder.* 30 s"):
            long.predict(np.random.default_rng(0).standard_normal(31 * 16_000), 16_000)


def test_a_model_without_rules_is_written_without_a_graph(tmp_path, tiny_encoder, monkeypatch, caplog):
    class Largest(pooling.MeanPooling):
        def forward(self, frames, valid):
            return frames.masked_fill(~valid.unsqueeze(-1), -torch.inf).amax(dim=1)

    monkeypatch.setitem(pooling.POOLINGS, "largest", Largest)
    model = make_model(tiny_encoder("moonshine"), pooling="largest")
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="largest")
    assert (
        "the bundle has no graph.onnx" in caplog.text
        and "its pooling is a Largest; supported are MeanPooling, " in caplog.text
    )
    assert not (folder / "graph.onnx").exists() and "graph" not in load_bundle(folder).config
    with pytest.raises(BundleError, match=r"has no graph.onnx: accent-plugin export bundle --to onnx"):
        OnnxAccentClassifier.from_bundle(folder)


def test_no_error_of_the_graph_costs_the_bundle(tmp_path, tiny_encoder, monkeypatch, caplog):
    """Another version of transformers may name its modules differently."""
    monkeypatch.setattr(write, "make_graph", lambda model, stored: model.wav2vec2.renamed)
    folder = write_bundle(
        tmp_path / "bundle", make_model(tiny_encoder("moonshine")), LABELS, encoder_name="tiny", pooling="mean"
    )
    assert "AttributeError: " in caplog.text and "graph" not in load_bundle(folder).config


def test_a_graph_with_other_scores_is_not_kept(tmp_path, tiny_encoder, monkeypatch, caplog):
    model = make_model(tiny_encoder("moonshine"))

    def make_other(model, stored):
        graph = make_graph(model, stored)
        for tensor in graph.graph.initializer:
            if tensor.name == "classifier.bias":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 1, 2], np.float32), tensor.name))
        return graph

    monkeypatch.setattr(write, "make_graph", make_other)
    folder = write_bundle(tmp_path / "bundle", model, LABELS, encoder_name="tiny", pooling="mean")
    assert "ONNX Runtime and torch give different scores" in caplog.text
    assert not (folder / "graph.onnx").exists() and "graph" not in load_bundle(folder).config


def test_a_graph_needs_neither_torch_nor_onnx(template, tmp_path):
    soundfile.write(tmp_path / "clip.wav", 0.1 * np.random.default_rng(0).standard_normal(32_000), 16_000)
    script = (
        "import sys\n"
        "from accent_plugin.exchange.onnx_classifier import OnnxAccentClassifier\n"
        "print(OnnxAccentClassifier.from_bundle(sys.argv[1]).predict_file(sys.argv[2]).accent)\n"
        "print(sorted({'torch', 'speechbrain', 'transformers', 'onnx', 'safetensors', 'scipy'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", script, template, tmp_path / "clip.wav"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    accent, modules = run.stdout.splitlines()
    assert accent in LABELS and modules == "[]", run.stderr


# ----------------------------------------------------------------------------------------------------------- refused


def put(folder, graph):
    """Write a graph into a bundle, and its digest into the configuration."""
    (folder / "graph.onnx").write_bytes(graph if isinstance(graph, bytes) else graph.SerializeToString())
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    identity = bundle_config.weights_identity(folder / "graph.onnx")
    config["graph"] |= {"bytes": identity["bytes"], "sha256": identity["sha256"]}
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def opened(monkeypatch):
    """Whether ONNX Runtime has seen a graph."""
    import onnxruntime

    seen = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **options: seen.append(arguments))
    return seen


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../secret", "refers to '../secret': do not trust it"),
        ("location", "/etc/passwd", "refers to '/etc/passwd': do not trust it"),
        ("location", "config.json", "refers to 'config.json': do not trust it"),
        ("location", "./model.ckpt", "refers to './model.ckpt': do not trust it"),
        ("offset", "0", "bytes at '0' of model.ckpt, which are not a tensor there"),
        ("offset", "99999999", "bytes at '99999999' of model.ckpt, which are not a tensor there"),
        ("length", "99999999", "refers to '99999999' bytes at .* which are not a tensor there"),
        ("length", "many", "refers to 'many' bytes at .* which are not a tensor there"),
        ("checksum", "0", "refers to 'model.ckpt': do not trust it"),
    ],
)
def test_a_graph_that_refers_to_other_bytes_is_refused_unopened(spoilt, opened, key, value, message):
    graph = onnx.load(spoilt / "graph.onnx", load_external_data=False)
    tensor = next(each for each in graph.graph.initializer if each.external_data)
    entry = next((each for each in tensor.external_data if each.key == key), None) or tensor.external_data.add(key=key)
    entry.value = value
    put(spoilt, graph)
    with pytest.raises(BundleError, match=message):
        OnnxAccentClassifier.from_bundle(spoilt)
    assert opened == []


def secret_tensor():
    tensor = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    return tensor


def hide_in_constant(graph):
    graph.graph.node.append(onnx.helper.make_node("Constant", [], ["secret"], value=secret_tensor()))


def hide_in_branch(graph):
    branch = onnx.helper.make_graph([], "branch", [], [], [secret_tensor()])
    graph.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def hide_in_function(graph):
    node = onnx.helper.make_node("Constant", [], ["secret"], value=secret_tensor())
    graph.functions.append(onnx.helper.make_function("own", "F", [], ["secret"], [node], []))


def hide_in_sparse_tensor(graph):
    graph.graph.sparse_initializer.append(onnx.SparseTensorProto(values=secret_tensor(), dims=[4]))


def hide_without_entries(graph):
    graph.graph.initializer.add(name="secret", data_location=onnx.TensorProto.EXTERNAL)


@pytest.mark.parametrize(
    "hide", [hide_in_constant, hide_in_branch, hide_in_function, hide_in_sparse_tensor, hide_without_entries]
)
def test_hidden_references_are_found(spoilt, opened, hide):
    graph = onnx.load(spoilt / "graph.onnx", load_external_data=False)
    hide(graph)
    put(spoilt, graph)
    with pytest.raises(BundleError, match="refers to .*: do not trust it"):
        OnnxAccentClassifier.from_bundle(spoilt)
    assert opened == []


@pytest.mark.parametrize("content", [b"no graph at all", b"", b"\x3a\xff\xff\xff\x7f", b"\x0b"], ids=repr)
def test_a_file_that_is_not_a_graph_is_an_error(spoilt, content):
    put(spoilt, content)
    with pytest.raises(BundleError, match=r"graph.onnx (is not an ONNX graph|is empty|cannot be loaded)"):
        OnnxAccentClassifier.from_bundle(spoilt)


@pytest.mark.parametrize("name", ["graph.onnx", "model.ckpt"])
def test_a_modified_or_missing_file_is_an_error(spoilt, name):
    content = bytearray((spoilt / name).read_bytes())
    content[-1] ^= 1
    (spoilt / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} differs from config.json"):
        OnnxAccentClassifier.from_bundle(spoilt)
    (spoilt / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name} has .* bytes, but config.json says"):
        OnnxAccentClassifier.from_bundle(spoilt)
    (spoilt / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        OnnxAccentClassifier.from_bundle(spoilt)


@pytest.mark.parametrize(
    "value",
    [5, {"bytes": 1 << 30}, {"bytes": "1"}, {"sha256": "0"}, {"minimum_samples": None}, {"maximum_samples": 1}],
    ids=str,
)
def test_invalid_descriptions_of_a_graph_are_an_error(spoilt, value):
    path = spoilt / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["graph"] = config["graph"] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BundleError, match="graph is .*, not the bytes, the sha256 and the limits of graph.onnx"):
        OnnxAccentClassifier.from_bundle(spoilt)


@pytest.mark.parametrize(
    "content", [b"", b"short", struct.pack("<Q", 1 << 40), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1) + b"{"]
)
def test_a_file_that_is_not_safetensors_is_an_error(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(BundleError, match="is not in the safetensors format"):
        read_offsets(tmp_path / "model.ckpt")


def test_tensors_beyond_the_end_of_the_file_are_an_error(spoilt):
    data = (spoilt / "model.ckpt").read_bytes()
    (spoilt / "model.ckpt").write_bytes(data[:-4])
    with pytest.raises(BundleError, match="a tensor lies beyond its end"):
        read_offsets(spoilt / "model.ckpt")
