"""Hugging Face classifiers and bundles: equal scores in both directions, errors, and training from either."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import Trap
from helpers import dataset_dicts as made
from helpers.encoders import TINY, family_of
from helpers.predictions import calibrated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, pipeline

from accent_plugin.bundle import config as bundle_config
from accent_plugin.bundle.load import load_bundle
from accent_plugin.bundle.write import write_bundle
from accent_plugin.cli import main
from accent_plugin.encoder.factory import FAMILIES
from accent_plugin.errors import BundleError, EncoderError, ExchangeError
from accent_plugin.exchange import hugging_face
from accent_plugin.exchange.hugging_face import (
    _accent_model,
    _all_layer_weights,
    from_hugging_face,
    import_hugging_face,
    to_hugging_face,
)
from accent_plugin.exchange.start import initialise_head, make_encoder
from accent_plugin.model import AccentModel

LABELS = ["us", "england", "australia"]
NAMES = [name for name in TINY if FAMILIES[family_of(name)].hf_classifier]
CLASSES = {name: f"{TINY[name][0]}ForSequenceClassification" for name in NAMES}


def clip(samples=20_000, seed=5):
    """A clip with neither zero mean nor unit variance."""
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed)) + 0.03


def scores_of_transformers(folder, wave):
    """Log-probabilities of a single clip, computed with transformers."""
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    inputs = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.log_softmax(-1)[0]


def scores_of_bundle(found, wave):
    with torch.inference_mode():
        return found.modules["classifier"](found.modules["embedding_model"](wave[None]))[0, 0]


def assert_same(found, expected):
    # Equal scores would agree even if the conversion were wrong.
    assert expected.max() - expected.min() > 0.02
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def checkpoint(tiny_encoder, tmp_path_factory):
    """Function: name of `TINY` -> folder of a classifier as transformers saves it."""

    def make(name="wav2vec2-group", do_normalize=True, names=LABELS, **values):
        folder = tmp_path_factory.mktemp("checkpoint") / name
        kind = getattr(transformers, CLASSES[name])
        config = kind.config_class.from_pretrained(tiny_encoder(name), id2label=dict(enumerate(names)), **values)
        config.label2id = {label: row for row, label in enumerate(names)}
        torch.manual_seed(1)
        model = kind(config)
        for key, parameter in model.named_parameters():
            if key.startswith(("projector", "classifier", "layer_weights")):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def template(checkpoint):
    """An intact checkpoint, for tests that damage a copy of it."""
    return checkpoint()


@pytest.fixture
def spoilt(template, tmp_path):
    return shutil.copytree(template, tmp_path / "spoilt")


def change(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tiny_encoder):
    """Function: options of encoder and head -> a model in evaluation mode with different scores for each class."""

    def make(name="wav2vec2-group", labels=LABELS, encoder=None, **options):
        torch.manual_seed(2)
        model = AccentModel(make_encoder(str(tiny_encoder(name)), **(encoder or {})), labels, **options)
        for parameter in model.head_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        if model.whitening is not None:
            vectors = 3 + torch.randn(200, model.pooling.out_features) @ torch.randn(2 * (model.pooling.out_features,))
            model.whitening.fit(vectors, torch.arange(200) % len(labels))
        return model.eval()

    return make


def written(folder, model, labels=LABELS, pooling="mean", **options):
    return write_bundle(folder, model, labels, encoder_name="tiny", pooling=pooling, **options)


# ----------------------------------------------------------------------------------------------- from Hugging Face


@pytest.mark.parametrize(
    ("do_normalize", "weighted"), [(False, False), (True, True)], ids=["last state", "normalised, sum of states"]
)
@pytest.mark.parametrize("name", NAMES)
def test_an_imported_checkpoint_gives_the_same_scores(checkpoint, name, do_normalize, weighted):
    folder = checkpoint(name, do_normalize, use_weighted_layer_sum=weighted, classifier_proj_size=12)
    found = from_hugging_face(folder)
    assert found.config["labels"] == LABELS
    assert_same(scores_of_bundle(found, clip()), scores_of_transformers(folder, clip()))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.integers(1600, 30_000), seed=st.integers(0, 99))
def test_an_imported_checkpoint_gives_the_same_scores_for_any_clip(template, imported, samples, seed):
    wave = clip(samples, seed)
    torch.testing.assert_close(
        scores_of_bundle(imported, wave), scores_of_transformers(template, wave), atol=1e-5, rtol=1e-5
    )


@pytest.fixture(scope="module")
def imported(template, tmp_path_factory):
    return load_bundle(import_hugging_face(template, tmp_path_factory.mktemp("imported") / "bundle"))


def test_an_imported_bundle_names_its_source(template, imported):
    assert imported.config["imported_from"] == imported.config["model"]["encoder"]["name"] == "wav2vec2-group"
    assert imported.config["calibration"] is None and imported.config["model"]["encoder"]["family"] == "wav2vec2"
    in_memory = from_hugging_face(template).config["weights"]
    assert in_memory == bundle_config.weights_identity(template / "model.safetensors")
    assert "id2label" not in imported.config["model"]["encoder"]["config"]


def test_an_imported_bundles_card_claims_no_training(template, tmp_path):
    card = (import_hugging_face(template, tmp_path / "b") / "README.md").read_text(encoding="utf-8")
    assert "Imported from wav2vec2-group" in card and "Trained with accent_plugin" not in card


def test_importing_over_a_checkpoint_is_refused(template, spoilt):
    with pytest.raises(BundleError, match="contains 'model.safetensors', which this command did not write"):
        import_hugging_face(template, spoilt)
    assert (spoilt / "model.safetensors").is_file()


def test_older_checkpoint_formats_can_be_imported(spoilt, template):
    """Pickled tensors, names of weight normalisation from before torch 2, and keys that transformers has dropped."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = load_file(spoilt / "model.safetensors")
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    torch.save(state, spoilt / "pytorch_model.bin")
    (spoilt / "model.safetensors").unlink()
    change(spoilt, gradient_checkpointing=False, finetuning_task="audio-classification", hidden_dropout_prob=0.1)
    found = from_hugging_face(spoilt)
    assert found.config["weights"]["file"] == "pytorch_model.bin"
    assert_same(scores_of_bundle(found, clip()), scores_of_transformers(template, clip()))


