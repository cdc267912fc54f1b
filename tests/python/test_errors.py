"""What is refused, how, and what stays usable."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import deep_ep
import routing
from routing import dispatch_arguments, make_inputs


def _buffer(group, **options):
    return deep_ep.Buffer(group, 1 << 20, timeout=5, **options)


def _wrong_types(group):
    """Refused before anybody is told: the Buffer stays usable."""
    buffer = _buffer(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    with pytest.raises(TypeError, match="x is builtins.list"):
        buffer.dispatch(**{**arguments, "x": [[1.0]]})
    with pytest.raises(TypeError, match="topk_idx is builtins.list"):
        buffer.dispatch(**{**arguments, "topk_idx": [[1]]})
    with pytest.raises(TypeError, match="complex64 are not supported"):
        buffer.dispatch(**{**arguments, "x": one.x.to(torch.complex64)})
    with pytest.raises(TypeError, match="numpy.ndarray, must be torch.Tensor"):
        buffer.dispatch(**{**arguments, "topk_weights": one.topk_weights.cpu().numpy()})
    with pytest.raises(TypeError, match="tuple of 10"):
        buffer.combine(one.x, (one.x,) * 10)
    with pytest.raises(TypeError, match="handle is <class 'list'>"):
        buffer.combine(one.x, [one.x] * 6)
    with pytest.raises(TypeError):
        buffer.get_dispatch_layout(one.topk_idx, num_experts=8, num_expert=8)
    got = buffer.dispatch(**arguments)
    with pytest.raises(RuntimeError, match="all ranks are of one node, use dispatch"):
        buffer.internode_dispatch(one.x)
    with pytest.raises(RuntimeError, match="all ranks are of one node, use combine"):
        buffer.internode_combine(one.x, got[4])
    buffer.combine(got[0], got[4])
    buffer.destroy()


def test_wrong_types_are_type_errors_and_touch_nobody(ranks):
    ranks.run(2, _wrong_types)


def _error_of(call):
    with pytest.raises(deep_ep.Error) as caught:
        call()
    return caught.value


def _completed(buffer, call, *arguments, **keywords):
    """A call of the Buffer's and, on GPUs, where it is queued, what its kernels find."""
    call(*arguments, **keywords)
    if routing.DEVICE == "cuda":
        torch.cuda.synchronize()
        buffer.check()


def _ids_out_of_range(group):
    buffer = _buffer(group)
    if group.rank() == 0:
        ids = torch.tensor([[0, 4]], device=routing.DEVICE)
        error = _error_of(lambda: buffer.get_dispatch_layout(ids[:, :1], 3))
        assert "num_experts" in str(error)
        error = _error_of(lambda: _completed(buffer, buffer.get_dispatch_layout, ids, 4))
        assert error.code == "invalid argument" and "topk_idx[0, 1] is 4" in str(error)
    torch.distributed.barrier(group)
    buffer.destroy()


def test_errors_name_the_argument_and_its_value(ranks):
    ranks.run(2, _ids_out_of_range)


