"""What can be seen without a Buffer: names, signatures, configurations, imports."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import deep_ep

GOLDEN = (Path(__file__).with_name("golden_surface.txt")).read_text().splitlines()


@pytest.mark.parametrize("line", GOLDEN, ids=lambda line: line.split("(")[0])
def test_signatures_are_those_of_deep_ep(line):
    path, _, rest = line.partition("(")
    owner, name = path.split(".")
    found = inspect.getattr_static(getattr(deep_ep, owner), name)
    is_static = isinstance(found, staticmethod)
    assert is_static == rest.endswith(" static")
    signature = inspect.signature(found.__func__ if is_static else found)
    # What we add can be given by keyword only, so no caller of DeepEP meets it.
    known = [one.replace(annotation=inspect.Parameter.empty)
             for one in signature.parameters.values() if one.kind is not one.KEYWORD_ONLY]
    text = str(signature.replace(parameters=known, return_annotation=inspect.Signature.empty))
    assert text == "(" + rest.removesuffix(" static")


STUB = ast.parse(Path(deep_ep.__file__).with_suffix(".pyi").read_text())
STUBBED = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
PUBLIC = ("Buffer", "Config", "EventHandle", "EventOverlap", "Group")


def _methods_of(owner):
    return [node for node in STUBBED[owner].body if isinstance(node, ast.FunctionDef)]


def _attributes_of(owner):
    return [node.target.id for node in STUBBED[owner].body if isinstance(node, ast.AnnAssign)]


def _without_annotations(signature):
    return str(signature.replace(return_annotation=inspect.Signature.empty, parameters=[
        one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]))


@pytest.mark.parametrize("owner", PUBLIC)
def test_stubs_say_what_methods_the_classes_have(owner):
    for method in _methods_of(owner):
        kind = [decorator.id for decorator in method.decorator_list]
        method.returns, method.decorator_list = None, []
        for argument in ast.walk(method.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        scope = {}
        exec(ast.unparse(method), scope)
        found = inspect.getattr_static(getattr(deep_ep, owner), method.name)
        assert kind == [one.__name__ for one in (staticmethod, classmethod)
                        if isinstance(found, one)], method.name
        found = getattr(found, "__func__", found)
        signature = inspect.signature(scope[method.name])
        assert str(signature) == _without_annotations(inspect.signature(found)), method.name
    public = {name for name in dir(getattr(deep_ep, owner)) if not name.startswith("_")
              and callable(getattr(getattr(deep_ep, owner), name))}
    assert public <= {method.name for method in _methods_of(owner)}


def _error():
    try:
        deep_ep.Config(8, 4, 3)
    except deep_ep.Error as error:
        return error


def _attributes(group):
    """Of instances, by class: those that are public, and those that the stubs name."""
    buffer = deep_ep.Buffer(group, 1 << 20)
    made = {"Buffer": buffer, "Config": deep_ep.Config(), "EventHandle": deep_ep.EventHandle(),
            "EventOverlap": deep_ep.EventOverlap(), "Error": _error()}
    found = {owner: ({name for name in vars(one) if not name.startswith("_")},
                     {name for name in _attributes_of(owner) if hasattr(one, name)})
             for owner, one in made.items()}
    buffer.destroy()
    return found


def test_stubs_say_what_attributes_objects_have(cpu_ranks):
    for owner, (public, present) in cpu_ranks.run(1, _attributes)[0].items():
        assert public <= set(_attributes_of(owner)) == present, owner


def test_stubs_say_what_is_in_named_tuples_and_in_the_module():
    tuples = {name: one for name, one in vars(deep_ep).items() if hasattr(one, "_fields")}
    assert len(tuples) == 3
    for name, one in tuples.items():
        assert one._fields == tuple(_attributes_of(name))
    names = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    assert set(deep_ep.__all__) == STUBBED.keys() | names


@pytest.mark.parametrize("module", ["nn", "utils.envs", "utils.math", "utils.testing"])
def test_helpers_say_their_types(module):
    helpers = importlib.import_module(f"deep_ep.{module}")
    own = [one for name, one in vars(helpers).items()
           if not name.startswith("_") and getattr(one, "__module__", "") == helpers.__name__]
    calls = [call for one in own for call in
             ([one.__init__, one.forward] if inspect.isclass(one) else [one])]
    assert calls
    for call in calls:
        expected = set(inspect.signature(call).parameters) - {"self"} | {"return"}
        assert typing.get_type_hints(call).keys() == expected, call.__qualname__


def test_names_are_where_callers_look_for_them():
    from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t
    from deep_ep.utils import EventHandle as handle, EventOverlap as overlap
    from deep_ep.utils.event import EventOverlap as third
    from deep_ep_cpp import Config as config, EventHandle as fourth
    import deep_ep_cpp
    assert (handle, overlap, third, config, fourth) == (EventHandle, EventOverlap, EventOverlap,
                                                        Config, EventHandle)
    assert topk_idx_t is torch.int64 and deep_ep_cpp.topk_idx_t is torch.int64
    assert deep_ep_cpp.is_sm90_compiled() == Buffer.is_sm90_compiled()
    assert deep_ep_cpp.get_low_latency_rdma_size_hint(128, 7168, 8, 256) > 0
    assert isinstance(Buffer, type) and type(Buffer) is type
    assert not hasattr(deep_ep, "ElasticBuffer")  # vLLM would take a path that needs NCCL's


def test_the_version_is_that_of_the_library():
    header = (Path(__file__).parents[2] / "include/deep_ep/version.hpp").read_text()
    numbers = [line.split()[-1] for line in header.splitlines() if line.startswith("#define DEEP")]
    assert deep_ep.__version__ == ".".join(numbers)


def in_fresh_python(code, **variables):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          timeout=60, env={**os.environ, **variables}).stdout


def test_importing_is_quick_and_brings_in_neither_torch_nor_numpy():
    out = in_fresh_python("import sys, time; start = time.perf_counter(); import deep_ep; "
                          "print(time.perf_counter() - start, 'torch' in sys.modules, "
                          "'numpy' in sys.modules)")
    seconds, torch_too, numpy_too = out.split()
    assert float(seconds) < 0.2
    assert (torch_too, numpy_too) == ("False", "False")


def test_a_broken_installation_is_an_import_error_that_says_what_to_do():
    out = in_fresh_python("import sys; sys.modules['deep_ep._C'] = None\n"
                          "try: import deep_ep\n"
                          "except ImportError as error: print(error)")
    assert "install the package again" in out


def test_config_takes_keywords_and_positions():
    assert deep_ep.Config(24, 8, 256)._values() == (24, 8, 256, 6, 256)
    config = deep_ep.Config(num_sms=8, num_max_nvl_chunked_send_tokens=7,
                            num_max_nvl_chunked_recv_tokens=9, num_max_rdma_chunked_send_tokens=1,
                            num_max_rdma_chunked_recv_tokens=2)
    assert config._values() == (8, 7, 9, 1, 2)
    with pytest.raises(deep_ep.Error, match="num_max_nvl_chunked_recv_tokens is 3"):
        deep_ep.Config(8, 4, 3)
    with pytest.raises(TypeError):
        deep_ep.Config(num_sm=8)


def test_size_hints_never_raise():
    for ranks in (0, 1, 3, 8, 160, 10**6):
        for hidden in (0, 32, 7168 * 2, 10**12):
            assert deep_ep.Config().get_nvl_buffer_size_hint(hidden, ranks) > 0
            assert deep_ep.Config().get_rdma_buffer_size_hint(hidden, ranks) >= 0
    hints = [deep_ep.Config().get_rdma_buffer_size_hint(7168 * 2, ranks) for ranks in range(1, 17)]
    assert hints[:8] == [0] * 8 and min(hints[8:]) > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 20, 160, 1000])
def test_there_is_a_config_for_any_number_of_ranks(ranks):
    for config in (deep_ep.Buffer.get_dispatch_config(ranks),
                   deep_ep.Buffer.get_combine_config(ranks)):
        assert isinstance(config, deep_ep.Config)
        assert config.num_sms == deep_ep.Buffer.num_sms


def test_configs_are_those_that_users_know():
    def values(config):
        return (config.num_max_nvl_chunked_send_tokens, config.num_max_nvl_chunked_recv_tokens,
                config.num_max_rdma_chunked_send_tokens, config.num_max_rdma_chunked_recv_tokens)

    for ranks, dispatch, combine in ((2, (24, 256, 6, 128), (10, 256, 6, 128)),
                                     (8, (6, 256, 6, 128), (4, 256, 6, 128)),
                                     (16, (36, 288, 20, 128), (4, 288, 12, 128)),
                                     (64, (32, 288, 8, 128), (1, 288, 8, 128)),
                                     (160, (28, 720, 12, 128), (2, 720, 8, 128))):
        assert values(deep_ep.Buffer.get_dispatch_config(ranks)) == dispatch
        assert values(deep_ep.Buffer.get_combine_config(ranks)) == combine


def test_num_sms_is_of_the_class_and_set_before_anything_else():
    before = deep_ep.Buffer.num_sms
    assert before == 20
    try:
        deep_ep.Buffer.set_num_sms(14)
        assert deep_ep.Buffer.num_sms == 14
        assert deep_ep.Buffer.get_dispatch_config(8).num_sms == 14
        for wrong in (0, -2, 1.5, "8"):
            with pytest.raises(ValueError, match="new_num_sms"):
                deep_ep.Buffer.set_num_sms(wrong)
    finally:
        deep_ep.Buffer.set_num_sms(before)


def test_events_without_a_gpu_have_happened():
    handle = deep_ep.EventHandle()
    handle.current_stream_wait()
    assert handle.query()
    tensors = (torch.ones(1),)
    overlap = deep_ep.EventOverlap(handle, tensors)
    assert overlap.extra_tensors is tensors
    overlap.current_stream_wait()
    with overlap as entered:
        assert entered is overlap
    overlap.event = deep_ep.EventHandle()  # xtuner assigns it
    overlap.current_stream_wait()
    overlap.event = None
    with overlap:
        pass
    with pytest.raises(RuntimeError, match="there is no event"):
        overlap.current_stream_wait()
    assert isinstance(deep_ep.Buffer.capture().event, deep_ep.EventHandle)
    assert deep_ep.EventOverlap().event is None


@pytest.fixture(scope="module")
def part_for_gpus(tmp_path_factory):
    """A library that a Buffer takes for the part for GPUs until it uses it."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    file = tmp_path_factory.mktemp("part") / "libdeep_ep_cuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-o", file, "-"], check=True,
                   text=True, input="void *deep_ep_cuda_parts(void) { return deep_ep_cuda_parts; }")
    return file


@pytest.mark.parametrize("place", [None, "deep_ep", "lib", "elsewhere", "no library"])
def test_gpus_are_served_if_their_part_loads_from_where_buffers_look(part_for_gpus, tmp_path,
                                                                    place):
    package = shutil.copytree(Path(deep_ep.__file__).parent, tmp_path / "deep_ep")
    (package / part_for_gpus.name).unlink(missing_ok=True)
    if place == "no library":
        (package / part_for_gpus.name).write_text("not to be loaded")
    elif place is not None:
        (tmp_path / place).mkdir(exist_ok=True)
        shutil.copy(part_for_gpus, tmp_path / place)
    out = in_fresh_python("import deep_ep; print(deep_ep.__file__, "
                          "deep_ep.Buffer.is_sm90_compiled())",
                          PYTHONPATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path / "elsewhere"))
    served = place not in (None, "no library")
    assert out.split() == [str(package / "__init__.py"), str(served)]
