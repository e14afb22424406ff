"""Chains of thought for rows that have none: a teacher writes them, the task's answer rule chooses."""
