"""What test programs written for DeepEP import beside deep_ep itself."""

import subprocess
import sys

import pytest
import torch

from deep_ep.utils.math import (calc_diff, create_grouped_scores, hash_tensor, inplace_unique,
                                per_token_cast_back, per_token_cast_to_fp8)
from deep_ep.utils.testing import bench, bench_kineto
from ranks import free_port


def test_the_difference_is_relative():
    x = torch.randn(50, 40)
    assert calc_diff(x, x) == 0
    assert 1e-7 < calc_diff(x, x + 1e-3) < 1e-5


def test_rows_keep_their_distinct_values():
    x = torch.tensor([[3, 1, 3, -1], [-1, -1, -1, -1], [0, 0, 0, 0], [2, 3, 1, 0]])
    inplace_unique(x, 4)
    assert x.tolist() == [[3, 1, -1, -1], [-1] * 4, [0, -1, -1, -1], [3, 2, 1, 0]]


def test_scores_outside_of_the_groups_are_zero():
    scores = torch.arange(1.0, 13.0).view(2, 6)
    found = create_grouped_scores(scores, torch.tensor([[0], [2]]), 3)
    assert found.tolist() == [[1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 11, 12]]


@pytest.mark.parametrize("hidden", [128, 512, 200])
def test_quantising_and_back_is_close(hidden):
    x = torch.randn(9, hidden).bfloat16() * 5
    values, scales = per_token_cast_to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (9, -(-hidden // 128))
    assert calc_diff(per_token_cast_back(values, scales), x) < 1e-3
    column_major = scales.t().contiguous().t()
    assert torch.equal(per_token_cast_back(values, column_major), per_token_cast_back(values,
                                                                                      scales))


def test_packed_exponents_are_read():
    values = torch.ones(2, 512).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[127, 128, 126, 127]] * 2, dtype=torch.uint8)
    back = per_token_cast_back(values, exponents.view(torch.int32))
    assert back[0, ::128].tolist() == [1.0, 2.0, 0.5, 1.0]
    column = torch.empty_strided((2, 1), (1, 7), dtype=torch.int32)  # as low latency packs them
    column.copy_(exponents.view(torch.int32))
    assert torch.equal(per_token_cast_back(values, column), back)


def test_hashes_do_not_see_the_order():
    x = torch.randn(8, 4)
    assert hash_tensor(x) == hash_tensor(x.flip(0))
    assert hash_tensor(x) != hash_tensor(x + 1)


def test_times_are_positive():
    calls = []
    mean, least, most = bench(lambda: calls.append(1), num_warmups=2, num_tests=5)
    assert 0 < least <= mean <= most and len(calls) == 7


PROGRAM = """
import sys, torch
import torch.multiprocessing as mp
from deep_ep.utils.envs import init_dist

def main(rank, size):
    rank, size, group = init_dist(rank, size)
    assert (rank, size) == (group.rank(), group.size())
    assert torch.empty(1).dtype == torch.bfloat16
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, (2,), 2)
    print("joined")
"""


def test_programs_are_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "joined\n", done.stderr


def _kineto(_group):
    x = torch.ones(1 << 20, device="cuda")
    seconds = bench_kineto(lambda: (x.sqrt(), x.sqrt()), "sqrt", num_tests=5)
    phases = bench_kineto(lambda: (x.sqrt(), x.sqrt()), ("sqrt",), num_tests=5,
                          num_kernels_per_period=2)
    assert 0 < seconds < 1e-3 and len(phases[0]) == 2 and all(0 < one < 1e-3 for one in phases[0])
    with pytest.raises(RuntimeError, match="one is expected"):
        bench_kineto(lambda: x.sqrt(), "no such kernel", num_tests=2)


@pytest.mark.gpu
def test_kernels_are_timed_by_name(gpu_ranks):
    gpu_ranks.run(1, _kineto)
