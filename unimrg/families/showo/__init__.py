"""Show-o (arXiv 2408.12528): one causal language model over text and the codes of pictures."""
