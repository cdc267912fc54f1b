"""Programs without torch: NumPy arrays, ml_dtypes, and the package's own Group."""

import inspect
import json
import os
import subprocess
import sys

import pytest

import deep_ep
import foreign
from ranks import free_port

np = pytest.importorskip("numpy")
pytest.importorskip("ml_dtypes")

PROGRAM = """
import json, sys
sys.modules["torch"] = None  # as on a machine that has none
import ml_dtypes, numpy as np
import deep_ep

rank, size, port = map(int, sys.argv[1:])
buffer = deep_ep.Buffer(deep_ep.Group.tcp(rank, size, port=port), 1 << 20)
assert deep_ep.topk_idx_t is np.int64
random = np.random.default_rng(rank)
x = random.integers(-4, 5, (9, 16)).astype(ml_dtypes.bfloat16)
ids = random.integers(-1, 2 * size, (9, 2))
weights = np.ones((9, 2), np.float32)
per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2 * size)
assert in_rank.dtype == np.bool_ and per_rank.dtype == np.int32
got = buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                      num_tokens_per_expert=per_expert, topk_idx=ids, topk_weights=weights)
recv_x, recv_ids, recv_weights, counts, handle, event = got
assert recv_x.dtype == ml_dtypes.bfloat16 and recv_x.flags.writeable
assert recv_ids.dtype == np.int64 and recv_weights.dtype == np.float32
assert counts == [int((recv_ids == expert).sum()) for expert in range(2)]
combined, sums, _ = buffer.combine(recv_x, handle, recv_weights)
expected = x.astype(np.float32) * in_rank.sum(1, keepdims=True)
assert np.array_equal(combined.astype(np.float32), expected)
assert np.array_equal(sums, (ids >= 0).astype(np.float32))
twin = buffer.dispatch(Foreign(x.astype(np.float32)), handle=handle)[0]
assert type(twin) is np.ndarray and np.array_equal(twin, recv_x.astype(np.float32))
quantised = (x.astype(ml_dtypes.float8_e4m3fn), np.ones((2, 9), np.float32).T)
(again, scales), *_, event = buffer.dispatch(quantised, handle=handle, async_finish=True)
event.current_stream_wait()
assert again.dtype == ml_dtypes.float8_e4m3fn and scales.shape == (len(recv_x), 2)
assert np.array_equal(again.astype(np.float32), recv_x.astype(np.float32))
ahead = buffer.prepare_dispatch(x, topk_idx=ids, topk_weights=weights, num_experts=2 * size)
place = np.empty((ahead.num_recv_tokens + 1, 16), ml_dtypes.bfloat16)
grouped = buffer.dispatch_grouped(x, topk_idx=ids, topk_weights=weights, prepared=ahead,
                                  recv_x=place)
assert grouped.recv_x.base is place and np.array_equal(grouped.recv_x, recv_x)
assert grouped.num_recv_tokens_per_expert_list == counts
rows = grouped.groups.recv_rows  # -1: padding, where a token names an expert twice
assert np.array_equal(grouped.grouped_x[rows >= 0], recv_x[rows[rows >= 0]])
home = buffer.combine(grouped.grouped_x, grouped.handle, groups=grouped.groups)[0]
named = (ids >= 0).sum(1, keepdims=True)
assert np.array_equal(home.astype(np.float32), x.astype(np.float32) * named)
local = buffer.get_local_buffer_tensor(np.float32, (2, 3))
assert local.shape == (2, 3)
try:
    buffer.dispatch([[1.0]], handle=handle)
    raise SystemExit("a list is no array")
except TypeError as error:
    assert "numpy.ndarray" in str(error)
buffer.destroy()
recv_x[:] = 0  # still ours

size_hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(9, 256, size, 2 * size)
buffer = deep_ep.Buffer(deep_ep.Group.tcp(rank, size, port=port), 0, size_hint,
                        low_latency_mode=True)
x = random.standard_normal((9, 256)).astype(ml_dtypes.bfloat16)
rows, count, packing, *_ = buffer.low_latency_dispatch(x, ids, 9, 2 * size, use_fp8=False)
assert rows.shape == (2, 9 * size, 256) and count.dtype == np.int32
expected = x.astype(np.float32) * (ids >= 0).sum(1, keepdims=True)
# Rows come home as bfloat16, which is exact here, LogFMT or FP8.
for wire, most in ({}, 0), ({"use_logfmt": True}, 0.011), ({"use_fp8": True}, 0.063):
    home, event, hook = buffer.low_latency_combine(rows, ids, weights, packing, **wire)
    off = np.abs(home.astype(np.float32) - expected)
    tiny = np.abs(expected).max() * 2 ** -16
    assert (off <= (most + 2 ** -8) * np.abs(expected) + tiny).all(), wire
    assert (off > 0).any() == bool(wire), wire
buffer.destroy()
print(json.dumps([rank, len(recv_x)]))
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_numpy_arrays_go_round(tmp_path, nodes, request):
    if nodes > 1:
        request.getfixturevalue("cpu_node_ranks")
    size, port = 2, str(free_port())
    program = tmp_path / "program.py"
    program.write_text(inspect.getsource(foreign) + PROGRAM)
    running = [subprocess.Popen([sys.executable, program, str(rank), str(size), port],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "DEEP_EP_RANKS_PER_NODE": str(size // nodes)})
               for rank in range(size)]
    for rank, process in enumerate(running):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)[0] == rank


class _Old(foreign.Foreign):
    """Of a DLPack that cannot say whether memory is read-only: NumPy then takes it for that."""

    def __dlpack__(self, **_):
        return self.array.__dlpack__()


def _frozen(*arguments):
    array = np.zeros(*arguments)
    array.flags.writeable = False
    return array


# Arrays whose elements are not where, or what, they seem, and what is said of them.
MISREAD = {
    "x": (np.ones((3, 16), ">f4"), TypeError, "is of >f4, must be in the byte order"),
    "topk_idx": (np.zeros((3, 1), ">i8"), TypeError, "is of >i8, must be in the byte order"),
    "topk_weights": (np.zeros(3, [("odd", "u1"), ("weight", "<f4")])["weight"].reshape(3, 1),
                     ValueError, r"has strides of \(5, [0-9]+\) bytes, must be multiples of .* 4"),
}
# Of the wrong shape too, which nobody comes to look at.
READ_ONLY = {
    "recv_x": _frozen((3, 16), "f4"), "recv_topk_idx": _frozen((3, 1), "i8"),
    "recv_topk_weights": _frozen((3, 1), "f4"),
    "dispatch_wait_recv_cost_stats": _frozen(1, "i8"),
}


def _arrays(group):
    """Refused before anybody is told: the Buffer stays usable."""
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(3, 16, 1, 2)
    buffer = deep_ep.Buffer(group, 1 << 20, hint, low_latency_mode=True)
    given = {"x": np.ones((3, 16), "f4"), "topk_idx": np.zeros((3, 1), "i8"),
             "topk_weights": np.ones((3, 1), "f4"), "num_experts": 2}
    for name, (array, kind, text) in MISREAD.items():
        with pytest.raises(kind, match=f"^{name} {text}"):
            buffer.dispatch(**given | {name: array})
    for name, array in READ_ONLY.items():
        with pytest.raises(ValueError, match=f"{name.removeprefix('dispatch_')} is read-only"):
            buffer.dispatch(**given | {name: array})
    with pytest.raises(ValueError, match="^grouped_x is read-only"):
        buffer.dispatch_grouped(**given, grouped_x=_frozen((3, 16), "f4"))
    recv_x, _, _, _, handle, _ = buffer.dispatch(**given)
    with pytest.raises(ValueError, match="wait_recv_cost_stats is read-only"):
        buffer.combine(recv_x, handle, combine_wait_recv_cost_stats=_frozen(1, "i8"))
    buffer.combine(recv_x, handle, combine_wait_recv_cost_stats=_Old(np.zeros(1, "i8")))
    for array in given["x"], given["topk_idx"]:  # inputs may be
        array.flags.writeable = False
    assert np.array_equal(buffer.combine(buffer.dispatch(**given)[0], handle)[0], given["x"])
    _low_latency_arrays(buffer, given["topk_idx"])
    buffer.destroy()


def _low_latency_arrays(buffer, ids):
    x, weights = np.ones((3, 16), np.int8), np.ones((3, 1), "f4")
    for name, array in (("cumulative_local_expert_recv_stats", _frozen(2, "i4")),
                        ("dispatch_wait_recv_cost_stats", _frozen(1, "i8"))):
        with pytest.raises(ValueError, match=f"{name.removeprefix('dispatch_')} is read-only"):
            buffer.low_latency_dispatch(x, ids, 3, 2, **{name: array})
    recv_x, _, handle, *_ = buffer.low_latency_dispatch(x, ids, 3, 2)
    assert recv_x.dtype == np.int8 and (recv_x[0] == 1).all()
    for name, array in (("out", _frozen((3, 16), "i2")),
                        ("combine_wait_recv_cost_stats", _frozen(1, "i8"))):
        with pytest.raises(ValueError, match=f"{name.removeprefix('combine_')} is read-only"):
            buffer.low_latency_combine(recv_x, ids, weights, handle, **{name: array})
    with pytest.raises(ValueError, match="^mask_status is read-only"):
        buffer.low_latency_query_mask_buffer(_frozen(1, "i4"))


def test_arrays_that_would_be_misread_or_must_not_be_written_are_refused(cpu_ranks):
    cpu_ranks.run(1, _arrays)
