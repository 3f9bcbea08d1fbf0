"""Preparing and verifying data sets: python -m datasets.prepare and python -m datasets.verify."""

from .cli import main

__all__ = ["main"]
