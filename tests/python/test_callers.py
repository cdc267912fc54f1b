"""The calling forms of frameworks, each as its own code calls."""

import sys
import threading
import time
import types

import pytest
import torch

import deep_ep
import routing
from routing import Expected, layout_of, make_inputs, same


def _vllm(group):
    """All by keyword, a gloo group, layout's event captured before it and used for both calls."""
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(group=group, num_nvl_bytes=1 << 20, num_rdma_bytes=0,
                            low_latency_mode=False, num_qps_per_rank=1, explicitly_destroy=True)
    buffer.set_num_sms(20)
    everyone = make_inputs(size, experts=2 * size)
    one, expected = everyone[rank], Expected(everyone, rank)
    capture = buffer.capture
    previous = capture()
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        topk_idx=one.topk_idx, num_experts=one.experts, previous_event=previous,
        async_finish=False, allocate_on_comm_stream=False)
    recv_x, ids, weights, counts, handle, event = buffer.dispatch(
        x=one.x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=one.topk_idx,
        topk_weights=one.topk_weights, expert_alignment=1, config=None, previous_event=previous,
        async_finish=True, allocate_on_comm_stream=False)
    assert event.event is not None
    event.current_stream_wait()
    expected.check(recv_x, ids, weights, handle)
    combined, none, event = buffer.combine(
        x=recv_x, handle=handle, topk_weights=None, config=None, previous_event=capture(),
        async_finish=True, allocate_on_comm_stream=False)
    event.current_stream_wait()
    assert none is None
    assert same(combined.float(), one.x.float() * in_rank.sum(1, keepdim=True))
    buffer.destroy()


class _Dispatch(torch.autograd.Function):
    """As Megatron and NeMo have it; the handle is an output that is no tensor."""

    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, experts, buffer):
        previous = deep_ep.EventOverlap(deep_ep.EventHandle())
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx, experts, previous_event=previous, async_finish=True,
            allocate_on_comm_stream=True)
        recv_x, ids, weights, counts, handle, after = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert, previous_event=event, async_finish=True,
            allocate_on_comm_stream=True)
        after.current_stream_wait()
        ctx.handle, ctx.buffer = handle, buffer
        return recv_x, ids, weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_x, _ids, grad_weights, _counts, _handle):
        grad, grad_of_weights, _ = ctx.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_weights.float())
        return grad, None, grad_of_weights, None, None


class _Combine(torch.autograd.Function):
    """As xtuner has it: the handle's tensors are saved and the tuple is made anew."""

    @staticmethod
    def forward(ctx, x, handle, buffer):
        ctx.save_for_backward(*handle)
        ctx.buffer = buffer
        return buffer.combine(x, handle=handle)[0]

    @staticmethod
    def backward(ctx, grad):
        result = ctx.buffer.dispatch(grad.contiguous(), handle=tuple(ctx.saved_tensors))
        assert len(result) == 6
        return result[0], None, None


def _megatron(group):
    rank, size = group.rank(), group.size()
    config = deep_ep.Buffer.get_dispatch_config(size)
    buffer = deep_ep.Buffer(group, config.get_nvl_buffer_size_hint(64, size),
                            config.get_rdma_buffer_size_hint(64, size))
    assert not buffer.group != group  # how it decides to make a new one: by this, and by growth
    assert buffer.num_nvl_bytes == config.get_nvl_buffer_size_hint(64, size)
    assert buffer.num_rdma_bytes == config.get_rdma_buffer_size_hint(64, size)
    everyone = make_inputs(size, experts=2 * size, dtype=torch.float32)
    one = everyone[rank]
    x = one.x.clone().requires_grad_()
    weights = one.topk_weights.clone().requires_grad_()
    recv_x, ids, recv_weights, counts, handle = _Dispatch.apply(x, one.topk_idx, weights,
                                                                one.experts, buffer)
    assert counts.tolist() == Expected(everyone, rank).per_expert
    mask = (ids >= 0).float()
    out = recv_x * (recv_weights * mask).sum(1, keepdim=True)
    combined = _Combine.apply(out, handle, buffer)
    seed = torch.arange(combined.numel(), device=routing.DEVICE).reshape(combined.shape) % 7 - 3.0
    combined.backward(seed)
    # One process: every selected expert multiplies the token by its weight.
    valid = (one.topk_idx >= 0).float()
    total = (one.topk_weights * valid).sum(1, keepdim=True)
    torch.testing.assert_close(combined, one.x * total)
    torch.testing.assert_close(x.grad, seed * total)
    torch.testing.assert_close(weights.grad, (seed * one.x).sum(1, keepdim=True) * valid)
    buffer.destroy()


