"""Readers of label formats; `find_reading` finds the one of a dataset by its files."""

from downstream.datasets.formats.find import find_reading

__all__ = ["find_reading"]