def test_weights_in_several_files_can_be_imported(spoilt, template):
    model = AutoModelForAudioClassification.from_pretrained(spoilt)
    (spoilt / "model.safetensors").unlink()
    model.save_pretrained(spoilt, max_shard_size="50KB")
    assert len(list(spoilt.glob("*.safetensors"))) > 1
    found = from_hugging_face(spoilt)
    assert found.config["weights"]["file"] == "model.safetensors.index.json"
    assert_same(scores_of_bundle(found, clip()), scores_of_transformers(template, clip()))


def test_half_precision_weights_are_converted_to_float32(spoilt):
    model = AutoModelForAudioClassification.from_pretrained(spoilt)
    model.half().save_pretrained(spoilt)
    found = from_hugging_face(spoilt)
    assert {value.dtype for value in found.model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["Wav2Vec2ForCTC"]}, "it is Wav2Vec2ForCTC; supported are Wav2Vec2ForSequenceClassific"),
        ({"architectures": ["Wav2Vec2ForSpeechClassification"]}, "it is Wav2Vec2ForSpeechClassification; supported"),
        ({"architectures": None}, "it is a wav2vec2 without a class"),
        ({"problem_type": "multi_label_classification"}, "is not a single-label classifier .multi_label"),
        ({"id2label": {"0": "us"}}, "is not a single-label classifier"),
        ({"id2label": {"0": "us", "1": "england", "3": "australia"}}, "id2label numbers its classes"),
        ({"id2label": {"0": "us", "1": "england"}}, "weights in .* cannot be loaded"),
        ({"add_adapter": True}, "cannot be loaded: .*adapter"),
        ({"num_hidden_layers": 4}, r"lack \d+ tensors of the classifier"),
        ({"num_hidden_layers": 2}, r"have \d+ unexpected tensors, such as wav2vec2.encoder.layers.2"),
        ({"use_weighted_layer_sum": True}, "lack 1 tensors of the classifier, such as layer_weights"),
    ],
    ids=str,
)
def test_an_unsupported_configuration_is_an_error(spoilt, values, message):
    change(spoilt, **values)
    with pytest.raises(ExchangeError, match=message):
        from_hugging_face(spoilt)


