"""The whole pipeline on real data, on one machine."""
