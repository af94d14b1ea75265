"""Configurations for MMDetection and MMSegmentation, and what adapts a configuration to an artifact."""
