#!/usr/bin/env python3
"""Trains a small language model with a mixture-of-experts layer on a text, its experts spread over
processes, and compares every step's loss with that of the same model in one process.

    python train_moe.py                    # 4 processes of this machine, on the CPU
    torchrun --nproc-per-node 4 train_moe.py --device cuda

The model guesses the next byte from the last few: embedding, a layer of experts, a head. Every rank
has a share of each step's bytes; embedding, gate and head are the same on all ranks, so their
gradients are summed over them; an expert's gradients come from all ranks by themselves, through the
backward of dispatch and combine.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional

import deep_ep
from deep_ep.nn import MoE

TEXT = Path(__file__).parents[1] / "data" / "sorting_offices.txt"
CONTEXT, HIDDEN, FFN, EXPERTS, TOPK, BATCH = 4, 64, 128, 8, 2, 512
# Both runs compute in float32; what differs is the order of sums, some 1e-7 a step, which training
# makes grow, and now and then a token on the border between two experts takes the other one.
BOUND = 5e-4


def make_expert(expert):
    """The same on whatever rank it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + expert)
        return nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))


class LocalMoE(nn.Module):
    """MoE with all experts here and no Buffer: what the distributed one has to agree with."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(map(make_expert, range(EXPERTS)))

    def forward(self, x):
        weights, topk_idx = torch.topk(torch.softmax(self.gate(x), dim=-1), TOPK)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.nonzero(topk_idx == index, as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots].unsqueeze(1))
        return out


class Model(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.embed = nn.Embedding(256, HIDDEN // CONTEXT)
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = moe
        self.head = nn.Linear(HIDDEN, 256)

    def forward(self, context):
        x = self.embed(context).flatten(1)
        return self.head(x + self.moe(self.norm(x)))


def make_model(moe, device):
    torch.manual_seed(0)
    model = Model(moe)
    for name, parameter in model.named_parameters():  # alike, however many experts are here
        if ".experts." not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def train(model, text, steps, rank, size, group=None):
    """The loss of every step, of all ranks' bytes together."""
    shared = [parameter for name, parameter in model.named_parameters() if ".experts." not in name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    windows = text.unfold(0, CONTEXT + 1, 1)
    random = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(steps):
        picked = windows[torch.randint(len(windows), (BATCH,), generator=random)]
        mine = picked.tensor_split(size)[rank].long().to(text.device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(mine[:, :-1]), mine[:, -1], reduction="sum") / BATCH
        loss.backward()
        if group is not None:
            gradients = torch.cat([parameter.grad.flatten() for parameter in shared])
            dist.all_reduce(gradients, group=group)
            for parameter, summed in zip(shared, gradients.split([p.numel() for p in shared])):
                parameter.grad.copy_(summed.view_as(parameter))
            loss = loss.detach().clone()
            dist.all_reduce(loss, group=group)
        optimizer.step()
        losses.append(loss.item())
    return losses


def read_text(path, device):
    return torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).to(device)


def run_rank(rank, size, arguments):
    torch.set_num_threads(1)
    device = arguments.device
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=size)
    group = dist.group.WORLD
    hint = deep_ep.Config().get_nvl_buffer_size_hint(HIDDEN * 4, size)
    buffer = deep_ep.Buffer(group, hint, device=device)
    model = make_model(MoE(buffer, HIDDEN, EXPERTS, TOPK, make_expert), device)
    losses = train(model, read_text(arguments.text, device), arguments.steps, rank, size, group)
    buffer.destroy()
    if rank == 0:
        report(losses, arguments)
    dist.destroy_process_group()


def report(losses, arguments):
    alone = train(make_model(LocalMoE(), arguments.device),
                  read_text(arguments.text, arguments.device), arguments.steps, 0, 1)
    for step in range(0, arguments.steps, max(1, arguments.steps // 10)):
        print(f"step {step:4}: loss {losses[step]:.5f}, in one process {alone[step]:.5f}")
    worst = max(abs(one - other) for one, other in zip(losses, alone))
    print(f"first loss {losses[0]:.4f}, last {losses[-1]:.4f}; largest difference of a step's loss "
          f"{worst:.1e}, allowed are {BOUND:.0e}")
    if worst > BOUND or not losses[-1] < 0.75 * losses[0]:
        raise SystemExit("the two runs differ, or the model has not learnt")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=TEXT, help="any file; by default one that ships")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4, help="without torchrun")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), arguments)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29541")
    mp.spawn(run_rank, (arguments.ranks, arguments), arguments.ranks)


if __name__ == "__main__":
    main()
