"""Benchmarks: two ways of doing the same thing side by side, each with the bound it is to reach.

``python -m benchmarks --help`` says how they are run; ``rim-peft bench`` is the same in a clone. How one is added
stands in :mod:`benchmarks.registry`.
"""
