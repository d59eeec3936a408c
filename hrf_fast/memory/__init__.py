"""What a configuration needs in bytes and calls, before it is spent."""
