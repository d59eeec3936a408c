"""The files that ship with the package: small models, their scoring networks and reference images.

Nothing is loaded here; `hrf_fast.scorers` reads the scoring networks and the references.
"""

from pathlib import Path

ASSETS = Path(__file__).parent
SHIPPED = ("fashion", "portraits")