@pytest.mark.parametrize(
    "values", [{"sampling_rate": 8000}, {"feature_size": 2}, {"feature_extractor_type": "ASTFeatureExtractor"}], ids=str
)
def test_an_unsupported_preprocessing_is_an_error(spoilt, values):
    change(spoilt, "preprocessor_config.json", **values)
    with pytest.raises(ExchangeError, match="preprocessor_config.json in .* describes a"):
        from_hugging_face(spoilt)


def test_missing_weights_are_an_error(spoilt):
    state = load_file(spoilt / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("classifier")}, spoilt / "model.safetensors")
    with pytest.raises(ExchangeError, match="lack 2 tensors of the classifier, such as classifier.bias"):
        from_hugging_face(spoilt)


def test_unexpected_tensors_are_an_error(spoilt):
    state = load_file(spoilt / "model.safetensors") | {"classifier.dense.weight": torch.zeros(1)}
    save_file(state, spoilt / "model.safetensors")
    with pytest.raises(ExchangeError, match="1 unexpected tensors, such as classifier.dense.weight"):
        from_hugging_face(spoilt)


def test_separate_adapters_are_an_error(spoilt):
    (spoilt / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}', encoding="utf-8")
    with pytest.raises(ExchangeError, match="PEFT adapters"):
        from_hugging_face(spoilt)


def test_code_in_a_checkpoint_is_not_executed(spoilt, tmp_path):
    (spoilt / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "ran")}, spoilt / "pytorch_model.bin")
    (spoilt / "modeling.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})", encoding="utf-8")
    change(spoilt, auto_map={"AutoModelForAudioClassification": "modeling.Model", "AutoConfig": "modeling.Config"})
    with pytest.raises(ExchangeError, match="cannot be loaded"):
        from_hugging_face(spoilt)
    assert not (tmp_path / "ran").exists()


def test_a_name_on_the_hub_needs_a_network():
    with pytest.raises(EncoderError, match="cannot be downloaded from .*hf download some/classifier"):
        from_hugging_face("some/classifier")


# ------------------------------------------------------------------------------------------------ names of classes


def named(source, *names):
    path = source / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(row): name for row, name in enumerate(names)}
    config["label2id"] = {name: row for row, name in enumerate(names)}
    path.write_text(json.dumps(config), encoding="utf-8")
    return source


def test_known_accent_names_need_no_mapping(spoilt):
    found = from_hugging_face(named(spoilt, "American", "England English", "en-AU"))
    assert found.config["labels"] == LABELS


def test_a_mapping_gives_labels_to_class_names(spoilt):
    named(spoilt, "LABEL_0", "England English", "Geordie")
    found = from_hugging_face(spoilt, {"LABEL_0": "us", "geordie": "geordie"})
    assert found.config["labels"] == ["us", "england", "geordie"]


