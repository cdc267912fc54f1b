"""Ranks that MPI has started, whose communicators are groups as they are."""

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("mpi4py")

PROGRAM = """
from mpi4py import MPI
import torch
import deep_ep

world = MPI.COMM_WORLD
turned = world.Split(0, -world.Get_rank())  # the same ranks the other way round
for options in ({"group": None, "comm": world}, {"group": world}, {"group": turned}):
    comm = options["group"] or options["comm"]
    buffer = deep_ep.Buffer(num_nvl_bytes=1 << 20, num_rdma_bytes=0, device="cpu", **options)
    rank, size = comm.Get_rank(), comm.Get_size()
    assert buffer.group is comm and (buffer.rank, buffer.group_size) == (rank, size)
    x = torch.full((3, 16), rank + 1.0).bfloat16()
    ids = torch.tensor([[0, -1], [1, 0], [-1, -1]])  # one expert a rank
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, size)
    got = buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                          num_tokens_per_expert=per_expert, topk_idx=ids,
                          topk_weights=torch.ones(3, 2))
    assert got[0][:, 0].tolist() == ([1, 1, 2, 2] if rank == 0 else [1, 2])
    combined = buffer.combine(got[0], got[4])[0]
    assert torch.equal(combined, x * torch.tensor([[1], [2], [0]]))
    buffer.destroy()
print(f"rank {world.Get_rank()} done", flush=True)
"""


def test_communicators_of_mpi4py_are_groups(tmp_path):
    launcher = shutil.which("mpirun") or pytest.skip("no mpirun on this machine")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                 "OMPI_MCA_rmaps_base_oversubscribe": "1"}  # of Open MPI
    done = subprocess.run([launcher, "-n", "2", sys.executable, program], capture_output=True,
                          text=True, timeout=120, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    # What two ranks say may share a line.
    assert sorted(re.findall(r"rank \d done", done.stdout)) == ["rank 0 done", "rank 1 done"]
