"""The house rules that a program can check. Each rule yields violations as 'path:line: text'."""

import re
from pathlib import Path

from source_tree import blank_comments_and_strings, functions

MAX_COLUMNS = 100
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Which folders of src/ a folder may include, itself and the public headers aside. "backend" is the
# seam: the files directly in src/backend/.
BELOW = {
    "base": set(),
    "plan": {"base", "protocol"},
    "protocol": {"base"},
    "fabric": {"base", "protocol"},
    "backend": {"base", "plan", "protocol", "fabric"},
    "modes": {"base", "plan", "protocol", "fabric", "backend"},
    "api": {"base", "plan", "protocol", "fabric", "backend", "modes"},
    # Every backend, whatever its name.
    "backend/*": {"base", "plan", "protocol", "fabric", "backend"},
    # What lies on top of the library.
    "cli": {"base", "plan", "protocol", "fabric", "backend"},
    "examples": set(),
}
FOREIGN_HEADERS = re.compile(r"^(cuda|cub/|thrust/|nv|device_launch|ucp/|ucs/|uct/|ucx|mpi|torch/|"
                             r"ATen/|c10/|Python\.h|pybind11|nanobind)")
BANNED_WORDS = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|WIP)\b|\bAI\b|DESIGN\.md|(?<![\w.$}])/(?:work|home|root)/|\bsandbox|"
    r"\b[Ii]ssue\s+#?\d|https?://(?:\w+\.)*(?:pypi|pythonhosted|debian|npmjs|crates)\.\w+", re.I)
THIS_FOLDER = "tests/lint/"
# What is used of NVSHMEM, all of it described in its API documentation, so that any transport has
# it: setup, memory, puts with and without a signal, signals, tests, quiet.
NVSHMEM_CALLS = set("""
    nvshmem_my_pe nvshmem_n_pes nvshmem_ptr nvshmem_align
    nvshmemx_get_uniqueid nvshmemx_init_attr nvshmemx_set_attr_uniqueid_args
    nvshmemx_init_attr_t nvshmemx_uniqueid_t
    nvshmem_putmem_signal_nbi nvshmemx_putmem_signal_nbi_warp nvshmemx_putmem_signal_nbi_block
    nvshmemx_putmem_nbi_block nvshmemx_signal_op nvshmem_signal_fetch nvshmem_uint64_test
    nvshmem_quiet
    NVSHMEM_CMP_GE NVSHMEM_SIGNAL_ADD NVSHMEM_SIGNAL_SET
    NVSHMEMX_INIT_ATTR_INITIALIZER NVSHMEMX_INIT_WITH_UNIQUEID NVSHMEMX_UNIQUEID_INITIALIZER
""".split())
NVSHMEM_HEADERS = {"nvshmem.h", "nvshmemx.h", "nvshmem_host.h"}
OWN_NVSHMEM_NAMES = {"nvshmem_parts", "nvshmem_puts_only"}


def folder_of(path):
    """The layer that a file belongs to: a key of BELOW, 'backend/NAME', 'include', 'tests', ..."""
    parts = path.split("/")
    if parts[0] != "src":
        return parts[0]
    if parts[1] == "backend" and len(parts) > 3:
        return "/".join(parts[1:3])
    return parts[1]


def layer_of_include(name):
    """The layer of a quoted include, as seen from src/; None for a file of the same folder."""
    parts = name.split("/")
    if parts[0] == "deep_ep":
        return "include"
    if parts[0] == "backend" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0] if parts[0] in BELOW else None


def includes_point_downwards(sources):
    for source in sources:
        folder = folder_of(source.path)
        key = "backend/*" if folder.startswith("backend/") else folder
        if not source.is_code or key not in BELOW:
            continue
        for number, name, quoted in source.includes():
            layer = layer_of_include(name) if quoted else None
            if layer in (None, "include", folder) or layer in BELOW[key]:
                continue
            yield f"{source.path}:{number}: {folder} must not include {name}"


def public_headers_stand_alone(sources):
    for source in sources:
        if folder_of(source.path) != "include":
            continue
        for number, name, quoted in source.includes():
            if quoted and not name.startswith("deep_ep/"):
                yield f"{source.path}:{number}: a public header must not include {name}"
            if not quoted and ("/" in name or "." in name or FOREIGN_HEADERS.match(name)):
                yield f"{source.path}:{number}: a public header includes the standard library only"


def only_backends_know_devices(sources):
    """CUDA, NVSHMEM and UCX headers outside the backends, but for the shared atomics and NVTX."""
    allowed = {"src/protocol/atomic.hpp": "cuda/", "src/base/nvtx.hpp": "nvtx3/"}
    for source in sources:
        if not source.path.startswith("src/") or folder_of(source.path).startswith("backend/"):
            continue
        if source.path.startswith("src/fabric/ucx/"):  # a library of its own, as a backend is
            continue
        for number, name, quoted in source.includes():
            if quoted or not FOREIGN_HEADERS.match(name):
                continue
            if not name.startswith(allowed.get(source.path, "\0")):
                yield f"{source.path}:{number}: {name} is for backends only"


def files_are_short(sources):
    for source in sources:
        if (source.is_code or source.suffix in {".py", ".cmake"} or source.path == "dev") and len(
                source.lines) > MAX_FILE_LINES:
            yield f"{source.path}:1: {len(source.lines)} lines, {MAX_FILE_LINES} are allowed"


def functions_are_short(sources):
    for source in sources:
        if not source.is_code:
            continue
        for line, length in functions(source.text):
            if length > MAX_FUNCTION_LINES:
                yield (f"{source.path}:{line}: function of {length} lines, "
                       f"{MAX_FUNCTION_LINES} are allowed")


