"""Commands on finished models, a file for each, and what they load a run's models by."""
