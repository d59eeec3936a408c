"""The driver's tests need triton, which only the GPU extra installs; those of the interpreter do not."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["test_driver.py"]
