"""organseg trains one multi-organ segmentation model from partially labelled scans."""

__version__ = "0.1.0"
