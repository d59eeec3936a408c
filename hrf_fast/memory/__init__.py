"""Plans: the bytes and calls that a configuration needs, before they are spent."""
