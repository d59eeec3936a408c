"""Options: what they are, how they are read, what they may be. Imports no torch."""
