"""Arrays of neither torch nor NumPy, which speak DLPack and say nothing else of themselves."""

import pytest
import torch

import deep_ep
from deep_ep import _arrays
from foreign import Foreign
from routing import dispatch_arguments, make_inputs


def _foreign(value):
    """The same with every tensor as somebody else's."""
    if isinstance(value, torch.Tensor):
        return Foreign(value)
    if isinstance(value, tuple):
        return tuple(map(_foreign, value))
    if isinstance(value, dict):
        return {name: _foreign(one) for name, one in value.items()}
    return value


def _round_trip(group):
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    layout = buffer.get_dispatch_layout(Foreign(one.topk_idx), one.experts)
    assert torch.equal(layout[3], arguments["is_token_in_rank"])
    got = buffer.dispatch(**arguments)
    again = buffer.dispatch(**_foreign(arguments))
    assert torch.equal(got[0], again[0]) and torch.equal(got[2], again[2])
    # is_token_in_rank is in the handle as it was given.
    assert all(torch.equal(one, getattr(other, "array", other))
               for one, other in zip(got[4], again[4]))
    sums, weights, _ = buffer.combine(got[0], got[4], got[2])
    found = buffer.combine(*_foreign((got[0], got[4], got[2])))
    assert torch.equal(sums, found[0]) and torch.equal(weights, found[1])
    raw = one.x.view(torch.uint8)
    bytes_of = buffer.dispatch(Foreign(raw), handle=_foreign(got[4]))[0]
    assert bytes_of.dtype == torch.uint8 and torch.equal(bytes_of, got[0].view(torch.uint8))
    buffer.destroy()


def test_arrays_of_others_come_through_dlpack(ranks):
    ranks.run(2, _round_trip)


class Unreadable(Foreign):
    def __dlpack__(self, **options):
        raise BufferError("not now")


def _refused(group):
    buffer = deep_ep.Buffer(group, 1 << 20)
    one = make_inputs(group.size(), experts=2 * group.size())[group.rank()]
    arguments = dispatch_arguments(buffer, one)
    with pytest.raises(TypeError, match="x is test_dlpack.Unreadable, .* does not take: not now"):
        buffer.dispatch(**{**arguments, "x": Unreadable(one.x)})
    with pytest.raises(TypeError, match="x is builtins.object, must be .* with __dlpack__"):
        buffer.dispatch(**{**arguments, "x": object()})
    # NumPy's are no foreign ones, whether or not one has been seen before.
    _arrays._libraries.pop("numpy", None)
    with pytest.raises(TypeError, match="numpy.ndarray, must be torch.Tensor"):
        buffer.dispatch(**{**arguments, "topk_weights": one.topk_weights.cpu().numpy()})
    buffer.dispatch(**arguments)
    buffer.destroy()


def test_what_dlpack_does_not_give_is_a_type_error(ranks):
    ranks.run(2, _refused)
