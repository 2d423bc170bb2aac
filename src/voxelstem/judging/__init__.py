"""What stands behind `evaluate`: contests on the same subjects, baselines, evidence, and the pictures beside them."""
