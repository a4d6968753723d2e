"""The quality report as one self-contained HTML page."""
