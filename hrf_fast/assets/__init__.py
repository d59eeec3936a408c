"""The files that ship with the package: small models, their classifiers and reference images, lists of prompts.

Nothing is loaded here; `hrf_fast.vision.shipped` reads the classifiers and the references.
"""

from pathlib import Path

ASSETS = Path(__file__).parent
SHIPPED = ("fashion", "portraits", "peeps", "fashion-flow")
# models whose classifier and reference images lie with another one, which was trained on the same data
DATA = {"fashion-flow": "fashion"}
# lists of prompts, in prompts/
PROMPT_LISTS = {"animals": "animals.txt", "activities": "activities.txt", "peeps": "peeps.jsonl"}
