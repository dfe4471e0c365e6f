"""Pre-training of vggt-mini from scratch: made scenes, the run, what it reached, and its export."""
