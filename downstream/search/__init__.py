"""Search in files of features: nearest images, near-duplicates, outliers, and a map; no model is needed."""
