"""Checkpoints of several models, whole or not at all."""
