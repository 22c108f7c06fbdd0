"""Bundles: written, read back, opened by SpeechBrain's own interface; and what is refused."""

import copy
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Trap
from helpers.encoders import TINY
from helpers.predictions import calibrated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from speechbrain.inference.classifiers import EncoderClassifier

from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle import load, write
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.write import _compare, write_bundle
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.errors import AccentPluginError, BundleError, DataError
from accent_plugin.model import AccentModel

LABELS = ("us", "england", "australia")
# Names that YAML, HyperPyYAML or SpeechBrain might take for something else.
ODD = ("!new:os.system", "<ref>", "it's: #1", "no", "1e-05", "über\\n")


def made_model(source, labels=LABELS, pooling="mean", **options):
    torch.manual_seed(0)
    model = AccentModel(make_encoder(str(source)), labels, pooling=pooling, **options)
    for parameter in (model.classifier.weight, model.classifier.bias):
        torch.nn.init.normal_(parameter)
    return model.eval()


def written(folder, model, labels=LABELS, pooling="mean", **options):
    return write_bundle(folder, model, labels, encoder_name="tiny", pooling=pooling, **options)


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_encoder):
    """A whole bundle, for tests that spoil a copy of it."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return written(folder, made_model(tiny_encoder("wav2vec2-group")), calibration=calibrated(2.0))


@pytest.fixture
def spoilt(template, tmp_path):
    return shutil.copytree(template, tmp_path / "spoilt")


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory, tiny_encoder):
    """Function: name of `TINY` -> its bundle, made once, for tests that spoil a copy of it."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: written(folder / family, made_model(tiny_encoder(family))))


def scores(found, wavs, lens):
    with torch.inference_mode():
        return found.modules["classifier"](found.modules["embedding_model"](wavs, lens)).squeeze(1)


def clips():
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(2, 24_000, generator=generator), torch.tensor([0.7, 1.0])


def change(folder, **values):
    """Write other values into config.json; a dotted name reaches into mappings."""
    path = folder / load.CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        inner = config
        *above, last = name.split("__")
        for key in above:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(config), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- round trips


