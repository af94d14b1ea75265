"""Detection and segmentation: what differs between the two."""
