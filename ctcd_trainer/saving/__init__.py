"""Checkpoints of several models, written whole or not at all."""
