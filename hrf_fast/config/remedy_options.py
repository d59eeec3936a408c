"""Options against collapse: terms of the loss and changes of the advantages that keep diversity; all off by default."""

from __future__ import annotations

from dataclasses import dataclass

from hrf_fast.config.facts import option


@dataclass
class RemediesConfig:
    """Guards of diversity beside windows and clips."""

    kl_weight: float = option(0.0, at_least=0)
    """Weight of KL(policy ‖ pretrained model) in the loss of each trained step, as a mean over pixels (DPOK, arXiv
    2305.16381); 0 for none."""
    kl_weight_end: float | None = option(None, at_least=0)
    """Weight of the KL in the last iteration, linearly from kl_weight in the first; null keeps kl_weight."""
    reference_penalty: float = option(0.0, at_least=0)
    """Weight of the mean over pixels of (μ − μ_pretrained)², without the KL's 1/(2σ²), on the first steps only
    (DiverseGRPO, arXiv 2512.21514); 0 for none."""
    reference_steps: int | None = option(None, at_least=1)
    """Steps, from the noisiest on, that reference_penalty is of; null for a third of sample.num_inference_steps."""
    novelty: bool = option(False)
    """Multiply positive advantages by the distance of an image to its nearest neighbour in the group, over the group's
    mean of it, in the features of evaluation.network (GARDO, arXiv 2512.24138)."""
    reward_band: float = option(0.0, at_least=0)
    """Clip rewards to their peers' mean ± this many standard deviations before advantages are made of them (after
    DRIFT, arXiv 2601.12401); 0 for none."""
    matching: float = option(0.0, at_least=0)
    """Match the trajectories of a group to softmax(this · standardised rewards) instead of maximising the reward
    (Uni-TMPO, arXiv 2605.10983); 0 for none."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a term of the pretrained model."""
        return bool(self.kl_weight or self.kl_weight_end or self.reference_penalty)

    def penalised_steps(self, num_inference_steps: int) -> int:
        """Steps that reference_penalty is of."""
        return self.reference_steps or max(1, num_inference_steps // 3)

    def referred_steps(self, num_inference_steps: int) -> int:
        """Steps, from the first, at which the pretrained model is asked."""
        if self.kl_weight or self.kl_weight_end:
            return num_inference_steps
        return self.penalised_steps(num_inference_steps) if self.reference_penalty else 0
