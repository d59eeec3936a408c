"""Quality figures of a small model for its card: `python pretraining/judge_ddpm.py fashion`.

512 images by DDIM (eta 1, 50 steps), or of a flow by --scheduler, against the 512 real images that ship, in the
features of the shipped classifier: Vendi and Inception Score, precision and recall (Kynkäänniemi et al., arXiv
1904.06991, k = 3), and the distance to the nearest training image in pixels, compared with that of real held-out
images: a model that copies is nearer.
"""

import argparse
from dataclasses import replace

import torch
from data import fashion, portraits
from torch import Tensor

from hrf_fast.config.options import ModelConfig, SampleConfig
from hrf_fast.evaluation.diversity import inception_score
from hrf_fast.evaluation.panel import Panel
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.sample import sample
from hrf_fast.vision.shipped import load_reference, load_shipped


def covered(of: Tensor, by: Tensor, k: int = 3) -> float:
    """Share of `of` [N, D] that lies within the k-nearest-neighbour ball of some point of `by` [M, D]."""
    radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(of, by) <= radius).any(1).float().mean())


def nearest_training_distance(images: Tensor, training: Tensor) -> float:
    """Median over `images` [N, 3, H, W] of the Euclidean pixel distance to the nearest of `training`."""
    return float(torch.cdist(images.flatten(1), training.flatten(1)).min(1).values.median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("fashion", "portraits", "fashion-flow"))
    parser.add_argument("--model", help="folder; by default the shipped model")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim", help="of a flow: flow_sde, dance_sde, cps or ode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    by_ode = arguments.scheduler == "ode"
    kind = "flow_sde" if by_ode else arguments.scheduler
    policy = load_policy(ModelConfig(arguments.model or arguments.name), SampleConfig(kind, arguments.steps))
    if by_ode:
        policy.sampler = replace(policy.sampler, coefficients=policy.sampler.deterministic)
    noise = Panel(arguments.count, seed=7, images_per_call=64).noise(policy)
    judge(policy.decode(sample(policy, noise, images_per_call=64)), arguments.name)


def judge(images: Tensor, name: str) -> None:
    """Print the figures of images [N, 3, H, W] in [0, 1]."""
    real, classifier = load_reference(name), load_shipped(name)
    pixels = portraits(12_000) if name == "portraits" else fashion("train")[0]
    training = (torch.from_numpy(pixels[:12_000]).permute(0, 3, 1, 2).float() / 255).expand(-1, 3, -1, -1)
    ours, theirs = classifier.features(images), classifier.features(real)
    print(f"Vendi Score {vendi_score(ours):.1f}, real {vendi_score(theirs):.1f}")
    if "label" in classifier.labels:
        scores = [inception_score(classifier.log_probs(x)["label"]) for x in (images, real)]
        print(f"Inception Score {scores[0]:.2f}, real {scores[1]:.2f}")
    print(f"precision {covered(ours, theirs):.2f}, recall {covered(theirs, ours):.2f}")
    near = [nearest_training_distance(x, training) for x in (images, real)]
    print(f"distance to the nearest of 12,000 training images {near[0]:.2f}, of real held-out images {near[1]:.2f}")


if __name__ == "__main__":
    main()
