"""A text-to-image model of the tests: the prompt is a word, and the word a class of a tiny UNet."""

import pytest
import torch

from hrf_fast.policies.base import Condition
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import build_sampler
from tests.conftest import make_scheduler, make_smallest_unet

WORDS = ("red", "green", "blue", "grey")


class PromptedPolicy(PixelPolicy):
    """Draws what a word of WORDS says; `asked` holds the prompts and `guided` of every condition."""

    takes_prompts = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.asked = []

    def condition(self, prompts, *, guided=True):
        texts = [prompt.text if prompt else WORDS[0] for prompt in prompts]
        self.asked.append((texts, guided))
        return Condition({"class_labels": torch.tensor([WORDS.index(text) for text in texts])})


def make_prompted_policy(num_inference_steps=6, **_) -> PromptedPolicy:
    unet = make_smallest_unet(channels=3, size=8, num_class_embeds=len(WORDS))
    scheduler = make_scheduler(clip_sample=False)
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=num_inference_steps, eta=1.0)
    return PromptedPolicy(unet.eval(), scheduler, sampler)


@pytest.fixture
def prompted(monkeypatch):
    """Every model that is loaded is a new PromptedPolicy of equal weights; the list holds them."""
    loaded = []

    def load(model, sample, compute, **options):
        loaded.append(make_prompted_policy(sample.num_inference_steps))
        return loaded[-1]

    monkeypatch.setattr("hrf_fast.assembly.model.load_policy", load)
    return loaded
