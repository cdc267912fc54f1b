#!/usr/bin/env python3
"""Prints 'passed failed skipped' for one run of ctest.

A program of GoogleTest counts as the cases in the report that it wrote; every other test, and a
program that ended before its report, counts as one. Usage: count_cases.py RESULTS_DIRECTORY
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def outcome(case):
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    if case.get("status") == "disabled" or case.find("skipped") is not None:
        return "skipped"
    return "passed"


def count(results):
    """Totals over all tests that ctest ran."""
    total = Counter()
    for test in ElementTree.parse(results / "ctest.xml").getroot().iter("testcase"):
        report = results / f"{test.get('name')}.xml"
        program = Counter()
        if report.exists():
            for case in ElementTree.parse(report).getroot().iter("testcase"):
                if case.get("status") != "notrun":  # left out by a filter
                    program[outcome(case) if case.get("result") != "skipped" else "skipped"] += 1
        # A program can fail after its cases passed, for instance by a leak found at exit.
        if not report.exists() or outcome(test) == "failed" and not program["failed"]:
            program[outcome(test)] += 1
        total += program
    return total


if __name__ == "__main__":
    counts = count(Path(sys.argv[1]))
    print(counts["passed"], counts["failed"], counts["skipped"])
