"""The repository's files and how their code is split into includes and functions."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CODE_SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh"}
TOP_FOLDERS = ("include", "src", "cli", "bench", "examples", "tests", "python")


@dataclass
class Source:
    path: str  # relative to the root, with forward slashes
    text: str
    lines: list[str] = field(init=False)

    def __post_init__(self):
        self.lines = self.text.splitlines()

    @property
    def suffix(self):
        return Path(self.path).suffix

    @property
    def is_code(self):
        return self.suffix in CODE_SUFFIXES

    @property
    def is_header(self):
        return self.suffix in {".hpp", ".cuh"}

    def includes(self):
        """(line number, name, in quotes) of every #include."""
        for number, line in enumerate(self.lines, 1):
            match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
            if match:
                yield number, match.group(2), match.group(1) == '"'


def read_tree(root):
    """Every text file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", root, "ls-files", "-z", "--cached", "--others",
         "--exclude-standard"], check=True, capture_output=True, text=True).stdout
    sources = []
    for name in sorted(filter(None, listed.split("\0"))):
        path = Path(root, name)
        if not path.is_file():
            continue
        try:
            sources.append(Source(name, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return sources


def blank_comments_and_strings(text):
    """Replaces comments and the insides of literals by spaces, keeping every line where it was."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"(?P<d>[^(\s]*)\(.*?\)(?P=d)"|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'", re.S)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)


def _without_template_heads(head):
    """Drops every `template <...>`, which may name classes."""
    while (start := head.find("template")) >= 0 and (at := head.find("<", start)) >= 0:
        depth = 0
        while at < len(head):
            depth += {"<": 1, ">": -1}.get(head[at], 0)
            at += 1
            if depth == 0:
                break
        head = head[:start] + head[at:]
    return head


def _opens_function(head):
    """Whether the text between the last ; { or } and a { is the head of a function."""
    head = _without_template_heads(head).strip()
    if "(" not in head or head.endswith("="):
        return False
    return not re.search(r"\b(namespace|class|struct|union|enum)\b", head.split("(")[0])


def functions(text):
    """(line of the opening brace, number of lines) of each outermost function body."""
    code = re.sub(r"^[ \t]*#.*(?:\\\n.*)*", lambda m: re.sub(r"[^\n]", " ", m.group(0)),
                  blank_comments_and_strings(text), flags=re.M)
    line = 1
    head_start = 0
    parens = 0
    stack = []  # for each open brace, the line where a function began, or None
    for at, char in enumerate(code):
        if char == "\n":
            line += 1
        elif char == "(":
            parens += 1
        elif char == ")":
            parens -= 1
        elif char == "{":
            inside = any(begin is not None for begin in stack)
            is_function = not inside and parens == 0 and _opens_function(code[head_start:at])
            stack.append(line if is_function else None)
            head_start = at + 1 if parens == 0 else head_start
        elif char == "}" and stack:
            begin = stack.pop()
            if begin is not None:
                yield begin, line - begin + 1
            head_start = at + 1 if parens == 0 else head_start
        elif char == ";" and parens == 0:
            head_start = at + 1
