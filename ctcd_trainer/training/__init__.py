"""Parts of the trainer: optimizer, evaluation, meters, augmentation, hyperparameter search."""
