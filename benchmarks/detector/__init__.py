"""The whole detector: training steps, inference, and what makes the host wait."""
