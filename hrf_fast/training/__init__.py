"""One iteration of training: anchors, windows, rollouts, rewards, updates."""
