"""From predictions to COCO scores."""
