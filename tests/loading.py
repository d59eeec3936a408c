"""Loading: a policy by the names of options alone, whichever section of a configuration each is in."""

from dataclasses import fields

from hrf_fast.config.options import ModelConfig, SampleConfig
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.policies import load


def load_policy(name, **options):
    """The policy of a model by name; options of no section are arguments of hrf_fast's own `load_policy`."""
    options["name"], sections = str(name), []
    for section in (ModelConfig, SampleConfig, ComputeConfig):
        names = {entry.name for entry in fields(section)} & options.keys()
        sections.append(section(**{name: options.pop(name) for name in names}))
    return load.load_policy(*sections, **options)
