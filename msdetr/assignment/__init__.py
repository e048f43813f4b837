"""Assignment of predictions to targets: one-to-one and one-to-many."""
