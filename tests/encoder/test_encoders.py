"""Encoders: the same frames alone and in any batch, Hugging Face's frames, and frozen parts that stay frozen."""

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.encoders import TINY, family_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoFeatureExtractor, AutoModel

from accent_plugin import devices
from accent_plugin.audio.samples import TOO_LONG
from accent_plugin.encoder.factory import FAMILIES, make_encoder
from accent_plugin.encoder.masking import MaskedGroupNorm, masked_group_norm
from accent_plugin.encoder.sources import find_source
from accent_plugin.errors import AudioError, EncoderError
from accent_plugin.model import AccentModel

GROUP_NORM = [name for name in TINY if name.endswith("group") or name == "moonshine"]
HALVES = ["moonshine", "whisper"]


def waves(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(n).astype(np.float32) * 0.1 + 0.02) for n in lengths]


def padded(clips, filler=0.0):
    """A batch with `filler` in its padding, and relative lengths."""
    longest = max(map(len, clips))
    wavs = torch.full((len(clips), longest), filler)
    for row, clip in zip(wavs, clips, strict=True):
        row[: len(clip)] = clip
    return wavs, torch.tensor([len(clip) / longest for clip in clips])


def log_probabilities(model, clips, **batch):
    with torch.no_grad():
        return model(*padded(clips, **batch))


@pytest.fixture
def model(tiny_encoder):
    def make(name, **arguments):
        torch.manual_seed(3)
        return AccentModel(make_encoder(str(tiny_encoder(name)), **arguments), ["a", "b", "c"]).eval()

    return make


@pytest.fixture(params=["cpu", "accelerator"])
def path(request, monkeypatch):
    """The code for CPUs, and the code for all other devices, here on a CPU too."""
    monkeypatch.setattr(devices, "cpu_paths", request.param == "cpu")


def test_every_family_is_tested_here():
    assert set(map(family_of, TINY)) == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_scores_do_not_depend_on_the_batch(model, name, path):
    model, clips = model(name), waves([16000, 9001, 4800, 12345, 3000])
    batch = log_probabilities(model, clips)
    for row, clip in enumerate(clips):
        with torch.no_grad():
            alone = model(clip[None])[0]
        assert torch.allclose(alone, batch[row], atol=1e-5), f"clip {row}"


@pytest.mark.parametrize("name", TINY)
def test_what_stands_in_the_padding_has_no_influence(model, name, path):
    model, clips = model(name), waves([9000, 4000])
    assert torch.equal(log_probabilities(model, clips), log_probabilities(model, clips, filler=9.9))


@pytest.mark.parametrize("name", TINY)
def test_scores_do_not_depend_on_the_batch_in_bfloat16(model, name, path):
    model, clips = model(name), waves([16000, 9001, 4800])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        batch = log_probabilities(model, clips).exp()
        alone = torch.cat([model(clip[None]) for clip in clips]).exp()
    assert (batch - alone).abs().max() < 0.02


@pytest.mark.parametrize("name", TINY)
def test_one_clip_gives_hugging_faces_frames(tiny_encoder, name, path):
    # Hugging Face pads for Whisper to 30 s and attends to all of it: there nothing else is one clip unpadded.
    folder, (clip,) = tiny_encoder(name), waves([480000 if name == "whisper" else 8000])
    reference = AutoModel.from_pretrained(folder).eval()
    inputs = AutoFeatureExtractor.from_pretrained(folder)(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    encoder = make_encoder(str(folder)).eval()
    with torch.no_grad():
        expected = getattr(reference, "encoder" if name in HALVES else "forward")(
            next(iter(inputs.values())), output_hidden_states=True
        )
        frames, valid = encoder(clip[None])
        states, _ = encoder.hidden_states(clip[None])
    assert valid.all()
    assert torch.allclose(frames, expected.last_hidden_state, atol=1e-5)
    assert len(states) == len(expected.hidden_states)
    # Of the last state, releases of transformers differ in whether it is normalised.
    for state, other in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.allclose(state, other, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if name not in HALVES])
