"""Adapters → folders that plain transformers, stock PEFT and other engines run without this package."""
