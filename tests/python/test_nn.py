"""Gradients through dispatch and combine, and the layer of experts."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deep_ep
import routing
from deep_ep.nn import MoE, combine, dispatch
from ranks import free_port
from routing import make_inputs

EXAMPLE = Path(__file__).parents[2] / "examples/python/train_moe.py"


def _gradients(group):
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(size, [13, 0, 5, 2][:size], experts=2 * size, dtype=torch.float32)[rank]
    x, weights = one.x.clone().requires_grad_(), one.topk_weights.clone().requires_grad_()
    recv_x, ids, recv_weights, counts, handle = dispatch(buffer, x, one.topk_idx, weights,
                                                         one.experts)
    assert not ids.requires_grad and len(counts) == 2
    recv_x.mul_(2)  # in place, which autograd forbids for views of what it does not know
    # Expert e multiplies by e + 1, and by the weight.
    scale = torch.where(ids >= 0, ids + 2 * rank + 1, 0) * recv_weights
    out = recv_x * scale.sum(1, keepdim=True)
    combined = combine(buffer, out, handle)
    # Only autograd holds what backward needs, and other calls take memory meanwhile.
    del recv_x, ids, recv_weights, counts, handle, scale, out
    for seed in range(1, 5):
        other = make_inputs(size, 29, experts=2 * size, dtype=torch.float32, seed=seed)[rank]
        rows, *_, their_handle = dispatch(buffer, other.x, other.topk_idx, other.topk_weights,
                                          other.experts)
        combine(buffer, rows, their_handle)
    seed = (torch.arange(x.numel(), device=routing.DEVICE) % 5 - 2.0).reshape(x.shape)
    combined.backward(seed)

    x_alone, weights_alone = (one.x.clone().requires_grad_(),
                              one.topk_weights.clone().requires_grad_())
    factor = torch.where(one.topk_idx >= 0, one.topk_idx + 1, 0)
    alone = 2 * x_alone * (factor * weights_alone).sum(1, keepdim=True)
    alone.backward(seed)
    torch.testing.assert_close(combined, alone)
    torch.testing.assert_close(x.grad, x_alone.grad)
    torch.testing.assert_close(weights.grad, weights_alone.grad)
    buffer.destroy()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_those_of_one_process(ranks, size):
    ranks.run(size, _gradients)


def _saved(group):
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]
    x, weights = one.x.clone().requires_grad_(), one.topk_weights.clone().requires_grad_()
    received = dispatch(buffer, x, one.topk_idx, weights, one.experts)[:3]
    saved = received[0].grad_fn.saved_tensors
    assert len(saved) == 7 and saved[0].shape == received[1].shape
    assert not {one.data_ptr() for one in received} & {one.data_ptr() for one in saved}
    buffer.destroy()


def test_the_received_rows_are_not_kept_for_backward(ranks):
    ranks.run(2, _saved)


def _twice(group):
    """A penalty on gradients: refused where it would be without those of the rows."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size(), dtype=torch.float32)[group.rank()]
    x, weights = one.x.clone().requires_grad_(), one.topk_weights.clone().requires_grad_()
    recv_x, _, recv_weights, _, handle = dispatch(buffer, x, one.topk_idx, weights, one.experts)
    combined = combine(buffer, recv_x.square(), handle)
    whole = combined.square().sum() + recv_weights.square().sum()
    for output, inputs in (combined, [recv_x]), (whole, [x]), (whole, [weights]):
        grads = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grads[0].square().sum().backward(retain_graph=True)
    buffer.destroy()


def test_second_derivatives_are_refused(ranks):
    ranks.run(2, _twice)


def _example():
    spec = importlib.util.spec_from_file_location("train_moe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _layer(group):
    """One rank has no tokens at all."""
    example = _example()
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(group, 1 << 20)
    torch.manual_seed(3)
    gate = torch.randn(example.EXPERTS, example.HIDDEN)
    tokens = torch.randn(9, example.HIDDEN).to(routing.DEVICE)
    alone = example.LocalMoE()
    layer = MoE(buffer, example.HIDDEN, example.EXPERTS, example.TOPK, example.make_expert)
    for module in (alone, layer):
        nn.init.zeros_(module.gate.weight)
        module.gate.weight.data += gate
        module.to(routing.DEVICE)
    mine = tokens if rank == 0 else tokens[:0]
    out = layer(mine)
    out.square().sum().backward()
    alone(tokens).square().sum().backward()
    if rank == 0:
        torch.testing.assert_close(out, alone(tokens))
        torch.testing.assert_close(layer.gate.weight.grad, alone.gate.weight.grad)
    local = example.EXPERTS // size
    for index, expert in enumerate(layer.experts):
        theirs = alone.experts[rank * local + index]
        for parameter, other in zip(expert.parameters(), theirs.parameters()):
            torch.testing.assert_close(parameter.grad, other.grad)
    buffer.destroy()


def test_a_layer_gives_each_expert_the_gradients_of_all_ranks_tokens(ranks):
    ranks.run(2, _layer)


def _uneven(group):
    buffer = deep_ep.Buffer(group, 1 << 20)
    with pytest.raises(ValueError, match="num_experts is 3"):
        MoE(buffer, 16, 3, 1, lambda expert: nn.Identity())
    buffer.destroy()


def test_experts_must_divide_among_the_ranks(cpu_ranks):
    cpu_ranks.run(2, _uneven)


def _copied(group):
    """As weights are averaged: the copy has parameters of its own, and works."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    torch.manual_seed(group.rank())
    layer = MoE(buffer, 16, 2 * group.size(), 2, lambda expert: nn.Linear(16, 16))
    nn.init.ones_(layer.gate.weight)
    layer.to(routing.DEVICE)
    twin = copy.deepcopy(layer)
    assert twin.buffer is buffer
    x = torch.randn(5, 16).to(routing.DEVICE)
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.experts[0].weight)
    assert layer.experts[0].weight.any()
    buffer.destroy()


def test_a_copy_of_a_layer_shares_its_buffer(ranks):
    ranks.run(2, _copied)


def _train(device, ranks, steps):
    return subprocess.run(
        [sys.executable, EXAMPLE, "--steps", str(steps), "--ranks", str(ranks), "--device", device],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "MASTER_PORT": str(free_port())})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_gives_the_losses_of_one_process(device, request):
    if device == "cuda":
        request.getfixturevalue("gpu_ranks")
    done = _train(device, 4, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference" in done.stdout
