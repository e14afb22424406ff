"""Benchmarks: two ways of doing the same thing side by side, each with the bound that it should reach.

``python -m benchmarks --help`` shows how to run them; ``rim-peft bench`` does the same in a clone.
:mod:`benchmarks.registry` shows how to add one.
"""
