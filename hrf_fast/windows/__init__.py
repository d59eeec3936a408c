"""Which denoising steps are trained."""
