"""Configurations for MMDetection and MMSegmentation, and functions that adapt them to an encoder."""
