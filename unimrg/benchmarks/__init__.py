"""Scorers: what stored answers and drawings are worth, and how sure one can be."""
