"""OpenUni (arXiv 2505.23661): InternVL3 asks SANA for pictures through learnable queries."""
