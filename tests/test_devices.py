"""Which precision a device computes fastest in."""

import pytest
import torch

from accent_plugin import devices


@pytest.mark.parametrize(
    ("device", "bf16", "chosen"),
    [
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("cuda:0", True, "bf16"),
        ("cuda:0", False, "fp16"),
        ("mps", False, "fp32"),
    ],
)
def test_the_fastest_precision_that_a_device_has(device, bf16, chosen, monkeypatch):
    monkeypatch.setattr(devices, "bf16_is_faster", lambda kind: bf16)
    assert devices.fastest_precision(device) == chosen


def test_the_probe_answers_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    devices.bf16_is_faster.cache_clear()
    assert devices.bf16_is_faster("cpu") in (True, False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_of_other_devices_nothing_is_assumed(kind):
    assert devices.bf16_is_faster(kind) is False