@pytest.mark.parametrize(
    ("names", "mapping", "message"),
    [
        (["LABEL_0", "LABEL_1", "us"], None, "these are not known accents: LABEL_0, LABEL_1\n"),
        (["LABEL_0", "LABEL_1", "us"], None, "--labels map.yaml:\n  LABEL_0: ACCENT\n  LABEL_1: ACCENT\n  us: us$"),
        (["LABEL_0", "england", "us"], {"LABEL_0": "us"}, "these would all be us: LABEL_0, us\n"),
        (
            ["happy", "england", "us"],
            None,
            "has the classes happy, england, us:\n  these are not known accents: happy\n",
        ),
        (
            ["American", "United States English", "england"],
            None,
            "these would all be us: American, United States English",
        ),
    ],
)
def test_class_names_without_distinct_labels_are_an_error(spoilt, names, mapping, message):
    with pytest.raises(ExchangeError, match=message):
        from_hugging_face(named(spoilt, *names), mapping)


# ------------------------------------------------------------------------------------------------ to Hugging Face


@pytest.mark.parametrize(
    ("layers", "projector_size"),
    [(None, None), ("all", 12), ([2, 0], None)],
    ids=["last state", "all states, projector", "some states"],
)
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_bundle_gives_the_same_scores(trained, tmp_path, name, layers, projector_size):
    model = trained(name, encoder={"weighted_layers": layers}, projector_size=projector_size)
    folder = to_hugging_face(written(tmp_path / "bundle", model), tmp_path / "out")
    with torch.inference_mode():
        assert_same(scores_of_transformers(folder, clip()), model(clip()[None])[0])


@pytest.mark.parametrize("projector_size", [None, 12])
def test_whitening_and_temperature_are_folded_in(trained, tmp_path, projector_size):
    model = trained(whitening=True, projector_size=projector_size)
    source = written(tmp_path / "bundle", model, calibration=calibrated(2.0))
    folder = to_hugging_face(source, tmp_path / "out")
    assert_same(scores_of_transformers(folder, clip()), scores_of_bundle(load_bundle(source), clip()))


@pytest.mark.parametrize("do_normalize", [False, True])
def test_an_export_and_import_restores_the_scores(checkpoint, tmp_path, do_normalize):
    source = checkpoint("hubert-layer", do_normalize, use_weighted_layer_sum=True)
    folder = to_hugging_face(import_hugging_face(source, tmp_path / "bundle"), tmp_path / "out")
    assert_same(scores_of_transformers(folder, clip()), scores_of_transformers(source, clip()))
    assert AutoFeatureExtractor.from_pretrained(folder).do_normalize is do_normalize


@settings(max_examples=50, deadline=None)
@given(
    layers=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    numbers=st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5),
)
def test_a_sum_over_some_layers_equals_a_sum_over_all(layers, numbers):
    class Encoder:
        weighted_layers = layers
        layer_weights = torch.tensor(numbers[: len(layers)])

    Encoder.layers = [None] * 3

    expected = torch.zeros(4).index_add(0, torch.tensor(layers), torch.softmax(Encoder.layer_weights, dim=0))
    found = torch.softmax(_all_layer_weights(Encoder).float(), dim=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert all(found[layer] == 0 for layer in range(4) if layer not in layers)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return to_hugging_face(written(folder / "bundle", trained()), folder / "huggingface")


def test_the_pipeline_of_transformers_runs_an_export(exported):
    classify = pipeline("audio-classification", str(exported), device="cpu")
    answers = classify({"array": clip().numpy(), "sampling_rate": 16_000})
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in scores_of(exported).argsort(descending=True)]
    assert answers[0]["score"] == pytest.approx(scores_of(exported).max().exp().item(), abs=1e-5)


def scores_of(folder):
    return scores_of_transformers(folder, clip())


