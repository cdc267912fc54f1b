"""Every piece of code of the tutorial and of the README does what the text says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_ep
import routing
from ranks import free_port, run_program
from routing import Expected, layout_of, make_inputs, over_nodes, same, weighted

ROOT = Path(__file__).parents[2]
HIDDEN, LOCAL = 256, 2


def _blocks(page):
    file = ROOT / page
    if not file.exists():
        pytest.skip(f"{page} is not beside the tests")
    return re.findall(r"```python\n(.*?)```", file.read_text(), re.S)


def _block(word, page="docs/python.md"):
    (found,) = [text for text in _blocks(page) if word in text]
    return found


def test_the_first_program_runs(tmp_path):
    program = _block("__main__")
    assert "29500" in program
    file = tmp_path / "first.py"
    file.write_text(program.replace("29500", str(free_port())))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    differences = [float(text) for text in re.findall(r"difference ([0-9.]+)", done.stdout)]
    # Of values below 6, doubled and weighted by at most 2: three roundings to bfloat16, 2^-9 each.
    assert len(differences) == 4 and max(differences) < 3 * 24 / 512 + 0.001


class _Reader:
    """A reader's program on one rank: what the text takes as known, by its names there."""

    def __init__(self, group, **more):
        size = group.size()
        self.everyone = make_inputs(size, 12, hidden=HIDDEN, topk=2, experts=LOCAL * size)
        self.one = self.everyone[group.rank()]
        self.expected = Expected(self.everyone, group.rank())
        self.in_rank = layout_of(self.one, size)[2]
        self.names = {"torch": torch, "deep_ep": deep_ep, "group": group, "size": size,
                      "hidden": HIDDEN, "experts": LOCAL * size, "num_experts": LOCAL * size,
                      "x": self.one.x, "topk_idx": self.one.topk_idx,
                      "weights": self.one.topk_weights, "topk_weights": self.one.topk_weights,
                      **more}

    def with_buffer(self):
        self.names["buffer"] = deep_ep.Buffer(self.names["group"], 1 << 22)
        return self

    def run(self, text):
        exec(text, self.names)
        if routing.DEVICE == "cuda":
            torch.cuda.synchronize()
        return self.names


def _readme(group, text):
    """Experts that give back what they get, weighted."""
    def run_experts(rows, ids, weights):
        return rows * torch.where(ids >= 0, weights, 0).sum(1, keepdim=True).bfloat16()

    reader = _Reader(group, run_experts=run_experts)
    got = reader.run(text)
    assert got["rows_per_expert"] == reader.expected.per_expert
    torch.testing.assert_close(got["combined_x"].float(), weighted(reader.one), rtol=0.02, atol=0.1)
    got["buffer"].destroy()


def _counts_ahead(group, text):
    memory = torch.full((100, HIDDEN), 77, dtype=torch.bfloat16, device=routing.DEVICE)
    reader = _Reader(group, my_memory=lambda rows, hidden: memory[:rows + 1]).with_buffer()
    got = reader.run(text)
    assert got["recv_x"].data_ptr() == memory.data_ptr()
    assert len(got["recv_x"]) == reader.expected.rows and (memory[len(got["recv_x"]):] == 77).all()
    reader.expected.check(got["recv_x"], got["recv_idx"], got["recv_weights"], got["handle"])
    got["buffer"].destroy()


def _grouped(group, text):
    experts = [lambda rows, factor=LOCAL * group.rank() + index + 1: rows * factor
               for index in range(LOCAL)]
    reader = _Reader(group, my_experts=experts).with_buffer()
    got = reader.run(text)
    counts = [-(-count // 128) * 128 for count in reader.expected.per_expert]
    assert got["got"].num_recv_tokens_per_expert_list == counts and got["begin"] == sum(counts)
    one = reader.one
    factors = torch.where(one.topk_idx >= 0, (one.topk_idx + 1) * one.topk_weights, 0.0)
    torch.testing.assert_close(got["combined"].float(), one.x * factors.sum(1, keepdim=True),
                               rtol=0.01, atol=0.01)
    got["buffer"].destroy()


def _layer(group, text):
    reader = _Reader(group, MyExpert=lambda: torch.nn.Linear(HIDDEN, HIDDEN),
                     criterion=torch.nn.functional.mse_loss).with_buffer()
    x = reader.one.x.float().requires_grad_()
    reader.names |= {"x": x, "target": 2 * x.detach()}
    with torch.device(routing.DEVICE):  # where new parameters are
        got = reader.run(text)
    assert x.grad.any() and got["layer"].gate.weight.grad.any()
    assert all(expert.weight.grad.any() for expert in got["layer"].experts)
    got["buffer"].destroy()


def _overlap(group, text):
    reader = _Reader(group, shared_expert=lambda x: x + 1).with_buffer()
    got = reader.run(text)
    assert got["event"].event is not None and same(got["y"], reader.one.x + 1)
    assert same(got["recv_x"], torch.stack(reader.expected.x))
    combined = got["buffer"].combine(got["recv_x"], got["handle"])[0]
    assert same(combined.float(), reader.one.x.float() * reader.in_rank.sum(1, keepdim=True))
    got["buffer"].destroy()


def _hooks(group, text):
    reader = _Reader(group, attention_of_the_other_half=lambda: "attention")
    got = reader.run(text)
    assert got["y"] == "attention"
    assert [int(one) for one in got["count"]] == [
        sum(expert in ids for one in reader.everyone for ids in one.topk_idx.tolist())
        for expert in range(LOCAL * group.rank(), LOCAL * (group.rank() + 1))]
    torch.testing.assert_close(got["combined"].float(), 2 * weighted(reader.one), rtol=0.01,
                               atol=0.01)
    got["buffer"].destroy()


def _several_nodes(group, text):
    reader = _Reader(group)
    got = reader.run(text)
    assert got["buffer"].runtime.get_num_rdma_ranks() == 2
    back = got["buffer"].dispatch(reader.one.x, topk_idx=reader.one.topk_idx,
                                  num_experts=reader.one.experts)
    assert len(back[4]) == 10 and same(back[0], torch.stack(reader.expected.x))
    got["buffer"].destroy()


CASES = {"my_memory": _counts_ahead, "my_experts": _grouped, "MyExpert": _layer,
         "shared_expert": _overlap, "attention_of_the_other_half": _hooks}


def test_every_piece_of_code_is_tried():
    words = [*CASES, "__main__", "get_rdma_buffer_size_hint", "import numpy"]
    assert sorted(_block(word) for word in words) == sorted(_blocks("docs/python.md"))
    assert len(_blocks("README.md")) == 1


@pytest.mark.parametrize("word", CASES)
def test_the_tutorials_pieces_do_what_it_says(ranks, word):
    ranks.run(2, CASES[word], _block(word))


def test_the_lines_of_the_readme_do(ranks):
    ranks.run(2, _readme, _blocks("README.md")[0])


def test_the_piece_about_several_nodes_does(node_ranks):
    node_ranks.run(2, over_nodes, 1, _several_nodes, _block("get_rdma_buffer_size_hint"))


def test_the_piece_without_torch_does(tmp_path):
    pytest.importorskip("ml_dtypes")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nsys.modules['torch'] = None\n"
        "os.environ |= dict(RANK=sys.argv[1], WORLD_SIZE='2', MASTER_PORT=sys.argv[2])\n"
        + _block("import numpy") + "print(len(recv_x), (combined == x * 2).all())\n")
    assert run_program(program, MASTER_ADDR="127.0.0.1") == [("10 True\n", "")] * 2
