#!/usr/bin/env python3
"""Checks the house rules over the whole repository, and the checks themselves on small examples.

Run it alone (python3 tests/lint/tidy_test.py), by ctest, or by ./dev lint.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import rules
from source_tree import Source, functions, read_tree

ROOT = Path(__file__).resolve().parents[2]

# How many violations of a rule still stand. A number may only be lowered: the test also fails when
# the tree has become better than the number says.
STANDING = {}


class Tree(unittest.TestCase):
    """One test a rule, added below."""

    sources = read_tree(ROOT)

    def check(self, rule):
        found = list(rule(self.sources))
        standing = STANDING.get(rule.__name__, 0)
        if len(found) > standing:
            self.fail(f"{len(found)} violations, {standing} stand:\n  " + "\n  ".join(found))
        self.assertEqual(len(found), standing, f"better than STANDING: lower {rule.__name__}")


for _rule in rules.RULES:
    setattr(Tree, "test_" + _rule.__name__, lambda self, rule=_rule: self.check(rule))


def violations(rule, **files):
    """Runs a rule on files given as src__plan__a_hpp="text"."""
    sources = [Source(name.replace("__", "/").replace("_hpp", ".hpp").replace("_cpp", ".cpp"), text)
               for name, text in files.items()]
    return list(rule(sources))


class FunctionLengths(unittest.TestCase):
    def test_nested_braces_belong_to_the_outermost_function(self):
        text = "namespace a {\nvoid f() {\n  if (x) {\n    g([] {\n    });\n  }\n}\n}\n"
        self.assertEqual(list(functions(text)), [(2, 6)])

    def test_members_and_templates_are_functions_and_their_types_are_not(self):
        text = ("template <int N, class T>\nstruct A : B<T> {\n  int x{1};\n"
                "  template <int M, class U>\n  int f(U u) const {\n    return 1;\n  }\n};\n")
        self.assertEqual(list(functions(text)), [(5, 3)])

    def test_braces_in_strings_and_comments_do_not_count(self):
        self.assertEqual(list(functions('int f() {  // {\n  g("{", \'{\');\n}\n')), [(1, 3)])

    def test_constructor_initialisers_do_not_hide_the_body(self):
        text = "A::A(int x) : x_{x}, y_(x) {\n  g();\n}\n"
        self.assertIn((1, 3), list(functions(text)))

    def test_digit_separators_are_not_character_literals(self):
        self.assertEqual(list(functions("int f() {\n  return 1'000'000;\n}\n")), [(1, 3)])

    def test_tables_are_not_functions(self):
        self.assertEqual(list(functions("const T t[] = {\n  {f(1), 2},\n};\n")), [])


class RuleExamples(unittest.TestCase):
    def test_an_upward_include_is_found(self):
        found = violations(rules.includes_point_downwards,
                           src__plan__a_cpp='#include "modes/intranode.hpp"\n')
        self.assertEqual(len(found), 1)

    def test_a_backend_must_not_include_another(self):
        rule = rules.includes_point_downwards
        other = '#include "backend/cuda/a.hpp"\n'
        self.assertEqual(len(violations(rule, src__backend__host__a_cpp=other)), 1)
        own = '#include "backend/host/a.hpp"\n#include "backend/backend.hpp"\n'
        self.assertEqual(violations(rule, src__backend__host__a_cpp=own), [])

    def test_a_device_header_in_a_public_header_is_found(self):
        found = violations(rules.public_headers_stand_alone,
                           include__deep_ep__a_hpp="#include <cuda_runtime.h>\n")
        self.assertEqual(len(found), 1)

    def test_what_nvshmem_does_not_document_is_found(self):
        rule = rules.of_nvshmem_only_what_is_documented
        for text in ("nvshmemi_transfer_rma();\n", "nvshmem_barrier_all();\n",
                     "#include <device_host/nvshmem_types.h>\n", "int x = NVSHMEMI_TEAM;\n"):
            self.assertEqual(len(violations(rule, src__backend__cuda__a_cpp=text)), 1, text)
        fine = ("#include <nvshmem.h>\nnvshmem_quiet();  // not nvshmem_fence\n"
                "namespace nvshmem {}\n")
        self.assertEqual(violations(rule, src__backend__cuda__a_cpp=fine), [])

    def test_getenv_in_a_comment_is_no_call(self):
        rule = rules.environment_is_read_in_one_file
        self.assertEqual(violations(rule, src__api__a_cpp="// getenv\n"), [])
        self.assertEqual(len(violations(rule, src__api__a_cpp='int x = getenv("A");\n')), 1)

    def test_a_plan_file_without_a_test_is_found(self):
        rule = rules.plan_and_protocol_are_tested
        self.assertEqual(len(violations(rule, src__plan__a_cpp="")), 1)
        test = '#include "plan/a.hpp"\n'
        self.assertEqual(violations(rule, src__plan__a_cpp="", tests__a_cpp=test), [])

    def test_invariants_without_code_and_code_without_invariants_are_found(self):
        rule = rules.invariants_are_cited
        stated = Source("ARCHITECTURE.md", "- **I1** A flag.\n- **I2** A box.\n")
        code = Source("src/api/a.cpp", "f();  // one writer (I1)\nint I3;\n/// As I4 has it.\n")
        self.assertEqual([text.split()[1] for text in rule([stated, code])], ["I2", "I4"])

    def test_a_header_that_nobody_includes_is_dead(self):
        self.assertEqual(len(violations(rules.no_file_is_dead, src__base__a_hpp="")), 1)

    def test_a_long_function_is_found(self):
        body = "void f() {\n" + "  g();\n" * 59 + "}\n"
        self.assertEqual(len(violations(rules.functions_are_short, src__base__a_cpp=body)), 1)


if __name__ == "__main__":
    unittest.main()
