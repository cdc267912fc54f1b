"""How test programs written for DeepEP start. Needs torch."""

import os

import torch
import torch.distributed as dist


def init_dist(local_rank: int, num_local_ranks: int,
              seed: int = 0) -> tuple[int, int, dist.ProcessGroup]:
    """Joins all processes of MASTER_ADDR (127.0.0.1), MASTER_PORT (8361), WORLD_SIZE nodes and RANK
    of this one: over NCCL with a GPU for each, over gloo where torch sees none. New tensors are
    bfloat16 of the device by default. Returns (rank, number of ranks, group of all)."""
    node, nodes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "8361")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=f"tcp://{address}:{port}",
                            world_size=nodes * num_local_ranks,
                            rank=node * num_local_ranks + local_rank)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if on_gpu else "cpu")
    torch.manual_seed(seed + dist.get_rank())
    everyone = list(range(dist.get_world_size()))
    return dist.get_rank(), dist.get_world_size(), dist.new_group(everyone)
