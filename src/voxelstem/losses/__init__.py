"""Formulas only: tensors in, a scalar out. Each is tested against its slow, obvious twin."""
