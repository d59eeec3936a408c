"""Assembly: make what a run needs from its configuration, before anything runs.

The only package of the loop that opens the whole configuration: what is below it takes values.
"""
