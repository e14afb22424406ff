"""Exports in engines that share no code with this package."""