def test_the_last_state_is_the_output_of_the_last_layer(tiny_encoder, name, path):
    """With every release of transformers: bundles with weighted layers keep their scores."""
    folder, (clip,) = tiny_encoder(name), waves([8000])
    reference, encoder = AutoModel.from_pretrained(folder).eval(), make_encoder(str(folder)).eval()
    # A norm that changes something, which that of random weights hardly does.
    for model in (reference, encoder.model):
        torch.nn.init.constant_(model.encoder.layer_norm.weight, 2.0)
    outputs = []
    reference.encoder.layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inputs = AutoFeatureExtractor.from_pretrained(folder)(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        normalised = reference(next(iter(inputs.values()))).last_hidden_state
        frames, _ = encoder(clip[None])
        states, _ = encoder.hidden_states(clip[None])
    output = outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]
    assert torch.allclose(states[-1], output, atol=1e-5)
    assert torch.allclose(frames, normalised, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_valid_frames_are_those_of_the_clip_alone(tiny_encoder, name):
    encoder = make_encoder(str(tiny_encoder(name))).eval()
    for samples in (1, 399, 400, 719, 720, 895, 896, 5000, 16001):
        with torch.no_grad():
            alone, _ = encoder(waves([samples])[0][None])
            frames, valid = encoder(*padded(waves([samples, 20000])))
        assert valid[0].sum() == alone.shape[1] >= 1, samples
        assert valid[1].all() and valid.shape[1] == frames.shape[1], samples


def test_a_clip_shorter_than_one_frame_gives_the_same_in_a_batch(model):
    model, clips = model("wav2vec2-group"), waves([150, 16000])
    with torch.no_grad():
        assert torch.allclose(model(clips[0][None])[0], log_probabilities(model, clips)[0], atol=1e-5)


def learning(model, clips):
    """Log-probabilities of a batch, with gradients in every part: as in training, and as on an accelerator."""
    return model(*padded(clips)).detach()


@pytest.mark.parametrize("name", TINY)
def test_scores_do_not_depend_on_the_batch_while_the_cnn_learns(model, name, path):
    model, clips = model(name, freeze_feature_extractor=False), waves([16000, 9001, 3000])
    batch = learning(model, clips)
    assert torch.allclose(torch.cat([learning(model, [clip]) for clip in clips]), batch, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(log_probabilities(model, clips), batch, atol=1e-5)


@pytest.mark.parametrize("name", GROUP_NORM)
def test_without_the_masked_norm_scores_would_depend_on_the_batch(model, name, path):
    # Guards the test above: it must be able to fail.
    model, clips = model(name, freeze_feature_extractor=False), waves([16000, 3000])
    norm = next(m for m in model.modules() if isinstance(m, MaskedGroupNorm))
    norm.forward = lambda inputs, valid=None: torch.nn.GroupNorm.forward(norm, inputs)
    assert not torch.allclose(learning(model, clips[1:])[0], learning(model, clips)[1], atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_state_has_hugging_faces_keys_once(tiny_encoder, name):
    reference = AutoModel.from_pretrained(tiny_encoder(name))
    reference = reference.encoder if name in HALVES else reference
    assert set(make_encoder(str(tiny_encoder(name))).state_dict()) == {f"model.{key}" for key in reference.state_dict()}


def test_masked_group_norm_by_hand(path):
    norm = MaskedGroupNorm(1, 1, eps=0.0)
    found = norm(torch.tensor([[[1.0, 3.0, 1000.0]]]), torch.tensor([[True, True, False]]))
    assert torch.allclose(found[..., :2], torch.tensor([[[-1.0, 1.0]]]))


COUNTS = torch.tensor([40, 13, 2])


def normalise(inputs, norm):
    """A MaskedGroupNorm of a batch whose padding is garbage: the valid frames, clip by clip."""
    valid = torch.arange(inputs.shape[-1]) < COUNTS.unsqueeze(1)
    batch = norm(inputs.masked_fill(~valid.unsqueeze(1), 1000.0), valid)
    assert batch.isfinite().all()
    return [clip[:, :count] for clip, count in zip(batch, COUNTS, strict=True)]


def exactly(inputs, norm):
    """torch's own group normalisation of each clip alone, in float64."""
    own = (norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    clips = [clip[None, :, :count].double() for clip, count in zip(inputs, COUNTS, strict=True)]
    return [torch.nn.functional.group_norm(clip, *own)[0] for clip in clips]


def random_norm(groups):
    norm = MaskedGroupNorm(groups, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("learning", [True, False])
def test_the_group_norm_of_a_batch_is_torchs_of_each_clip(groups, mean, learning, path):
    torch.manual_seed(0)
    norm, inputs = random_norm(groups), torch.randn(3, 8, 40) + mean
    near = 1e-5 if mean == 0 else 5e-3
    with torch.set_grad_enabled(learning):
        found = normalise(inputs, norm)
    for clip, expected in zip(found, exactly(inputs, norm), strict=True):
        torch.testing.assert_close(clip.double(), expected, atol=near, rtol=near)


@pytest.mark.parametrize("groups", [1, 8])
def test_the_group_norm_of_a_batch_has_the_gradients_of_torchs(groups, path):
    torch.manual_seed(0)
    norm, inputs = random_norm(groups), torch.randn(3, 8, 40, requires_grad=True)
    found = []
    for how in (normalise, exactly):
        loss = sum((clip * torch.linspace(-1, 2, clip.shape[1])).square().sum() for clip in how(inputs, norm))
        found.append(torch.autograd.grad(loss, (inputs, norm.weight, norm.bias)))
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_group_norm_sums_in_float32_and_keeps_the_type(kind, path):
    torch.manual_seed(0)
    # The squares of these add up to more than float16 holds.
    norm, inputs = random_norm(4), (torch.randn(3, 8, 40) * 100).to(kind)
    for clip, expected in zip(normalise(inputs, norm), exactly(inputs, norm), strict=True):
        assert clip.dtype == kind
        torch.testing.assert_close(clip.double(), expected, atol=0.05, rtol=0.02)


class Sizes(TorchDispatchMode):
    """Elements of each tensor that an operator makes, views and what is written in place left out."""

    def __init__(self, inputs):
        super().__init__()
        self.seen, self.large, self.size = {inputs.untyped_storage()._cdata}, [], inputs.numel()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor) and made.numel() >= self.size and made.dtype != torch.bool:
            storage = made.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.large.append(made)
        return made


def test_the_group_norm_of_a_batch_makes_three_tensors_of_the_inputs_size():
    norm, inputs = random_norm(8), torch.randn(3, 8, 400)
    valid = torch.arange(400) < torch.tensor([400, 30, 20]).unsqueeze(1)
    with torch.no_grad(), Sizes(inputs) as sizes:
        masked_group_norm(inputs, valid, norm.num_groups, norm.weight, norm.bias, norm.eps)
    assert len(sizes.large) == 3


class Written(TorchDispatchMode):
    """Kinds of the indices with which values are written into tensors."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__.startswith("index_put"):
            self.kinds |= {index.dtype for index in arguments[1] if index is not None}
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", TINY)
def test_no_number_is_written_to_indexed_places(tiny_encoder, name, path):
    """PyTorch copies such a number from the CPU, and waits for a GPU to take it; masks it fills without waiting."""
    encoder = make_encoder(str(tiny_encoder(name))).train()
    with Written() as written:
        encoder(*padded(waves([4000, 3000])))
    assert written.kinds <= {torch.bool}


@pytest.mark.parametrize("name", TINY)
def test_two_threads_may_run_one_encoder_at_once(tiny_encoder, name, path):
    encoder = make_encoder(str(tiny_encoder(name)), freeze=True).eval()
    batches = [padded(waves(lengths)) for lengths in ([4000, 900], [4000, 2500, 3100])]
    with torch.no_grad():
        alone = [encoder(*batch)[0] for batch in batches]
    start = threading.Barrier(len(batches))

    def run(batch):
        start.wait()
        with torch.no_grad():
            return [encoder(*batch)[0] for _ in range(30)]

    with ThreadPoolExecutor(len(batches)) as threads:
        together = list(threads.map(run, batches))
    for expected, passes in zip(alone, together, strict=True):
        assert all(torch.equal(frames, expected) for frames in passes)


# Freezing


def graph_of(tensor):
    """Names of all backward nodes behind a tensor."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_cnn_does_no_backward_work(tiny_encoder, name):
    encoder = make_encoder(str(tiny_encoder(name)), freeze_feature_extractor=True).train()
    outputs = []
    encoder.feature_encoder.requires_grad_(False)
    last = list(encoder.feature_encoder.modules())[-1] if name in HALVES else encoder.feature_encoder
    last.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    frames, _ = encoder(*padded(waves([4000, 3000])))
    assert frames.requires_grad
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
    free = make_encoder(str(tiny_encoder(name)), freeze_feature_extractor=False).train()
    graphs = [graph_of(each(*padded(waves([4000, 3000])))[0]) for each in (encoder, free)]
    convolutions = [sum("Convolution" in node for node in graph) for graph in graphs]
    stem = sum(isinstance(m, torch.nn.Conv1d) for m in free.feature_encoder.modules())
    assert convolutions[1] - convolutions[0] == stem


def learn(encoder, seed=5):
    """Gradients of a pass with whatever dropout there is, and how many numbers stood in memory for them meanwhile."""
    kept = []
    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda it: it):
        frames, valid = encoder(*padded(waves([16000, 9000])))
    # What stands in the padding is anything.
    (frames * torch.linspace(-1, 1, frames.shape[-1]))[valid].sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("arguments", [{}, {"freeze_feature_extractor": False}, {"lora_rank": 2, "lora_dropout": 0.1}])
@pytest.mark.parametrize("name", TINY)
def test_checkpointing_gives_the_same_gradients_from_less(tiny_encoder, name, arguments):
    if "lora_rank" in arguments:
        pytest.importorskip("peft", reason="adapters need it")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        options = {**arguments, "gradient_checkpointing": checkpointing}
        encoder = make_encoder(str(tiny_encoder(name)), weighted_layers=[1, 3], **options).train()
        found.append(learn(encoder))
    (expected, whole), (gradients, less) = found
    assert gradients.keys() == expected.keys() and any("layers" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    # The convolutions, where they are trained, keep all of theirs.
    assert less < (0.9 if arguments.get("freeze_feature_extractor") is False else 0.5) * whole


def test_checkpointing_can_be_compiled(tiny_encoder):
    torch.manual_seed(4)
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), gradient_checkpointing=True, config_overrides=still)
    expected, _ = learn(encoder.train())
    encoder.zero_grad()
    # The tracing alone, which needs no compiler.
    gradients, _ = learn(torch.compile(encoder, backend="eager"))
    assert gradients.keys() == {f"_orig_mod.{name}" for name in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-5)


def test_a_copy_of_a_checkpointed_encoder_is_its_own(tiny_encoder):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), gradient_checkpointing=True).train()
    copied = copy.deepcopy(encoder)
    learn(copied)
    assert any(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_encoder_is_deterministic_while_training(tiny_encoder, name):
    encoder = make_encoder(str(tiny_encoder(name)), freeze=True).train()
    batch = padded(waves([4000, 3000]))
    frames, _ = encoder(*batch)
    assert not frames.requires_grad
    assert torch.equal(frames, encoder(*batch)[0])


@pytest.mark.parametrize("name", TINY)
def test_frozen_layers_get_no_gradient_and_the_others_do(tiny_encoder, name):
    encoder = make_encoder(str(tiny_encoder(name)), freeze_layers=2).train()
    encoder(*padded(waves([4000, 3000])))[0].square().sum().backward()
    with_gradient = [any(p.grad is not None for p in block.parameters()) for block in encoder.layers]
    assert with_gradient == [False, False, True]
    assert not any(
        p.grad is not None for part in (encoder.feature_encoder, *encoder.projection) for p in part.parameters()
    )
    assert not any(block.training for block in encoder.layers[:2])


def test_a_held_encoder_is_released_again(model):
    model = model("wav2vec2-group").train()
    model.wav2vec2.detached = True
    model(waves([4000])[0][None]).sum().backward()
    assert all(p.grad is None for p in model.encoder_parameters())
    model.wav2vec2.detached = False
    model(waves([4000])[0][None])[0, 0].backward()
    assert any(p.grad is not None for p in model.encoder_parameters())


# Layers


def test_a_weighted_sum_starts_as_the_mean_of_the_states(tiny_encoder):
    (clip,) = waves([8000])
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), weighted_layers=[1, 3]).eval()
    with torch.no_grad():
        frames, _ = encoder(clip[None])
        states, _ = encoder.hidden_states(clip[None])
    assert torch.allclose(frames, (states[1] + states[3]) / 2, atol=1e-6)


