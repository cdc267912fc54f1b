#!/usr/bin/env python3
"""A layer of experts on two halves of a batch, low latency: while the rows of one half are on their
way, the other half computes.

    python overlap.py                      # 4 processes of this machine, on the CPU
    torchrun --nproc-per-node 4 overlap.py --device cuda

Each call only sends and returns a hook, which receives. Between the two nothing waits, so the order
of work is the program's: send half 1, compute half 0, receive half 1, ... The result is compared
with that of one half after the other.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import deep_ep

TOKENS, HIDDEN, LOCAL_EXPERTS, TOPK = 64, 1024, 2, 4


def attention(x):
    """Stands for what a model does with the other half meanwhile."""
    return torch.softmax(x.float() @ x.float().T / HIDDEN**0.5, -1) @ x.float()


def experts(recv_x, count, first):
    """Expert e multiplies by e + 1. Only received rows are defined."""
    factors = torch.arange(first + 1, first + 1 + len(count), device=recv_x.device)
    rows = torch.arange(recv_x.shape[1], device=recv_x.device)
    valid = rows.unsqueeze(0) < count.unsqueeze(1)
    scaled = recv_x * factors.view(-1, 1, 1).to(recv_x.dtype)
    return torch.where(valid.unsqueeze(-1), scaled, 0)


class Half:
    """One half of the batch and where it stands."""

    def __init__(self, buffer, seed, device):
        random = torch.Generator().manual_seed(seed)
        self.buffer, self.num_experts = buffer, LOCAL_EXPERTS * buffer.group_size
        self.x = torch.randn((TOKENS, HIDDEN), generator=random).bfloat16().to(device)
        scores = torch.rand((TOKENS, self.num_experts), generator=random).to(device)
        self.weights, self.topk_idx = scores.topk(TOPK)

    def send(self):
        self.recv_x, self.count, self.handle, _, self.receive = self.buffer.low_latency_dispatch(
            self.x, self.topk_idx, TOKENS, self.num_experts, use_fp8=False, return_recv_hook=True)

    def compute_experts(self):
        self.out = experts(self.recv_x, self.count, self.buffer.rank * LOCAL_EXPERTS)

    def send_home(self):
        self.combined, _, self.receive = self.buffer.low_latency_combine(
            self.out, self.topk_idx, self.weights, self.handle, return_recv_hook=True)


def overlapped(first, second):
    first.send()
    second_attention = attention(second.x)   # while the first half's rows travel
    first.receive()
    second.send()
    first.compute_experts()                  # while the second half's rows travel
    first.send_home()
    second.receive()
    second.compute_experts()                 # while the first half's rows travel home
    first.receive()
    second.send_home()
    first_attention = attention(first.x)     # while the second half's rows travel home
    second.receive()
    return first.combined, second.combined, first_attention, second_attention


def one_after_the_other(*halves):
    for half in halves:
        half.send()
        half.receive()
        half.compute_experts()
        half.send_home()
        half.receive()
    return *(half.combined for half in halves), *(attention(half.x) for half in halves)


def run_rank(rank, size, device):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", rank=rank, world_size=size)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, size, LOCAL_EXPERTS * size)
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, hint, low_latency_mode=True, device=device)
    halves = [Half(buffer, 2 * rank + index, device) for index in range(2)]
    results = overlapped(*halves)
    for found, wanted in zip(results, one_after_the_other(*halves)):
        if not torch.equal(found, wanted):
            raise SystemExit(f"rank {rank}: the results differ")
    buffer.destroy()
    dist.barrier()
    if rank == 0:
        print(f"{size} ranks: two halves of {TOKENS} tokens, overlapped and not, are bitwise equal")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="without torchrun")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), arguments.device)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29542")
    mp.spawn(run_rank, (arguments.ranks, arguments.device), arguments.ranks)


if __name__ == "__main__":
    main()
