"""Sparse mixtures of experts: their experts made from dense models, and merged."""
