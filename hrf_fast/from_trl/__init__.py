"""From TRL: configurations of its removed DDPOTrainer as ones of ours."""
