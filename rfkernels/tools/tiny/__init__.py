"""A small model of real pictures in motion: its clips, its training, and what is measured of it."""
