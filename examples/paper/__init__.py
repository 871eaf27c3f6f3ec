"""The protocol of arXiv 2311.02849: pre-train by every method, fine-tune each model by itself, compare over seeds."""
