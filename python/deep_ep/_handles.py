"""Handles of high-throughput calls: plain tuples of arrays, 6 of one node, 10 of several, in
DeepEP's order. Callers clone them, save them for a backward pass and put them into tuples again."""

_ONE_NODE, _SEVERAL_NODES = 6, 10
# Where a handle of several nodes has what is not int32.
_IS_TOKEN_IN_RANK, _RECV_SRC_META = 0, 7


def views_of_handle(library, handle, num_nodes):
    wanted = _ONE_NODE if num_nodes == 1 else _SEVERAL_NODES
    if not isinstance(handle, tuple) or len(handle) != wanted:
        what = f"a tuple of {len(handle)}" if isinstance(handle, tuple) else type(handle)
        nodes = "one node" if num_nodes == 1 else f"{num_nodes} nodes"
        raise TypeError(f"handle is {what}, must be the tuple of {wanted} arrays that dispatch of "
                        f"a Buffer of {nodes} returned")
    return tuple(library.view(one, "an element of handle") for one in handle)


def handle_of_parts(library, parts, in_rank, prepared=None):
    """The handle of a result, from the native module's `parts`, with the caller's own arrays where
    it has them: is_token_in_rank, and all that was known ahead."""
    make, int32 = library.make, library.int32
    if prepared is not None:
        return tuple(_made(library, index, part) if known is None else known
                     for index, (known, part) in enumerate(zip(prepared.handle, parts)))
    if len(parts) == _SEVERAL_NODES:
        made = [_made(library, index, part) for index, part in enumerate(parts)]
        if in_rank is not None:
            made[_IS_TOKEN_IN_RANK] = in_rank
        return tuple(made)
    if in_rank is None:
        in_rank = make(parts[4], library.bool)
    return (*[make(one, int32) for one in parts[:4]], in_rank, make(parts[5], int32))


def _made(library, index, part):
    """An element of several nodes' handle, or one of another that is int32."""
    dtype = {_IS_TOKEN_IN_RANK: library.bool, _RECV_SRC_META: library.uint8}.get(index,
                                                                                library.int32)
    return library.make(part, dtype)
