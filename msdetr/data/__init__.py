"""Data sets in COCO layout, augmentation, batches."""
