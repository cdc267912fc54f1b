#!/usr/bin/env python3
"""Runs clang-tidy over src/ and remembers which files were clean.

A file is skipped when nothing that it depends on has changed since it was found clean: its own
text, the project's headers that it includes (transitively), its compile command, .clang-tidy and
the tool's version. Usage: clang_tidy.py BUILD_DIRECTORY
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from source_tree import read_tree

ROOT = Path(__file__).resolve().parents[2]
# Options of g++ that clang ends at.
UNKNOWN = re.compile(r" -m(memcpy|memset)-strategy=\S+")


def dependencies(path, by_path, seen):
    """`path` and the project's files below it."""
    if path in seen or path not in by_path:
        return
    seen.add(path)
    for _, name, _ in by_path[path].includes():
        for start in (str(Path(path).parent), "include", "src", "cli"):
            dependencies(os.path.normpath(f"{start}/{name}"), by_path, seen)


def cache_key(command, by_path, common):
    digest = hashlib.sha256(common)
    digest.update(command["command"].encode())
    found = set()
    dependencies(str(Path(command["file"]).relative_to(ROOT)), by_path, found)
    for path in sorted(found):
        digest.update(f"{path}\0{by_path[path].text}\0".encode())
    return digest.hexdigest()


def run(command, commands):
    return subprocess.run(["clang-tidy", "--quiet", "-p", commands, command["file"]], cwd=ROOT,
                          capture_output=True, text=True)


def main():
    build = Path(sys.argv[1]).resolve()
    cache = build / "clang-tidy"
    cache.mkdir(exist_ok=True)
    by_path = {source.path: source for source in read_tree(ROOT)}
    common = (ROOT / ".clang-tidy").read_bytes() + subprocess.run(
        ["clang-tidy", "--version"], check=True, capture_output=True).stdout
    text = UNKNOWN.sub("", (build / "compile_commands.json").read_text())
    (cache / "compile_commands.json").write_text(text)
    commands = [c for c in json.loads(text) if c["file"].startswith(f"{ROOT}/src/")]
    todo = [(command, cache / cache_key(command, by_path, common)) for command in commands]
    todo = [(command, key) for command, key in todo if not key.exists()]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (command, key), result in zip(todo, pool.map(lambda t: run(t[0], cache), todo)):
            if result.returncode == 0:
                key.touch()
            else:
                failed += 1
                print(result.stdout, result.stderr, sep="")
    print(f"clang-tidy: {len(commands)} files, {len(commands) - len(todo)} unchanged, "
          f"{failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
