#!/usr/bin/env python3
"""Installs a build tree, moves it, and uses it as a stranger would.

Usage: install_test.py BUILD_DIRECTORY VERSION
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[1] / "include"
BUILD = Path(sys.argv[1]).resolve()
VERSION = sys.argv[2]
COMPILER = os.environ.get("CXX", "c++")


def run(*command, ok=True, **settings):
    """Output of a command, in an environment that does not help it to find the library."""
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "CMAKE_PREFIX_PATH")}
    env.update(settings)
    result = subprocess.run([str(c) for c in command], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
    if ok != (result.returncode == 0):
        raise AssertionError(f"{command} exited with {result.returncode}:\n{result.stdout}")
    return result.stdout


def exported_names(library):
    """Demangled names that programs could link against."""
    lines = run("nm", "-DC", "--defined-only", library).splitlines()
    return {line.split(" ", 2)[2] for line in lines if line}


def declared_names():
    """What the public headers mark with DEEP_EP_API."""
    text = "\n".join(path.read_text() for path in (HEADERS / "deep_ep").glob("*.hpp"))
    types = re.findall(r"(?:class|struct) DEEP_EP_API (\w+)", text)
    functions = re.findall(r"^DEEP_EP_API [^;(]*?(\w+)\(", text, re.M)
    return set(types), set(functions)


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp(prefix="deep_ep_install_"))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        run("cmake", "--install", BUILD, "--prefix", cls.folder / "first")
        cls.prefix = cls.folder / "moved"
        (cls.folder / "first").rename(cls.prefix)
        cls.shared_library = next(cls.prefix.glob("lib*/**/libdeep_ep.so"))

    def configure(self, name, version, ok=True):
        return run("cmake", "-S", HERE / "consumer", "-B", self.folder / name,
                   f"-DCMAKE_PREFIX_PATH={self.prefix}", f"-DWANTED_VERSION={version}", ok=ok)

    def test_a_program_finds_it_by_find_package(self):
        major, minor, _ = VERSION.split(".")
        self.configure("by_cmake", f"{major}.{minor}")
        run("cmake", "--build", self.folder / "by_cmake")
        self.assertIn(f"deep_ep {VERSION} received 2 rows", run(self.folder / "by_cmake/consumer"))

    def test_find_package_refuses_another_minor_version(self):
        major, minor, _ = VERSION.split(".")
        output = self.configure("refused", f"{major}.{int(minor) + 1}", ok=False)
        self.assertIn("deep_ep", output)

    def test_a_program_finds_it_by_pkg_config(self):
        where = str(self.shared_library.parent / "pkgconfig")
        flags = run("pkg-config", "--cflags", "--libs", "deep_ep", PKG_CONFIG_PATH=where).split()
        program = self.folder / "by_pkg_config"
        run(COMPILER, "-std=c++20", HERE / "consumer/main.cpp", "-o", program, *flags,
            f"-Wl,-rpath,{self.shared_library.parent}")
        self.assertIn(f"deep_ep {VERSION} received 2 rows", run(program))

    def test_every_public_header_compiles_alone_without_warnings(self):
        for header in sorted((self.prefix / "include/deep_ep").glob("*.hpp")):
            with self.subTest(header=header.name):
                run(COMPILER, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic",
                    "-Werror", "-x", "c++", "-include", header, "/dev/null",
                    f"-I{self.prefix}/include")

    def test_the_first_dispatch_of_the_readme_compiles(self):
        readme = (HERE.parents[1] / "README.md").read_text()
        code = re.search(r"## First dispatch\n+```cpp\n(.*?)```", readme, re.S).group(1)
        head, body = code.split("using namespace deep_ep;\n")
        around = ("using namespace deep_ep;\n"
                  "void run_experts(const Tensor&, const Tensor&, const Tensor&);\n"
                  "void f(const void* x_data, const void* ids, const void* w, long num_tokens,\n"
                  "       long hidden, long topk, int num_experts) {\n")
        program = self.folder / "first_dispatch.cpp"
        program.write_text(head + around + body + "}\n")
        run(COMPILER, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused-variable",
            "-Wno-unused-but-set-variable", program, f"-I{self.prefix}/include")

    def test_exactly_the_declared_names_are_exported(self):
        types, functions = declared_names()
        exported = set()
        for name in exported_names(self.shared_library):
            match = re.match(r"(?:(?:typeinfo|typeinfo name|vtable) for )?deep_ep::(\w+)", name)
            self.assertTrue(match, f"exported, but not ours: {name}")
            self.assertNotIn("::Impl::", name)
            exported.add(match.group(1))
        self.assertEqual(exported - types - functions, set(), "exported, but not declared")
        self.assertEqual(functions - exported, set(), "declared, but not exported")

    def test_the_library_needs_no_device_or_network_library(self):
        dynamic = run("readelf", "-dW", self.shared_library)
        major, minor, _ = VERSION.split(".")
        soname = f"{major}.{minor}" if major == "0" else major
        self.assertIn(f"Library soname: [libdeep_ep.so.{soname}]", dynamic)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        for name in needed:
            self.assertRegex(name, r"^(libstdc\+\+|libm|libgcc_s|libc|ld-linux|libhwy|libfmt)[-.]")
        self.assertNotRegex(dynamic, r"\((RPATH|RUNPATH)\)")

    def test_the_plugin_for_ucx_alone_needs_it_and_exports_one_name(self):
        plugin = next(self.prefix.glob("lib*/**/libdeep_ep_ucx.so"), None)
        if plugin is None:
            self.skipTest("built without UCX")
        self.assertEqual(exported_names(plugin), {"deep_ep_ucx_heap"})
        dynamic = run("readelf", "-dW", plugin)
        self.assertIn("[libucp.so", dynamic)
        for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
            self.assertEqual(path, "$ORIGIN")

    def test_the_tool_runs_from_where_it_was_moved(self):
        tool = self.prefix / "bin/deepep"
        self.assertIn(VERSION, run(tool, "--version"))
        for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "-dW", tool)):
            self.assertRegex(path, r"^\$ORIGIN\b")


class Configuration(unittest.TestCase):
    PARTS = ("CUDA", "UCX", "NVSHMEM", "MPI comparison", "moe_layer")

    def test_it_prints_which_parts_are_on_and_why_others_are_off(self):
        with tempfile.TemporaryDirectory() as folder:
            asked = ["-DDEEP_EP_CUDA=OFF", "-DDEEP_EP_UCX=OFF", "-DDEEP_EP_BUILD_TESTS=OFF"]
            text = run("cmake", "-S", HERE.parents[1], "-B", folder, "-Wno-dev", *asked)
        parts = {name.strip(): (state, reason) for name, state, reason in
                 re.findall(r"^     (\S.{16}) (on|off) +(.*)$", text, re.M)}
        self.assertEqual(parts["host backend"], ("on", "always"))
        for name, option in (("CUDA", "DEEP_EP_CUDA"), ("UCX", "DEEP_EP_UCX"),
                             ("tests", "DEEP_EP_BUILD_TESTS")):
            self.assertEqual(parts[name], ("off", f"{option}=OFF"))
        for name in self.PARTS:
            self.assertGreater(len(parts[name][1]), 2, f"{name}: without a reason")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