@pytest.mark.parametrize("name", HALVES)
def test_all_states_can_be_summed_and_their_weights_are_trained(tiny_encoder, name):
    encoder = make_encoder(str(tiny_encoder(name)), freeze=True, weighted_layers="all").train()
    encoder(waves([8000])[0][None])[0].square().sum().backward()
    assert encoder.layer_weights.shape == (4,) and encoder.layer_weights.grad.abs().sum() > 0


def test_standardised_states_have_one_scale(tiny_encoder):
    encoder = make_encoder(str(tiny_encoder("moonshine")), weighted_layers=[2], standardise_layers=True).eval()
    with torch.no_grad():
        frames, _ = encoder(waves([8000])[0][None])
    assert torch.allclose(frames.std(dim=-1, correction=0), torch.ones(frames.shape[:2]), atol=0.02)


@pytest.mark.parametrize("name", ["wav2vec2-group", *HALVES])
def test_the_lowest_layers_can_be_kept_alone(tiny_encoder, name):
    (clip,) = waves([8000])
    whole, cut = (make_encoder(str(tiny_encoder(name)), num_layers=n).eval() for n in (None, 2))
    with torch.no_grad():
        assert torch.equal(whole.hidden_states(clip[None])[0][1], cut.hidden_states(clip[None])[0][1])
    assert len(cut.layers) == 2


