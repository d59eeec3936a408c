"""Studies: arms × cases × seeds from one file, run side by side, kept line by line, and compared over seeds."""
