"""What tests of the command line tool have in common."""

import os
import subprocess
import sys
import unittest

DEEPEP = sys.argv.pop()
LAUNCHERS = ("DEEP_EP_", "OMPI_", "PMIX_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE",
             "TORCHELASTIC")


def variables(**more):
    """This environment, as far as no launcher made it, and more."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, "DEEP_EP_TIMEOUT_MS": "60000", **more}


def start(arguments, environment):
    return subprocess.Popen([DEEPEP, *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def main():
    """Runs the tests of the program; prints "N passed, N failed, N skipped" for the count."""
    result = unittest.main(exit=False).result
    failed, skipped = len(result.failures) + len(result.errors), len(result.skipped)
    for test, why in result.skipped:
        print(f"SKIPPED {test}: {why}")
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
