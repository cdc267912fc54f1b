"""Autograd's ways to run a layer other than forward, then backward: without a graph, checkpointed,
with arguments of any strides, and with gradients that are summed over several backward calls. One
rank has no tokens."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deep_ep
import routing
from deep_ep.nn import MoE, combine, dispatch
from routing import kept_weights, make_inputs, over_nodes, same

HIDDEN = 16
TOKENS = [7, 0, 12, 3]


class _Block(nn.Module):
    """Experts between two local layers, so that there is something to compute anew around them."""

    def __init__(self, buffer):
        super().__init__()
        torch.manual_seed(5)  # what all ranks have alike
        self.before, self.after = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        gate = torch.randn(2 * buffer.group_size, HIDDEN)
        torch.manual_seed(6 + buffer.rank)
        self.moe = MoE(buffer, HIDDEN, 2 * buffer.group_size, 2,
                       lambda expert: nn.Linear(HIDDEN, HIDDEN))
        self.moe.gate.weight.data.copy_(gate)
        self.to(routing.DEVICE)

    def forward(self, x):
        return self.after(self.moe(torch.tanh(self.before(x))))


def _input(rank, seed=0):
    random = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn((TOKENS[rank], HIDDEN), generator=random).to(routing.DEVICE)


def _gradients(block, x, run):
    """Of the input and of all parameters, of a loss of run(block, x)."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    run(block, x).square().sum().backward()
    return [x.grad, *(one.grad.clone() for one in block.parameters())]


def _equal(found, wanted):
    """Bit by bit: the same sums in the same order."""
    assert len(found) == len(wanted)
    assert all(same(*pair) for pair in zip(found, wanted))


def _checkpointed(group, use_reentrant):
    buffer = deep_ep.Buffer(group, 1 << 20)
    block, x, calls = _Block(buffer), _input(group.rank()), []
    block.moe.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    wanted = _gradients(block, x, lambda block, x: block(block(x)))
    del calls[:]

    def run(block, x):
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    _equal(_gradients(block, x, run), wanted)
    assert calls == [not use_reentrant] * 2 + [True] * 2  # forward, then each once more
    buffer.destroy()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpointed_layer_has_the_gradients_of_a_plain_one(ranks, size, use_reentrant):
    ranks.run(size, _checkpointed, use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_over_nodes_is_checkpointed_too(node_ranks, use_reentrant):
    node_ranks.run(2, over_nodes, 1, _checkpointed, use_reentrant)


def _checkpointed_functions(group, use_reentrant):
    """What is between dispatch and combine alone, and dispatch alone, whose results are many."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]

    def gradients(keep):
        x, weights = one.x.clone().requires_grad_(), one.topk_weights.clone().requires_grad_()
        recv_x, _, recv_weights, _, handle = keep(dispatch, buffer, x, one.topk_idx, weights,
                                                  one.experts)
        rows = keep(lambda x, weights: x.square() * weights.sum(1, keepdim=True), recv_x,
                    recv_weights)
        keep(combine, buffer, rows, handle).square().sum().backward()
        return [x.grad, weights.grad]

    wanted = gradients(lambda function, *arguments: function(*arguments))
    assert all(one.any() for one in wanted)
    _equal(gradients(lambda function, *arguments: checkpoint(
        function, *arguments, use_reentrant=use_reentrant)), wanted)
    buffer.destroy()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_each_function_can_be_checkpointed(ranks, use_reentrant):
    ranks.run(2, _checkpointed_functions, use_reentrant)


def _strided(group):
    """Columns next to each other, as transposes have them, and every second row."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]

    def gradients(other):
        x, weights = one.x.clone().requires_grad_(), one.topk_weights.clone().requires_grad_()
        recv_x, _, recv_weights, _, handle = dispatch(buffer, other(x), other(one.topk_idx),
                                                      other(weights), one.experts)
        rows = recv_x.square() * recv_weights.sum(1, keepdim=True)
        combined = combine(buffer, other(rows), handle)
        combined.square().sum().backward()
        return [combined, x.grad, weights.grad]

    wanted = gradients(lambda array: array)
    for other in (lambda array: array.t().contiguous().t(),
                  lambda array: array.repeat_interleave(2, 0)[::2]):
        assert not other(one.x).is_contiguous()
        _equal(gradients(other), wanted)
    buffer.destroy()


def test_arguments_may_have_any_strides(ranks):
    ranks.run(2, _strided)


def _without_graph(group, mode):
    """And the same Buffer trains before and after."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    rank, size = group.rank(), group.size()
    block, x = _Block(buffer), _input(rank)
    one = make_inputs(size, experts=2 * size, dtype=torch.float32)[rank]
    wanted, trained = block(x).detach(), _gradients(block, x, lambda block, x: block(x))
    with mode():
        found = block(x)
        recv_x, ids, weights, _, handle = dispatch(buffer, one.x, one.topk_idx, one.topk_weights,
                                                   one.experts)
        recv_x.mul_(torch.where(ids >= 0, weights, 0).sum(1, keepdim=True))
        home = combine(buffer, recv_x, handle)
    for result in (found, recv_x, weights, home):
        assert result.grad_fn is None and not result.requires_grad
        assert result.is_inference() == (mode is torch.inference_mode)
    assert same(found, wanted)
    torch.testing.assert_close(home, one.x * kept_weights(one).sum(1, keepdim=True))
    _equal(_gradients(block, x, lambda block, x: block(x)), trained)
    buffer.destroy()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("size", [1, 4])
def test_a_layer_gives_the_same_without_a_graph(ranks, size, mode):
    ranks.run(size, _without_graph, mode)


def _handle_of_inference(group):
    """torch keeps no such tensors for backward; clones made outside serve."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]
    with torch.inference_mode():
        handle = dispatch(buffer, one.x, one.topk_idx, one.topk_weights, one.experts)[4]
    rows = torch.ones((buffer.dispatch(one.x, handle=handle)[0].shape), requires_grad=True,
                      device=routing.DEVICE)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        combine(buffer, rows, handle)
    combine(buffer, rows, tuple(part.clone() for part in handle)).sum().backward()
    assert (rows.grad == 1).all()
    buffer.destroy()


def test_handles_of_inference_serve_as_clones(ranks):
    ranks.run(2, _handle_of_inference)


def _accumulated(group):
    """Two batches forward, then both backward, as with pipelines; and one graph twice."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    block = _Block(buffer)
    batches = [_input(group.rank(), seed) for seed in (1, 2)]
    first, second = (_gradients(block, x, lambda block, x: block(x))[1:] for x in batches)
    block.zero_grad()
    losses = [block(x).square().sum() for x in batches]
    for loss in losses:
        loss.backward()
    _equal([one.grad for one in block.parameters()], [a + b for a, b in zip(first, second)])
    block.zero_grad()
    loss = block(batches[0]).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    _equal([one.grad for one in block.parameters()], [2 * one for one in first])
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 4])
def test_gradients_of_several_backward_calls_are_summed(ranks, size):
    ranks.run(size, _accumulated)
