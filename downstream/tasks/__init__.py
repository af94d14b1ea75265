"""What differs between detection and segmentation: datasets, pipelines, metrics."""
