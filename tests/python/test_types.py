"""Calls as DeepEP's users write them, in the eyes of a type checker."""

import subprocess
import sys

import pytest

PROGRAM = """\
import torch
from deep_ep import Buffer, Config, EventOverlap


def high_throughput(buffer: Buffer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
                    ) -> tuple[torch.Tensor, EventOverlap]:
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(ids, 64)
    recv_x, recv_ids, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert, config=Config(20), previous_event=event,
        async_finish=True, allocate_on_comm_stream=True)
    event.current_stream_wait()
    buffer.dispatch(x, handle=handle)
    combined, _, event = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    return combined, event


def low_latency(buffer: Buffer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
                ) -> torch.Tensor:
    recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
        x, ids, 128, 64, use_fp8=False, return_recv_hook=True)
    hook()
    combined, event, hook = buffer.low_latency_combine(recv_x, ids, weights, handle)
    return combined
"""
WRONG = {"async_finish=True": "async_finish='yes'", "return_recv_hook=True": "return_hook=True",
         "event.current_stream_wait()": "event.wait()"}


def _check(folder, program):
    (folder / "program.py").write_text(program)
    return subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", folder / "cache",
                           "program.py"], cwd=folder, capture_output=True, text=True)


def test_programs_pass_a_type_checker_and_mistakes_do_not(tmp_path):
    pytest.importorskip("mypy")
    done = _check(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stdout
    for right, wrong in WRONG.items():
        done = _check(tmp_path, PROGRAM.replace(right, wrong))
        assert done.returncode == 1 and "program.py" in done.stdout, wrong
