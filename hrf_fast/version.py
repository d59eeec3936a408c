"""The version of the package; setup.py reads it here."""

__version__ = "0.2.0.dev0"
