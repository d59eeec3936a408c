"""Kinds of models: a file for each, and table.py, which has them by the class of their pipeline."""
