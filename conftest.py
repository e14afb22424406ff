"""For doctests: modules of the package that need the harness (the extra lm-eval) are left out where it is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["rim_peft/evaluation/harness.py", "rim_peft/run/harness.py"]
