"""Small functions that test programs written for DeepEP use. Needs torch."""

import torch
from torch import Tensor

_GROUP, _LARGEST = 128, 448.0  # values that share a scale; the largest of float8_e4m3fn


def calc_diff(x: Tensor, y: Tensor) -> float:
    """0 for equal tensors, about the squared relative error: 1 - 2 sum(x'y') / sum(x'^2 + y'^2) in
    double, where x' = x + 1 and y' = y + 1."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


def inplace_unique(x: Tensor, num_slots: int) -> None:
    """Leaves of each row of x [N, K] the distinct values in [0, num_slots), largest first, with -1
    behind them."""
    present = torch.zeros((x.shape[0], num_slots + 1), dtype=torch.bool, device=x.device)
    present.scatter_(1, torch.where(x < 0, num_slots, x).long(), True)
    values = torch.arange(num_slots, device=x.device, dtype=x.dtype)
    found = torch.where(present[:, :num_slots], values, -1).sort(dim=1, descending=True).values
    kept = min(num_slots, x.shape[1])
    x.fill_(-1)
    x[:, :kept] = found[:, :kept]


def create_grouped_scores(scores: Tensor, group_idx: Tensor, num_groups: int) -> Tensor:
    """scores [N, E] with 0 outside of the groups of group_idx [N, G]; E splits evenly into
    groups."""
    chosen = torch.zeros((scores.shape[0], num_groups), dtype=torch.bool, device=scores.device)
    chosen.scatter_(1, group_idx, True)
    grouped = scores.view(scores.shape[0], num_groups, -1)
    return (grouped * chosen.unsqueeze(-1)).view_as(scores)


def per_token_cast_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, H] as float8_e4m3fn with a float32 scale for each 128 values: (values, scales
    [N, ceil(H / 128)])."""
    rows, hidden = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -hidden % _GROUP)).view(rows, -1, _GROUP)
    largest = padded.abs().amax(-1).clamp(1e-4)
    values = (padded * (_LARGEST / largest).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.view(rows, -1)[:, :hidden].contiguous(), largest / _LARGEST


def per_token_cast_back(x: Tensor, scales: Tensor) -> Tensor:
    """The inverse, to bfloat16. int32 scales hold four exponents each (UE8M0)."""
    if x.numel() == 0:
        return x.to(torch.bfloat16)
    rows, hidden = x.shape
    if scales.dtype == torch.int32:
        # Flat first: the last stride of one column may be any, and has to be 1 to view bytes.
        exponents = scales.contiguous().view(-1).view(torch.uint8).view(rows, -1)
        scales = torch.exp2(exponents.float() - 127)
    groups = -(-hidden // _GROUP)
    spread = scales.view(rows, -1)[:, :groups] if scales.is_contiguous() else scales[:, :groups]
    spread = spread.float().repeat_interleave(_GROUP, dim=1)[:, :hidden]
    return (x.float() * spread).to(torch.bfloat16)


def hash_tensor(tensor: Tensor) -> int:
    """A number that does not depend on the order of the tensor's eight-byte words."""
    return tensor.contiguous().view(torch.int64).sum().item()
