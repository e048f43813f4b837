"""Non-maximum suppression of many problems, against torchvision's."""
