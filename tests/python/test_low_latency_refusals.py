"""What low-latency calls refuse, on whom it tells, and what works afterwards."""

import re

import pytest
import torch

import deep_ep
import routing
from routing import calc_diff, weighted
from test_low_latency import HIDDEN, MAX_TOKENS, buffer_of, inputs_of


def _dispatch(buffer, one, change=lambda x, ids: {}):
    """`change` gives what is not as it should be."""
    given = {"x": one.x, "topk_idx": one.topk_idx, "use_fp8": False}
    return buffer.low_latency_dispatch(num_max_dispatch_tokens_per_rank=MAX_TOKENS,
                                       num_experts=one.experts,
                                       **given | change(one.x, one.topk_idx))


def _combine(buffer, one, change=lambda x, ids: {}):
    recv_x, _, handle, *_ = _dispatch(buffer, one)
    given = {"x": recv_x, "topk_idx": one.topk_idx, "topk_weights": one.topk_weights}
    return buffer.low_latency_combine(handle=handle, **given | change(recv_x, one.topk_idx))


def _check_home(one, combined):
    assert not one.x.shape[0] or calc_diff(combined, weighted(one)) < 1e-5


# What forks of DeepEP take and DeepEP does not.
FORKS = {
    "low_latency_dispatch": ["use_nvfp4", "x_global_scale", "pertoken_quant", "opt_level"],
    "low_latency_combine": ["overlap", "packed_recv_count", "src_signals",
                            "src_signal_expect_value", "comp_signal", "block_m", "threshold",
                            "num_sms"],
}


def _refusals(group):
    """Refused before anybody is told: the Buffer stays usable."""
    buffer = buffer_of(group, timeout=5)
    one = inputs_of(group)[group.rank()]
    for call, names in FORKS.items():
        for name in names:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                getattr(buffer, call)(one.x, one.topk_idx, MAX_TOKENS, one.experts, **{name: None})
    with pytest.raises(TypeError, match="tuple of 6"):
        buffer.low_latency_combine(one.x, one.topk_idx, one.topk_weights, (one.x,) * 6)
    with pytest.raises(TypeError, match="x is builtins.list"):
        buffer.low_latency_dispatch([1], one.topk_idx, MAX_TOKENS, one.experts)
    with pytest.raises(TypeError, match="float64 are not supported"):
        buffer.low_latency_dispatch(one.x.double(), one.topk_idx, MAX_TOKENS, one.experts)
    with pytest.raises(deep_ep.Error, match="enable_shrink"):
        buffer.low_latency_query_mask_buffer(torch.zeros(group.size(), dtype=torch.int32))
    with pytest.raises(deep_ep.Error, match="num_rdma_bytes"):
        buffer.clean_low_latency_buffer(1 << 20, HIDDEN, one.experts)
    assert buffer.low_latency_dispatch(one.x, one.topk_idx, MAX_TOKENS, one.experts)[4] is None
    _check_home(one, _combine(buffer, one)[0])
    buffer.destroy()


def test_what_is_not_allowed_is_refused(ranks):
    ranks.run(2, _refusals)


def _live_combines(group):
    """Two combines are sent before either is received; a third is refused and hurts nobody."""
    buffer = buffer_of(group)
    one = inputs_of(group, tokens=[9] * group.size())[group.rank()]
    recv_x, _, handle, *_ = _dispatch(buffer, one)

    def send():
        return buffer.low_latency_combine(recv_x, one.topk_idx, one.topk_weights, handle,
                                          return_recv_hook=True)

    sent = [send(), send()]
    with pytest.raises(deep_ep.Error, match="low_latency_combine: .*recv_hook must run") as caught:
        send()
    assert caught.value.code == "usage"
    for combined, _, receive in sent:
        receive()
        _check_home(one, combined)
    combined, _, receive = send()
    receive()
    _check_home(one, combined)
    _check_home(one, _combine(buffer, one)[0])
    buffer.destroy()


def test_two_combines_may_live_and_a_third_is_refused(ranks):
    ranks.run(2, _live_combines)


# What a call is given by one rank, and what is said of it.
WRONG = {
    "rows of int32": (_dispatch, lambda x, ids: {"x": x.int()},
                      "x is int32.*its dtype must be bfloat16"),
    "ids of float32": (_dispatch, lambda x, ids: {"topk_idx": ids.float()},
                       "topk_idx is float32.*its dtype must be int32 or int64"),
    "too many tokens": (_dispatch, lambda x, ids: {"x": x.repeat(3, 1),
                                                   "topk_idx": ids.repeat(3, 1)},
                        "num_max_dispatch_tokens_per_rank is 24: a rank may have so many tokens"),
    "fewer rows than ids": (_dispatch, lambda x, ids: {"x": x[:5]}, "x is .*, but topk_idx is"),
    "H of no 16 bytes": (_dispatch, lambda x, ids: {"x": x[:, :1020].contiguous()},
                         "its rows have 2040 bytes, must be a positive multiple of 16"),
    "H of no 128 values": (_dispatch, lambda x, ids: {"x": x[:, :1016].contiguous(),
                                                      "use_fp8": True},
                           "with use_fp8 hidden must be a multiple of 128"),
    "H of a larger Buffer": (_dispatch, lambda x, ids: {"x": x.repeat(1, 8)},
                             "num_rdma_bytes is [0-9]+, this call needs"),
    "exponents of scales as they come": (_dispatch, lambda x, ids: {"use_fp8": True,
                                                                    "use_ue8m0": True},
                                         "use_ue8m0 is true, which needs round_scale"),
    "a hook and an event": (_dispatch, lambda x, ids: {"return_recv_hook": True,
                                                       "async_finish": True},
                            "return_recv_hook is true, which excludes async_finish"),
    "results of float32": (_combine, lambda x, ids: {"x": x.float()},
                           "x is float32.*its dtype must be bfloat16"),
    "results of another H": (_combine, lambda x, ids: {"x": x[..., :512].contiguous()},
                             "x is bfloat16.*its shape must be"),
}


def _wrong_on_one(group, name):
    """Known to all, as any Error of a collective call; new Buffers work."""
    call, change, text = WRONG[name]
    buffer = buffer_of(group, timeout=20)
    one = inputs_of(group, tokens=[9] * group.size())[group.rank()]
    torch.distributed.barrier(group)
    with pytest.raises(deep_ep.Error) as caught:
        call(buffer, one, change) if group.rank() == 1 else call(buffer, one)
        if routing.DEVICE == "cuda":  # where the call is queued
            torch.cuda.synchronize()
            buffer.check()
    assert re.search(text, str(caught.value)), caught.value
    with pytest.raises(deep_ep.Error):
        buffer.check()
    buffer.destroy()
    buffer = buffer_of(group)
    _check_home(one, _combine(buffer, one)[0])
    buffer.destroy()
    return caught.value.code, caught.value.ranks


@pytest.mark.parametrize("name", WRONG)
def test_what_one_rank_does_wrong_is_named_on_all(ranks, name):
    (code, blamed), (own_code, _) = ranks.run(2, _wrong_on_one, name)
    codes = ("capacity",) * 2 if "larger" in name else ("peer failed", "invalid argument")
    assert (code, own_code) == codes and blamed == [1]
