"""dispatch and combine for autograd, and a mixture-of-experts layer made of them. Needs torch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import Buffer, Config

Handle = tuple[Tensor, ...]  # of Buffer.dispatch


class _Dispatch(torch.autograd.Function):
    """Its backward is a combine: gradients of copies are summed at the token."""

    @staticmethod
    def forward(ctx, x, topk_weights, topk_idx, num_experts, buffer, config):
        topk_idx = topk_idx.contiguous()
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx,
                                                                                num_experts)
        recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = buffer.dispatch(
            x.contiguous(), num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx,
            topk_weights=topk_weights.contiguous(), config=config)
        ctx.buffer = buffer
        # Not the ids themselves, which would keep the received rows: they lie in one block.
        ctx.save_for_backward(recv_topk_idx >= 0, *handle)
        ctx.mark_non_differentiable(recv_topk_idx, *handle)
        return recv_x, recv_topk_weights, recv_topk_idx, counts, *handle

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_weights, *_):
        is_local, *handle = ctx.saved_tensors
        # An entry of another rank's expert counts there.
        grad_weights = torch.where(is_local, grad_weights, 0.0)
        grad_x, grad_weights, _ = ctx.buffer.combine(grad_x.contiguous(), tuple(handle),
                                                     topk_weights=grad_weights)
        return grad_x, grad_weights, None, None, None, None


class _Combine(torch.autograd.Function):
    """Its backward is a dispatch with the same handle: a sum hands its gradient to each term."""

    @staticmethod
    def forward(ctx, x, buffer, config, *handle):
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        return buffer.combine(x.contiguous(), handle, config=config)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        handle = tuple(ctx.saved_tensors)
        grad_x = ctx.buffer.dispatch(grad.contiguous(), handle=handle)[0]
        return grad_x, None, None, *[None] * len(handle)


def dispatch(buffer: Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int,
             config: Config | None = None) -> tuple[Tensor, Tensor, Tensor, list[int], Handle]:
    """`Buffer.dispatch` of `x` [N, H] with the layout of `topk_idx`; gradients flow to `x` and to
    `topk_weights`, once: backward of a backward is a RuntimeError. Forward and backward are
    collective.

    Returns (recv_x, recv_topk_idx, recv_topk_weights, rows for each local expert, handle).
    """
    recv_x, weights, ids, counts, *handle = _Dispatch.apply(x, topk_weights, topk_idx, num_experts,
                                                            buffer, config)
    return recv_x, ids, weights, counts, tuple(handle)


def combine(buffer: Buffer, x: Tensor, handle: Handle, config: Config | None = None) -> Tensor:
    """`Buffer.combine` of `x` [Nr, H], a row for each received one; gradients flow to `x`, once.
    Forward and backward are collective. Returns [N, H]."""
    return _Combine.apply(x, buffer, config, *handle)


class MoE(nn.Module):
    """A layer of `num_experts` experts, which are spread over the ranks of `buffer`; each token
    goes to `topk` of them. Input and output are [N, H], any N, also 0.

    The gate's parameters are the same on all ranks, and so must its gradients be summed over them
    by the caller; an expert's parameters are on one rank only. `make_expert(expert)` gives the
    module of one, [rows, H] to [rows, H].
    """

    def __init__(self, buffer: Buffer, hidden: int, num_experts: int, topk: int,
                 make_expert: Callable[[int], nn.Module]) -> None:
        super().__init__()
        if num_experts % buffer.group_size:
            raise ValueError(f"num_experts is {num_experts}, must be a multiple of the "
                             f"{buffer.group_size} ranks")
        self.buffer, self.num_experts, self.topk = buffer, num_experts, topk
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        local = num_experts // buffer.group_size
        first = buffer.rank * local
        self.experts = nn.ModuleList(make_expert(first + index) for index in range(local))

    def forward(self, x: Tensor) -> Tensor:
        weights, topk_idx = torch.topk(torch.softmax(self.gate(x).float(), dim=-1), self.topk)
        weights = weights / weights.sum(-1, keepdim=True)
        recv_x, recv_idx, recv_weights, _, handle = dispatch(self.buffer, x, topk_idx, weights,
                                                             self.num_experts)
        # All experts are asked, also those without rows: every rank takes part in the backward.
        out = torch.zeros_like(recv_x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.nonzero(recv_idx == index, as_tuple=True)
            result = expert(recv_x[rows]) * recv_weights[rows, slots].unsqueeze(1)
            out = out.index_add(0, rows, result.to(out.dtype))
        return combine(self.buffer, out, handle)
