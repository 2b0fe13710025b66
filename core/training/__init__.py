"""Training on one machine, without Ray: the base models, the variance estimator, the fine-tuned classifier."""