@pytest.mark.parametrize("name", ["hubert-group", "whisper"])
def test_the_width_is_read_from_the_model(tiny_encoder, name):
    assert make_encoder(str(tiny_encoder(name))).width == 32


def test_configuration_overrides_reach_the_model(tiny_encoder):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")), config_overrides={"hidden_dropout": 0.37})
    assert encoder.layers[0].dropout.p == 0.37
    assert encoder.config.layerdrop == 0.0


def test_layers_are_dropped_only_where_that_is_asked_for(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder("whisper"), tmp_path / "dropping")
    config = json.loads((tmp_path / "dropping/config.json").read_text())
    (tmp_path / "dropping/config.json").write_text(json.dumps({**config, "encoder_layerdrop": 0.5}))
    (clip,), dropped = waves([8000]), {"encoder_layerdrop": 1.0}
    assert make_encoder(str(tmp_path / "dropping")).model.layerdrop == 0.0
    encoder = make_encoder(str(tmp_path / "dropping"), config_overrides=dropped, freeze_layers=1).train()
    first, second, third, last = encoder.hidden_states(clip[None])[0]
    # A frozen layer stands still, so it is not dropped either.
    assert not torch.equal(first, second) and torch.equal(second, third)
    assert torch.equal(last, encoder.model.layer_norm(third))


