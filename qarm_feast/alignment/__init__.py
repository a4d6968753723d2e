"""The aligned encoder: an offline job that turns behaviour and item content into item vectors."""
