"""Quality of what the cache keeps."""
