"""Rules of prompts and guidance: options that would do nothing without them."""

from __future__ import annotations

from hrf_fast.config.options import Config, EvaluationConfig, PromptsConfig


def check_prompt_options(config: Config) -> None:
    """Check that every option of prompts and of guidance does something.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    prompts, evaluation = config.prompts, config.evaluation
    if prompts.source is None:
        for name, default in vars(PromptsConfig()).items():
            if (value := getattr(prompts, name)) != default:
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                raise ValueError(
                    f"prompts.{name} is {shown} but prompts.source is null, so there are no prompts; name a source, "
                    f"or leave prompts.{name} out"
                )
    if prompts.distinct and config.train.groups_per_iteration == 1:
        raise ValueError(
            "prompts.distinct is true but train.groups_per_iteration is 1: one draw is never twice alike; use more "
            "groups, or leave prompts.distinct out"
        )
    usual = EvaluationConfig().images_per_prompt
    # a model that takes prompts has a source, so that this is about the others
    if prompts.source is None and evaluation.prompts is None and evaluation.images_per_prompt != usual:
        raise ValueError(
            f"evaluation.images_per_prompt is {evaluation.images_per_prompt} but prompts.source is null, so the panel "
            f"has no prompts; name a source, or leave it at {usual}"
        )
    if prompts.negative and config.sample.guidance_scale == 1:
        raise ValueError(
            f"prompts.negative is {prompts.negative!r} but sample.guidance_scale is 1, and a negative prompt acts "
            "through guidance; use a scale above 1, or leave prompts.negative out"
        )
    if not config.train.guidance and config.sample.guidance_scale == 1:
        raise ValueError(
            "train.guidance is false but sample.guidance_scale is 1, which guides nothing; use a scale above 1, or "
            "leave train.guidance out"
        )
