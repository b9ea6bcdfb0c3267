"""BatchNorm over ranks, with one: what torch gives. Several ranks are in tests/contract, test_objective_contract.py for
the global batch's statistics and test_resume.py for each stream's.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sslscale.errors import UserError
from sslscale.models.norm import _GatheredBatchNorm, gather_batch_norm, normalise_by_stream


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


def test_by_stream_each_block_of_rows_is_normalised_by_itself():
    layer = gather_batch_norm(torch.nn.BatchNorm2d(3, momentum=0.2))
    normalise_by_stream([layer], 8)
    blocks = [torch.randn(8, 3, 5, 5) + offset for offset in (0.0, 5.0)]
    x = torch.cat(blocks).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = [F.batch_norm(block, None, None, layer.weight, layer.bias, training=True) for block in blocks]
    torch.testing.assert_close(y, torch.cat(expected))
    means = torch.stack([block.mean(dim=(0, 2, 3)) for block in blocks])
    variances = torch.stack([block.var(dim=(0, 2, 3)) for block in blocks])
    torch.testing.assert_close(layer.running_mean, 0.2 * means.mean(dim=0))
    torch.testing.assert_close(layer.running_var, 0.8 + 0.2 * variances.mean(dim=0))
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.eval()(x[:3]), layer(x)[:3])  # evaluation takes any number of rows
    with pytest.raises(UserError, match="rows of some samples"):
        layer.train()(x[:3])
