"""The documentation's tables and plots are what bench/plots/plots.py makes of bench/results."""

import re
import subprocess
import sys
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench/plots"))
import chart  # noqa: E402
import plots  # noqa: E402


class Plots(unittest.TestCase):
    def test_pages_and_plots_are_up_to_date(self):
        done = subprocess.run([sys.executable, ROOT / "bench/plots/plots.py", "--check"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_a_table_that_was_changed_by_hand_is_made_anew(self):
        text = (ROOT / "docs/performance.md").read_text()
        used = set()
        self.assertEqual(plots.filled(text, used), text)
        self.assertIn("h100-intranode", used)
        changed = text.replace("| 8 | 212 /", "| 8 | 112 /")
        self.assertNotEqual(changed, text)
        self.assertEqual(plots.filled(changed, set()), text)

    def test_goals_are_met_missed_or_not_measured(self):
        row = {"hidden": 7168, "topk": 8, "experts": 256, "tokens": 4096, "dtype": "bf16"}
        run = {"command": "bench intranode",
               "args": {"ranks": 4, "backend": "cuda", "comm_stream": False},
               "results": [{**row, "num_sms": sms, "operation": operation, "median_us": us}
                           for sms, operation, us in ((16, "dispatch_cached", 470.0),
                                                      (20, "dispatch_cached", 400.0),
                                                      (16, "layout", 10.0), (20, "dispatch", 1.0),
                                                      (16, "dispatch", 490.1),
                                                      (16, "combine", 1.0))]}
        self.assertEqual(plots.gpu_goals.table([run]).splitlines()[2:], [
            "| 4 | cached dispatch BF16, 16 SMs | 470.0 | 470 | met |",
            "| 4 | layout + dispatch that waits for counts, BF16, 16 SMs | 500.1 | 500 | missed |"])
        own_stream = {**run, "args": {**run["args"], "comm_stream": True}}
        self.assertEqual(len(plots.gpu_goals.table([own_stream]).splitlines()), 2)
        self.assertEqual(plots.gpu_goals.best([run], ("dispatch_cached",), row), (400.0, 20))

    def test_pages_show_every_plot_and_no_other(self):
        shown = set()
        for page in (ROOT / "docs").glob("*.md"):
            shown |= set(re.findall(r"\(plots/(\w+)\.svg\)", page.read_text()))
        self.assertEqual(shown, set(plots.PLOTS))
        kept = {path.stem for path in (ROOT / "docs/plots").iterdir()}
        self.assertEqual(kept, set(plots.PLOTS))

    def test_points_lie_where_their_values_say(self):
        lines = {"one": [(1, 10), (10, 100), (100, 1000)]}
        text = chart.line_chart("A & B", ("x", "y"), lines)
        self.assertEqual(text, chart.line_chart("A & B", ("x", "y"), lines))
        tree = ElementTree.fromstring(text)
        polyline = next(one for one in tree.iter() if one.tag.endswith("polyline"))
        points = [tuple(map(float, point.split(","))) for point in polyline.get("points").split()]
        steps = [tuple(after - before for before, after in zip(*pair))
                 for pair in zip(points, points[1:])]
        self.assertEqual(len(points), 3)
        for first, second in zip(*steps):  # equal factors, equal ways
            self.assertAlmostEqual(first, second, delta=0.11)
        self.assertGreater(steps[0][0], 50)
        self.assertLess(steps[0][1], -50)  # upwards

    def test_axes_have_round_numbers(self):
        self.assertEqual(chart.Axis([12, 480], 0, 1, True).ticks, [10, 20, 50, 100, 200, 500])
        self.assertEqual(chart.Axis([3, 240], 0, 1, False).ticks, [0, 50, 100, 150, 200, 250])
        self.assertEqual(chart.number(10000.0), "10 000")


if __name__ == "__main__":
    unittest.main()
