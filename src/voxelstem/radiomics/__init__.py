"""First-order, shape and region features by IBSI's definitions."""
