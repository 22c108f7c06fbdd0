"""The cache of a frozen encoder's hidden states."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from accent_plugin.audio import codecs
from accent_plugin.audio.augment import Augmentation
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


def load(dataset, copy):
    sampler = BucketBatchSampler(dataset.seconds(), 2.0, shuffle=False)
    sampler.set_epoch(copy)
    return make_loader(dataset, sampler)


def store_of(folder, encoder, precision="fp32", **how):
    return Store(folder, feature_cache.identify(encoder, precision, **how))


def filled(folder, encoder, clips, **how):
    store = store_of(folder, encoder, **how)
    assert feature_cache.fill(store, encoder, ClipDataset(clips, ACCENTS), load, progress=False) == {}
    return store


def values(store, clips):
    """Means of each clip: (clips, states, features)."""
    return np.concatenate([store[store.row(feature_cache.key(clip))] for clip in clips])


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


SUMS = {
    "last": {},
    "sum": {"weighted_layers": [0, 2]},
    "standardised sum": {"weighted_layers": "all", "standardise_layers": True},
}
HEADS = {
    "mean": ({}, "mean"),
    "mean, projector": ({"projector_size": 5}, "mean"),
    "mean, GELU": ({"projector_size": 5, "projector_activation": True}, "frames"),
    "statistics": ({"pooling": "statistics"}, "moments"),
    "statistics, projector": ({"pooling": "statistics", "projector_size": 5}, "frames"),
    "attentive": ({"pooling": "attentive"}, "frames"),
    "attentive statistics": ({"pooling": "attentive_statistics", "projector_size": 5}, "frames"),
}


@pytest.mark.parametrize("options", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize(("head", "summary"), HEADS.values(), ids=HEADS)
def test_cached_features_give_the_same_output_as_audio(tiny_encoder, clips, tmp_path, options, head, summary):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), freeze=True, **options)
    model = AccentModel(encoder, ACCENTS, **head).eval()
    # A large output layer, so that differences of the pooled vectors are not lost in the scores.
    torch.nn.init.normal_(model.classifier.weight)
    if options:
        torch.nn.init.normal_(encoder.layer_weights)
    assert model.summary == summary
    store = filled(tmp_path / "kept", encoder, clips, summary=summary)
    dataset = feature_cache.CachedDataset(ClipDataset(clips, ACCENTS), store, {})
    with torch.no_grad():
        batch = feature_cache.collate([dataset[index, 1] for index in range(len(clips))])
        kept = model(batch.wavs, None, batch.states, batch.frame_counts)
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
    path = store.folder / "features.bin"
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
@pytest.mark.parametrize("name", ["features.bin", "index.csv"])
@pytest.mark.parametrize("summary", ["mean", "frames"])
def test_a_truncated_store_is_completed(encoder, clips, tmp_path, name, cut, summary):
    store = filled(tmp_path, encoder, clips, summary=summary)
    before, path = values(store, clips), store.folder / name
    os.truncate(path, int(cut * path.stat().st_size))
    after = values(filled(tmp_path, encoder, clips, summary=summary), clips)
    assert after.shape == before.shape and np.allclose(after, before, atol=1e-6)
    # The next store finds all features.
    again = store_of(tmp_path, encoder, summary=summary)
    assert all(feature_cache.key(clip) in again for clip in clips)


def test_an_unreadable_clip_is_reported_and_skipped(encoder, clips, tmp_path):
    (tmp_path / "2.flac").write_bytes(b"no audio")
    store = store_of(tmp_path / "kept", encoder)
    lost = feature_cache.fill(store, encoder, ClipDataset(clips, ACCENTS), load, progress=False)
    assert list(lost) == [("a,2", 0)] and "2.flac" in lost["a,2", 0]
    dataset = feature_cache.CachedDataset(ClipDataset(clips, ACCENTS), store, lost)
    batch = feature_cache.collate([dataset[index, 1] for index in range(6)])
    assert batch.lost == (("a,2", lost["a,2", 0]),)
    assert batch.ids == ("a,0", "a,1", "a,3", "a,4", "a,5") and batch.labels.tolist() == [0, 1, 1, 0, 1]
    assert batch.states.shape == (1, 5, 1, encoder.width) and batch.frame_counts.tolist() == [1] * 5


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
    feature_cache.fill(early, encoder, ClipDataset(clips, ACCENTS), load, progress=False)
    assert sorted(encoded) == [clip.id for clip in clips[3:]]
    assert len(values(early, clips)) == 6


def test_the_folder_contains_no_paths(encoder, clips, tmp_path):
    store = filled(tmp_path, encoder, clips)
    assert str(tmp_path) not in (store.folder / "features.json").read_text() + (store.folder / "index.csv").read_text()
    assert json.loads((store.folder / "features.json").read_text())["identity"]["precision"] == "fp32"


def test_a_batch_carries_its_features_to_a_device():
    batch = feature_cache.collate([("a", np.ones((2, 1, 3), dtype=np.float16), 0)]).to("meta")
    assert batch.states.device.type == batch.frame_counts.device.type == "meta"


AUGMENTED = Augmentation(1.0, speed=(0.8, 1.2), noise_snr=(5.0, 20.0), mask_seconds=0.1)


def augmented(clips, copies=2, seed=1, **how):
    return ClipDataset(
        clips, ACCENTS, seed=seed, copies=copies, **{"augmentation": AUGMENTED, "crop_seconds": 0.6} | how
    )


def filled_with(folder, encoder, dataset, summary="frames"):
    store = store_of(folder, encoder, summary=summary, changes=feature_cache.changes(dataset))
    assert feature_cache.fill(store, encoder, dataset, load, progress=False) == {}
    return store


@pytest.mark.parametrize("how", [{}, {"augmentation": None}, {"crop_seconds": None}], ids=["both", "crops", "changes"])
def test_cached_copies_are_the_augmented_clips_of_their_epochs(encoder, clips, tmp_path, how):
    dataset = augmented(clips, **how)
    cached = feature_cache.CachedDataset(dataset, filled_with(tmp_path / "kept", encoder, dataset), {})
    with torch.no_grad():
        for epoch in (1, 2, 3, 4):
            for index in range(len(clips)):
                _, samples, label = dataset[index, epoch]
                name, features, cached_label = cached[index, epoch]
                frames, _ = encoder(torch.from_numpy(samples)[None])
                assert name == clips[index].id and cached_label == label
                assert features[:, 0] == pytest.approx(frames[0].numpy(), abs=1e-5)
    assert not np.array_equal(cached[5, 1][1], cached[5, 2][1])


def test_more_copies_keep_the_first_ones(encoder, clips, tmp_path, encoded):
    filled_with(tmp_path, encoder, augmented(clips, copies=2))
    assert len(encoded) == 12
    filled_with(tmp_path, encoder, augmented(clips, copies=3))
    assert len(encoded) == 18
    filled_with(tmp_path, encoder, augmented(clips, copies=1))
    assert len(encoded) == 18


@pytest.mark.parametrize(
    "how",
    [{"seed": 2}, {"crop_seconds": 0.5}, {"augmentation": dataclasses.replace(AUGMENTED, mask_seconds=0.2)}],
    ids=["seed", "crop", "augmentation"],
)
def test_copies_of_another_augmentation_are_not_used(encoder, clips, tmp_path, encoded, how):
    filled_with(tmp_path, encoder, augmented(clips))
    encoded.clear()
    filled_with(tmp_path, encoder, augmented(clips, **how))
    assert len(encoded) == 12


def test_babble_of_copies_is_that_of_all_clips(encoder, clips, tmp_path, encoded):
    babble = {"augmentation": Augmentation(1.0, babble_snr=(0.0, 5.0)), "crop_seconds": None}
    dataset, fewer = augmented(clips, **babble), augmented(clips[:4], **babble)
    filled_with(tmp_path / "kept", encoder, fewer)
    store = filled_with(tmp_path / "kept", encoder, dataset)
    # The voices of other clips are different ones.
    assert len(encoded) == 8 + 12
    (store.folder / "index.csv").write_text("")
    store = filled_with(tmp_path / "kept", encoder, dataset.with_clips(clips[:3]))
    cached = feature_cache.CachedDataset(dataset, filled_with(tmp_path / "kept", encoder, dataset), {})
    assert len(encoded) == 20 + 12
    frames, _ = encoder(torch.from_numpy(dataset[5, 2][1])[None])
    assert cached[5, 2][1][:, 0] == pytest.approx(frames[0].detach().numpy(), abs=1e-5)


def test_an_augmentation_that_cannot_be_compared_is_not_cached(encoder, clips, tmp_path):
    other = augmented(clips, augmentation=SimpleNamespace(slowest=1.0, fastest=1.0))
    with pytest.raises(FeatureError, match="a SimpleNamespace does not tell all that its output depends on"):
        filled_with(tmp_path, encoder, other)


def test_clips_that_differ_in_every_epoch_are_not_cached(encoder, clips, tmp_path):
    with pytest.raises(FeatureError, match="cropped or augmented anew in every epoch"):
        filled_with(tmp_path, encoder, augmented(clips, copies=None))


def test_a_copy_that_cannot_be_read_is_reported_in_its_epochs(encoder, clips, tmp_path):
    dataset = augmented(clips)
    store = filled_with(tmp_path / "kept", encoder, dataset)
    cached = feature_cache.CachedDataset(dataset, store, {("a,2", 2): "why"})
    assert [isinstance(cached[2, epoch], feature_cache.Lost) for epoch in (1, 2, 3, 4)] == [False, True, False, True]


@pytest.mark.parametrize("package", ["torch", "numpy", "accent_plugin"])
def test_features_of_other_versions_are_not_used(encoder, clips, tmp_path, encoded, monkeypatch, package):
    filled(tmp_path, encoder, clips)
    encoded.clear()
    others = feature_cache.installed_versions() | {package: "0.0"}
    monkeypatch.setattr(feature_cache, "installed_versions", lambda: others)
    filled(tmp_path, encoder, clips)
    assert len(encoded) == len(clips)


def test_another_recording_of_the_same_size_is_encoded_again(encoder, clips, tmp_path, encoded):
    samples = codecs.read(clips[0].wav)
    for sign in (1, -1):
        path = tmp_path / "same.wav"
        soundfile.write(path, sign * samples, SAMPLE_RATE)
        filled(tmp_path / "kept", encoder, [dataclasses.replace(clips[0], wav=str(path))])
    assert len(encoded) == 2


def test_frames_of_a_16_bit_encoder_are_kept_as_float16(encoder, clips, tmp_path):
    exact = filled(tmp_path, encoder, clips, summary="frames")
    short = filled(tmp_path, encoder, clips, summary="frames", precision="bf16")
    sizes = [(store.folder / "features.bin").stat().st_size for store in (exact, short)]
    assert sizes[0] == 2 * sizes[1] == values(exact, clips).nbytes
    assert values(short, clips).dtype == np.float16
    batches = feature_cache.encode(
        *(encoder, load(ClipDataset(clips, ACCENTS), 0), "cpu", "bf16"), summary="frames", progress=False
    )
    encoded = {name: clip for batch, features in batches for name, clip in zip(batch.ids, features, strict=True)}
    wanted = np.concatenate([encoded[clip.id] for clip in clips])
    assert values(short, clips) == pytest.approx(wanted, rel=2**-11, abs=2**-24)


def test_a_state_too_large_for_float16_is_an_error(encoder, clips, tmp_path, monkeypatch):
    batches = list(feature_cache.encode(encoder, load(ClipDataset(clips, ACCENTS), 0), progress=False))
    large = [(batch, [1e6 * clip for clip in features]) for batch, features in batches]
    monkeypatch.setattr(feature_cache, "encode", lambda *_: large)
    with pytest.raises(FeatureError, match="more than float16 holds\ntrain with --precision fp32"):
        filled(tmp_path, encoder, clips, summary="frames", precision="bf16")


@pytest.mark.parametrize("summary", ["mean", "moments", "frames"])
@pytest.mark.parametrize("options", [{}, {"weighted_layers": [0, 2]}], ids=["last", "sum"])
@pytest.mark.parametrize("every_state", [False, True])
def test_the_size_is_estimated_beforehand(tiny_encoder, clips, tmp_path, summary, options, every_state):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), freeze=True, **options)
    seconds = [clip.duration for clip in clips]
    estimate = store_of(tmp_path, encoder, summary=summary, every_state=every_state).require_space(encoder, seconds)
    store = filled(tmp_path, encoder, clips, summary=summary, every_state=every_state)
    assert estimate == (store.folder / "features.bin").stat().st_size


def test_a_disk_without_space_is_an_error_before_the_encoder_runs(encoder, clips, tmp_path, encoded, monkeypatch):
    whole = store_of(tmp_path, encoder).require_space(encoder, [clip.duration for clip in clips])
    free = [whole]
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    filled(tmp_path / "enough", encoder, clips)
    encoded.clear()
    free[0] -= 1
    with pytest.raises(FeatureError, match=r"6 clips need 0.0 MB, but .* has 0.0 MB left\nfree disk space"):
        filled(tmp_path / "short", encoder, clips)
    assert encoded == []
