"""The differences between detection and segmentation: datasets, pipelines, metrics."""
