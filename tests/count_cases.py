#!/usr/bin/env python3
"""Prints 'passed failed skipped' for one run of ctest, or of pytest.

A program of GoogleTest counts as the cases in the report that it wrote, a program that prints a
line 'N passed, N failed, N skipped' as those, every other test as one, and so does a program that
ended before it could tell. Usage: count_cases.py RESULTS_DIRECTORY | REPORT.xml
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


LINE = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", re.M)


def outcome(case):
    """Of a test as ctest saw it, or of one case of GoogleTest."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    left_out = case.get("status") in ("disabled", "notrun") or case.get("result") == "skipped"
    return "skipped" if left_out or case.find("skipped") is not None else "passed"


def cases_of(test, report):
    """The cases inside one test of ctest; empty if it does not tell."""
    if report.exists():
        return Counter(map(outcome, ElementTree.parse(report).getroot().iter("testcase"))), True
    lines = LINE.findall(test.findtext("system-out") or "")
    if lines:
        return Counter(dict(zip(("passed", "failed", "skipped"), map(int, lines[-1])))), True
    return Counter(), False


def count(results):
    """Totals over all tests that ctest ran, or that pytest reports."""
    if results.suffix == ".xml":
        return Counter(map(outcome, ElementTree.parse(results).getroot().iter("testcase")))
    total = Counter()
    for test in ElementTree.parse(results / "ctest.xml").getroot().iter("testcase"):
        cases, told = cases_of(test, results / f"{test.get('name')}.xml")
        # A program can fail after its cases passed, for instance by a leak found at exit.
        if not told or (outcome(test) == "failed" and not cases["failed"]):
            cases[outcome(test)] += 1
        total += cases
    return total


if __name__ == "__main__":
    counts = count(Path(sys.argv[1]))
    print(counts["passed"], counts["failed"], counts["skipped"])
