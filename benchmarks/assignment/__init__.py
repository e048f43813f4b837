"""Assignment of predictions to targets, against the published loop."""
