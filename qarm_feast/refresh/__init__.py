"""``qarm refresh``: a new encoder and a codebook that keeps its parent's labels, on a schedule."""