def lines_are_short(sources):
    for source in sources:
        if not source.is_code and source.suffix not in {".py", ".sh"} and source.path != "dev":
            continue
        for number, line in enumerate(source.lines, 1):
            if len(line) > MAX_COLUMNS and "http" not in line:
                yield f"{source.path}:{number}: {len(line)} columns, {MAX_COLUMNS} are allowed"


def code_matches(sources, pattern, allowed, text):
    for source in sources:
        if not source.is_code or allowed(source.path):
            continue
        for number, line in enumerate(blank_comments_and_strings(source.text).splitlines(), 1):
            if re.search(pattern, line):
                yield f"{source.path}:{number}: {text}"


def assembly_lives_in_one_folder(sources):
    yield from code_matches(
        sources, r"\b(asm|__asm__)\b", lambda path: path.startswith("src/backend/cuda/device/"),
        "inline assembly belongs to src/backend/cuda/device")


def of_nvshmem_only_what_is_documented(sources):
    """Nothing of its private structures (nvshmemi_...), no header but the documented ones."""
    for source in sources:
        if not source.is_code:
            continue
        for number, name, quoted in source.includes():
            if not quoted and "nvshmem" in name and name not in NVSHMEM_HEADERS:
                yield f"{source.path}:{number}: {name} is no documented header of NVSHMEM"
        code = blank_comments_and_strings(source.text)
        for number, line in enumerate(code.splitlines(), 1):
            if re.match(r"\s*#\s*include", line):
                continue
            for name in re.findall(r"\b(?:nvshmem|NVSHMEM)\w+", line):
                if name not in NVSHMEM_CALLS | OWN_NVSHMEM_NAMES:
                    yield f"{source.path}:{number}: {name} is not in the list of NVSHMEM's calls"


def environment_is_read_in_one_file(sources):
    yield from code_matches(
        sources, r"\b(getenv|secure_getenv)\b",
        lambda path: path == "src/base/env.cpp" or path.startswith("tests/"),
        "environment variables are read in src/base/env.cpp")


def fences_are_not_used(sources):
    yield from code_matches(
        sources, r"\b(atomic_thread_fence|atomic_signal_fence|__sync_synchronize)\b",
        lambda path: path.startswith("src/backend/cuda/"),
        "order memory by acquire and release operations, which race detectors understand")


def headers_are_well_formed(sources):
    for source in sources:
        if not source.is_header:
            continue
        if "#pragma once" not in source.text:
            yield f"{source.path}:1: no #pragma once"
        for number, line in enumerate(source.lines, 1):
            if re.match(r"using namespace\b", line):
                yield f"{source.path}:{number}: using namespace in a header"


def words_are_clean(sources):
    for source in sources:
        if source.path.startswith(THIS_FOLDER):
            continue
        for number, line in enumerate(source.lines, 1):
            match = BANNED_WORDS.search(line)
            if match:
                yield f"{source.path}:{number}: '{match.group(0)}' has no place here"


def plan_and_protocol_are_tested(sources):
    tested = {name for source in sources if source.path.startswith("tests/") and source.is_code
              for _, name, _ in source.includes()}
    for source in sources:
        if folder_of(source.path) in {"plan", "protocol"} and source.is_code:
            header = str(Path(source.path).relative_to("src").with_suffix(".hpp"))
            if header not in tested:
                yield f"{source.path}:1: no test includes {header}"


def no_file_is_dead(sources):
    included = set()
    for source in sources:
        for _, name, _ in source.includes():
            included.add(Path(name).name)
    lists = [s for s in sources if Path(s.path).name == "CMakeLists.txt"]
    for source in sources:
        name = Path(source.path).name
        if source.is_header and name not in included:
            yield f"{source.path}:1: nobody includes this header"
        if source.suffix in {".cpp", ".cu"}:
            above = [s.text for s in lists if Path(s.path).parent in Path(source.path).parents[:-1]]
            if not any(name in text or "GLOB" in text for text in above):
                yield f"{source.path}:1: no CMakeLists.txt builds this file"


def variables_are_documented(sources):
    """docs/env.md has exactly the variables of src/base/env.cpp; ./dev docs writes it."""
    by_path = {source.path: source.text for source in sources}
    listed = set(re.findall(r'^ +\{"([A-Z_]+)",', by_path.get("src/base/env.cpp", ""), re.M))
    documented = set(re.findall(r"^\| `([A-Z_]+)`", by_path.get("docs/env.md", ""), re.M))
    for name in sorted(listed ^ documented):
        yield f"docs/env.md:1: {name} is in one of docs/env.md and src/base/env.cpp only"


def invariants_are_cited(sources):
    """Each invariant of ARCHITECTURE.md is named where the code keeps it, and no other is."""
    by_path = {source.path: source.text for source in sources}
    stated = set(re.findall(r"^- \*\*(I\d+)\*\*", by_path.get("ARCHITECTURE.md", ""), re.M))
    cited = set()
    for source in sources:
        if source.path.startswith("src/") and source.is_code:
            for line in source.text.splitlines():
                cited.update(re.findall(r"\bI\d+\b", line.partition("//")[2]))
    for name in sorted(stated - cited):
        yield f"ARCHITECTURE.md:1: {name} is cited nowhere in src"
    for name in sorted(cited - stated):
        yield f"ARCHITECTURE.md:1: {name} is cited in src, but not stated"


RULES = [
    includes_point_downwards, public_headers_stand_alone, only_backends_know_devices,
    files_are_short, functions_are_short, lines_are_short, assembly_lives_in_one_folder,
    of_nvshmem_only_what_is_documented, environment_is_read_in_one_file, fences_are_not_used,
    headers_are_well_formed, words_are_clean,
    plan_and_protocol_are_tested, no_file_is_dead, variables_are_documented,
    invariants_are_cited,
]
