"""Fields of TRL's DDPOConfig (trl 0.23.1) and of its example script: their defaults, and the options they become."""

from __future__ import annotations

from typing import Any

# those that become options or notes, and their defaults; the others are in LEFT_OUT
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "log_with": None,
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "sample_batch_size": 1,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 3e-4,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "train_num_inner_epochs": 1,
    "train_cfg": True,
    "train_adv_clip_max": 5.0,
    "train_clip_range": 1e-4,
    "train_timestep_fraction": 1.0,
    "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16,
    "per_prompt_stat_tracking_min_count": 16,
    "negative_prompts": "",
    "push_to_hub": False,
    # of DefaultDDPOStableDiffusionPipeline and of TRL's example script
    "pretrained_model": "runwayml/stable-diffusion-v1-5",
    "pretrained_revision": "main",
    "use_lora": True,
}
SWITCHED_ON = {name for name, default in DEFAULTS.items() if default is True}
"""Fields that are true by default."""
HEAD = {
    "hf_hub_aesthetic_model_id": "trl-lib/ddpo-aesthetic-predictor",
    "hf_hub_aesthetic_model_filename": "aesthetic-model.pth",
}
"""Fields of TRL's example that name the head of its aesthetic reward, and their defaults."""
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""Models that left their id of the hub, and the id of their mirror."""
LEFT_OUT = {
    ("exp_name", "run_name", "logdir", "project_kwargs", "accelerator_kwargs"): (
        "run.folder names the run and holds all that it writes"
    ),
    ("tracker_project_name", "tracker_kwargs"): (
        "run.writers chooses the writers; WANDB_PROJECT names W&B's project, where the run has its folder's name"
    ),
    ("async_reward_computation", "max_workers"): "rewards are always computed beside the next rollout",
    ("hf_hub_model_id",): "upload the run's model/ folder, which has a card, with `hf upload`",
    tuple(HEAD): "the head of the reward aesthetic is reward.kwargs.head, as owner/repository:filename",
}
"""Fields that become no option, and what takes their place."""
KNOWN = {*DEFAULTS, *(name for names in LEFT_OUT for name in names)}

SAME = {
    "seed": "run.seed",
    "num_epochs": "train.iterations",
    "save_freq": "run.save_every",
    "num_checkpoint_limit": "run.keep_checkpoints",
    "sample_num_steps": "sample.num_inference_steps",
    "sample_eta": "sample.eta",
    "train_learning_rate": "optimizer.learning_rate",
    "train_adam_weight_decay": "optimizer.weight_decay",
    "train_num_inner_epochs": "train.inner_epochs",
    "train_adv_clip_max": "train.advantage_clip",
    "train_clip_range": "train.clip_range",
    "pretrained_model": "model.name",
}
"""The option that takes a field's value as it is."""
DECIDED = {name: (option,) for name, option in SAME.items()} | {
    "sample_guidance_scale": ("sample.guidance_scale",),
    "train_cfg": ("train.guidance",),
    "sample_batch_size": ("train.groups_per_iteration",),
    "sample_num_batches_per_epoch": ("train.groups_per_iteration",),
    "train_batch_size": ("train.groups_per_step", "compute.images_per_call"),
    "train_gradient_accumulation_steps": ("train.groups_per_step",),
    "negative_prompts": ("prompts.negative",),
    "log_with": ("run.writers",),
    "mixed_precision": ("compute.precision", "lora.base_precision"),
    "allow_tf32": ("compute.deterministic",),
    "train_use_8bit_adam": ("optimizer.name",),
    "train_adam_beta1": ("optimizer.kwargs",),
    "train_adam_beta2": ("optimizer.kwargs",),
    "train_adam_epsilon": ("optimizer.kwargs",),
    "train_max_grad_norm": ("optimizer.max_grad_norm",),
    "train_timestep_fraction": ("train.step_share",),
    "per_prompt_stat_tracking": ("train.advantages",),
    "per_prompt_stat_tracking_buffer_size": ("train.prompt_buffer",),
    "per_prompt_stat_tracking_min_count": ("train.prompt_min_count",),
    "pretrained_revision": ("model.revision",),
    "use_lora": ("lora.rank",),
}
"""The options that a field decides; resume_from and push_to_hub have none."""
COUNTS = (
    "sample_batch_size",
    "sample_num_batches_per_epoch",
    "train_batch_size",
    "train_gradient_accumulation_steps",
    "sample_num_steps",
)
"""Fields by which others are multiplied or divided."""
ASKED_FOR = (*COUNTS[:4], "pretrained_model")
"""Fields whose default hardly any script runs with; a source without them gets a note."""
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