def test_an_exported_folder_has_the_expected_files(exported, tmp_path):
    names = {path.name for path in exported.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == dict(zip("012", LABELS, strict=True)) and config["label2id"]["australia"] == 2
    assert config["architectures"] == ["Wav2Vec2ForSequenceClassification"]
    assert "/tmp" not in "".join(path.read_text() for path in exported.iterdir() if path.suffix != ".safetensors")


def test_the_card_is_for_transformers(exported):
    import yaml

    front, text = (exported / "README.md").read_text(encoding="utf-8").split("---\n")[1:]
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "transformers" and meta["pipeline_tag"] == "audio-classification"
    assert "transformers" in meta["tags"] and "speechbrain" not in meta["tags"]
    assert 'pipeline("audio-classification", "FOLDER")' in text and "EncoderClassifier" not in text
    assert "## Evaluation" in text and "## Limits" in text


@pytest.mark.parametrize(
    ("options", "writing", "message"),
    [
        ({"pooling": "attentive"}, {"pooling": "attentive"}, "its pooling is attentive; transformers supports mean"),
        ({"pooling": "statistics"}, {"pooling": "statistics"}, "its pooling is statistics"),
        ({"projector_size": 8, "projector_activation": True}, {}, "projector_activation is True"),
        ({"encoder": {"weighted_layers": "all", "standardise_layers": True}}, {}, "standardise_layers is True"),
        ({}, {"speeds": (0.9, 1.0)}, r"test_speeds is \[0.9, 1.0\]"),
        ({"name": "moonshine"}, {}, "family moonshine, for which transformers has no audio classifier"),
        ({"name": "whisper"}, {}, "family whisper, for which transformers has no audio classifier with these scores"),
    ],
    ids=str,
)
def test_parts_that_transformers_does_not_support_are_an_error(trained, tmp_path, options, writing, message):
    source = written(tmp_path / "bundle", trained(**options), **writing)
    with pytest.raises(
        ExchangeError, match=f"(?s){message}.*train a model without these, or publish the bundle itself"
    ):
        to_hugging_face(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_and_other_folders_are_not(exported, template, tmp_path):
    source = exported.parent / "bundle"
    again = to_hugging_face(source, shutil.copytree(exported, tmp_path / "again"))
    assert_same(scores_of(again), scores_of(exported))
    more = shutil.copytree(exported, tmp_path / "more")
    (more / "notes.txt").touch()
    for taken in (more, shutil.copytree(template, tmp_path / "theirs"), shutil.copytree(source, tmp_path / "bundle")):
        with pytest.raises(BundleError, match="which this command did not write"):
            to_hugging_face(source, taken)
        assert (taken / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "bundle", "more", "theirs"]


def test_all_files_of_an_export_have_the_same_permissions(exported):
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_different_scores_are_an_error(template, monkeypatch):
    """Any difference between the two models is detected."""
    monkeypatch.setattr(hugging_face, "_accent_model", spoil(_accent_model))
    with pytest.raises(ExchangeError, match="give different scores with the same weights"):
        from_hugging_face(template)


def spoil(make):
    def make_and_spoil(*arguments):
        model = make(*arguments)
        model.classifier.bias.data[0] += 0.001
        return model

    return make_and_spoil


# ---------------------------------------------------------------------------------------------- starts of training


def start(folder, labels=LABELS, encoder=None, **options):
    """A model initialised from a trained one, and the parts that it took."""
    torch.manual_seed(3)
    encoder = make_encoder("nowhere", from_bundle=str(folder), **(encoder or {}))
    model = AccentModel(encoder, labels, **options)
    return model.eval(), *initialise_head(model, labels, folder)


@pytest.mark.parametrize("name", TINY)
def test_training_starts_with_the_scores_of_the_bundle(trained, tmp_path, name):
    options = {"encoder": {"weighted_layers": [0, 2]}, "projector_size": 12, "pooling": "attentive_statistics"}
    source = written(tmp_path / "b", trained(name, **options), pooling="attentive_statistics")
    model, taken, new = start(source, **options)
    assert taken == ["layer weights", "projector", "pooling", "classifier of us, england, australia"] and new == []
    with torch.inference_mode():
        assert_same(model(clip()[None])[0], scores_of_bundle(load_bundle(source), clip()))


def test_a_whitening_is_taken_with_its_classifier(trained, tmp_path):
    source = written(tmp_path / "b", trained(whitening=True))
    model, taken, new = start(source, whitening=True)
    assert "whitening" in taken and not new and model.whitening.fitted
    with torch.inference_mode():
        assert_same(model(clip()[None])[0], scores_of_bundle(load_bundle(source), clip()))


def test_a_whitening_of_other_features_is_not_taken(trained, tmp_path):
    source = written(tmp_path / "b", trained(whitening=True))
    model, taken, new = start(source, encoder={"num_layers": 2}, whitening=True)
    assert taken == [] and new == ["whitening", "classifier of us, england, australia"]
    assert not model.whitening.fitted and not model.classifier.weight.any()


def test_a_classifier_of_whitened_features_is_not_taken_without_the_whitening(trained, tmp_path):
    assert start(written(tmp_path / "b", trained(whitening=True)))[1] == []


def test_rows_of_the_classifier_are_matched_by_label(trained, tmp_path):
    source = written(tmp_path / "b", trained())
    theirs = load_bundle(source).model.classifier
    model, taken, new = start(source, ["scotland", "australia", "us"])
    assert taken == ["classifier of australia, us"] and new == ["classifier of scotland"]
    assert torch.equal(model.classifier.weight[1:], theirs.weight[[2, 0]])
    assert torch.equal(model.classifier.bias[1:], theirs.bias[[2, 0]])


def test_parts_of_another_shape_are_not_taken(trained, tmp_path):
    source = written(tmp_path / "b", trained(projector_size=12))
    _, taken, new = start(source, projector_size=8, encoder={"weighted_layers": [1, 2]})
    assert taken == [] and new == ["layer weights", "projector", "classifier of us, england, australia"]


def test_training_can_start_from_a_hugging_face_classifier(checkpoint):
    folder = checkpoint("wavlm-layer", names=["American", "happy", "en-AU"], classifier_proj_size=12)
    model, taken, new = start(folder, projector_size=12)
    assert taken == ["projector", "classifier of us, australia"] and new == ["classifier of england"]
    with torch.inference_mode():
        found = model(clip()[None])[0, [0, 2]].diff()
    assert_same(
        found.repeat(2) * torch.tensor([1, -1]), scores_of(folder)[[0, 2]].diff().repeat(2) * torch.tensor([1, -1])
    )


def test_a_bundle_can_be_truncated_to_fewer_layers(trained, tmp_path):
    source = written(tmp_path / "b", trained("moonshine"))
    whole = make_encoder("nowhere", from_bundle=str(source)).eval()
    cut = make_encoder("nowhere", from_bundle=str(source), num_layers=1).eval()
    with torch.inference_mode():
        assert torch.equal(cut.hidden_states(clip()[None])[0][0], whole.hidden_states(clip()[None])[0][0])


def test_encoder_options_apply_to_a_bundle(trained, tmp_path):
    source = written(tmp_path / "b", trained())
    encoder = make_encoder(
        "nowhere", from_bundle=str(source), freeze_layers=1, config_overrides={"mask_time_prob": 0.0}
    )
    assert encoder.config.mask_time_prob == 0.0 and not encoder.layers[0].training
    eager = make_encoder("nowhere", from_bundle=str(source), attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"


def test_damaged_encoder_weights_are_an_error(trained, tmp_path):
    source = written(tmp_path / "b", trained())
    for spoil, message in [
        (lambda state: state.pop("wav2vec2.model.encoder.layers.1.final_layer_norm.weight"), "lacks 1 tensors"),
        (lambda state: state.update({"wav2vec2.model.encoder.layers.2.more": torch.zeros(1)}), "has 1 tensors that"),
        (
            lambda state: state["wav2vec2.model.encoder.layer_norm.weight"].fill_(torch.nan),
            "NaN or infinity in wav2vec2",
        ),
    ]:
        state = load_file(source / "model.ckpt")
        spoil(state)
        copy = shutil.copytree(source, tmp_path / "copy", dirs_exist_ok=True)
        save_file(state, copy / "model.ckpt")
        change(copy, weights=bundle_config.weights_identity(copy / "model.ckpt"))
        with pytest.raises(EncoderError, match=message):
            make_encoder("nowhere", from_bundle=str(copy))
    save_file(load_file(source / "model.ckpt"), copy / "model.ckpt", metadata={"changed": "yes"})
    with pytest.raises(BundleError, match="bytes|SHA-256"):
        make_encoder("nowhere", from_bundle=str(copy))


# ------------------------------------------------------------------------------------------------- as a user does it


@pytest.fixture
def run(capsys):
    """The command in this process: exit code, stdout and stderr."""

    def call(*words):
        code = main.main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def tones(hertz, clips, first=0):
    """Rows of an accent, with clips of one tone and noise."""
    rows = made.rows(f"tone {hertz}", clips, clips=1, first=first)
    for row in rows:
        noise = made.noise(0.7, seed=hertz + int(row["client_id"].rsplit("-", 1)[1]))
        sound = 0.2 * np.sin(2 * np.pi * hertz * np.arange(len(noise)) / 16_000) + 0.1 * noise
        row["audio"] = {"bytes": made.encode(sound.astype(np.float32), subtype="PCM_16"), "path": row["path"]}
    return rows


@pytest.fixture(scope="module")
def by_trainer(tiny_encoder, tmp_path_factory):
    """A checkpoint like that of transformers' run_audio_classification.py, with generic class names."""
    import io

    import soundfile
    from transformers import AutoConfig, Trainer, TrainingArguments

    base, folder = str(tiny_encoder("wav2vec2-group")), tmp_path_factory.mktemp("trainer") / "checkpoint"
    extractor = AutoFeatureExtractor.from_pretrained(base, return_attention_mask=True)
    examples = []
    for label, hertz in enumerate((300, 1500)):
        for row in tones(hertz, 8, first=100):
            samples, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            values = extractor(samples[:8000], sampling_rate=16_000)["input_values"][0]
            examples.append({"input_values": values, "labels": label})
    id2label = {"0": "LABEL_0", "1": "LABEL_1"}
    config = AutoConfig.from_pretrained(
        base,
        num_labels=2,
        label2id={name: number for number, name in id2label.items()},
        id2label=id2label,
        finetuning_task="audio-classification",
    )
    transformers.set_seed(0)
    model = AutoModelForAudioClassification.from_pretrained(base, config=config)
    model.freeze_feature_encoder()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, processing_class=extractor)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rows = {split: tones(300, 4, first) + tones(1500, 4, first) for split, first in (("train", 0), ("test", 10))}
    return made.save(tmp_path_factory.mktemp("tones") / "data", **rows)


@pytest.fixture
def map_of_tones(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("LABEL_0: tone 300\nLABEL_1: tone 1500\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_evaluate_works_with_a_hugging_face_model(by_trainer, labelled, map_of_tones, tmp_path):
    import csv
    import io

    import soundfile

    words = ["evaluate", "--model", by_trainer, "--data", labelled, "--out", tmp_path / "out", "--device", "cpu"]
    # In a new process, like a user's command.
    command = [sys.executable, "-m", "accent_plugin.cli", *map(str, words), "--labels", str(map_of_tones)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stdout = done.stdout
    assert "unweighted_average_recall" in stdout
    metrics = json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))
    assert metrics["confusion"]["labels"] == ["tone 300", "tone 1500"] and metrics["data"]["clips"] == 8
    with open(tmp_path / "out/predictions.csv", newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    for answer, row in zip(answers, tones(300, 4, 10) + tones(1500, 4, 10), strict=True):
        wave, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        expected = scores_of_transformers(by_trainer, torch.from_numpy(wave)).exp()
        assert [float(answer["p_tone 300"]), float(answer["p_tone 1500"])] == pytest.approx(expected.tolist(), abs=1e-5)


def test_evaluate_needs_labels_for_unknown_class_names(by_trainer, labelled, run):
    code, _, stderr = run("evaluate", "--model", by_trainer, "--data", labelled, "--device", "cpu")
    assert code == 2 and "these are not known accents: LABEL_0, LABEL_1" in stderr


def test_evaluate_needs_a_network_for_a_name_on_the_hub(labelled, run):
    code, _, stderr = run("evaluate", "--model", "somebody/accents", "--data", labelled)
    assert code == 2 and "somebody/accents is no local folder and cannot be downloaded from" in stderr


def test_an_unknown_device_is_an_error(exported, run, tmp_path):
    (tmp_path / "a.wav").touch()
    code, _, stderr = run("classify", tmp_path / "a.wav", "--model", exported, "--device", "quantum")
    assert code == 2 and "device 'quantum' cannot be used here" in stderr


def test_import_classify_and_export(run, by_trainer, map_of_tones, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "clip.wav", clip().numpy(), 16_000)
    code, stdout, stderr = run("import", by_trainer, "--out", tmp_path / "run/bundle", "--labels", map_of_tones)
    assert (code, stdout.strip()) == (0, str(tmp_path / "run/bundle")), stderr
    code, stdout, stderr = run("export", tmp_path / "run", "--to", "huggingface")
    assert (code, stdout.strip()) == (0, str(tmp_path / "run/huggingface")), stderr
    answers = []
    for model, extra in (
        (tmp_path / "run/bundle", ()),
        (tmp_path / "run/huggingface", ("--labels", mapped_to_themselves(tmp_path))),
        (by_trainer, ("--labels", map_of_tones)),
    ):
        words = ("classify", tmp_path / "clip.wav", "--model", model, "--format", "jsonl", "--device", "cpu", *extra)
        code, stdout, stderr = run(*words)
        assert code == 0, stderr
        answers.append(json.loads(stdout)["probabilities"])
    assert answers[1] == pytest.approx(answers[0], abs=1e-5) and answers[2] == pytest.approx(answers[0], abs=1e-5)


def mapped_to_themselves(folder):
    (folder / "own.yaml").write_text("tone 300: tone 300\ntone 1500: tone 1500\n", encoding="utf-8")
    return folder / "own.yaml"


def test_labels_for_a_bundle_are_refused(run, exported, map_of_tones, tmp_path):
    (tmp_path / "a.wav").touch()
    words = ("classify", tmp_path / "a.wav", "--model", exported.parent / "bundle", "--labels", map_of_tones)
    code, _, stderr = run(*words)
    assert code == 2 and "--labels renames the classes of a Hugging Face model" in stderr


def test_a_classifier_with_nan_is_refused_by_the_name_of_the_tensor(spoilt):
    state = load_file(spoilt / "model.safetensors")
    state["classifier.bias"][0] = torch.nan
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExchangeError, match="NaN or infinity in classifier.bias: the weights are damaged"):
        from_hugging_face(spoilt)


@pytest.mark.parametrize(
    ("name", "layers", "cause"),
    [
        ("hubert-layer", [0, 3], "may normalise the last state before it sums the states, .* upgrade transformers"),
        ("hubert-layer", [0, 2], "please report this as a bug"),
        ("hubert-layer", None, "please report this as a bug"),
        ("hubert-group", [0, 3], "please report this as a bug"),
    ],
)
def test_other_scores_of_a_release_of_transformers_are_explained(tiny_encoder, name, layers, cause):
    folder = tiny_encoder(name)
    ours = AccentModel(make_encoder(str(folder), weighted_layers=layers), ("us", "england")).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)

    def theirs(**inputs):
        return SimpleNamespace(logits=torch.tensor([[9.0, -9.0]]))

    with pytest.raises(ExchangeError, match=cause):
        hugging_face._compare(ours, theirs, extractor)
