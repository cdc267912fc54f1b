"""Numbers and flags that are none, each named, and the odd argument of a Buffer."""

from unittest import mock

import pytest
import torch

import deep_ep
from routing import dispatch_arguments, make_inputs
from test_low_latency import MAX_TOKENS, buffer_of, inputs_of
from test_surface import in_fresh_python

# Keywords of a dispatch that are no numbers, and what is said of them.
DISPATCH = {
    "expert_alignment": ("x", "must be an int of 32 bits"),
    "num_worst_tokens": (2.5, "must be an int of 64 bits"),
    "num_experts": (1 << 31, "must be an int of 32 bits"),
    "async_finish": ("yes", "must be True or False"),
}


def _high_throughput(group):
    for name in ("num_sms", "num_max_nvl_chunked_send_tokens", "num_max_rdma_chunked_recv_tokens"):
        with pytest.raises(TypeError, match=f"^{name} is 20.5, must be an int of 32 bits"):
            deep_ep.Config(**{name: 20.5})
    with pytest.raises(TypeError, match="^num_threads is 'two', must be an int of 32 bits"):
        deep_ep.Buffer(group, 1 << 20, num_threads="two")
    buffer = deep_ep.Buffer(group, 1 << 20, timeout=5)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    for name, (value, allowed) in DISPATCH.items():
        with pytest.raises(TypeError, match=f"^{name} is {value!r}, {allowed}"):
            buffer.dispatch(**arguments | {name: value})
    for event in "soon", deep_ep.EventOverlap(3):
        with pytest.raises(TypeError, match="^previous_event is .*, must be an EventOverlap"):
            buffer.dispatch(**arguments, previous_event=event)
    ahead = buffer.prepare_dispatch(one.x, topk_idx=one.topk_idx, num_experts=one.experts)
    with pytest.raises(TypeError, match="^prepared.num_experts is None, must be an int"):
        buffer.dispatch(one.x, topk_idx=one.topk_idx, prepared=ahead._replace(num_experts=None))
    got = buffer.dispatch(**arguments)
    buffer.combine(got[0], got[4])
    buffer.destroy()


def test_numbers_and_flags_are_named_and_touch_nobody(ranks):
    ranks.run(2, _high_throughput)


def _low_latency(group):
    buffer = buffer_of(group, timeout=5)
    one = inputs_of(group)[group.rank()]

    def dispatch(max_tokens=MAX_TOKENS, **options):
        return buffer.low_latency_dispatch(one.x, one.topk_idx, max_tokens, one.experts,
                                           **{"use_fp8": False} | options)

    with pytest.raises(TypeError, match="^num_max_dispatch_tokens_per_rank is 'many', must be an"):
        dispatch("many")
    for name in ("use_fp8", "round_scale", "use_ue8m0", "return_recv_hook"):
        with pytest.raises(TypeError, match=f"^{name} is 'yes', must be True or False"):
            dispatch(**{name: "yes"})
    recv_x, _, handle, *_ = dispatch()
    for name in ("use_logfmt", "use_fp8", "zero_copy", "return_recv_hook"):
        with pytest.raises(TypeError, match=f"^{name} is 1, must be True or False"):
            buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle, **{name: 1})
    with pytest.raises(TypeError, match=r"^handle\[3\] is None, must be an int of 64 bits"):
        buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights,
                                   (*handle[:3], None, handle[4]))
    buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle)
    buffer.destroy()


def test_those_of_low_latency_too(ranks):
    ranks.run(2, _low_latency)


class _Wrapped(torch.distributed.ProcessGroup):
    """A process group of torch's that is no class of torch's."""

    def __init__(self, inner):
        super().__init__(inner.rank(), inner.size())
        self.inner = inner


def _subclass(group):
    gather = torch.distributed.all_gather_object

    def through(everyone, value, group):
        gather(everyone, value, group=group.inner)

    with mock.patch.object(torch.distributed, "all_gather_object", through):
        buffer = deep_ep.Buffer(_Wrapped(group), 1 << 20)
    assert (buffer.rank, buffer.group_size) == (group.rank(), group.size())
    buffer.destroy()


def test_a_group_may_be_of_a_subclass_made_elsewhere(cpu_ranks):
    cpu_ranks.run(2, _subclass)


def test_a_missing_torch_is_told_where_a_gpu_is_asked_for():
    out = in_fresh_python("""
import deep_ep
try:
    deep_ep.Buffer(deep_ep.Group.tcp(0, 1), device="cuda")
except RuntimeError as error:
    print(error)
""")
    assert "pass device='cpu' for a Buffer of the host" in out


def _timeouts(group):
    for timeout in (-5, 0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^timeout is {timeout}, must be more than 0"):
            deep_ep.Buffer(group, 1 << 20, timeout=timeout)
    deep_ep.Buffer(group, 1 << 20, timeout=1e-4).destroy()


def test_a_timeout_is_more_than_nothing(cpu_ranks):
    cpu_ranks.run(1, _timeouts)


@pytest.mark.parametrize("number", [1 << 31, -1 << 31, 1 << 80, float("inf"), -float("inf"), 2.5])
def test_hints_do_not_raise_for_numbers_of_any_size(number):
    assert deep_ep.Config().get_nvl_buffer_size_hint(number, number) > 0
    assert deep_ep.Config().get_rdma_buffer_size_hint(number, number) >= 0
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(number, number, number, number) > 0


class _Alive:
    def __init__(self, error=None):
        self.error, self.destroyed = error, False

    def destroy(self):
        self.destroyed = True
        if self.error is not None:
            raise self.error


def test_at_the_end_all_buffers_are_destroyed_though_one_fails(monkeypatch):
    everyone = [_Alive(), _Alive(OSError("first")), _Alive(OSError("second")), _Alive()]
    monkeypatch.setattr(deep_ep.buffer, "_alive", everyone)
    with pytest.raises(OSError, match="first"):
        deep_ep.buffer._destroy_all()
    assert all(one.destroyed for one in everyone)
