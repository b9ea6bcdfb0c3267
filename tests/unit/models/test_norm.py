"""BatchNorm over ranks, with one: what torch gives. Two ranks are in tests/contract/test_objective_contract.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sslscale.models.norm import _GatheredBatchNorm


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("offset", [0.0, 30.0])  # a mean far from nought, where terms cancel
@pytest.mark.parametrize("shape", [(64, 8), (16, 8, 5), (16, 8, 6, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_torchs(dtype, tolerance, shape, offset):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    x, gradient = (x + offset).to(dtype), (gradient + 0.5 * x).to(dtype)  # with what both means take away
    weight, bias = torch.rand(8, generator=generator) + 0.5, torch.rand(8, generator=generator)

    def passes(normalise):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        y = normalise(*leaves)
        y.backward(gradient)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    ours = passes(lambda *leaves: _GatheredBatchNorm.apply(*leaves, 1e-5)[0])
    theirs = passes(lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5))
    for own, expected in zip(ours, theirs, strict=True):
        assert own.dtype == expected.dtype
        own, expected = own.float(), expected.float()
        assert (own - expected).norm() <= tolerance * expected.norm()
