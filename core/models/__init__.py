"""Networks: the one-shot denoiser, small classifiers, and checkpoints that carry their architecture."""
