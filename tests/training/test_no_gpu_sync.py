"""A training step never synchronises with the GPU.

It runs on PyTorch's meta device, on which tensors have no values: whoever looks at one raises an error. Where there is
a GPU, PyTorch's own check of such looks watches over the same steps.
"""

import contextlib
import importlib

import pytest
import torch
from helpers.encoders import TINY
from helpers.steps import Steps, batches, make_brain
from torch.utils._python_dispatch import TorchDispatchMode

from accent_plugin.encoder.factory import make_encoder
from accent_plugin.pooling import POOLINGS


def steps(brain, train_set):
    """Take the steps of an epoch like SpeechBrain's `fit`, without the end of the epoch."""
    brain.train_sampler, brain._epochs = train_set, 1
    brain.on_fit_start()
    brain.modules.train()
    for brain.step, batch in enumerate(train_set, start=1):
        brain.fit_batch(batch)


@pytest.fixture
def without_values(monkeypatch):
    """Let PyTorch's fused optimizer accept tensors on the meta device, which autocast does not support."""
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **keywords: contextlib.nullcontext())


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "equally long"])
@pytest.mark.parametrize("family", TINY)
def test_a_step_reads_no_value_from_the_device(family, padded, tiny_encoder, without_values):
    encoder = make_encoder(str(tiny_encoder(family)), weighted_layers="all")
    # A whole window of accumulated batches, and one that the epoch's end cuts off.
    steps(make_brain(encoder, "meta", grad_accumulation_factor=2), batches(padded, steps=3))


class Copies(TorchDispatchMode):
    """Raises on blocking copies from the CPU, which the meta device allows."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.overloadpacket.__name__ == "_to_copy" and arguments[0].device.type == "cpu":
            waits = keywords.get("device") == torch.device("meta") and not keywords.get("non_blocking")
            assert not waits, f"a copy of {tuple(arguments[0].shape)} is waited for"
        return function(*arguments, **keywords)


def test_no_copy_to_the_device_blocks(tiny_encoder, without_values):
    brain = make_brain(make_encoder(str(tiny_encoder("wav2vec2-group"))), "meta")
    with Copies():
        steps(brain, batches(True))
        with pytest.raises(AssertionError, match="is waited for"):
            torch.ones(3).to("meta")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_pooling_reads_a_value_from_the_device(pooling, tiny_encoder, without_values):
    encoder = make_encoder(str(tiny_encoder("wav2vec2-group")))
    steps(make_brain(encoder, "meta", pooling), batches(True, steps=2))


def test_hugging_faces_own_mask_reads_values(tiny_encoder, without_values):
    # The reason for accent_plugin.encoder.fast_dropout.make_mask, which can be removed once this no longer fails.
    brain = make_brain(make_encoder(str(tiny_encoder("wav2vec2-group")), attn_implementation="sdpa"), "meta")
    with pytest.raises(RuntimeError, match="meta"):
        steps(brain, batches(True))


def test_a_read_from_the_device_is_detected(tiny_encoder, without_values, monkeypatch):
    brain = make_brain(make_encoder(str(tiny_encoder("wav2vec2-group"))), "meta")
    count = brain._count
    monkeypatch.setattr(brain, "_count", lambda loss, weight: count(loss, weight) or float(loss))
    with pytest.raises(RuntimeError, match="meta"):
        steps(brain, batches(True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("family", TINY)
def test_a_step_does_not_wait_for_a_gpu(family, tiny_encoder):
    brain = make_brain(make_encoder(str(tiny_encoder(family))), "cuda", precision="bf16")
    train_set = Steps(batch.pin_memory() for batch in batches(True))
    steps(brain, train_set)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(brain, train_set)
    finally:
        torch.cuda.set_sync_debug_mode("default")
