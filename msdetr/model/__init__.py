"""The detector: backbone, neck, encoder, query selection, decoder, heads."""
