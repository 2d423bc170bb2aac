"""Machinery of training: samples, the loop, the optimiser, checkpoints, the journal, health signs."""