def _sglang(group):
    """Three by position, more by keyword; a configuration out of JSON."""
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(group, 1 << 20, 0, low_latency_mode=False, num_qps_per_rank=24,
                            allow_mnnvl=True)
    assert (buffer.low_latency_mode, buffer.rank, buffer.group_size) == (False, rank, size)
    config = deep_ep.Config(**{"num_sms": 16, "num_max_nvl_chunked_send_tokens": 12,
                               "num_max_nvl_chunked_recv_tokens": 512})
    everyone = make_inputs(size, experts=2 * size)
    one = everyone[rank]
    previous = deep_ep.Buffer.capture()
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        one.topk_idx, one.experts, previous_event=previous, async_finish=True,
        allocate_on_comm_stream=previous is not None)
    got = buffer.dispatch(one.x, topk_idx=one.topk_idx, topk_weights=one.topk_weights,
                          num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
                          is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
                          previous_event=event, async_finish=True, allocate_on_comm_stream=True,
                          expert_alignment=128, config=config)
    got[5].current_stream_wait()
    assert got[3] == [-(-count // 128) * 128 for count in Expected(everyone, rank).per_expert]
    combined, _, event = buffer.combine(got[0], got[4], async_finish=True, config=config,
                                        previous_event=deep_ep.Buffer.capture(),
                                        allocate_on_comm_stream=True)
    event.current_stream_wait()
    assert same(combined.float(), one.x.float() * in_rank.sum(1, keepdim=True))


class _Mpi:
    """What of an mpi4py communicator is called, over a group of torch."""

    def __init__(self, group):
        self._group = group

    def Get_rank(self):
        return self._group.rank()

    def Get_size(self):
        return self._group.size()

    def allgather(self, value):
        everyone = [None] * self.Get_size()
        torch.distributed.all_gather_object(everyone, value, group=self._group)
        return everyone


class _Attributes:
    """Numbers instead of methods, as in Paddle, and a gather of its own."""

    def __init__(self, group):
        self.rank, self.world_size, self._group = group.rank(), group.size(), group

    def all_gather_object(self, everyone, value):
        torch.distributed.all_gather_object(everyone, value, group=self._group)


class _Paddle:
    """A group whose framework gathers, as Paddle does: behind what is in the list."""

    __module__ = "paddle_alike"

    def __init__(self, group):
        self.rank, self.world_size, self._group = group.rank(), group.size(), group

    @staticmethod
    def all_gather(everyone, value, group):
        gathered = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, value, group=group._group)
        everyone.extend(gathered)


def _other_groups(group):
    sys.modules["paddle_alike"] = types.SimpleNamespace(
        distributed=types.SimpleNamespace(all_gather_object=_Paddle.all_gather))
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    for options in ({"group": None, "comm": _Mpi(group)}, {"group": _Mpi(group)},
                    {"group": _Attributes(group)}, {"group": _Paddle(group)}):
        buffer = deep_ep.Buffer(num_nvl_bytes=1 << 20, **options)
        assert (buffer.rank, buffer.group_size) == (group.rank(), group.size())
        assert buffer.group is (options["group"] or options["comm"])
        found = buffer.get_dispatch_layout(one.topk_idx, one.experts)
        assert same(found[3], layout_of(one, group.size())[2])
        buffer.destroy()  # and again, larger, as TensorRT-LLM grows


def _lmdeploy(group):
    for fork in ("num_nvl_peers", "is_intranode"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{fork}'"):
            deep_ep.Buffer(group, 1 << 20, 0, **{fork: 1})
    buffer = deep_ep.Buffer(group, 1 << 20, 0, low_latency_mode=False,
                            num_qps_per_rank=deep_ep.Buffer.num_sms / 2)  # a float
    buffer.set_num_sms(14)  # on an instance
    assert deep_ep.Buffer.num_sms == 14
    deep_ep.Buffer.set_num_sms(20)
    assert isinstance(buffer, deep_ep.Buffer)
    for call in (buffer.dispatch, buffer.combine):
        with pytest.raises(TypeError, match="pertoken_quant"):
            call(torch.ones(1, 8), handle=None, pertoken_quant=True)
    buffer.destroy()


def _rtp_llm(group):
    """A fork's argument; ROCm's has it too."""
    buffer = deep_ep.Buffer(group=group, num_nvl_bytes=1 << 20, num_rdma_bytes=0,
                            low_latency_mode=False, num_qps_per_rank=12.0,
                            allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False,
                            use_fabric=True)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    assert same(buffer.get_dispatch_layout(one.topk_idx, one.experts)[3],
                layout_of(one, group.size())[2])
    buffer.destroy()


def _slime(group):
    """Reads of handles how many rows each rank got, and how many came here."""
    size, rank = group.size(), group.rank()
    buffer = deep_ep.Buffer(group, 1 << 20)
    everyone = make_inputs(size, [5, 12], experts=2 * size)
    one = everyone[rank]
    layout = buffer.get_dispatch_layout(one.topk_idx, one.experts)
    got = buffer.dispatch(one.x, None, layout[0], None, layout[3], layout[2])
    handle = got[4]
    read = handle[3] if len(handle) == 6 else handle[7]
    assert read.shape[0] == got[0].shape[0] == Expected(everyone, rank).rows
    for other in range(size if len(handle) == 6 else 0):
        assert int(handle[0][-1][other]) == Expected(everyone, other).rows
    buffer.destroy()


def _tensorrt_llm(group):
    """int32 ids, which come back as they are; to grow it destroys, and constructs larger."""
    size = group.size()
    for num_bytes in (1 << 20, 1 << 22):
        buffer = deep_ep.Buffer(None, num_nvl_bytes=num_bytes, num_rdma_bytes=0, comm=_Mpi(group))
        everyone = make_inputs(size, experts=2 * size)
        for one in everyone:
            one.topk_idx = one.topk_idx.int()
        one = everyone[group.rank()]
        got = buffer.dispatch(**routing.dispatch_arguments(buffer, one))
        assert got[1].dtype == torch.int32
        Expected(everyone, group.rank()).check(*got[:3], got[4])
        buffer.destroy()


def _deepxtrace(group):
    """Accumulates the waits of high-throughput calls too, in int64 of a size that is the ranks'."""
    size, rank = group.size(), group.rank()
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(size, experts=2 * size)[rank]
    handle = buffer.dispatch(**routing.dispatch_arguments(buffer, one))[4]
    waits = torch.full((2, size), 1000, dtype=torch.int64, device=routing.DEVICE)
    seen = waits.clone()
    for _ in range(3):
        torch.distributed.barrier(group)
        if rank == 1:
            time.sleep(0.05)  # so rank 0 waits for it
        recv_x = buffer.dispatch(one.x, handle=handle, dispatch_wait_recv_cost_stats=waits[0])[0]
        if rank == 1:
            time.sleep(0.05)
        buffer.combine(recv_x, handle, combine_wait_recv_cost_stats=waits[1])
        assert (waits >= seen).all()
        if rank == 0:
            assert (waits[:, 1] > seen[:, 1]).all()
        seen = waits.clone()
    first = torch.zeros(size, dtype=torch.int64, device=routing.DEVICE)
    torch.distributed.barrier(group)
    if rank == 1:
        time.sleep(0.1)
    buffer.dispatch(**routing.dispatch_arguments(buffer, one), dispatch_wait_recv_cost_stats=first)
    if rank == 0 and routing.DEVICE == "cpu":
        assert first[1] > 30_000_000, first  # also where the wait is for counts
        assert (waits[:, 1] > 30_000_000).all(), waits  # ns of the 3 x 50 ms
    buffer.destroy()


def _patches(group):
    """slime replaces __init__, Paddle users the static methods."""
    original, asked = deep_ep.Buffer.__init__, []

    def init(self, *arguments, **keywords):
        asked.append("init")
        original(self, *arguments, **keywords)

    def config(num_ranks):
        asked.append(num_ranks)
        return deep_ep.Config(2, 4, 8)

    statics = {name: vars(deep_ep.Buffer)[name]
               for name in ("get_dispatch_config", "get_combine_config")}
    try:
        deep_ep.Buffer.__init__ = init
        for name in statics:
            setattr(deep_ep.Buffer, name, staticmethod(config))
        buffer = deep_ep.Buffer(group, 1 << 20)
        one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
        layout = buffer.get_dispatch_layout(one.topk_idx, one.experts)
        got = buffer.dispatch(one.x, None, layout[0], None, layout[3], layout[2])
        buffer.combine(got[0], got[4])
        assert asked == ["init", group.size(), group.size()]
        assert got[4][1].shape == (group.size(), 1)  # of 2 SMs
    finally:
        deep_ep.Buffer.__init__ = original
        for name, method in statics.items():
            setattr(deep_ep.Buffer, name, method)


CALLERS = [_vllm, _megatron, _sglang, _other_groups, _lmdeploy, _rtp_llm, _slime, _tensorrt_llm,
           _deepxtrace, _patches]


@pytest.mark.parametrize("caller", CALLERS)
def test_a_framework_calls(ranks, caller):
    ranks.run(2, caller)


@pytest.mark.parametrize("caller", CALLERS)
def test_a_framework_calls_over_two_nodes(node_ranks, caller):
    node_ranks.run(2, routing.over_nodes, 1, caller)


def _cloned_handles(group):
    rank, size = group.rank(), group.size()
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(size, experts=2 * size)[rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(one.topk_idx, one.experts)
    recv_x, _, _, _, handle, _ = buffer.dispatch(one.x, None, per_rank, None, in_rank, per_expert)
    kept = tuple(part.clone() for part in handle)
    first = buffer.combine(recv_x, handle)[0]
    assert all(same(*pair) for pair in zip(handle, kept))  # combine changes nothing
    for config in (deep_ep.Config(2, 1, 1), deep_ep.Config(64, 6, 256)):
        assert same(buffer.dispatch(one.x, handle=kept, config=config)[0], recv_x)
        assert same(buffer.combine(recv_x, kept, config=config)[0], first)
    buffer.destroy()


def test_handles_may_be_cloned_and_used_again_with_other_configs(ranks):
    ranks.run(2, _cloned_handles)


def _threads(group):
    """Two threads with a Buffer each, as with dual-batch overlap: waits let the other run."""
    for seed in range(0, 20, 4):  # with new Buffers, whose first calls get memory
        _threads_once(group, seed)


def _threads_once(group, seed):
    size, wrong = group.size(), []
    buffers = [deep_ep.Buffer(group, 1 << 20) for _ in range(2)]
    device = torch.cuda.current_device() if routing.DEVICE == "cuda" else None

    def steps(index, buffer):
        for step in range(4):
            one = make_inputs(size, experts=2 * size, seed=seed + 50 * index + step)[group.rank()]
            layout = buffer.get_dispatch_layout(one.topk_idx, one.experts)
            got = buffer.dispatch(one.x, None, layout[0], None, layout[3], layout[2])
            combined = buffer.combine(got[0], got[4])[0]
            assert same(combined.float(), one.x.float() * layout[3].sum(1, keepdim=True))

    def work(index):
        try:
            if device is None:
                return steps(index, buffers[index])
            torch.cuda.set_device(device)  # of a new thread it is the first one
            # Of their own: one stream for both would put the two Buffers' calls in an order, and in
            # another one on the other rank.
            with torch.cuda.stream(torch.cuda.Stream()):
                steps(index, buffers[index])
        except BaseException as error:
            wrong.append(error)

    # The ranks start their threads in different orders: with the GIL held in a wait, each rank's
    # first thread would wait for the other rank's second one for ever.
    order = (0, 1) if group.rank() == 0 else (1, 0)
    threads = [threading.Thread(target=work, args=(index,)) for index in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    for buffer in buffers:
        buffer.destroy()


def test_two_threads_have_a_buffer_each(ranks):
    ranks.run(2, _threads)
