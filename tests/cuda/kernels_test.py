"""What the compiler says of the kernels: names, which profilers' searches go by, and resources.

usage: kernels_test.py NVCC SOURCE_DIR INCLUDE_DIR... [--nvshmem INCLUDE_DIR]

Without NVSHMEM's folder kernels that need it are left out."""

import os
import re
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NVCC, SOURCE, *INCLUDES = sys.argv[1:]
WITH_NVSHMEM = "--nvshmem" in INCLUDES
if WITH_NVSHMEM:
    INCLUDES.remove("--nvshmem")
KERNELS = Path(SOURCE) / "src/backend/cuda"

# Registers a thread and static shared memory a block, at most; raise them knowingly. An SM has
# registers, so a thread may have 65536 / the threads of the block.
BUDGETS = {
    "intranode/layout": (64, 512),
    "intranode/barrier": (64, 512),
    "intranode/fault": (64, 512),
    "intranode/notify": (64, 512),
    "intranode/dispatch": (96, 512),  # 384 threads
    "intranode/combine": (128, 512),  # 480 threads
    "intranode/count_rows": (64, 512),
    "intranode/place_rows": (64, 512),
    "intranode/expand_rows": (96, 512),  # 384 threads
    "intranode/reduce_rows": (128, 512),  # 512 threads
    "internode_ll/dispatch": (128, 512),  # twice 256 threads
    "internode_ll/combine": (128, 512),  # twice 256 threads
    "internode_ll/set_mask": (64, 512),
}
BUDGETS_OF_NVSHMEM = {
    "internode/notify": (96, 1024),  # 256 threads; where peers are mapped
    "internode/dispatch": (232, 512),  # 256 threads
    "internode/combine": (168, 512),  # 384 threads
    "internode/fill_handle": (64, 512),
    "internode/tell": (64, 512),
    "internode_ll_nodes/dispatch": (168, 512),  # 256 threads
    "internode_ll_nodes/combine": (224, 512),  # 256 threads
    "nvshmem/fill_words": (64, 512),  # 512 threads, as those that follow
    "nvshmem/put_words": (64, 512),
    "nvshmem/compare_words": (64, 512),
}
if WITH_NVSHMEM:
    BUDGETS |= BUDGETS_OF_NVSHMEM


# Launched plainly: they have their streams for themselves, or belong to a benchmark.
ALONE = {"intranode/fault", "internode/tell", "nvshmem/fill_words", "nvshmem/put_words",
         "nvshmem/compare_words"}


class Kernel:
    def __init__(self, mode, name, report, ptx):
        self.name = name  # demangled, parameter types included
        # Values of enumerations are written with their type in front, as a cast.
        plain = re.sub(r"\([\w:]+\)(?=\d)", "", name.replace("(anonymous namespace)", "x"))
        self.short = re.search(r"(\w+)(<[^()]*>)?\(", plain).group(1)
        self.key = f"{mode}/{self.short}"
        self.waits = "griddepcontrol.wait" in ptx
        numbers = {
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
        }
        found = {key: re.search(pattern, report) for key, pattern in numbers.items()}
        self.numbers = {key: int(match.group(1)) if match else 0 for key, match in found.items()}


def demangle(name):
    run = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def compile_source(source):
    linked = source.parent.name in ("internode", "internode_ll_nodes", "nvshmem")
    if linked and not WITH_NVSHMEM:
        return []
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, "-std=c++20", "-O3", "-arch=sm_90", "--fmad=false", "-cubin",
                   "-DDEEP_EP_HAS_LIBCUDACXX", "-Xptxas", "-v", "-o", f"{folder}/out.cubin",
                   "-keep", "-keep-dir", folder]
        command += ["-rdc=true"] if linked else []
        command += [f"-I{path}" for path in (f"{SOURCE}/src", f"{SOURCE}/include", *INCLUDES)]
        command.append(str(source))
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        entries = re.split(r"\.entry\s+(\w+)", Path(folder, f"{source.stem}.ptx").read_text())[1:]
    bodies = dict(zip(entries[::2], entries[1::2]))
    parts = re.split(r"Compiling entry function '(\w+)'", report)[1:]
    return [Kernel(source.parent.name, demangle(name), text, bodies[name])
            for name, text in zip(parts[::2], parts[1::2])]


def compile_kernels():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(compile_source, sorted(KERNELS.glob("*/*.cu")))
        return [kernel for kernels in found for kernel in kernels]


class Kernels(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.kernels = compile_kernels()

    def test_all_are_known(self):
        self.assertEqual({kernel.key for kernel in self.kernels}, set(BUDGETS))

    def test_none_spills_or_exceeds_its_budget(self):
        for kernel in self.kernels:
            with self.subTest(kernel.name):
                registers, shared = BUDGETS[kernel.key]
                self.assertEqual(kernel.numbers["stores"] + kernel.numbers["loads"], 0, "spilled")
                self.assertGreater(kernel.numbers["registers"], 0)
                self.assertLessEqual(kernel.numbers["registers"], registers)
                self.assertLessEqual(kernel.numbers["shared"], shared)

    def test_launched_behind_others_they_wait(self):
        """launch_kernel() lets a kernel begin before the one ahead of it has ended."""
        for kernel in self.kernels:
            with self.subTest(kernel.name):
                self.assertEqual(kernel.waits, kernel.key not in ALONE)

    def test_each_name_says_one_thing(self):
        """Searches for these words go over the whole name, and each must find its own kernel."""
        words = ("dispatch", "combine", "notify")
        for kernel in self.kernels:
            with self.subTest(kernel.name):
                self.assertTrue("::" in kernel.name, "not in a namespace")
                said = {word for word in words if word in kernel.name.lower()}
                self.assertEqual(said, {kernel.short} & set(words))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
