"""Ablations: from a table of config overrides to trained rows."""
