"""The libraries that are loaded at run time: what they need, and what they export.

usage: libraries_test.py LIBDEEP_EP_CUDA [LIBDEEP_EP_NVSHMEM]"""

import ctypes
import re
import subprocess
import sys
import unittest

CUDA, NVSHMEM = (sys.argv[1:] + [None])[:2]
SYSTEM = r"^(libstdc\+\+|libm|libgcc_s|libc|ld-linux|libpthread|libdl|librt|libhwy|libfmt)[-_.\w]*"


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-dW", library))


def exported(library):
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1] for line in lines}


class Libraries(unittest.TestCase):
    def test_gpus_of_one_node_need_no_library_that_is_not_everywhere(self):
        for name in needed(CUDA):
            self.assertRegex(name, SYSTEM)
        self.assertEqual(exported(CUDA), {"deep_ep_cuda_parts"})
        ctypes.CDLL(CUDA)

    def test_several_nodes_alone_need_nvshmem(self):
        if NVSHMEM is None:
            self.skipTest("built without NVSHMEM")
        others = [name for name in needed(NVSHMEM) if not re.match(SYSTEM, name)]
        self.assertEqual(len(others), 1)
        self.assertRegex(others[0], r"^libnvshmem_host\.so\.\d+$")
        self.assertEqual(exported(NVSHMEM), {"deep_ep_nvshmem"})


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