def _refused_on_one(group):
    buffer = _buffer(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    torch.distributed.barrier(group)  # rank 0 must not hear of it before its own call
    if group.rank() == 1:
        arguments["topk_weights"] = one.topk_weights.double().float()[:, :1]
    error = _error_of(lambda: buffer.dispatch(**arguments))
    assert "topk_weights" in str(error), error
    again = _error_of(lambda: buffer.dispatch(**arguments))  # done for, and says why
    assert str(again)
    assert _error_of(buffer.check).code
    buffer.destroy()
    return error.code, error.ranks


def test_a_refusal_of_one_rank_is_known_to_all(ranks):
    (code, blamed), (own_code, _) = ranks.run(2, _refused_on_one)
    assert (code, blamed, own_code) == ("peer failed", [1], "invalid argument")


# What DeepEP asserts as well: arguments of one rank's dispatch, and what is said of them.
WRONG = {
    "ids beside a handle": (lambda one, handle: {"x": one.x, "handle": handle,
                                                 "topk_idx": one.topk_idx},
                            "topk_idx is .*, it must not be given together with handle"),
    "memory of a stream without events": (lambda one, handle: {"x": one.x, "handle": handle,
                                                               "allocate_on_comm_stream": True},
                                          "which needs previous_event and async_finish"),
    "rows that do not lie one behind the other": (
        lambda one, handle: {"x": one.x.t().contiguous().t(), "handle": handle},
        "x is .*, it must be contiguous"),
}


def _wrong_on_one(group, name):
    change, text = WRONG[name]
    buffer = _buffer(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    handle = buffer.dispatch(**dispatch_arguments(buffer, one))[4]
    torch.distributed.barrier(group)
    given = change(one, handle) if group.rank() == 1 else {"x": one.x, "handle": handle}
    error = _error_of(lambda: _completed(buffer, buffer.dispatch, **given))
    assert re.search(text, str(error)), error
    buffer.destroy()
    return error.code, error.ranks


@pytest.mark.parametrize("name", WRONG)
def test_what_one_rank_does_wrong_is_named_on_all(ranks, name):
    (code, blamed), (own_code, _) = ranks.run(2, _wrong_on_one, name)
    assert (code, blamed, own_code) == ("peer failed", [1], "invalid argument")


def _missing(group):
    if group.rank() == 1:
        return None
    buffer = deep_ep.Buffer(_Alone(), 1 << 20, timeout=0.2)
    buffer.destroy()
    return True


class _Alone:
    def rank(self):
        return 0

    def size(self):
        return 1


def test_a_group_of_one_needs_no_gather(cpu_ranks):
    assert cpu_ranks.run(2, _missing)[0]


def _late(group):
    buffer = deep_ep.Buffer(group, 1 << 20, timeout=0.3)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    if group.rank() == 1:
        time.sleep(1.5)
        assert _error_of(lambda: _completed(buffer, buffer.dispatch, **arguments))
        return None
    begin = time.monotonic()
    error = _error_of(lambda: buffer.dispatch(**arguments))
    assert time.monotonic() - begin < 1.4
    return error.code, error.ranks


def test_a_rank_that_does_not_come_is_named_in_time(ranks):
    assert ranks.run(2, _late)[0] == ("timeout", [1])


def _too_few_worst_tokens(group):
    buffer = _buffer(group)
    one = make_inputs(group.size(), 30, experts=2 * group.size(), drop=0.0)[group.rank()]
    arguments = dispatch_arguments(buffer, one, num_worst_tokens=3)
    return _error_of(lambda: _completed(buffer, buffer.dispatch, **arguments)).code


def test_too_few_worst_tokens_are_an_error_not_a_write_past_the_end(ranks):
    assert "capacity" in ranks.run(2, _too_few_worst_tokens)


def _destroyed(group):
    buffer = _buffer(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    got = buffer.dispatch(**arguments)
    kept = got[0].clone()
    assert buffer.runtime.is_available()
    buffer.destroy()
    buffer.destroy()
    assert not buffer.runtime.is_available()
    assert _error_of(lambda: buffer.dispatch(**arguments)).code == "usage"
    assert torch.equal(got[0], kept)
    got[0].zero_()
    return True


def test_destroy_is_idempotent_and_results_outlive_it(ranks):
    ranks.run(2, _destroyed)


def _broken_gather(group):
    class Broken:
        rank, world_size = 0, 2

        def all_gather_object(self, everyone, value):
            raise KeyError("no network")

    with pytest.raises(KeyError, match="no network"):
        deep_ep.Buffer(Broken(), 1 << 20)
    with pytest.raises(TypeError, match="must be a process group"):
        deep_ep.Buffer(_NoGather(), 1 << 20)
    with pytest.raises(TypeError, match="no rank and size"):
        deep_ep.Buffer(object(), 1 << 20)
    with pytest.raises(ValueError, match="group is None and so is comm"):  # as DeepEP has it
        deep_ep.Buffer(None)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        deep_ep.Buffer(group, device="tpu")


class _NoGather:
    def rank(self):
        return 0

    def size(self):
        return 2


def test_what_a_group_raises_arrives_as_it_is(cpu_ranks):
    cpu_ranks.run(1, _broken_gather)


def _no_gpu(group):
    if deep_ep._C.num_cuda_devices():
        return "there is one"
    with pytest.raises(RuntimeError, match="device='cpu'"):
        deep_ep.Buffer(group, device="cuda:0")
    return "refused"


def test_a_missing_gpu_is_told_at_construction(cpu_ranks):
    if cpu_ranks.run(1, _no_gpu) == ["there is one"]:
        pytest.skip("this machine has a GPU")


def _overlap(group):
    """A second call while the first waits, its GIL released: refused, and nobody is hurt."""
    buffer = _buffer(group)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    torch.distributed.barrier(group)
    if group.rank() == 1:
        time.sleep(1)
        got = buffer.dispatch(**arguments)
    else:
        with ThreadPoolExecutor(1) as other:
            running = other.submit(buffer.dispatch, **arguments)
            time.sleep(0.3)  # it waits for rank 1 by now
            assert not running.done()
            error = _error_of(lambda: buffer.dispatch(**arguments))
            assert error.code == "usage" and "one at a time" in str(error)
            got = running.result()
    buffer.combine(got[0], got[4])
    buffer.destroy()


def test_calls_that_overlap_are_refused(ranks):
    ranks.run(2, _overlap)


def _taking_turns(group):
    """Two threads use one Buffer under their lock, in the same order on all ranks. A new thread's
    current GPU is the first one, whichever the Buffer's is."""
    buffer = _buffer(group)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for seed in range(6):
            one = make_inputs(group.size(), experts=2 * group.size(), seed=seed)[group.rank()]
            arguments = dispatch_arguments(buffer, one)
            got = first.submit(buffer.dispatch, **arguments).result()
            combined = second.submit(buffer.combine, got[0], got[4]).result()[0]
            in_rank = arguments["is_token_in_rank"].sum(1, keepdim=True)
            assert torch.equal(combined.float(), one.x.float() * in_rank)
    buffer.destroy()


def test_threads_may_take_turns(ranks):
    ranks.run(2, _taking_turns)


def _begin_thread(device):
    """With a stream of its own, where there are any."""
    if device is not None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())


def _under_a_lock(group):
    """The same, each thread on its own, with the lock that the interface asks for."""
    buffer = _buffer(group)
    device = torch.cuda.current_device() if routing.DEVICE == "cuda" else None
    lock, begun = threading.Condition(), [0]

    def layer(seed):
        one = make_inputs(group.size(), experts=2 * group.size(), seed=seed)[group.rank()]
        with lock:
            assert lock.wait_for(lambda: begun[0] == seed, 60)
            arguments = dispatch_arguments(buffer, one)
            got = buffer.dispatch(**arguments)
            combined = buffer.combine(got[0], got[4])[0]
            begun[0] += 1
            lock.notify_all()
        in_rank = arguments["is_token_in_rank"].sum(1, keepdim=True)
        return torch.equal(combined.float(), one.x.float() * in_rank)

    with ThreadPoolExecutor(3, initializer=_begin_thread, initargs=(device,)) as threads:
        assert all(threads.map(layer, range(12)))
    buffer.destroy()


def test_threads_share_a_buffer_under_their_lock(ranks):
    ranks.run(2, _under_a_lock)


def _async_failure(group):
    """Of an asynchronous call: raised where its event is waited for."""
    buffer = deep_ep.Buffer(group, 1 << 20, timeout=0.3)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    got = buffer.dispatch(**dispatch_arguments(buffer, one))
    if group.rank() == 1:
        time.sleep(1.5)
        return None
    event = buffer.combine(got[0], got[4], async_finish=True)[2]
    # On GPUs only the host can be told, which the stream's wait does not hold up.
    waits = [event.event.synchronize, buffer.check]
    if routing.DEVICE == "cpu":
        waits.append(event.current_stream_wait)
    return [(error.code, error.ranks) for error in map(_error_of, waits)]


def test_the_failure_of_an_asynchronous_call_is_raised_by_its_event(ranks):
    assert set(map(repr, ranks.run(2, _async_failure)[0])) == {repr(("timeout", [1]))}
