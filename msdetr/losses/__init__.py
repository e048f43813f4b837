"""Loss terms and the training criterion."""