# Whisper


def whisper_frames(folder, clip):
    """Hugging Face's frames of a clip that it pads to 30 s."""
    reference = AutoModel.from_pretrained(folder).eval().encoder
    inputs = AutoFeatureExtractor.from_pretrained(folder)(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    return reference(inputs.input_features).last_hidden_state[0]


@pytest.mark.parametrize("samples", [4800, 16001, 479900])
def test_whisper_followed_by_silence_gives_hugging_faces_frames(tiny_encoder, samples):
    folder, (clip,) = tiny_encoder("whisper"), waves([samples])
    silent = torch.nn.functional.pad(clip, (0, 480000 - samples))
    with torch.no_grad():
        frames, valid = make_encoder(str(folder)).eval()(silent[None])
        assert valid.all() and frames.shape[1] == 1500
        assert torch.allclose(frames[0], whisper_frames(folder, clip), atol=1e-5)


def test_a_whisper_clip_is_not_padded_to_30_seconds(tiny_encoder):
    encoder = make_encoder(str(tiny_encoder("whisper"))).eval()
    with torch.no_grad():
        frames, valid = encoder(*padded(waves([16000, 8001])))
    assert frames.shape == (2, 50, 32)
    assert valid.sum(dim=1).tolist() == [50, 26]


def test_whispers_spectrogram_is_hugging_faces_up_to_the_clips_end(tiny_encoder):
    clips, extractor = waves([8000, 16001]), AutoFeatureExtractor.from_pretrained(tiny_encoder("whisper"))
    mel, valid = make_encoder(str(tiny_encoder("whisper")))._log_mel(padded(clips)[0], torch.tensor([8000, 16001]))
    for row, (clip, frames) in enumerate(zip(clips, (50, 101), strict=True)):
        expected = extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
        assert torch.allclose(mel[row, :, :frames], expected[:, :frames], atol=1e-5)
        assert valid[row, 0].sum() == frames and not mel[row, :, frames:].any()


def test_whispers_maximum_is_over_the_clips_own_frames(tiny_encoder):
    encoder, clip, (longer,) = make_encoder(str(tiny_encoder("whisper"))), torch.zeros(8000), waves([16000])
    # In the middle of the first window that is no longer the clip's, at the edge of the last that is.
    clip[-1] = 1.0
    alone, _ = encoder._log_mel(clip[None], torch.tensor([8000]))
    batch, _ = encoder._log_mel(padded([clip, longer])[0], torch.tensor([8000, 16000]))
    assert torch.allclose(alone[0], batch[0, :, :50], atol=1e-6)


@pytest.mark.parametrize("name", HALVES)
def test_a_folder_without_the_decoder(tiny_encoder, tmp_path, name):
    shutil.copytree(tiny_encoder(name), tmp_path / "half")
    weights = safetensors.torch.load_file(tmp_path / "half/model.safetensors")
    half = {key: value for key, value in weights.items() if "decoder" not in key}
    assert 0 < len(half) < len(weights)
    safetensors.torch.save_file(half, tmp_path / "half/model.safetensors", {"format": "pt"})
    whole, cut = (make_encoder(str(folder)).eval() for folder in (tiny_encoder(name), tmp_path / "half"))
    (clip,) = waves([8000])
    with torch.no_grad():
        assert torch.equal(whole(clip[None])[0], cut(clip[None])[0])


# What cannot be used


def test_unknown_configuration_override(tiny_encoder):
    with pytest.raises(EncoderError, match="did you mean 'hidden_dropout'"):
        make_encoder(str(tiny_encoder("wav2vec2-group")), config_overrides={"hiden_dropout": 0.1})


def test_unsupported_family(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "sew")
    config = json.loads((tmp_path / "sew/config.json").read_text())
    (tmp_path / "sew/config.json").write_text(json.dumps({**config, "model_type": "sew"}))
    with pytest.raises(EncoderError, match="family 'sew'.*supported are wav2vec2"):
        make_encoder(str(tmp_path / "sew"))


def test_missing_folder():
    with pytest.raises(EncoderError, match="there is no folder ./nowhere"):
        make_encoder("./nowhere")


def test_a_hub_name_without_a_network():
    with pytest.raises(EncoderError, match="hf download facebook/wav2vec2-base"):
        make_encoder("facebook/wav2vec2-base")


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_incomplete_folder(tiny_encoder, tmp_path, missing):
    shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "part")
    (tmp_path / "part" / missing).unlink()
    with pytest.raises(EncoderError, match="has no " + ("weights" if missing.startswith("model") else missing)):
        make_encoder(str(tmp_path / "part"))