def require_the_scores(model, folder):
    """The bundle in a folder has the scores of a model."""
    wavs, lens = clips()
    with torch.inference_mode():
        expected = model(wavs, lens)
    torch.testing.assert_close(scores(load_bundle(folder), wavs, lens), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", sorted(TINY))
def test_scores_come_back(tiny_encoder, bundle_of, family):
    require_the_scores(made_model(tiny_encoder(family)), bundle_of(family))


@pytest.mark.parametrize(
    ("pooling", "options"),
    [
        ("attentive", {}),
        ("statistics", {"whitening": True}),
        ("mean", {"projector_size": 8}),
        ("attentive_statistics", {"projector_size": 8, "projector_activation": True}),
    ],
)
def test_every_head_comes_back(tiny_encoder, tmp_path, pooling, options):
    model = made_model(tiny_encoder("moonshine"), pooling=pooling, **options)
    if model.whitening:
        model.whitening.fit(torch.randn(50, model.pooling.out_features), torch.arange(50) % 3)
    require_the_scores(model, written(tmp_path / "b", model, pooling=pooling))


def test_layers_of_the_encoder_come_back(tiny_encoder, tmp_path):
    torch.manual_seed(0)
    encoder = make_encoder(
        str(tiny_encoder("moonshine")), num_layers=1, weighted_layers=[0, 1], standardise_layers=True
    )
    torch.nn.init.normal_(encoder.layer_weights)
    model = AccentModel(encoder, LABELS).eval()
    require_the_scores(model, written(tmp_path / "b", model))


def test_the_temperature_is_in_the_weights(tiny_encoder, tmp_path):
    model = made_model(tiny_encoder("moonshine"))
    found = load_bundle(written(tmp_path / "b", model, calibration=calibrated(4.0)))
    torch.testing.assert_close(found.model.classifier.weight, model.classifier.weight / 4)
    wavs, lens = clips()
    with torch.inference_mode():
        expected = torch.log_softmax(model.classifier(model.embed(wavs, lens)) / 4, dim=-1)
    torch.testing.assert_close(scores(found, wavs, lens), expected, atol=1e-6, rtol=0)


def test_writing_leaves_the_model_alone(tiny_encoder, tmp_path):
    model = made_model(tiny_encoder("moonshine"))
    before = copy.deepcopy(model.state_dict())
    written(tmp_path / "b", model, calibration=calibrated(4.0))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_copies_at_other_speeds_are_averaged(tiny_encoder, tmp_path):
    """As experiment.predict does it: mean of log-probabilities, normalised anew."""
    from accent_plugin.audio.changes import change_speed

    model = made_model(tiny_encoder("moonshine"))
    found = load_bundle(written(tmp_path / "b", model, speeds=(0.9, 1.0)))
    wavs, lens = clips()
    wav = wavs[0, : round(0.7 * 24_000)]
    slow = torch.from_numpy(change_speed(wav.numpy(), 0.9))
    with torch.inference_mode():
        mean = (model(wav[None]) + model(slow[None])) / 2
    torch.testing.assert_close(scores(found, wavs, lens)[:1], torch.log_softmax(mean, dim=-1), atol=1e-5, rtol=0)


def test_what_is_in_it(template):
    assert {path.name for path in template.iterdir()} >= {
        "config.json",
        "model.ckpt",
        "graph.onnx",
        "hyperparams.yaml",
        "README.md",
    }
    content = b"".join(path.read_bytes() for path in template.iterdir() if path.suffix != ".ckpt")
    assert str(template.parent).encode() not in content and b"/tmp" not in content
    # The content is safetensors whatever the name says.
    assert load_file(template / "model.ckpt").keys() == load_bundle(template).model.state_dict().keys()


def test_a_bundle_is_replaced_and_other_folders_are_not(tiny_encoder, tmp_path):
    model = made_model(tiny_encoder("moonshine"))
    written(tmp_path / "b", model)
    assert load_bundle(written(tmp_path / "b", model, calibration=calibrated(2.0))).config["calibration"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="contains 'thesis.txt', which this command did not write"):
        written(tmp_path / "mine", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mine"]


@pytest.mark.parametrize(
    ("extra", "config", "named"),
    [
        ("src/main.py", {"format_version": 1}, "src"),
        ("model.safetensors", {"format_version": 1}, "model.safetensors"),
        ("model.ckpt/part", {"format_version": 1}, "model.ckpt"),
        ("README.md", {"architectures": ["Wav2Vec2Model"]}, "README.md"),
        ("README.md", None, "README.md"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_kept(template, tmp_path, extra, config, named):
    """A project or an encoder has a config.json, too."""
    (tmp_path / "mine" / extra).parent.mkdir(parents=True)
    (tmp_path / "mine" / extra).write_text("all of it")
    if config:
        (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=f"contains '{named}', which this command did not write"):
        written(tmp_path / "mine", load_bundle(template).model)
    assert (tmp_path / "mine" / extra).read_text() == "all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_not_replaced(template, tmp_path):
    (tmp_path / "thesis").write_text("all of it")
    with pytest.raises(BundleError, match="thesis is a file"):
        written(tmp_path / "thesis", load_bundle(template).model)


def test_a_bundle_behind_a_link_is_replaced_where_it_lies(template, tmp_path):
    shutil.copytree(template, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    written(tmp_path / "link", load_bundle(template).model)
    assert (tmp_path / "link").is_symlink() and load_bundle(tmp_path / "real").config["calibration"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_old_bundle_stays_where_the_new_one_fails(spoilt, tmp_path):
    model = load_bundle(spoilt).model
    model.classifier.bias.data[1] = torch.nan
    with pytest.raises(BundleError, match="has NaN or infinity in classifier.bias"):
        written(spoilt, model)
    assert load_bundle(spoilt).config["calibration"]
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_the_old_bundle_comes_back_where_the_new_one_cannot_take_its_place(spoilt, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.suffix == ".tmp" and target == spoilt:
            raise OSError("not now")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match="cannot be written: not now"):
        written(spoilt, load_bundle(spoilt).model)
    assert load_bundle(spoilt).config["calibration"]
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_what_appears_in_the_old_bundle_meanwhile_is_kept(spoilt, tmp_path, monkeypatch, caplog):
    compare = _compare

    def slow(*arguments):
        (spoilt / "notes.txt").write_text("mine")
        compare(*arguments)

    monkeypatch.setattr(write, "_compare", slow)
    written(spoilt, load_bundle(spoilt).model)
    [kept] = tmp_path.glob(".spoilt.*.old")
    assert [path.name for path in kept.iterdir()] == ["notes.txt"] and str(kept) in caplog.text
    assert load_bundle(spoilt).config["calibration"] is None


def test_every_file_has_the_mode_that_the_umask_gives(template, tmp_path):
    before = os.umask(0o027)
    try:
        folder = written(tmp_path / "b", load_bundle(template).model)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        bundle_config.BUNDLE_FILES, 0o640
    )


# ---------------------------------------------------------------------------------------- SpeechBrain's own interface


def test_stock_interface(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock = EncoderClassifier.from_hparams(source=str(template), savedir=str(tmp_path / "saved"))
    wavs, lens = clips()
    out, score, index, text = stock.classify_batch(wavs, lens)
    assert (out.shape, score.shape, index.shape) == ((2, 3), (2,), (2,))
    assert torch.equal(out, scores(load_bundle(template), wavs, lens))
    assert torch.equal(score, out.max(dim=-1).values)
    assert text == [LABELS[i] for i in index.tolist()]
    torch.testing.assert_close(out.exp().sum(dim=-1), torch.ones(2))
    embeddings = stock.encode_batch(wavs, lens)
    assert embeddings.shape[:2] == (2, 1)
    # The model has normalised them already, where it does.
    assert torch.equal(stock.encode_batch(wavs, lens, normalize=True), embeddings)


def test_stock_interface_on_a_file_of_another_rate(template, tmp_path):
    import soundfile

    from accent_plugin.audio import codecs

    stock = EncoderClassifier.from_hparams(source=str(template), savedir=str(tmp_path / "saved"))
    sound = clips()[0].T.numpy()
    soundfile.write(tmp_path / "a.wav", sound, 44_100)
    out, _, index, text = stock.classify_file(str(tmp_path / "a.wav"))
    wav = torch.from_numpy(codecs.load(str(tmp_path / "a.wav")))
    torch.testing.assert_close(out, scores(load_bundle(template), wav[None], None), atol=1e-4, rtol=0)
    assert text == [LABELS[index.item()]]


def test_labels_that_yaml_would_misread(tiny_encoder, tmp_path):
    folder = written(tmp_path / "b", made_model(tiny_encoder("moonshine"), ODD), ODD)
    stock = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "saved"))
    assert [stock.hparams.label_encoder.decode_ndim(i) for i in range(len(ODD))] == list(ODD)
    assert json.loads(stock.hparams.bundle_config) == bundle_config.read(folder)


def test_stock_interface_refuses_other_weights(spoilt, tmp_path):
    state = load_file(spoilt / "model.ckpt")
    state.pop("classifier.bias")
    save_file(state, spoilt / "model.ckpt")
    with pytest.raises(BundleError, match="lacks 1 tensors of the model, such as classifier.bias"):
        EncoderClassifier.from_hparams(source=str(spoilt), savedir=str(tmp_path / "saved"))


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(BundleError, match="there is no folder"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is not a bundle: it has no config.json"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "format_version 2; .* reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": True}, "format_version True"),
        ({"format_version": 1.0}, "format_version 1.0"),
        ({"labels": ["us", "england"]}, "classifier.weight of shape .3, .*describes .2,"),
        ({"labels": ["us", "us", "england"]}, "labels is .* distinct names"),
        ({"labels": "us"}, "labels is 'us'"),
        *[
            ({"labels": ["us", "england", label]}, "labels is .* printable, distinct names")
            for label in ("", " ", "us ", "a\nb", "\x1b[2J", "\u202eus", "\ud800")
        ],
        ({"sample_rate": 8000}, "sample_rate is 8000, not 16000"),
        ({"weights__sha256": "0" * 64}, "differs from config.json"),
        ({"weights__bytes": 3}, "config.json says 3"),
        ({"weights__file": "../../etc/passwd"}, "weights is .*passwd"),
        ({"weights__mirror": "https://"}, "weights is .*, not the file, bytes and sha256 of"),
        ({"weights": {"file": "model.ckpt", "bytes": 3}}, "weights is .*, not the file, bytes and sha256 of"),
        ({"weights__sha256": "0" * 63}, "weights.sha256 is '0+', not 64 hexadecimal digits"),
        ({"weights__sha256": 0}, "weights.sha256 is 0, not 64"),
        ({"calibration": {"temperature": 2.0}}, "calibration is .*, not null or"),
        ({"calibration__curve__risk": [0.5]}, "calibration.curve has columns of different lengths"),
        ({"calibration__temperature": 0}, "calibration is"),
        ({"model": None}, "model is None"),
        ({"model__dropout": 0.1}, "model has the key 'dropout', which is unknown; known are encoder, pooling, "),
        ({"model__encoder__code": "x"}, "model.encoder has the key 'code', which is unknown"),
        ({"model__encoder__name": None}, "model.encoder.name is None, not a printable name"),
        ({"model__encoder__name": "\x1b[2J"}, "model.encoder.name is '.x1b.2J', not a printable name"),
        ({"model__projector_size": 10**30}, "model.projector_size is 1000"),
        ({"model__pooling": []}, "model.pooling is .., not the name"),
        ({"model__pooling": "os.system"}, "pooling 'os.system' is unknown"),
        ({"model__projector_size": "8"}, "model.projector_size is '8'"),
        ({"model__whitening": 1}, "model.whitening is 1"),
        ({"model__speeds": [0]}, "model.speeds is .0."),
        ({"model__speeds": []}, "model.speeds is"),
        ({"model__encoder__family": "bert"}, "config.model_type is 'wav2vec2', but the family is 'bert'"),
        ({"model__encoder__family": "bert", "model__encoder__config__model_type": "bert"}, "family 'bert' is unknown"),
        (
            {"model__encoder__config__model_type": "hubert"},
            "config.model_type is 'hubert', but the family is 'wav2vec2'",
        ),
        ({"model__encoder__config__custom": 1}, "keys that a wav2vec2 does not have: 'custom'"),
        ({"model__encoder__config__dtype": "float16"}, "keys that a wav2vec2 does not have: 'dtype'"),
        ({"model__encoder__config__return_dict": False}, "keys that a wav2vec2 does not have: 'return_dict'"),
        ({"model__encoder__config__hidden_size": 10**9}, "hidden_size is 1000000000, more than any"),
        ({"model__encoder__config__num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, more than any"),
        ({"model__encoder__config__hidden_size": 10**400}, "hidden_size is 1000.*, more than any"),
        ({"model__encoder__config__id2label": {"0": float("nan")}}, "id2label is .*nan.*, more than any"),
        ({"model__encoder__config__conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "conv_stride is .*, not 1 to 1000"),
        ({"model__encoder__config__conv_stride": 5}, "conv_stride is 5, not 1 to 1000"),
        ({"model__encoder__config__conv_stride": [1] * 7}, "a frame of 20 samples every 1, not every 80 to 16,000"),
        ({"model__encoder__config__conv_stride": [9] * 7}, "every 4,782,969, not every 80 to 16,000"),
        ({"model__encoder__config__num_conv_pos_embeddings": 10**6}, "num_conv_pos_embeddings is .*, not 1 to 1000"),
        ({"model__encoder__preprocessor__sampling_rate": 8000}, "sampling_rate is 8000, not 16000"),
        ({"model__encoder__preprocessor__feature_size": 10**6}, "feature_size is 1000000, not 1 to 512"),
        ({"model__encoder__preprocessor__padding_value": 1e300}, "padding_value is 1e.300, more than any"),
        ({"model__encoder__preprocessor__auto_map": {}}, "auto_map names code to run"),
        ({"model__encoder__preprocessor__feature_extractor_type": "Strange"}, "extractor_type is 'Strange', not Wav"),
        ({"model__encoder__config__hidden_size": "wide"}, "describes no wav2vec2"),
        ({"model__encoder__config__hidden_size": 48}, "of shape|describes no wav2vec2"),
        ({"model__encoder__weighted_layers": [99]}, "weighted_layers is .99."),
    ],
    ids=str,
)
def test_a_configuration_that_is_wrong(spoilt, values, message):
    change(spoilt, **values)
    with pytest.raises(BundleError, match=message):
        load_bundle(spoilt)


def test_a_configuration_of_enormous_size_takes_no_memory(spoilt):
    """Compared with the weights as shapes alone: the tensors it describes would be terabytes."""
    change(spoilt, model__encoder__config__intermediate_size=4_000_000, model__encoder__config__num_hidden_layers=900)
    with pytest.raises(BundleError, match="lacks|of shape"):
        load_bundle(spoilt)


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        ("whisper", "preprocessor__n_fft", 1 << 22, "n_fft is 4194304, not 64 to 4096"),
        ("whisper", "preprocessor__n_fft", 0, "n_fft is 0, not 64 to 4096"),
        ("whisper", "preprocessor__hop_length", 0, "hop_length is 0, not 1 to 4096"),
        ("whisper", "preprocessor__hop_length", 1.5, "hop_length is 1.5, not 1 to 4096"),
        ("whisper", "preprocessor__feature_size", 10**7, "feature_size is 10000000, more than any"),
        ("whisper", "preprocessor__chunk_length", 10**6, "chunk_length is 1000000, not 1 to 240"),
        ("whisper", "preprocessor__nb_max_frames", 10**9, "nb_max_frames is 1000000000, more than any"),
        ("whisper", "config__max_source_positions", 1, "has positions for 320 samples|of shape"),
        ("moonshine", "config__pad_head_dim_to_multiple_of", 1 << 22, "multiple_of is 4194304, not 1 to 256"),
        ("moonshine", "config__decoder_num_hidden_layers", 1000, "decoder_num_hidden_layers is 1000, not 1 to 100"),
        ("moonshine", "config__pad_head_dim_to_multiple_of", 0, "multiple_of is 0, not 1 to 256"),
        ("moonshine", "config__rope_parameters__partial_rotary_factor", 10**6, "rotary_factor is 1000000, not 0.0 to"),
        ("wavlm-group", "config__num_buckets", 0, "num_buckets is 0, not 4 to 65536"),
        ("wavlm-group", "config__max_bucket_distance", 80, "max_bucket_distance is 80, too small for 320 buckets"),
        ("data2vec-audio", "config__num_conv_pos_embeddings", 10**6, "num_conv_pos_embeddings is 1000000, not 1 to"),
    ],
)
def test_numbers_that_no_tensor_shows(bundle_of, tmp_path, monkeypatch, family, name, value, message):
    """They are refused before anything is built from them."""
    folder = shutil.copytree(bundle_of(family), tmp_path / "b")
    change(folder, **{f"model__encoder__{name}": value})
    if "positions" not in name:
        monkeypatch.setattr(load, "_build_model", None)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_whisper_needs_positions_for_half_a_window(bundle_of, tmp_path):
    """Of what is shorter, torch could not reflect the end."""
    folder = shutil.copytree(bundle_of("whisper"), tmp_path / "b")
    change(folder, model__encoder__preprocessor__n_fft=4096, model__encoder__preprocessor__hop_length=1)
    load_bundle(folder)
    state = load_file(folder / "model.ckpt")
    name = "wav2vec2.model.embed_positions.weight"
    save_file(state | {name: state[name][:1024].clone()}, folder / "model.ckpt")
    change(folder, model__encoder__config__max_source_positions=1024)
    change(folder, weights=bundle_config.weights_identity(folder / "model.ckpt"))
    with pytest.raises(BundleError, match="positions for 2048 samples, fewer than half a window of 4096"):
        load_bundle(folder)


def test_a_key_that_stands_twice(spoilt):
    text = (spoilt / "config.json").read_text(encoding="utf-8")
    (spoilt / "config.json").write_text(text.replace("{", '{"labels": ["a", "b", "c"],', 1), encoding="utf-8")
    with pytest.raises(BundleError, match="config.json cannot be read: it has the key 'labels' twice"):
        load_bundle(spoilt)


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_a_configuration_that_is_deeply_nested(spoilt, depth):
    change(spoilt, model__encoder__config__rope_parameters=0)
    text = (spoilt / "config.json").read_text(encoding="utf-8")
    nested = text.replace('"rope_parameters": 0', f'"rope_parameters": {"[" * depth}{"]" * depth}')
    (spoilt / "config.json").write_text(nested, encoding="utf-8")
    with pytest.raises(BundleError, match="keys that a wav2vec2 does not have|cannot be read"):
        load_bundle(spoilt)


def test_a_json_bomb(spoilt):
    (spoilt / "config.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(spoilt)
    (spoilt / "config.json").write_text(" " * (1 << 22) + "{}", encoding="utf-8")
    with pytest.raises(BundleError, match="do not trust it"):
        load_bundle(spoilt)


@pytest.mark.parametrize("name", ["config.json", "model.ckpt"])
def test_a_file_that_is_missing(spoilt, name):
    (spoilt / name).unlink()
    with pytest.raises(BundleError, match=name):
        load_bundle(spoilt)


@pytest.mark.parametrize("name", ["config.json", "model.ckpt"])
def test_a_file_that_is_cut_or_empty(spoilt, name):
    content = (spoilt / name).read_bytes()
    for kept in (len(content) // 2, 0):
        (spoilt / name).write_bytes(content[:kept])
        with pytest.raises(BundleError, match=name):
            load_bundle(spoilt)


def test_one_bit_of_the_weights(spoilt):
    content = bytearray((spoilt / "model.ckpt").read_bytes())
    content[-1] ^= 1
    (spoilt / "model.ckpt").write_bytes(content)
    with pytest.raises(BundleError, match="the SHA-256 of .* differs from config.json"):
        load_bundle(spoilt)


def test_more_weights_than_the_model_has(spoilt):
    state = load_file(spoilt / "model.ckpt") | {"backdoor": torch.zeros(1)}
    save_file(state, spoilt / "model.ckpt")
    change(spoilt, weights=bundle_config.weights_identity(spoilt / "model.ckpt"))
    with pytest.raises(BundleError, match="has 1 tensors that the model does not have, such as 'backdoor'"):
        load_bundle(spoilt)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(spoilt, value):
    state = load_file(spoilt / "model.ckpt")
    state["wav2vec2.model.encoder.layer_norm.bias"][3] = value
    save_file(state, spoilt / "model.ckpt")
    change(spoilt, weights=bundle_config.weights_identity(spoilt / "model.ckpt"))
    with pytest.raises(BundleError, match="has NaN or infinity in wav2vec2.model.encoder.layer_norm.bias"):
        load_bundle(spoilt)


@pytest.mark.parametrize(("dtype", "said"), [(torch.int32, "I32"), (torch.float16, "F16"), (torch.float64, "F64")])
def test_weights_of_another_type(spoilt, dtype, said):
    state = load_file(spoilt / "model.ckpt")
    save_file(state | {"classifier.bias": state["classifier.bias"].to(dtype)}, spoilt / "model.ckpt")
    change(spoilt, weights=bundle_config.weights_identity(spoilt / "model.ckpt"))
    with pytest.raises(BundleError, match=f"has classifier.bias as {said}, not as F32"):
        load_bundle(spoilt)


def test_a_sparse_file_of_ten_gigabytes(spoilt):
    with open(spoilt / "model.ckpt", "wb") as file:
        file.truncate(10 << 30)
    change(spoilt, weights__bytes=10 << 30)
    with pytest.raises(BundleError, match="is filled with zeros"):
        load_bundle(spoilt)


def test_a_header_that_lies_about_its_length(spoilt):
    (spoilt / "model.ckpt").write_bytes(struct.pack("<Q", 1 << 60) + b"{}" * 100)
    change(spoilt, weights__bytes=208)
    with pytest.raises(BundleError, match="not in the safetensors format"):
        load_bundle(spoilt)


def test_a_pickle_is_not_opened(spoilt, tmp_path):
    torch.save(Trap(tmp_path / "ran"), spoilt / "model.ckpt")
    change(spoilt, weights=bundle_config.weights_identity(spoilt / "model.ckpt"))
    with pytest.raises(BundleError, match="not in the safetensors format"):
        load_bundle(spoilt)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "line", ["!apply:os.mkdir ['{}']", "!!python/object/apply:os.mkdir ['{}']", "!new:os.mkdir ['{}']"]
)
def test_the_safe_door_runs_no_yaml(spoilt, tmp_path, line):
    yaml = (spoilt / "hyperparams.yaml").read_text(encoding="utf-8")
    (spoilt / "hyperparams.yaml").write_text(f"trap: {line.format(tmp_path / 'ran')}\n{yaml}", encoding="utf-8")
    (spoilt / "custom.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})", encoding="utf-8")
    assert load_bundle(spoilt).config["labels"] == list(LABELS)
    assert not (tmp_path / "ran").exists()


def change_anything(template, tmp_path, data):
    """Whatever stands in config.json, the answer is a bundle or a BundleError."""
    config = json.loads((template / "config.json").read_text(encoding="utf-8"))
    keys, inner = [], config
    while isinstance(inner, dict) and inner:
        keys.append(data.draw(st.sampled_from(sorted(inner))))
        inner = inner[keys[-1]]
    value = data.draw(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just([]), st.just({}), st.just([{}])
        )
    )
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.link(template / "model.ckpt", folder / "model.ckpt")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        load_bundle(folder)
    except AccentPluginError as error:
        assert isinstance(error, BundleError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_the_configuration_is_refused_by_name(template, tmp_path, data):
    change_anything(template, tmp_path, data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_of_many_changes_is_refused_by_name(template, tmp_path, data):
    change_anything(template, tmp_path, data)


def test_without_a_network_and_from_another_folder(template, tmp_path):
    """In a process of its own, so that nothing is loaded yet."""
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from speechbrain.inference.classifiers import EncoderClassifier\n"
        f"found = EncoderClassifier.from_hparams(source={str(template)!r}, savedir='saved')\n"
        "print(found.hparams.label_encoder.decode_ndim(2))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == ["australia"], done.stderr


def test_a_disk_that_is_full_of_weights_is_named(tmp_path, tiny_bundle, monkeypatch):
    from safetensors import SafetensorError

    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    loaded = load_bundle(tiny_bundle)
    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(BundleError, match="No space left on device"):
        write_bundle(tmp_path / "b", loaded.model, ("us", "england", "australia"), encoder_name="tiny", pooling="mean")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.ckpt"])
@pytest.mark.parametrize(
    "content, what",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
            "a Git LFS pointer: .* git lfs pull",
        ),
        (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "an HTML page"),
        (b'{"error":"Repository not found"}', "a server's error"),
        (b"", "empty"),
    ],
)
def test_a_file_that_was_never_downloaded_is_named(spoilt, name, content, what):
    (spoilt / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is {what}"):
        load_bundle(spoilt)
