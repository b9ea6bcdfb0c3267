"""BatchNorm over ranks, with one: what torch gives. Several ranks are in tests/contract, test_objective_contract.py for
the global batch's statistics and test_resume.py for each stream's.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sslscale.errors import UserError
from sslscale.models.norm import _blocks, _GatheredBatchNorm, follow_streams, gather_batch_norm


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

    ours = passes(lambda *leaves: _GatheredBatchNorm.apply(*leaves, 1e-5, 0)[0])
    theirs = passes(lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5))
    for own, expected in zip(ours, theirs, strict=True):
        assert own.dtype == expected.dtype
        own, expected = own.float(), expected.float()
        assert (own - expected).norm() <= tolerance * expected.norm()


def test_large_maps_are_added_up_in_double_precision():
    """In the fast layout torch's kernel adds up one by one: over all rows, by four times what is allowed here off."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(64, 4, 32, 32, generator=generator) for _ in range(2))
    weight, bias = torch.ones(4), torch.zeros(4)

    def moments_and_gradient(dtype):
        leaf = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        y, *moments = _GatheredBatchNorm.apply(leaf, weight.to(dtype), bias.to(dtype), 1e-5, 64)
        y.backward(gradient.to(dtype, memory_format=torch.channels_last))
        return [*moments, leaf.grad]

    for own, expected in zip(moments_and_gradient(torch.float32), moments_and_gradient(torch.float64), strict=True):
        assert (own - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("side", "stream_rows", "rows"),
    [
        (28, 6, [3] * 8),  # of one stream each, with at most 4,096 values of a channel
        (1, 6, [6] * 4),
        (28, 7, [1] * 24),
        (100, 6, [1] * 24),
        (28, 0, [5, 5, 5, 5, 4]),  # outside training, streams are not known
    ],
)
def test_no_block_of_rows_is_of_two_streams(side, stream_rows, rows):
    assert [len(block) for block in _blocks(torch.zeros(24, 1, side, side), stream_rows)] == rows


def test_one_value_of_a_channel_has_no_variance():
    with pytest.raises(UserError, match="more than one value of every channel"):
        gather_batch_norm(torch.nn.BatchNorm1d(3))(torch.zeros(1, 3))


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}])
def test_a_layer_is_torchs_in_training_and_after_it(kwargs):
    theirs = torch.nn.BatchNorm2d(3, **kwargs)
    ours = gather_batch_norm(torch.nn.BatchNorm2d(3, **kwargs))
    x = torch.randn(8, 3, 5, 5) + 2
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_by_stream_each_block_of_rows_is_normalised_by_itself():
    layer = gather_batch_norm(torch.nn.BatchNorm2d(3, momentum=0.2))
    follow_streams([layer], 8, by_stream=True)
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