def test_weights_of_another_model(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "mixed")
    shutil.copy(tiny_encoder("moonshine") / "model.safetensors", tmp_path / "mixed/model.safetensors")
    with pytest.raises(EncoderError, match="lack .* tensors"):
        make_encoder(str(tmp_path / "mixed"))


def test_damaged_weights(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EncoderError, match="cannot be loaded"):
        make_encoder(str(tmp_path / "cut"))


@pytest.mark.parametrize("arguments", [{"num_layers": 9}, {"freeze_layers": 9}, {"weighted_layers": [0, 9]}])
def test_layers_that_do_not_exist(tiny_encoder, arguments):
    with pytest.raises(EncoderError, match="this encoder has"):
        make_encoder(str(tiny_encoder("wav2vec2-group")), **arguments)


def test_a_clip_that_whisper_has_no_positions_for(tiny_encoder):
    encoder = make_encoder(str(tiny_encoder("whisper")))
    with pytest.raises(AudioError, match="lasts 30.1 s.*for 30 s: set max_seconds or crop_seconds") as caught:
        encoder(torch.zeros(1, 481600))
    assert caught.value.reason == TOO_LONG


def test_whisper_with_another_familys_feature_extractor(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder("whisper"), tmp_path / "mixed")
    shutil.copy(tiny_encoder("moonshine") / "preprocessor_config.json", tmp_path / "mixed")
    with pytest.raises(EncoderError, match="a Wav2Vec2FeatureExtractor of 1 .* a WhisperFeatureExtractor of 80"):
        make_encoder(str(tmp_path / "mixed"))


