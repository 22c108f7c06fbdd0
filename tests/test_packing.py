"""Products with packed weights against PyTorch's own in float64."""

import pytest
import torch

from accent_plugin import packing

if not packing.is_available():
    pytest.skip("this CPU has no AVX-512", allow_module_level=True)


@pytest.mark.parametrize(("kind", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [(1,), (2, 7), (333,)], ids=str)
@pytest.mark.parametrize("inference", [True, False])
def test_packed_products_are_pytorchs(kind, near, rows, inference):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80)
    inputs = torch.randn(*rows, 48)
    with torch.inference_mode(inference), torch.no_grad():
        layer = packing.PackedLinear(linear, kind)
        output = layer(inputs)
        unbiased = packing.multiply(inputs, packing.pack(linear.weight.to(kind)))
        weight, bias = linear.weight.double(), linear.bias.double()
        expected = inputs.double() @ weight.T
    assert output.dtype == unbiased.dtype == layer.dtype == kind
    torch.testing.assert_close(output.double(), expected + bias, atol=near, rtol=near)
    torch.testing.assert_close(unbiased.double(), expected, atol=near, rtol=near)


def test_a_packed_weight_is_a_copy_and_the_plain_one_is_dropped():
    linear = torch.nn.Linear(4, 3, bias=False)
    expected = linear(torch.ones(4)).detach()
    layer = packing.PackedLinear(linear, torch.float32)
    with torch.no_grad():
        linear.weight.zero_()
        assert torch.allclose(layer(torch.ones(4)), expected)
    assert not layer.state_dict() and layer.bias is None
