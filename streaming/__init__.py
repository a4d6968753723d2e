"""The streaming daemon: Kafka events in, codes and recent items in Feast out."""
