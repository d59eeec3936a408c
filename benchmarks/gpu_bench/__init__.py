"""The parts of `hrf bench gpu`."""