# Real speech


@pytest.mark.parametrize("name", [*TINY, "real_moonshine", "real_whisper"])
def test_thirty_real_clips_alone_and_in_batches_of_eight(real_speech, model, request, name):
    import io

    import pyarrow as pa
    import soundfile

    table = pa.ipc.open_stream(next((real_speech / "test").glob("*.arrow"))).read_all()
    cells = [cell["bytes"] for cell in table["audio"].slice(0, 30).to_pylist()]
    clips = [torch.from_numpy(soundfile.read(io.BytesIO(cell), dtype="float32")[0]) for cell in cells]
    if name.startswith("real"):
        model = AccentModel(make_encoder(str(request.getfixturevalue(name))), ["a", "b", "c"]).eval()
    else:
        model = model(name)
    with torch.no_grad():
        alone = torch.cat([model(clip[None]) for clip in clips])
        order = np.random.default_rng(1).permutation(len(clips))
        for rows in np.array_split(order, 4):
            batch = log_probabilities(model, [clips[row] for row in rows])
            assert torch.allclose(batch, alone[rows], atol=1e-5)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content, what", [(POINTER, "a Git LFS pointer"), (b"<html></html>", "an HTML page"), (b"", "empty")]
)
def test_a_file_that_was_never_downloaded_is_named(tiny_encoder, tmp_path, name, content, what):
    folder = shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "part")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(EncoderError, match=f"{name} is {what}"):
        find_source(folder)


def test_a_shard_that_was_never_downloaded_is_named(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "part")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EncoderError, match="model-00002-of-00002.safetensors is a Git LFS pointer"):
        find_source(folder)


def test_weights_that_are_not_used_may_be_pointers(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "part")
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert find_source(folder) == folder


def test_any_other_content_as_weights_is_an_error(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "part")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"something else")
    with pytest.raises(EncoderError, match="no PyTorch checkpoint"):
        make_encoder(str(folder))


def test_weights_with_nan_are_named(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder("wav2vec2-group"), tmp_path / "nan")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["encoder.layer_norm.bias"][3] = torch.nan
    state["feature_projection.projection.weight"][0, 0] = torch.inf
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="has NaN or infinity in") as caught:
        make_encoder(str(folder))
    assert "encoder.layer_norm.bias" in str(caught.value) and "feature_projection.projection" in str(caught.value)
