"""For doctests: modules that are left out.

An old name takes its new module's place on import; the harness's modules need the extra lm-eval.
"""

from importlib.util import find_spec

collect_ignore = ["rim_peft/data/tasks.py"]
if not find_spec("lm_eval"):
    collect_ignore += ["rim_peft/evaluation/harness.py", "rim_peft/run/harness.py"]
