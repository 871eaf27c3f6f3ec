"""Every reason for which a training is refused before it starts."""
