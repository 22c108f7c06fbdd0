"""The cache of a frozen encoder's pooled states."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from accent_plugin.audio import codecs
from accent_plugin.audio.samples import SAMPLE_RATE
from accent_plugin.data.manifests import Clip
from accent_plugin.encoder.factory import make_encoder
from accent_plugin.errors import DataError, FeatureError
from accent_plugin.model import AccentModel
from accent_plugin.training import feature_cache
from accent_plugin.training.batches import BucketBatchSampler, ClipDataset, make_loader
from accent_plugin.training.feature_cache import Store

ACCENTS = ["us", "england"]


@pytest.fixture
def clips(tmp_path):
    """Six clips of noise of different lengths."""
    rng, made = np.random.default_rng(0), []
    for number in range(6):
        samples = rng.uniform(-0.3, 0.3, 8000 + 1600 * number).astype(np.float32)
        path = tmp_path / f"{number}.flac"
        codecs.write(path, samples)
        seconds = len(samples) / SAMPLE_RATE
        made.append(Clip(f"a,{number}", seconds, str(path), ACCENTS[number % 2], f"s{number}", "", ""))
    return tuple(made)


@pytest.fixture
def encoder(tiny_encoder):
    return make_encoder(str(tiny_encoder("wav2vec2-group")), freeze=True)


def load(clips):
    dataset = ClipDataset(clips, ACCENTS)
    return make_loader(dataset, BucketBatchSampler(dataset.seconds(), 2.0, shuffle=False))


def store_of(folder, encoder, precision="fp32", **how):
    return Store(folder, feature_cache.identify(encoder, precision, **how))


def filled(folder, encoder, clips, **how):
    store = store_of(folder, encoder, **how)
    assert feature_cache.fill(store, encoder, clips, load, progress=False) == {}
    return store


def values(store, clips):
    return np.stack([store[store.row(feature_cache.key(clip))] for clip in clips])


@pytest.fixture
def encoded(monkeypatch):
    """Ids of the clips that an encoder was run over."""
    seen, original = [], feature_cache.encode

    def encode(*arguments, **keywords):
        for batch, means in original(*arguments, **keywords):
            seen.extend(batch.ids)
            yield batch, means

    monkeypatch.setattr(feature_cache, "encode", encode)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"weighted_layers": [0, 2]}, {"weighted_layers": "all", "standardise_layers": True}],
    ids=["last", "sum", "standardised sum"],
)
@pytest.mark.parametrize("projector", [None, 5])
def test_cached_features_give_the_same_output_as_audio(tiny_encoder, clips, tmp_path, options, projector):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), freeze=True, **options)
    model = AccentModel(encoder, ACCENTS, projector_size=projector).eval()
    if options:
        torch.nn.init.normal_(encoder.layer_weights)
    store = filled(tmp_path / "kept", encoder, clips)
    with torch.no_grad():
        kept = model(torch.zeros(len(clips), 0), None, torch.from_numpy(values(store, clips)))
        for clip, scores in zip(clips, kept, strict=True):
            assert torch.allclose(model(torch.from_numpy(codecs.read(clip.wav))[None])[0], scores, atol=1e-5)


def test_all_hidden_states_can_be_cached(encoder, clips, tmp_path):
    store = filled(tmp_path, encoder, clips, every_state=True)
    states, valid = encoder.hidden_states(torch.from_numpy(codecs.read(clips[0].wav))[None])
    assert values(store, clips).shape == (6, len(states), encoder.width)
    for kept, state in zip(values(store, clips)[0], states, strict=True):
        assert kept == pytest.approx(state[0].mean(dim=0).numpy(), abs=1e-5)


def test_features_are_not_rounded_to_tf32(encoder, clips, tmp_path):
    seen = []
    encoder.layers[0].register_forward_hook(
        lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
    )
    filled(tmp_path, encoder, clips)
    assert set(seen) == {(False, False)}


def test_no_clip_is_encoded_twice(encoder, clips, tmp_path, encoded):
    filled(tmp_path, encoder, clips[:4])
    assert sorted(encoded) == [clip.id for clip in clips[:4]]
    encoded.clear()
    filled(tmp_path, encoder, clips)
    assert sorted(encoded) == [clip.id for clip in clips[4:]]
    encoded.clear()
    filled(tmp_path, encoder, clips[::-1])
    assert encoded == []


@pytest.mark.parametrize("change", ["weights", "precision", "states", "layers"])
def test_features_of_another_encoder_are_not_used(encoder, clips, tmp_path, encoded, tiny_encoder, change):
    filled(tmp_path, encoder, clips)
    encoded.clear()
    how = {}
    if change == "weights":
        with torch.no_grad():
            next(encoder.layers[0].parameters()).flatten()[0] += 1
    elif change == "precision":
        how = {"precision": "bf16"}
    elif change == "states":
        how = {"every_state": True}
    else:
        encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), freeze=True, weighted_layers=[1])
    filled(tmp_path, encoder, clips, **how)
    assert len(encoded) == len(clips)


def test_another_recording_under_the_same_name_is_encoded_again(encoder, clips, tmp_path, encoded):
    before = values(filled(tmp_path / "kept", encoder, clips), clips)
    encoded.clear()
    codecs.write(tmp_path / "0.flac", np.zeros(8000, dtype=np.float32) + 0.1)
    after = values(filled(tmp_path / "kept", encoder, clips), clips)
    assert encoded == [clips[0].id]
    assert not np.allclose(before[0], after[0]) and np.array_equal(before[1:], after[1:])


def test_a_folder_renamed_to_another_encoders_digest_is_an_error(encoder, clips, tmp_path):
    made = filled(tmp_path / "one", encoder, clips)
    other = feature_cache.identify(encoder, "bf16")
    name = Store(tmp_path / "two", other).folder.name
    os.rename(made.folder, tmp_path / "one" / name)
    with pytest.raises(FeatureError, match="another encoder: precision(.|\n)*choose another features_folder"):
        Store(tmp_path / "one", other)


@pytest.mark.parametrize(
    ("name", "content"),
    [("features.json", b"{"), ("features.json", b"[]"), ("features.json", None), ("index.csv", b"what\n")],
)
def test_a_damaged_folder_is_an_error(encoder, clips, tmp_path, name, content):
    path = filled(tmp_path, encoder, clips).folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(FeatureError, match="delete this one"):
        store_of(tmp_path, encoder)


@pytest.mark.parametrize("row", [0, 3, 5])
def test_damaged_values_are_recomputed(encoder, clips, tmp_path, encoded, row, caplog):
    store = filled(tmp_path, encoder, clips)
    before, which = values(store, clips), [clip.id for clip in clips if store.row(feature_cache.key(clip)) == row]
    encoded.clear()
    path = store.folder / "means.f32"
    content = bytearray(path.read_bytes())
    content[row * len(content) // 6 + 5] ^= 1
    path.write_bytes(content)
    store = filled(tmp_path, encoder, clips)
    assert "the damaged features of 1 clips" in caplog.text
    assert encoded == which
    assert np.allclose(values(store, clips), before, atol=1e-6)
    encoded.clear()
    filled(tmp_path, encoder, clips)
    assert encoded == []


@pytest.mark.parametrize("cut", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("name", ["means.f32", "index.csv"])
def test_a_truncated_store_is_completed(encoder, clips, tmp_path, name, cut):
    store = filled(tmp_path, encoder, clips)
    before, path = values(store, clips), store.folder / name
    os.truncate(path, int(cut * path.stat().st_size))
    assert np.allclose(values(filled(tmp_path, encoder, clips), clips), before, atol=1e-6)
    # The next store finds all features.
    again = store_of(tmp_path, encoder)
    assert all(feature_cache.key(clip) in again for clip in clips)


def test_an_unreadable_clip_is_reported_and_skipped(encoder, clips, tmp_path):
    (tmp_path / "2.flac").write_bytes(b"no audio")
    store = store_of(tmp_path / "kept", encoder)
    lost = feature_cache.fill(store, encoder, clips, load, progress=False)
    assert list(lost) == ["a,2"] and "2.flac" in lost["a,2"]
    dataset = feature_cache.PooledStatesDataset(ClipDataset(clips, ACCENTS), store, lost)
    batch = feature_cache.collate([dataset[index, 1] for index in range(6)])
    assert batch.lost == (("a,2", lost["a,2"]),)
    assert batch.ids == ("a,0", "a,1", "a,3", "a,4", "a,5") and batch.labels.tolist() == [0, 1, 1, 0, 1]
    assert batch.pooled_states.shape == (5, 1, encoder.width)


def test_a_batch_of_unreadable_clips_has_no_features(clips):
    batch = feature_cache.collate([feature_cache.Lost("x", "why")])
    assert len(batch) == 0 and batch.lost == (("x", "why"),)


def test_a_folder_that_cannot_be_created_is_an_error(encoder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="choose another features_folder"):
        store_of(tmp_path / "file", encoder)


def test_clips_added_by_another_process_are_used(encoder, clips, tmp_path, encoded):
    early = store_of(tmp_path, encoder)
    filled(tmp_path, encoder, clips[:3])
    encoded.clear()
    feature_cache.fill(early, encoder, clips, load, progress=False)
    assert sorted(encoded) == [clip.id for clip in clips[3:]]
    assert len(values(early, clips)) == 6


def test_the_folder_contains_no_paths(encoder, clips, tmp_path):
    store = filled(tmp_path, encoder, clips)
    assert str(tmp_path) not in (store.folder / "features.json").read_text() + (store.folder / "index.csv").read_text()
    assert json.loads((store.folder / "features.json").read_text())["identity"]["precision"] == "fp32"


def test_a_batch_carries_its_features_to_a_device():
    batch = feature_cache.Batch(("a",), torch.zeros(1, 0), None, torch.zeros(1), (), torch.ones(1, 2, 3))
    assert batch.to("meta").pooled_states.device.type == "meta"
    assert dataclasses.replace(batch, pooled_states=None).to("meta").pooled_states is None
